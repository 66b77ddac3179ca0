"""Two and four processes give what one gives; a lost one costs an epoch; SIGTERM stops all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from cryo_svae.cli import main
from cryo_svae.computing import distributed
from cryo_svae.learning.checkpoint import load_checkpoint
from cryo_svae.particles.particle_set import read_particles
from tests.computing import distributed_work
from tests.conftest import REPOSITORY

N = 90
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d"]
NOT_LEARNED = "encoder.attend.bias"  # a softmax does not see it: Adam moves it by the rounding alone


@pytest.fixture(autouse=True)
def _one_thread(_one_thread_and_seed):
    torch.set_num_threads(1)


@contextmanager
def processes(
    n: int, *command: object, output: Path, restarts: int = 0
) -> Iterator[subprocess.Popen[bytes]]:
    """n processes under torchrun, which are gone when the block ends."""
    # One store for all attempts would give a restarted process the addresses of the dead.
    sure = {
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    how = [f"--nproc-per-node={n}", "--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}"]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*TORCHRUN, *how, *map(str, command)],
            env={**os.environ, **sure},
            cwd=REPOSITORY,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def star(make_dataset) -> Path:
    """Blobs, two of them not usable; a CTF astigmatic for some, so that it is not for every share."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:16, :16] - 8
    blob = np.exp(-((x - 1.0) ** 2 + (y + 2.0) ** 2) / 8.0) + 0.5 * np.exp(-((x + 4) ** 2 + y**2) / 4.0)
    images = (2 * blob + rng.standard_normal((N, 16, 16))).astype(np.float32)
    images[3], images[70] = np.nan, 1.0
    defocus_v = ["12000" if k % 30 == 0 else "14900" for k in range(N)]
    ctf = {"rlnDefocusU": ["15000"] * N, "rlnDefocusV": defocus_v, "rlnDefocusAngle": ["30"] * N}
    return make_dataset(N, images=images, particles=ctf)


def assert_same_training(path: Path, expected: Path) -> None:
    """Equal within the rounding of sums in another order.

    Adam makes a step of any gradient, so that single weights whose gradient is but rounding differ.
    """
    ours, theirs = load_checkpoint(path), load_checkpoint(expected)
    assert ours.epochs_done == theirs.epochs_done == len(ours.history)
    for row, other in zip(ours.history, theirs.history, strict=True):
        for name in ("elbo", "kl_z", "kl_pose", "held_out_elbo"):
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-4), name
    expected_state = theirs.engine.state_dict()
    for name, values in ours.engine.state_dict().items():
        if name != NOT_LEARNED:
            there = expected_state[name].double()
            assert float((values - there).norm()) <= 1e-2 * float(there.norm()), name


@pytest.mark.parametrize("n", [2, 4])
def test_several_processes_train_and_estimate_as_one_does(n, star, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    distributed_work.train(star, alone)
    output, work = tmp_path / "output", "tests.computing.distributed_work"
    with processes(n, "-m", work, star, alone, together, output=output) as process:
        distributed_work.estimate(star, alone, alone)
        assert process.wait(100) == 0, output.read_text()
    for engine in distributed_work.ENGINES:
        last = f"{engine}_{distributed_work.SETTINGS['epochs']}.pt"
        assert_same_training(together / last, alone / last)
        with np.load(alone / f"{engine}.npz") as one, np.load(together / f"{engine}.npz") as several:
            assert one["usable"].sum() == N - 2
            for column in one:
                assert one[column].tobytes() == several[column].tobytes(), column
    # What several began, one goes on with: the table of origins is whole.
    resumed = load_checkpoint(together / "steerable_1.pt")
    distributed_work.finish(resumed, read_particles(star), together)
    assert_same_training(together / "steerable_3.pt", alone / "steerable_3.pt")


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, "the processes ended too early"
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def process_of_rank(rank: int, launcher: int) -> int | None:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            mine = f"\0RANK={rank}\0".encode() in (stat.parent / "environ").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if parent == launcher and mine:
            return int(stat.parent.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in Linux's /proc")
def test_a_killed_process_is_replaced_and_a_stop_reaches_all(star, tmp_path):
    sizes = ["--epochs", "30", "--batch-size", "35", "--z-dim", "2", "--held-out", "0.2"]
    options = [*sizes, "--device", "cpu"]
    whole, job = tmp_path / "whole", tmp_path / "job"
    assert main(["train", str(star), "--out", str(whole), *options]) == 0

    def n_epochs() -> int:
        table = job / "epochs.tsv"
        return len(table.read_text().splitlines()) - 1 if table.exists() else 0

    output = tmp_path / "output"
    command = ["-m", "cryo_svae", "train", star, "--out", job, "--overwrite", *options]
    with processes(2, *command, output=output, restarts=1) as process:
        wait_for(process, lambda: n_epochs() >= 3)
        os.kill(process_of_rank(1, process.pid), signal.SIGKILL)
        lost_after = n_epochs()
        wait_for(process, lambda: "resumed after epoch" in (job / "run.log").read_text())
        wait_for(process, lambda: n_epochs() >= lost_after + 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    said = output.read_text()
    assert "another process ended" in said
    assert said.count("cryo-svae: interrupted; the same command with --resume goes on") == 2
    assert "cryo_svae/cli.py" not in said  # no traceback of ours
    assert load_checkpoint(job / "model.pt").epochs_done < 30
    assert main(["train", str(star), "--out", str(job), *options, "--resume"]) == 0
    assert_same_training(job / "model.pt", whole / "model.pt")


@pytest.mark.parametrize(
    ("n", "unit", "world"), [(0, 1, 3), (2, 1, 3), (90, 16, 4), (17, 5, 2), (3, 1024, 2)]
)
def test_blocks_follow_one_another_and_hold_all(n, unit, world, monkeypatch):
    held = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "_place", distributed._Place(rank=rank, world=world))
        block = distributed.block(n, unit)
        assert block.start % unit == 0 or block.start == n
        held += list(range(n))[block]
    assert held == list(range(n))
