"""Class2D files: what RELION's readers want, judged by RELION."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import time

import numpy as np
import pytest
import torch

from cryo_svae.formats.mrc import read_images, read_stack_info, write_stack
from cryo_svae.formats.star import read_star, write_star, write_tables
from cryo_svae.imaging import geometry
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.results import export
from cryo_svae.results.class_averages import ClassAverages
from cryo_svae.results.relion_class2d import classes_table, noise_groups, project_path, write_class2d
from cryo_svae.results.selection import read_job_particles
from cryo_svae.simulate import SimulateConfig, simulate, write_simulated
from tests.conftest import classes_of

N, BOX, SIZE, K = 60, 32, 4.0, 3


def averages_of(images: np.ndarray) -> ClassAverages:
    frc = np.clip(np.linspace(1.2, -0.1, BOX // 2), -1, 1)[None].repeat(K, 0)
    return ClassAverages(
        image=images[:K].astype(np.float32),
        half=np.stack([images[:K], images[:K]], 1).astype(np.float32),
        frc=frc,
        resolution_0143_angst=np.array([10.5, 12.25, np.nan]),
        resolution_05_angst=np.array([14.0, np.nan, np.nan]),
        n_particles=np.array([30, 20, 10]),
        mean_figure_of_merit=np.array([0.9, 0.5, 0.1]),
        pixel_size_angst=SIZE,
    )


def nothing_known(*, usable: bool) -> EstimateTable:
    """All numbers zero, origins too."""
    zeros, pairs = np.zeros(N), np.zeros((N, 2))
    return EstimateTable(pairs, pairs, zeros, zeros, pairs, zeros, zeros, zeros, zeros, np.full(N, usable))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with particles and a finished job in External/job001, and its averages."""
    config = SimulateConfig(
        n_particles=N, box=BOX, pixel_size_angst=SIZE, n_micrographs=4, snr=2.0,
        defocus_min_angst=10000.0, defocus_max_angst=20000.0,
    )  # fmt: skip
    simulated = simulate(config)
    write_simulated(tmp_path, simulated, config)
    monkeypatch.chdir(tmp_path)
    table = dataclasses.replace(
        nothing_known(usable=True),
        psi_deg=geometry.degrees(simulated.psi_rad.double()).numpy(),
        origin_angst=simulated.origin_px.double().numpy() * SIZE,
        log_likelihood=np.full(N, -100.0),
    )
    classes = classes_of(np.repeat([1, 2, 3], [30, 20, 10]))
    job = tmp_path / "External" / "job001"
    job.mkdir(parents=True)
    export.write_particles(
        job / "particles.star", read_particles(tmp_path / "particles.star"), table, classes, False
    )
    images = geometry.align_images(simulated.images, simulated.psi_rad, simulated.origin_px).numpy()
    write(job, table, averages_of(images))
    return tmp_path


def write(job, table, averages) -> None:
    star, block = read_job_particles(job)
    write_class2d(
        job / "Class2D", star, block, table, averages, particle_diameter_angst=120.0, use_ctf=True
    )


MODEL = "External/job001/Class2D/run_it025_model.star"
DATA = "External/job001/Class2D/run_it025_data.star"
OPTIMISER = "External/job001/Class2D/run_it025_optimiser.star"
CLASSES = "External/job001/Class2D/run_it025_classes.mrcs"


def test_the_files_point_at_each_other_from_the_project_folder(project):
    model, optimiser = read_star(project / MODEL), read_star(project / OPTIMISER)
    classes = model.block("model_classes")
    assert classes.text("rlnReferenceImage") == [f"{k:06d}@{CLASSES}" for k in (1, 2, 3)]
    np.testing.assert_allclose(classes.numbers("rlnClassDistribution"), [1 / 2, 1 / 3, 1 / 6], atol=1e-6)
    assert classes.numbers("rlnEstimatedResolution").tolist() == [10.5, 12.25, 999.0]
    general = optimiser.block("optimiser_general")
    assert general.text("rlnModelStarFile") == [MODEL]
    assert general.text("rlnExperimentalDataStarFile") == [DATA]
    info = read_stack_info(project / CLASSES)
    assert (info.n_images, info.width_px) == (K, BOX)


def test_the_data_are_the_job_s_particles_to_the_letter_with_their_groups(project):
    job = read_star(project / "External/job001/particles.star").block("particles")
    data = read_star(project / DATA)
    for label in job.labels:
        assert data.block("particles").text(label) == job.text(label)
    assert data.block("optics").text("rlnOpticsGroupName") == ["opticsGroup1"]
    assert set(data.block("particles").labels) - set(job.labels) == {"rlnGroupNumber"}
    model = read_star(project / MODEL)
    assert model.block("model_groups").text("rlnGroupName") == list(
        dict.fromkeys(job.text("rlnMicrographName"))
    )
    sizes = model.block("model_groups").integers("rlnGroupNrParticles")
    assert sizes.tolist() == np.bincount(data.block("particles").integers("rlnGroupNumber"))[1:].tolist()
    assert model.block("model_group_4").n_rows == BOX // 2 + 1
    assert model.block("model_class_3").n_rows == BOX // 2 + 1
    for block in model.blocks:
        assert not any(
            "nan" in cell or "inf" in cell for label in block.labels for cell in block.text(label)
        )


