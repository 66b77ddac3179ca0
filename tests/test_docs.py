"""The documentation is true: its tutorial and notebook run, and its pages name what there is."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import cryo_svae
from cryo_svae.cli import main
from cryo_svae.formats.star import read_star
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Of a whole run, so that the tutorial's commands take seconds.
SHORTER = '#!/bin/sh\n[ "$1" = run ] && set -- "$@" --epochs 2\nexec {python} -m cryo_svae "$@"\n'


def test_the_tutorial_s_commands_run(shared_data, relion, tmp_path):
    for path in (shared_data / "bgal").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "cryo-svae"
    command.write_text(SHORTER.format(python=sys.executable))
    command.chmod(0o755)
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    script = ["set -euo pipefail"]
    for language, text in BLOCK.findall((DOCS / "tutorial.md").read_text()):
        script.append(text if language == "sh" else f"python - <<'CODE'\n{text}CODE")
    paths = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "protein dark: use --invert" in done.stdout
    assert (tmp_path / "SVAE" / "good.cs").stat().st_size > 0
    assert (tmp_path / "SVAE" / "run1" / "average_along_pc1.mrcs").is_file()
    n, same = re.search(r"(\d+) particles, z1 is the same in (\S+)%", done.stdout).groups()
    assert int(n) == 4651
    assert float(same) > 90.0


def test_the_notebook_is_the_script_and_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of its kernel, whose waiting threads would hold the cores
    example = REPOSITORY / "example_data"
    kept = nbformat.read(example / "walkthrough.ipynb", as_version=4)
    made = runpy.run_path(str(DOCS / "make_notebook.py"))["cells"]((example / "walkthrough.py").read_text())
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in made
    ]
    for cell in kept.cells:
        cell.source = cell.source.replace("epochs = 50", "epochs = 2")
    kept.cells.append(nbformat.v4.new_code_cell(f"model.save({str(tmp_path / 'model.pt')!r}); z = table.z"))
    kept.cells.append(nbformat.v4.new_code_cell("print(*model.decode(z[:3])[:, 16, 16])"))
    NotebookClient(kept, timeout=300, resources={"metadata": {"path": str(example)}}).execute()
    printed = "".join(
        output.text for cell in kept.cells if cell.cell_type == "code" for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )  # fmt: skip
    assert "class 5: " in printed
    again = cryo_svae.load_model(tmp_path / "model.pt")
    estimated = again.estimate(cryo_svae.load(example / "particles.star"))
    decoded = [float(word) for word in printed.splitlines()[-1].split()]
    np.testing.assert_allclose(again.decode(estimated.z[:3])[:, 16, 16], decoded, atol=1e-4)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "job"
    star = REPOSITORY / "example_data" / "particles.star"
    small = ["--engine", "coordinate", "--hidden", "8", "--encoder-hidden", "8", "--epochs", "1"]
    assert main(["run", str(star), "--out", str(folder), "--z-dim", "2", "--classes", "3", *small]) == 0
    return folder


def named_in_code(page: str) -> str:
    return " ".join(re.findall(r"`([^`\n]+)`", (REPOSITORY / page).read_text()))


def test_every_file_of_a_job_is_named(job):
    named = named_in_code("docs/output.md")
    for path in job.iterdir():
        if path.name.startswith("."):
            continue
        name = re.sub(r"_(z|pc)\d", r"_\g<1>1", path.name)
        assert name in named, path.name


def test_every_column_and_array_is_named(job):
    given = read_star(REPOSITORY / "example_data" / "particles.star").block("particles").labels
    labels = set(read_star(job / "particles.star").block("particles").labels) - set(given)
    assert len(labels) > 10
    columns = named_in_code("README.md")
    for label in labels:
        assert re.sub(r"(svaeZ)\d", r"\g<1>1", label) in columns, label
    output = named_in_code("docs/output.md")
    for label in read_star(job / "classes.star").block("classes").labels:
        assert re.sub(r"(svaeZ)\d", r"\g<1>1", label) in output, label
    with h5py.File(job / "latents.h5") as file:
        for name in file:
            assert name in output, name
