"""Each particle's own noise: how much of the set's noise it has, in bands of rings.

Ice, carbon, an aggregate or a bright neighbour leaves residuals that the noise of the set cannot explain,
and least squares would bend every content towards them. So the variance of a particle's noise in a band is
that of the set over a weight of its own, whose prior is a gamma distribution about 1: the residuals have
Student's t distribution, and those that are improbably great teach little (Lange, Little and Taylor 1989,
J. Am. Stat. Assoc. 84, 881). Given the residual's power the most probable weight is one division. How wide
the prior is (the degrees of freedom of the t distribution) is learned for each band: where all particles
have the same noise, weights are all but 1 and nothing is lost by them.
"""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

FIRST_BAND = 4  # rings; fewer hold too few numbers to judge a particle by
NEXT_BAND = 1.4  # first ring of a band over that of the one before
FIRST_STRENGTH = 8.0  # before anything is known of the residuals
STRENGTHS = torch.logspace(math.log10(4.0), 4.0, 28).tolist()  # tried, a third apart


class OwnNoise(nn.Module):
    """Weights of particles in k bands of r rings.

    in_band:  (r, k), 1 where a ring is in a band.
    dof:      (k,) how many independent numbers noise has in a band.
    strength: (k,) numbers that the prior is worth, its degrees of freedom; infinite where all particles
              have the noise of the set.
    """

    in_band: Tensor
    dof: Tensor
    strength: Tensor

    def __init__(self, noise_dof: Float[Tensor, "r"]) -> None:
        super().__init__()
        first = [0, FIRST_BAND]
        while first[-1] < len(noise_dof):
            first.append(math.ceil(NEXT_BAND * first[-1]))
        in_band = torch.zeros(len(noise_dof), len(first) - 1)
        for band, (start, end) in enumerate(itertools.pairwise(first)):
            in_band[start:end, band] = 1.0
        self.register_buffer("in_band", in_band, persistent=False)
        self.register_buffer("dof", noise_dof @ in_band, persistent=False)
        self.register_buffer("strength", torch.full((len(first) - 1,), FIRST_STRENGTH))

    @property
    def n_bands(self) -> int:
        """How many bands there are."""
        return len(self.dof)

    def weight(self, power: Float[Tensor, "b r"]) -> Float[Tensor, "b k"]:
        """The most probable weights, from residual power in units of the set's noise variance."""
        found = (power @ self.in_band).clamp(min=0.0)
        return (1.0 + self.dof / self.strength) / (1.0 + found / self.strength)

    def learn_strength(self, weight: Float[Tensor, "n k"]) -> None:
        """The strengths under which the residuals that gave these weights are likeliest.

        Rows of ones are of particles that were never looked at.
        """
        weight = weight[(weight != 1.0).any(1)]
        found = ((self.strength + self.dof) / weight - self.strength).double().clamp(min=0.0)
        likelihood = torch.stack([self._log_likelihood(found, strength) for strength in STRENGTHS])
        tried = self.strength.new_tensor(STRENGTHS)
        self.strength.copy_(tried[likelihood.argmax(0)])

    def _log_likelihood(self, found: Float[Tensor, "n k"], strength: float) -> Float[Tensor, "k"]:
        """Sums over particles of log Student's t of residual power, but for what no strength changes."""
        half, dof = strength / 2.0, self.dof.double()
        constant = torch.lgamma(half + dof / 2.0) - math.lgamma(half) - dof / 2.0 * math.log(strength)
        of_each = constant - (half + dof / 2.0) * torch.log1p(found / strength)
        return of_each.sum(0)

    def variance(
        self, power: Float[Tensor, "q"], trusted: Float[Tensor, "q"], noise_dof: Float[Tensor, "q"]
    ) -> Float[Tensor, "q"]:
        """The set's noise variance on the first q rings.

        From sums over particles of weighted residual power and of weights: over the latter, not their
        number, it is found at once and not by small steps (Kent, Tyler and Vardi 1994, Commun. Stat. Simul.
        23, 441). The last factor is of noise that is the same for all: it is then found without bias.
        """
        unbiased = 1.0 - 2.0 / (self.strength + self.dof).clamp(min=4.0)
        numbers = trusted * noise_dof * (self.in_band[: len(power)] @ unbiased)
        return (power / numbers.clamp(min=1e-6)).clamp(min=1e-6)

    def of_rings(self, weight: Float[Tensor, "b k"], n_rings: int) -> Float[Tensor, "b q"]:
        """Weights of the first n_rings rings."""
        rings: Tensor = weight @ self.in_band[:n_rings].mT
        return rings

    def log_prior(self, weight: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
        """Log prior of weights, 0 of weights of 1, in nats."""
        of_bands = self.strength * (torch.log(weight) - weight + 1.0)
        return 0.5 * torch.where(self.strength.isinf(), 0.0, of_bands).sum(1)

    def misfit(self, power: Float[Tensor, "b r"]) -> Float[Tensor, "b"]:
        """How much likelier residuals are, in nats, under noise of their own spectrum than under the set's,
        as strong as it may be: how strong depends on how well the background was known. Only bands with
        more than their share count.
        """
        found = power @ self.in_band
        share = found.sum(1, keepdim=True).clamp(min=1e-6) / self.dof.sum()
        excess = (found / (share * self.dof.clamp(min=1e-6))).clamp(min=1.0)
        of_bands = self.dof * (excess - 1.0 - torch.log(excess))
        return 0.5 * torch.where(self.strength.isinf(), 0.0, of_bands).sum(1)
