"""convert: the same particles in the other form, and a word for everything that stays behind."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

pytest.importorskip("cryosparc.dataset", reason="cryosparc-tools is not installed")

from cryo_svae.cli import main
from cryo_svae.formats.cs import read_cs
from cryo_svae.formats.mrc import read_images, write_stack
from cryo_svae.formats.star import read_star, write_tables
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from tests.conftest import image_names, optics_columns
from tests.cryosparc_files import locations, particle_fields, pose_2d, pose_3d, save_cs

MICROGRAPH = np.zeros((1, 40, 60), dtype=np.float32)
STAR = {
    "rlnImageName": [f"{5 - k:06d}@stack.mrcs" for k in range(5)],
    "rlnOpticsGroup": ["2", "1", "2", "1", "1"],
    "rlnDefocusU": ["15000.5", "16001", "17002", "18003", "19004"],
    "rlnDefocusV": ["14000.5", "15001", "16002", "17003", "18004"],
    "rlnDefocusAngle": ["30", "-40.5", "12.25", "88", "0"],
    "rlnPhaseShift": ["0", "10", "20", "30", "90"],
    "rlnAnglePsi": ["-170", "12.5", "0", "359", "90"],
    "rlnOriginXAngst": ["1.5", "-2.5", "0", "7.25", "3"],
    "rlnOriginYAngst": ["0.5", "4.5", "-6", "0", "1"],
    "rlnClassNumber": ["1", "3", "2", "50", "1"],
    "rlnParticleFigureOfMerit": ["0.5", "0.25", "1", "0", "0.75"],
    "svaeZ1": ["0.5", "-1.25", "2", "0", "1e-05"],
    "svaeZ2": ["3", "-4", "5", "-6", "7"],
    "rlnMicrographName": [f"mics/{k % 2}.mrc" for k in range(5)],
    "rlnCoordinateX": ["12", "30", "44.5", "59", "0"],
    "rlnCoordinateY": ["7", "39", "22", "1.25", "13"],
    "rlnNormCorrection": ["1.01"] * 5,
    "userNote": ["a", "b", "c", "d", "e"],
}


@pytest.fixture
def star(make_dataset, tmp_path):
    (tmp_path / "mics").mkdir()
    for k in range(2):
        write_stack(tmp_path / "mics" / f"{k}.mrc", MICROGRAPH, pixel_size_angst=1.0)
    optics = optics_columns(2, rlnImagePixelSize=["2.5", "3.25"], rlnVoltage=["300", "200"])
    return make_dataset(optics=optics, particles=STAR)


def test_star_to_cs_and_back_gives_the_same_cells(star, tmp_path, capsys):
    there, back = tmp_path / "there.cs", tmp_path / "back.star"
    assert main(["convert", str(star), str(there)]) == 0
    said = capsys.readouterr().out
    assert "rlnNormCorrection, userNote" in said.splitlines()[1]
    assert len(said.splitlines()) == 2
    assert main(["convert", str(there), str(back)]) == 0
    before, after = (read_star(path) for path in (star, back))
    for label in STAR.keys() - {"rlnImageName", "rlnNormCorrection", "userNote"}:
        if label == "rlnMicrographName":
            assert after.block("particles").text(label) == STAR[label]
        else:
            np.testing.assert_array_equal(
                after.block("particles").numbers(label), before.block("particles").numbers(label), label
            )
    assert after.block("particles").text("rlnImageName") == STAR["rlnImageName"]
    for label in optics_columns():
        if label != "rlnOpticsGroupName":
            np.testing.assert_array_equal(
                after.block("optics").numbers(label), before.block("optics").numbers(label)
            )


def test_poses_ctf_and_images_are_the_same_through_either_file(star, tmp_path):
    assert main(["convert", str(star), str(tmp_path / "there.cs"), "--dark"]) == 0
    a, b = read_particles(star), read_particles(tmp_path / "there.cs")
    assert (a.is_dark, b.is_dark) == (None, True)
    assert np.array_equal(a.pixel_size_angst, b.pixel_size_angst)
    for name, values in a.ctf.columns().items():
        assert np.array_equal(values.numpy(), getattr(b.ctf, name).numpy()), name
    index = np.arange(5)
    assert np.array_equal(ImageSource(a).read(index), ImageSource(b).read(index))


@pytest.mark.parametrize("poses", [{}, pose_2d(), pose_3d(), {**pose_2d(), **pose_3d()}])
def test_cs_to_star_and_back_gives_the_same_bits(tmp_path, poses, capsys, monkeypatch):
    (tmp_path / "mics").mkdir()
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        write_stack(tmp_path / "mics" / f"{k}.mrc", MICROGRAPH, pixel_size_angst=1.0)
    fields = {**particle_fields(), **poses, **locations()}
    path = save_cs(tmp_path / "in.cs", fields)
    assert main(["convert", str(path), "between.star"]) == 0
    said = capsys.readouterr().out
    left_out = set(re.search("not carried.*: (.*)", said)[1].split(", "))
    assert main(["convert", "between.star", "out.cs", "--dark"]) == 0
    assert "not carried" not in capsys.readouterr().out
    back = read_cs(tmp_path / "out.cs").fields
    changed = {"alignments3D/shift", "alignments3D/psize_A", "alignments3D/pose"}
    for name in fields.keys() - left_out - changed:
        if fields[name].dtype.kind == "U":
            assert back[name].tolist() == [text.removeprefix(">") for text in fields[name].tolist()]
        else:
            assert back[name].tobytes() == fields[name].tobytes(), name
    assert left_out <= {
        "blob/sign",
        "blob/import_sig",
        "ctf/type",
        "ctf/scale",
        "alignments3D/class",
    }


def aberrations() -> dict[str, np.ndarray]:
    """Of exposure groups 7 and 8, as they alternate."""
    of_group = {
        "ctf/anisomag": [[0.03, 0.01, -0.005, -0.02], [0, 0.001, 0, 0]],
        "ctf/tilt_A": [[2700, -1350], [0.25, 0]],
        "ctf/trefoil_A": [[0, 0], [0, 0]],
        "ctf/tetra_A": [[0, 0, 0, 0], [0, 0, 0, 0]],
    }
    return {name: np.tile(rows, (3, 1))[:5].astype("<f4") for name, rows in of_group.items()}


def test_magnification_and_beam_tilt_go_to_optics_groups_and_back(make_dataset, tmp_path, capsys):
    make_dataset()
    fields = {**particle_fields(), **aberrations()}
    path = save_cs(tmp_path / "in.cs", fields)
    assert main(["convert", str(path), str(tmp_path / "between.star")]) == 0
    assert not re.search("not carried.*(aniso|tilt|trefoil|tetra)", capsys.readouterr().out)
    optics = read_star(tmp_path / "between.star").block("optics")
    assert optics.numbers("rlnMagMat00") == pytest.approx([1.03, 1])
    assert optics.numbers("rlnMagMat01") == pytest.approx([0.01, 0.001])
    assert optics.numbers("rlnMagMat11") == pytest.approx([0.98, 1])
    assert optics.numbers("rlnBeamTiltX") == pytest.approx([0.1, 0.25e-7 / 2.7 * 1e3])  # mrad
    assert optics.numbers("rlnBeamTiltY") == pytest.approx([-0.05, 0])
    assert main(["convert", str(tmp_path / "between.star"), str(tmp_path / "out.cs")]) == 0
    back = read_cs(tmp_path / "out.cs").fields
    for name in aberrations():
        assert back[name].tobytes() == fields[name].tobytes(), name
    a, b = (read_particles(tmp_path / name).magnification for name in ("in.cs", "between.star"))
    np.testing.assert_allclose(a, b, rtol=1e-12)


def test_aberrations_that_have_no_counterpart_are_left_out_by_name(make_dataset, tmp_path, capsys):
    make_dataset()
    fields = {**particle_fields(), **aberrations()}
    fields["ctf/trefoil_A"] = fields["ctf/trefoil_A"] + 1
    fields["ctf/cs_mm"] = np.zeros(5, dtype="<f4")  # then a tilt has no angle
    assert main(["convert", str(save_cs(tmp_path / "in.cs", fields)), str(tmp_path / "out.star")]) == 0
    said = capsys.readouterr().out
    assert "ctf/trefoil_A" in said
    assert "ctf/tilt_A" in said
    assert "tetra" not in said


def test_coordinates_without_their_micrographs_are_left_out_by_name(star, tmp_path, capsys):
    (tmp_path / "mics" / "1.mrc").unlink()
    assert main(["convert", str(star), str(tmp_path / "out.cs")]) == 0
    said = capsys.readouterr().out
    assert "mics/1.mrc" in said
    assert "rlnCoordinateX, rlnCoordinateY" in said
    fields = read_cs(tmp_path / "out.cs").fields
    assert "location/micrograph_path" in fields
    assert "location/center_x_frac" not in fields


def test_micrographs_of_another_format_leave_coordinates_out(star, tmp_path, capsys):
    (tmp_path / "mics" / "0.mrc").write_bytes(b"a picture")
    assert main(["convert", str(star), str(tmp_path / "out.cs")]) == 0
    assert "they need mics/0.mrc as an MRC file" in capsys.readouterr().out


def test_new_uids_stay_with_their_images(star, tmp_path):
    assert main(["convert", str(star), str(tmp_path / "all.cs")]) == 0
    uids = read_cs(tmp_path / "all.cs").fields["uid"]
    assert len(set(uids.tolist())) == 5
    assert main(["convert", str(star), str(tmp_path / "again.cs")]) == 0
    assert np.array_equal(read_cs(tmp_path / "again.cs").fields["uid"], uids)


def test_relion_30_files_are_converted_from_their_pixels(make_dataset, tmp_path):
    make_dataset(3)
    table = {
        "rlnImageName": image_names(3),
        "rlnMagnification": ["50000"] * 3,
        "rlnDetectorPixelSize": ["10"] * 3,
        "rlnOriginX": ["1.5", "0", "-3"],
        "rlnOriginY": ["0", "0", "2"],
    }
    write_tables(tmp_path / "old.star", {"": table})
    assert main(["convert", str(tmp_path / "old.star"), str(tmp_path / "out.cs")]) == 0
    fields = read_cs(tmp_path / "out.cs").fields
    assert fields["alignments2D/shift"].tolist() == [[1.5, 0], [0, 0], [-3, 2]]
    assert fields["blob/psize_A"].tolist() == [2] * 3
    assert fields["blob/shape"].tolist() == [[16, 16]] * 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["particles.star", "out.star"], "a .star and a .cs file"),
        (["particles.star", "out.txt"], "a .star and a .cs file"),
        (["particles.star", "out.cs", "--passthrough", "more.cs"], "--passthrough"),
        (["particles.cs", "out.star", "--dark"], "--dark"),
        (["gone.star", "out.cs"], "gone.star"),
        (["gone.cs", "out.star"], "gone.cs"),
    ],
)
def test_what_cannot_be_converted_is_refused(star, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("uids", [["1", "2", "3", "4", "4"], ["1", "2", "3", "4", "x"]])
def test_uids_that_are_none_are_refused(make_dataset, tmp_path, capsys, uids):
    star = make_dataset(particles={"ucsfUid": uids})
    assert main(["convert", str(star), str(tmp_path / "out.cs")]) == 2
    assert "ucsfUid" in capsys.readouterr().err


def test_a_simulated_set_is_the_same_through_either_file(tmp_path):
    size = ["--n-particles", "30", "--box", "32", "--n-micrographs", "3"]
    size += ["--defocus-min-angst", "10000", "--defocus-max-angst", "20000"]
    assert main(["simulate", "--out", str(tmp_path / "set"), *size]) == 0
    truth, there = tmp_path / "set" / "truth.star", tmp_path / "set" / "truth.cs"
    assert main(["convert", str(truth), str(there)]) == 0
    a, b = read_particles(truth), read_particles(there)
    for label in ("rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"):
        np.testing.assert_allclose(b.block.numbers(label), a.block.numbers(label), rtol=1e-6, atol=1e-6)
    for name, values in a.ctf.columns().items():  # float32 holds seven digits
        np.testing.assert_allclose(values.numpy(), getattr(b.ctf, name).numpy(), rtol=1e-7)
    index = np.arange(30)
    assert np.array_equal(ImageSource(a).read(index), ImageSource(b).read(index))


def test_relion_aligns_a_converted_set_as_it_aligns_the_star_file(relion, star, tmp_path):
    assert main(["convert", str(star), str(tmp_path / "there.cs")]) == 0
    assert main(["convert", str(tmp_path / "there.cs"), str(tmp_path / "back.star")]) == 0
    for name, path in (("a", star.name), ("b", "back.star")):
        relion("relion_stack_create", "--i", path, "--o", name, "--apply_transformation", cwd=tmp_path)
    a, b = (read_images(tmp_path / f"{name}.mrcs", np.arange(5)) for name in "ab")
    assert np.ptp(a) > 0
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_relion_takes_exposure_groups_that_do_not_begin_at_1(relion, make_dataset, tmp_path):
    make_dataset()
    fields = particle_fields()
    fields["ctf/exp_group_id"][:] = 23
    path = save_cs(tmp_path / "in.cs", {**fields, **pose_2d()})
    assert main(["convert", str(path), str(tmp_path / "out.star")]) == 0
    (tmp_path / "refined").mkdir()
    options = (
        "--K 1 --iter 1 --particle_diameter 30 --ctf --j 1 --psi_step 60 --offset_range 1 --offset_step 1"
    )
    more = "--oversampling 0 --pad 1 --dont_combine_weights_via_disc"
    arguments = ["--i", "out.star", "--o", "refined/run", *options.split(), *more.split()]
    relion("relion_refine", *arguments, cwd=tmp_path)
    refined = read_star(tmp_path / "refined" / "run_it001_data.star").block("particles")
    uids = {str(uid) for uid in fields["uid"].tolist()}
    assert set(refined.text("ucsfUid")) == uids


def test_relion_reads_the_magnification_of_a_converted_set(relion, make_dataset, tmp_path):
    """It refines with it, and writes the matrix that it read."""
    make_dataset()
    path = save_cs(tmp_path / "in.cs", {**particle_fields(), **pose_2d(), **aberrations()})
    assert main(["convert", str(path), str(tmp_path / "out.star")]) == 0
    relion("relion_star_handler", "--i", "out.star", "--o", "theirs.star", cwd=tmp_path)
    ours, theirs = (read_star(tmp_path / name).block("optics") for name in ("out.star", "theirs.star"))
    for label in ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11", "rlnBeamTiltX"):
        np.testing.assert_allclose(theirs.numbers(label), ours.numbers(label), atol=1e-6)


@pytest.mark.parametrize("name", ["cryosparc_J2_particles_exported", "cryosparc_P12_J24_001_particles"])
def test_real_alignments_come_back_through_a_star_file(shared_data, tmp_path, name):
    path = shared_data / "star_zoo" / "cryodrgn" / f"{name}.cs"
    assert main(["convert", str(path), str(tmp_path / "between.star")]) == 0
    assert main(["convert", str(tmp_path / "between.star"), str(tmp_path / "out.cs"), "--dark"]) == 0
    before, after = np.load(path), np.load(tmp_path / "out.cs")
    space = "alignments2D" if "J2" in name.split("_") else "alignments3D"
    exact = ["uid", "blob/idx", "blob/shape", "blob/psize_A", "blob/sign", "ctf/exp_group_id", "ctf/df1_A"]
    exact += ["ctf/df2_A", "ctf/df_angle_rad", "ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast"]
    exact += [f"{space}/shift", f"{space}/class", f"{space}/psize_A"]
    for field in (
        [*exact, "alignments2D/pose"] if space == "alignments2D" else [*exact, "alignments3D/split"]
    ):
        assert before[field].tobytes() == after[field].tobytes(), field
    if space == "alignments3D":
        turn = (
            Rotation.from_rotvec(after[f"{space}/pose"])
            * Rotation.from_rotvec(before[f"{space}/pose"]).inv()
        )
        assert turn.magnitude().max() < 1e-6
