from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cryo_svae.config import PreparationConfig
from cryo_svae.particles.extent import found_diameter_angst, found_radius_px
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.preprocessing import Preparation, plan_preparation, prepare
from cryo_svae.simulate import SimulateConfig, Simulated, load_molecule, simulate, write_simulated
from cryo_svae.simulate.chains import chain


def prepared(simulated: Simulated) -> torch.Tensor:
    box, size = simulated.images.shape[-1], simulated.pixel_size_angst
    plan = Preparation(
        box_px=box, pixel_size_angst=size, mask_diameter_angst=(box - 2) * size, invert=False
    )
    return prepare(simulated.images, size, plan)[0]


def micrographs(**changes: object) -> SimulateConfig:
    settings = {
        "molecule": "lump", "n_particles": 600, "box": 64, "pixel_size_angst": 3.5, "n_micrographs": 6,
        "micrographs": True, "defocus_min_angst": 9_000, "defocus_max_angst": 26_000, "snr": 0.3,
    }  # fmt: skip
    return SimulateConfig(**{**settings, **changes})


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("spacing", [0.9, 2.5])
def test_neighbours_and_ice_do_not_widen_a_particle(seed, spacing):
    simulated = simulate(micrographs(molecule_seed=seed, spacing=spacing, shift_std_px=1.5))
    true = chain("lump", seed).radius_angst() / 3.5
    found = found_radius_px([(prepared(simulated), simulated.ctf)])
    assert true - 0.5 <= found <= 1.25 * true + 2.0


@pytest.mark.parametrize("name", ["hinge", "c2", "ring"])
def test_a_lone_particle_is_held_and_not_the_whole_box(name):
    simulated = simulate(SimulateConfig(molecule=name, n_particles=1500, box=48))
    true = load_molecule(name).radius_angst() / simulated.pixel_size_angst
    found = found_radius_px([(prepared(simulated), None)])
    assert true <= found <= 1.5 * true + 2.0


def test_noise_has_no_extent():
    simulated = simulate(SimulateConfig(molecule="noise", n_particles=600))
    assert found_radius_px([(prepared(simulated), None)]) is None
    assert found_radius_px([(prepared(simulated)[:1], None)]) is None


def test_how_images_are_handed_over_does_not_matter():
    simulated = simulate(micrographs())
    images = prepared(simulated)
    for n in (1, 7, 256):
        parts = [(images[rows], simulated.ctf[rows]) for rows in torch.arange(600).split(n)]
        assert found_radius_px(parts) == pytest.approx(found_radius_px([(images, simulated.ctf)]), rel=0.1)


def test_a_set_on_disk_has_the_extent_of_its_images(tmp_path: Path):
    settings = micrographs()
    simulated = simulate(settings)
    write_simulated(tmp_path, simulated, settings)
    particles = read_particles(tmp_path / "particles.star")
    plan = plan_preparation(particles, PreparationConfig(), 128)
    found = found_diameter_angst(ImageSource(particles), plan, use_ctf=True)
    assert found / 2.0 / 3.5 == pytest.approx(
        found_radius_px([(prepared(simulated), simulated.ctf)]), rel=0.05
    )


def test_real_particles_of_beta_galactosidase_are_parted_from_their_neighbours(shared_data: Path):
    particles = read_particles(shared_data / "bgal" / "bgal_40px_9.56A.star")
    plan = plan_preparation(particles, PreparationConfig(invert=True), 128)
    assert 170.0 < found_diameter_angst(ImageSource(particles), plan, use_ctf=False) < 230.0
