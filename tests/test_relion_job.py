"""The External job: what RELION is told in every ending, and RELION's own chain over it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cryo_svae.formats.star import read_star
from cryo_svae.jobs import stages
from cryo_svae.jobs.folder import LOCK
from cryo_svae.relion_job import main, our_options, output_nodes, relion_version
from tests.conftest import REPOSITORY

PARAMETERS = {
    "engine": "coordinate",
    "epochs": "2",
    "hidden": "8",
    "encoder_hidden": "8",
    "batch_size": "4",
    "classes": "2",
}
RESULTS = ("particles.star", "latents.h5", "decoded.mrcs", "classes.mrcs")
JOB = "External/job001/"


@pytest.fixture
def project(make_dataset, tmp_path, monkeypatch):
    """A project's folder, current, with a job's folder as RELION makes it."""
    monkeypatch.chdir(tmp_path)
    make_dataset(24, particles={"rlnMicrographName": ["a.mrc"] * 11 + ["b.mrc"] * 13})
    (tmp_path / JOB).mkdir(parents=True)
    return tmp_path


def command(*more: str, **changes: str) -> list[str]:
    words = [word for name, value in {**PARAMETERS, **changes}.items() for word in (f"--{name}", value)]
    return ["--o", JOB, "--in_parts", "particles.star", *words, *more, "--j", "1"]


def run(*more: str) -> int:
    return main(command(*more))


def markers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("RELION_JOB_*"))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file() and path.name != LOCK]


@pytest.mark.parametrize(
    ("relion", "ours"),
    [
        (["--z_dim", "8"], ["--z-dim", "8"]),
        (["--z-dim=8", "--mask_diameter=180"], ["--z-dim=8", "--mask-diameter=180"]),
        (["--invert", "--classes", "3"], ["--invert", "--classes", "3"]),
        (["--invert", "Yes", "--ctf", "No"], ["--invert", "--no-ctf"]),
        (
            ["--lowest_resolution", "60", "--highest_resolution", "10"],
            ["--lowest-resolution", "60", "--highest-resolution", "10"],
        ),
        (["--overwrite_pose", "yes", "--datadir", "a_b"], ["--overwrite-pose", "--datadir", "a_b"]),
    ],
)
def test_free_parameters_are_our_options(relion, ours):
    assert our_options(relion) == ours


def test_a_job_writes_its_outputs_its_nodes_and_its_marker(project):
    (project / JOB / "RELION_JOB_EXIT_FAILURE").touch()
    bounds = ["--lowest_resolution", "40", "--highest_resolution", "5"]
    assert run("--invert", "No", *bounds, "--held_out", "0.25", "--pipeline_control", JOB) == 0
    assert markers(project / JOB) == ["RELION_JOB_EXIT_SUCCESS"]
    nodes = read_star(project / JOB / "RELION_OUTPUT_NODES.star").block("output_nodes")
    assert nodes.integers("rlnPipeLineNodeType").tolist() == [3, 5, 9, 13]
    assert nodes.text("rlnPipeLineNodeTypeLabel")[0] == "ParticleGroupMetadata.star.relion"
    for name in nodes.text("rlnPipeLineNodeName"):
        assert name.startswith(JOB)
        assert (project / name).stat().st_size > 0
    assert (project / JOB / "logfile.pdf").read_bytes().startswith(b"%PDF")
    config = (project / JOB / "config.yaml").read_text()
    assert "invert: false" in config
    assert "held_out: 0.25" in config
    assert "lowest_resolution: 40.0" in config
    assert "highest_resolution: 5.0" in config
    assert torch.get_num_threads() == 1
    assert leftovers(project) == []


def test_node_labels_are_those_of_the_relion_that_wrote_job_star(tmp_path):
    assert relion_version(tmp_path) == 5
    job_star = tmp_path / "job.star"
    for version, text in {
        3: "\n# version 30001\n\ndata_job\n\n_rlnJobType  99\n_rlnJobIsContinue 0\n",
        4: "\n# version 30001\n\ndata_job\n\n_rlnJobTypeLabel  relion.external\n",
        5: "\n# version 50001\n\ndata_job\n\n_rlnJobTypeLabel  relion.external\n",
    }.items():
        job_star.write_text(text)
        assert relion_version(tmp_path) == version
    assert output_nodes(3)["Class2D/run_it025_model.star"][0] == "8"
    assert output_nodes(4)["particles.star"] == ("3", "ParticlesData.star.relion")
    selection = "Class2D/run_it025_optimiser.star"
    assert output_nodes(4)[selection] == ("9", "ProcessData.star.relion.optimiser.class2d")
    assert output_nodes(5)[selection] == ("9", "OptimiserData.star.relion.class2d")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--in_parts", "gone.star"], "gone.star"),
        ([], "--in_parts"),
        (["--in_parts", "particles.star", "--in_mics", "micrographs.star"], "--in_mics"),
        (["--in_parts", "particles.star", "--z_dim", "0"], "--z-dim"),
        (["--in_parts", "particles.star", "--zdim", "3"], "--zdim"),
        (["--in_parts", "particles.star", "--j", "0"], "--j"),
        (["--in_parts", "particles.star", "--z_dim"], "--z-dim"),
    ],
)
def test_bad_input_is_a_failure_that_says_why(project, capsys, arguments, words):
    assert main(["--o", JOB, "--j", "1", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert markers(project / JOB) == ["RELION_JOB_EXIT_FAILURE"]
    assert run() == 0  # the job, mended and continued
    assert markers(project / JOB) == ["RELION_JOB_EXIT_SUCCESS"]


def test_a_crash_is_a_failure_with_its_traceback(project, capsys, monkeypatch):
    def crash(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(stages, "write_estimates", crash)
    assert run() == 2
    assert "RuntimeError: out of luck" in capsys.readouterr().err
    assert markers(project / JOB) == ["RELION_JOB_EXIT_FAILURE"]
    assert not (project / JOB / "RELION_OUTPUT_NODES.star").exists()


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.mark.parametrize("stage", ["training", "estimation"])
def test_aborted_between_batches_and_continued_to_the_same_files(project, capsys, monkeypatch, stage):
    assert run() == 0
    whole = results(project / JOB)
    shutil.rmtree(project / JOB)
    (project / JOB).mkdir()
    save, abort = stages.save_checkpoint, project / JOB / "RELION_JOB_ABORT_NOW"

    def save_then_ask_to_abort(path, checkpoint):
        save(path, checkpoint)
        if checkpoint.epochs_done == (1 if stage == "training" else 2):
            abort.touch()

    monkeypatch.setattr(stages, "save_checkpoint", save_then_ask_to_abort)
    assert run() == 2
    assert "aborted" in capsys.readouterr().err
    assert markers(project / JOB) == ["RELION_JOB_EXIT_ABORTED"]
    assert len((project / JOB / "epochs.tsv").read_text().splitlines()) == (2 if stage == "training" else 3)
    assert not (project / JOB / "particles.star").exists()
    assert leftovers(project) == []
    monkeypatch.undo()
    monkeypatch.chdir(project)
    assert run() == 0
    assert results(project / JOB) == whole
    assert markers(project / JOB) == ["RELION_JOB_EXIT_SUCCESS"]


def test_continuing_a_complete_job_changes_no_result(project):
    assert run() == 0
    before = results(project / JOB)
    model = (project / JOB / "model.pt").stat().st_mtime_ns
    assert run() == 0
    assert results(project / JOB) == before
    assert (project / JOB / "model.pt").stat().st_mtime_ns == model


def test_other_settings_are_refused_for_a_trained_model_until_told_to_overwrite(project, capsys):
    assert run() == 0
    assert run("--z_dim", "3") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--z_dim", "3", "--overwrite") == 0
    assert "svaeZ3" in (project / JOB / "particles.star").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_killed_job_is_a_failure_with_its_last_epoch_kept(project, number):
    program = "from cryo_svae.relion_job import entry_point; entry_point()"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    job = subprocess.Popen(
        [sys.executable, "-c", program, *command(epochs="100000")],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # tests under nohup ignore SIGHUP
    )
    epochs = project / JOB / "epochs.tsv"
    wait_until(lambda: epochs.exists() and len(epochs.read_text().splitlines()) > 2)
    job.send_signal(number)
    _, said = job.communicate(timeout=60)
    assert "interrupted" in said
    assert "Traceback" not in said
    assert markers(project / JOB) == ["RELION_JOB_EXIT_FAILURE"]
    kept = stages.load_checkpoint(project / JOB / "model.pt")
    assert kept.epochs_done >= 1
    assert leftovers(project) == []


def wait_until(condition) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


# --- the launcher, and RELION ----------------------------------------------------------------------

LAUNCHER = REPOSITORY / "pipelines" / "relion" / "cryo_svae.sh"
PIPELINE = (
    "\n# version 30001\n\ndata_pipeline_general\n\n_rlnPipeLineJobCounter                       1\n \n"
)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """What ``pip install`` makes of an environment: a script to activate it, and our console script."""
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text(f'export PATH="{folder}:$PATH" PYTHONPATH="{REPOSITORY}"\n')
    script = folder / "cryo-svae-relion"
    script.write_text(f"#!{sys.executable}\nfrom cryo_svae.relion_job import entry_point\nentry_point()\n")
    script.chmod(0o755)
    monkeypatch.setenv("CRYO_SVAE_ENVIRONMENT", str(folder.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.mark.parametrize("broken", ["no environment", "no program in it"])
def test_a_launcher_that_cannot_start_is_a_failure(project, environment, monkeypatch, broken):
    (environment / "cryo-svae-relion").unlink()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if broken == "no environment":
        monkeypatch.setenv("CRYO_SVAE_ENVIRONMENT", "/nowhere")
    done = subprocess.run([LAUNCHER, "--o", JOB, "--j", "1"], check=False, capture_output=True)
    assert done.returncode != 0
    assert markers(project / JOB) == ["RELION_JOB_EXIT_FAILURE"]


@pytest.fixture
def job(relion, project):
    """Runs a job of RELION in a new project; returns what was said."""
    (project / "default_pipeline.star").write_text(PIPELINE)
    shutil.rmtree(project / "External")
    shutil.copy(LAUNCHER, project / "relion_cryo_svae.sh")  # its name makes RELION add --pipeline_control

    def run(kind: str, options: str, meanwhile=lambda folder: None) -> str:
        said = relion("relion_pipeliner", "--addJob", kind, "--addJobOptions", options, cwd=project)
        folder = sorted(project.glob(f"{kind}/job*"))[-1]
        # The pipeliner looks only every ten seconds whether a job is done: it need not be waited for.
        command = ["relion_pipeliner", "--RunJobs", f"{folder.relative_to(project)}/"]
        with (
            (project / f"{kind}.log").open("w") as log,
            subprocess.Popen(command, cwd=project, stdout=log, stderr=log) as pipeliner,
        ):
            meanwhile(folder)
            wait_until(lambda: pipeliner.poll() is not None or list(folder.glob("RELION_JOB_EXIT_*")))
            pipeliner.terminate()
        said += relion("relion_pipeliner", "--check_job_completion", cwd=project)
        return said + (folder / "run.err").read_text()

    return run


def external(**changes: str) -> str:
    """Options of an External job."""
    parameters = {**PARAMETERS, "no_ctf": "", **changes}
    words = [
        f"param{k}_label == {name};param{k}_value == {value}"
        for k, (name, value) in enumerate(parameters.items(), start=1)
    ]
    return ";".join(
        ["fn_exe == ./relion_cryo_svae.sh", "in_part == particles.star", "nr_threads == 1", *words]
    )


def statuses(project: Path) -> dict[str, int]:
    """RELION's word on its jobs: 2 finished, 3 failed, 4 aborted."""
    processes = read_star(project / "default_pipeline.star").block("pipeline_processes")
    numbers = processes.integers("rlnPipeLineProcessStatus").tolist()
    return dict(zip(processes.text("rlnPipeLineProcessName"), numbers, strict=True))


