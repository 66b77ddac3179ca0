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
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae.computing import distributed
from cryo_svae.config import PreparationConfig
from cryo_svae.errors import InputError
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable, whitener_2d
from cryo_svae.particles.images import ImageSource, run_of
from cryo_svae.particles.particle_set import UNDISTORTED, ParticleSet

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
    known_pose:          whether the file's poses are undone for the engine, and are then all there is
                         ("fixed") or searched about ("prior"); see ``known_poses``.
    """

    box_px: int
    pixel_size_angst: float
    mask_diameter_angst: float
    invert: bool
    known_pose: Literal["fixed", "prior"] | None = None

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
    return _interpolation(_pixels(new_box_px) * scale, box_px, scale)


def undistorting_matrices(
    box_px: int,
    pixel_size_angst: float,
    new_box_px: int,
    new_pixel_size_angst: float,
    magnification: tuple[float, float, float, float],
) -> tuple[Float[Tensor, "n m n"], Float[Tensor, "m m n"]]:
    """The same, of images whose frequency k is M k in the specimen (RELION's rlnMagMat00, 01, 10, 11).

    Frequencies that go by M are points u of the specimen seen at M^T u, which one pass along the rows
    (n rows, from n to m pixels) and one along the columns (m columns) reach.
    """
    scale = new_pixel_size_angst / pixel_size_angst
    m00, m01, m10, m11 = (scale * each for each in magnification)
    new, old = _pixels(new_box_px), _pixels(box_px)
    along_rows = (m00 - m10 * m01 / m11) * new + (m10 / m11) * old[:, None]
    along_columns = m01 * new[:, None] + m11 * new
    return _interpolation(along_rows, box_px, scale), _interpolation(along_columns, box_px, scale)


def _pixels(box_px: int) -> Float[Tensor, "n"]:
    return torch.arange(box_px, dtype=torch.float64) - box_px // 2


def _interpolation(points: Float[Tensor, "*m"], box_px: int, scale: float) -> Float[Tensor, "*m n"]:
    """Weights of the pixels of a line in its values at points, counted from its centre.

    The sum of cosines up to a cut-off, the last of which +k and -k share where it is the line's own.
    """
    cutoff = min(box_px / 2, box_px / (2 * scale))
    highest = math.floor(cutoff + 1e-6)
    angle = 2.0 * math.pi / box_px * (points[..., None] - _pixels(box_px))
    half = torch.sin(angle / 2)
    at_pixel = half.abs() < 1e-12
    ratio = torch.sin((highest + 0.5) * angle) / torch.where(at_pixel, 1.0, half)
    weight = torch.where(at_pixel, 2.0 * highest + 1.0, ratio)
    if highest > cutoff - 1e-6:
        weight = weight - torch.cos(highest * angle)
    return (weight / box_px).float()


@dataclass(frozen=True)
class _Grid:
    """What preparing images of one box and pixel size takes, on the device that does it.

    matrix:   (m, n) resamples them; None where they are on the working grid.
    undistorting: what does so where they are distorted (``undistorting_matrices``), or None.
    mean:     (m²,) weights of the pixels in the mean of the background.
    variance: (m²,) those of its squares in its variance.
    """

    matrix: Tensor | None
    undistorting: tuple[Tensor, Tensor] | None
    mean: Tensor
    variance: Tensor

    def resampled(self, images: Float[Tensor, "b n n"]) -> Float[Tensor, "b m m"]:
        """Images on the working grid."""
        if self.undistorting is not None:
            rows, columns = self.undistorting
            along_rows = torch.einsum("vxn,bvn->bvx", rows, images)
            return torch.einsum("xyv,bvx->byx", columns, along_rows).contiguous()
        return images if self.matrix is None else self.matrix @ images @ self.matrix.T


@lru_cache(maxsize=8)
def _grid(
    box_px: int,
    pixel_size_angst: float,
    magnification: tuple[float, float, float, float],
    preparation: Preparation,
    device: torch.device,
) -> _Grid:
    new = (preparation.box_px, preparation.pixel_size_angst)
    matrix, undistorting = None, None
    if magnification != UNDISTORTED:
        rows, columns = undistorting_matrices(box_px, pixel_size_angst, *new, magnification)
        undistorting = (rows.to(device), columns.to(device))
    elif (box_px, pixel_size_angst) != new:
        matrix = resampling_matrix(box_px, pixel_size_angst, *new).to(device)
    radius = geometry.pixel_grid(preparation.box_px).norm(dim=-1).flatten()
    outside = (radius > preparation.mask_radius_px).float()
    n = outside.sum()
    return _Grid(matrix, undistorting, (outside / n).to(device), (outside / (n - 1.0)).to(device))


def prepare(
    images: Num[Tensor, "b n n"],
    pixel_size_angst: float,
    preparation: Preparation,
    magnification: tuple[float, float, float, float] = UNDISTORTED,
    whitener: Float[Tensor, "b m half"] | None = None,
) -> tuple[Float[Tensor, "b m m"], Bool[Tensor, "b"]]:
    """Prepared images, and which of them are usable (the others are all zero), on the images' device.

    Resampled to the working grid, distortion undone, multiplied by the whitener, inverted if asked,
    brought to mean 0 and standard deviation 1 outside the particle's circle. NaN, infinite and constant
    images are not usable.
    """
    grid = _grid(images.shape[-1], pixel_size_angst, magnification, preparation, images.device)
    pixels = images.float()
    span = pixels.amax((1, 2)) - pixels.amin((1, 2))  # no finite number where a pixel is none
    # Large offsets (raw counts) would cost float32 digits in the products.
    prepared = grid.resampled(pixels - pixels.mean((1, 2), keepdim=True))
    if whitener is not None:
        prepared = torch.fft.irfft2(torch.fft.rfft2(prepared) * whitener, s=prepared.shape[-2:])
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
    kinds = np.column_stack(
        [particles.box_px[index], particles.pixel_size_angst[index], particles.magnification[index]]
    )
    for kind in np.unique(kinds, axis=0):
        here = np.flatnonzero((kinds == kind).all(1))
        here = here[np.argsort(particles.stack_of[index[here]], kind="stable")]  # a stack after the other
        n_at_once = max(1, PIXELS_AT_ONCE[device.type] // int(kind[0]) ** 2)
        for rows in np.split(here, range(n_at_once, len(here), n_at_once)):
            read = _sent(source.read(index[rows]), device)
            place = run_of(rows)
            size, m00, m01, m10, m11 = kind[1:].tolist()
            images[place], usable[place] = prepare(
                read,
                size,
                preparation,
                (m00, m01, m10, m11),
                _whitener(particles, index[rows], preparation, device),
            )
    return images, usable


def _whitener(
    particles: ParticleSet, index: NDArray[np.intp], preparation: Preparation, device: torch.device
) -> Float[Tensor, "b m half"] | None:
    """What undoes the multiplication by the CTF; None where the set has no premultiplied image."""
    if particles.ctf is None or particles.ctf.premultiplied is None:
        return None
    ctf = particles.ctf[torch.from_numpy(index)].to(device)
    return whitener_2d(working_ctf(ctf, preparation), preparation.box_px).float()


def _sent(pixels: NDArray[np.generic], device: torch.device) -> Num[Tensor, "b n n"]:
    """Images on a device; on their way to a GPU nobody waits for them."""
    images = torch.from_numpy(pixels)
    if device.type == "cuda":
        pinned = torch.empty_like(images, pin_memory=True)
        pinned.numpy()[:] = pixels  # torch would take a team of threads for each reader to copy them
        images = pinned.to(device, non_blocking=True)
    return images
