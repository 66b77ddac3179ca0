"""The posterior of in-plane rotation and origin, exact on a grid, and what follows from it.

With y a particle's coefficients, h its CTF, c the generated coefficients, S_o the centring by an origin
o and R_psi the turn by psi, the log likelihood ratio against an empty image is

    l(psi, o) = <S_o h y / sigma², R_psi c> - ½ <h² R_psi c / sigma², R_psi c>.

The first term costs one ``irfft`` over orders m for each origin and gives every psi; the second is the
same for all psi unless the CTF is astigmatic, and then an angular correlation. No gradient flows through
here: the gradient of log sum p exp(l) with respect to c is the posterior mean of the gradient of l,
``aligned`` - ``filtered``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import threshold

from cryo_svae.polar import PolarTransform

NEGLIGIBLE = 1e-12  # probability of a pose that counts as none


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

    spectra:  dense coefficients of h y / sigma² centred by each trial origin.
    power:    h² / sigma² on the polar samples (b, rings, angles), or (b, rings, 1) without astigmatism.
    n_psi:    number of rotations, at least the number of polar angles.
    """

    polar: PolarTransform
    spectra: Complex[Tensor, "b t r f"]
    power: Float[Tensor, "b r a"]
    n_psi: int

    def inner(self, content: Float[Tensor, "b 2 p"]) -> Float[Tensor, "b t n"]:
        """<S_o h y / sigma², R_psi c> for every trial origin o and psi."""
        dense = self.polar.dense(content)
        trials = range(self.spectra.shape[1])
        by_order = torch.stack([(self.spectra[:, t].conj() * dense).sum(1) for t in trials], 1)
        by_order[..., 1:] *= 0.5
        scores: Tensor = torch.fft.irfft(by_order, n=self.n_psi, norm="forward")
        return scores

    def energy(self, content: Float[Tensor, "b 2 p"]) -> Float[Tensor, "b n"]:
        """<h² R_psi c / sigma², R_psi c> for every psi; (b, 1) without astigmatism."""
        if self.power.shape[-1] == 1:
            everywhere: Tensor = self.power[:, self.polar.ring, 0] * content.square().sum(1)
            return everywhere.sum(-1, keepdim=True)
        squared = torch.fft.rfft(self.polar.samples(content).square(), norm="forward")
        power = torch.fft.rfft(self.power, norm="forward")
        energy: Tensor = torch.fft.irfft((power.conj() * squared).sum(1), n=self.n_psi, norm="forward")
        return energy

    def filtered(
        self, content: Float[Tensor, "b 2 p"], psi_probability: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b 2 p"]:
        """Posterior mean of h² c / sigma² in the reference's frame."""
        if self.power.shape[-1] == 1:
            return self.power[:, None, self.polar.ring, 0] * content
        spectrum = torch.fft.rfft(self.power)
        turn = torch.fft.rfft(psi_probability)[:, None, : spectrum.shape[-1]]
        power = torch.fft.irfft(spectrum * turn, n=self.power.shape[-1])
        return self.polar.pack(self.polar.spectra(power * self.polar.samples(content)))

    def posterior(self, content: Float[Tensor, "b 2 p"], log_prior: Float[Tensor, "b t"]) -> PosePosterior:
        """The posterior under log prior masses of the trial origins and uniform psi."""
        scores = self.inner(content) - 0.5 * self.energy(content)[:, None]
        joint = (scores + (log_prior - math.log(self.n_psi))[..., None]).flatten(1)
        log_evidence = torch.logsumexp(joint, 1)
        # Without the threshold, denormal numbers would slow FFTs on the CPU a hundredfold.
        probability = threshold(torch.exp(joint - log_evidence[:, None]), NEGLIGIBLE, 0.0).view(
            scores.shape
        )
        kl = (probability * scores).sum((1, 2)) - log_evidence
        turn = torch.fft.rfft(probability)[:, :, None, : self.spectra.shape[-1]]
        aligned = self.spectra[:, 0] * turn[:, 0]
        for t in range(1, self.spectra.shape[1]):
            aligned += self.spectra[:, t] * turn[:, t]
        filtered = self.filtered(content, probability.sum(1))
        return PosePosterior(log_evidence, probability, kl, self.polar.pack(aligned), filtered)


def mean_origin(
    pose: PosePosterior, origins: Float[Tensor, "b t 2"]
) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b"]]:
    """Posterior mean of the origin, and the mean variance of its two components."""
    by_origin = pose.probability.sum(-1)
    mean = (by_origin[..., None] * origins).sum(1)
    return mean, (by_origin * (origins - mean[:, None]).square().sum(-1)).sum(1) / 2.0


def disc_of_points(radius: float, device: torch.device) -> Float[Tensor, "t 2"]:
    """Integer points (x, y) within a radius."""
    axis = torch.arange(-math.floor(radius), math.floor(radius) + 1, device=device)
    points = torch.cartesian_prod(axis, axis)
    return points[points.square().sum(1) <= radius**2 + 1e-6].float()
