"""Poses that the input holds: kept, or searched about; undone in the images and put back in the results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryo_svae.cli import main
from cryo_svae.formats.star import Numbers, read_star, write_star, write_tables
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable, ctf_2d
from cryo_svae.learning.checkpoint import load_checkpoint
from cryo_svae.particles.known_poses import KnownPoses, known_poses
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.preprocessing import Preparation
from cryo_svae.simulate import render
from tests.conftest import image_names
from tests.cryosparc_files import particle_fields, pose_2d, save_cs

ENGINES = ("steerable", "coordinate")
SMALL = {
    "steerable": [],
    "coordinate": ["--engine", "coordinate", "--hidden", "8", "--encoder-hidden", "8"],
}
PSI = ["-170", "12.5", "0", "359", "90"]
ORIGIN_X, ORIGIN_Y = ["1.5", "-2.5", "0", "7.25", "3"], ["0.5", "4.5", "-6", "0", "1"]
POSES = {"rlnAnglePsi": PSI, "rlnOriginXAngst": ORIGIN_X, "rlnOriginYAngst": ORIGIN_Y}
PLAN = Preparation(
    box_px=16, pixel_size_angst=2.5, mask_diameter_angst=35.0, invert=False, known_pose="fixed"
)


def run(star, out, *more: str) -> int:
    quick = ["--epochs", "1", "--device", "cpu", "--threads", "1"]
    return main(["run", str(star), "--out", str(out), *quick, *more])


def poses_of(path) -> tuple[np.ndarray, np.ndarray]:
    block = read_star(path).block("particles")
    return block.numbers("rlnAnglePsi"), np.column_stack(
        [block.numbers(f"rlnOrigin{axis}Angst") for axis in "XY"]
    )


def turn_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs((a - b + 180.0) % 360.0 - 180.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_fixed_poses_are_those_of_the_input(make_dataset, tmp_path, engine):
    star = make_dataset(particles=POSES)
    assert run(star, tmp_path / "job", "--pose", "fixed", *SMALL[engine]) == 0
    psi, origin = poses_of(tmp_path / "job" / "particles.star")
    assert turn_deg(psi, np.array(PSI, float)).max() < 1e-4
    np.testing.assert_allclose(origin, np.array([ORIGIN_X, ORIGIN_Y], float).T, atol=1e-5)
    block = read_star(tmp_path / "job" / "particles.star").block("particles")
    assert not block.numbers("svaePsiStd").any()
    assert not block.numbers("svaeOriginStdAngst").any()


def test_steerable_poses_stay_within_the_ranges_about_the_input(make_dataset, tmp_path):
    star = make_dataset(particles=POSES)
    ranges = ["--psi-range", "25", "--shift-range", "4"]
    assert run(star, tmp_path / "job", "--pose", "prior", *ranges) == 0
    psi, origin = poses_of(tmp_path / "job" / "particles.star")
    assert 0.0 < turn_deg(psi, np.array(PSI, float)).max() < 25.5
    far = np.hypot(*(origin - np.array([ORIGIN_X, ORIGIN_Y], float).T).T)
    assert 0.0 < far.max() < 5.0  # the last grid of origins reaches a little farther


@pytest.mark.parametrize("style", ["3.0", "cs"])
def test_poses_are_read_from_any_file(make_dataset, tmp_path, style):
    make_dataset()
    if style == "3.0":
        table = {"rlnImageName": image_names(5), "rlnAnglePsi": PSI, "rlnOriginX": ORIGIN_X}
        pixel = {"rlnMagnification": ["40000"] * 5, "rlnDetectorPixelSize": ["10"] * 5}
        path = tmp_path / "old.star"
        write_tables(path, {"": {**table, **pixel}})
        expected = np.array(PSI, float), np.array([ORIGIN_X, [0] * 5], float).T
    else:
        fields = {**particle_fields(), **pose_2d()}
        path = save_cs(tmp_path / "p.cs", fields)
        expected = np.degrees(fields["alignments2D/pose"]), fields["alignments2D/shift"]
    poses = known_poses(read_particles(path), PLAN)
    assert turn_deg(geometry.degrees(poses.psi_rad).numpy(), expected[0]).max() < 1e-4
    np.testing.assert_allclose(poses.origin_px.numpy(), expected[1], atol=1e-5)


def ctf_table(n: int) -> CtfTable:
    values = {
        "pixel_size_angst": 4.0, "voltage_kv": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1,
        "defocus_u_angst": 9000.0, "defocus_v_angst": 5000.0, "defocus_angle_rad": 0.4,
        "phase_shift_rad": 0.0,
    }  # fmt: skip
    return CtfTable(**{name: torch.full((n,), value).double() for name, value in values.items()})


def test_undone_images_are_references_under_the_turned_ctf():
    n, box = 8, 64
    generator = torch.Generator().manual_seed(2)
    psi, origin = torch.linspace(-3.0, 3.0, n), 3.0 * torch.randn(n, 2, generator=generator)
    dots, weights = 14.0 * (torch.rand(1, 8, 2, generator=generator) - 0.5), torch.linspace(0.5, 2.0, 8)
    ctf, poses = ctf_table(n), KnownPoses(psi.double(), origin.double())

    def seen(images: torch.Tensor, table: CtfTable) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(images) * ctf_2d(table, box).float(), s=(box, box))

    posed = seen(render(dots.expand(n, -1, -1), weights, 2.0, psi, origin, box), ctf)
    reference = render(dots, weights, 2.0, torch.zeros(1), torch.zeros(1, 2), box).expand(n, -1, -1)
    expected = seen(reference, poses.turned(ctf))
    row = torch.arange(n)
    undone = poses.undone(posed, row)
    inside = geometry.pixel_grid(box).norm(dim=-1) < 20
    error = (undone - expected)[:, inside].norm(dim=1) / expected[:, inside].norm(dim=1)
    assert error.max() < 0.02
    found, where = poses.then(row, torch.zeros(n), torch.zeros(n, 2))
    torch.testing.assert_close(found, psi.double())
    torch.testing.assert_close(where, origin.double())


@pytest.mark.parametrize("pose", ["fixed", "prior"])
def test_what_is_missing_or_given_twice_is_said(make_dataset, tmp_path, capsys, pose):
    assert run(make_dataset(), tmp_path / "job", "--pose", pose) == 2
    assert "_rlnAnglePsi: found no known poses" in capsys.readouterr().err
    star = make_dataset(particles=POSES)
    assert run(star, tmp_path / "job2", "--pose", pose, "--max-shift", "7") == 2
    assert "--shift-range" in capsys.readouterr().err
    far = {**POSES, "rlnOriginXAngst": ["21", *ORIGIN_X[1:]]}
    assert run(make_dataset(particles=far), tmp_path / "job3", "--pose", pose) == 2
    assert "an origin of 21 Å" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
def test_a_job_repeats_from_its_settings_and_estimates_as_it_was_trained(make_dataset, tmp_path, engine):
    star = make_dataset(particles=POSES)
    assert run(star, tmp_path / "job", "--pose", "prior", *SMALL[engine]) == 0
    again = ["run", "--config", str(tmp_path / "job" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    model = str(tmp_path / "job" / "model.pt")
    estimate = ["estimate", str(star), "--model", model, "--device", "cpu", "--out"]
    assert main([*estimate, str(tmp_path / "estimated")]) == 0
    psi, origin = poses_of(tmp_path / "job" / "particles.star")
    for name in ("again", "estimated"):
        theirs = poses_of(tmp_path / name / "particles.star")
        assert turn_deg(psi, theirs[0]).max() < 1e-4
        np.testing.assert_allclose(theirs[1], origin, atol=1e-4)
    assert main([*estimate, str(tmp_path / "kept"), "--pose", "fixed"]) == 0
    assert turn_deg(poses_of(tmp_path / "kept" / "particles.star")[0], np.array(PSI, float)).max() < 1e-4


def test_a_model_keeps_poses_as_far_as_it_was_trained_to(make_dataset, tmp_path, capsys):
    star = make_dataset(particles=POSES)
    assert run(star, tmp_path / "free") == 0
    estimate = ["estimate", str(star), "--device", "cpu", "--model"]
    near = [str(tmp_path / "free" / "model.pt"), "--pose", "prior", "--psi-range", "15"]
    assert main([*estimate, *near, "--out", str(tmp_path / "near")]) == 0
    psi, _ = poses_of(tmp_path / "near" / "particles.star")
    assert turn_deg(psi, np.array(PSI, float)).max() < 15.5
    assert run(star, tmp_path / "fixed", "--pose", "fixed") == 0
    assert load_checkpoint(tmp_path / "fixed" / "model.pt").preparation.known_pose == "fixed"
    for pose in ("free", "prior"):
        other = [str(tmp_path / "fixed" / "model.pt"), "--pose", pose, "--out", str(tmp_path / pose)]
        assert main([*estimate, *other, *(["--overwrite"] if pose == "free" else [])]) == 2
        assert "trained with --pose fixed" in capsys.readouterr().err


def test_known_poses_teach_more_and_near_ones_are_found(tmp_path):
    """Of a hinge in every rotation, off centre: content is known better than without, and a pose off by 15
    degrees and 5 Å is mended.
    """
    n = 600
    size = ["--n-particles", str(n), "--box", "32", "--snr", "0.5", "--shift-std-px", "2"]
    assert main(["simulate", "--out", str(tmp_path / "set"), *size]) == 0
    truth = tmp_path / "set" / "truth.star"
    psi, origin = poses_of(truth)
    content = read_star(truth).block("particles").numbers("svaeTrueConformation1")
    random = np.random.default_rng(0)
    off = {"rlnAnglePsi": psi + random.uniform(-15, 15, n)}
    shift = random.uniform(-5, 5, (n, 2))
    off |= {f"rlnOrigin{axis}Angst": origin[:, k] + shift[:, k] for k, axis in enumerate("XY")}
    columns = {label: Numbers(values, "%.6f") for label, values in off.items()}
    write_star(tmp_path / "set" / "near.star", read_star(truth), block="particles", columns=columns)
    r_z = {}
    for name, file in (("fixed", "truth"), ("prior", "near"), ("free", "near")):
        more = ["--z-dim", "1", "--pose", name, "--epochs", "16"]
        assert run(tmp_path / "set" / f"{file}.star", tmp_path / name, *more) == 0
        block = read_star(tmp_path / name / "particles.star").block("particles")
        r_z[name] = abs(np.corrcoef(block.numbers("svaeZ1"), content)[0, 1])
    found, where = poses_of(tmp_path / "prior" / "particles.star")
    assert np.median(turn_deg(found, psi)) < 5.0 < np.median(turn_deg(off["rlnAnglePsi"], psi))
    assert np.sqrt(np.square(where - origin).mean()) < 2.0 < np.sqrt(np.square(shift).mean())
    assert min(r_z["fixed"], r_z["prior"]) > max(0.88, r_z["free"])


def test_a_model_of_an_earlier_version_finds_poses_freely(make_dataset, tmp_path):
    star, model = make_dataset(particles=POSES), tmp_path / "job" / "model.pt"
    assert run(star, tmp_path / "job", *SMALL["coordinate"]) == 0
    content = torch.load(model, weights_only=True)
    del content["preparation"]["known_pose"]
    torch.save(content, model)
    assert load_checkpoint(model).preparation.known_pose is None
    assert known_poses(read_particles(star), load_checkpoint(model).preparation) is None
