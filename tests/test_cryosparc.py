"""Jobs of .cs files: the same results as of STAR files, and a .cs file that CryoSPARC's fields fill."""

from __future__ import annotations

import re

import h5py
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import skew

pytest.importorskip("cryosparc.dataset", reason="cryosparc-tools is not installed")

import cryo_svae
from cryo_svae.cli import main
from cryo_svae.errors import InputError
from cryo_svae.formats.cs import read_cs
from cryo_svae.formats.mrc import write_stack
from cryo_svae.formats.star import read_star
from cryo_svae.jobs.stages import describe
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.plausibility import ignored_aberrations
from tests.cryosparc_files import particle_fields, pose_2d, pose_3d, save_cs
from tests.test_cli import QUICK


def run(path, out, *more: str) -> int:
    return main(["run", str(path), "--out", str(out), *QUICK, *more])


@pytest.fixture
def make_cs(make_dataset, tmp_path):
    make_dataset()

    def make(name: str = "p.cs", **changes: np.ndarray):
        return save_cs(tmp_path / name, {**particle_fields(), **changes})

    return make


def test_a_job_of_a_cs_file_finds_what_a_job_of_the_star_file_finds(make_cs, tmp_path):
    path = make_cs()
    assert main(["convert", str(path), str(tmp_path / "same.star")]) == 0
    assert run(path, tmp_path / "cs") == 0
    assert run(tmp_path / "same.star", tmp_path / "star", "--invert") == 0
    for name in ("decoded.mrcs", "classes.mrcs", "model.pt"):
        assert (tmp_path / "cs" / name).exists()
    for name in ("decoded.mrcs", "classes.mrcs", "epochs.tsv"):
        a, b = ((tmp_path / job / name).read_bytes() for job in ("cs", "star"))
        if name == "epochs.tsv":  # all but the seconds
            a, b = ([line.rsplit(b"\t", 1)[0] for line in text.splitlines()] for text in (a, b))
        assert a == b, name
    a, b = (read_star(tmp_path / job / "particles.star").block("particles") for job in ("cs", "star"))
    for label in a.labels:
        assert a.text(label) == b.text(label), label


def test_the_cs_of_a_job_holds_the_input_to_the_byte_and_our_fields(make_cs, tmp_path):
    more = {**pose_2d(), "svae_note/text": np.array(["a", "b", "c", "d", "é"])}
    path, job = make_cs(**more), tmp_path / "job"
    assert run(path, job, "--classes", "2") == 0
    before, after = np.load(path), np.load(job / "particles.cs")
    ours = {name for name in after.dtype.names if name not in before.dtype.names or name in pose_2d()}
    assert after.dtype.names[: len(before.dtype.names)] == before.dtype.names
    for name in set(before.dtype.names) - ours:
        assert before[name].tolist() == after[name].tolist(), name
        assert before[name].dtype.kind == "S" or before[name].tobytes() == after[name].tobytes(), name
    with h5py.File(job / "latents.h5") as file:
        np.testing.assert_allclose(np.degrees(after["alignments2D/pose"]), file["psi_deg"], rtol=1e-6)
        size = after["alignments2D/psize_A"][:, None]
        np.testing.assert_allclose(after["alignments2D/shift"] * size, file["origin_angst"], atol=1e-5)
        assert np.array_equal(after["alignments2D/class"] + 1, file["class_number"])
        assert np.array_equal(after["svae/z"], file["z"])
        assert np.array_equal(after["svae/z_std"], file["z_std"])
        np.testing.assert_allclose(after["svae/log_likelihood"], file["log_likelihood"])
        probability = file["class_probability"][()]
    assert np.array_equal(after["alignments2D/class_posterior"], probability.astype("<f4"))
    assert ((probability >= 0.5) & (probability <= 1)).all()  # of two classes
    star = read_star(job / "particles.star").block("particles")
    np.testing.assert_allclose(star.numbers("rlnMaxValueProbDistribution"), probability, atol=1e-6)
    assert star.integers("rlnClassNumber").tolist() == (after["alignments2D/class"] + 1).tolist()
    assert star.text("ucsfUid") == [str(uid) for uid in before["uid"].tolist()]


def test_3d_poses_are_kept_beside_ours(make_cs, tmp_path):
    path, job = make_cs(**pose_3d()), tmp_path / "job"
    assert read_particles(path).has_3d_pose
    assert run(path, job) == 0
    after = read_cs(job / "particles.cs").fields
    assert np.array_equal(after["alignments3D/pose"], pose_3d()["alignments3D/pose"])
    assert "alignments2D/pose" in after
    block = read_star(job / "particles.star").block("particles")
    psi = np.degrees(after["alignments2D/pose"])
    np.testing.assert_allclose(block.numbers("svaeAnglePsi"), psi, atol=1e-4)


