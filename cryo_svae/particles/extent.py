"""How far from the middle of their boxes particles reach, found from the images.

Turned by chance, particles leave a round mean, and images differ most where particles are. Both fall
towards the particle's rim, and rise again where neighbours are: no nearer than they touch. The mean has its
CTF undone, so that the rim is where it is in the specimen; the variance shows arms too thin for the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryo_svae.config import PreparationConfig
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable, ctf_2d
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.preprocessing import CPU, Preparation, prepared_images, working_ctf

SAMPLED = 4096  # images looked at, spread over the set
PIECE = 256
LOW_PASS = 0.08  # cycles a pixel; standard deviation of the Gaussian that shows particles in the variance
BRIGHT = 3.0  # times the median of the images' variances; brighter ones are left out
WIENER = 0.02  # added to the mean square of the CTF in undoing it
RISE = 0.02  # of a profile's range: less is no rise
SURE = 4.0  # standard deviations that a rise and the particle itself must stand out by
MARGIN, MARGIN_PX = (
    1.2,
    1.5,
)  # of the radius taken, over that of the rim: too narrow costs more than too wide


def found_radius_px(parts: Iterable[tuple[Float[Tensor, "b n n"], CtfTable | None]]) -> float | None:
    """Radius in px of the circle that holds particles; None where the images show none.

    parts: prepared images, and their CTF parameters or None.
    """
    # sums over two halves of the images: of images times CTF, and of their squares, smoothed
    spectra, squares = torch.zeros(()), torch.zeros(())
    passed, n = torch.zeros(()), 0
    for images, ctf in _pieces(parts):
        box = images.shape[-1]
        spectrum = torch.fft.rfft2(images)
        seen = torch.ones_like(spectrum.real) if ctf is None else ctf_2d(ctf, box).float()
        spectrum = spectrum * seen
        smooth = torch.fft.irfft2(spectrum * _low_pass(box).to(images.device), s=(box, box)).square()
        energy = smooth.mean((1, 2))
        kept = energy < BRIGHT * energy.median()
        passed = passed + seen[kept].square().sum(0).cpu()
        halves = [slice(n % 2, None, 2), slice(1 - n % 2, None, 2)]
        spectra = spectra + torch.stack([spectrum[kept][half].sum(0) for half in halves]).cpu()
        squares = squares + torch.stack([smooth[kept][half].sum(0) for half in halves]).cpu()
        n += int(kept.sum())
    if n < 2:
        return None
    box = squares.shape[-1]
    undone = torch.fft.irfft2(spectra / (passed + WIENER * n), s=(box, box))
    mean, noise = _profile(undone)
    if float(mean.max() - mean.min()) < 2.0 * SURE * noise:
        return None
    rim = _rim(mean, SURE * noise)
    spread, noise = _profile(squares)
    return max(MARGIN * rim + MARGIN_PX, _rim(spread, SURE * noise))


def diameter_angst(
    parts: Iterable[tuple[Float[Tensor, "b n n"], CtfTable | None]], preparation: Preparation
) -> float | None:
    """Diameter in Å of that circle, of images so prepared; None where it is no narrower than theirs."""
    radius = found_radius_px(parts)
    if radius is None or radius >= preparation.mask_radius_px:
        return None
    return round(2.0 * radius * preparation.pixel_size_angst, 1)


def found_diameter_angst(
    source: ImageSource, preparation: Preparation, use_ctf: bool, device: torch.device = CPU
) -> float | None:
    """Diameter in Å of the circle that holds the particles of a set; None where the box is no wider."""
    particles = source.particles
    index = np.unique(np.linspace(0, len(particles) - 1, SAMPLED).round().astype(np.intp))
    ctf = working_ctf(particles.ctf, preparation) if use_ctf and particles.ctf is not None else None

    def parts() -> Iterator[tuple[Tensor, CtfTable | None]]:
        for row, images, usable in prepared_images(source, index, preparation, device=device):
            kept = torch.from_numpy(row)[usable.cpu()]
            yield images[usable], None if ctf is None else ctf[kept].to(device)

    return diameter_angst(parts(), preparation)


def fitted(
    source: ImageSource, preparation: Preparation, config: PreparationConfig, device: torch.device = CPU
) -> Preparation:
    """A preparation with the circle that the images show, where ``--mask-diameter`` gives none."""
    if config.mask_diameter is not None:
        return preparation
    use_ctf = config.ctf is not False
    diameter = found_diameter_angst(source, preparation, use_ctf, device)
    return preparation if diameter is None else replace(preparation, mask_diameter_angst=diameter)


def _pieces(
    parts: Iterable[tuple[Float[Tensor, "b n n"], CtfTable | None]],
) -> Iterator[tuple[Tensor, CtfTable | None]]:
    for images, ctf in parts:
        for start in range(0, len(images), PIECE):
            row = torch.arange(start, min(start + PIECE, len(images)))
            yield images[row], None if ctf is None else ctf[row]


def _low_pass(box_px: int) -> Float[Tensor, "n half"]:
    """A Gaussian without frequency 0, which is each image's own level."""
    square = torch.fft.fftfreq(box_px)[:, None].square() + torch.fft.rfftfreq(box_px).square()
    low = torch.exp(-0.5 * square / LOW_PASS**2)
    low[0, 0] = 0.0
    return low


def _profile(halves: Float[Tensor, "2 n n"]) -> tuple[Float[Tensor, "r"], float]:
    """Sum of both halves at distances 0, 1, … N/2 - 1 from the middle, means over the ring and its
    neighbours; and its standard error, by the halves' difference.
    """
    ring = geometry.pixel_grid(halves.shape[-1]).norm(dim=-1).round().long().flatten()
    area = torch.bincount(ring)
    means = torch.stack([torch.bincount(ring, half.flatten().double()) / area for half in halves])
    means = means[:, : halves.shape[-1] // 2]
    ends = torch.cat([means[:, 1:2], means, means[:, -1:]], 1)  # even about the middle
    first, second = ends.unfold(1, 3, 1) @ torch.tensor([0.25, 0.5, 0.25], dtype=ends.dtype)
    return first + second, float((first - second).square().mean().sqrt())


def _rim(profile: Float[Tensor, "r"], noise: float) -> float:
    """Where a profile that falls from its greatest value ends to fall, or is as good as there."""
    top = int(profile.argmax())
    least = max(RISE * float(profile.max() - profile.min()), noise)
    lowest = top
    for r in range(top, len(profile)):
        if profile[r] < profile[lowest]:
            lowest = r
        if profile[r] > profile[lowest] + least:
            break
    level = float(profile[lowest]) + least / 2.0
    rim = int((profile[top:] <= level).nonzero()[0]) + top
    if rim == top:
        return float(rim)
    before, there = float(profile[rim - 1]), float(profile[rim])
    return rim - (level - there) / (before - there)
