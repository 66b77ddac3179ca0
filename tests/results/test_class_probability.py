"""Probabilities of classes: a share p of the particles with probability p is right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.results.class_probability import Mixture, mixture_of, most_likely, probabilities
from cryo_svae.results.latent_classes import classify

TWO = Mixture(np.array([[-1.0], [0.5]]), np.array([0.3, 0.7]), np.array([[0.04], [0.09]]))


def seen(truth: np.ndarray, variance: np.ndarray, seed: int) -> EstimateTable:
    """Posteriors under the prior N(0, 1) of contents (n, d) measured with noise of this variance."""
    measured = truth + np.random.default_rng(seed).normal(size=truth.shape) * np.sqrt(variance)
    std = np.sqrt(variance / (1.0 + variance)) * np.ones_like(truth)
    n = len(truth)
    ones = np.ones(n)
    return EstimateTable(
        measured / (1.0 + variance), std, ones, ones, np.zeros((n, 2)), ones, ones, ones, ones, ones > 0
    )


def right_in_bins(probability: np.ndarray, is_right: np.ndarray) -> list[tuple[float, float]]:
    """Mean probability and share of right ones, of the particles in each bin of probability."""
    bins = np.digitize(probability, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    return [
        (float(probability[bins == b].mean()), float(is_right[bins == b].mean()))
        for b in np.unique(bins)
        if (bins == b).sum() > 300
    ]


@pytest.mark.parametrize(("noise", "d"), [(0.05, 1), (0.15, 2)])
def test_of_a_mixture_of_kinds_the_probabilities_are_the_shares_of_right_classes(noise, d):
    random = np.random.default_rng(1)
    centre = np.zeros((3, d))
    centre[:, 0] = [-1.2, 0.0, 1.0]
    kind = random.choice(3, 20_000, p=[0.5, 0.3, 0.2])
    truth = centre[kind] + 0.15 * random.normal(size=(len(kind), d))
    variance = noise * random.choice([0.2, 1.0, 3.0], size=(len(kind), 1))
    classes = classify(seen(truth, variance, 2), 3, seed=0)
    named = np.array([((classes.centre - each) ** 2).sum(1).argmin() + 1 for each in centre])
    assert sorted(named.tolist()) == [1, 2, 3]
    pairs = right_in_bins(classes.probability, named[kind] == classes.class_number)
    assert len(pairs) >= 5
    for promised, kept in pairs:
        assert abs(promised - kept) < 0.1, pairs


@pytest.mark.parametrize(("noise", "d", "k"), [(0.08, 1, 10), (0.05, 2, 20), (0.2, 6, 20)])
def test_without_kinds_they_are_the_chances_to_lie_nearest_to_the_class(noise, d, k):
    random = np.random.default_rng(3)
    truth = random.normal(size=(20_000, d))
    variance = noise * random.uniform(0.2, 3.0, size=(len(truth), 1))
    classes = classify(seen(truth, variance, 4), k, seed=0)
    nearest = ((truth[:, None] - classes.centre) ** 2).sum(2).argmin(1) + 1
    pairs = right_in_bins(classes.probability, nearest == classes.class_number)
    assert len(pairs) >= 4
    for promised, kept in pairs:
        assert abs(promised - kept) < 0.08, pairs


@given(st.floats(-2.0, 2.0), st.floats(0.05, 0.95))
def test_the_posterior_is_integrated_over_without_its_prior(z, std):
    def share_of(k: int) -> float:
        def joint(at: float) -> float:
            own = norm.pdf(at, z, std) / norm.pdf(at)
            return own * norm.pdf(at, TWO.centre[k, 0], np.sqrt(TWO.spread[k, 0])) * TWO.share[k]

        return quad(joint, -6.0, 6.0, points=[-1.0, 0.5, z], limit=200)[0]

    shares = np.array([share_of(0), share_of(1)])
    found = probabilities(TWO, np.array([[z]]), np.array([[std]]))[0]
    np.testing.assert_allclose(found, shares / shares.sum(), atol=2e-3)


@given(st.floats(-3.0, 3.0), st.floats(0.0, 1.5))
def test_of_two_classes_the_likelier_has_a_half_at_least(z, std):
    number, probability = most_likely(TWO, np.array([[z]]), np.array([[std]]))
    assert number[0] in (0, 1)
    assert 0.5 <= probability[0] <= 1.0


def test_who_knows_nothing_has_the_shares_and_who_knows_all_is_sure():
    nothing, all_ = (probabilities(TWO, np.array([[z]]), np.array([[s]]))[0] for z, s in ((0, 1), (0.5, 0)))
    np.testing.assert_allclose(nothing, TWO.share, atol=1e-4)
    assert all_[1] > 0.999


def test_sizes_and_spreads_are_those_of_the_members():
    random = np.random.default_rng(5)
    number = np.repeat([0, 1, 2], [6000, 3000, 0])
    z = np.array([[0.0, 1.0], [3.0, 4.0]])[number] + random.normal(size=(9000, 2)) * [0.5, 0.2]
    mixture = mixture_of(z, number, np.array([[0.0, 1.0], [3.0, 4.0], [9.0, 9.0]]))
    np.testing.assert_allclose(mixture.share, [2 / 3, 1 / 3, 0.0], atol=1e-3)
    np.testing.assert_allclose(mixture.spread[:2], [[0.25, 0.04]] * 2, rtol=0.06)
    assert (mixture.spread[2] > 0).all()
