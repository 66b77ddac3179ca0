"""Content z to an image, as angular coefficients in polar Fourier space."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryo_svae.polar import PolarTransform

HIDDEN = 256
FIRST_CONTRAST = 0.1  # of the random content that breaks the symmetry of the start


class PolarGenerator(nn.Module):
    """Content z to packed angular coefficients: a network scaled by the data's rms, about their mean.

    n_pairs: how many coefficients are generated, those of the inner rings; all at first.
    """

    scale: Tensor
    mean: Tensor

    def __init__(self, polar: PolarTransform, z_dim: int) -> None:
        super().__init__()
        self.n_pairs = polar.n_pairs
        last = nn.Linear(HIDDEN, 2 * polar.n_pairs)
        with torch.no_grad():
            last.weight.mul_(FIRST_CONTRAST)
            last.bias.zero_()
        self.layers = nn.Sequential(
            nn.Linear(z_dim, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()
        )
        self.last = last
        self.register_buffer("scale", torch.zeros(2, polar.n_pairs))
        self.register_buffer("mean", torch.zeros(2, polar.n_pairs))

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b 2 p"]:
        """Coefficients of each z, in the reference's frame and without CTF."""
        weight, bias = self._last()
        relative = nn.functional.linear(self.layers(z), weight, bias).float().view(len(z), 2, -1)
        return relative * self.scale[:, : self.n_pairs] + self.mean[:, : self.n_pairs]

    def along(
        self, z: Float[Tensor, "b d"], directions: Float[Tensor, "k b d"]
    ) -> tuple[Float[Tensor, "b 2 p"], Float[Tensor, "k b 2 p"]]:
        """Coefficients of each z, and their derivatives along k directions (forward mode)."""
        value, slope = z, directions
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                value, slope = layer(value), slope @ layer.weight.mT
            else:  # SiLU: x s(x), whose derivative is s + x s (1 - s)
                gate = torch.sigmoid(value)
                value, slope = value * gate, slope * (gate * (1.0 + value * (1.0 - gate)))
        weight, bias = self._last()
        scale, mean = self.scale[:, : self.n_pairs], self.mean[:, : self.n_pairs]
        content = nn.functional.linear(value, weight, bias).view(len(z), 2, -1) * scale + mean
        return content, (slope @ weight.mT).view(len(directions), len(z), 2, -1) * scale

    def _last(self) -> tuple[Float[Tensor, "q h"], Float[Tensor, "q"]]:
        """Weight and bias of the last layer for the coefficients generated."""
        weight = self.last.weight.unflatten(0, (2, -1))[:, : self.n_pairs].flatten(0, 1)
        return weight, self.last.bias.view(2, -1)[:, : self.n_pairs].flatten()
