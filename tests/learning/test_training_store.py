"""Prepared images on disk are those in memory to half precision, and leave no file behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cryo_svae.formats.mrc import read_images, write_stack
from cryo_svae.jobs.plan import fit_checkpoint, new_checkpoint, plan_training
from cryo_svae.learning import training_store
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.training_store import TrainingStore, build_store
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.preprocessing import CPU

N = 40
SETTINGS = {
    "epochs": 2,
    "held_out": 0.2,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "z_dim": 2,
    "device": "cpu",
}


@pytest.fixture
def star(make_dataset) -> Path:
    rng = np.random.default_rng(3)
    images = rng.standard_normal((N, 16, 16)).astype(np.float32)
    images[:, 6:10, 7:12] += 2.0
    images[5, 8, 8] = 1e7  # a hot pixel: beyond half precision, in sds of the background
    return make_dataset(N, images=images)


def built(star: Path, engine: str, folder: Path) -> TrainingStore:
    particles = read_particles(star)
    plan = plan_training({**SETTINGS, "engine": engine}, particles, "the test")
    source, engine_ = ImageSource(particles), new_checkpoint(plan).engine
    return build_store(engine_, source, plan.preparation, False, folder, torch.device("cpu"))


@pytest.mark.parametrize("engine", ["steerable", "coordinate"])
def test_images_on_disk_are_those_in_memory_to_half_precision(star, tmp_path, monkeypatch, engine):
    in_memory = built(star, engine, tmp_path)
    monkeypatch.setattr(training_store, "IN_MEMORY_BYTES", 0)
    (tmp_path / "scratch").mkdir()
    on_disk = built(star, engine, tmp_path / "scratch")
    assert on_disk.image.dtype == torch.float16
    assert not list((tmp_path / "scratch").iterdir())
    rows = torch.arange(N)
    kept, exact = on_disk.batch(rows, CPU).image, in_memory.batch(rows, CPU).image
    assert kept.dtype == torch.float32
    assert kept.isfinite().all()
    usual = rows != 5
    torch.testing.assert_close(kept[usual], exact[usual], rtol=2**-10, atol=1e-5)
    assert kept[5].abs().max() == torch.finfo(torch.float16).max < exact[5].abs().max()


def trained(star: Path, engine: str, folder: Path) -> Checkpoint:
    particles = read_particles(star)
    plan = plan_training({**SETTINGS, "engine": engine}, particles, "the test")
    checkpoint = new_checkpoint(plan)
    fit_checkpoint(checkpoint, particles, plan, folder, lambda _: None)
    return checkpoint


@pytest.mark.parametrize("engine", ["steerable", "coordinate"])
def test_a_hot_pixel_spoils_no_training_and_is_told_of(star, tmp_path, caplog, engine):
    """Training is that of the set without it."""
    spoilt = trained(star, engine, tmp_path)
    assert "1 image(s) are far brighter than the others" in caplog.text
    assert "(particles.star, line 30): left out of training" in caplog.text
    caplog.clear()
    stack = tmp_path / "stack.mrcs"
    images = read_images(stack, np.arange(N))
    images[5] = np.nan
    write_stack(stack, images, pixel_size_angst=2.5)
    without = trained(star, engine, tmp_path)
    assert "left out of training, as a few" not in caplog.text
    bounds = [each.history[-1]["elbo"] for each in (spoilt, without)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-3)
