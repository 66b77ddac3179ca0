"""Trains an engine on simulated images in memory and scores it, on the clock of training alone."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measures import angle_error_deg, circular_correlation, r_z, shift_rms_px
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.training import Schedule, fit, seed_everything
from cryo_svae.learning.training_store import TrainingStore
from cryo_svae.models import ENGINES
from cryo_svae.models.engine import Engine, Posterior
from cryo_svae.particles import outliers
from cryo_svae.particles.extent import SAMPLED, diameter_angst
from cryo_svae.particles.preprocessing import Preparation, prepare
from cryo_svae.simulate import Simulated

RESULTS = Path("results")


@dataclass
class Trial:
    """A finished training: posterior of the judged images, seconds of training, rows of scores by epoch."""

    posterior: Posterior
    checkpoint: Checkpoint
    seconds: float
    images_per_second: float
    infer_images_per_second: float
    progress: list[tuple[float, dict[str, float]]] = field(default_factory=list)


def untrained(
    engine_name: str, z_dim: int, preparation: Preparation, use_ctf: bool, seed: int, **config: object
) -> Checkpoint:
    """A new engine, its options its own where not given."""
    engine_class, config_class = ENGINES[engine_name]
    seed_everything(seed, -1)
    engine = engine_class(preparation.box_px, z_dim, dataclasses.replace(config_class(), **config))
    return Checkpoint(engine_name, engine, preparation, use_ctf, None, 0, [])


def schedule_of(
    checkpoint: Checkpoint,
    epochs: int,
    seed: int,
    *,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    held_out: float = 0.0,
) -> Schedule:
    """So many epochs, the rest the engine's own where not given."""
    defaults = checkpoint.engine.training_defaults
    return Schedule(
        epochs=epochs,
        batch_size=batch_size or defaults.batch_size,
        learning_rate=learning_rate or defaults.learning_rate,
        one_cycle=defaults.schedule == "one-cycle",
        held_out=held_out,
        patience=None,
        seed=seed,
    )


def store_of(engine: Engine, parts: Iterable[Tensor], ctf: CtfTable | None = None) -> TrainingStore:
    """Prepared images, in parts (k, ..., N, N), represented for an engine."""
    kept = torch.cat([engine.represent(part) for part in parts])
    return TrainingStore(kept, ctf, np.arange(len(kept)))


def infer(checkpoint: Checkpoint, store: TrainingStore, index: Tensor) -> Posterior:
    """Posterior of rows ``index``, on the engine's device."""
    engine = checkpoint.engine.eval()
    device = next(engine.parameters()).device
    with torch.no_grad():
        found = [engine.infer(batch).to("cpu") for batch in store.batches(index, 256, device)]
    return Posterior.cat(found)


def scores(posterior: Posterior, simulated: Simulated, index: torch.Tensor) -> dict[str, float]:
    """r_z of each conformation, rotation, angle error and shift error of rows ``index``."""
    z, psi, origin = (
        t.double().numpy() for t in (posterior.z_mean, posterior.psi_rad, posterior.origin_px)
    )
    truth = simulated.conformation[index].double().numpy()
    true_psi = simulated.psi_rad[index].double().numpy()
    row = {f"r_z{k + 1}": r_z(z, truth[:, k]) for k in range(truth.shape[1])}
    return row | {
        "rotation": circular_correlation(psi, true_psi),
        "angle_deg": angle_error_deg(psi, true_psi),
        "shift_px": shift_rms_px(origin, simulated.origin_px[index].double().numpy(), psi),
    }


def run_trial(
    simulated: Simulated,
    engine_name: str,
    z_dim: int,
    seed: int,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    time_limit_s: float = float("inf"),
    watch: int = 0,
    judged: int | None = None,
    **config_changes: object,
) -> Trial:
    """Trains on all images; estimates the first ``judged`` of them.

    ``watch`` images are scored after each epoch, off the clock.
    """
    box_px = simulated.images.shape[-1]
    preparation = Preparation(
        box_px=box_px,
        pixel_size_angst=simulated.pixel_size_angst,
        mask_diameter_angst=(box_px - 2) * simulated.pixel_size_angst,
        invert=False,
    )
    sample = prepare(simulated.images[:SAMPLED], simulated.pixel_size_angst, preparation)[0]
    diameter = diameter_angst([(sample, simulated.ctf)], preparation)
    if diameter is not None:
        preparation = dataclasses.replace(preparation, mask_diameter_angst=diameter)
    config_changes["mask_radius_px"] = preparation.mask_radius_px
    use_ctf = simulated.ctf is not None
    checkpoint = untrained(engine_name, z_dim, preparation, use_ctf, seed, **config_changes)
    measured = []

    def parts() -> Iterator[Tensor]:
        for part in simulated.images.split(1024):
            prepared = prepare(part, simulated.pixel_size_angst, preparation)[0]
            measured.append(outliers.measures(prepared, preparation.mask_radius_px))
            yield prepared

    store = store_of(checkpoint.engine, parts(), simulated.ctf)
    store.outlier = outliers.found(torch.cat(measured))
    trial = Trial(None, checkpoint, 0.0, 0.0, 0.0)  # type: ignore[arg-type]
    watched = torch.arange(min(watch, len(store)))

    def on_epoch(current: Checkpoint) -> None:
        trial.seconds = sum(row["seconds"] for row in current.history)
        if len(watched) and current.history:
            trial.progress.append(
                (trial.seconds, scores(infer(current, store, watched), simulated, watched))
            )
        if trial.seconds > time_limit_s:
            raise TimeoutError

    if epochs is None:
        epochs = checkpoint.engine.training_defaults.epochs_for(len(store))
    schedule = schedule_of(checkpoint, epochs, seed, batch_size=batch_size, learning_rate=learning_rate)
    with contextlib.suppress(TimeoutError):
        fit(checkpoint, store, schedule, torch.device("cpu"), on_epoch)
    trial.images_per_second = len(store) * checkpoint.epochs_done / max(trial.seconds, 1e-9)
    began = time.perf_counter()
    index = torch.arange(len(store))[:judged]
    trial.posterior = infer(checkpoint, store, index)
    trial.infer_images_per_second = len(index) / (time.perf_counter() - began)
    return trial


def seconds_to(trial: Trial, targets: dict[str, float]) -> float:
    """Seconds of training until every watched score has reached its target; infinite if never."""
    for seconds, row in trial.progress:
        if all(row[name] >= value for name, value in targets.items()):
            return seconds
    return float("inf")


def median(values: list[float]) -> float:
    """The median of the seeds."""
    return statistics.median(values)


def where() -> str:
    """Commit, processor and threads that a figure belongs to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"commit {commit}, {len(names)} cores of {names[0]}, {torch.get_num_threads()} threads"


def report(name: str, lines: list[str]) -> None:
    """Prints a table and writes it to results/NAME.txt."""
    print("\n".join([*lines, where()]), flush=True)
    write(name, lines)


def write(name: str, lines: list[str]) -> None:
    """Writes a table to results/NAME.txt."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.txt").write_text("\n".join([*lines, where()]) + "\n")
