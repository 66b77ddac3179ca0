"""From images on disk to what engines model: one box and pixel size, white particle on N(0, 1) noise."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae import distributed, geometry
from cryo_svae.config import PreparationConfig
from cryo_svae.ctf import CtfTable
from cryo_svae.errors import InputError
from cryo_svae.images import ImageSource, run_of
from cryo_svae.particles import ParticleSet

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 26  # of prepared images handed on together: 1,024 of 128 px
# Pixels, of images as they are on disk, prepared at once: what a processor's cache holds (8 images of
# 512 px), and what keeps a GPU busy.
PIXELS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
READERS = {"cpu": 1, "cuda": 4}  # threads, each with a chunk; a GPU takes more than one can read
CPU = torch.device("cpu")


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


@dataclass(frozen=True)
class _Grid:
    """What preparing images of one box and pixel size takes, on the device that does it.

    matrix:   (m, n) resamples them; None where they are on the working grid.
    mean:     (m²,) weights of the pixels in the mean of the background.
    variance: (m²,) those of its squares in its variance.
    """

    matrix: Tensor | None
    mean: Tensor
    variance: Tensor


@lru_cache(maxsize=8)
def _grid(box_px: int, pixel_size_angst: float, preparation: Preparation, device: torch.device) -> _Grid:
    new = (preparation.box_px, preparation.pixel_size_angst)
    matrix = None
    if (box_px, pixel_size_angst) != new:
        matrix = resampling_matrix(box_px, pixel_size_angst, *new).to(device)
    radius = geometry.pixel_grid(preparation.box_px).norm(dim=-1).flatten()
    outside = (radius > preparation.mask_radius_px).float()
    n = outside.sum()
    return _Grid(matrix, (outside / n).to(device), (outside / (n - 1.0)).to(device))


def prepare(
    images: Num[Tensor, "b n n"], pixel_size_angst: float, preparation: Preparation
) -> tuple[Float[Tensor, "b m m"], Bool[Tensor, "b"]]:
    """Prepared images, and which of them are usable (the others are all zero), on the images' device.

    Resampled to the working grid, inverted if asked, brought to mean 0 and standard deviation 1
    outside the particle's circle. NaN, infinite and constant images are not usable.
    """
    grid = _grid(images.shape[-1], pixel_size_angst, preparation, images.device)
    pixels = images.float()
    span = pixels.amax((1, 2)) - pixels.amin((1, 2))  # no finite number where a pixel is none
    # Large offsets (raw counts) would cost float32 digits in the products.
    prepared = pixels - pixels.mean((1, 2), keepdim=True)
    if grid.matrix is not None:
        prepared = grid.matrix @ prepared @ grid.matrix.T
    flat = prepared.flatten(1)
    flat -= (flat @ grid.mean)[:, None]
    std = (flat.square() @ grid.variance).sqrt()
    usable = torch.isfinite(span) & (span > 0) & torch.isfinite(std) & (std > 0)
    sign = -1.0 if preparation.invert else 1.0
    flat *= torch.where(usable, sign / std, 0.0)[:, None]
    return prepared.nan_to_num_(0.0), usable


def working_ctf(ctf: CtfTable, preparation: Preparation) -> CtfTable:
    """The CTF parameters on the working grid's pixel size."""
    size = torch.full_like(ctf.pixel_size_angst, preparation.pixel_size_angst)
    return dataclasses.replace(ctf, pixel_size_angst=size)


def chunk_size(preparation: Preparation) -> int:
    """How many particles are prepared and handed on together, unless the caller says otherwise."""
    return max(1, CHUNK_BYTES // (4 * preparation.box_px**2))


def prepared_images(
    source: ImageSource,
    index: NDArray[np.intp],
    preparation: Preparation,
    chunk: int | None = None,
    device: torch.device = CPU,
) -> Iterator[tuple[NDArray[np.intp], Float[Tensor, "b m m"], Bool[Tensor, "b"]]]:
    """Chunks of particles ``index`` with their prepared images and whether each is usable, on a device.

    The next chunks are read and prepared while the present one is used.
    """
    size = chunk_size(preparation) if chunk is None else chunk
    parts = [index[start : start + size] for start in range(0, len(index), size)]
    n_readers = READERS[device.type]
    with ThreadPoolExecutor(n_readers) as readers:

        def begin(part: NDArray[np.intp]) -> Future[tuple[Tensor, Tensor]]:
            return readers.submit(_prepare_particles, source, part, preparation, device)

        pending = deque(map(begin, parts[:n_readers]))
        for number, part in enumerate(parts):
            distributed.stop_if_asked()
            began = time.monotonic()
            images, usable = pending.popleft().result()
            source.waited_s += time.monotonic() - began
            pending.extend(map(begin, parts[number + n_readers : number + n_readers + 1]))
            yield part, images, usable


def _prepare_particles(
    source: ImageSource, index: NDArray[np.intp], preparation: Preparation, device: torch.device
) -> tuple[Float[Tensor, "b m m"], Bool[Tensor, "b"]]:
    particles = source.particles
    images = torch.empty(len(index), preparation.box_px, preparation.box_px, device=device)
    usable = torch.empty(len(index), dtype=torch.bool, device=device)
    kinds = np.stack([particles.box_px[index], particles.pixel_size_angst[index]], 1)
    for kind in np.unique(kinds, axis=0):
        here = np.flatnonzero((kinds == kind).all(1))
        here = here[np.argsort(particles.stack_of[index[here]], kind="stable")]  # a stack after the other
        n_at_once = max(1, PIXELS_AT_ONCE[device.type] // int(kind[0]) ** 2)
        for rows in np.split(here, range(n_at_once, len(here), n_at_once)):
            read = torch.from_numpy(source.read(index[rows]))
            place = run_of(rows)
            images[place], usable[place] = prepare(_moved(read, device), float(kind[1]), preparation)
    return images, usable


def _moved(pixels: Num[Tensor, "b n n"], device: torch.device) -> Num[Tensor, "b n n"]:
    """Images on a device; on their way to a GPU nobody waits for them."""
    if device.type == "cuda":
        return pixels.pin_memory().to(device, non_blocking=True)
    return pixels
