"""The coordinate engine on a GPU: its kernels against float64, then a training step at the paper's sizes.

    python -m benchmarks.coordinate_gpu

``TFLOP/s`` counts the generator's square layers alone, forwards and backwards: 6 h² a pixel. The floors are
those of the step's generator and encoder: by operations at the rate of a large product measured here, by
bytes at the rate of a copy measured here, for every pass over units, weights, gradients and Adam's tables.
``without kernels`` is the same step, recorded, with PyTorch's own operations. Under a minute in all.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cryo_svae.learning import training
from cryo_svae.learning.cuda_graph import Recorded
from cryo_svae.models import ENGINES, coordinate_generator
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.engine import Batch
from cryo_svae.models.pixels import PixelKind


@dataclass(frozen=True)
class Size:
    """One of the paper's experiments."""

    box_px: int
    hidden: int
    encoder: int
    z_dim: int
    batch: int
    pixels: PixelKind
    channels: int = 1

    def __str__(self) -> str:
        colour = " RGB" if self.channels == 3 else ""
        return f"{self.box_px} px{colour}, {self.hidden} units, encoder {self.encoder}, batch {self.batch}"

    @property
    def rows(self) -> int:
        """Pixels of a batch."""
        return self.batch * self.box_px**2

    @property
    def encoder_weights(self) -> int:
        """Weights of the encoder."""
        n_in = self.box_px**2 * self.channels
        return self.encoder * (n_in + self.encoder + 2 * (self.z_dim + 3))

    @property
    def square_flop(self) -> float:
        """Of the generator's square layer."""
        return 6.0 * self.rows * self.hidden**2

    @property
    def flop(self) -> float:
        """Of a step."""
        narrow = 6.0 * self.rows * self.hidden * (2 + self.channels)
        return self.square_flop + narrow + 6.0 * self.batch * self.encoder_weights

    @property
    def bytes(self) -> float:
        """Of a step: 12 passes over units in bfloat16; over weights 9 in float32 (Adam: 7), 4 in half."""
        width = -(-self.hidden // 64) * 64
        weights = self.encoder_weights + self.hidden**2
        return 12.0 * 2.0 * self.rows * width + weights * (9 * 4.0 + 4 * 2.0)


SIZES = (
    Size(28, 500, 500, 2, 100, "bernoulli"),
    Size(28, 500, 500, 2, 1000, "bernoulli"),
    Size(40, 500, 500, 1, 100, "gaussian"),
    Size(40, 1000, 1000, 20, 100, "gaussian"),
    Size(64, 500, 5000, 50, 100, "bernoulli", channels=3),
)


def seconds(work: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Mean time of a call, after one that does not count."""
    work()
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / times


def product_rate(device: torch.device, n: int = 8192) -> float:
    """Operations a second of a large product in bfloat16."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * n**3 / seconds(lambda: a @ b, device)


def copy_rate(device: torch.device, n: int = 2**28) -> float:
    """Bytes a second of a copy, reads and writes counted."""
    a = torch.empty(n, device=device, dtype=torch.float32)
    b = torch.empty_like(a)
    return 8.0 * n / seconds(lambda: b.copy_(a), device)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Of all numbers together."""
    return float((ours.double() - theirs).norm() / theirs.norm())


def check(device: torch.device, n: int = 4, p: int = 784, h: int = 500) -> list[dict[str, object]]:
    """Outputs and gradients of the generator's kernels beside its formula in float64, relative errors."""
    from cryo_svae.models.coordinate_gpu import every_pixel

    found: list[dict[str, object]] = []
    for relu, layers, n_out in itertools.product((False, True), (1, 2, 3), (1, 2, 3)):
        generator = coordinate_generator.CoordinateGenerator(2, n_out, h, layers, "tanh").to(device)
        linear = [generator.of_coordinates, *(m for m in generator.rest if hasattr(m, "weight"))]
        parameters = [each.detach() for layer in linear for each in (layer.weight, layer.bias)]
        points, of_z = torch.rand(n, p, 2, device=device) * 2 - 1, torch.randn(n, h, device=device)
        inputs = [each.requires_grad_() for each in (points, of_z, *parameters)]
        direction = torch.randn(n, p, n_out, device=device)
        x, z, *weights = (each.detach().double().requires_grad_() for each in inputs)
        now = x @ weights[0].T + z[:, None] + weights[1]
        for weight, bias in zip(weights[2::2], weights[3::2], strict=True):
            now = (torch.relu(now) if relu else torch.tanh(now)) @ weight.T + bias
        theirs = torch.autograd.grad((now * direction).sum(), [x, z, *weights])
        row: dict[str, object] = {"activation": "relu" if relu else "tanh", "layers": layers, "out": n_out}
        for lower in (torch.float32, torch.bfloat16):
            output = every_pixel(inputs[0], inputs[1], relu, lower, True, *inputs[2:])
            ours = torch.autograd.grad((output * direction).sum(), inputs)
            kind = str(lower).removeprefix("torch.")
            row[f"output {kind}"] = relative_error(output.detach(), now.detach())
            row[f"worst gradient {kind}"] = max(map(relative_error, ours, theirs))
        found.append(row)
    return found


def kernels(work: Callable[[], object], top: int) -> dict[str, object]:
    """How many kernels a call runs, how long they take together, and those that take longest."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    ran = [event for event in seen.key_averages() if event.device_type == DeviceType.CUDA]
    ran.sort(key=lambda event: -event.self_device_time_total)
    longest = [f"{e.self_device_time_total / 1e3:.3f} ms {e.count}× {e.key[:40]}" for e in ran[:top]]
    busy = sum(event.self_device_time_total for event in ran) / 1e3
    return {"kernels": sum(event.count for event in ran), "busy ms": busy, "longest": " | ".join(longest)}


@contextmanager
def without_kernels() -> Iterator[None]:
    """PyTorch's own operations in place of kernels."""
    with mock.patch.object(coordinate_generator, "gpu_kernels", return_value=None):
        yield


def made(size: Size, device: torch.device) -> tuple[CoordinateEngine, Batch]:
    """An engine, started, and a batch on the device."""
    torch.manual_seed(0)
    config = CoordinateConfig(
        hidden=size.hidden,
        encoder_hidden=size.encoder,
        pixels=size.pixels,
        channels=size.channels,
        augment_rotation=size.pixels != "bernoulli",
    )
    engine = ENGINES["coordinate"][0](size.box_px, size.z_dim, config).to(device)
    assert isinstance(engine, CoordinateEngine)
    image = torch.rand(size.batch, size.channels, size.box_px, size.box_px, device=device)
    batch = Batch(torch.arange(size.batch, device=device), image, None)
    engine.start(iter([batch]), size.batch)
    engine.begin_epoch(5, 10)
    return engine.train(), batch


def step(engine: CoordinateEngine, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One step of training; the sums it gives."""
    optimizer.zero_grad(set_to_none=True)
    sums = training._backward(engine.elbo, batch, engine=engine, n_particles=len(batch))
    optimizer.step()
    return sums


def ready(size: Size, device: torch.device) -> tuple[Callable[[], Tensor], Batch]:
    """A step of training, done three times, and its batch."""
    engine, batch = made(size, device)
    optimizer = training._adam(engine, None, device)
    training._set_learning_rate(optimizer, 1e-4)
    work = partial(step, engine, optimizer, batch)
    for _ in range(3):
        work()
    return work, batch


def timed(size: Size, device: torch.device) -> tuple[float, float, float]:
    """Seconds of a step as it comes and by a recording; the bound in nats a particle afterwards."""
    work, batch = ready(size, device)
    eager = seconds(work, device, 10)
    recorded = Recorded(lambda image: work(), device, True)
    for _ in range(3):
        recorded(None, batch.image)
    repeated = seconds(lambda: recorded(None, batch.image), device, 30)
    return eager, repeated, float(recorded(None, batch.image)[0]) / len(batch)


def row(size: Size, device: torch.device, product: float, copy: float) -> dict[str, object]:
    """Figures of one size; what fails is named in their place."""
    found: dict[str, object] = {"size": str(size)}
    try:
        eager, repeated, bound = timed(size, device)
        found |= {
            "eager ms": eager * 1e3,
            "recorded ms": repeated * 1e3,
            "images/s": size.batch / repeated,
            "TFLOP/s": size.square_flop / repeated / 1e12,
            "floor by operations ms": size.flop / product * 1e3,
            "floor by bytes ms": size.bytes / copy * 1e3,
            "bound": bound,
        }
        if device.type == "cuda":
            found |= kernels(ready(size, device)[0], 12)
        with without_kernels():
            _, repeated, bound = timed(size, device)
        found |= {"without kernels ms": repeated * 1e3, "its bound": bound}
        found["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    except Exception as problem:
        found["failed"] = f"{type(problem).__name__}: {str(problem)[:300]}"
    return found


def parts(size: Size, device: torch.device) -> list[dict[str, object]]:
    """Time of each kernel and product of a step at one size, with its rate."""
    from cryo_svae.models.coordinate_gpu import Layout

    n, p, h, n_out = size.batch, size.box_px**2, size.hidden, size.channels
    layout = Layout(n, p, h, relu=False)
    points, of_z, first = (torch.randn(k, m, device=device) for k, m in ((n * p, 2), (n, h), (h, 2)))
    bias, last, gradient = (torch.randn(*k, device=device) for k in ((h,), (n_out, h), (n * p, n_out)))
    square = layout.padded(torch.randn(h, h, device=device) / h**0.5, torch.bfloat16)
    units = layout.first(points, first, of_z, bias, torch.bfloat16)
    other = units @ square.T
    works: dict[str, tuple[int, bool, Callable[[], object]]] = {  # passes over units, whether a product
        "first layer": (1, False, lambda: layout.first(points, first, of_z, bias, torch.bfloat16)),
        "activate": (2, False, lambda: layout.activate(other, bias)),
        "last layer": (1, False, lambda: layout.last(other, bias, last, bias[:n_out])),
        "last layer, back": (2, False, lambda: layout.last_backward(gradient, other, bias, last)),
        "slope": (3, False, lambda: layout.slope(other, units)),
        "first layer, back": (2, False, lambda: layout.first_backward(other, units, points, first)),
        "product": (2, True, lambda: units @ square.T),
        "product, back": (2, True, lambda: other @ square),
        "its weight": (2, True, lambda: other.T @ units),
    }
    found: list[dict[str, object]] = []
    for name, (passes, product, work) in works.items():
        taken = seconds(work, device)
        line: dict[str, object] = {"size": str(size), "part": name, "ms": taken * 1e3}
        line["TB/s"] = passes * units.numel() * units.element_size() / taken / 1e12
        if product:
            line["TFLOP/s"] = 2.0 * n * p * layout.width**2 / taken / 1e12
        found.append(line)
    return found


def rows() -> list[dict[str, object]]:
    """The table of steps; the first row is the card's own rates."""
    device = torch.device("cuda", 0)
    product, copy = product_rate(device), copy_rate(device)
    card = {"size": torch.cuda.get_device_name(device), "TFLOP/s": product / 1e12, "copy TB/s": copy / 1e12}
    found: list[dict[str, object]] = [card]
    for size in SIZES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        found.append(row(size, device, product, copy))
    return found


def show(lines: list[dict[str, object]]) -> None:
    """One line each."""
    for line in lines:
        print(
            "; ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()),
            flush=True,
        )


def main() -> None:
    """Prints all of it."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print("coordinate_gpu: skipped, PyTorch sees no GPU here")
        return
    device = torch.device("cuda", 0)
    if coordinate_generator.gpu_kernels(device) is None:
        print("coordinate_gpu: Triton makes no kernels here; steps are by PyTorch's own operations")
    else:
        show(check(device))
        show([line for size in (SIZES[0], SIZES[1], SIZES[3]) for line in parts(size, device)])
    show(rows())


if __name__ == "__main__":
    main()