def test_relion_knows_an_aborted_job_and_a_failed_one(project, environment, job):
    def abort(folder: Path) -> None:
        wait_until((folder / "model.pt").exists)
        (folder / "RELION_JOB_ABORT_NOW").touch()

    said = job("External", external(epochs="100000"), abort)
    said += job("External", external(box="15"))
    assert statuses(project) == {JOB: 4, "External/job002/": 3}, said
    assert "To mend" in said


def test_external_then_select_then_class2d(project, environment, job):
    """RELION's pipeliner runs the launcher, and its own jobs on what it wrote."""
    said = job("External", external())
    assert f"--pipeline_control {JOB}" in (project / JOB / "note.txt").read_text()
    said += job(
        "Select",
        "fn_data == External/job001/particles.star;do_select_values == Yes;"
        "select_label == rlnClassNumber;select_minval == 1;select_maxval == 1",
    )
    chosen = read_star(project / "Select/job002/particles.star").block("particles")
    number = read_star(project / JOB / "particles.star").block("particles").integers("rlnClassNumber")
    assert chosen.n_rows == int((number == 1).sum()) > 0, said
    said += job(
        "Class2D",
        "fn_img == Select/job002/particles.star;nr_classes == 1;nr_iter == 1;particle_diameter == 35;"
        "nr_threads == 1;psi_sampling == 30;offset_range == 2;do_ctf_correction == No",
    )
    pipeline = read_star(project / "default_pipeline.star")
    assert statuses(project) == {JOB: 2, "Select/job002/": 2, "Class2D/job003/": 2}, said
    nodes = pipeline.block("pipeline_nodes")
    kinds = dict(
        zip(nodes.text("rlnPipeLineNodeName"), nodes.integers("rlnPipeLineNodeType").tolist(), strict=True)
    )
    ours = {name: kind for name, kind in kinds.items() if name.startswith(JOB)}
    assert ours == {
        f"{JOB}particles.star": 3,
        f"{JOB}classes.star": 5,
        f"{JOB}Class2D/run_it025_model.star": 8,
        f"{JOB}logfile.pdf": 13,
    }
    made = pipeline.block("pipeline_output_edges")
    edges = zip(made.text("rlnPipeLineEdgeProcess"), made.text("rlnPipeLineEdgeToNode"), strict=True)
    assert {name for process, name in edges if process == JOB} == ours.keys()
    last = read_star(project / "Class2D/job003/run_it001_data.star").block("particles")
    assert last.text("svaeZ1") == chosen.text("svaeZ1")


def test_the_ready_job_star_is_one_that_relion_takes(relion, project):
    (project / "default_pipeline.star").write_text(PIPELINE)
    shutil.rmtree(project / "External")
    ready = REPOSITORY / "pipelines" / "relion" / "job.star"
    said = relion("relion_pipeliner", "--addJobFromStar", ready, cwd=project)
    values = read_star(project / JOB / "job.star").block("joboptions_values")
    taken, given = (
        dict(zip(b.text("rlnJobOptionVariable"), b.text("rlnJobOptionValue"), strict=True))
        for b in (values, read_star(ready).block("joboptions_values"))
    )
    assert taken == given, said
