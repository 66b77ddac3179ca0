"""RELION judges what we write: poses, columns, stacks."""

from __future__ import annotations

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch

from cryo_svae.cli import main
from cryo_svae.formats.mrc import read_images, read_stack_info, write_stack
from cryo_svae.formats.star import read_star, write_star, write_tables
from cryo_svae.imaging import geometry
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.results import export
from cryo_svae.simulate import SimulateConfig, render, simulate, write_simulated
from tests.conftest import classes_of, optics_columns

QUICK = [
    "--engine",
    "coordinate",
    "--epochs",
    "1",
    "--hidden",
    "16",
    "--encoder-hidden",
    "16",
    "--z-delay",
    "0",
]


def table_of_truth(psi_deg: np.ndarray, origin_angst: np.ndarray) -> EstimateTable:
    n = len(psi_deg)
    z, ones = np.zeros((n, 2)), np.ones(n)
    return EstimateTable(z, z, psi_deg, ones, origin_angst, ones, ones, ones, ones, np.ones(n, bool))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    box = a.shape[-1]
    y, x = np.mgrid[:box, :box] - box // 2
    inside = x**2 + y**2 < (0.4 * box) ** 2
    return float(np.corrcoef(a[inside], b[inside])[0, 1])


@pytest.mark.parametrize("style", ["3.1", "3.0"])
def test_relion_aligns_what_we_export_and_our_alignment_agrees(relion, tmp_path, style):
    n, box, size_angst = 12, 48, 3.0
    config = SimulateConfig(n_particles=n, box=box, pixel_size_angst=size_angst, shift_std_px=2.5, seed=4)
    simulated = simulate(config)
    beads = 26.0 * (torch.rand(14, 2, generator=torch.Generator().manual_seed(3)) - 0.5)
    weights = torch.linspace(0.5, 2.0, 14)
    psi, origin = simulated.psi_rad, simulated.origin_px
    images = render(beads.expand(n, -1, -1), weights, 2.2, psi, origin, box)
    reference = render(beads[None], weights, 2.2, torch.zeros(1), torch.zeros(1, 2), box)[0].numpy()
    write_simulated(tmp_path, dataclasses.replace(simulated, images=images), config)
    star = tmp_path / "particles.star"
    if style == "3.0":
        star = as_relion_30(star)
    particles = read_particles(star)
    psi_deg = geometry.degrees(psi).double().numpy()
    origin_angst = size_angst * origin.double().numpy()
    ones = classes_of(np.ones(n, dtype=np.intp))
    export.write_particles(
        tmp_path / "posed.star", particles, table_of_truth(psi_deg, origin_angst), ones, False
    )
    said = relion(
        "relion_stack_create", "--i", "posed.star", "--o", "aligned", "--apply_transformation", cwd=tmp_path
    )
    assert (tmp_path / "aligned.mrcs").exists(), said
    theirs = read_images(tmp_path / "aligned.mrcs", np.arange(n))
    ours = geometry.align_images(images, psi, origin).numpy()
    assert min(correlation(image, reference) for image in theirs) > 0.99
    assert min(correlation(a, b) for a, b in zip(ours, theirs, strict=True)) > 0.99
    wrong = geometry.align_images(images, -psi, origin).numpy()
    assert min(correlation(image, reference) for image in wrong) < 0.9


def as_relion_30(star):
    """The same particles in RELION 3.0's style: one block, no optics."""
    block = read_star(star).block("particles")
    n = block.n_rows
    old = {
        label: block.text(label) for label in ("rlnImageName", "rlnMicrographName", "rlnCoordinateX")
    } | {
        "rlnMagnification": ["10000.0"] * n,
        "rlnDetectorPixelSize": ["3.0"] * n,
        "rlnVoltage": ["300.0"] * n,
        "rlnSphericalAberration": ["2.7"] * n,
        "rlnAmplitudeContrast": ["0.1"] * n,
    }
    path = star.with_name("old.star")
    write_tables(path, {"": old})
    path.write_text(path.read_text().replace("# version 30001\n", ""))
    return path


