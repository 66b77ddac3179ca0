"""Classes proposed: noise, the tiny and the blurred are left out, and the reason is said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryo_svae.results.auto_selection import objections, ranges

SIZE = np.array([300, 200, 150, 120, 19, 80])
MERIT = np.array([1.2, 1.0, 0.9, 1.1, 1.0, 1.3])
ANGST = np.array([15.0, 16.0, 17.0, 14.0, 15.0, 18.0])


def changed(array: np.ndarray, **values: float) -> np.ndarray:
    copy = array.copy()
    for name, value in values.items():
        copy[int(name[1:])] = value
    return copy


def left_out(size=SIZE, merit=MERIT, angst=ANGST) -> dict[int, str]:
    return {k: why for k, why in enumerate(objections(size, merit, angst), start=1) if why}


def test_a_tiny_class_is_left_out():
    assert left_out() == {5: "19 particles, fewer than 20"}


def test_a_class_without_merit_is_left_out_even_where_it_is_the_largest():
    assert left_out(merit=changed(MERIT, k0=0.02))[1] == "merit 0.02, below half of 1.00"
    assert left_out(merit=changed(MERIT, k0=0.56)).keys() == {5}


def test_a_blurred_class_is_left_out():
    assert left_out(angst=changed(ANGST, k3=30.0))[4] == "30.0 Å at an FRC of 0.5, above 1.5 times 16.0 Å"
    assert left_out(angst=changed(ANGST, k3=np.nan))[4] == "no resolution at an FRC of 0.5"


def test_up_to_half_of_all_may_be_junk():
    size = np.array([400, 400, 200, 200, 200, 200])
    merit = np.array([0.0, 0.01, 1.0, 1.1, 1.2, 0.9])
    assert left_out(size, merit, np.array([60.0, 20.0, 15, 15, 15, 15])).keys() == {1, 2}


def test_where_there_is_nothing_nothing_is_proposed():
    assert len(left_out(merit=np.zeros(6))) == 6
    assert len(left_out(size=np.zeros(6, dtype=int), merit=np.full(6, np.nan))) == 6
    assert len(left_out(angst=np.full(6, np.nan))) == 6


@given(st.permutations(range(6)))
def test_the_order_of_classes_is_irrelevant(order):
    merit = changed(MERIT, k1=0.1)
    shuffled = objections(SIZE[order], merit[order], ANGST[order])
    assert shuffled == [objections(SIZE, merit, ANGST)[k] for k in order]


@given(st.floats(0.01, 100.0), st.floats(0.1, 100.0))
def test_the_scales_of_merit_and_resolution_are_irrelevant(merit, angst):
    scaled = objections(SIZE, MERIT * merit, ANGST * angst)
    assert [not why for why in scaled] == [not why for why in objections(SIZE, MERIT, ANGST)]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([1, 2, 3, 7], "1-3,7"), ([4], "4"), ([1, 3, 5], "1,3,5"), ([], ""), ([2, 3], "2-3")],
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text
