"""Templates of class averages: white on 0, centred, coarse; RELION picks with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cryo_svae.cli import main
from cryo_svae.errors import InputError
from cryo_svae.formats.mrc import read_images, read_stack_info, write_stack
from cryo_svae.formats.star import read_star, write_tables
from cryo_svae.imaging.geometry import align_images, pixel_grid
from cryo_svae.results.picking_templates import as_templates
from cryo_svae.results.selection import SelectionConfig
from cryo_svae.simulate import SimulateConfig, simulate
from tests.conftest import image_names, optics_columns

BOX, SIZE_ANGST, DIAMETER_ANGST = 32, 6.0, 160.0


def gaussian(x: float, y: float, width_px: float = 3.0) -> torch.Tensor:
    away = pixel_grid(BOX) - torch.tensor([x, y])
    return torch.exp(-away.square().sum(-1) / (2 * width_px**2))


def coarse(images: torch.Tensor, angst: float = 20.0) -> torch.Tensor:
    finest = torch.full((len(images),), angst / SIZE_ANGST)
    return as_templates(images, finest, DIAMETER_ANGST / 2 / SIZE_ANGST)


def test_a_template_is_centred_on_a_background_of_zero():
    [template] = coarse(5.0 + 2.0 * gaussian(3.0, -2.0)[None])
    assert abs(template - 2.0 * gaussian(0.0, 0.0)).max() < 0.1
    assert (template[pixel_grid(BOX).norm(dim=-1) > DIAMETER_ANGST / 2 / SIZE_ANGST] == 0).all()


def test_what_is_finer_than_the_wavelength_is_gone():
    wave = torch.cos(2 * math.pi * pixel_grid(BOX)[..., 0] / 2.5)  # 15 Å
    blob = gaussian(0.0, 0.0)
    for angst, least, most in ((20.0, 0.0, 0.02), (14.0, 0.9, 1.1)):
        [template] = coarse((blob + wave)[None], angst)
        rest = (template - coarse(blob[None], angst)[0])[12:20, 12:20].abs().max()
        assert least <= rest <= most


def test_a_template_keeps_its_grey_scale_and_others_do_not_matter():
    images = torch.stack([gaussian(1.0, 2.0), 4.0 * gaussian(-2.0, 0.0, 4.0)])
    together = coarse(images)
    for image, template in zip(images, together, strict=True):
        assert torch.allclose(coarse(image[None])[0], template, atol=1e-6)
        assert torch.allclose(coarse(3.0 * image[None])[0], 3.0 * template, atol=1e-5)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A project's folder, current, with a job of three classes, the last of them empty."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "job"
    (folder / "Class2D").mkdir(parents=True)
    number = [1] * 25 + [2] * 15
    columns = {
        "rlnImageName": image_names(40),
        "rlnOpticsGroup": ["1"] * 40,
        "rlnClassNumber": [str(each) for each in number],
        "rlnParticleFigureOfMerit": ["0.5"] * 40,
    }
    write_tables(folder / "particles.star", {"optics": optics_columns(), "particles": columns})
    classes = {
        "rlnEstimatedResolution": ["15.0", "30.0", "999.0"],
        "svaeResolution05Angst": ["18.0", "20.0", "999.0"],
        "svaeNrParticles": ["25", "15", "0"],
        "svaeMeanFigureOfMerit": ["0.5", "0.5", "0.0"],
    }
    write_tables(folder / "classes.star", {"classes": classes})
    optimiser = {"rlnParticleDiameter": f"{DIAMETER_ANGST}", "rlnDoCorrectCtf": "0"}
    write_tables(folder / "Class2D/run_it025_optimiser.star", {}, lists={"optimiser_general": optimiser})
    average = torch.stack([simulated_molecule(), gaussian(0.0, 0.0), torch.zeros(BOX, BOX)])
    write_stack(folder / "classes.mrcs", average.numpy(), pixel_size_angst=SIZE_ANGST)
    return folder


def simulated_molecule() -> torch.Tensor:
    """A hinge as a class average has it: white, against noise of 1; off centre."""
    config = SimulateConfig(n_particles=1, box=BOX, pixel_size_angst=SIZE_ANGST, snr=1e6, seed=2)
    simulated = simulate(config)
    [image] = align_images(simulated.images, simulated.psi_rad, simulated.origin_px)
    return 3.0 * torch.roll(image / image.max(), (1, -2), (0, 1))


def test_the_classes_named_become_a_stack_and_a_star_of_it(job, capsys):
    select = ["select", "job", "--classes", "1-2", "--out", "some.star", "--templates", "picks/t.star"]
    assert main(select) == 2  # no such folder
    (job.parent / "picks").mkdir()
    assert main(select) == 0
    said = capsys.readouterr().out
    assert "2 templates in picks/t.star" in said
    assert "--ref picks/t.star --angpix_ref 6 --particle_diameter 160, with --invert" in said
    [block] = read_star(job.parent / "picks/t.star").blocks
    assert block.text("rlnReferenceImage") == ["000001@picks/t.mrcs", "000002@picks/t.mrcs"]
    assert block.integers("rlnClassNumber").tolist() == [1, 2]
    info = read_stack_info(job.parent / "picks/t.mrcs")
    assert (info.n_images, info.width_px, info.voxel_size_angst) == (2, BOX, SIZE_ANGST)
    template = read_images(job.parent / "picks/t.mrcs", np.array([1]))[0]
    np.testing.assert_allclose(template, coarse(gaussian(0.0, 0.0)[None], 30.0)[0], atol=1e-5)
    assert read_star(job.parent / "some.star").block("particles").n_rows == 40


def test_classes_proposed_or_inverted_become_templates_too(job, capsys):
    out = ["--out", "some.star", "--templates", "t.star"]
    for choice, number in ((["--auto"], 1), (["--classes", "1", "--invert"], 2)):
        assert main(["select", "job", *choice, *out]) == 0
        [block] = read_star(job.parent / "t.star").blocks
        assert block.integers("rlnClassNumber").tolist() == [number]
    assert "class  2       15 particles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top", "50%", "--templates", "t.star"], "--templates: found no classes"),
        (["--classes", "1", "--templates", "t.mrcs"], "a name that ends in .star"),
        (["--classes", "1", "--templates", "job/classes.star"], "is a file of the job"),
        (["--classes", "1", "--auto"], "--auto: found --classes 1 with it"),
    ],
)
def test_what_cannot_be_is_refused(job, capsys, options, said):
    before = (job / "classes.star").read_bytes()
    assert main(["select", "job", *options, "--out", "some.star"]) == 2
    assert said in capsys.readouterr().err
    assert (job / "classes.star").read_bytes() == before


def test_templates_need_a_class_that_is_not_empty():
    with pytest.raises(InputError, match="--templates"):
        SelectionConfig(where="z1 > 0", templates="t.star")  # type: ignore[arg-type]


def test_relion_picks_the_particles_of_a_micrograph_with_them(job, relion, tmp_path):
    side, n = 400, 16
    molecule = torch.roll(simulated_molecule(), (-1, 2), (0, 1))
    middle = np.array([(60 + 90 * (k % 4), 60 + 90 * (k // 4)) for k in range(n)])
    middle += np.random.default_rng(1).integers(-15, 16, middle.shape)
    turned = align_images(
        molecule.expand(n, -1, -1), 2 * math.pi * torch.arange(n) / n, torch.zeros(n, 2)
    ).numpy()
    micrograph = np.random.default_rng(2).normal(size=(side, side)).astype(np.float32)
    for (x, y), image in zip(middle, turned, strict=True):
        micrograph[y - BOX // 2 : y + BOX // 2, x - BOX // 2 : x + BOX // 2] -= image
    write_stack(tmp_path / "m.mrc", micrograph[None], pixel_size_angst=SIZE_ANGST)
    assert main(["select", "job", "--classes", "1", "--out", "s.star", "--templates", "t.star"]) == 0
    said = relion(
        "relion_autopick", "--i", "m.mrc", "--angpix", SIZE_ANGST, "--odir", "picks/", "--ref", "t.star",
        "--angpix_ref", SIZE_ANGST, "--particle_diameter", DIAMETER_ANGST, "--invert", "--ang", "10",
        "--threshold", "0.3", "--lowpass", "20", cwd=tmp_path,
    )  # fmt: skip
    found = next(iter((tmp_path / "picks").glob("*_autopick.star")), None)
    assert found is not None, said
    [block] = read_star(found).blocks
    picks = np.column_stack([block.numbers("rlnCoordinateX"), block.numbers("rlnCoordinateY")])
    away = np.hypot(*(picks[:, None] - middle).transpose(2, 0, 1))
    assert (away.min(0) < 3).sum() >= 15, said
    assert (away.min(1) < 3).mean() > 0.9
