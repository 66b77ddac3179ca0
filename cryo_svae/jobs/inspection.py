"""What is understood of a particle file, in words and as a montage."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryo_svae.config import PreparationConfig, SourceConfig
from cryo_svae.formats.atomic import atomic_path
from cryo_svae.jobs.plan import contrast_score
from cryo_svae.jobs.stages import CONTRAST_SIGNIFICANCE, describe
from cryo_svae.particles.close_picks import close_picks
from cryo_svae.particles.extent import fitted
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_source
from cryo_svae.particles.plausibility import doubts, ignored_aberrations
from cryo_svae.particles.preprocessing import Preparation, plan_preparation, prepared_images
from cryo_svae.report.png import sheet

MONTAGE_PARTICLES = 40
MONTAGE_COLUMNS = 10
GAP_PX = 2  # between images
LARGEST_BOX_PX = 128


def inspect(path: Path, source: SourceConfig, config: PreparationConfig, png: Path) -> list[str]:
    """Lines that say what a particle file holds; draws some of its images, below them smoothed ones."""
    particles = read_source(path, source)
    images = ImageSource(particles)
    preparation = fitted(images, plan_preparation(particles, config, LARGEST_BOX_PX), config)
    lines = describe(particles)
    score = contrast_score(images, preparation)
    if abs(score) < CONTRAST_SIGNIFICANCE:
        guess = "cannot be told"
    elif (score > 0) != preparation.invert:
        guess = "protein white" + (": use --no-invert" if preparation.invert else "")
    else:
        guess = "protein dark: " + ("inverted" if preparation.invert else "use --invert")
    lines.append(f"circle        {preparation.mask_diameter_angst:.0f} Å, {_whence(preparation, config)}")
    lines.append(f"contrast      {guess} (middle against background: {score:+.0f} standard errors)")
    bad = [
        int(row)
        for index, _, usable in prepared_images(images, np.arange(len(particles)), preparation)
        for row in index[~usable.numpy()]
    ]
    where = ", ".join(particles.place_of(row) for row in bad[:5])
    lines.append(f"junk images   {len(bad)} NaN or constant" + (f" ({where})" if bad else ""))
    close = close_picks(particles, preparation.mask_diameter_angst)
    if close is not None:
        lines.append(f"close picks   {close}")
    pick = np.unique(np.linspace(0, len(particles) - 1, MONTAGE_PARTICLES).astype(np.intp))
    chosen = torch.cat([prepared for _, prepared, _ in prepared_images(images, pick, preparation)])
    title = f"{path.name}: {len(particles):,} particles, every {max(1, len(particles) // len(pick)):,}th"
    draw_montage(png, chosen, title)
    found = doubts(particles) + ([] if close is None else close.doubts())
    lines += [f"warning       {each}" for each in found]
    size = preparation.pixel_size_angst
    lines += [f"warning       {each}" for each in ignored_aberrations(particles, size)]
    return [*lines, f"montage       {png}"]


def _whence(preparation: Preparation, config: PreparationConfig) -> str:
    if config.mask_diameter is not None:
        return "as --mask-diameter says"
    is_whole = preparation.mask_diameter_angst >= (preparation.box_px - 2) * preparation.pixel_size_angst
    return "the box" if is_whole else "by the images"


def smooth(images: Float[Tensor, "b n n"], width_px: float) -> Float[Tensor, "b n n"]:
    """Images under a Gaussian of this standard deviation."""
    box_px = images.shape[-1]
    ky = torch.fft.fftfreq(box_px)[:, None]
    kx = torch.fft.rfftfreq(box_px)[None, :]
    transfer = torch.exp(-2.0 * (math.pi * width_px) ** 2 * (kx**2 + ky**2))
    smoothed: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:])
    return smoothed


def draw_montage(png: Path, images: Float[Tensor, "b n n"], title: str) -> None:
    """A PNG of images as they are, and again smoothed by 4 % of the box, row 0 at the top."""
    from matplotlib.figure import Figure

    n, box_px = len(images), images.shape[-1]
    columns = min(MONTAGE_COLUMNS, n)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(columns, 2 * rows + 0.8), layout="constrained")
    smoothed = smooth(images, 0.04 * box_px)
    both = zip(figure.subplots(2, 1), (images, smoothed), (title, "the same, smoothed"), strict=True)
    for axis, drawn, name in both:
        low, high = np.percentile(drawn.numpy(), [1, 99])
        tiles = np.full((rows * columns, box_px + GAP_PX, box_px + GAP_PX), np.nan)
        tiles[:n, GAP_PX:, GAP_PX:] = drawn.numpy()
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
        axis.imshow(sheet(tiles.reshape(rows, columns, *tiles.shape[1:])), cmap="gray", vmin=low, vmax=high)
    with atomic_path(png) as temporary:
        figure.savefig(temporary, dpi=110)
