"""What goes wrong around a job: killed, crowded out, its files taken away, numbers or memory run out."""

from __future__ import annotations

import io
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.kills import PROCESSES, trials
from cryo_svae.cli import main
from cryo_svae.errors import InputError, OutputError, TrainingError
from cryo_svae.formats.atomic import is_leftover
from cryo_svae.formats.mrc import read_images, write_stack
from cryo_svae.formats.star import read_star
from cryo_svae.jobs import stages
from cryo_svae.jobs.folder import LOCK, open_job
from cryo_svae.learning import training, training_store
from cryo_svae.learning.checkpoint import load_checkpoint
from cryo_svae.learning.estimation import estimate
from cryo_svae.models.coordinate import CoordinateEngine
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from tests.conftest import optics_columns
from tests.learning.test_training import CPU, fresh, ignore, schedule, weights
from tests.test_cli import QUICK, run


def same_results(a: Path, b: Path) -> bool:
    names = ("particles.star", "latents.h5", "decoded.mrcs")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def leftovers(job: Path) -> list[Path]:
    return [path for path in job.rglob("*") if is_leftover(path)] if job.is_dir() else []


def said_once(said: str) -> bool:
    return said.count("cryo-svae: ") == 1 and "To mend" in said and "Traceback" not in said


# --- killed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["coordinate", "steerable"])
def test_a_job_killed_at_random_moments_resumes_to_the_same_file_to_the_letter(
    make_dataset, tmp_path, engine
):
    settings = QUICK if engine == "coordinate" else ["--epochs", "3"]
    arguments = ["run", str(make_dataset(60)), *settings, "--device", "cpu"]
    seen = trials(arguments, tmp_path, n_kills=3, seed=os.getpid())
    assert seen.total() == 3
    assert {differing for _, differing in seen} == {"none"}, seen


def test_estimation_killed_at_random_moments_resumes_to_the_same_file(make_dataset, tmp_path):
    star = make_dataset(60)
    assert main(["train", str(star), "--out", str(tmp_path / "model"), *QUICK]) == 0
    arguments = ["estimate", str(star), "--model", str(tmp_path / "model" / "model.pt"), "--device", "cpu"]
    seen = trials(arguments, tmp_path, n_kills=3, seed=os.getpid())
    assert {differing for _, differing in seen} == {"none"}, seen


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    job = tmp_path / "job"
    (job / "Class2D").mkdir(parents=True)
    left = [job / ".particles.0123abcd.part.star", job / "Class2D" / ".run_it025_data.89abcdef.part.star"]
    mine = [job / ".hidden", job / ".notes.0123.part.txt"]
    for path in (*left, *mine):
        path.write_text("x")
    with open_job(job, overwrite=False, resume=True):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in mine)


# --- two jobs on one folder ------------------------------------------------------------------------


def _hold(folder: str, held, release) -> None:
    with open_job(Path(folder), overwrite=False, resume=True):
        held.set()
        release.wait(60)


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[int]:
    """Another process uses the folder; its number."""
    held, release = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=_hold, args=(str(folder), held, release))
    process.start()
    assert held.wait(60)
    try:
        yield process.pid
    finally:
        release.set()
        process.join()


def test_a_second_job_on_a_folder_is_told_who_uses_it(make_dataset, tmp_path, capsys):
    star, job = make_dataset(), tmp_path / "job"
    assert run(star, job) == 0
    before = (job / "particles.star").read_bytes()
    with held_elsewhere(job) as number:
        assert run(star, job, "--overwrite") == 2
        said = capsys.readouterr().err
        assert f"process {number} on {platform.node()}" in said
        assert said_once(said)
    assert (job / "particles.star").read_bytes() == before
    assert run(star, job, "--overwrite") == 0


def test_the_lock_of_a_process_that_was_killed_holds_no_one_up(tmp_path):
    held, release = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=_hold, args=(str(tmp_path), held, release))
    process.start()
    assert held.wait(60)
    process.kill()
    process.join()
    assert f"process {process.pid} on" in (tmp_path / LOCK).read_text()
    with open_job(tmp_path, overwrite=False, resume=True):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("cryo_svae.jobs.folder.fcntl.flock", refuse)
    with open_job(tmp_path, overwrite=False, resume=False):
        assert "no locks (Function not implemented)" in caplog.text


