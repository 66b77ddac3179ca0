"""Particle sets: optics joined by id, images found, and one clear error for each mistake."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest

from cryo_svae.errors import InputError
from cryo_svae.formats.star import write_tables
from cryo_svae.particles.particle_set import read_particles
from tests.conftest import image_names, optics_columns

DEFOCUS = {"rlnDefocusU": ["15000"] * 5, "rlnDefocusV": ["14000"] * 5, "rlnDefocusAngle": ["30"] * 5}


def test_optics_are_joined_by_id_not_by_row(make_dataset):
    changes = {
        "rlnOpticsGroup": ["7", "2", "5"],
        "rlnImagePixelSize": ["1.0", "2.0", "3.0"],
        "rlnVoltage": ["100", "200", "300"],
    }
    optics = optics_columns(3, **changes)
    groups = {"rlnOpticsGroup": ["5", "7", "2", "2", "5"]}
    particles = read_particles(make_dataset(optics=optics, particles={**groups, **DEFOCUS}))
    assert particles.pixel_size_angst.tolist() == [3.0, 1.0, 2.0, 2.0, 3.0]
    assert particles.ctf.voltage_kv.tolist() == [300.0, 100.0, 200.0, 200.0, 300.0]
    assert particles.groups == ("optics1", "optics2", "optics3")


def test_ctf_parameters_come_in_their_units(make_dataset):
    particles = read_particles(make_dataset(particles={**DEFOCUS, "rlnPhaseShift": ["90"] * 5}))
    assert float(particles.ctf.defocus_angle_rad[0]) == pytest.approx(math.radians(30))
    assert float(particles.ctf.phase_shift_rad[0]) == pytest.approx(math.pi / 2)
    assert float(particles.ctf.amplitude_contrast[0]) == 0.07


def test_relion_30_pixel_size_is_detector_pixel_over_magnification(make_dataset, tmp_path):
    make_dataset(3)
    table = {
        "rlnImageName": image_names(3),
        "rlnMagnification": ["50000"] * 3,
        "rlnDetectorPixelSize": ["14.0"] * 3,
    }
    write_tables(tmp_path / "old.star", {"images": table})
    particles = read_particles(tmp_path / "old.star")
    assert particles.is_relion30
    np.testing.assert_allclose(particles.pixel_size_angst, 2.8)


@pytest.mark.parametrize("place", ["project", "beside", "above", "datadir", "datadir by name"])
def test_image_paths_are_sought_where_users_keep_them(make_dataset, tmp_path, monkeypatch, place):
    star = make_dataset(2, particles={"rlnImageName": image_names(2, "Extract/job1/stack.mrcs")})
    stack = tmp_path / "stack.mrcs"
    folders = {
        "project": tmp_path / "project" / "Extract" / "job1",
        "beside": tmp_path / "Extract" / "job1",
        "above": tmp_path / "Extract" / "job1",
        "datadir": tmp_path / "data" / "Extract" / "job1",
        "datadir by name": tmp_path / "data",
    }
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    folders[place].mkdir(parents=True)
    shutil.move(stack, folders[place] / "stack.mrcs")
    if place == "above":
        (tmp_path / "Select" / "job2").mkdir(parents=True)
        star = star.rename(tmp_path / "Select" / "job2" / "particles.star")
    datadir = tmp_path / "data" if "datadir" in place else None
    particles = read_particles(star, datadir=datadir)
    assert particles.stacks[0].path.samefile(folders[place] / "stack.mrcs")


def test_three_d_poses_are_noticed(make_dataset):
    assert not read_particles(make_dataset(particles={"rlnAngleRot": ["0"] * 5})).has_3d_pose
    assert read_particles(make_dataset(particles={"rlnAngleTilt": ["0"] * 4 + ["12.5"]})).has_3d_pose


MISTAKES = {
    "slice 0": ({"rlnImageName": ["000000@stack.mrcs", *image_names(5)[1:]]}, "slices counted from 1"),
    "no slice": ({"rlnImageName": ["stack.mrcs", *image_names(5)[1:]]}, "'<slice>@<stack>'"),
    "slice past the end": ({"rlnImageName": [*image_names(5)[:4], "000009@stack.mrcs"]}, "at most 5"),
    "missing stack": ({"rlnImageName": image_names(5, "gone.mrcs")}, "gone.mrcs"),
    "text for a number": ({**DEFOCUS, "rlnDefocusU": ["15000"] * 4 + ["abc"]}, "abc"),
    "a NaN defocus": ({**DEFOCUS, "rlnDefocusU": ["15000"] * 4 + ["nan"]}, "'nan'"),
    "unknown optics group": ({"rlnOpticsGroup": ["1", "1", "1", "2", "1"]}, "group 2"),
    "half a CTF": ({"rlnDefocusU": ["15000"] * 5}, "_rlnDefocusV"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_particles_are_named(make_dataset, name):
    columns, expected = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        read_particles(make_dataset(particles=columns))
    assert expected in str(caught.value)
    assert "To mend" in str(caught.value)
    if name != "half a CTF":
        assert caught.value.line is not None


def test_a_missing_pixel_size_names_the_option_that_supplies_it(make_dataset):
    optics = optics_columns()
    del optics["rlnImagePixelSize"]
    star = make_dataset(optics=optics)
    with pytest.raises(InputError, match="--pixel-size"):
        read_particles(star)
    assert read_particles(star, pixel_size_angst=1.7).pixel_size_angst.tolist() == [1.7] * 5


def test_a_pixel_size_that_contradicts_the_file_is_refused(make_dataset):
    with pytest.raises(InputError, match="--pixel-size"):
        read_particles(make_dataset(), pixel_size_angst=1.7)


@pytest.mark.parametrize("shape", [(5, 15, 15), (5, 16, 18)])
def test_odd_and_oblong_boxes_are_refused(make_dataset, shape):
    with pytest.raises(InputError, match="even number of pixels"):
        read_particles(make_dataset(images=np.zeros(shape, dtype=np.float32)))


def test_a_star_file_of_something_else_is_refused(tmp_path):
    write_tables(tmp_path / "m.star", {"micrographs": {"rlnMicrographName": ["a.mrc"]}, "x": {"a": ["1"]}})
    with pytest.raises(InputError, match="data_particles"):
        read_particles(tmp_path / "m.star")
    write_tables(tmp_path / "c.star", {"particles": {"rlnCoordinateX": ["1"]}})
    with pytest.raises(InputError, match="rlnImageName"):
        read_particles(tmp_path / "c.star")
    write_tables(tmp_path / "e.star", {"particles": {"rlnImageName": []}})
    with pytest.raises(InputError, match="empty block"):
        read_particles(tmp_path / "e.star")


def test_the_real_sets_are_understood(shared_data):
    old = read_particles(shared_data / "apoferritin" / "apof_48px_3.0A_relion30.star")
    new = read_particles(shared_data / "apoferritin" / "apof_48px_3.0A_relion31.star")
    assert len(old) == len(new) == 2712
    np.testing.assert_allclose(old.pixel_size_angst, new.pixel_size_angst)
    np.testing.assert_allclose(old.ctf.defocus_u_angst, new.ctf.defocus_u_angst)
    assert np.array_equal(old.slice_of, new.slice_of)
    assert read_particles(shared_data / "bgal" / "bgal_40px_9.56A.star").ctf is None
