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
from itertools import pairwise

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryo_svae.imaging.polar import PolarTransform

ORDER_BLOCKS = 4  # orders are multiplied in blocks, for the high ones have fewer rings
LOG_IMPOSSIBLE = -1e6  # prior mass of rotations out of range: a number, so that 0 times it is 0
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


class ByOrder:
    """k contents, arranged to be multiplied with the data of many particles.

    power: of each content on each ring (k, r).
    turns: waves of n_psi rotations, of which products are the coefficients (n, m).
    reach: how many steps of rotation ``greatest`` goes either way.
    """

    def __init__(
        self,
        polar: PolarTransform,
        content: Float[Tensor, "k 2 p"],
        n_psi: int,
        psi_range_rad: float | None = None,
    ) -> None:
        self.reach = n_psi // 2 if psi_range_rad is None else rotations_within(psi_range_rad, n_psi)
        self.power = polar.ring_sum(content.square().sum(1))
        self.turns = waves(polar.n_orders, n_psi, content.device)
        by_order = polar.by_order(content).permute(1, 2, 0)
        real, imag = by_order.real, by_order.imag
        # by the conjugate, of data with its real and imaginary parts side by side
        self._to_real = torch.stack([real, imag], 2).flatten(1, 2)
        self._to_imag = torch.stack([-imag, real], 2).flatten(1, 2)
        edges = [n * polar.n_orders // ORDER_BLOCKS for n in range(ORDER_BLOCKS + 1)]
        self._blocks = [
            (slice(start, end), polar.first_ring[start]) for start, end in pairwise(edges) if start < end
        ]

    def products(self, spectra: Complex[Tensor, "b o t r"]) -> Float[Tensor, "b m t k"]:
        """Real parts, then imaginary ones, of each order's products, summed over the rings."""
        n, n_orders, n_origins, _ = spectra.shape
        k = self._to_real.shape[-1]
        data = torch.view_as_real(spectra).transpose(0, 1).reshape(n_orders, n * n_origins, -1)
        products = data.new_empty(2, n_orders, n * n_origins, k)
        for orders, first in self._blocks:
            rows = data[orders, :, 2 * first :]
            torch.bmm(rows, self._to_real[orders, 2 * first :], out=products[0, orders])
            torch.bmm(rows, self._to_imag[orders, 2 * first :], out=products[1, orders])
        return products.view(2 * n_orders, n, n_origins, k).transpose(0, 1)


def rotations_within(psi_range_rad: float, n_psi: int) -> int:
    """Steps of 2 pi / n_psi that lie within a range, either way."""
    return min(n_psi // 2, math.floor(psi_range_rad * n_psi / (2.0 * math.pi) + 1e-6))


def waves(n_orders: int, n_psi: int, device: torch.device) -> Float[Tensor, "n m"]:
    """cos m psi_j, then sin m psi_j, of orders m in columns and angles psi_j = 2 pi j / n_psi in rows."""
    turn = torch.arange(n_psi, device=device)[:, None] * torch.arange(n_orders, device=device) % n_psi
    angle = 2.0 * math.pi / n_psi * turn
    return torch.cat([torch.cos(angle), torch.sin(angle)], 1)


@dataclass(frozen=True)
class Look:
    """b particles centred by each of t trial origins, ready to be compared with generated content.

    spectra: coefficients of h y / sigma² centred by each trial origin, by order.
    power:   h² / sigma² on the polar samples of half a turn (b, rings, h), the other half being the same,
             or (b, rings, 1) without astigmatism.
    n_psi:   number of rotations, at least the number of polar angles; even.
    log_prior_psi: log prior masses of the rotations (n,), or the one number that all have.
    """

    polar: PolarTransform
    spectra: Complex[Tensor, "b o t r"]
    power: Float[Tensor, "b r h"]
    n_psi: int
    log_prior_psi: Float[Tensor, "n"] | float

    @cached_property
    def _power_spectrum(self) -> Complex[Tensor, "b r e"]:
        """Fourier series of the power over half a turn: even orders alone."""
        spectrum: Tensor = torch.fft.rfft(self.power)
        return spectrum

    def inner(self, content: Float[Tensor, "#b k 2 p"]) -> Float[Tensor, "b k t n"]:
        """<S_o h y / sigma², R_psi c> of k contents for every trial origin o and psi."""
        # irfft takes each order above 0 for two
        one_sided = torch.conj_physical(self.polar.by_order(content * self.polar.one_sided))
        by_order = (self.spectra @ one_sided.permute(0, 2, 3, 1)).permute(0, 3, 2, 1)
        scores: Tensor = torch.fft.irfft(by_order.conj(), n=self.n_psi, norm="forward")
        return scores

    def greatest(self, content: ByOrder) -> Float[Tensor, "b t k"]:
        """The greatest l(psi, o) of psi within reach, for the same contents and every round particle."""
        real, imag = content.products(self.spectra).flatten(2).chunk(2, 1)
        half_turn = content.turns[: content.reach + 1].expand(len(real), -1, -1)
        cos, sin = half_turn.chunk(2, 2)
        # the score at psi is the sum of an even and an odd part, that at -psi their difference
        inner = (cos @ real).add_((sin @ imag).abs_()).amax(1)
        energy = self.power.mean(-1) @ content.power.mT
        scores: Tensor = inner.unflatten(1, (self.spectra.shape[2], -1)).sub_(0.5 * energy[:, None])
        return scores

    def energy(self, content: Float[Tensor, "#b k 2 p"]) -> Float[Tensor, "b k n"]:
        """<h² R_psi c / sigma², R_psi c> of k contents for every psi; (b, k, 1) without astigmatism."""
        if self.power.shape[-1] == 1:
            everywhere: Tensor = content.square().sum(2) @ self.power[:, self.polar.ring]
            return everywhere
        # the power repeats after half a turn, so that of the square only what repeats counts
        here, opposite = self._samples(content).chunk(2, -1)
        squared = torch.fft.rfft(here.square().addcmul_(opposite, opposite))
        product = (self._power_spectrum.conj()[:, None] * squared).sum(2)
        scale = 0.5 / self.power.shape[-1] ** 2
        half_turn: Tensor = torch.fft.irfft(product, n=self.n_psi // 2, norm="forward") * scale
        return half_turn.repeat(1, 1, 2)

    def _samples(self, content: Float[Tensor, "#b k 2 p"]) -> Float[Tensor, "#b k r a"]:
        samples: Tensor = self.polar.samples(content.flatten(0, 1)).unflatten(0, content.shape[:2])
        return samples

    def _mean_power(self, psi_probability: Float[Tensor, "b n"]) -> Float[Tensor, "b 1 r 1 h"]:
        """Posterior mean of h² / sigma² in the reference's frame, on the samples of half a turn."""
        spectrum = self._power_spectrum
        half_turn = psi_probability.unflatten(-1, (2, -1)).sum(-2)
        turn = torch.fft.rfft(half_turn)[:, None, : spectrum.shape[-1]]
        power: Tensor = torch.fft.irfft(spectrum * turn, n=self.power.shape[-1])
        return power[:, None, :, None]

    def filtered(
        self, content: Float[Tensor, "b k 2 p"], psi_probability: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b k 2 p"]:
        """Posterior mean of h² c / sigma² of k contents in the reference's frame."""
        if self.power.shape[-1] == 1:
            return self.power[:, None, None, self.polar.ring, 0] * content
        samples = self._samples(content)
        product = self._mean_power(psi_probability) * samples.unflatten(-1, (2, -1))
        seen = self.polar.spectra(product.flatten(-2).flatten(0, 1))
        packed: Tensor = self.polar.pack(seen).unflatten(0, content.shape[:2])
        return packed

    def scores(
        self, content: Float[Tensor, "#b k 2 p"], log_prior: Float[Tensor, "b #k t"]
    ) -> Float[Tensor, "b k t n"]:
        """l(psi, o) + log prior masses of k contents: of psi, and those given of the trial origins."""
        inner, energy = self.inner(content), self.energy(content)
        prior = log_prior[..., None] + self.log_prior_psi
        if energy.shape[-1] == 1:
            return inner.add_(prior - 0.5 * energy[:, :, None])
        return inner.sub_(0.5 * energy[:, :, None]).add_(prior)

    def aligned(self, probability: Float[Tensor, "b t n"]) -> Float[Tensor, "b 2 p"]:
        """Posterior mean of the filtered data, centred and turned into the reference's frame."""
        turn = torch.fft.rfft(probability)[..., : self.spectra.shape[1]]
        aligned = turn.permute(0, 2, 1)[:, :, None] @ self.spectra
        packed: Tensor = self.polar.packed_from_orders(aligned[:, :, 0])
        return packed

    def posterior(self, content: Float[Tensor, "b 2 p"], log_prior: Float[Tensor, "b t"]) -> PosePosterior:
        """The posterior under log prior masses of the trial origins and those of psi."""
        joint = self.scores(content[:, None], log_prior[:, None])[:, 0]
        log_evidence, probability = normalised(joint)
        log_ratio = (probability * (joint - log_prior[..., None])).sum((1, 2))
        log_ratio = log_ratio - (probability.sum(1) * self.log_prior_psi).sum(1)
        filtered = self.filtered(content[:, None], probability.sum(1))[:, 0]
        return PosePosterior(
            log_evidence, probability, log_ratio - log_evidence, self.aligned(probability), filtered
        )


def normalised(log_mass: Float[Tensor, "b *more"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b *more"]]:
    """Log of each row's total mass, and its shares; the smallest shares are about 1e-12."""
    top, mass = masses(log_mass)
    total = mass.flatten(1).sum(1)
    return top + torch.log(total), mass.div_(_like(total, mass))


def masses(log_mass: Float[Tensor, "b *more"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b *more"]]:
    """Log of each row's greatest mass, and all masses in units of it; the smallest are 1e-12."""
    top = log_mass.flatten(1).amax(1)
    return top, (log_mass - _like(top, log_mass)).clamp_(min=LOG_NEGLIGIBLE).exp_()


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
