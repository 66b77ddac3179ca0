"""Kullback-Leibler divergences between Gaussians, in nats (Bepler et al. 2019, section 2.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kl_normal(
    mean: Float[Tensor, "b d"],
    log_std: Float[Tensor, "b d"],
    prior_std: Float[Tensor, "d"],
    mean_std: Float[Tensor, "d"],
) -> Float[Tensor, "b d"]:
    """KL(N(mean, std²) ‖ N(0, prior_std²)) of each of d numbers.

    ``mean_std`` is ``prior_std``, or infinite where the prior is centred on the mean, wherever that is.
    """
    variance_ratio = torch.exp(2.0 * log_std) / prior_std**2
    return torch.log(prior_std) - log_std + 0.5 * (variance_ratio + (mean / mean_std) ** 2 - 1.0)
