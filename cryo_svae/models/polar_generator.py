"""Content z to an image, as angular coefficients in polar Fourier space."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cryo_svae.imaging.polar import PolarTransform

HIDDEN = 256
LEAST_POWER = 0.1  # of an order, in units of its price
FIRST_CONTRAST = 0.1  # of the random content that breaks the symmetry of the start


class PolarGenerator(nn.Module):
    """Content z to packed angular coefficients: a network scaled by the data's rms, about their mean.

    The content has a Gaussian prior about 0 whose variance, the same for an angular order on all rings
    in units of the noise, is learned: orders that show no more than noise are driven to 0 (automatic
    relevance determination; Neal, Bayesian Learning for Neural Networks, 1996, section 4.3). Without it
    small sets turn by their noise.

    n_pairs:     how many coefficients are generated, those of the inner rings; all at first.
    order_power: of each order (o,), in units of the noise, mean of the rings; a running average of what
                 is generated.
    """

    scale: Tensor
    mean: Tensor
    order_power: Tensor
    ring: Tensor
    order: Tensor

    def __init__(self, polar: PolarTransform, z_dim: int) -> None:
        super().__init__()
        self.z_dim, self.n_pairs = z_dim, polar.n_pairs
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
        self.register_buffer("order_power", torch.zeros(polar.n_orders))
        self.register_buffer("ring", polar.ring, persistent=False)
        self.register_buffer("order", polar.order, persistent=False)

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b 2 p"]:
        """Coefficients of each z, in the reference's frame and without CTF."""
        return self.content(self.layers(z))

    def along(
        self, z: Float[Tensor, "b d"], directions: Float[Tensor, "k b d"]
    ) -> tuple[Float[Tensor, "b 2 p"], Float[Tensor, "k b 2 p"]]:
        """Coefficients of each z, and their derivatives along k directions (forward mode)."""
        hidden, slope = self.hidden_along(z, directions)
        by_hidden = (slope @ self._last()[0].mT).unflatten(-1, (2, -1))
        return self.content(hidden), by_hidden * self.scale[:, : self.n_pairs]

    def hidden_along(
        self, z: Float[Tensor, "b d"], directions: Float[Tensor, "k b d"]
    ) -> tuple[Float[Tensor, "b h"], Float[Tensor, "k b h"]]:
        """What the last layer is given for each z, and its derivatives along k directions."""
        value, slope = z, directions
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                value, slope = layer(value), slope @ layer.weight.mT
            else:  # SiLU: x s(x), whose derivative is s + x s (1 - s)
                gate = torch.sigmoid(value)
                value, slope = value * gate, slope * (gate * (1.0 + value * (1.0 - gate)))
        return value, slope

    def content(self, hidden: Float[Tensor, "b h"]) -> Float[Tensor, "b 2 p"]:
        """Coefficients from what the last layer is given."""
        weight, bias = self._last()
        relative = nn.functional.linear(hidden, weight, bias).float().view(len(hidden), 2, -1)
        content: Tensor = relative * self.scale[:, : self.n_pairs] + self.mean[:, : self.n_pairs]
        return content

    def of_hidden(self) -> Float[Tensor, "h 2 p"]:
        """Derivatives of the coefficients by what the last layer is given."""
        slopes: Tensor = self._last()[0].mT.unflatten(1, (2, -1)) * self.scale[:, : self.n_pairs]
        return slopes

    def start_prior(self, noise: Float[Tensor, "r"]) -> None:
        """Starts the prior at the data's rms; noise variance of each ring."""
        self.order_power.copy_(self._by_order(self.scale.square().sum(0), noise)[0])

    def learn_prior(self, power: Float[Tensor, "p"], noise: Float[Tensor, "r"], share: float) -> None:
        """Takes a share of the power now generated into the running average."""
        now, is_generated = self._by_order(power, noise)
        self.order_power.lerp_(torch.where(is_generated, now, self.order_power), share)

    def prior_pull(
        self, content: Float[Tensor, "b 2 p"], noise: Float[Tensor, "r"], price: Float[Tensor, ""]
    ) -> Float[Tensor, "b 2 p"]:
        """Slope of minus the log prior of contents, of which ``price`` is to be paid."""
        power = self.order_power + LEAST_POWER * price
        return price / (power[self.order[: self.n_pairs]] * noise[self.ring[: self.n_pairs]]) * content

    def _by_order(
        self, power: Float[Tensor, "p"], noise: Float[Tensor, "r"]
    ) -> tuple[Float[Tensor, "o"], Bool[Tensor, "o"]]:
        """Mean over the rings of power in units of the noise; and whether there is any ring.

        Summed over a grid, not in order of arrival, so that a GPU repeats it to the bit.
        """
        ring, order = self.ring[: len(power)], self.order[: len(power)]
        grid = power.new_zeros(2, len(self.order_power), len(noise))
        grid[:, order, ring] = torch.stack([power / noise[ring], torch.ones_like(power)])
        total, n_rings = grid.sum(2)
        return total / n_rings.clamp(min=1.0), n_rings > 0

    def _last(self) -> tuple[Float[Tensor, "q h"], Float[Tensor, "q"]]:
        """Weight and bias of the last layer for the coefficients generated."""
        weight = self.last.weight.unflatten(0, (2, -1))[:, : self.n_pairs].flatten(0, 1)
        return weight, self.last.bias.view(2, -1)[:, : self.n_pairs].flatten()
