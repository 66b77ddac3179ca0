"""Training: repeatable, resumable to the same weights, stopped on request, and never silent about NaN."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cryo_svae.errors import InputError, TrainingError
from cryo_svae.learning import cuda_graph
from cryo_svae.learning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cryo_svae.learning.cuda_graph import Recorded
from cryo_svae.learning.training import Schedule, fit, learning_rate, split_held_out, trains_in_bfloat16
from cryo_svae.learning.training_store import TrainingStore
from cryo_svae.models import ENGINES
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.engine import FEWEST_STEPS
from cryo_svae.particles.preprocessing import Preparation

BOX = 12
CPU = torch.device("cpu")


def schedule(**changes) -> Schedule:
    values = {
        "epochs": 4,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "one_cycle": False,
        "held_out": 0.2,
        "patience": None,
        "seed": 11,
    }
    return Schedule(**{**values, **changes})


def fresh(seed: int = 0) -> tuple[Checkpoint, TrainingStore]:
    torch.manual_seed(seed)
    engine = CoordinateEngine(BOX, 2, CoordinateConfig(hidden=8, encoder_hidden=8, mask_radius_px=5.0))
    preparation = Preparation(box_px=BOX, pixel_size_angst=3.0, mask_diameter_angst=30.0, invert=False)
    images = torch.randn(17, BOX, BOX, generator=torch.Generator().manual_seed(1))
    store = TrainingStore(engine.represent(images), None, np.arange(17))
    return Checkpoint("coordinate", engine, preparation, False, None, 0, []), store


def weights(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in checkpoint.engine.parameters()])


def ignore(_: Checkpoint) -> None:
    pass


def test_a_gpu_gets_larger_batches_where_steps_and_memory_allow():
    defaults = ENGINES["steerable"][0].training_defaults
    memory = 80 * 2**30
    sizes = [defaults.batch_on_gpu(n, 128, memory) for n in (250_000, 1_000_000, 10_000_000, 10**9)]
    assert sizes == [128, 512, 2048, 2048]
    assert all(n // b >= FEWEST_STEPS for n, b in zip((1_000_000, 10_000_000), sizes[1:], strict=False))
    assert (
        defaults.batch_on_gpu(10**9, 256, 8 * 2**30) < defaults.batch_on_gpu(10**9, 128, 8 * 2**30) < 2048
    )
    assert ENGINES["coordinate"][0].training_defaults.batch_on_gpu(10**9, 40, memory) == 100


def test_the_learning_rate_grows_with_the_square_root_of_the_batch():
    defaults = ENGINES["steerable"][0].training_defaults
    assert defaults.learning_rate_for(512) == pytest.approx(2.0 * defaults.learning_rate_for(128))
    assert defaults.learning_rate_for(8) == defaults.learning_rate


@pytest.mark.parametrize("one_cycle", [False, True])
def test_equal_seeds_give_equal_weights_and_other_seeds_other_ones(one_cycle):
    runs = []
    for seed in (11, 11, 12):
        checkpoint, store = fresh()
        fit(checkpoint, store, schedule(seed=seed, one_cycle=one_cycle), CPU, ignore)
        runs.append(weights(checkpoint))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path, stop_after):
    whole, store = fresh()
    fit(whole, store, schedule(one_cycle=True), CPU, ignore)

    def interrupt(current: Checkpoint) -> None:
        save_checkpoint(tmp_path / "model.pt", current)
        if current.epochs_done == stop_after:
            raise KeyboardInterrupt

    checkpoint, store = fresh()
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint, store, schedule(one_cycle=True), CPU, interrupt)
    torch.randn(100)  # whatever happened in between
    resumed = load_checkpoint(tmp_path / "model.pt")
    assert resumed.epochs_done == stop_after
    fit(resumed, store, schedule(one_cycle=True), CPU, ignore)
    assert torch.equal(weights(resumed), weights(whole))
    bounds = [[row["held_out_elbo"] for row in c.history] for c in (resumed, whole)]
    assert bounds[0] == bounds[1]


def test_training_raises_the_bound():
    checkpoint, store = fresh()
    fit(checkpoint, store, schedule(epochs=40, held_out=0.0), CPU, ignore)
    assert checkpoint.history[-1]["elbo"] > checkpoint.history[3]["elbo"]
    assert math.isnan(checkpoint.history[-1]["held_out_elbo"])


def test_patience_stops_when_the_held_out_bound_no_longer_rises():
    checkpoint, store = fresh()
    fit(checkpoint, store, schedule(epochs=300, patience=3, learning_rate=0.02), CPU, ignore)
    assert 3 < checkpoint.epochs_done < 300
    bounds = [row["held_out_elbo"] for row in checkpoint.history]
    assert max(bounds[-3:]) <= max(bounds[:-3])


def test_a_bound_that_is_not_a_number_stops_training_and_keeps_the_last_checkpoint():
    checkpoint, store = fresh()
    saved = []
    with pytest.raises(TrainingError, match="not a number"):
        fit(
            checkpoint,
            store,
            schedule(learning_rate=1e18),
            CPU,
            lambda current: saved.append(current.epochs_done),
        )
    assert saved == [0]


def test_the_one_cycle_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [learning_rate(step, 100, schedule(one_cycle=True)) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3 / 25)
    assert max(rates) == rates[30] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(0.0)
    assert learning_rate(77, 100, schedule()) == 1e-3


@pytest.mark.parametrize(("n", "share", "held"), [(10, 0.2, 2), (10, 0.0, 0), (1, 0.9, 0), (3, 0.99, 2)])
def test_the_split_keeps_every_particle_once(n, share, held):
    train, out = split_held_out(n, share, 0)
    assert len(out) == held
    assert sorted([*train.tolist(), *out.tolist()]) == list(range(n))


def test_checkpoints_come_back_whole(tmp_path):
    checkpoint, store = fresh()
    fit(checkpoint, store, schedule(), CPU, ignore)
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    back = load_checkpoint(tmp_path / "model.pt")
    assert torch.equal(weights(back), weights(checkpoint))
    assert back.preparation == checkpoint.preparation
    assert back.engine.config == checkpoint.engine.config
    assert back.history == checkpoint.history


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "gone.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="checkpoint"):
        load_checkpoint(tmp_path / "text.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other content"):
        load_checkpoint(tmp_path / "other.pt")
    whole = tmp_path / "model.pt"
    save_checkpoint(whole, fresh()[0])
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(InputError, match="checkpoint"):
        load_checkpoint(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("name", "hidden", "gains"),
    [
        ("coordinate", 64, True),
        ("coordinate", 16, False),
        ("vanilla", 64, False),
        ("steerable", None, False),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_it_can_and_the_engine_gains_by_it(monkeypatch, name, hidden, gains):
    engine_class, config_class = ENGINES[name]
    engine = engine_class(BOX, 2, config_class() if hidden is None else config_class(hidden=hidden))
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert trains_in_bfloat16(engine, CPU) is (gains and able)


def test_a_training_begun_on_a_gpu_goes_on_without_one(tmp_path):
    """There Adam's learning rate is a tensor, and its steps may be recorded."""
    plain, store = fresh()
    fit(plain, store, schedule(epochs=2), CPU, ignore)
    for group in plain.optimizer["param_groups"]:
        group.update(lr=torch.tensor(1e-3), capturable=True)
    save_checkpoint(tmp_path / "model.pt", plain)
    resumed = load_checkpoint(tmp_path / "model.pt")
    fit(resumed, store, schedule(), CPU, ignore)
    whole, store = fresh()
    fit(whole, store, schedule(), CPU, ignore)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.optimizer["param_groups"][0]["capturable"] is False


