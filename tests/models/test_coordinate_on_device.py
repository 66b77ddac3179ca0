"""The coordinate and vanilla engines keep to a GPU and never wait for it, shown with fake tensors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from cryo_svae.computing import distributed
from cryo_svae.models import ENGINES, coordinate_generator
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.engine import Batch
from tests.imaging.test_ctf import table
from tests.on_device import GPU, fake_gpu

BOX, N = 8, 4
SMALL = CoordinateConfig(hidden=6, encoder_hidden=5)
PIXELS = ("gaussian-unit", "gaussian", "gaussian-per-pixel", "bernoulli")


def made(name: str, **changes: object) -> CoordinateEngine:
    engine = ENGINES[name][0](BOX, 2, dataclasses.replace(SMALL, **changes))
    assert isinstance(engine, CoordinateEngine)
    return engine


def batch(ctf: bool, channels: int = 1) -> Batch:
    return Batch(torch.arange(N), torch.rand(N, channels, BOX, BOX), table(N) if ctf else None)


@pytest.fixture(params=["coordinate", "vanilla"])
def name(request) -> str:
    return request.param


def check_a_step(engine: CoordinateEngine, data: Batch) -> None:
    """Bound and gradients, on the GPU, with z held and free."""
    with fake_gpu() as gpu:
        engine, data = gpu.of(engine), gpu.of(data)
        for epoch in (0, engine.config.z_delay):
            engine.begin_epoch(epoch, 10)
            terms = engine.elbo(data)
            assert terms.elbo.device == GPU
            terms.elbo.sum().backward()
        assert all(p.grad.device == GPU for p in engine.parameters() if p.requires_grad)


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("ctf", [False, True])
def test_a_step_with_every_kind_of_pixel(name, pixels, ctf):
    check_a_step(made(name, pixels=pixels, softplus=pixels == "gaussian"), batch(ctf))


@pytest.mark.parametrize("pose_candidates", [1, 8])
@pytest.mark.parametrize("augment_rotation", [False, True])
@pytest.mark.parametrize("ctf", [False, True])
def test_a_step_with_turned_input(pose_candidates, augment_rotation, ctf):
    changes = {"pose_candidates": pose_candidates, "augment_rotation": augment_rotation}
    check_a_step(made("coordinate", **changes), batch(ctf))


@pytest.mark.parametrize("changes", [
    {"channels": 3}, {"mask_radius_px": 3.0}, {"rotate": False}, {"translate": False}, {"layers": 3},
    {"rotation_prior": "normal"}, {"activation": "relu"},
    {"lowest_resolution_px": 7.0, "highest_resolution_px": 3.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("ctf", [False, True])
def test_a_step_with_other_options(name, changes, ctf):
    check_a_step(made(name, **changes), batch(ctf, changes.get("channels", 1)))


@pytest.mark.parametrize("pixels", PIXELS)
def test_a_start_waits_once_however_many_batches(name, pixels, monkeypatch):
    engine, data = made(name, pixels=pixels), batch(ctf=False)
    totals = []

    def waited_for(sums: torch.Tensor) -> tuple[torch.Tensor]:
        assert sums.device == GPU
        totals.append(sums)
        return (SimpleNamespace(tolist=lambda: [4.0, 2.0, 2.0, 0.0]),)

    monkeypatch.setattr(distributed, "totals", waited_for)
    with fake_gpu() as gpu:
        engine, data = gpu.of(engine), gpu.of(data)
        engine.start(iter([data, data]), 2 * N)
    assert len(totals) == 1


def launched(layout: object, kernel: object, *tensors: torch.Tensor, **constants: object) -> None:
    """In place of a launch: everything is on the GPU, in one piece."""
    assert all(each.device == GPU and each.is_contiguous() for each in tensors)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_step_by_kernels(monkeypatch, layers):
    coordinate_gpu = pytest.importorskip("cryo_svae.models.coordinate_gpu")
    monkeypatch.setattr(coordinate_generator, "gpu_kernels", lambda device: coordinate_gpu)
    monkeypatch.setattr(coordinate_gpu.Layout, "launch", launched)
    check_a_step(made("coordinate", layers=layers, pose_candidates=2), batch(ctf=True))


@pytest.mark.parametrize("ctf", [False, True])
@pytest.mark.parametrize("pose_candidates", [1, 8])
def test_inference_and_decoding(name, ctf, pose_candidates):
    engine = made(name, pose_candidates=pose_candidates, mask_radius_px=3.0).eval()
    data = batch(ctf)
    with fake_gpu() as gpu, torch.no_grad():
        engine, data = gpu.of(engine), gpu.of(data)
        posterior = engine.infer(data)
        assert all(getattr(posterior, f.name).device == GPU for f in dataclasses.fields(posterior))
        assert engine.decode(posterior.z_mean).device == GPU
        assert engine.represent(gpu.tensor(N, BOX, BOX)).device == GPU
