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
from jaxtyping import Complex, Float
from torch import Tensor

from cryo_svae.polar import PolarTransform


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
    spectra: Complex[Tensor, "b t r f"], content: Complex[Tensor, "b r f"], energy: Float[Tensor, "b"], n_psi: int
) -> Float[Tensor, "b t n"]:
    """l(psi, o) in nats for t trial origins and n_psi rotations.

    spectra: dense angular coefficients of the filtered data, centred by each trial origin.
    content: dense generated coefficients; energy: their sum CTF² |c|² / sigma².
    """
    by_order = torch.stack([(spectra[:, t].conj() * content).sum(1) for t in range(spectra.shape[1])], 1)
    by_order[..., 1:] *= 0.5
    return torch.fft.irfft(by_order, n=n_psi, norm="forward") - 0.5 * energy[:, None, None]


def pose_posterior(
    polar: PolarTransform,
    spectra: Complex[Tensor, "b t r f"],
    scores: Float[Tensor, "b t n"],
    log_prior: Float[Tensor, "b t"],
) -> PosePosterior:
    """The posterior under log prior masses of the trial origins and uniform psi."""
    joint = (scores + (log_prior - math.log(scores.shape[-1]))[..., None]).flatten(1)
    log_evidence = torch.logsumexp(joint, 1)
    probability = torch.exp(joint - log_evidence[:, None]).view(scores.shape)
    kl = (probability * scores).sum((1, 2)) - log_evidence
    turn = torch.fft.rfft(probability)[..., : spectra.shape[-1]]
    aligned = spectra[:, 0] * turn[:, 0, None]
    for t in range(1, spectra.shape[1]):
        aligned = aligned + spectra[:, t] * turn[:, t, None]
    return PosePosterior(log_evidence, probability, kl, polar.pack(aligned))
