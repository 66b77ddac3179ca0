"""The posterior of in-plane rotation and origin, exact on a grid, and what follows from it.

With y a particle's coefficients, h its CTF, c the generated coefficients, S_o the centring by an origin
o and R_psi the turn by psi, the log likelihood ratio against an empty image is

    l(psi, o) = <S_o h y / sigma², R_psi c> - ½ <h² R_psi c / sigma², R_psi c>.

The first term is, for each order m, a product of matrices over the rings (origins by contents), and one
``irfft`` over the orders then gives every psi; the second is the same for all psi unless the CTF is
astigmatic, and then an angular correlation. No gradient flows through here: the gradient of
log sum p exp(l) with respect to c is the posterior mean of the gradient of l, ``aligned`` - ``filtered``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryo_svae.polar import PolarTransform

LOG_NEGLIGIBLE = math.log(1e-12)  # of a probability; much smaller ones are denormal numbers, and slow


@dataclass(frozen=True)
class PosePosterior:
    """Poses of b particles on a grid of t origins and n rotations psi_j = 2 pi j / n.

    log_evidence: log of the prior mean of exp(l) (b,), nats.
    probability:  (b, t, n), sums to 1.
    kl:           divergence from the prior (b,), nats.
    aligned:      posterior mean of the filtered data h y / sigma², centred and turned into the
                  reference's frame.
    filtered:     posterior mean of h² c / sigma² in the same frame.
    """

    log_evidence: Float[Tensor, "b"]
    probability: Float[Tensor, "b t n"]
    kl: Float[Tensor, "b"]
    aligned: Float[Tensor, "b 2 p"]
    filtered: Float[Tensor, "b 2 p"]


@dataclass(frozen=True)
class Look:
    """b particles centred by each of t trial origins, ready to be compared with generated content.

    spectra: coefficients of h y / sigma² centred by each trial origin, by order.
    power:   h² / sigma² on the polar samples of half a turn (b, rings, h), the other half being the same,
             or (b, rings, 1) without astigmatism.
    n_psi:   number of rotations, at least the number of polar angles; even.
    """

    polar: PolarTransform
    spectra: Complex[Tensor, "b o t r"]
    power: Float[Tensor, "b r h"]
    n_psi: int

    @cached_property
    def _power_spectrum(self) -> Complex[Tensor, "b r e"]:
        """Fourier series of the power over half a turn: even orders alone."""
        spectrum: Tensor = torch.fft.rfft(self.power)
        return spectrum

    def inner(self, content: Float[Tensor, "b k 2 p"]) -> Float[Tensor, "b k t n"]:
        """<S_o h y / sigma², R_psi c> of k contents for every trial origin o and psi."""
        # irfft takes each order above 0 for two
        one_sided = self.polar.by_order(content * self.polar.one_sided)
        by_order = self.spectra @ torch.conj_physical(one_sided).permute(0, 2, 3, 1)
        scores: Tensor = torch.fft.irfft(by_order.permute(0, 3, 2, 1).conj(), n=self.n_psi, norm="forward")
        return scores

    def energy(self, content: Float[Tensor, "b k 2 p"]) -> Float[Tensor, "b k n"]:
        """<h² R_psi c / sigma², R_psi c> of k contents for every psi; (b, k, 1) without astigmatism."""
        if self.power.shape[-1] == 1:
            squared = content.square().sum(2)
            everywhere: Tensor = squared @ self.power[:, self.polar.ring]
            return everywhere
        samples = self.polar.samples(content.flatten(0, 1)).unflatten(0, content.shape[:2])
        # the power repeats after half a turn, so that of the square only what repeats counts
        here, opposite = samples.chunk(2, -1)
        squared = torch.fft.rfft(here.square().addcmul_(opposite, opposite))
        product = (self._power_spectrum.conj()[:, None] * squared).sum(2)
        scale = 0.5 / self.power.shape[-1] ** 2
        half_turn: Tensor = torch.fft.irfft(product, n=self.n_psi // 2, norm="forward") * scale
        return half_turn.repeat(1, 1, 2)

    def filtered(
        self, content: Float[Tensor, "b k 2 p"], psi_probability: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b k 2 p"]:
        """Posterior mean of h² c / sigma² of k contents in the reference's frame."""
        if self.power.shape[-1] == 1:
            return self.power[:, None, None, self.polar.ring, 0] * content
        spectrum, n_half = self._power_spectrum, self.power.shape[-1]
        half_turn = psi_probability.unflatten(-1, (2, -1)).sum(-2)
        turn = torch.fft.rfft(half_turn)[:, None, : spectrum.shape[-1]]
        power = torch.fft.irfft(spectrum * turn, n=n_half)[:, None, :, None]
        samples = self.polar.samples(content.flatten(0, 1)).unflatten(0, content.shape[:2])
        product = (power * samples.unflatten(-1, (2, -1))).flatten(-2)
        seen = self.polar.spectra(product.flatten(0, 1))
        packed: Tensor = self.polar.pack(seen).unflatten(0, content.shape[:2])
        return packed

    def scores(
        self, content: Float[Tensor, "b k 2 p"], log_prior: Float[Tensor, "b t"]
    ) -> Float[Tensor, "b k t n"]:
        """l(psi, o) + log prior masses of k contents: uniform psi, and those given of the trial origins."""
        prior = log_prior[:, None, :, None] - math.log(self.n_psi)
        return self.inner(content) - 0.5 * self.energy(content)[:, :, None] + prior

    def posterior(self, content: Float[Tensor, "b 2 p"], log_prior: Float[Tensor, "b t"]) -> PosePosterior:
        """The posterior under log prior masses of the trial origins and uniform psi."""
        joint = self.scores(content[:, None], log_prior)[:, 0]
        log_evidence, probability = normalised(joint)
        log_ratio = (probability * (joint - log_prior[..., None])).sum((1, 2)) + math.log(self.n_psi)
        turn = torch.fft.rfft(probability)[..., : self.spectra.shape[1]]
        aligned = turn.permute(0, 2, 1)[:, :, None] @ self.spectra
        filtered = self.filtered(content[:, None], probability.sum(1))[:, 0]
        packed = self.polar.packed_from_orders(aligned[:, :, 0])
        return PosePosterior(log_evidence, probability, log_ratio - log_evidence, packed, filtered)


def normalised(log_mass: Float[Tensor, "b *more"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b *more"]]:
    """Log of each row's total mass, and its shares; the smallest shares are about 1e-12."""
    top = log_mass.flatten(1).amax(1)
    over = tuple(range(1, log_mass.ndim))
    mass = torch.exp((log_mass - _like(top, log_mass)).clamp(min=LOG_NEGLIGIBLE))
    total = mass.sum(over)
    return top + torch.log(total), mass / _like(total, mass)


def _like(values: Float[Tensor, "b"], shape: Tensor) -> Tensor:
    return values.view(-1, *[1] * (shape.ndim - 1))


def mean_origin(
    probability: Float[Tensor, "b t"], origins: Float[Tensor, "b t 2"]
) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b"]]:
    """Posterior mean of the origin, and the mean variance of its two components."""
    mean = (probability[..., None] * origins).sum(1)
    return mean, (probability * (origins - mean[:, None]).square().sum(-1)).sum(1) / 2.0


def disc_of_points(radius: float, device: torch.device) -> Float[Tensor, "t 2"]:
    """Integer points (x, y) within a radius."""
    axis = torch.arange(-math.floor(radius), math.floor(radius) + 1, device=device)
    points = torch.cartesian_prod(axis, axis)
    return points[points.square().sum(1) <= radius**2 + 1e-6].float()