def test_a_selection_of_a_cs_job_takes_the_same_rows_of_either_file(make_cs, tmp_path, capsys):
    job = tmp_path / "job"
    assert run(make_cs(**pose_2d()), job) == 0
    best = ["--top", "60%"]
    assert main(["select", str(job), *best, "--out", str(tmp_path / "good.cs")]) == 0
    assert "3 of 5" in capsys.readouterr().out
    assert main(["select", str(job), *best, "--out", str(tmp_path / "good.star")]) == 0
    few, every = np.load(tmp_path / "good.cs"), np.load(job / "particles.cs")
    uids = read_star(tmp_path / "good.star").block("particles").text("ucsfUid")
    assert [str(uid) for uid in few["uid"].tolist()] == uids
    rows = [every["uid"].tolist().index(uid) for uid in few["uid"].tolist()]
    assert few.dtype.names == every.dtype.names
    assert all(few[name].tolist() == every[name][rows].tolist() for name in few.dtype.names)
    assert read_star(tmp_path / "good.star").block("optics") is not None
    assert main(["select", str(job), *best, "--out", str(job / "particles.cs")]) == 2


def test_a_cs_selection_of_a_star_job_is_refused(make_dataset, tmp_path, capsys):
    assert run(make_dataset(), tmp_path / "job") == 0
    out = tmp_path / "good.cs"
    assert main(["select", str(tmp_path / "job"), "--top", "50%", "--out", str(out)]) == 2
    assert "convert" in capsys.readouterr().err
    assert not out.exists()


def test_estimate_inspect_and_report_take_cs_files(make_cs, tmp_path, capsys):
    path, job = make_cs(), tmp_path / "job"
    assert main(["train", str(path), "--out", str(job), *QUICK]) == 0
    other = tmp_path / "other"
    assert main(["estimate", str(path), "--model", str(job / "model.pt"), "--out", str(other)]) == 0
    assert "svae/z" in read_cs(other / "particles.cs").fields
    assert "but the model was trained" not in capsys.readouterr().out
    white = make_cs("white.cs", **{"blob/sign": np.ones(5, dtype="<f4")})
    turned = tmp_path / "turned"
    assert main(["estimate", str(white), "--model", str(job / "model.pt"), "--out", str(turned)]) == 0
    assert "white (blob/sign), but the model was trained with --invert" in capsys.readouterr().out
    assert main(["report", str(other)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(path), "--out", str(tmp_path / "m.png")]) == 0
    assert "CryoSPARC, protein dark (blob/sign)" in capsys.readouterr().out


def test_the_ctf_may_lie_in_a_passthrough_file(make_cs, tmp_path):
    fields = particle_fields()
    ctf = {name: values for name, values in fields.items() if name.startswith("ctf/")}
    bare = {name: values for name, values in fields.items() if name not in ctf}
    path = save_cs(tmp_path / "bare.cs", bare)
    more = save_cs(tmp_path / "more.cs", {"uid": fields["uid"], **ctf})
    assert read_particles(path).ctf is None
    assert read_particles(path, passthrough=more).ctf is not None
    assert cryo_svae.load(path, passthrough=more).ctf is not None
    job = tmp_path / "job"
    assert run(path, job, "--passthrough", str(more), "--ctf") == 0
    assert "ctf/df1_A" in read_cs(job / "particles.cs").fields
    assert "more.cs" in (job / "run.json").read_text()
    assert main(["report", str(job)]) == 0


ANISOMAG = np.array([0.03, 0.01, -0.005, -0.02], dtype="<f4")


def test_anisotropic_magnification_is_modelled_with_the_identity_that_the_file_leaves_out(make_cs):
    particles = read_particles(make_cs(**{"ctf/anisomag": np.tile(ANISOMAG, (5, 1))}))
    np.testing.assert_allclose(
        particles.magnification, np.tile([1.03, 0.01, -0.005, 0.98], (5, 1)), rtol=1e-6
    )
    assert "5 distorted" in "".join(describe(particles))
    assert ignored_aberrations(particles, 2.5) == []


def test_groups_of_one_number_are_parted_by_their_magnification(make_cs):
    """Particles 1 and 3 are of exposure group 7, 2 and 4 of group 8: RELION's matrix is one of a group."""
    anisomag = np.outer([0, 1, 0, 1, 2], ANISOMAG).astype("<f4")
    particles = read_particles(make_cs(**{"ctf/anisomag": anisomag}))
    np.testing.assert_allclose(particles.magnification, anisomag + np.eye(2).ravel(), atol=1e-7)
    assert particles.optics_group.tolist() == [0, 2, 0, 2, 1]


def test_a_matrix_with_the_identity_left_in_is_refused_in_words_of_its_file(make_cs):
    with pytest.raises(InputError, match=r"ctf/anisomag: found 2, .*\n.*0, 0, 0, 0 in .cs"):
        read_particles(make_cs(**{"ctf/anisomag": np.tile([1, 0, 0, 1], (5, 1)).astype("<f4")}))


