"""Images that stand out from all others before anything is learned: hot pixels, ice crystals, aggregates.

A few of them are enough to draw classes to themselves, and to spoil what is a mean over all images. They
are known by their power in the particle's circle at low resolution, in units of the same image's power at
high resolution, which is its noise: so neither contrast nor normalisation matters.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cryo_svae.imaging.polar import soft_disc

BRIGHT = 10.0  # times the median of the images' mean squares: one pixel of 95 sd in 32 x 32
BANDS = (3.0, 4.5, 6.5)  # cycles in the circle's diameter, up to which the low bands reach
NOISE = 0.25  # cycles a pixel, beyond which an image's power is taken for its noise
STANDS_OUT = 3.5  # robust standard deviations of the logarithm over the median; of good images 1 in 2,000
MOST = 0.15  # of a set: more images are no outliers, but one of its kinds
EDGE = 0.06  # of the box, where the circle ends softly
N_MEASURES = 2 + len(BANDS)  # mean square, low bands, noise


def measures(images: Float[Tensor, "b n n"], radius_px: float) -> Float[Tensor, "b m"]:
    """Of each prepared image its mean square, and its mean power in the low bands and beyond ``NOISE``
    within a circle: what ``is_outlier`` compares.
    """
    if len(images) == 0:  # FFT libraries refuse none
        return images.new_zeros(0, N_MEASURES).double()
    box = images.shape[-1]
    disc = soft_disc(box, radius_px, max(2.0, EDGE * box)).to(images.device)
    level = (images * disc).sum((1, 2)) / disc.sum()
    power = torch.fft.rfft2((images - level[:, None, None]) * disc).abs().square()
    frequency = torch.hypot(
        torch.fft.fftfreq(box, device=images.device)[:, None], torch.fft.rfftfreq(box, device=images.device)
    )
    ends = [0.0, *(cycles / (2.0 * radius_px) for cycles in BANDS)]
    bands = [(frequency > a) & (frequency <= b) for a, b in itertools.pairwise(ends)]
    bands.append((frequency > NOISE) & (frequency <= 0.5))
    of_bands = torch.stack([power[:, band].mean(1) for band in bands], 1)
    return torch.cat([images.square().mean((1, 2))[:, None], of_bands], 1).double()


def is_bright(measured: Float[Tensor, "n m"]) -> Bool[Tensor, "n"]:
    """Images of more than ten times the median's mean square."""
    square = measured[:, 0]
    return square > BRIGHT * square.median()


def stands_out(measured: Float[Tensor, "n m"]) -> Bool[Tensor, "n"]:
    """Images improbably strong in a low band; none where they are more than ``MOST`` of the set."""
    ratio = torch.log(measured[:, 1:-1].clamp(min=1e-12) / measured[:, -1:].clamp(min=1e-12))
    excess = ratio - ratio.median(0).values
    spread = 1.4826 * excess.abs().median(0).values
    found = (excess > STANDS_OUT * spread.clamp(min=1e-6)).any(1)
    return found & (found.double().mean() <= MOST)


def found(measured: Float[Tensor, "n m"]) -> Bool[Tensor, "n"] | None:
    """Images that are either; None where none is."""
    if len(measured) == 0:
        return None
    either = is_bright(measured) | stands_out(measured)
    return either if bool(either.any()) else None
