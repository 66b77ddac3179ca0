"""What the processes of test_distributed do: train two engines, and estimate with given models.

python -m torch.distributed.run … -m tests.computing.distributed_work particles.star MODELS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from cryo_svae.computing import distributed
from cryo_svae.jobs.plan import Plan, fit_checkpoint, new_checkpoint, plan_training
from cryo_svae.learning import estimation
from cryo_svae.learning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cryo_svae.particles import preprocessing
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import ParticleSet, read_particles

preprocessing.CHUNK_BYTES = 16 * 4 * 16**2  # 16 particles, so that every process has some

# Of 88 usable particles 70 are trained on: batches of 34, 34 and 2, of which some ranks hold none.
SETTINGS = {
    "epochs": 3,
    "held_out": 0.2,
    "batch_size": 34,
    "learning_rate": 2e-3,
    "z_dim": 2,
    "device": "cpu",
}
ENGINES = {
    "steerable": {},
    "coordinate": {"hidden": 16, "encoder_hidden": 16, "pose_candidates": 2, "z_delay": 1},
    "vanilla": {"hidden": 16, "encoder_hidden": 16, "z_delay": 1},
}


def plan(particles: ParticleSet, engine: str) -> Plan:
    return plan_training({**SETTINGS, "engine": engine, **ENGINES[engine]}, particles, "the test")


def finish(checkpoint: Checkpoint, particles: ParticleSet, out: Path) -> None:
    """Trains to the end; OUT/ENGINE_EPOCH.pt after every epoch."""

    def save(current: Checkpoint) -> None:
        if distributed.rank() == 0:
            save_checkpoint(out / f"{current.engine_name}_{current.epochs_done}.pt", current)

    fit_checkpoint(checkpoint, particles, plan(particles, checkpoint.engine_name), out, save)


def train(star: Path, out: Path) -> None:
    particles = read_particles(star)
    for engine in ENGINES:
        finish(new_checkpoint(plan(particles, engine)), particles, out)


def estimate(star: Path, models: Path, out: Path) -> None:
    """OUT/ENGINE.npz, all columns."""
    for engine in ENGINES:
        source = ImageSource(read_particles(star))
        model = load_checkpoint(models / f"{engine}_{SETTINGS['epochs']}.pt")
        table = estimation.estimate(model, source, torch.device("cpu"))
        if distributed.rank() == 0:
            np.savez(out / f"{engine}.npz", **vars(table))


if __name__ == "__main__":
    star_path, models_path, out_path = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    with distributed.processes():
        train(star_path, out_path)
        estimate(star_path, models_path, out_path)
    threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not [name for name in threads if "gloo" in name], "they may abort the process at its end"
