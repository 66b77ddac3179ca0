"""A selection on another extraction: the same particles, and the same psi and places in the micrograph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryo_svae.cli import main
from cryo_svae.formats.mrc import read_images, write_stack
from cryo_svae.formats.star import read_star, write_tables
from cryo_svae.imaging import geometry
from cryo_svae.simulate import render
from tests.conftest import image_names, optics_columns
from tests.cryosparc_files import locations, particle_fields, pose_2d, save_cs

N = 8
FINE, COARSE = 2.0, 4.0  # Å a pixel of the micrograph, and of the job's binned images
GENERATOR = np.random.default_rng(5)
PICKED = GENERATOR.permutation(np.mgrid[70:500:120, 70:500:120].reshape(2, -1).T)[
    :N
]  # whole pixels, x and y
ORIGIN = GENERATOR.uniform(-9, 9, (N, 2))  # Å
PSI = GENERATOR.uniform(0, 360, N)


def optics(size_angst: float, box: int, **more: list[str]) -> dict[str, list[str]]:
    size = {"rlnImagePixelSize": [str(size_angst)], "rlnImageSize": [str(box)]}
    return optics_columns(1, **size, rlnMicrographOriginalPixelSize=[str(FINE)], **more)


def extracted(stack: str, places: np.ndarray, micrograph: str = "mics/a.mrc") -> dict[str, list[str]]:
    n = len(places)
    return {
        "rlnImageName": image_names(n, stack),
        "rlnMicrographName": [micrograph] * n,
        "rlnCoordinateX": [f"{x:.6f}" for x in places[:, 0]],
        "rlnCoordinateY": [f"{y:.6f}" for y in places[:, 1]],
        "rlnOpticsGroup": ["1"] * n,
    }


def found_columns(psi_deg: np.ndarray = PSI, origin_angst: np.ndarray = ORIGIN) -> dict[str, list[str]]:
    n = len(psi_deg)
    return {
        "rlnAnglePsi": [f"{each:.6f}" for each in psi_deg],
        "rlnOriginXAngst": [f"{each:.6f}" for each in origin_angst[:, 0]],
        "rlnOriginYAngst": [f"{each:.6f}" for each in origin_angst[:, 1]],
        "rlnClassNumber": [str(1 + k % 2) for k in range(n)],
        "rlnParticleFigureOfMerit": [str(0.1 * k) for k in range(n)],
        "svaeZ1": [f"{k - 3.25:.4f}" for k in range(n)],
        "svaePsiStd": ["2.5"] * n,
    }


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    particles = {**extracted("binned.mrcs", PICKED), **found_columns()}
    write_tables(folder / "particles.star", {"optics": optics(COARSE, 32), "particles": particles})
    return folder


def write_other(path, places, size_angst=FINE, **more):
    tables = {"optics": optics(size_angst, 64), "particles": {**extracted("fine.mrcs", places), **more}}
    write_tables(path, tables)
    return path


def onto(job, other, out, *more: str) -> int:
    return main(["select", str(job), "--top", "100%", "--out", str(out), "--onto", str(other), *more])


def origins(path) -> np.ndarray:
    block = read_star(path).block("particles")
    return np.column_stack([block.numbers(f"rlnOrigin{axis}Angst") for axis in "XY"])


def places_angst(path) -> np.ndarray:
    block = read_star(path).block("particles")
    return np.column_stack([block.numbers(f"rlnCoordinate{axis}") for axis in "XY"]) * FINE


def test_unbinned_particles_take_psi_and_origins_as_they_are(job, tmp_path, capsys):
    order = GENERATOR.permutation(N)
    other = write_other(
        tmp_path / "other.star", PICKED[order], rlnAnglePsi=["1"] * N, userNote=list("abcdefgh")
    )
    assert onto(job, other, tmp_path / "out.star", "--classes", "1") == 0
    said = capsys.readouterr().out
    assert "4 of 4 selected particles are in" in said
    assert "by place (at the same places)" in said
    assert "not there" not in said
    star = read_star(tmp_path / "out.star")
    block, mine = star.block("particles"), [k for k in order.tolist() if k % 2 == 0]
    assert star.block("optics").text("rlnImageSize") == ["64"]
    assert block.numbers("rlnAnglePsi") == pytest.approx(PSI[mine])
    np.testing.assert_allclose(origins(tmp_path / "out.star"), ORIGIN[mine], atol=1e-6)
    assert block.text("svaeZ1") == [f"{k - 3.25:.4f}" for k in mine]
    assert block.text("userNote") == ["abcdefgh"[order.tolist().index(k)] for k in mine]
    assert block.text("rlnImageName") == [f"{order.tolist().index(k) + 1:06d}@fine.mrcs" for k in mine]


def test_re_centred_particles_lie_where_they_lay_in_the_micrograph(job, tmp_path, capsys):
    """RELION moves the middle of the box by the origin, to whole pixels; the files' order differs too."""
    order = GENERATOR.permutation(N)
    places = PICKED - np.rint(ORIGIN / FINE)
    other = write_other(tmp_path / "other.star", places[order])
    assert onto(job, other, tmp_path / "out.star") == 0
    said = capsys.readouterr().out
    assert f"{N} of {N} selected" in said
    assert "by place (re-centred)" in said
    out = tmp_path / "out.star"
    assert np.abs(origins(out)).max() <= FINE / 2 + 1e-6
    np.testing.assert_allclose(places_angst(out) - origins(out), (PICKED * FINE - ORIGIN)[order], atol=1e-5)
    assert read_star(out).block("particles").numbers("rlnAnglePsi") == pytest.approx(PSI[order])


