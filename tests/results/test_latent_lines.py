"""Lines through the latent space: an axis moves alone, principal axes follow the spread."""

from __future__ import annotations

import numpy as np
import pytest

from cryo_svae.results.latent_lines import line, line_names, principal_axes


def test_a_latent_axis_moves_alone():
    z = np.random.default_rng(0).normal(size=(500, 3))
    along = line(z, np.ones(500, dtype=bool), "z2")
    np.testing.assert_allclose(along.point[:, [0, 2]], np.tile(z.mean(0)[[0, 2]], (11, 1)))
    np.testing.assert_allclose(along.point[:, 1], along.step)
    np.testing.assert_array_equal(along.place, z[:, 1])
    assert (np.diff(along.step) > 0).all()
    assert 3.5 < np.ptp(along.step) < 4.7


def test_principal_axes_follow_a_planted_direction():
    rng = np.random.default_rng(1)
    direction = np.array([3.0, -4.0, 0.0]) / 5
    z = (
        np.array([10.0, 20.0, 30.0])
        + 6 * rng.normal(size=(2000, 1)) * direction
        + rng.normal(size=(2000, 3))
    )
    axes = principal_axes(z)
    np.testing.assert_allclose(axes.direction[:, 0], -direction, atol=0.05)
    assert axes.share[0] == pytest.approx(37 / 39, abs=0.02)
    np.testing.assert_allclose(axes.direction.T @ axes.direction, np.eye(3), atol=1e-12)
    along = line(z, np.ones(2000, dtype=bool), "pc1")
    np.testing.assert_allclose(along.point, z.mean(0) + np.outer(along.step, axes.direction[:, 0]))
    assert abs(np.corrcoef(along.place, (z - z.mean(0)) @ direction)[0, 1]) > 0.99


def test_unusable_particles_count_for_nothing():
    z = np.random.default_rng(2).normal(size=(100, 2))
    usable = np.arange(100) < 90
    wild = np.where(usable[:, None], z, 1e6)
    for name in ("z1", "pc2"):
        np.testing.assert_allclose(line(wild, usable, name).point, line(z, usable, name).point)


@pytest.mark.parametrize("z", [np.zeros((0, 2)), np.ones((1, 2)), np.ones((50, 2)), np.zeros((5, 0))])
def test_without_spread_there_are_axes_all_the_same(z):
    axes = principal_axes(z)
    assert axes.direction.shape == (z.shape[1],) * 2
    assert all(np.isfinite(part).all() for part in (axes.mean, axes.direction, axes.share))


def test_the_lines_that_a_job_shows():
    assert line_names(1) == ["z1"]
    assert line_names(2) == ["z1", "z2", "pc1", "pc2"]
    assert line_names(8)[7:] == ["z8", "pc1", "pc2", "pc3"]
