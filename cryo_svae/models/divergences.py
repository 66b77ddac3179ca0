"""Kullback-Leibler divergences between Gaussians, in nats (Bepler et al. 2019, section 2.2)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def kl_normal(
    mean: Float[Tensor, "b d"], log_std: Float[Tensor, "b d"], prior_std: float
) -> Float[Tensor, "b"]:
    """KL(N(mean, std²) ‖ N(0, prior_std²)), summed over the last axis."""
    variance_ratio = torch.exp(2.0 * log_std) / prior_std**2
    each = math.log(prior_std) - log_std + 0.5 * (variance_ratio + (mean / prior_std) ** 2 - 1.0)
    return each.sum(-1)


def kl_normal_free_mean(log_std: Float[Tensor, "b d"], prior_std: float) -> Float[Tensor, "b"]:
    """The same with the mean left free: -log std + log s + std²/(2 s²) - 1/2, summed."""
    return kl_normal(torch.zeros_like(log_std), log_std, prior_std)
