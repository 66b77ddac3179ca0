"""Every stage keeps to the device it is given and has no wait for it, shown with fake tensors on a CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorDeviceMismatchError

from benchmarks.gpu import Traffic
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.learning import training
from cryo_svae.learning.cuda_graph import Recorded
from cryo_svae.learning.microbatches import Pieces
from cryo_svae.learning.training_store import TrainingStore
from cryo_svae.models import ENGINES
from cryo_svae.models.engine import Batch
from tests.on_device import GPU, fake_gpu

BOX, N = 16, 12


def table(n: int) -> CtfTable:
    values = {
        "pixel_size_angst": 3.0, "voltage_kv": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1,
        "defocus_u_angst": 16000.0, "defocus_v_angst": 14000.0, "defocus_angle_rad": 0.7,
        "phase_shift_rad": 0.0,
    }  # fmt: skip
    return CtfTable(**{name: torch.full((n,), value) for name, value in values.items()})


BOUNDS = {"lowest_resolution_px": 12.0, "highest_resolution_px": 2.5}


def made(name: str, *, ctf: bool, shift_px: float = 2.0, **bounds: float) -> tuple:
    """A real engine, started on real images, and its store; still on the CPU."""
    changes = {"max_shift_px": shift_px} if name == "steerable" else {"hidden": 8, "encoder_hidden": 8}
    changes |= bounds
    engine = ENGINES[name][0](BOX, 2, dataclasses.replace(ENGINES[name][1](), **changes))
    image = engine.represent(torch.randn(N, BOX, BOX))
    store = TrainingStore(image, table(N) if ctf else None, np.arange(N))
    engine.start(store.batches(torch.arange(N), 5), N)
    engine.begin_epoch(3, 4)
    return engine, store


def moved(gpu, engine, store):
    """The same, fake, on the GPU."""
    assert store.astigmatic == (store.ctf is not None)
    engine = gpu.of(engine)
    for part in ("full", "polar"):
        if hasattr(engine, part):
            setattr(engine, part, gpu.of(getattr(engine, part)))
    store.image, store.ctf = gpu.of(store.image), gpu.of(store.ctf)
    return engine, store


@pytest.fixture
def unrecorded(monkeypatch):
    """Work is done as it comes: to record it takes a GPU."""
    monkeypatch.setattr(training, "Recorded", lambda work, device, able: Recorded(work, device, False))
    # a CPU build says aloud that it has no autocast for CUDA
    monkeypatch.setattr(training, "_autocast", lambda engine, device: torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("ctf", [False, True])
@pytest.mark.parametrize("shift_px", [0.0, 2.0])
def test_training_and_the_held_out_bound(unrecorded, name, ctf, shift_px):
    engine, store = made(name, ctf=ctf, shift_px=shift_px)
    with fake_gpu() as gpu:
        engine, store = moved(gpu, engine, store)
        optimizer = training._adam(engine, None, GPU)
        optimizer.param_groups[0].update(fused=False, foreach=False)  # the fused one has no fake
        training._set_learning_rate(optimizer, 1e-3)
        steps = training._Steps(engine, store, optimizer, GPU)
        rows = gpu.tensor(5, dtype=torch.long)
        assert steps.train(rows).device == GPU
        assert all(p.grad is not None or not p.requires_grad for p in engine.parameters())
        engine.eval()
        assert steps.held_out(rows).device == GPU


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("bounds", [{}, BOUNDS])
def test_representation_and_decoding(name, bounds):
    engine, store = made(name, ctf=False, **bounds)
    with fake_gpu() as gpu:
        engine, _ = moved(gpu, engine, store)
        assert engine.represent(gpu.tensor(3, BOX, BOX)).device == GPU
        assert engine.decode(gpu.tensor(3, 2)).shape == (3, BOX, BOX)


def test_a_wait_and_a_mixed_device_are_seen():
    """What these tests rest on."""
    with fake_gpu() as gpu:
        values = gpu.tensor(4)
        with pytest.raises(FakeTensorDeviceMismatchError):
            values + torch.ones(4)
        with pytest.raises(DynamicOutputShapeException):
            values[values > 0]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(values.sum() > 0)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("ctf", [False, True])
@pytest.mark.parametrize("shift_px", [0.0, 2.0])
@pytest.mark.parametrize("bounds", [{}, BOUNDS])
def test_estimation(name, ctf, shift_px, bounds):
    engine, store = made(name, ctf=ctf, shift_px=shift_px, **bounds)
    with fake_gpu() as gpu:
        engine, store = moved(gpu, engine, store)
        batch = store.batch_of(gpu.tensor(5, dtype=torch.long))
        found = engine.eval().infer(batch)
        assert {values.device for values in vars(found).values()} == {GPU}


@pytest.mark.parametrize("shift_px", [0.0, 2.0])
@pytest.mark.parametrize("psi_range_rad", [0.0, 0.4])
def test_poses_near_known_ones(unrecorded, shift_px, psi_range_rad):
    engine, store = made("steerable", ctf=True, shift_px=shift_px, psi_range_rad=psi_range_rad)
    with fake_gpu() as gpu:
        engine, store = moved(gpu, engine, store)
        undone = geometry.undo_poses(gpu.tensor(5, BOX, BOX), gpu.tensor(5), gpu.tensor(5, 2))
        assert (undone.device, undone.shape) == (GPU, (5, BOX, BOX))
        optimizer = training._adam(engine, None, GPU)
        optimizer.param_groups[0].update(fused=False, foreach=False)
        steps = training._Steps(engine, store, optimizer, GPU)
        assert steps.train(gpu.tensor(5, dtype=torch.long)).device == GPU
        batch = store.batch_of(gpu.tensor(5, dtype=torch.long))
        assert {values.device for values in vars(engine.eval().infer(batch)).values()} == {GPU}


@pytest.mark.parametrize("held", ["on the GPU", "elsewhere"])
def test_a_batch_is_fetched_from_wherever_the_images_are(monkeypatch, held):
    """Only numbers travel where images are on the GPU; else the images too, in half precision or not."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # there is none without CUDA
    _, store = made("steerable", ctf=True)
    assert store.astigmatic
    store.image = store.image.half()
    with fake_gpu() as gpu:
        if held == "on the GPU":
            store.image, store.ctf = gpu.of(store.image), gpu.of(store.ctf)
        else:
            store.image = torch.empty(store.image.shape, dtype=torch.float16)
            store.ctf = CtfTable(**{name: torch.empty(N) for name in store.ctf.columns()})
        fetched = store.fetch(torch.empty(4, dtype=torch.long), GPU)
        assert len(fetched) == (1 if held == "on the GPU" else 2 + len(store.ctf.columns()))
        batch = store.batch_of(*fetched)
        assert {batch.index.device, batch.image.device, batch.ctf.cs_mm.device} == {GPU}
        assert batch.image.dtype == torch.float32
        assert batch.astigmatic


