"""Views: classes side by side in z, how full they are, and selections that even them out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryo_svae.cli import main
from cryo_svae.formats.star import read_star, write_tables
from cryo_svae.results.views import MOST_VIEWS, evened, most_by_balance, views_of, views_with_sizes
from tests.conftest import image_names, optics_columns

CLUMPS = np.array([[0.0, 0.0], [5.0, 5.0], [0.1, 0.0], [-5.0, 0.0], [5.0, 5.2], [0.0, 0.1]])


def test_classes_side_by_side_are_one_view_whatever_they_hold():
    centre = np.concatenate([CLUMPS, 40.0 * np.eye(2), [[-30.0, 7.0], [9.0, 50.0]]])
    centre = np.concatenate([centre, [[-40, -40], [40, -40], [-80, 0], [0, -80]]])  # ten places and some
    view = views_of(centre)
    assert len(set(view.tolist())) == MOST_VIEWS
    assert view[0] == view[2] == view[5] == 0
    assert view[1] == view[4]
    assert len({view[0], view[1], *view[6:].tolist()}) >= 9


def test_few_classes_are_a_view_each_and_one_is_one():
    assert views_of(np.array([[0.0], [1.0], [1.1]])).tolist() == [0, 1, 2]
    assert views_of(np.zeros((1, 3))).tolist() == [0]


@given(st.permutations(range(14)))
def test_views_do_not_hang_on_the_order_of_the_classes(order):
    centre = np.random.default_rng(1).normal(size=(14, 3))
    view, again = views_of(centre), views_of(centre[list(order)])
    same = view[list(order)][:, None] == view[list(order)]
    assert np.array_equal(again[:, None] == again, same)


def test_rare_and_dominant_views_are_named():
    centre = np.arange(5.0)[:, None]
    assert views_with_sizes(centre, np.array([20, 25, 18, 22, 15])).doubts() == []
    dominant, rare = views_with_sizes(centre, np.array([60, 1, 18, 12, 9])).doubts()
    assert "One view (class 1) holds 60% of the particles" in dominant
    assert "1 of 5 views (class 2) hold less than a fifth of an even share" in rare


def test_the_best_of_each_view_stay():
    view, merit = np.array([0, 0, 0, 1, 1, 2]), np.array([0.1, 0.9, 0.5, 0.2, 0.3, 0.0])
    kept = np.array([True, True, True, True, False, True])
    assert evened(view, merit, kept, 2).tolist() == [False, True, True, True, False, True]
    assert evened(view, merit, kept, 1).tolist() == [False, True, False, True, False, True]


def test_a_balance_goes_from_the_fullest_to_the_least_full():
    sizes = np.array([400, 0, 25, 100])
    assert [most_by_balance(sizes, each) for each in (0.0, 0.5, 1.0)] == [400, 100, 25]


@pytest.fixture
def job(tmp_path):
    """Classes 1, 2 and 3, the last two side by side, of 12, 6 and 2 particles."""
    number = np.repeat([1, 2, 3], [12, 6, 2])
    centre = {
        "svaeZ1": ["0", *["9"] * 10],
        "svaeZ2": ["0", "0", "0.1", *[str(20 * k) for k in range(1, 9)]],
    }
    n = len(number)
    particles = {
        "rlnImageName": image_names(n), "rlnOpticsGroup": ["1"] * n, "rlnClassNumber": map(str, number),
        "rlnParticleFigureOfMerit": [str(0.01 * k) for k in range(n)],
    }  # fmt: skip
    particles = {label: list(cells) for label, cells in particles.items()}
    write_tables(tmp_path / "particles.star", {"optics": optics_columns(), "particles": particles})
    counts = ["12", "6", "2", *["0"] * 8]
    classes = {"svaeNrParticles": counts, "svaeMeanFigureOfMerit": ["1"] * 11, **centre}
    classes |= {"rlnEstimatedResolution": ["20"] * 11, "svaeResolution05Angst": ["25"] * 11}
    write_tables(tmp_path / "classes.star", {"classes": classes})
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        (["--at-most-per-view", "5"], [5, 3, 2]),  # the last two are one view, whose best are the last
        (["--balance", "1"], [8, 6, 2]),
        (["--balance", "0"], [12, 6, 2]),
        (["--balance", "0.5"], [10, 6, 2]),  # sqrt(12 * 8) = 9.8
        (["--classes", "1-2", "--balance", "1"], [6, 6, 0]),
        (["--at-most-per-view", "5", "--invert"], [7, 3, 0]),
    ],
)
def test_selections_are_evened_out(job, arguments, counts):
    assert main(["select", str(job), *arguments, "--out", str(job / "out.star")]) == 0
    number = read_star(job / "out.star").block("particles").integers("rlnClassNumber")
    assert np.bincount(number, minlength=4)[1:].tolist() == counts


@pytest.mark.parametrize(
    "arguments",
    [["--balance", "1.5"], ["--at-most-per-view", "0"], ["--balance", "1", "--at-most-per-view", "5"]],
)
def test_what_evens_nothing_out_is_refused(job, arguments, capsys):
    assert main(["select", str(job), *arguments, "--out", str(job / "out.star")]) == 2
    assert arguments[0] in capsys.readouterr().err or "--balance" in capsys.readouterr().err
