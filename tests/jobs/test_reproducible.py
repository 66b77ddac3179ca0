"""The same seed, settings and input give the same bytes; what was done is on record."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.kills import run as run_alone
from cryo_svae.cli import main
from cryo_svae.particles.images import ImageSource
from tests.test_cli import QUICK

NAMES = ("particles.star", "latents.h5", "decoded.mrcs", "classes.mrcs", "traversal_z1.mrcs")


def differing(a: Path, b: Path) -> list[str]:
    return [name for name in NAMES if (a / name).read_bytes() != (b / name).read_bytes()]


@pytest.mark.parametrize("engine", ["steerable", "coordinate", "vanilla"])
def test_two_processes_write_the_same_bytes_and_another_seed_does_not(make_dataset, tmp_path, engine):
    settings = ["--engine", engine, "--epochs", "1", "--device", "cpu"]
    star = str(make_dataset(40))
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        run_alone(["run", star, "--out", str(tmp_path / name), *settings, "--seed", seed])
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert set(NAMES[:4]) - set(differing(tmp_path / "a", tmp_path / "c")) == set()


@pytest.mark.parametrize("command", ["run", "train", "estimate"])
def test_a_job_repeats_from_its_own_settings(make_dataset, tmp_path, command):
    star = str(make_dataset(12))
    options = QUICK
    if command == "estimate":
        assert main(["train", star, "--out", str(tmp_path / "model"), *QUICK]) == 0
        options = ["--model", str(tmp_path / "model" / "model.pt"), "--classes", "2"]
    assert main([command, star, "--out", str(tmp_path / "a"), *options, "--seed", "3"]) == 0
    settings = tmp_path / "a" / "config.yaml"
    assert main([command, "--config", str(settings), "--out", str(tmp_path / "b")]) == 0
    assert settings.read_bytes() == (tmp_path / "b" / "config.yaml").read_bytes()
    if command == "train":
        bounds = [
            [line.split("\t")[:-1] for line in (tmp_path / j / "epochs.tsv").read_text().splitlines()]
            for j in "ab"
        ]
        assert bounds[0] == bounds[1]
    else:
        assert differing(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.parametrize("engine", ["steerable", "coordinate"])
def test_the_record_says_how_long_each_part_took_and_waited_for_images(
    make_dataset, tmp_path, monkeypatch, engine
):
    read, job = ImageSource.read, tmp_path / "job"

    def slow(self, index):
        time.sleep(0.05)
        return read(self, index)

    monkeypatch.setattr(ImageSource, "read", slow)
    settings = ["--engine", engine, "--epochs", "1", "--device", "cpu"]
    assert main(["run", str(make_dataset(40)), "--out", str(job), *settings]) == 0
    seconds = json.loads((job / "run.json").read_text())["seconds"]
    said = (job / "run.log").read_text()
    for part in ("preparing", "estimation"):
        assert 0.04 < seconds[f"{part}, waiting for images"] < seconds[part]
    assert 0 <= seconds["training, waiting for images"] < seconds["training"]
    for part in ("preparing", "training", "estimation"):
        assert f"{part} waited for images" in said
    parts = [spent for name, spent in seconds.items() if "," not in name and name != "job"]
    assert 0.5 * seconds["job"] < sum(parts) <= seconds["job"] + 0.01
    assert {"particle file", "contrast", "averages", "files", "report", "digests"} < seconds.keys()
    assert f"time: particle file {seconds['particle file']:.1f} s, " in said


def test_the_record_holds_versions_settings_and_what_was_read(make_dataset, tmp_path):
    star = make_dataset(12)
    job = tmp_path / "job"
    assert main(["train", str(star), "--out", str(tmp_path / "model"), *QUICK]) == 0
    model = tmp_path / "model" / "model.pt"
    arguments = ["estimate", str(star), "--model", str(model), "--out", str(job), "--seed", "4"]
    assert main(arguments) == 0
    record = json.loads((job / "run.json").read_text())
    assert record["versions"]["python"] == platform.python_version()
    assert record["seed"] == 4
    assert record["config"] == yaml.safe_load((job / "config.yaml").read_text())
    read = record["inputs"]
    assert read["sha256"] == hashlib.sha256(star.read_bytes()).hexdigest()
    assert read["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert record["seconds"]["estimation, waiting for images"] <= record["seconds"]["estimation"]
    make_dataset(12, images=None, particles={"note": ["x"] * 12})
    stack = tmp_path / "stack.mrcs"
    content = bytearray(stack.read_bytes())
    content[1500] ^= 1
    stack.write_bytes(content)
    assert main([*arguments, "--overwrite"]) == 0
    again = json.loads((job / "run.json").read_text())["inputs"]
    assert again["sha256"] != read["sha256"]
    assert again["stacks_sha256"] != read["stacks_sha256"]
    assert again["stack_bytes"] == read["stack_bytes"]
