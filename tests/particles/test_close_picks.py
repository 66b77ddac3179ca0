"""Particles picked twice are counted and named, in Å of the micrograph, micrograph by micrograph."""

from __future__ import annotations

import numpy as np
import pytest

from cryo_svae.cli import main
from cryo_svae.particles.close_picks import close_picks
from cryo_svae.particles.particle_set import read_particles
from tests.conftest import optics_columns


def places(xs: list[float], ys: list[float], micrographs: str) -> dict[str, list[str]]:
    return {
        "rlnMicrographName": [f"mics/{name}.mrc" for name in micrographs],
        "rlnCoordinateX": [str(x) for x in xs],
        "rlnCoordinateY": [str(y) for y in ys],
    }


FIVE = places([100, 103, 500, 100, 900], [100, 104, 500, 100, 900], "aaabb")


def test_the_two_that_are_near_in_one_micrograph_are_counted(make_dataset):
    particles = read_particles(make_dataset(particles=FIVE))  # 5 px of 2.5 Å apart: 12.5 Å
    assert [close_picks(particles, diameter).count for diameter in (49.0, 51.0)] == [0, 2]
    close = close_picks(particles, 60.0)
    assert (close.n_particles, close.distance_angst, close.distance_px) == (5, 15.0, 6.0)
    assert str(close) == "2 particles (40.0%) lie within 15 Å of another"


def test_the_micrographs_own_pixel_size_is_taken_where_it_is_known(make_dataset):
    optics = optics_columns(1, rlnMicrographPixelSize=["1.0"])
    particles = read_particles(make_dataset(particles=FIVE, optics=optics))  # 5 px of 1 Å
    assert [close_picks(particles, diameter).count for diameter in (19.0, 21.0)] == [0, 2]
    assert close_picks(particles, 20.0).distance_px == 5.0


def test_a_brute_count_agrees(make_dataset):
    random = np.random.default_rng(0)
    n = 60
    xy, names = random.uniform(0, 60, (n, 2)).round(3), random.choice(list("abc"), n)
    path = make_dataset(n, particles=places(*xy.T.tolist(), "".join(names)))
    near = np.hypot(*(xy[:, None] - xy).T) * 2.5 < 10.0
    np.fill_diagonal(near, False)
    expected = (near & (names[:, None] == names)).any(1).sum()
    assert 0 < expected < n
    assert close_picks(read_particles(path), 40.0).count == expected


@pytest.mark.parametrize("missing", ["rlnMicrographName", "rlnCoordinateX"])
def test_without_places_nothing_is_said(make_dataset, missing):
    columns = {label: cells for label, cells in FIVE.items() if label != missing}
    assert close_picks(read_particles(make_dataset(particles=columns)), 60.0) is None


def test_a_place_that_is_no_number_is_near_to_nothing(make_dataset):
    columns = {**FIVE, "rlnCoordinateX": ["nan", "103", "500", "nan", "900"]}
    assert close_picks(read_particles(make_dataset(particles=columns)), 60.0).count == 0


def test_inspect_and_run_say_so_and_what_to_do(make_dataset, tmp_path, capsys):
    path = make_dataset(particles=places([10, 11, 90, 10, 90], [10, 11, 90, 90, 10], "aaabb"))
    assert main(["inspect", str(path), "--out", str(tmp_path / "m.png")]) == 0
    said = capsys.readouterr().out
    assert "close picks   2 particles (40.0%) lie within 9 Å of another" in said
    assert "--min-distance 4" in said
    job = tmp_path / "job"
    assert main(["run", str(path), "--out", str(job), "--epochs", "1", "--device", "cpu"]) == 0
    assert "Picked twice? 2 particles" in (job / "run.log").read_text()
    assert "Picked twice? 2 particles (40.0%)" in (job / "report.html").read_text()


def test_far_picks_are_no_warning(make_dataset, tmp_path, capsys):
    path = make_dataset(particles=places([10, 50, 90, 10, 90], [10, 50, 90, 90, 10], "aaabb"))
    assert main(["inspect", str(path), "--out", str(tmp_path / "m.png")]) == 0
    said = capsys.readouterr().out
    assert "close picks   0 particles (0.0%)" in said
    assert "--min-distance" not in said