def test_a_recording_is_not_taken_in_pieces(monkeypatch):
    """It is broken off, and done without."""

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with fake_gpu() as gpu:
        batch = Batch(gpu.tensor(4, dtype=torch.long), gpu.tensor(4, 2, 3), None)
        with pytest.raises(torch.OutOfMemoryError):
            Pieces().of(batch, full)


def test_what_is_fetched_makes_the_batch_that_is_asked_for():
    _, store = made("steerable", ctf=True)
    row = torch.tensor([3, 0, 7])
    here = store.batch_of(row)
    brought = store.batch_of(row, store.image[row], *store.ctf[row].columns().values())
    assert torch.equal(here.image, brought.image)
    assert here.ctf.columns().keys() == brought.ctf.columns().keys()
    for name, column in here.ctf.columns().items():
        assert torch.equal(column, brought.ctf.columns()[name])


@pytest.mark.parametrize(
    ("ctf", "shift_px", "most"), [(True, 2.0, 680), (False, 2.0, 580), (False, 0.0, 525)]
)
def test_a_step_of_the_steerable_engine_is_few_operations(unrecorded, ctf, shift_px, most):
    """So many as a GPU is asked for; recorded, they are one launch. Before: 941 kernels."""
    engine, store = made("steerable", ctf=ctf, shift_px=shift_px)
    with fake_gpu() as gpu:
        engine, store = moved(gpu, engine, store)
        steps = training._Steps(engine, store, training._adam(engine, None, GPU), GPU)
        batch = store.batch_of(gpu.tensor(5, dtype=torch.long))
        with Traffic() as operations:
            training._backward(steps._bound, batch, engine=engine, n_particles=5.0)
    assert 0.8 * most < operations.n_operations <= most


@pytest.mark.parametrize("name", ["coordinate", "vanilla"])
def test_what_is_generated_in_bfloat16_can_be_multiplied_by_a_ctf(name):
    """A GPU, which trains in bfloat16, has no Fourier transform of it."""
    engine, _ = made(name, ctf=True)
    z = torch.randn(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = engine.generate(z, z[:, 0], z)
    assert output.dtype == torch.float32
