"""From images on disk to what engines model: one box and pixel size, white particle on N(0, 1) noise."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae import distributed, geometry
from cryo_svae.config import PreparationConfig
from cryo_svae.ctf import CtfTable
from cryo_svae.errors import InputError
from cryo_svae.images import ImageSource
from cryo_svae.particles import ParticleSet

log = logging.getLogger(__name__)

CHUNK = 1024  # particles prepared together: 64 MB at 128 px
PIXELS_AT_ONCE = 1 << 21  # of images as they are on disk: 8 of 512 px; more leave the processor's cache


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The working grid and what is done to reach it; the same for training and estimation.

    mask_diameter_angst: of the circle that holds the particle.
    """

    box_px: int
    pixel_size_angst: float
    mask_diameter_angst: float
    invert: bool

    @property
    def mask_radius_px(self) -> float:
        """Radius of the circle that holds the particle, in working pixels."""
        return self.mask_diameter_angst / 2 / self.pixel_size_angst


def plan_preparation(particles: ParticleSet, config: PreparationConfig, largest_box_px: int) -> Preparation:
    """A working grid common to all optics groups, found from the data unless ``--box`` is given.

    The field of view is the smallest of any group; the pixel size is the coarsest of any group,
    or larger where that would exceed ``largest_box_px`` (or as ``--box`` makes it).
    """
    field_angst = float(np.min(particles.box_px * particles.pixel_size_angst))
    pixel_size = float(np.max(particles.pixel_size_angst))
    own_box = 2 * math.floor(field_angst / pixel_size / 2 + 1e-6)
    box_px = min(own_box, largest_box_px) if config.box is None else config.box
    if box_px > own_box:
        raise InputError(
            "--box",
            found=str(box_px),
            expected=f"at most {own_box}, the box of the images",
            remedy="leave --box out, or give a smaller one.",
        )
    if box_px < own_box:
        pixel_size = field_angst / box_px
    diameter = config.mask_diameter
    if diameter is not None and diameter > box_px * pixel_size:
        raise InputError(
            "--mask-diameter",
            found=f"{diameter:g} Å",
            expected=f"at most {box_px * pixel_size:.1f} Å, the side of the box",
            remedy="give the diameter of the particle in Å.",
        )
    return Preparation(
        box_px=box_px,
        pixel_size_angst=pixel_size,
        mask_diameter_angst=(box_px - 2) * pixel_size if diameter is None else diameter,
        invert=bool(particles.is_dark) if config.invert is None else config.invert,
    )


def soft_circle(box_px: int, radius_px: float, edge_px: float) -> Float[Tensor, "n n"]:
    """1 within ``radius_px`` of the centre N//2, 0 beyond ``edge_px`` more, a raised cosine between."""
    distance = geometry.pixel_grid(box_px).norm(dim=-1)
    ramp = ((distance - radius_px) / edge_px).clamp(0.0, 1.0)
    return 0.5 * (1.0 + torch.cos(math.pi * ramp))


