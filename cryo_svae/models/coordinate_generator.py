"""The coordinate engine's generator: (x, y, z) to the distribution of the pixel at (x, y).

Nearly all of that engine's work is here, an MLP evaluated at every pixel of every image. It goes through
a few images at a time, forwards and backwards, in memory that is used over and over, so that what a layer
makes is still in the cache when the next one reads it. On a GPU it goes by kernels of its own instead.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryo_svae.models.engine import own_precision

log = logging.getLogger(__name__)

UNITS_AT_A_TIME = 2**20  # of a hidden layer


class Activation(NamedTuple):
    """A function of hidden units, and its derivative as a function of its value.

    in_place: of units.
    backward: (gradient, value of the function, where the product goes).
    """

    module: type[nn.Module]
    in_place: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], object]


ACTIVATIONS = {
    "tanh": Activation(
        nn.Tanh,
        torch.tanh_,
        lambda gradient, value, out: torch.ops.aten.tanh_backward(gradient, value, grad_input=out),
    ),
    "relu": Activation(
        nn.ReLU,
        torch.relu_,
        lambda gradient, value, out: torch.ops.aten.threshold_backward(
            gradient, value, 0.0, grad_input=out
        ),
    ),
}


def mlp(n_in: int, hidden: int, n_out: int, layers: int, activation: str) -> nn.Sequential:
    """``layers`` hidden layers and a linear output."""
    widths = [n_in] + [hidden] * layers
    steps: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        steps += [nn.Linear(before, after), ACTIVATIONS[activation].module()]
    return nn.Sequential(*steps, nn.Linear(widths[-1], n_out))


class _Way(NamedTuple):
    """How the layers are gone through.

    lower:    type of the layers after the first; points and the first layer keep their own.
    n_images: in a piece.
    keep:     whether there will be a backward pass.
    """

    activation: Activation
    lower: torch.dtype
    n_images: int
    keep: bool

    def activate(self, units: Tensor, scratch: Tensor) -> None:
        """Activates units in place."""
        if units.device.type == "cpu" and units.dtype != scratch.dtype:
            # copies counted, twice as fast as tanh of bfloat16 on a CPU
            units.copy_(self.activation.in_place(scratch.copy_(units)))
        else:
            self.activation.in_place(units)

    def pieces(self, n: int, n_pixels: int) -> Iterator[tuple[slice, slice]]:
        """Images of each piece, and their pixels."""
        for first in range(0, n, self.n_images):
            last = min(n, first + self.n_images)
            yield slice(first, last), slice(first * n_pixels, last * n_pixels)


class _EveryPixel(torch.autograd.Function):
    """Outputs (b, p, out) at points (b, p, 2), given the part of the first layer that is z's (b, h).

    ``parameters``: weight and bias of each layer in turn; the first is the points'.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, of_z: Tensor, way: _Way, *parameters: Tensor) -> Tensor:
        n, p, h = len(points), points.shape[1], of_z.shape[-1]
        first, *weights = parameters[::2]
        weights, biases = [w.to(way.lower) for w in weights], [b.to(way.lower) for b in parameters[3::2]]
        flat, of_image = points.reshape(n * p, 2), (of_z + parameters[1])[:, None]
        rows = min(n, way.n_images) * p
        units = [flat.new_empty(n * p if way.keep else rows, h, dtype=way.lower) for _ in weights]
        output = flat.new_empty(n * p, len(biases[-1]), dtype=way.lower)
        scratch = flat.new_empty(rows, h)
        for images, pixels in way.pieces(n, p):
            here = pixels if way.keep else slice(0, pixels.stop - pixels.start)
            own = scratch[: pixels.stop - pixels.start]
            torch.mm(flat[pixels], first.T, out=own)
            own.view(-1, p, h).add_(of_image[images])
            units[0][here] = way.activation.in_place(own)
            for before, after, weight, bias in zip(units, units[1:], weights, biases, strict=False):
                torch.addmm(bias, before[here], weight.T, out=after[here])
                way.activate(after[here], own)
            torch.addmm(biases[-1], units[-1][here], weights[-1].T, out=output[pixels])
        if way.keep:
            ctx.save_for_backward(flat.to(way.lower), first.to(way.lower), *weights, *units)
            ctx.way = way
        return output.view(n, p, -1).to(points.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        way: _Way = ctx.way
        points, *rest = ctx.saved_tensors
        weights, units = rest[: len(rest) // 2 + 1], rest[len(rest) // 2 + 1 :]
        n, p, h = len(gradient), gradient.shape[1], units[0].shape[1]
        gradient = gradient.reshape(n * p, -1)
        lower = gradient.to(way.lower)
        inputs = [points, *units]
        of_weights = [gradient.new_zeros(weight.shape) for weight in weights]
        of_biases = [gradient.new_zeros(len(weight)) for weight in weights]
        of_biases[-1] = gradient.sum(0)
        of_points, of_z = gradient.new_empty(n * p, 2), gradient.new_empty(n, h)
        now, other = (lower.new_empty(min(n, way.n_images) * p, h) for _ in range(2))
        for images, pixels in way.pieces(n, p):
            now, other = now[: pixels.stop - pixels.start], other[: pixels.stop - pixels.start]
            torch.mm(lower[pixels], weights[-1], out=now)
            of_weights[-1] += lower[pixels].T @ units[-1][pixels]
            for k in reversed(range(len(units))):
                way.activation.backward(now, units[k][pixels], now)
                of_weights[k] += now.T @ inputs[k][pixels]
                if k > 0:
                    of_biases[k] += now.sum(0)
                    torch.mm(now, weights[k], out=other)
                    now, other = other, now
            of_points[pixels] = now @ weights[0]
            of_z[images] = now.view(-1, p, h).sum(1)
        of_biases[0] = of_z.sum(0)
        others = itertools.chain(*zip(of_weights, of_biases, strict=True))
        return of_points.view(n, p, 2), of_z, None, *others


@functools.cache
def gpu_kernels(device: torch.device) -> ModuleType | None:
    """The module of kernels for a GPU; None elsewhere, and where Triton cannot make them.

    They are tried once, for Triton also needs a C compiler; a warning says what went wrong.
    """
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return None
    from cryo_svae.models import coordinate_gpu

    try:
        coordinate_gpu.try_out(device)
    except Exception as problem:  # whatever a compiler and a driver may raise
        log.warning("the coordinate engine goes without kernels of its own, so it is slower: %s", problem)
        return None
    return coordinate_gpu


class CoordinateGenerator(nn.Module):
    """(x, y, z) to a pixel's distribution; the first layer is split so that z costs once an image.

    Under autocast the layers after the first compute in its type; coordinates, poses and the first layer
    keep their own, for bfloat16 would round a coordinate of 30 px by 0.1 px.
    """

    def __init__(self, z_dim: int, n_out: int, hidden: int, layers: int, activation: str) -> None:
        super().__init__()
        self.of_coordinates = nn.Linear(2, hidden)
        self.of_z = nn.Linear(z_dim, hidden, bias=False)
        self.activation = ACTIVATIONS[activation]
        self.rest = mlp(hidden, hidden, n_out, layers - 1, activation)

    def forward(
        self, coordinates: Float[Tensor, "b p 2"], z: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b p out"]:
        """Outputs at coordinates in [-1, 1]."""
        kind, n_images, keep = z.device.type, len(z), torch.is_grad_enabled()
        lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else z.dtype
        if kind == "cpu":
            n_images = max(1, UNITS_AT_A_TIME // (coordinates.shape[1] * self.of_z.out_features))
        layers = [self.of_coordinates, *(m for m in self.rest if isinstance(m, nn.Linear))]
        parameters = itertools.chain(*((layer.weight, layer.bias) for layer in layers))
        kernels = gpu_kernels(z.device) if z.dtype == torch.float32 else None
        with own_precision(z):
            of_z = self.of_z(z)
            if kernels is not None:
                relu = self.activation is ACTIVATIONS["relu"]
                output: Tensor = kernels.every_pixel(coordinates, of_z, relu, lower, keep, *parameters)
            else:
                way = _Way(self.activation, lower, n_images, keep)
                output = _EveryPixel.apply(coordinates, of_z, way, *parameters)  # type: ignore[no-untyped-call]
        return output
