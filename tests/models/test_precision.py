"""Bounds and gradients in float32, and in the bfloat16 of GPUs, beside the same code in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.calibration import drawn_from
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.engine import Batch, Engine
from tests.models.planted import make_alike, planted_engine

IMAGES = 48


class SameDraws(Batch):
    """A batch whose random numbers are the same in every precision."""

    seed = 0

    def draw(self, sample: Callable[..., Tensor], like: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        return sample(like.shape, generator=random, dtype=torch.float64).to(like.dtype)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes what the engines keep at single precision double, from its call to the test's end."""

    def switch() -> None:
        monkeypatch.setattr(torch, "complex64", torch.complex128)
        monkeypatch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)

    yield switch
    torch.set_default_dtype(torch.float32)


def steerable(shifts: bool) -> tuple[Engine, Tensor]:
    engine = planted_engine(24, contrast=0.12, max_shift_px=3.0 if shifts else 0.0, shift_std_px=0.8)
    images, _ = drawn_from(engine, IMAGES, seed=2, noise_std=1.0)
    engine.origin_px = torch.zeros(IMAGES, 2)
    make_alike(engine, IMAGES)  # weights and scales stay as they are from one bound to the next
    # looked at from fixed places: their jitter is drawn at the default precision
    offsets = 0.7 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    offsets = offsets if shifts else offsets[:1]
    engine._trial_origins = lambda index: (engine.origin_px[index] * 0.0, offsets.to(engine.origin_px))
    return engine, engine.represent(images)


def coordinate() -> tuple[Engine, Tensor]:
    torch.manual_seed(3)
    engine = CoordinateEngine(24, 2, CoordinateConfig(hidden=64, encoder_hidden=64, augment_rotation=False))
    with torch.no_grad():
        engine.generator.of_coordinates.weight.mul_(4.0)
        images = engine.decode(torch.randn(IMAGES, 2)) + torch.randn(IMAGES, 24, 24)
    return engine.eval(), engine.represent(images)


def bound_and_gradient(engine: Engine, kept: Tensor, half: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bounds (b,) in nats and the gradient of their mean, as ``training`` takes them."""
    batch = SameDraws(torch.arange(len(kept)), kept, None)
    object.__setattr__(batch, "seed", seed)
    engine.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        terms = engine.elbo(batch)
    terms.elbo.mean().backward()
    parts = [p.grad.flatten().double() for p in engine.parameters() if p.grad is not None]
    return terms.elbo.detach().double(), torch.cat(parts)


@pytest.mark.parametrize("name", ["coordinate", "steerable", "steerable with shifts"])
def test_bounds_and_gradients_of_float32_and_bfloat16_are_those_of_float64(name, double):
    """float32: to rounding. bfloat16: the gradient's error within a tenth of the noise of its draws."""
    engine, kept = coordinate() if name == "coordinate" else steerable("shifts" in name)
    single, gradient_single = bound_and_gradient(engine, kept, half=False)
    half, gradient_half = bound_and_gradient(engine, kept, half=True)
    draws = [bound_and_gradient(engine, kept, half=False, seed=seed)[1] for seed in range(1, 9)]
    double()
    exact, gradient = bound_and_gradient(engine.double(), kept.double(), half=False)
    assert exact.dtype == gradient.dtype == torch.float64
    noise = float(torch.stack([(draw - gradient_single).norm() for draw in draws]).mean()) / math.sqrt(2.0)

    def off(values: Tensor) -> float:
        return float((values - gradient).norm() / gradient.norm())

    worst, worst_half = float((single - exact).abs().max()), float((half - exact).abs().max())
    print(
        f"\n{name}: bounds of {float(exact.mean()):.0f} nats off by at most {worst:.1e} in float32 and "
        f"{worst_half:.2f} (mean {float((half - exact).mean()):+.3f}) in bfloat16; gradients off by "
        f"{off(gradient_single):.1e} and {off(gradient_half):.1e} of their length, "
        f"which differs by {noise / float(gradient.norm()):.2f} from draw to draw"
    )
    assert worst < 1e-3
    assert off(gradient_single) < 1e-5
    assert (half - exact).mean().abs() < 0.25
    assert worst_half < 1.0
    assert float((gradient_half - gradient).norm()) < 0.1 * noise
