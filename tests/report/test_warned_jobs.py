"""Every warning in words, from a real job on simulated particles that deserve it."""

from __future__ import annotations

import dataclasses
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from cryo_svae.cli import main
from cryo_svae.imaging import geometry
from cryo_svae.simulate import SimulateConfig, Simulated, simulate, write_simulated

HINGE = SimulateConfig(n_particles=600, box=24, snr=0.5, shift_std_px=0.5, seed=4)


def kept(simulated: Simulated, rows: np.ndarray) -> Simulated:
    """A simulation of some of its particles."""
    arrays = {
        field.name: getattr(simulated, field.name)[rows]
        for field in dataclasses.fields(simulated)
        if isinstance(getattr(simulated, field.name), torch.Tensor)
    }
    return dataclasses.replace(simulated, **arrays)


@pytest.fixture
def warned(tmp_path: Path):
    """The warnings on the page of a job on simulated particles."""

    def run(config: SimulateConfig, *options: str, change=lambda simulated: simulated) -> str:
        simulated = change(simulate(config))
        config = dataclasses.replace(config, n_particles=len(simulated.images))
        write_simulated(tmp_path, simulated, config)
        job = tmp_path / "job"
        assert (
            main(["run", str(tmp_path / "particles.star"), "--out", str(job), "--z-dim", "2", *options])
            == 0
        )
        found = re.search(r'<aside class="warn".*?</aside>', (job / "report.html").read_text(), re.DOTALL)
        return unescape(found[0]) if found else ""

    return run


CTF = dataclasses.replace(
    HINGE, snr=2.0, shift_std_px=0.0, defocus_min_angst=3000.0, defocus_max_angst=60000.0
)


def test_a_fine_job_is_not_warned_of_more_than_its_missing_ctf(warned):
    text = warned(HINGE, "--epochs", "16", "--classes", "3")
    assert text.count("<li>") == 1
    assert "no CTF parameters" in text


def test_noise_alone(warned):
    text = warned(dataclasses.replace(HINGE, molecule="noise", pixel_size_angst=5.0), "--epochs", "4")
    assert "The latent space is empty" in text or "No signal found" in text


def test_dark_particles(warned):
    def negative(simulated):
        return dataclasses.replace(simulated, images=-simulated.images)

    text = warned(HINGE, "--epochs", "2", change=negative)
    assert "The contrast seems wrong" in text
    assert "run again with --invert" in text


def test_defocus_that_the_model_was_not_told(warned):
    text = warned(CTF, "--epochs", "8", "--no-ctf")
    assert "The CTF was left out of the model although" in text
    assert "z depends on defocus" in text
    assert re.search(r"z\d \(R² 0\.\d\d\)", text)


def test_shifts_that_the_search_does_not_reach(warned):
    far = dataclasses.replace(HINGE, box=32, shift_std_px=3.0, snr=1.0)
    text = warned(far, "--epochs", "6", "--max-shift", "12")
    assert "of the shifts end at the limit of the search (12.0 Å)" in text


def test_angles_that_the_particles_prefer(warned):
    def upright(simulated):
        return kept(simulated, np.flatnonzero(simulated.psi_rad.abs().numpy() < geometry.radians(40.0)))

    many = dataclasses.replace(HINGE, n_particles=2400)
    text = warned(many, "--epochs", "8", change=upright)
    assert "In-plane angles are not flat over all particles" in text
    assert "around one angle" in text


def test_structure_that_does_not_turn_with_the_particle(warned):
    """A spot in one place of every box, as overlapping particles or the edge of a hole leave it."""

    def spotted(simulated):
        spot = torch.exp(-((geometry.pixel_grid(24) - torch.tensor([6.0, 2.0])).norm(dim=-1) ** 2) / 8.0)
        return dataclasses.replace(simulated, images=simulated.images + 1.5 * simulated.noise_std * spot)

    text = warned(dataclasses.replace(HINGE, n_particles=1500), "--epochs", "25", change=spotted)
    assert "z depends on psi" in text


def test_particles_off_centre_with_a_tight_prior(warned):
    far = dataclasses.replace(HINGE, box=32, shift_std_px=2.0, snr=2.0)
    text = warned(far, "--epochs", "8", "--shift-std", "4")
    assert "the prior holds particles back" in text


def test_images_without_contrast_and_classes_without_particles(warned):
    def damaged(simulated):
        images = simulated.images.clone()
        images[5], images[7] = torch.nan, 1.0
        return dataclasses.replace(simulated, images=images)

    text = warned(
        dataclasses.replace(HINGE, n_particles=100, snr=4.0),
        *("--epochs", "30", "--classes", "10"),
        change=damaged,
    )
    assert "2 of 100 images hold NaN or no contrast (particle 6, 8)" in text
    assert re.search(r"\d+ of \d+ classes with fewer than 20 particles", text)
