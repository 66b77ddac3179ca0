"""Makes the coordinate engine's kernels for an H100, without one; prints the name of each.

    python -m tests.models.compile_kernels

The interpreter takes Python that Triton's compiler does not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cryo_svae.models import coordinate_gpu
from cryo_svae.models.coordinate_generator import CoordinateGenerator

H100 = GPUTarget("cuda", 90, 32)


class OnlyCompiled:
    """In place of a kernel: what would be run is compiled."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compiled(*arguments: object, **constants: object) -> None:
            made = self.kernel.warmup(*arguments, grid=grid, **constants)
            assert ".target sm_90" in made.asm["ptx"]
            print(self.kernel.fn.__name__)

        return compiled


def main() -> None:
    """All of them, with one and with three hidden layers, in both precisions and activations."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: H100,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    torch.cuda.device_of = lambda tensor: nullcontext()
    launch = coordinate_gpu.Layout.launch
    coordinate_gpu.Layout.launch = lambda layout, kernel, *tensors, **constants: launch(
        layout, OnlyCompiled(kernel), *tensors, **constants
    )
    cases = ((1, 1, False, torch.float32), (3, 1, True, torch.float32), (3, 3, False, torch.bfloat16))
    for layers, n_out, relu, lower in cases:
        generator = CoordinateGenerator(2, n_out, 500, layers, "tanh")
        linear = [generator.of_coordinates, *(m for m in generator.rest if isinstance(m, nn.Linear))]
        parameters = [each for layer in linear for each in (layer.weight, layer.bias)]
        points, of_z = torch.rand(2, 784, 2), torch.rand(2, 500)
        coordinate_gpu.every_pixel(points, of_z, relu, lower, True, *parameters).sum().backward()


if __name__ == "__main__":
    main()
