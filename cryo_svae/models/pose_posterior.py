"""The posterior of in-plane rotation and origin, exact on a grid, and what follows from it.

With u the filtered data CTF Y / sigma² (packed angular coefficients), c the generated coefficients and
S_o the centring by an origin o, the log likelihood ratio against an empty image is

    l(psi, o) = Re sum_{r, m} conj(S_o u)_m(r) c_m(r) exp(i m psi) - ½ sum CTF² |c|² / sigma²

so that all psi cost one ``irfft`` over m for each origin; with an astigmatic CTF the last term is an
angular correlation too. No gradient flows through here: the gradient of log sum p exp(l) with respect
to c is the posterior mean of the gradient of l, and ``aligned`` and ``power`` are all it needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryo_svae.polar import PolarTransform


@dataclass(frozen=True)
class Observed:
    """Filtered data of b particles, centred by each of t trial origins.

    spectra: complex angular coefficients (b, t, pairs) of CTF Y / sigma².
    power:   CTF² / sigma² of each pair's ring (b, pairs), its mean over angles.
    """

    spectra: Tensor
    power: Float[Tensor, "b p"]


@dataclass(frozen=True)
class PosePosterior:
    """Poses of b particles on a grid of t origins and n rotations psi_j = 2 pi j / n.

    log_evidence: log of the prior mean of exp(l) (b,), nats.
    probability:  (b, t, n), sums to 1.
    kl:           divergence from the prior (b,), nats.
    aligned:      posterior mean of the filtered data, centred and turned into the reference's frame.
    """

    log_evidence: Float[Tensor, "b"]
    probability: Float[Tensor, "b t n"]
    kl: Float[Tensor, "b"]
    aligned: Float[Tensor, "b 2 p"]


def pose_scores(
    polar: PolarTransform, spectra: Tensor, generated: Float[Tensor, "b 2 p"], power: Float[Tensor, "b p"]
) -> Float[Tensor, "b t n"]:
    """l(psi, o) in nats for t trial origins and every psi of the polar grid."""
    content = torch.complex(generated[:, 0], generated[:, 1])
    by_order = polar.sum_rings(spectra.conj() * content[:, None])
    by_order[..., 1:] *= 0.5
    cross = torch.fft.irfft(by_order, n=polar.n_angles, norm="forward")
    energy = (power * generated.square().sum(1)).sum(-1)
    return cross - 0.5 * energy[:, None, None]


def pose_posterior(
    polar: PolarTransform,
    spectra: Tensor,
    generated: Float[Tensor, "b 2 p"],
    power: Float[Tensor, "b p"],
    log_prior: Float[Tensor, "b t"],
) -> PosePosterior:
    """The posterior under log prior masses of the trial origins and uniform psi."""
    scores = pose_scores(polar, spectra, generated, power)
    joint = (scores + (log_prior - math.log(polar.n_angles))[..., None]).flatten(1)
    log_evidence = torch.logsumexp(joint, 1)
    probability = torch.exp(joint - log_evidence[:, None]).view(scores.shape)
    kl = (probability * scores).sum((1, 2)) - log_evidence
    turn = torch.fft.rfft(probability)[..., : polar.n_orders]
    aligned = (spectra * turn[..., polar.order]).sum(1)
    return PosePosterior(log_evidence, probability, kl, torch.stack([aligned.real, aligned.imag], 1))
