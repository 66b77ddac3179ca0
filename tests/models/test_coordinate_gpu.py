"""Kernels for a GPU against the formulas; without one Triton interprets them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cryo_svae.models import coordinate_generator
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.coordinate_generator import CoordinateGenerator
from cryo_svae.models.engine import Batch

pytest.importorskip("triton")
from cryo_svae.models import coordinate_gpu
from cryo_svae.models.coordinate_gpu import Layout, every_pixel

REPOSITORY = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, P, H = 2, 13, 11  # two programs an image, 7 and 6 pixels, two at a time


@pytest.fixture(autouse=True)
def many_programs_and_steps(monkeypatch):
    """Small sizes go through several programs an image, of several steps, the last of each cut off."""
    monkeypatch.setattr(coordinate_gpu, "ROWS", 8)
    monkeypatch.setattr(coordinate_gpu, "AT_ONCE", 2)
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def active(x: Tensor, relu: bool) -> Tensor:
    return torch.relu(x) if relu else torch.tanh(x)


def parameters_of(generator: CoordinateGenerator) -> tuple[Tensor, ...]:
    linear = [generator.of_coordinates, *(m for m in generator.rest if isinstance(m, nn.Linear))]
    return tuple(itertools.chain(*((layer.weight, layer.bias) for layer in linear)))


def parameters(n_out: int, layers: int, relu: bool) -> tuple[Tensor, ...]:
    return parameters_of(CoordinateGenerator(2, n_out, H, layers, "relu" if relu else "tanh").to(DEVICE))


def formula(points: Tensor, of_z: Tensor, relu: bool, parameters: tuple[Tensor, ...]) -> Tensor:
    """The layers as the paper has them, in float64."""
    points, of_z, *parameters = (each.double() for each in (points, of_z, *parameters))
    (first, *weights), (bias, *biases) = parameters[::2], parameters[1::2]
    now = points @ first.T + of_z[:, None] + bias
    for weight, b in zip(weights, biases, strict=True):
        now = active(now, relu) @ weight.T + b
    return now


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).detach().norm() / theirs.detach().norm())


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("n_out", [1, 2, 3])
def test_outputs_and_gradients_are_the_formulas(relu, layers, n_out):
    inputs = [
        random(N, P, 2).requires_grad_(),
        random(N, H).requires_grad_(),
        *parameters(n_out, layers, relu),
    ]
    direction = random(N, P, n_out)
    ours = every_pixel(*inputs[:2], relu, torch.float32, True, *inputs[2:])
    theirs = formula(*inputs[:2], relu, inputs[2:])
    assert relative_error(ours, theirs) < 1e-6
    found = torch.autograd.grad((ours * direction).sum(), inputs)
    expected = torch.autograd.grad((theirs * direction).sum(), inputs)
    for mine, their in zip(found, expected, strict=True):
        assert mine.shape == their.shape
        assert relative_error(mine, their) < 3e-6


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_in_bfloat16_errors_are_its_rounding(layers):
    inputs = [
        random(N, P, 2).requires_grad_(),
        random(N, H).requires_grad_(),
        *parameters(1, layers, False),
    ]
    ours = every_pixel(*inputs[:2], False, torch.bfloat16, True, *inputs[2:])
    theirs = formula(*inputs[:2], False, inputs[2:])
    assert ours.dtype == torch.float32
    assert 1e-5 < relative_error(ours, theirs) < 3e-2
    direction = random(N, P, 1)
    found = torch.autograd.grad((ours * direction).sum(), inputs)
    expected = torch.autograd.grad((theirs * direction).sum(), inputs)
    assert relative_error(flat(found), flat(expected)) < 3e-2


def test_without_gradients_outputs_are_the_same():
    inputs = random(N, P, 2), random(N, H), False, torch.float32
    with torch.no_grad():
        weights = parameters(2, 3, False)
        kept, passing = (every_pixel(*inputs, keep, *weights) for keep in (True, False))
    assert torch.equal(kept, passing)


def test_units_added_for_alignment_are_zero():
    layout = Layout(N, P, H, relu=False)
    units = layout.first(random(N * P, 2), random(H, 2), random(N, H), random(H), torch.float32)
    assert units.shape == (N * P, 64)
    assert not units[:, H:].any()
    layout.activate(units, random(H))
    assert units[:, :H].all()
    assert not units[:, H:].any()


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_no_number_stays_so(relu):
    points = random(N, P, 2)
    points[1, 4, 0] = torch.nan
    output = every_pixel(points, random(N, H), relu, torch.float32, False, *parameters(1, 2, relu))
    assert output.isnan().sum() == 1
    assert output[1, 4].isnan().all()


def test_large_units_are_one_or_minus_one():
    layout = Layout(1, 2, 1, relu=False)
    units = nn.functional.pad(torch.tensor([[-400.0], [400.0]], device=DEVICE), (0, 63))
    layout.activate(units, units.new_zeros(1))
    assert units[:, 0].tolist() == [-1.0, 1.0]


def test_sums_repeat():
    layout = Layout(N, P, H, relu=False)
    gradient, units, bias, weight = random(N * P, 1), random(N * P, 64), random(H), random(1, H)
    once, again = (layout.last_backward(gradient, units, bias, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_generator_takes_them_where_they_are(monkeypatch, activation):
    generator = CoordinateGenerator(2, 1, H, 2, activation).to(DEVICE)
    points, z = random(N, P, 2), random(N, 2)
    expected = formula(points, generator.of_z(z), activation == "relu", parameters_of(generator))
    monkeypatch.setattr(coordinate_generator, "gpu_kernels", lambda device: coordinate_gpu)
    monkeypatch.setattr(coordinate_generator, "_EveryPixel", None)
    assert relative_error(generator(points, z), expected) < 1e-6


class Operations(TorchDispatchMode):
    """Counts operations that run a kernel: neither views nor memory asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.n += not is_view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def test_a_step_is_few_operations(monkeypatch):
    """Each takes a GPU a microsecond or more, however little it does."""
    launched = []
    monkeypatch.setattr(coordinate_generator, "gpu_kernels", lambda device: coordinate_gpu)
    monkeypatch.setattr(
        Layout, "launch", lambda layout, kernel, *tensors, **constants: launched.append(kernel)
    )
    engine = CoordinateEngine(8, 2, CoordinateConfig(hidden=H, encoder_hidden=H, pixels="bernoulli"))
    data = Batch(torch.arange(N), torch.rand(N, 1, 8, 8), None)
    with Operations() as counted:
        engine.eval().elbo(data).elbo.mean().backward()
    assert len(launched) == 4
    assert counted.n <= 120


def test_where_they_cannot_be_made_the_engine_goes_without(monkeypatch, caplog):
    def fails(device):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(coordinate_gpu, "try_out", fails)
    coordinate_generator.gpu_kernels.cache_clear()
    assert coordinate_generator.gpu_kernels(torch.device("cuda", 0)) is None
    assert "no C compiler" in caplog.text
    coordinate_generator.gpu_kernels.cache_clear()


def test_a_processor_does_without():
    assert coordinate_generator.gpu_kernels(torch.device("cpu")) is None
    coordinate_gpu.try_out(DEVICE)


def test_every_kernel_compiles_for_an_h100(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.compile_kernels"]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = {"first", "activate", "last", "last_backward", "slope", "first_backward"}
    assert set(done.stdout.split()) == kernels