@pytest.mark.parametrize(
    ("field", "values", "degrees"),
    [  # of coma a third is left when a shift has made up for what it can
        ("ctf/tilt_A", [30000, 0], 360 / 3 * 30000 * 0.0196875**2 / 8),
        ("ctf/trefoil_A", [0, 30000], 360 / 3 * 30000 * 0.0196875**2 / 8),
        ("ctf/tetra_A", [0, 300000, 0, 0], 360 * 300000 * 0.0196875**3 / 16),
        ("ctf/tetra_A", [0, 0, 3000000, 0], 360 / 4 * 3000000 * 0.0196875**3 / 16),
    ],
)
def test_aberrations_are_named_where_they_matter(make_cs, field, values, degrees):
    particles = read_particles(make_cs(**{field: np.tile(values, (5, 1)).astype("<f4")}))
    assert ignored_aberrations(particles, 10.0) == []
    (line,) = ignored_aberrations(particles, 1.0)
    assert field in line
    assert float(re.search(r"up to (\d+)°", line).group(1)) == pytest.approx(degrees, rel=0.15)


def test_blob_sign_decides_the_contrast_unless_told_otherwise(make_cs, tmp_path):
    def inverted(path, *more: str) -> str:
        job = tmp_path / f"{path.stem}{len(more)}"
        assert main(["train", str(path), "--out", str(job), *QUICK, *more]) == 0
        return (job / "config.yaml").read_text()

    dark, white = make_cs("dark.cs"), make_cs("white.cs", **{"blob/sign": np.ones(5, dtype="<f4")})
    assert "invert: true" in inverted(dark)
    assert "invert: false" in inverted(white)
    assert "invert: false" in inverted(dark, "--no-invert")
    with pytest.raises(InputError, match="both signs"):
        read_particles(make_cs("mixed.cs", **{"blob/sign": np.array([1, -1, 1, 1, 1], dtype="<f4")}))


def test_mistakes_are_told_by_field_and_row(make_cs, tmp_path):
    df = particle_fields()["ctf/df1_A"]
    df[2] = np.nan
    cases = {
        "blob/path, row 1: found stack 'gone.mrcs'": {"blob/path": np.array([">gone.mrcs"] * 5)},
        "blob/path, row 4: found slice 6": {"blob/idx": np.array([0, 1, 2, 5, 4], dtype="<u4")},
        "ctf/df1_A, row 3: found 'nan'": {"ctf/df1_A": df},
        "alignments2D/pose, row 2: found 'nan'": {
            "alignments2D/pose": np.array([0, np.nan, 1, 2, 3], dtype="<f4")
        },
        "blob/shape, row 1: found 20 x 20 px": {"blob/shape": np.full((5, 2), 20, dtype="<u4")},
        "blob/psize_A: found a pixel size of 0": {"blob/psize_A": np.zeros(5, dtype="<f4")},
    }
    for expected, changes in cases.items():
        with pytest.raises(InputError) as caught:
            read_particles(make_cs("bad.cs", **changes))
        assert f"bad.cs: column {expected}" in str(caught.value)


def test_junk_images_are_told_by_row(make_cs, tmp_path, capsys):
    images = np.random.default_rng(0).normal(size=(5, 16, 16)).astype(np.float32)
    images[4] = np.nan
    write_stack(tmp_path / "stack.mrcs", images, pixel_size_angst=2.5)
    assert main(["inspect", str(make_cs()), "--out", str(tmp_path / "m.png")]) == 0
    assert "1 NaN or constant (row 1)" in capsys.readouterr().out


def test_a_passthrough_file_of_a_star_file_is_refused(make_dataset, tmp_path):
    with pytest.raises(InputError, match="--passthrough"):
        read_particles(make_dataset(), passthrough=tmp_path / "more.cs")


def test_the_real_files_with_images_are_understood(shared_data):
    a = read_particles(shared_data / "small" / "empiar_10076_7.cs")
    b = read_particles(shared_data / "small" / "empiar_10076_7.star")
    assert a.is_dark
    assert np.array_equal(a.slice_of, b.slice_of)
    np.testing.assert_allclose(a.pixel_size_angst, b.pixel_size_angst, rtol=1e-6)
    for name, values in a.ctf.columns().items():
        np.testing.assert_allclose(values.numpy(), getattr(b.ctf, name).numpy(), rtol=1e-6)


def test_the_protein_is_dark_in_real_images_whose_sign_is_minus_1(shared_data):
    particles = read_particles(shared_data / "small" / "empiar_10076_7.cs")
    images = gaussian_filter(ImageSource(particles).read(np.arange(7)), (0, 6, 6))
    y, x = np.mgrid[:320, :320] - 160
    inside = images[:, np.hypot(x, y) * 1.31 < 125]  # Å: the ribosome's circle
    assert particles.is_dark
    assert (skew(inside, axis=1) < 0).all()  # its projections reach further to the dark side


@pytest.mark.parametrize("name", ["J2_particles_exported", "P12_J24_001_particles"])
def test_real_files_without_their_images_name_the_first_stack(shared_data, name):
    with pytest.raises(InputError, match="blob/path, row 1: found stack 'J"):
        read_particles(shared_data / "star_zoo" / "cryodrgn" / f"cryosparc_{name}.cs")
