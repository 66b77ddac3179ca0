"""The spatial frequencies that images are compared at: those between two wavelengths.

Frequencies outside of these bounds play no part in a model. They are removed from the images, from the
generated images and from the likelihood, so that neither the bulk of a micelle nor ice is aligned or
becomes content.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cryo_svae.imaging.ctf import rfft_frequencies


def is_within(
    frequency_per_px: Float[Tensor, "*p"], lowest_px: float | None, highest_px: float | None
) -> Float[Tensor, "*p"]:
    """1 at frequencies whose wavelengths are within two, the lowest and the highest resolution, else 0.

    Both in pixels; None is no bound.
    """
    inside = torch.ones_like(frequency_per_px)
    if lowest_px is not None:
        inside = inside * (frequency_per_px * lowest_px >= 1.0 - 1e-6)
    if highest_px is not None:
        inside = inside * (frequency_per_px * highest_px <= 1.0 + 1e-6)
    return inside


def band_2d(box_px: int, lowest_px: float | None, highest_px: float | None) -> Float[Tensor, "n half"]:
    """The same for each point of ``torch.fft.rfft2``."""
    return is_within(rfft_frequencies(box_px).norm(dim=-1).float(), lowest_px, highest_px)


def share_of_plane(band: Float[Tensor, "n half"]) -> float:
    """Share of an image's independent numbers that lie within a band."""
    weight = torch.full_like(band, 2.0)  # points of the other half, too
    weight[:, 0] = weight[:, -1] = 1.0
    return float((band * weight).sum() / weight.sum())
