"""The command line as users meet it: a whole job, its refusals, and going on after an interruption."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import h5py
import mrcfile
import numpy as np
import pytest
import yaml

from cryo_svae.cli import main
from cryo_svae.formats.atomic import is_leftover
from cryo_svae.formats.mrc import read_images, read_stack_info
from cryo_svae.formats.star import read_star, write_tables
from cryo_svae.jobs import stages
from tests.conftest import image_names, optics_columns

QUICK = [
    "--engine",
    "coordinate",
    "--epochs",
    "2",
    "--hidden",
    "8",
    "--encoder-hidden",
    "8",
    "--batch-size",
    "4",
]
DEFOCUS = {"rlnDefocusU": ["15000"] * 5, "rlnDefocusV": ["14000"] * 5, "rlnDefocusAngle": ["30"] * 5}
OURS = {
    "rlnAnglePsi",
    "rlnOriginXAngst",
    "rlnOriginYAngst",
    "rlnClassNumber",
    "rlnMaxValueProbDistribution",
    "rlnParticleFigureOfMerit",
    "svaeZ1",
    "svaeZ2",
    "svaeZ1Std",
    "svaeZ2Std",
    "svaePsiStd",
    "svaeOriginStdAngst",
    "svaeLogLikelihood",
}


def run(star, out, *more: str) -> int:
    return main(["run", str(star), "--out", str(out), *QUICK, *more])


def test_a_whole_job(make_dataset, tmp_path):
    odd = {"userNote": ["0012", "1.5e-9", "nan", "00000001", "a/very/long/path_" * 9]}
    star = make_dataset(particles={**odd, **DEFOCUS})
    job = tmp_path / "job"
    assert run(star, job, "--classes", "2", "--seed", "3") == 0
    block = read_star(job / "particles.star").block("particles")
    before = read_star(star).block("particles")
    assert set(block.labels) == set(before.labels) | OURS
    for label in before.labels:
        assert block.text(label) == before.text(label)
    assert read_star(job / "particles.star").block("optics").text("rlnVoltage") == ["300.0"]
    with h5py.File(job / "latents.h5") as file:
        np.testing.assert_allclose(file["z"][:, 1], block.numbers("svaeZ2"), rtol=1e-6)
        np.testing.assert_allclose(file["origin_angst"][:, 0], block.numbers("rlnOriginXAngst"), atol=1e-5)
        assert "degrees" in file.attrs["units"]
    with mrcfile.open(job / "traversal_z1.mrcs") as mrc:
        assert mrc.is_image_stack()
        assert float(mrc.voxel_size.x) == pytest.approx(2.5)
    decoded = read_stack_info(job / "decoded.mrcs")
    assert decoded.n_images == len(set(block.text("rlnClassNumber")))
    assert decoded.voxel_size_angst == pytest.approx(2.5)
    assert read_images(job / "traversal_z2.mrcs", np.arange(11)).shape == (11, 16, 16)
    record = json.loads((job / "run.json").read_text())
    assert record["seed"] == 3
    assert len(record["inputs"]["sha256"]) == 64
    page = (job / "report.html").read_text()
    assert "particles.star" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (job / "epochs.tsv").read_text().splitlines()[0].startswith("epoch\telbo")


def test_a_run_repeats_from_its_own_config(make_dataset, tmp_path):
    star = make_dataset()
    assert run(star, tmp_path / "a") == 0
    assert main(["run", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    for name in ("particles.star", "latents.h5", "decoded.mrcs", "config.yaml"):
        a, b = (tmp_path / job / name for job in "ab")
        assert a.read_bytes() == b.read_bytes(), name


def test_interrupted_jobs_resume_to_the_same_files(make_dataset, tmp_path, monkeypatch, capsys):
    star = make_dataset()
    assert run(star, tmp_path / "whole") == 0
    save = stages.save_checkpoint

    def save_then_interrupt(path, checkpoint):
        save(path, checkpoint)
        if checkpoint.epochs_done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "save_checkpoint", save_then_interrupt)
    assert run(star, tmp_path / "job") == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["run", "--out", str(tmp_path / "job"), "--resume"]) == 0
    for name in ("particles.star", "latents.h5", "decoded.mrcs"):
        assert (tmp_path / "job" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_resuming_with_other_settings_is_refused(make_dataset, tmp_path, capsys):
    star = make_dataset()
    assert run(star, tmp_path / "job") == 0
    assert run(star, tmp_path / "job", "--resume", "--z-dim", "3") == 2
    assert "--z-dim" in capsys.readouterr().err


def test_results_are_not_written_over_unless_asked(make_dataset, tmp_path, capsys):
    star = make_dataset()
    assert run(star, tmp_path / "job") == 0
    before = (tmp_path / "job" / "particles.star").read_bytes()
    assert run(star, tmp_path / "job", "--seed", "5") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "job" / "particles.star").read_bytes() == before
    assert run(star, tmp_path / "job", "--seed", "5", "--overwrite") == 0
    assert (tmp_path / "job" / "particles.star").read_bytes() != before


def test_train_then_estimate_is_run(make_dataset, tmp_path):
    star = make_dataset()
    assert run(star, tmp_path / "run") == 0
    assert main(["train", str(star), "--out", str(tmp_path / "train"), *QUICK]) == 0
    assert not (tmp_path / "train" / "particles.star").exists()
    model = tmp_path / "train" / "model.pt"
    assert main(["estimate", str(star), "--model", str(model), "--out", str(tmp_path / "estimate")]) == 0
    ours, theirs = (tmp_path / job / "particles.star" for job in ("run", "estimate"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_junk_images_are_carried_through_with_merit_and_pose_zero(make_dataset, tmp_path, capsys):
    images = np.random.default_rng(0).standard_normal((6, 16, 16)).astype(np.float32)
    images[1, 4, 4] = np.nan
    images[4] = 3.0
    star = make_dataset(6, images=images)
    assert run(star, tmp_path / "job") == 0
    assert "2 image(s) hold NaN or are constant" in capsys.readouterr().out
    block = read_star(tmp_path / "job" / "particles.star").block("particles")
    for label in (
        "rlnParticleFigureOfMerit",
        "rlnAnglePsi",
        "rlnOriginXAngst",
        "rlnOriginYAngst",
        "svaeZ1",
    ):
        assert block.numbers(label)[[1, 4]].tolist() == [0.0, 0.0]
    assert (block.numbers("svaePsiStd")[[0, 2, 3, 5]] > 0).all()
    assert (block.integers("rlnClassNumber") >= 1).all()


def test_all_junk_is_an_error(make_dataset, tmp_path, capsys):
    star = make_dataset(3, images=np.ones((3, 16, 16), dtype=np.float32))
    assert run(star, tmp_path / "job") == 2
    assert "every image" in capsys.readouterr().err


def test_three_d_poses_are_kept_unless_told_otherwise(make_dataset, tmp_path):
    star = make_dataset(particles={"rlnAngleRot": ["0010.5"] * 5, "rlnAnglePsi": ["1.25e1"] * 5})
    assert run(star, tmp_path / "kept") == 0
    kept = read_star(tmp_path / "kept" / "particles.star").block("particles")
    assert kept.text("rlnAnglePsi") == ["1.25e1"] * 5
    assert {"svaeAnglePsi", "svaeOriginXAngst", "svaeOriginYAngst"} <= set(kept.labels)
    assert run(star, tmp_path / "over", "--overwrite-pose") == 0
    over = read_star(tmp_path / "over" / "particles.star").block("particles")
    assert over.text("rlnAnglePsi") == [f"{x:.6f}" for x in kept.numbers("svaeAnglePsi")]
    assert over.text("rlnAngleRot") == ["0010.5"] * 5


def test_dark_protein_is_warned_of(make_dataset, tmp_path, capsys):
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:16, :16] - 8
    dark = -np.exp(-(x**2 + y**2) / 18) + 0.3 * rng.standard_normal((30, 16, 16))
    star = make_dataset(30, images=dark.astype(np.float32))
    assert run(star, tmp_path / "a") == 0
    assert "add --invert" in capsys.readouterr().out
    assert run(star, tmp_path / "b", "--invert") == 0
    assert "invert" not in json.loads((tmp_path / "b" / "run.json").read_text())["warnings"]


def _break(case, make_dataset, tmp_path):
    """Bad input of each kind; the arguments of the run."""
    star = make_dataset()
    if case == "missing file":
        return [tmp_path / "gone.star"]
    if case == "missing stack":
        (tmp_path / "stack.mrcs").unlink()
    elif case == "slice past the end":
        make_dataset(particles={"rlnImageName": [*image_names(4), "000006@stack.mrcs"]})
    elif case == "no rlnImageName":
        write_tables(star, {"optics": optics_columns(), "particles": {"rlnOpticsGroup": ["1"]}})
    elif case == "no pixel size":
        optics = optics_columns()
        del optics["rlnImagePixelSize"]
        make_dataset(optics=optics)
    elif case == "ragged row":
        text = star.read_text().rstrip().splitlines()
        star.write_text("\n".join([*text[:-1], text[-1].split()[0]]) + "\n")
    elif case == "text in a numeric column":
        make_dataset(optics=optics_columns(rlnImagePixelSize=["abc"]))
    elif case == "odd box":
        make_dataset(images=np.zeros((5, 15, 15), dtype=np.float32))
    elif case == "truncated MRC":
        stack = tmp_path / "stack.mrcs"
        stack.write_bytes(stack.read_bytes()[:-100])
    elif case == "not an MRC":
        (tmp_path / "stack.mrcs").write_bytes(b"\x89PNG\r\n" * 500)
    elif case == "empty particle block":
        write_tables(star, {"optics": optics_columns(), "particles": {"rlnImageName": []}})
    elif case == "an MRC for a STAR file":
        return [tmp_path / "stack.mrcs"]
    elif case == "unknown setting":
        (tmp_path / "c.yaml").write_text("zdim: 3\n")
        return [star, "--config", tmp_path / "c.yaml"]
    elif case == "wrong type of setting":
        (tmp_path / "c.yaml").write_text("z_dim: many\n")
        return [star, "--config", tmp_path / "c.yaml"]
    elif case == "bad value":
        return [star, "--z-dim", "0"]
    elif case == "CTF asked for, none there":
        return [star, "--ctf"]
    elif case == "another engine's option":
        return [star, "--engine", "steerable"]
    elif case == "out is a file":
        return [star, "--out", star]
    elif case == "no cuda":
        return [star, "--device", "cuda"]
    return [star]


MESSAGES = {
    "missing file": "gone.star",
    "missing stack": "stack.mrcs",
    "slice past the end": "slice 6",
    "no rlnImageName": "_rlnImageName",
    "no pixel size": "--pixel-size",
    "ragged row": "particles.star:",
    "text in a numeric column": "abc",
    "odd box": "even number of pixels",
    "truncated MRC": "stack.mrcs",
    "not an MRC": "stack.mrcs",
    "empty particle block": "empty block",
    "an MRC for a STAR file": "stack.mrcs",
    "unknown setting": "zdim",
    "wrong type of setting": "z_dim",
    "bad value": "--z-dim",
    "CTF asked for, none there": "--ctf",
    "another engine's option": "--hidden",
    "out is a file": "--out",
    "no cuda": "--device",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_bad_input_gets_one_clear_message_and_exit_code_2(case, make_dataset, tmp_path, capsys):
    if case == "no cuda" and stages.torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    arguments = _break(case, make_dataset, tmp_path)
    out = tmp_path / "job"
    code = main(["run", *QUICK, "--out", str(out), *map(str, arguments)])
    said = capsys.readouterr().err
    assert code == 2
    assert MESSAGES[case] in said
    assert "To mend" in said
    assert "Traceback" not in said
    assert said.count("cryo-svae: ") == 1
    assert not list(out.glob("particles.star")) if out.is_dir() else True


def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(make_dataset, tmp_path, capsys):
    star = make_dataset()
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("no right to mount a small tmpfs here")
    try:
        assert run(star, mount / "job") == 2
        said = capsys.readouterr().err
        assert "No space left" in said
        assert not (mount / "job" / "particles.star").exists()
        assert not [path for path in (mount / "job").iterdir() if is_leftover(path)]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_an_unwritable_place_is_one_message(make_dataset, capsys):
    assert run(make_dataset(), "/proc/job") == 2
    assert "/proc/job" in capsys.readouterr().err


def test_inspect_says_what_was_understood_and_draws_it(make_dataset, tmp_path, capsys):
    star = make_dataset(particles=DEFOCUS)
    assert main(["inspect", str(star), "--out", str(tmp_path / "m.png")]) == 0
    said = capsys.readouterr().out
    for words in (
        "5 in 1 stack",
        "optics1",
        "16 px",
        "2.5 Å",
        "1.45 to 1.45 µm",
        "300 kV",
        "NaN or constant",
    ):
        assert words in said
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_the_console_script_starts_without_torch_warnings():
    script = shutil.which("cryo-svae")
    command = (
        [script] if script else [sys.executable, "-c", "from cryo_svae.cli import entry_point as e; e()"]
    )
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cryo_svae ")
    assert done.stderr == ""


def test_config_yaml_holds_what_was_resolved(make_dataset, tmp_path):
    assert run(make_dataset(), tmp_path / "job") == 0
    settings = yaml.safe_load((tmp_path / "job" / "config.yaml").read_text())
    assert settings["box"] == 16
    assert settings["ctf"] is False
    assert settings["epochs"] == 2
    assert settings["mask_diameter"] == 35.0


def test_a_selection_of_a_job_is_a_particle_file(make_dataset, tmp_path, capsys):
    assert run(make_dataset(12), tmp_path / "job", "--classes", "2") == 0
    out = tmp_path / "best.star"
    assert main(["select", str(tmp_path / "job"), "--out", str(out), "--top", "50%"]) == 0
    assert "6 of 12 particles" in capsys.readouterr().out
    chosen, everything = (
        read_star(path).block("particles") for path in (out, tmp_path / "job" / "particles.star")
    )
    worst = np.sort(everything.numbers("rlnParticleFigureOfMerit"))[-6]
    assert (chosen.numbers("rlnParticleFigureOfMerit") >= worst).all()
    assert read_star(out).block("optics").text("rlnVoltage") == ["300.0"]
    assert main(["select", str(tmp_path / "job"), "--out", str(out)]) == 2
    assert main(["select", str(tmp_path), "--out", str(out), "--classes", "1"]) == 2


def test_averages_stand_beside_the_decoded_classes(make_dataset, tmp_path):
    assert run(make_dataset(30), tmp_path / "job", "--classes", "2") == 0
    classes = read_star(tmp_path / "job" / "classes.star").block("classes")
    decoded, averaged = (
        read_images(tmp_path / "job" / f"{name}.mrcs", np.arange(classes.n_rows))
        for name in ("decoded", "classes")
    )
    assert decoded.shape == averaged.shape
    assert classes.integers("svaeNrParticles").sum() == 30
    assert classes.numbers("svaeMontageAnglePsi")[0] == 0
    assert (tmp_path / "job" / "Class2D" / "run_it025_model.star").exists()


def test_the_latent_space_is_decoded_and_averaged_anywhere(make_dataset, tmp_path, capsys):
    job = tmp_path / "job"
    assert run(make_dataset(30), job) == 0
    capsys.readouterr()
    assert main(["average", str(job), "--z=0.5,-1"]) == 0
    assert main(["average", str(job), "--along", "z2"]) == 0
    assert main(["average", str(job), "--along", "pc1"]) == 0
    names = [name.rsplit("/", 1)[1] for name in capsys.readouterr().out.split()]
    for name, n in zip(names, (1, 1, 11, 11, 11, 11), strict=True):
        assert read_images(job / name, np.arange(n)).shape == (n, 16, 16)
    shown = read_images(job / "traversal_pc1.mrcs", np.arange(11))
    np.testing.assert_array_equal(shown, read_images(job / "decoded_along_pc1.mrcs", np.arange(11)))
    everywhere = read_images(job / "average_z0.5_-1.mrcs", np.arange(1))
    assert np.isfinite(everywhere).all()
    for wrong in (["--z=1"], ["--z=a,b"], ["--along", "z3"], ["--along", "pc3"], ["--along", "pc"], []):
        assert main(["average", str(job), *wrong]) == 2
        assert "To mend" in capsys.readouterr().err


def test_the_report_is_redrawn_as_it_was(make_dataset, tmp_path, capsys):
    job = tmp_path / "job"
    assert run(make_dataset(30), job) == 0
    first = (job / "report.html").read_text()
    (job / "report.html").unlink()
    assert main(["report", str(job)]) == 0
    again = (job / "report.html").read_text()
    assert again.count("<img") == first.count("<img")
    assert main(["report", str(tmp_path)]) == 2
