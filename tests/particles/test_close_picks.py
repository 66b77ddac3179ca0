"""Particles picked twice are counted and named, in Å of the micrograph, micrograph by micrograph."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cryo_svae.cli import main
from cryo_svae.particles.close_picks import close_picks
from cryo_svae.particles.particle_set import read_particles
from tests.conftest import optics_columns
from tests.cryosparc_files import locations, particle_fields, save_cs


def places(xs: list[float], ys: list[float], micrographs: str) -> dict[str, list[str]]:
    return {
        "rlnMicrographName": [f"mics/{name}.mrc" for name in micrographs],
        "rlnCoordinateX": [str(x) for x in xs],
        "rlnCoordinateY": [str(y) for y in ys],
    }


FIVE = places([100, 103, 500, 100, 900], [100, 104, 500, 100, 900], "aaabb")


def known(size_angst: str = "2.5", label: str = "rlnMicrographPixelSize") -> dict[str, list[str]]:
    return optics_columns(1, **{label: [size_angst]})


def test_the_two_that_are_near_in_one_micrograph_are_counted(make_dataset):
    particles = read_particles(make_dataset(particles=FIVE, optics=known()))  # 5 px of 2.5 Å apart: 12.5 Å
    assert [close_picks(particles, diameter).count for diameter in (49.0, 51.0)] == [0, 2]
    close = close_picks(particles, 60.0)
    assert (close.n_particles, close.distance_angst) == (5, 15.0)
    assert str(close) == "2 particles (40.0%) lie within 15 Å of another"


def test_the_micrographs_own_pixel_size_is_taken_where_it_is_known(make_dataset):
    particles = read_particles(make_dataset(particles=FIVE, optics=known("1.0")))  # 5 px of 1 Å
    assert [close_picks(particles, diameter).count for diameter in (19.0, 21.0)] == [0, 2]


def test_that_of_the_movies_is_what_relion_leaves_of_it_and_a_note_says_so(make_dataset):
    movies = known("1.0", "rlnMicrographOriginalPixelSize")
    close = close_picks(read_particles(make_dataset(particles=FIVE, optics=movies)), 21.0)
    assert close.count == 2
    assert str(close).endswith(
        "another (by rlnMicrographOriginalPixelSize, fewer where movies were binned)"
    )
    both = {**movies, "rlnMicrographPixelSize": ["2.0"]}
    assert close_picks(read_particles(make_dataset(particles=FIVE, optics=both)), 21.0).count == 0
    unbinned = known("2.5", "rlnMicrographOriginalPixelSize")  # then there is one size for all three
    assert close_picks(read_particles(make_dataset(particles=FIVE, optics=unbinned)), 51.0).note == ""


def test_where_no_size_is_known_the_count_is_the_least_and_says_so(make_dataset):
    close = close_picks(read_particles(make_dataset(particles=FIVE)), 51.0)
    assert close.count == 2
    assert "or more: without rlnMicrographPixelSize" in str(close)
    assert "--min-distance 5px keeps" in close.doubts()[0]  # 12.75 Å; in Å it could not be had


def test_the_pixel_size_of_a_cs_file_is_its_micrographs_own(make_dataset, tmp_path):
    make_dataset()
    fields = {**particle_fields(), **locations()}
    fields["location/micrograph_shape"][:] = 1000
    fields["location/center_x_frac"][:] = fields["location/center_y_frac"][:] = [0.1, 0.2, 0.104, 0.5, 0.9]
    path = tmp_path / "p.cs"
    assert (
        close_picks(read_particles(save_cs(path, fields)), 30.0).count == 0
    )  # 4 px of 2.5 Å, on both axes
    fields["location/micrograph_psize_A"] = np.full(5, 1.25, dtype="<f4")
    close = close_picks(read_particles(save_cs(path, fields)), 30.0)
    assert (close.count, close.note) == (2, "")
    assert main(["convert", str(path), str(tmp_path / "p.star")]) == 0
    assert close_picks(read_particles(tmp_path / "p.star"), 30.0).count == 2


def test_a_brute_count_agrees(make_dataset):
    random = np.random.default_rng(0)
    n = 60
    xy, names = random.uniform(0, 60, (n, 2)).round(3), random.choice(list("abc"), n)
    path = make_dataset(n, optics=known(), particles=places(*xy.T.tolist(), "".join(names)))
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
    near = places([10, 11, 90, 10, 90], [10, 11, 90, 90, 10], "aaabb")
    path = make_dataset(particles=near, optics=known())
    assert main(["inspect", str(path), "--out", str(tmp_path / "m.png")]) == 0
    said = capsys.readouterr().out
    assert "close picks   2 particles (40.0%) lie within 9 Å of another" in said
    assert "--min-distance 9 keeps" in said
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


def test_inspect_and_run_count_by_one_circle(tmp_path, capsys):
    """Of particles in a box twice as wide, the circle that the images show, which both name."""
    size = ["--n-particles", "600", "--box", "64", "--n-micrographs", "2", "--pixel-size-angst", "4"]
    assert main(["simulate", "--out", str(tmp_path / "set"), *size, "--snr", "0.5"]) == 0
    star = tmp_path / "set" / "particles.star"
    assert main(["inspect", str(star), "--out", str(tmp_path / "m.png")]) == 0
    said = capsys.readouterr().out
    job = tmp_path / "job"
    assert main(["train", str(star), "--out", str(job), "--epochs", "1", "--device", "cpu"]) == 0
    log = (job / "run.log").read_text()
    circle = re.search(r"circle        (\d+) Å, by the images", said).group(1)
    assert int(circle) < 240
    assert f"particles fit a circle of {circle} Å" in log
    (counted,) = re.findall(r"close picks   (.*)", said)
    assert f"close picks   {counted}" in log
    assert main(["inspect", str(star), "--out", str(tmp_path / "m.png"), "--mask-diameter", "200"]) == 0
    assert "circle        200 Å, as --mask-diameter says" in capsys.readouterr().out
