"""The coordinate engine's generator on a GPU: its matrices by cuBLAS, all else in one pass over the units.

A product of 500 by 500 takes a GPU less time than to read and write what goes in and comes out. So whatever
is done to units between products is one kernel that reads them once: first layer and activation; bias and
activation; activation and output; and backwards the gradient's way through each of them, with the sums for
biases and narrow weights taken on the way. Sums are of fixed pieces in a fixed order, so they repeat.

Units lie in rows of a multiple of 64, for which matrix units are several times as fast; those added are 0
and stay 0. Those of the last hidden layer are kept as they were before bias and activation, which saves a
pass: only kernels read them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from cryo_svae.models import coordinate_kernels

ROWS = 128  # pixels a program goes through at most; each program writes sums of its own
AT_ONCE = 4  # of these; some programs more at a time hide the wait for memory better than some pixels more
UNITS_A_WARP = 256  # eight a thread, so that a thread has the same units of all pixels and sums them alone
ALIGNED = 64  # units


@dataclass(frozen=True)
class Layout:
    """How units of n images of p pixels, h a pixel, lie in memory, and which program goes through which.

    A program goes through up to ``ROWS`` pixels of one image.
    """

    n: int
    p: int
    h: int
    relu: bool

    @property
    def width(self) -> int:
        """Units of a row as it is stored."""
        return -(-self.h // ALIGNED) * ALIGNED

    @property
    def parts(self) -> int:
        """Programs an image."""
        return -(-self.p // ROWS)

    @property
    def programs(self) -> int:
        """Programs in all."""
        return self.n * self.parts

    def launch(self, kernel: Any, *tensors: Tensor, **constants: int | bool) -> None:
        """Runs a kernel."""
        columns = triton.next_power_of_2(self.width)
        warps = min(max(1, columns // UNITS_A_WARP), 32)  # at most what CUDA allows
        each = -(-self.p // self.parts)
        with torch.cuda.device_of(tensors[0]):
            kernel[(self.programs,)](
                *tensors, self.p, self.parts, self.h, self.width,
                RELU=self.relu, N_ROWS=each, R=AT_ONCE, C=columns, num_warps=warps, **constants,
            )  # fmt: skip

    def first(
        self, points: Tensor, weight: Tensor, of_z: Tensor, bias: Tensor | None, lower: torch.dtype
    ) -> Tensor:
        """Units (n p, width) of the first layer; without a bias, before bias and activation."""
        units = points.new_empty(self.n * self.p, self.width, dtype=lower)
        tensors = points, weight, of_z, weight if bias is None else bias, units
        self.launch(coordinate_kernels.first, *tensors, ACTIVATE=bias is not None)
        return units

    def activate(self, units: Tensor, bias: Tensor) -> None:
        """Adds the bias and activates, in place."""
        self.launch(coordinate_kernels.activate, units, bias)

    def last(self, units: Tensor, bias: Tensor, weight: Tensor, bias_out: Tensor) -> Tensor:
        """Outputs (n p, out) in float32, of units before bias and activation."""
        output = bias.new_empty(len(units), len(weight))
        self.launch(coordinate_kernels.last, units, bias, weight, bias_out, output, N_OUT=len(weight))
        return output

    def last_backward(
        self, gradient: Tensor, units: Tensor, bias: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of those units (n p, width), of their bias (h,) and of the weight (out, h)."""
        made, n_out = torch.empty_like(units), len(weight)
        of_bias = bias.new_empty(self.programs, self.h)
        of_weight = bias.new_empty(self.programs, n_out, self.h)
        tensors = gradient, units, bias, weight, made, of_bias, of_weight
        self.launch(
            coordinate_kernels.last_backward, *tensors, N_OUT=n_out, OUTS=triton.next_power_of_2(n_out)
        )
        return made, of_bias.sum(0), of_weight.sum(0)

    def slope(self, gradient: Tensor, units: Tensor) -> Tensor:
        """Takes the gradient of activated units back to before, in place; that of their bias (h,)."""
        of_bias = gradient.new_empty(self.programs, self.h, dtype=torch.float32)
        self.launch(coordinate_kernels.slope, gradient, units, of_bias)
        return of_bias.sum(0)

    def first_backward(
        self, gradient: Tensor, units: Tensor | None, points: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of points (n p, 2), of z's part (n, h) and of the weight (h, 2).

        ``gradient`` is that of the activated units given, or of what was before where none are.
        """
        of_points = torch.empty_like(points)
        of_z = points.new_empty(self.n, self.parts, self.h)
        of_weight = points.new_empty(self.programs, self.h, 2)
        tensors = gradient, gradient if units is None else units, points, weight, of_points, of_z, of_weight
        self.launch(coordinate_kernels.first_backward, *tensors, ACTIVATED=units is not None)
        return of_points, of_z.sum(1), of_weight.sum(0)

    def padded(self, weight: Tensor, lower: torch.dtype) -> Tensor:
        """A square weight as wide as units are stored."""
        square = weight.new_zeros(self.width, self.width, dtype=lower)
        square[: self.h, : self.h] = weight
        return square


class _EveryPixel(torch.autograd.Function):
    """See ``every_pixel``."""

    @staticmethod
    def forward(
        ctx: Any,
        points: Tensor,
        of_z: Tensor,
        relu: bool,
        lower: torch.dtype,
        keep: bool,
        *parameters: Tensor,
    ) -> Tensor:
        n, p, h = len(points), points.shape[1], of_z.shape[-1]
        layout = Layout(n, p, h, relu)
        flat = points.reshape(n * p, 2)
        (first, *middle, last), biases = parameters[::2], parameters[1::2]
        squares = [layout.padded(weight, lower) for weight in middle]
        now = layout.first(flat, first, of_z.contiguous(), biases[0] if middle else None, lower)
        units = [now]
        for k, square in enumerate(squares, 1):
            now = now @ square.T
            if k < len(squares):
                layout.activate(now, biases[k])
            units = [*units, now] if keep else [now]
        if keep:
            ctx.save_for_backward(flat, first, last, biases[-2], *squares, *units)
            ctx.layout = layout
        return layout.last(now, biases[-2], last, biases[-1]).view(n, p, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        points, first, last, bias, *rest = ctx.saved_tensors
        squares, units = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        gradient = gradient.reshape(len(points), -1).contiguous()
        now, of_bias, of_last = layout.last_backward(gradient, units[-1], bias, last)
        of_weights, of_biases = [of_last], [gradient.sum(0), of_bias]
        for k in reversed(range(len(squares))):
            of_weights.append((now.T @ units[k])[: layout.h, : layout.h].to(first.dtype))
            now = now @ squares[k]
            if k > 0:
                of_biases.append(layout.slope(now, units[k]))
        of_points, of_z, of_first = layout.first_backward(now, units[0] if squares else None, points, first)
        of_weights.append(of_first)
        if squares:
            of_biases.append(of_z.sum(0))
        layers = zip(reversed(of_weights), reversed(of_biases), strict=True)
        return of_points.view(layout.n, layout.p, 2), of_z, None, None, None, *itertools.chain(*layers)


def every_pixel(
    points: Float[Tensor, "b p 2"],
    of_z: Float[Tensor, "b h"],
    relu: bool,
    lower: torch.dtype,
    keep: bool,
    *parameters: Float[Tensor, "..."],
) -> Float[Tensor, "b p out"]:
    """Outputs at points, given the part of the first layer that is z's; float32, as all that is given.

    relu:       or else tanh.
    lower:      type of the layers after the first.
    keep:       whether there will be a backward pass.
    parameters: weight and bias of each layer in turn; the first is the points'.
    """
    output: Tensor = _EveryPixel.apply(points, of_z, relu, lower, keep, *parameters)  # type: ignore[no-untyped-call]
    return output


def try_out(device: torch.device) -> None:
    """Makes and runs a kernel in either precision; raises what Triton raises where it cannot."""
    bias = torch.zeros(ALIGNED, device=device)
    for lower in (torch.float32, torch.bfloat16):
        Layout(1, 1, ALIGNED, relu=False).activate(bias.new_zeros(1, ALIGNED, dtype=lower), bias)
