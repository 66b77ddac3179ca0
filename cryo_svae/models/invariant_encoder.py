"""Inference network whose answer does not turn with the image."""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cryo_svae.imaging.polar import PolarTransform

TURNS = 16  # rotations at which the image is looked at; 32 gains little
UNITS = 64
HIDDEN = 128


class InvariantEncoder(nn.Module):
    """Angular coefficients, by order, to the mean and log standard deviation of q(z | image).

    A group convolution over in-plane rotations: one complex weight per (unit, ring, order) gives
    h_m, the image seen at turn theta_j is Re sum_m h_m exp(-i m theta_j), exact for every turn;
    one small network looks at each turn, and attention pools them. Any rotation by a multiple of
    2 pi / TURNS leaves the answer as it is; the turns start at a random angle while training,
    so that the angles between them are learned alike. Of coefficients that end at an earlier ring and
    order than ``polar`` has, only their part of the weights is used.
    """

    def __init__(self, polar: PolarTransform, z_dim: int) -> None:
        super().__init__()
        self.z_dim = z_dim
        n_orders, n_rings = polar.n_orders, polar.n_rings
        fan_in = 2 * polar.n_pairs
        self.real = nn.Parameter(torch.randn(n_orders, n_rings, UNITS) * math.sqrt(1.0 / fan_in))
        self.imag = nn.Parameter(torch.randn(n_orders, n_rings, UNITS) * math.sqrt(1.0 / fan_in))
        self.bias = nn.Parameter(torch.zeros(UNITS))
        self.look = nn.Linear(UNITS, HIDDEN)
        self.attend = nn.Linear(HIDDEN, 1)
        self.pooled = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 2 * z_dim)

    def forward(self, by_order: Complex[Tensor, "b o r"]) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation (b, z_dim) of z; coefficients with noise of variance 1."""
        turns = self._turned(by_order)
        looks = F.silu(self.look(F.silu(turns + self.bias)))
        weight = torch.softmax(self.attend(looks), 0)
        pooled = (weight * looks).sum(0)
        mean, log_std = self.head(F.silu(self.pooled(pooled))).chunk(2, -1)
        return mean, log_std.clamp(-6.0, 2.0)

    def _turned(self, by_order: Complex[Tensor, "b o r"]) -> Float[Tensor, "j b u"]:
        batch, n_orders, n_rings = by_order.shape
        in_front = by_order.transpose(0, 1)
        seen = torch.cat([in_front.real, in_front.imag], -1)
        to_real, to_imag = self.real[:n_orders, :n_rings], self.imag[:n_orders, :n_rings]
        real = torch.bmm(seen, torch.cat([to_real, -to_imag], 1))
        imag = torch.bmm(seen, torch.cat([to_imag, to_real], 1))
        theta = 2.0 * math.pi / TURNS * torch.arange(TURNS, device=by_order.device)
        if self.training:
            theta = theta + torch.rand((), device=by_order.device) * (2.0 * math.pi / TURNS)
        phase = theta[:, None] * torch.arange(n_orders, device=by_order.device)
        turned = torch.cos(phase) @ real.view(n_orders, -1) + torch.sin(phase) @ imag.view(n_orders, -1)
        return turned.view(TURNS, batch, -1)