def test_what_is_not_there_and_what_may_be_several_is_counted_and_named(job, tmp_path, capsys):
    places = np.concatenate([PICKED[2:], PICKED[3:4] + 0.5])  # 0 and 1 are gone, 3 is there twice
    other = write_other(tmp_path / "other.star", places)
    assert onto(job, other, tmp_path / "out.star") == 0
    said = capsys.readouterr().out
    block = read_star(job / "particles.star").block("particles")
    assert f"{N - 3} of {N} selected" in said
    assert (
        f"not there: 2, of {job / 'particles.star'} line(s) {block.line_of(0)}, {block.line_of(1)}\n"
        in said
    )
    assert f"unclear: 1, of {job / 'particles.star'} line(s) {block.line_of(3)}\n" in said
    assert read_star(tmp_path / "out.star").block("particles").n_rows == N - 3


@pytest.mark.parametrize(("tolerance", "found"), [("5.9", 0), ("6.1", N), ("2.9px", 0), ("3.1px", N)])
def test_places_may_differ_by_the_tolerance(job, tmp_path, tolerance, found):
    particles = {**extracted("binned.mrcs", PICKED), **found_columns(origin_angst=np.zeros((N, 2)))}
    write_tables(job / "particles.star", {"optics": optics(COARSE, 32), "particles": particles})
    other = write_other(tmp_path / "other.star", PICKED + np.array([3.0, 0.0]))
    assert onto(job, other, tmp_path / "out.star", "--tolerance", tolerance) == (0 if found else 2)
    if found:
        np.testing.assert_allclose(origins(tmp_path / "out.star"), [[6.0, 0.0]] * N, atol=1e-6)


def test_places_that_neither_agree_nor_were_re_centred_are_said(job, tmp_path, capsys):
    other = write_other(tmp_path / "other.star", PICKED + np.array([3.0, 0.0]))
    assert onto(job, other, tmp_path / "out.star") == 0
    assert "3.0 px from the job's, and not where its origins would move them" in capsys.readouterr().out


def test_the_same_place_of_another_micrograph_is_another_particle(job, tmp_path, capsys):
    particles = {**extracted("fine.mrcs", PICKED), "rlnMicrographName": ["mics/b.mrc"] * N}
    other = tmp_path / "other.star"
    write_tables(other, {"optics": optics(FINE, 64), "particles": particles})
    assert onto(job, other, tmp_path / "out.star") == 2
    assert "none of the 8 selected particles" in capsys.readouterr().err
    particles["rlnMicrographName"] = ["MotionCorr/job020/a.mrc"] * N  # the same, from another job
    write_tables(other, {"optics": optics(FINE, 64), "particles": particles})
    assert onto(job, other, tmp_path / "out.star") == 0


