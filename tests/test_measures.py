from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.bayes_limit import make_grid, posterior_mean, power, shifted
from benchmarks.measures import (
    angle_error_deg,
    circular_correlation,
    like_view_error_deg,
    neighbour_view_deg,
    r_z,
    shift_rms_px,
)
from cryo_svae.simulate import SimulateConfig, load_molecule, render, simulate, view_rotation

RNG = np.random.default_rng(3)
UNIFORM = RNG.uniform(-math.pi, math.pi, 2000)


def test_r_z_knows_sign_scale_and_mixtures():
    truth = RNG.normal(size=500)
    noise = RNG.normal(size=500)
    assert r_z(-3 * truth + 1, truth) == pytest.approx(1.0)
    assert r_z(np.column_stack([truth + noise, truth - noise]), truth) == pytest.approx(1.0)
    assert r_z(truth + noise, truth) == pytest.approx(abs(np.corrcoef(truth + noise, truth)[0, 1]))
    assert r_z(np.zeros(500), truth) == 0.0


def test_circular_correlation_of_known_angles():
    assert circular_correlation(UNIFORM + 1.3, UNIFORM) == pytest.approx(1.0)
    assert circular_correlation(-UNIFORM, UNIFORM) == pytest.approx(-1.0)
    assert abs(circular_correlation(RNG.permutation(UNIFORM), UNIFORM)) < 0.1
    assert circular_correlation(np.zeros(2000), UNIFORM) == 0.0
    noisy = UNIFORM + RNG.normal(0, 0.2, 2000)  # |mean e^{i error}| = exp(-0.2² / 2)
    assert circular_correlation(noisy, UNIFORM) == pytest.approx(math.exp(-0.02), abs=0.002)


def test_angle_error_ignores_one_turn_and_the_branch():
    error = np.radians(np.tile([-2.0, 2.0], 1000))
    assert angle_error_deg(UNIFORM + 3.0 + error, UNIFORM) == pytest.approx(2.0)
    assert angle_error_deg(UNIFORM + 2 * math.pi, UNIFORM) == pytest.approx(0.0, abs=1e-9)


def test_shift_error_ignores_the_frame_s_offset():
    origin = RNG.normal(size=(2000, 2))
    cos, sin = np.cos(UNIFORM), np.sin(UNIFORM)
    c = np.array([1.5, -0.7])
    turned_back = np.stack([cos * c[0] + sin * c[1], -sin * c[0] + cos * c[1]], 1)  # R(-psi) c
    assert shift_rms_px(origin + turned_back, origin, UNIFORM) == pytest.approx(0.0, abs=1e-9)
    assert shift_rms_px(np.zeros_like(origin), origin, UNIFORM) == pytest.approx(math.sqrt(2), abs=0.05)


def test_relative_angles_do_not_depend_on_the_frame_at_the_pole():
    simulated = simulate(SimulateConfig(molecule="views", n_particles=1500, box=8))
    view, psi = simulated.view_rad.double().numpy(), simulated.psi_rad.double().numpy()
    # A model that holds every view in its own frame, turned off RELION's by the angle rot: that
    # frame is the same all round the pole, and relative angles are right there.
    near_pole = view[:, 1] < 0.3
    found = psi + view[:, 0]
    assert like_view_error_deg(found[near_pole], psi[near_pole], view[near_pole]) < 0.5
    # RELION's own frame jumps about at the pole: taken as a smooth frame it would be wrong.
    assert like_view_error_deg(psi[near_pole], psi[near_pole], view[near_pole]) > 5
    assert like_view_error_deg(UNIFORM[:1500], psi, view) > 60


def test_neighbours_in_z_have_like_views():
    direction = RNG.normal(size=(1000, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    assert neighbour_view_deg(direction, direction) < 4
    assert neighbour_view_deg(RNG.permutation(direction), direction) == pytest.approx(90, abs=6)


def test_relative_angles_follow_the_image():
    # Two views with one direction and different rot are one image turned: the same pixels, so a
    # model gives both the same angle.
    view = torch.tensor([[0.2, 1.0e-4], [0.9, 1.0e-4]])
    points = torch.tensor([[4.0, 1.0, 0.0], [-2.0, 3.0, 1.0]])
    seen = points @ view_rotation(view).mT
    psi = torch.tensor([0.1, 0.1 - 0.7])  # R(-psi) undoes the difference of rot
    images = render(seen[..., :2], torch.ones(2), 1.0, psi, torch.zeros(2, 2), 16)
    assert torch.allclose(images[0], images[1], atol=1e-3)
    same = np.zeros(2)
    assert like_view_error_deg(same, psi.double().numpy(), view.double().numpy()) == pytest.approx(
        0, abs=0.1
    )


def test_components_move_as_the_origin_says():
    bead = torch.tensor([[[2.0, -1.0]]]).expand(2, -1, -1)
    origin = torch.tensor([[1.5, -2.0], [0.0, 0.0]])
    rest = render(bead[:1], torch.ones(1), 1.2, torch.zeros(1), torch.zeros(1, 2), 16)
    posed = render(bead, torch.ones(1), 1.2, torch.zeros(2), origin, 16)
    assert torch.allclose(shifted(rest, origin)[:, 0], posed, atol=2e-3)
    assert power(rest).sum().item() == pytest.approx(rest.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("defocus", [(None, None), (8000.0, 16000.0)])
def test_the_limit_finds_easy_particles(defocus):
    low, high = defocus
    config = SimulateConfig(
        n_particles=60, box=24, snr=1.0, shift_std_px=1.0, defocus_min_angst=low, defocus_max_angst=high
    )
    simulated, molecule = simulate(config), load_molecule("hinge")
    grid = make_grid(molecule, 1.0, n_conformations=24, n_angles=180, shift_step_px=0.5)
    mean = posterior_mean(simulated, molecule, 1.0, grid)
    psi, true_psi = mean.psi_rad.numpy(), simulated.psi_rad.numpy()
    assert r_z(mean.conformation[:, 0].numpy(), simulated.conformation[:, 0].numpy()) > 0.95
    assert circular_correlation(psi, true_psi) > 0.99
    assert shift_rms_px(mean.origin_px.numpy(), simulated.origin_px.numpy(), psi) < 0.4


def test_without_signal_the_limit_is_the_prior():
    simulated = simulate(SimulateConfig(n_particles=20, box=16, snr=1e-6))
    mean = posterior_mean(simulated, load_molecule("hinge"), 0.0)
    assert mean.conformation.abs().max() < 0.05
    assert (mean.origin_px == 0).all()