@lru_cache(maxsize=8)
def resampling_matrix(
    box_px: int, pixel_size_angst: float, new_box_px: int, new_pixel_size_angst: float
) -> Float[Tensor, "m n"]:
    """M such that M @ image @ M.T is the image on another grid, by band-limited interpolation.

    Centres N//2 stay put; frequencies beyond the new Nyquist are cut. For a whole image this is
    Fourier cropping; unlike cropping, it reaches any pixel size exactly.
    """
    scale = new_pixel_size_angst / pixel_size_angst
    points = (torch.arange(new_box_px, dtype=torch.float64) - new_box_px // 2) * scale
    pixels = torch.arange(box_px, dtype=torch.float64) - box_px // 2
    cutoff = min(box_px / 2, box_px / (2 * scale))
    k = torch.arange(1, math.floor(cutoff + 1e-6) + 1, dtype=torch.float64)
    weight = torch.where(k > cutoff - 1e-6, 1.0, 2.0)  # the last frequency is shared by +k and -k
    lag = points[:, None] - pixels[None, :]
    waves = torch.cos(2.0 * math.pi / box_px * k * lag[..., None])
    return ((1.0 + (waves * weight).sum(-1)) / box_px).float()


def prepare(
    images: Float[Tensor, "b n n"], pixel_size_angst: float, preparation: Preparation
) -> tuple[Float[Tensor, "b m m"], Bool[Tensor, "b"]]:
    """Prepared images, and which of them are usable (the others are all zero).

    Resampled to the working grid, inverted if asked, brought to mean 0 and standard deviation 1
    outside the particle's circle. NaN, infinite and constant images are not usable.
    """
    finite = torch.isfinite(images).flatten(1).all(1)
    images = torch.where(finite[:, None, None], images, 0.0)
    matrix = resampling_matrix(
        images.shape[-1], pixel_size_angst, preparation.box_px, preparation.pixel_size_angst
    )
    # Large offsets (raw counts) would cost float32 digits in the products.
    centred = images - images.mean((1, 2), keepdim=True)
    resampled = matrix @ centred @ matrix.T
    radius = geometry.pixel_grid(preparation.box_px).norm(dim=-1)
    background = resampled[:, radius > preparation.mask_radius_px]
    mean, std = background.mean(1), background.std(1)
    span = images.flatten(1).max(1).values - images.flatten(1).min(1).values
    usable = finite & (span > 0) & (std > 0) & torch.isfinite(std)
    sign = -1.0 if preparation.invert else 1.0
    scale = torch.where(usable, sign / torch.where(usable, std, 1.0), 0.0)
    return (resampled - mean[:, None, None]) * scale[:, None, None], usable


def working_ctf(ctf: CtfTable, preparation: Preparation) -> CtfTable:
    """The CTF parameters on the working grid's pixel size."""
    size = torch.full_like(ctf.pixel_size_angst, preparation.pixel_size_angst)
    return dataclasses.replace(ctf, pixel_size_angst=size)


def _prepare_particles(
    source: ImageSource, index: NDArray[np.intp], preparation: Preparation
) -> tuple[Float[Tensor, "b m m"], Bool[Tensor, "b"]]:
    particles = source.particles
    images = torch.empty(len(index), preparation.box_px, preparation.box_px)
    usable = torch.empty(len(index), dtype=torch.bool)
    kinds = np.stack([particles.box_px[index], particles.pixel_size_angst[index]], 1)
    for kind in np.unique(kinds, axis=0):
        here = np.flatnonzero((kinds == kind).all(1))
        here = here[np.argsort(particles.stack_of[index[here]], kind="stable")]  # a stack after the other
        n_at_once = max(1, PIXELS_AT_ONCE // int(kind[0]) ** 2)
        for rows in np.split(here, range(n_at_once, len(here), n_at_once)):
            read = torch.from_numpy(source.read(index[rows]))
            images[rows], usable[rows] = prepare(read, float(kind[1]), preparation)
    return images, usable


def prepared_images(
    source: ImageSource, index: NDArray[np.intp], preparation: Preparation, chunk: int = CHUNK
) -> Iterator[tuple[NDArray[np.intp], Float[Tensor, "b m m"], Bool[Tensor, "b"]]]:
    """Chunks of particles ``index`` with their prepared images and whether each is usable.

    The next chunk is read while the present one is used.
    """
    parts = [index[start : start + chunk] for start in range(0, len(index), chunk)]
    with ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(_prepare_particles, source, part, preparation) for part in parts[:1]]
        for number, part in enumerate(parts):
            distributed.stop_if_asked()
            began = time.monotonic()
            images, usable = pending.pop().result()
            source.waited_s += time.monotonic() - began
            if number + 1 < len(parts):
                pending.append(reader.submit(_prepare_particles, source, parts[number + 1], preparation))
            yield part, images, usable
