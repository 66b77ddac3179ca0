"""Distributions of pixels given the generator's output, in nats."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

PixelKind = Literal["gaussian-unit", "gaussian", "gaussian-per-pixel", "bernoulli"]
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class PixelLikelihood(nn.Module):
    """log p(pixel | generator output), for the paper's kinds of pixels.

    gaussian-unit:       mean, standard deviation 1.
    gaussian:            mean, one learned standard deviation (images in any scale).
    gaussian-per-pixel:  mean and log standard deviation from the generator.
    bernoulli:           logit; data in [0, 1].

    softplus: the mean of Gaussian pixels is softplus(output), so never negative.
    """

    def __init__(self, kind: PixelKind, channels: int, softplus: bool) -> None:
        super().__init__()
        self.kind = kind
        self.channels = channels
        self.softplus = softplus
        self.outputs = channels * (2 if kind == "gaussian-per-pixel" else 1)
        self.log_std = nn.Parameter(torch.zeros(()), requires_grad=kind == "gaussian")

    def split(
        self, output: Float[Tensor, "*p outputs"]
    ) -> tuple[Float[Tensor, "*p channels"], Float[Tensor, "*#p #channels"]]:
        """Mean (or logit) and log standard deviation of each pixel."""
        mean = output[..., : self.channels]
        if self.softplus and self.kind != "bernoulli":
            mean = F.softplus(mean)
        if self.kind == "gaussian-per-pixel":
            return mean, output[..., self.channels :]
        return mean, self.log_std.expand([1] * output.ndim)

    def expectation(self, mean: Float[Tensor, "*p"]) -> Float[Tensor, "*p"]:
        """The expected pixel, of the mean or logit."""
        return torch.sigmoid(mean) if self.kind == "bernoulli" else mean

    def log_prob(
        self, mean: Float[Tensor, "*p"], log_std: Float[Tensor, "*#p"], data: Float[Tensor, "*p"]
    ) -> Float[Tensor, "*p"]:
        """Nats of each pixel."""
        if self.kind == "bernoulli":
            return data * mean - F.softplus(mean)
        return -0.5 * ((data - mean) * torch.exp(-log_std)) ** 2 - log_std - HALF_LOG_2PI