def test_uids_that_both_have_find_particles_wherever_they_are(job, tmp_path, capsys):
    uids = [str(1000 + k) for k in range(N)]
    particles = {**extracted("binned.mrcs", PICKED), **found_columns(), "ucsfUid": uids}
    write_tables(job / "particles.star", {"optics": optics(COARSE, 32), "particles": particles})
    far = PICKED + np.array([90.0, -40.0])
    more = write_other(tmp_path / "other.star", far[::-1], ucsfUid=[*uids[:0:-1], "7"])
    assert onto(job, more, tmp_path / "out.star") == 0
    said = capsys.readouterr().out
    assert "7 of 8 selected" in said
    assert "by uid" in said
    np.testing.assert_allclose(
        origins(tmp_path / "out.star"), ORIGIN[:0:-1] + np.array([180.0, -80.0]), atol=1e-6
    )


def test_files_of_cryosparc_are_joined_by_uid_and_keep_their_form(tmp_path, capsys, monkeypatch):
    pytest.importorskip("cryosparc.dataset", reason="cryosparc-tools is not installed")
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).standard_normal((5, 16, 16)).astype(np.float32)
    write_stack(tmp_path / "stack.mrcs", noise, pixel_size_angst=2.5)
    here = {**particle_fields(), **locations(), "location/micrograph_psize_A": np.full(5, 1.25, "<f4")}
    path = save_cs(tmp_path / "p.cs", {**here, **pose_2d()})
    run = ["run", str(path), "--out", "job", "--epochs", "1", "--device", "cpu", "--engine", "coordinate"]
    assert main([*run, "--hidden", "8", "--encoder-hidden", "8"]) == 0
    other = {name: values[::-1].copy() for name, values in here.items()}
    other["blob/psize_A"] = np.full(5, 1.25, dtype="<f4")
    other["location/center_x_frac"] = other["location/center_x_frac"] + np.float32(2 / 60)  # two pixels
    save_cs(tmp_path / "other.cs", other)
    assert onto("job", "other.cs", "out.cs") == 0
    assert "5 of 5 selected particles are in other.cs, by uid" in capsys.readouterr().out
    before, after = np.load(tmp_path / "job" / "particles.cs"), np.load(tmp_path / "out.cs")
    assert after["uid"].tolist() == other["uid"].tolist()
    np.testing.assert_allclose(after["alignments2D/pose"], before["alignments2D/pose"][::-1], atol=1e-6)
    assert after["alignments2D/psize_A"].tolist() == [1.25] * 5
    shift = after["alignments2D/shift"] * 1.25 - before["alignments2D/shift"][::-1] * 2.5
    np.testing.assert_allclose(shift, [[2.5, 0.0]] * 5, atol=1e-4)
    np.testing.assert_allclose(after["svae/z"], before["svae/z"][::-1], rtol=1e-6)
    assert onto("job", "other.cs", "out.star") == 2
    assert "--out" in capsys.readouterr().err


def test_3d_poses_of_the_other_file_stay(job, tmp_path):
    other = write_other(tmp_path / "other.star", PICKED, rlnAngleRot=["10"] * N, rlnAnglePsi=["20"] * N)
    assert onto(job, other, tmp_path / "out.star") == 0
    block = read_star(tmp_path / "out.star").block("particles")
    assert set(block.text("rlnAnglePsi")) == {"20"}
    assert block.numbers("svaeAnglePsi") == pytest.approx(PSI)


def test_relion_30_reads_origins_in_its_own_pixels(job, tmp_path):
    particles = {
        **extracted("fine.mrcs", PICKED),
        "rlnMagnification": ["50000"] * N,
        "rlnDetectorPixelSize": ["10"] * N,
    }
    del particles["rlnOpticsGroup"]
    write_tables(tmp_path / "other.star", {"": particles})
    assert onto(job, tmp_path / "other.star", tmp_path / "out.star") == 0
    block = read_star(tmp_path / "out.star").blocks[0]
    assert block.numbers("rlnOriginX") == pytest.approx(ORIGIN[:, 0] / 2.0, abs=1e-5)


