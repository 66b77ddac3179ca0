"""The plug-in of the CCP-EM Pipeliner, through the real ``pipeliner`` command.

It is looked for in the environment named by CRYO_SVAE_PIPELINER, else on the PATH;
pipelines/ccpem_pipeliner/test.sh makes one.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cryo_svae.formats.star import read_star
from tests.conftest import REPOSITORY

PLUGIN = REPOSITORY / "pipelines" / "ccpem_pipeliner" / "cryo_svae_pipeliner"
RUN, SELECT = "cryosvae.image_analysis.run", "cryosvae.select.particles"
SMALL = "--engine coordinate --hidden 8 --encoder-hidden 8 --batch-size 8"
JOB = "Class2D/job001/"
N = 120  # particles of two kinds by turns, which are two classes after a dozen epochs


@pytest.mark.parametrize("path", sorted(PLUGIN.glob("*.py")), ids=lambda path: path.name)
def test_it_imports_its_host_and_the_standard_library_alone(path):
    allowed = {"pipeliner", "cryo_svae_pipeliner", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed


class Pipeliner:
    """The commands of an environment, run in a new project."""

    def __init__(self, programs: Path, project: Path) -> None:
        self.programs, self.project = programs, project
        ours = project / "bin"
        ours.mkdir()
        script = ours / "cryo-svae"
        script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
            "from cryo_svae.cli import entry_point\nentry_point()\n"
        )
        script.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(ours), str(programs), os.environ["PATH"]]),
        }

    def __call__(self, *arguments: str, command: str = "pipeliner") -> str:
        done = subprocess.run(
            [self.programs / command, *arguments],
            cwd=self.project,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.stdout + done.stderr

    def start(self, kind: str, **options: str) -> str:
        """Starts a job from its own default job.star, changed; what was said of it."""
        self("--default_jobstar", kind)
        job_star = self.project / f"{kind.replace('.', '_')}_job.star"
        lines = job_star.read_text().splitlines()
        changed = [
            f'{words[0]} "{options.pop(words[0])}"'
            if (words := line.split()) and words[0] in options
            else line
            for line in lines
        ]
        assert not options, f"{kind} has no {list(options)}"
        job_star.write_text("\n".join(changed) + "\n")
        return self("--run_job", str(job_star))

    def ending(self, job: str) -> str:
        """How a job ended, in the Pipeliner's words."""
        folder = self.project / job
        wait_until(lambda: list(folder.glob("PIPELINER_JOB_EXIT_*")))
        self(
            "--set_alias", job, f"looked_at_{time.monotonic_ns()}"
        )  # any command brings the project up to date
        processes = read_star(self.project / "default_pipeline.star").block("pipeline_processes")
        names = processes.text("rlnPipeLineProcessName")
        return processes.text("rlnPipeLineProcessStatusLabel")[names.index(job)]

    def said(self, job: str) -> str:
        folder = self.project / job
        return (folder / "run.out").read_text() + (folder / "run.err").read_text()

    def results(self, job: str) -> list[dict]:
        """What is displayed of a job."""
        self("--jobs", job, command="pipeliner.regenerate_results")
        files = sorted((self.project / job).glob(".results_display*.json"))
        return [json.loads(path.read_text()) for path in files]


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture
def pipeliner(tmp_path, make_dataset):
    named = os.environ.get("CRYO_SVAE_PIPELINER")
    found = shutil.which("pipeliner", path=None if named is None else str(Path(named) / "bin"))
    if found is None:
        pytest.skip("no pipeliner command (run pipelines/ccpem_pipeliner/test.sh)")
    y, x = np.mgrid[:16, :16] - 8
    kinds = np.stack([np.exp(-(x**2 + y**2) / 30.0), np.exp(-(x**2) / 4.0 - y**2 / 40.0)])
    images = 8 * kinds[np.arange(N) % 2] + np.random.default_rng(7).standard_normal((N, 16, 16))
    places = {"rlnCoordinateX": [str(10 * k) for k in range(N)], "rlnCoordinateY": ["7"] * N}
    places["rlnMicrographName"] = ["mics/a.mrc"] * N
    make_dataset(N, particles=places, images=images.astype(np.float32))
    program = Pipeliner(Path(found).parent, tmp_path)
    program("--new_project")
    if RUN not in program("--available_jobs", "cryosvae"):
        pytest.skip(f"{found} lacks our plug-in (pip install pipelines/ccpem_pipeliner beside it)")
    return program