# --- disks -----------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if done.returncode:
        pytest.skip("no right to mount a small tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_whenever_the_disk_gets_full_there_is_one_message_and_room_lets_the_job_end(
    make_dataset, tmp_path, capsys
):
    star = make_dataset(30)
    assert run(star, tmp_path / "whole") == 0
    stopped_at = set()
    with small_disk(tmp_path / "disk", "4k") as disk:
        for kilobytes in (4, 8, 16, 20, 24, 32, 40, 56, 64, 96, 128, 256, 384, 512, 640):
            capsys.readouterr()
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
            code = run(star, disk / "job", "--resume")
            said = capsys.readouterr().err
            if code == 0:
                break
            assert code == 2
            assert said_once(said)
            assert "No space left" in said, said
            assert not leftovers(disk / "job")
            stopped_at.add(said.split(": ")[1].rsplit("/", 1)[-1])
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert run(star, disk / "job", "--resume") == 0
        assert same_results(disk / "job", tmp_path / "whole")
    assert len(stopped_at) >= 4, stopped_at


def test_prepared_particles_that_find_no_room_are_told_of_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(training_store, "IN_MEMORY_BYTES", 0)
    assert training_store._allocate((10, 16, 16), tmp_path, training_store.CPU).shape == (10, 16, 16)
    with (
        small_disk(tmp_path / "disk", "64k") as disk,
        pytest.raises(OutputError, match=r"no room for 0\.0 GB of prepared particles"),
    ):
        training_store._allocate((200, 16, 16), disk, training_store.CPU)


def test_a_read_only_folder_is_one_message(make_dataset, tmp_path, capsys):
    star = make_dataset()
    with small_disk(tmp_path / "disk", "4m") as disk:
        assert run(star, disk / "job") == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for out, *more in ((disk / "other",), (disk / "job", "--resume"), (disk / "job", "--overwrite")):
            capsys.readouterr()
            assert run(star, out, *more) == 2
            said = capsys.readouterr().err
            assert "Read-only file system" in said
            assert said_once(said)


# --- memory ----------------------------------------------------------------------------------------