def test_without_pixel_sizes_of_micrographs_only_the_same_places_will_do(job, tmp_path, capsys):
    for path, stack, size in (("job/particles.star", "binned.mrcs", "4"), ("other.star", "fine.mrcs", "2")):
        mine = found_columns() if path.startswith("job") else {}
        tables = {
            "optics": optics_columns(rlnImagePixelSize=[size]),
            "particles": {**extracted(stack, PICKED), **mine},
        }
        write_tables(tmp_path / path, tables)
    other, out = tmp_path / "other.star", tmp_path / "out.star"
    assert onto(job, other, out) == 2
    assert "--tolerance 8px" in capsys.readouterr().err
    assert onto(job, other, out, "--tolerance", "8px") == 0
    np.testing.assert_allclose(origins(out), ORIGIN, atol=1e-6)
    write_tables(
        other,
        {
            "optics": optics_columns(rlnImagePixelSize=["2"]),
            "particles": extracted("fine.mrcs", PICKED + 1),
        },
    )
    assert onto(job, other, out, "--tolerance", "8px") == 2
    assert "no pixel size of the micrographs" in capsys.readouterr().err


def test_the_other_file_is_not_overwritten(job, tmp_path, capsys):
    other = write_other(tmp_path / "other.star", PICKED)
    assert onto(job, other, other) == 2
    assert "is the file selected from" in capsys.readouterr().err


# --- RELION extracts again, and aligns ------------------------------------------------------------


def micrograph(beads: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """Particles of an image at PICKED - ORIGIN, turned by PSI, without noise."""
    image = np.zeros((512, 512), dtype=np.float32)
    psi, box = geometry.radians(torch.from_numpy(PSI)).float(), 64
    pictures = render(
        beads.expand(N, -1, -1), weights, 2.0, psi, torch.from_numpy(ORIGIN / FINE).float(), box
    )
    for (x, y), picture in zip(PICKED.astype(int), pictures.numpy(), strict=True):
        image[y - box // 2 : y + box // 2, x - box // 2 : x + box // 2] += picture
    return image


@pytest.mark.parametrize("more", [[], ["--recenter"]], ids=["as picked", "re-centred"])
def test_relion_extracts_again_and_aligns_what_was_brought_onto_it(
    relion, job, tmp_path, more, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(3)
    beads, weights = 20.0 * (torch.rand(1, 10, 2, generator=generator) - 0.5), torch.linspace(0.5, 2.0, 10)
    (tmp_path / "mics").mkdir()
    write_stack(tmp_path / "mics" / "a.mrc", micrograph(beads, weights)[None], pixel_size_angst=FINE)
    of_micrographs = {"rlnMicrographPixelSize": [str(FINE)], "rlnMicrographOriginalPixelSize": [str(FINE)]}
    kept = {k: v for k, v in optics_columns(1, **of_micrographs).items() if not k.startswith("rlnImage")}
    table = {"rlnMicrographName": ["mics/a.mrc"], "rlnOpticsGroup": ["1"]}
    write_tables(tmp_path / "mics.star", {"optics": kept, "micrographs": table})
    write_stack(tmp_path / "binned.mrcs", np.zeros((N, 32, 32), np.float32), pixel_size_angst=COARSE)
    said = relion(
        "relion_preprocess", "--i", "mics.star", "--reextract_data_star", "job/particles.star", "--extract",
        "--extract_size", 64, "--part_dir", "again/", "--part_star", "again.star", *more, cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "again.star").exists(), said
    assert onto(job, "again.star", tmp_path / "out.star") == 0
    theirs = read_star(tmp_path / "again.star").block("particles")
    left = np.column_stack([theirs.numbers(f"rlnOrigin{axis}Angst") for axis in "XY"])
    np.testing.assert_allclose(origins(tmp_path / "out.star"), left, atol=1e-4)  # what RELION itself leaves
    relion(
        "relion_stack_create", "--i", "out.star", "--o", "aligned", "--apply_transformation", cwd=tmp_path
    )
    aligned = read_images(tmp_path / "aligned.mrcs", np.arange(N))
    reference = render(beads, weights, 2.0, torch.zeros(1), torch.zeros(1, 2), 64)[0].numpy()
    inside = (geometry.pixel_grid(64).norm(dim=-1) < 20).numpy()
    for image in aligned:
        assert np.corrcoef(image[inside], reference[inside])[0, 1] > 0.99
