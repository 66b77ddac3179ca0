"""Classes of z: every particle in its nearest class, largest class first, few particles no trouble."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.results.latent_classes import Classes, classify, default_classes


def table(z: np.ndarray, usable: np.ndarray | None = None) -> EstimateTable:
    n = len(z)
    ones, pairs = np.ones(n), np.zeros((n, 2))
    usable = np.ones(n, dtype=bool) if usable is None else usable
    return EstimateTable(z, np.full_like(z, 0.1), ones, ones, pairs, ones, ones, ones, ones, usable)


def blobs(*sizes: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.concatenate([rng.normal(8.0 * k, 0.3, (size, 2)) for k, size in enumerate(sizes)])


def with_peak(work: Callable[[], Classes]) -> tuple[Classes, int]:
    """What work gives, and the most bytes it held."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_classes_are_the_clusters_largest_first():
    classes = classify(table(blobs(20, 70, 40)), 3, seed=0)
    assert classes.n_particles.tolist() == [70, 40, 20]
    assert classes.class_number.tolist() == [3] * 20 + [1] * 70 + [2] * 40
    np.testing.assert_allclose(classes.centre[:, 0], [8.0, 16.0, 0.0], atol=0.3)


def test_equal_seeds_make_equal_classes():
    z = np.random.default_rng(0).normal(size=(300, 3))
    a, b = (classify(table(z), 7, seed=5) for _ in range(2))
    assert np.array_equal(a.class_number, b.class_number)
    assert a.n_particles.sum() == 300


def test_unusable_particles_do_not_count_but_have_a_class():
    z = blobs(30, 10)
    usable = np.ones(40, dtype=bool)
    usable[[0, 39]] = False
    z[[0, 39]] = 0.0
    classes = classify(table(z, usable), 2, seed=0)
    assert classes.n_particles.tolist() == [29, 9]
    assert classes.class_number[39] == 1


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_particles_than_classes(n):
    z = np.arange(2.0 * n).reshape(n, 2)
    classes = classify(table(z), 5, seed=0)
    assert 1 <= len(classes.centre) <= max(1, n)
    assert (classes.class_number >= 1).all()


def test_the_number_of_classes_follows_the_number_of_particles():
    assert [default_classes(n) for n in (1, 99, 1000, 10**6)] == [1, 1, 10, 50]


def test_of_many_particles_some_give_the_centres_and_all_have_a_class():
    n = 400_000
    classes, peak = with_peak(lambda: classify(table(blobs(n // 4, n // 2, n // 4)), 50, seed=0))
    assert classes.n_particles.sum() == n
    assert len(classes.centre) == 50
    assert peak < 130e6  # k-means++ on all of them: 50 numbers of each, 160 MB at a time