def test_spectra_are_in_relions_units(project, relion):
    """RELION's tau2 of its first model is the power of the references that it was given."""
    (project / "c").mkdir()
    write_stack(project / "first.mrcs", read_images(project / CLASSES, np.arange(1)), pixel_size_angst=SIZE)
    relion(
        "relion_refine", "--i", DATA, "--ref", "first.mrcs", "--o", "c/run", "--iter", "1", "--ctf",
        "--particle_diameter", "120", "--skip_align", "--random_seed", "1", "--pad", "1", cwd=project,
    )  # fmt: skip
    ours, theirs = (
        read_star(path).block("model_class_1").numbers("rlnReferenceTau2")
        for path in (project / MODEL, project / "c" / "run_it000_model.star")
    )
    np.testing.assert_allclose(ours[2:10], theirs[2:10], rtol=0.15)


def test_particles_without_micrographs_are_one_group(make_dataset, tmp_path):
    plain = read_star(make_dataset(n=4)).block("particles")
    label, number, names = noise_groups(plain)
    assert (label, number.tolist(), names) == (None, [1, 1, 1, 1], ["all"])
    write_star(
        tmp_path / "g.star", read_star(tmp_path / "particles.star"), block="particles",
        columns={"rlnMicrographName": list("abca"), "rlnGroupName": list("xxyx")},
    )  # fmt: skip
    label, number, names = noise_groups(read_star(tmp_path / "g.star").block("particles"))
    assert (label, number.tolist(), names) == ("rlnGroupName", [1, 1, 2, 1], ["x", "y"])


