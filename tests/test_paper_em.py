"""The paper's cryo-EM experiments: their measures, and a small run of each."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import paper_hinge, paper_models, paper_real
from benchmarks.paper_models import Effort
from cryo_svae.imaging import geometry
from cryo_svae.particles.preprocessing import Preparation

EXAMPLE = Path(__file__).resolve().parents[1] / "example_data" / "particles.star"
MODELLED = paper_real.Setting(EXAMPLE.name, 150.0, 210.0, 15.0, invert=False)


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def arguments(**given):
    settings = {
        "size": "quick",
        "minutes": None,
        "epochs": None,
        "z_dims": None,
        "device": "cpu",
        "seed": 0,
    }
    return argparse.Namespace(**settings | given)


def truth_of(psi_rad):
    size = dataclasses.replace(paper_hinge.SIZES["quick"], n_particles=len(psi_rad))
    simulated, _ = paper_hinge.simulated_and_molecule(size, None, 0)
    return dataclasses.replace(simulated, psi_rad=psi_rad)


def test_a_number_that_follows_a_part_of_a_turn_counts_for_rotation():
    psi = torch.linspace(-math.pi, math.pi, 401)[:-1]
    z = torch.stack([torch.sin(3 * psi + 0.4), torch.zeros(400)], 1)
    conformation, rotation = paper_hinge.Row("vanilla", z, None, "").scores(truth_of(psi))
    assert rotation == pytest.approx(1.0, abs=1e-4)
    assert conformation < 0.2
    unrelated = torch.sin(5 * psi)[:, None]
    assert paper_hinge.Row("vanilla", unrelated, None, "").scores(truth_of(psi))[1] < 1e-3


def test_an_angle_is_compared_as_an_angle():
    psi = torch.linspace(-math.pi, math.pi, 401)[:-1]
    row = paper_hinge.Row("spatial-VAE", torch.zeros(400, 1), geometry.wrap_radians(psi + 2.0), "")
    assert row.scores(truth_of(psi)) == pytest.approx((0.0, 1.0), abs=1e-6)


def test_the_steerable_engine_learns_what_a_vanilla_vae_does_not(results, monkeypatch):
    """Its scores near the Bayes limit, no score above it, and its manifold laid on the true one."""
    shown = {}
    monkeypatch.setattr(
        paper_models, "draw_rows", lambda rows, titles: shown.update(rows) or paper_models.Figure()
    )
    quick = paper_hinge.SIZES["quick"]
    monkeypatch.setitem(
        paper_hinge.SIZES,
        "quick",
        dataclasses.replace(quick, spatial=dataclasses.replace(quick.spatial, epochs=1)),
    )
    scores = paper_hinge.main(["--quick", "--device", "cpu"])
    limit, steerable = np.array(scores["Bayes limit"]), np.array(scores["steerable"])
    assert (steerable > 0.9 * limit).all()
    for name, found in scores.items():
        assert (np.array(found) < limit + 0.03).all(), name
    assert scores["vanilla, 1-D"][0] < 0.4 < steerable[0]
    for decoded, true in zip(shown["steerable"], shown["truth"], strict=True):
        assert np.corrcoef(decoded.flatten(), true.flatten())[0, 1] > 0.9
    assert [line.split()[0] for line in (results / "paper_hinge.txt").read_text().splitlines()[2:5]] == [
        "Bayes", "vanilla,", "vanilla,",
    ]  # fmt: skip
    assert (results / "paper_hinge.png").stat().st_size > 0


def test_spread_outside_looks_between_the_particle_and_the_mask():
    distance = geometry.pixel_grid(32).norm(dim=-1)
    images = torch.randn(50, 32, 32) * torch.where(
        distance <= 6, 3.0, torch.where(distance <= 12, 0.5, 100.0)
    )
    outside, inside = paper_real.spread_outside(images, 6.0, 12.0)
    assert outside == pytest.approx(0.5, rel=0.05)
    assert inside == pytest.approx(3.0, rel=0.05)


def test_no_step_is_begun_after_the_minutes():
    preparation = Preparation(box_px=16, pixel_size_angst=1.0, mask_diameter_angst=14.0, invert=False)
    trained = paper_models.train(
        "coordinate", 2, torch.randn(40, 16, 16), None, preparation, Effort(5, minutes=0.0, batch_size=10),
        held_out=0.25, seed=0, device="cpu", hidden=8,
    )  # fmt: skip
    assert trained.seen == 0
    assert len(trained.held) == 10
    once, again = (
        paper_models.bounds(trained.checkpoint, trained.store, trained.held).elbo for _ in range(2)
    )
    assert torch.equal(once, again)


def test_particles_are_joined_by_images_that_begin_and_end_at_their_means(results):
    rows, lines = paper_real.run_set("example", EXAMPLE, MODELLED, arguments())
    by_name = {(row.engine, row.z_dim, row.softplus): row for row in rows}
    assert set(by_name) == {
        ("steerable", 2, False), ("steerable", 10, False),
        ("coordinate", 2, False), ("coordinate", 10, False), ("coordinate", 10, True),
    }  # fmt: skip
    quiet, plain = by_name["coordinate", 10, True], by_name["coordinate", 10, False]
    assert quiet.background < plain.background
    images = paper_real.read(EXAMPLE, MODELLED, paper_real.SIZES["quick"], 0)
    for row in (plain, quiet, by_name["steerable", 10, False]):
        between = next(iter(paper_real.interpolations(row, images, torch.tensor([[3, 5]])).values()))
        ends = paper_models.decode(row.trained.checkpoint, row.trained.posterior.z_mean[[3, 5]])
        assert torch.allclose(between[[1, -2]], ends, atol=1e-5)
    assert len(lines) == 2 + len(rows)
    assert (results / "paper_real_example.png").stat().st_size > 0


def test_real_particles_run_quick(shared_data, results):
    """Protein is white: the middle of what is decoded is brighter than its surroundings."""
    setting = paper_real.SETS["bgal"]
    rows, _ = paper_real.run_set(
        "bgal", shared_data / setting.star, setting, arguments(epochs=1, z_dims=[2])
    )
    trained = rows[0].trained
    decoded = paper_models.decode(trained.checkpoint, trained.posterior.z_mean).mean(0)
    distance = geometry.pixel_grid(len(decoded)).norm(dim=-1)
    radius = setting.diameter_angst / 2 / trained.checkpoint.preparation.pixel_size_angst
    ring = (distance > radius) & (distance < trained.checkpoint.preparation.mask_radius_px)
    assert decoded[distance < radius / 2].mean() > decoded[ring].mean() + 0.1