def run_with_memory(megabytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process that may have so much memory of its own."""
    limit = megabytes * 10**6
    return subprocess.run(
        [sys.executable, "-m", "cryo_svae", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_set_larger_than_memory_is_trained_on_estimated_and_averaged(make_dataset, tmp_path):
    """Half of the memory is the libraries', so images must pass through a few at a time."""
    n, box = 800, 512
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:box, :box] - box // 2
    blob = np.exp(-((x / 60.0) ** 2) - (y / 90.0) ** 2)
    noise = rng.standard_normal((8, box, box))
    eight = (blob + noise).astype(np.float32)
    star = make_dataset(n, optics=optics_columns(rlnImageSize=[str(box)]), images=eight)
    write_stack(tmp_path / "stack.mrcs", (eight for _ in range(n // 8)), pixel_size_angst=2.5)
    assert (tmp_path / "stack.mrcs").stat().st_size > 800e6
    done = run_with_memory(700, "run", star, "--out", tmp_path / "job", "--box", 32, *QUICK)
    assert done.returncode == 0, done.stderr
    assert read_star(tmp_path / "job" / "particles.star").block("particles").n_rows == n


def test_too_little_memory_is_one_message(make_dataset, tmp_path):
    done = run_with_memory(
        400, "train", make_dataset(), "--out", tmp_path / "job", *QUICK, "--encoder-hidden", 9000
    )
    assert done.returncode == 2, done.stderr
    assert said_once(done.stderr)
    assert "memory does not suffice" in done.stderr


def test_a_gpu_too_full_to_prepare_images_is_one_message(make_dataset, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("cryo_svae.particles.preprocessing.prepare", full)
    assert run(make_dataset(), tmp_path / "job") == 2
    said = capsys.readouterr().err
    assert said_once(said)
    assert "memory does not suffice (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said


# --- stacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["gone", "cut", "fewer", "another box", "another file"])
def test_a_stack_that_changes_during_a_job_is_one_message_and_can_be_put_back(
    make_dataset, tmp_path, monkeypatch, capsys, fault
):
    star = make_dataset(20)
    assert run(star, tmp_path / "whole") == 0
    stack, kept = tmp_path / "stack.mrcs", tmp_path / "kept"
    shutil.copy(stack, kept)

    def break_stack() -> None:
        if fault == "gone":
            stack.unlink()
        elif fault == "cut":
            os.truncate(stack, 5000)
        elif fault == "fewer":
            write_stack(stack, np.zeros((3, 16, 16), np.float32), pixel_size_angst=2.5)
        elif fault == "another box":
            write_stack(stack, np.zeros((20, 18, 18), np.float32), pixel_size_angst=2.5)
        else:
            stack.write_bytes(b"\x89PNG\r\n" * 5000)

    save = stages.save_checkpoint

    def save_then_break(path, checkpoint):
        save(path, checkpoint)
        if checkpoint.epochs_done == 2:
            break_stack()

    monkeypatch.setattr(stages, "save_checkpoint", save_then_break)
    assert run(star, tmp_path / "job") == 2
    said = capsys.readouterr().err
    assert said_once(said)
    assert "stack.mrcs" in said
    assert not (tmp_path / "job" / "particles.star").exists()
    monkeypatch.undo()
    shutil.copy(kept, stack)
    assert run(star, tmp_path / "job", "--resume") == 0
    assert same_results(tmp_path / "job", tmp_path / "whole")


class _ShortReads(io.FileIO):
    """A file that gives a few bytes at a time, as a network file system may."""

    def readinto(self, buffer) -> int:
        return super().readinto(memoryview(buffer).cast("B")[:997])

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(997), b""))

    def read(self, size: int = -1) -> bytes:
        return self.readall() if size < 0 else super().read(min(size, 997))


@pytest.mark.parametrize("name", ["stack.mrcs", "stack.mrcs.gz"])
def test_short_reads_are_read_on(make_dataset, tmp_path, monkeypatch, name):
    star = make_dataset(7)
    if name.endswith("gz"):
        subprocess.run(["gzip", str(tmp_path / "stack.mrcs")], check=True)
    images, data = read_images(tmp_path / name, np.arange(7)), star.read_bytes()
    n_short, whole = 0, io.open

    def opened(path, mode="r", buffering=-1, *more, **named):
        nonlocal n_short
        if mode != "rb":
            return whole(path, mode, buffering, *more, **named)
        n_short += 1
        raw = _ShortReads(path)
        return raw if buffering == 0 else io.BufferedReader(raw)

    monkeypatch.setattr(io, "open", opened)
    np.testing.assert_array_equal(read_images(tmp_path / name, np.arange(7)[::-1]), images[::-1])
    assert read_star(star)._text.data == data
    assert n_short >= 2


# --- memory and numbers ----------------------------------------------------------------------------


class _SmallMemory(CoordinateEngine):
    """Holds so many particles at a time and no more, like a GPU."""

    holds = 2

    def _fill(self, batch) -> None:
        if len(batch) > self.holds:
            for values in self.parameters():  # what a half-done step leaves behind
                values.grad = torch.full_like(values, 7.0)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    def elbo(self, batch):
        self._fill(batch)
        return super().elbo(batch)

    def infer(self, batch):
        self._fill(batch)
        return super().infer(batch)


def small_memory(holds: int) -> tuple:
    checkpoint, particles = fresh()
    checkpoint.engine.__class__ = type("Small", (_SmallMemory,), {"holds": holds})
    return checkpoint, particles


def test_batches_that_do_not_fit_the_gpu_are_taken_in_pieces_and_it_is_said(caplog):
    checkpoint, particles = small_memory(holds=2)
    with caplog.at_level(logging.WARNING):
        training.fit(checkpoint, particles, schedule(held_out=0.3), CPU, ignore)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the GPU's memory does not hold 5 particles at a time: going on with 3",
        "the GPU's memory does not hold 3 particles at a time: going on with 2",
    ]
    assert checkpoint.epochs_done == 4
    assert all(np.isfinite(row["elbo"]) for row in checkpoint.history)


def test_a_step_in_pieces_is_the_step_of_the_whole_batch(monkeypatch):
    """With the random draws taken away, pieces of unequal size sum to the batch's gradients."""
    (whole, particles), (pieces, _) = fresh(), small_memory(holds=3)
    for name in ("randn", "rand"):
        monkeypatch.setattr(torch, name, lambda *size, generator=None, **named: torch.zeros(*size, **named))
        monkeypatch.setattr(torch, f"{name}_like", torch.zeros_like)
    for checkpoint in (whole, pieces):
        training.fit(checkpoint, particles, schedule(epochs=1, held_out=0.0), CPU, ignore)
    torch.testing.assert_close(weights(pieces), weights(whole), rtol=1e-5, atol=1e-6)
    assert pieces.history[0]["elbo"] == pytest.approx(whole.history[0]["elbo"], rel=1e-5)


def test_a_gpu_that_does_not_hold_one_particle_ends_training():
    checkpoint, particles = small_memory(holds=0)
    with pytest.raises(TrainingError, match="does not hold one particle"):
        training.fit(checkpoint, particles, schedule(), CPU, ignore)


def test_estimation_in_pieces_gives_the_same_table(make_dataset, caplog, tmp_path):
    star = make_dataset(9)
    assert run(star, tmp_path / "job") == 0
    source = ImageSource(read_particles(star))
    checkpoint = load_checkpoint(tmp_path / "job" / "model.pt")
    whole = estimate(checkpoint, source, CPU)
    checkpoint.engine.__class__ = _SmallMemory
    pieces = estimate(checkpoint, source, CPU)
    assert "going on with 2" in caplog.text
    np.testing.assert_allclose(pieces.z, whole.z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pieces.psi_deg, whole.psi_deg, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_that_is_full_is_told_of(make_dataset, tmp_path, capsys):
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        assert main(["train", str(make_dataset()), "--out", str(tmp_path / "job"), "--device", "cuda"]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said_once(capsys.readouterr().err)


def test_a_loss_that_is_not_a_number_stops_the_job_and_names_the_last_good_model(
    make_dataset, tmp_path, monkeypatch, capsys
):
    star, job = make_dataset(20), tmp_path / "job"
    begin = CoordinateEngine.begin_epoch

    def spoil(self, epoch, n_epochs):
        begin(self, epoch, n_epochs)
        if epoch == 1:
            with torch.no_grad():
                next(self.parameters()).fill_(torch.nan)

    monkeypatch.setattr(CoordinateEngine, "begin_epoch", spoil)
    assert run(star, job) == 2
    said = capsys.readouterr().err
    assert said_once(said)
    assert "epoch 2: the bound is not a number" in said
    assert f"The last good model, after epoch 1, is {job / 'model.pt'}" in said
    kept = load_checkpoint(job / "model.pt")
    assert kept.epochs_done == 1
    assert all(values.isfinite().all() for values in kept.engine.parameters())
    assert (
        main(["estimate", str(star), "--model", str(job / "model.pt"), "--out", str(tmp_path / "e")]) == 0
    )


def test_weights_spoilt_by_the_last_step_are_not_kept(monkeypatch):
    """The bounds of an epoch are those before its steps; the weights after the last may be worse."""
    checkpoint, particles = fresh()
    saved = []
    step = torch.optim.Adam.step

    def spoil(self, *arguments):
        step(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(torch.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    one_step = schedule(batch_size=17, held_out=0.0)
    with pytest.raises(TrainingError, match="epoch 1: the bound is not a number"):
        training.fit(checkpoint, particles, one_step, CPU, lambda c: saved.append(c.epochs_done))
    assert saved == [0]


def test_a_stack_of_another_box_is_refused_when_read(make_dataset, tmp_path):
    source = ImageSource(read_particles(make_dataset(4)))
    write_stack(tmp_path / "stack.mrcs", np.zeros((4, 2, 2), np.float32), pixel_size_angst=2.5)
    with pytest.raises(InputError, match="16 px a side, as when the job began"):
        source.read(np.arange(4))