def test_paths_are_of_the_project_or_absolute(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert project_path(tmp_path / "project" / "job" / "a.mrcs") == "job/a.mrcs"
    assert project_path((tmp_path / "project").relative_to(tmp_path) / ".." / "b") == "b"
    assert project_path(tmp_path / "elsewhere" / "a.mrcs") == str(tmp_path / "elsewhere" / "a.mrcs")


def test_the_table_of_classes(project):
    stack = project / "External/job001/classes.mrcs"
    averages = averages_of(np.ones((K, BOX, BOX)))
    columns = classes_table(
        stack,
        averages,
        np.array([[0.5, -1], [1, 2], [3, 4]]),
        torch.tensor([0, math.pi / 2, 0]),
        torch.eye(3, 2),
    )
    write_tables(project / "classes.star", {"classes": columns})
    block = read_star(project / "classes.star").block("classes")
    assert block.text("rlnReferenceImage")[1] == "000002@External/job001/classes.mrcs"
    assert block.numbers("svaeResolution05Angst").tolist() == [14.0, 999.0, 999.0]
    assert block.integers("svaeNrParticles").tolist() == [30, 20, 10]
    assert block.numbers("svaeMeanFigureOfMerit").tolist() == [0.9, 0.5, 0.1]
    np.testing.assert_allclose(block.numbers("svaeMontageAnglePsi"), [0, 90, 0], atol=1e-4)
    assert block.numbers("svaeMontageOriginYAngst").tolist() == [0.0, averages.pixel_size_angst, 0.0]
    assert block.numbers("svaeZ2").tolist() == [-1.0, 2.0, 4.0]


def test_classes_of_no_particle_at_all_are_written(project):
    nothing = np.zeros((K, BOX, BOX))
    averages = dataclasses.replace(
        averages_of(nothing), n_particles=np.zeros(K, dtype=np.intp), frc=np.zeros((K, BOX // 2))
    )
    write(project / "External" / "job001", nothing_known(usable=False), averages)
    assert read_star(project / MODEL).block("model_classes").numbers("rlnClassDistribution").sum() == 0


# --- RELION ----------------------------------------------------------------------------------------


def test_relion_selects_and_refines_from_the_files(relion, project):
    said = relion(
        "relion_star_handler", "--i", DATA, "--o", "some.star", "--select", "rlnClassNumber",
        "--minval", "2", "--maxval", "3", cwd=project,
    )  # fmt: skip
    assert read_star(project / "some.star").block("particles").n_rows == 30, said
    (project / "c").mkdir()
    said = relion(
        "relion_refine", "--i", DATA, "--ref", CLASSES, "--K", K, "--o", "c/run", "--iter", "1", "--ctf",
        "--particle_diameter", "120", "--psi_step", "30", "--offset_range", "2", "--offset_step", "1",
        "--pad", "1", "--random_seed", "1", cwd=project,
    )  # fmt: skip
    assert (project / "c" / "run_it001_data.star").exists(), said
    after = read_star(project / "c" / "run_it001_data.star").block("particles")
    assert after.text("svaeZ1") == read_star(project / DATA).block("particles").text("svaeZ1")


@pytest.mark.parametrize("micrographs", [True, False])
def test_relion_s_complete_model_reader_takes_the_model(relion, project, micrographs):
    """relion_refine --continue reads our model and data (with an optimiser and a sampling of its own)."""
    if not micrographs:
        star, block = read_job_particles(project / "External/job001")
        columns = {label: block.text(label) for label in block.labels if label != "rlnMicrographName"}
        optics = star.block("optics")
        tables = {"optics": {label: optics.text(label) for label in optics.labels}, "particles": columns}
        write_tables(project / "External/job001/particles.star", tables)
        images = read_images(project / CLASSES, np.arange(K))
        write(project / "External/job001", nothing_known(usable=True), averages_of(images))
    (project / "c").mkdir()
    relion(
        "relion_refine", "--i", DATA, "--o", "c/run", "--K", K, "--iter", "1", "--ctf", "--pad", "2",
        "--particle_diameter", "120", "--psi_step", "30", "--offset_range", "2", "--offset_step", "1",
        "--random_seed", "1", cwd=project,
    )  # fmt: skip
    theirs = project / "c" / "run_it001_optimiser.star"
    mixed = (
        theirs.read_text().replace("c/run_it001_model.star", MODEL).replace("c/run_it001_data.star", DATA)
    )
    (project / "mixed_optimiser.star").write_text(mixed)
    said = relion(
        "relion_refine", "--continue", "mixed_optimiser.star", "--o", "c/on", "--iter", "2", cwd=project
    )
    model = project / "c" / "on_ct1_it002_model.star"
    model = model if model.exists() else project / "c" / "on_it002_model.star"
    assert model.exists(), said
    assert read_star(model).block("model_classes").n_rows == K


PIPELINE = (
    "\n# version 30001\n\ndata_pipeline_general\n\n_rlnPipeLineJobCounter                       2\n \n"
)
EXTERNAL = """#!/bin/sh
out="$2"
mkdir -p "$out"Class2D
for file in ready/*; do sed "s#External/job001/#$out#g" "$file" > "$out"Class2D/$(basename "$file"); done
cp run_it025_classes.mrcs "$out"Class2D/
cat > "$out"RELION_OUTPUT_NODES.star <<END

data_output_nodes

loop_
_rlnPipeLineNodeName #1
_rlnPipeLineNodeType #2
${out}Class2D/run_it025_model.star 8
${out}Class2D/run_it025_data.star 3

END
touch "$out"RELION_JOB_EXIT_SUCCESS
"""


def test_the_chain_from_external_over_select_to_class2d(relion, project):
    (project / "ready").mkdir()
    for name in (MODEL, DATA, OPTIMISER):
        (project / name).rename(project / "ready" / name.rpartition("/")[2])
    (project / CLASSES).rename(project / "run_it025_classes.mrcs")
    (project / "default_pipeline.star").write_text(PIPELINE)
    script = project / "ext.sh"
    script.write_text(EXTERNAL)
    script.chmod(0o755)

    def job(kind: str, options: str) -> str:
        said = relion("relion_pipeliner", "--addJob", kind, "--addJobOptions", options, cwd=project)
        folder = sorted(project.glob(f"{kind}/job*"))[-1]
        # The pipeliner looks only every ten seconds whether a job is done: it need not be waited for.
        command = ["relion_pipeliner", "--RunJobs", f"{folder.relative_to(project)}/"]
        with (
            (project / f"{kind}.log").open("w") as log,
            subprocess.Popen(command, cwd=project, stdout=log, stderr=log) as pipeliner,
        ):
            for _ in range(600):
                if pipeliner.poll() is not None or any(folder.glob("RELION_JOB_EXIT_*")):
                    break
                time.sleep(0.05)
            pipeliner.terminate()
        return said + relion("relion_pipeliner", "--check_job_completion", cwd=project)

    said = job("External", "fn_exe == ./ext.sh;in_part == particles.star;nr_threads == 1")
    said += job(
        "Select",
        "fn_data == External/job002/Class2D/run_it025_data.star;do_select_values == Yes;"
        "select_label == rlnClassNumber;select_minval == 1;select_maxval == 2",
    )
    assert (project / "Select/job003/particles.star").exists(), said
    assert read_star(project / "Select/job003/particles.star").block("particles").n_rows == 50
    said += job(
        "Class2D",
        "fn_img == Select/job003/particles.star;nr_classes == 2;nr_iter == 1;particle_diameter == 120;"
        "nr_threads == 1;psi_sampling == 30;offset_range == 2",
    )
    processes = read_star(project / "default_pipeline.star").block("pipeline_processes")
    assert processes.integers("rlnPipeLineProcessStatus").tolist() == [2, 2, 2], said
    assert (project / "Class2D/job004/run_it001_data.star").exists()
    nodes = read_star(project / "default_pipeline.star").block("pipeline_nodes")
    assert "External/job002/Class2D/run_it025_model.star" in nodes.text("rlnPipeLineNodeName")
