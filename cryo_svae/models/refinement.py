"""The exact posterior of z, found from an approximate one; and summaries of a posterior over angles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NEWTON_STEPS = 4
REVIVAL = 20.0  # a rise by 3 nats after a valley starts a mode of its own
FARTHEST_Z = 6.0  # standard deviations of the prior
PAIRS = 16  # antithetic pairs of importance points
INFLATION = 1.25  # of the Gaussian the points are drawn from, so that its tails cover the posterior's


@dataclass(frozen=True)
class LocalModel:
    """log p(image | z) at one z for each of b particles, and its shape there.

    gradient:  d log p / dz (b, d).
    curvature: complete-data (Gauss-Newton) information (b, d, d), positive semidefinite.
    """

    log_evidence: Float[Tensor, "b"]
    gradient: Float[Tensor, "b d"]
    curvature: Float[Tensor, "b d d"]


def newton_mode(
    z: Float[Tensor, "b d"], local_model: Callable[[Tensor], LocalModel]
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d d"]]:
    """Mode of p(z | image) found from z, and the complete-data information of the likelihood there.

    Gauss-Newton steps (with this information they are EM steps, which go up); where one did not go
    up, the next is a quarter as long.
    """
    identity = torch.eye(z.shape[1], device=z.device)
    here = local_model(z)
    height = here.log_evidence - 0.5 * z.square().sum(1)
    stride = z.new_ones(len(z), 1)
    for _ in range(NEWTON_STEPS):
        # of a matrix that is never singular; the usual solve waits to see whether it is
        step = torch.linalg.solve_ex(here.curvature + identity, here.gradient - z)[0]
        trial = (z + stride * step).clamp(-FARTHEST_Z, FARTHEST_Z)
        there = local_model(trial)
        trial_height = there.log_evidence - 0.5 * trial.square().sum(1)
        better = trial_height > height
        here = _choose(better, there, here)
        z, height = torch.where(better[:, None], trial, z), torch.where(better, trial_height, height)
        stride = torch.where(better[:, None], (2.0 * stride).clamp(max=1.0), 0.25 * stride)
    return z, here.curvature


def root_covariance(information: Float[Tensor, "b d d"]) -> Float[Tensor, "b d d"]:
    """A matrix R with R Rᵀ = (information + I)⁻¹: the posterior covariance under the prior N(0, I)."""
    values, vectors = torch.linalg.eigh(information)
    # Less information than none is a ripple of the noise.
    root: Tensor = (vectors * (1.0 + values.clamp(min=0.0)).rsqrt()[:, None, :]) @ vectors.mT
    return root


def _choose(first: Bool[Tensor, "b"], yes: LocalModel, no: LocalModel) -> LocalModel:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(first.view(-1, *[1] * (a.ndim - 1)), a, b)

    return LocalModel(*(pick(getattr(yes, f.name), getattr(no, f.name)) for f in fields(LocalModel)))


@lru_cache(maxsize=8)
def importance_points(z_dim: int) -> Float[Tensor, "k d"]:
    """Fixed quasi-random points of N(0, INFLATION²), in antithetic pairs: the same for every particle."""
    sobol = torch.quasirandom.SobolEngine(z_dim, scramble=True, seed=7).draw(PAIRS)
    half = torch.special.ndtri(sobol.clamp(1e-4, 1.0 - 1e-4)) * INFLATION
    return torch.cat([half, -half])


def mode_around(probability: Float[Tensor, "b n"], peak: Tensor) -> Bool[Tensor, "b n"]:
    """The angles of the mode around each peak: until the probability rises again ``REVIVAL``-fold."""
    n = probability.shape[1]
    index = torch.arange(n, device=probability.device)
    rolled = probability.gather(1, (index + peak[:, None]) % n)
    smooth = rolled.clamp(min=1e-9)

    def descends(values: Tensor) -> Tensor:
        return (values <= REVIVAL * values.cummin(1).values).cumprod(1).bool()

    right, left = descends(smooth), descends(smooth[:, (-index) % n])[:, (-index) % n]
    inside = torch.where(index <= n // 2, right, left)
    return torch.zeros_like(inside).scatter(1, (index + peak[:, None]) % n, inside)


def summarise_angle(
    probability: Float[Tensor, "b n"],
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Centre (rad) and standard deviation (rad) of the main mode, and mass of the second-best mode."""
    n = probability.shape[1]
    step = 2.0 * math.pi / n
    peak = probability.argmax(1)
    main = mode_around(probability, peak)
    offset = ((torch.arange(n, device=peak.device) - peak[:, None] + n // 2) % n - n // 2) * step
    inside = probability * main
    mass = inside.sum(1, keepdim=True)
    mean = (inside * offset).sum(1, keepdim=True) / mass
    variance = (inside * (offset - mean).square()).sum(1) / mass[:, 0]
    rest = probability.masked_fill(main, 0.0)
    second = mode_around(rest, rest.argmax(1)) & ~main
    # a Gaussian narrower than the grid: vertex of the parabola through three log probabilities
    log_p = probability.clamp(min=1e-30).log()
    at = [log_p.gather(1, (peak[:, None] + k) % n)[:, 0] for k in (-1, 0, 1)]
    bend = (2.0 * at[1] - at[0] - at[2]).clamp(min=1e-6)
    vertex = (0.5 * (at[2] - at[0]) / bend).clamp(-0.5, 0.5) * step
    narrow = variance.sqrt() < step
    centre = torch.where(narrow, vertex, mean[:, 0])
    std = torch.where(narrow, step * bend.rsqrt(), variance.sqrt())
    return peak * step + centre, std, (rest * second).sum(1)