@pytest.fixture
def subset(shared_data, tmp_path):
    """The first particles of a real set, in a folder that works as a project."""

    def take(star: str, n: int):
        source = shared_data / star
        block = read_star(source).block("particles") or read_star(source).blocks[0]
        small = tmp_path / source.name
        write_star(small, read_star(source), block=block.name, columns={}, rows=np.arange(n))
        stack = block.text("rlnImageName")[0].partition("@")[2]
        shutil.copy(source.parent / stack, tmp_path / stack)
        return small

    return take


@pytest.mark.parametrize(
    "star",
    [
        "apoferritin/apof_48px_3.0A_relion30.star",
        "apoferritin/apof_48px_3.0A_relion31.star",
        "bgal/bgal_40px_9.56A.star",
    ],
)
def test_relion_takes_the_output_of_a_run_on_real_particles(relion, subset, tmp_path, star):
    n = 150
    small = subset(star, n)
    job = tmp_path / "job"
    assert main(["run", str(small), "--out", str(job), "--invert", "--classes", "3", *QUICK]) == 0
    said = relion("relion_star_handler", "--i", "job/particles.star", "--o", "handled.star", cwd=tmp_path)
    handled = read_star(tmp_path / "handled.star")
    assert handled.block("particles").n_rows == n, said
    assert handled.block("particles").text("svaeZ1") == read_particles(
        job / "particles.star"
    ).block.text("svaeZ1")  # fmt: skip
    (tmp_path / "c2d").mkdir()
    said = relion(
        "relion_refine", "--i", "job/particles.star", "--o", "c2d/run", "--K", "5", "--iter", "2",
        "--skip_align", "--ctf" if "apof" in star else "--norm", "--particle_diameter", "130",
        "--tau2_fudge", "2", "--flatten_solvent", "--zero_mask", "--random_seed", "1", "--pad", "1",
        cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "c2d" / "run_it002_data.star").exists(), said
    assert read_star(tmp_path / "c2d" / "run_it002_data.star").block("particles").n_rows == n
    decoded = job / "decoded.mrcs"
    relion(
        "relion_image_handler", "--i", decoded, "--o", "copy.mrcs", "--multiply_constant", 2, cwd=tmp_path
    )
    k = read_stack_info(decoded).n_images
    np.testing.assert_allclose(
        read_images(tmp_path / "copy.mrcs", np.arange(k)), 2 * read_images(decoded, np.arange(k)), rtol=1e-5
    )


def test_angles_turn_the_way_relion_turns(relion, tmp_path):
    """One bright pixel to the right of the centre, psi = 90 degrees: it ends below the centre."""
    image = np.zeros((1, 16, 16), dtype=np.float32)
    image[0, 8, 12] = 1.0
    write_stack(tmp_path / "stack.mrcs", image, pixel_size_angst=2.5)
    columns = {"rlnImageName": ["000001@stack.mrcs"], "rlnOpticsGroup": ["1"]}
    write_tables(tmp_path / "p.star", {"optics": optics_columns(), "particles": columns})
    particles = read_particles(tmp_path / "p.star")
    truth = table_of_truth(np.array([90.0]), np.array([[2.5, 0.0]]))
    export.write_particles(
        tmp_path / "posed.star", particles, truth, classes_of(np.ones(1, dtype=np.intp)), False
    )
    relion(
        "relion_stack_create", "--i", "posed.star", "--o", "aligned", "--apply_transformation", cwd=tmp_path
    )
    theirs = read_images(tmp_path / "aligned.mrcs", np.arange(1))[0]
    ours = geometry.align_images(
        torch.from_numpy(image), torch.tensor([math.pi / 2]), torch.tensor([[1.0, 0.0]])
    )[0]
    assert divmod(int(theirs.argmax()), 16) == divmod(int(ours.argmax()), 16) == (8 + 5, 8)