class _Recorder(Recorded):
    """Records without a GPU: a recording is a call of the work."""

    def __init__(self, work, fails: Exception | None = None) -> None:
        super().__init__(work, CPU, True)
        self._stream, self.fails, self.n_recorded = object(), fails, 0
        self._apart = lambda _, inputs: work(*inputs)

    def _record(self, inputs):
        if self.fails is not None:
            raise self.fails
        self.n_recorded += 1
        own, result = tuple(each.clone() for each in inputs), torch.zeros(())
        replay = lambda: result.copy_(self._work(*own))  # noqa: E731
        return cuda_graph._Recording(SimpleNamespace(replay=replay), own, result)


def test_work_is_recorded_once_for_each_shape_and_kind_and_gives_the_same(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    recorder = _Recorder(lambda x: x.sum())
    for kind, n_recorded in (("a", 2), ("b", 4)):
        for size in (3, 5, 3, 5, 3, 5, 3, 5):
            x = torch.randn(size)
            assert recorder(kind, x) == x.sum()
        assert recorder.n_recorded == n_recorded


def test_work_goes_on_unrecorded_where_memory_does_not_suffice(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    recorder = _Recorder(lambda x: x.sum(), torch.OutOfMemoryError("CUDA out of memory"))
    assert [float(recorder("a", torch.ones(3))) for _ in range(5)] == [3.0] * 5
    assert caplog.text.count("going on without") == 1
    other = _Recorder(lambda x: x.sum(), RuntimeError("another"))
    assert [float(other("a", torch.ones(3))) for _ in range(2)] == [3.0] * 2
    with pytest.raises(RuntimeError, match="another"):
        other("a", torch.ones(3))