def test_run_select_and_the_pipeliner_s_own_class_selection(pipeliner):
    said = pipeliner("--check_jobs", "cryosvae")
    assert said.count(f"path: {pipeliner.project / 'bin' / 'cryo-svae'}") == 2
    assert "Bepler" in pipeliner("--job_references", RUN)
    assert "latent content z" in pipeliner("--job_info", RUN)

    pipeliner.start(
        RUN,
        fn_parts="particles.star",
        epochs="12",
        classes="2",
        ctf="no",
        invert="No",
        other_args="--batch-size 8",
    )
    assert pipeliner.ending(JOB) == "Succeeded", pipeliner.said(JOB)
    nodes = read_star(pipeliner.project / "default_pipeline.star").block("pipeline_nodes")
    kinds = dict(
        zip(nodes.text("rlnPipeLineNodeName"), nodes.text("rlnPipeLineNodeTypeLabel"), strict=True)
    )
    assert kinds[f"{JOB}particles.star"] == "ParticleGroupMetadata.star.relion.cryosvae"
    for name in kinds:
        assert (pipeliner.project / name).stat().st_size > 0, name
    shown = pipeliner.results(JOB)
    assert [(result["dobj_type"], result["title"]) for result in shown] == [
        ("montage", "Class averages: number, particles, resolution"),
        ("montage", "Decoded along z1, 2nd to 98th percentile"),
        ("montage", "Decoded along z2, 2nd to 98th percentile"),
        ("plotlyscatter", "Latent space"),
        ("histogram", "z1"),
        ("histogram", "Figure of merit"),
        ("histogram", "psi, degrees"),
        ("html", "Report"),
    ]
    assert (pipeliner.project / shown[0]["img"]).exists()
    made = read_star(pipeliner.project / JOB / "particles.star").block("particles")
    assert sum(shown[6]["bins"]) == len(shown[3]["data"]["z1"]) == made.n_rows == N

    assert "Give classes or have them proposed" in pipeliner.start(SELECT, fn_parts=f"{JOB}particles.star")
    pipeliner.start(SELECT, fn_parts=f"{JOB}particles.star", where="class_number == 1", top="50%")
    assert pipeliner.ending("Select/job002/") == "Succeeded", pipeliner.said("Select/job002/")
    kept = read_star(pipeliner.project / "Select/job002/particles.star").block("particles")
    assert set(kept.integers("rlnClassNumber")) == {1}
    counts, *plots = pipeliner.results("Select/job002/")
    assert counts["display_data"] == f"{kept.n_rows} of {N} particles of {JOB}particles.star"
    assert "pending" not in {result["dobj_type"] for result in plots}

    templates = {"classes": "1", "min_distance": "3px", "templates": "Yes"}
    pipeliner.start(SELECT, fn_parts=f"{JOB}particles.star", **templates)
    assert pipeliner.ending("Select/job003/") == "Succeeded", pipeliner.said("Select/job003/")
    assert "in Select/job003/templates.star" in pipeliner.said("Select/job003/")
    assert read_star(pipeliner.project / "Select/job003/templates.star").blocks[0].n_rows == 1
    assert (pipeliner.project / "Select/job003/templates.mrcs").stat().st_size > 0
    pipeliner.start(SELECT, fn_parts=f"{JOB}particles.star", auto="Yes", other_args="--at-most-per-view 7")
    assert pipeliner.ending("Select/job004/") == "Succeeded", pipeliner.said("Select/job004/")
    assert "--auto takes the classes 2;" in pipeliner.said("Select/job004/")
    assert f"7 of {N} particles in" in pipeliner.said("Select/job004/")

    if shutil.which("relion_image_handler") is None:
        return  # which the Pipeliner's class selection calls
    optimiser = f"{JOB}Class2D/run_it025_optimiser.star"
    pipeliner.start("pipeliner.select.classes", fn_optimiser=optimiser, classes="2")
    assert pipeliner.ending("Select/job005/") == "Succeeded", pipeliner.said("Select/job005/")
    chosen = read_star(pipeliner.project / "Select/job005/particles.star").block("particles")
    assert chosen.n_rows == made.integers("rlnClassNumber").tolist().count(2)


def test_bounds_of_resolution_are_passed_on_and_one_class_is_shown(pipeliner):
    bounds = {"lowest_resolution": "40", "highest_resolution": "5"}
    pipeliner.start(RUN, fn_parts="particles.star", epochs="1", classes="1", other_args=SMALL, **bounds)
    assert pipeliner.ending(JOB) == "Succeeded", pipeliner.said(JOB)
    settings = (pipeliner.project / JOB / "config.yaml").read_text()
    assert "lowest_resolution: 40.0" in settings
    assert "highest_resolution: 5.0" in settings
    shown = pipeliner.results(JOB)
    assert "pending" not in {result["dobj_type"] for result in shown}
    assert shown[0]["labels"][0].startswith(f"1: {N}")


def test_an_aborted_job_is_continued_and_bad_input_fails(pipeliner):
    pipeliner.start(RUN, fn_parts="particles.star", epochs="3000", classes="2", other_args=SMALL)
    model = pipeliner.project / JOB / "model.pt"
    wait_until(model.exists)
    pipeliner("--abort_job", JOB)
    assert pipeliner.ending(JOB) == "Aborted", pipeliner.said(JOB)
    assert "interrupted" in pipeliner.said(JOB)
    pipeliner("--set_status", JOB, "success")  # Pipeliner 1.6.1 continues no other jobs
    pipeliner("--continue_job", JOB)
    wait_until(lambda: "resumed after epoch" in pipeliner.said(JOB))
    pipeliner("--abort_job", JOB)
    assert pipeliner.ending(JOB) == "Aborted", pipeliner.said(JOB)

    pipeliner.start(RUN, fn_parts="particles.star", box="15")
    assert pipeliner.ending("Class2D/job002/") == "Failed"
    assert "To mend" in pipeliner.said("Class2D/job002/")
