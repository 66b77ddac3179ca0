from __future__ import annotations

import dataclasses
import math

import mrcfile
import numpy as np
import pytest
import torch

from cryo_svae.errors import InputError
from cryo_svae.formats.star import read_star
from cryo_svae.imaging.geometry import align_images, pixel_grid
from cryo_svae.simulate import SimulateConfig, load_molecule, project, simulate, write_simulated
from cryo_svae.simulate.micrographs import coloured_noise
from cryo_svae.simulate.molecules import RANDOM

BOX = 48
PLAIN = {"contrast_std": 0.0, "thickness_gradient": 0.0, "ice_fraction": 0.0, "noise_excess": 0.0}


def config(**changes: object) -> SimulateConfig:
    settings = {
        "n_particles": 60, "box": BOX, "pixel_size_angst": 6.0, "n_micrographs": 3, "micrographs": True,
        "shift_std_px": 1.5, "seed": 3,
    }  # fmt: skip
    return SimulateConfig(**{**settings, **changes})


def test_aligned_by_the_truth_a_picked_particle_is_the_reference():
    simulated = simulate(config(snr=1e8, spacing=1.3, **PLAIN))
    aligned = align_images(simulated.images, simulated.psi_rad, simulated.origin_px)
    rest = project(
        load_molecule("hinge"), simulated.conformation, torch.zeros(60), torch.zeros(60, 2),
        box_px=BOX, pixel_size_angst=simulated.pixel_size_angst,
    )  # fmt: skip
    radius = load_molecule("hinge").radius_angst() / simulated.pixel_size_angst
    inside = pixel_grid(BOX).norm(dim=-1) < radius
    a, b = aligned[:, inside], rest[:, inside]
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.99
    assert (aligned - rest).abs()[:, ~inside].max() > 0.3  # the neighbours


def test_particles_keep_their_distance_and_picks_miss_by_as_much_as_asked():
    simulated = simulate(config(spacing=0.9, **PLAIN))
    diameter = 2.0 * load_molecule("hinge").radius_angst() / simulated.pixel_size_angst
    centre = simulated.pick_px - simulated.origin_px
    for rows in torch.arange(60).split(20):  # a micrograph each
        between = torch.cdist(centre[rows], centre[rows]) + 1e9 * torch.eye(20)
        assert between.min() >= 0.9 * diameter - 1e-3
        assert between.min(1).values.median() < 1.3 * diameter  # crowded
    assert simulated.origin_px.std().item() == pytest.approx(math.hypot(1.5, 0.29), rel=0.2)


@pytest.mark.parametrize("excess", [0.0, 15.0])
def test_the_noise_has_the_power_asked_for(excess):
    noise = coloured_noise(512, 3.0, excess, torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(1.0, abs=1e-3)
    power = torch.fft.fft2(noise).abs().square()
    k = torch.fft.fftfreq(512)
    k = torch.hypot(k[:, None], k[None])
    low, high = power[(k > 0) & (k < 0.01)].mean(), power[(k > 0.45) & (k < 0.5)].mean()
    assert (low / high).item() == pytest.approx(1.0 + excess, rel=0.2)


def test_junk_is_ice_or_nothing():
    simulated = simulate(config(n_particles=200, snr=1.0, spacing=1.3, junk_fraction=0.2, ice_fraction=0.1))
    ice, empty = simulated.is_ice, simulated.is_junk & ~simulated.is_ice
    assert 10 <= ice.sum() <= 32
    assert 24 <= empty.sum() <= 60
    middle = pixel_grid(BOX).norm(dim=-1) < 4.0
    level = simulated.images[:, middle].mean(1) / simulated.noise_std
    assert level[ice].median() > level[~simulated.is_junk].median() > level[empty].median()
    assert (simulated.contrast[simulated.is_junk] == 0.0).all()
    assert simulated.contrast[~simulated.is_junk].std() > 0.1


def test_the_signal_to_noise_ratio_is_that_within_the_molecule():
    clean = simulate(config(snr=1e8, spacing=2.5, shift_std_px=0.0, **PLAIN))
    radius = load_molecule("hinge").radius_angst() / clean.pixel_size_angst
    inside = pixel_grid(BOX).norm(dim=-1) <= radius
    noisy = simulate(config(snr=0.1, spacing=2.5, shift_std_px=0.0, **PLAIN))
    assert clean.images[:, inside].var().item() / noisy.noise_std**2 == pytest.approx(0.1, rel=0.15)


def test_boxes_are_what_the_written_micrographs_hold_at_the_written_coordinates(tmp_path):
    settings = config(n_particles=9, defocus_min_angst=1e4, defocus_max_angst=2e4)
    simulated = simulate(settings)
    write_simulated(tmp_path, simulated, settings)
    table = read_star(tmp_path / "particles.star").block("particles")
    with mrcfile.open(tmp_path / "particles.mrcs") as stack:
        images = stack.data.copy()
    for row in range(9):
        with mrcfile.open(tmp_path / table.text("rlnMicrographName")[row], permissive=True) as file:
            micrograph = np.squeeze(file.data)
        x, y = (round(float(table.text(f"rlnCoordinate{axis}")[row])) for axis in "XY")
        half = BOX // 2
        assert (micrograph[y - half : y + half, x - half : x + half] == images[row]).all()
    truth = (tmp_path / "truth.star").read_text()
    assert "svaeIsIce" in truth
    assert "svaeTrueContrast" in truth


def test_one_seed_one_set():
    same = [simulate(config(n_particles=12)).images.numpy().tobytes() for _ in range(2)]
    assert same[0] == same[1]
    assert simulate(config(n_particles=12, seed=4)).images.numpy().tobytes() != same[0]


def test_options_of_micrographs_are_refused_without_them():
    with pytest.raises(InputError) as caught:
        SimulateConfig(spacing=1.0)
    assert caught.value.path == "--spacing"
    with pytest.raises(InputError) as caught:
        config(ice_fraction=1.5)
    assert caught.value.path == "--ice-fraction"


@pytest.mark.parametrize("name", RANDOM)
def test_random_molecules_differ_by_their_seed_and_have_no_symmetry(name):
    base = config(molecule=name, n_particles=8, micrographs=False, snr=1e6, shift_std_px=0.0)
    one, again, other = (
        simulate(dataclasses.replace(base, molecule_seed=seed)).images for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=0.1 * float(one.std()))
    image = simulate(dataclasses.replace(base, molecule_seed=1)).images[:1]
    inside = pixel_grid(BOX).norm(dim=-1) < 0.45 * BOX
    for k in range(1, 12):
        turned = align_images(image, torch.tensor([k * math.pi / 6]), torch.zeros(1, 2))
        a, b = (x[0, inside] - x[0, inside].mean() for x in (image, turned))
        assert torch.nn.functional.cosine_similarity(a, b, 0) < 0.98
