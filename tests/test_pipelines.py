"""The scripts in pipelines/ as users start them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cryo_svae.formats.mrc import read_images, read_stack_info
from cryo_svae.formats.star import read_star
from tests.conftest import REPOSITORY

PIPELINES = REPOSITORY / "pipelines"
OPTIONS = ["--z-dim", "1", "--epochs", "1", "--classes", "3"]


def test_from_particles_to_relions_class_averages(relion, tmp_path):
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "cryo-svae"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m cryo_svae "$@"\n')
    command.chmod(0o755)
    for name in ("particles.star", "particles.mrcs"):
        shutil.copy(REPOSITORY / "example_data" / name, tmp_path)
    path = f"{command.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [PIPELINES / "end_to_end.sh", "particles.star", "work", *OPTIONS],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "SELECT": "--top 25%"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    selected = read_star(tmp_path / "work" / "selected.star").block("particles")
    averaged = read_star(tmp_path / "work" / "Class2D" / "run_it005_data.star").block("particles")
    assert averaged.n_rows == selected.n_rows == 500
    psi = [np.array(block.text("rlnAnglePsi"), dtype=float) for block in (selected, averaged)]
    np.testing.assert_allclose(psi[1], psi[0], atol=1e-5)  # RELION keeps our angles
    averages = tmp_path / "work" / "Class2D" / "run_it005_classes.mrcs"
    images = read_images(averages, np.arange(read_stack_info(averages).n_images))
    assert len(images) == 3
    assert images.std((1, 2)).max() > 0


@pytest.mark.parametrize("script", sorted(PIPELINES.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script: Path):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
