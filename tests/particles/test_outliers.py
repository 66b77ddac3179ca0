from __future__ import annotations

import math

import pytest
import torch

from cryo_svae.imaging.geometry import pixel_grid
from cryo_svae.particles import outliers
from cryo_svae.simulate import SimulateConfig, simulate

N, BOX, RADIUS_PX = 2000, 32, 12.0


def of_noise(n: int = N) -> torch.Tensor:
    return torch.randn(n, BOX, BOX, generator=torch.Generator().manual_seed(0))


def blob(width_px: float) -> torch.Tensor:
    return torch.exp(-0.5 * (pixel_grid(BOX).norm(dim=-1) / width_px).square())


def found(images: torch.Tensor) -> torch.Tensor:
    flags = outliers.found(outliers.measures(images, RADIUS_PX))
    return torch.zeros(len(images), dtype=torch.bool) if flags is None else flags


def test_of_noise_alone_next_to_nothing_stands_out():
    assert found(of_noise()).double().mean() < 0.003


def test_a_crystal_in_a_few_images_stands_out_whatever_their_contrast():
    images = of_noise()
    iced = torch.arange(N) % 25 == 0
    images[iced] += 4.0 * blob(5.0)
    images *= torch.linspace(0.4, 2.0, N)[:, None, None]
    flags = found(images)
    assert flags[iced].double().mean() > 0.95
    assert flags[~iced].double().mean() < 0.003


def test_what_every_fifth_image_shows_is_a_kind_and_no_outlier():
    images = of_noise()
    images[::5] += 4.0 * blob(5.0)
    assert not found(images).any()


def test_one_hot_pixel_stands_out():
    images = of_noise()
    images[7, 3, 3] = 110.0
    assert found(images)[7]


@pytest.mark.parametrize("snr", [0.1, 1.0])
def test_particles_of_one_molecule_in_every_view_do_not_stand_out(snr):
    made = simulate(SimulateConfig(molecule="views", n_particles=1000, snr=snr, seed=1))
    box = made.images.shape[-1]
    measured = outliers.measures(made.images / made.noise_std, box / 2 - 1)
    assert outliers.stands_out(measured).double().mean() < 0.01


def test_measures_are_mean_powers():
    measured = outliers.measures(3.0 * of_noise(), RADIUS_PX)
    assert measured.shape == (N, outliers.N_MEASURES)
    assert measured[:, 0].mean().item() == pytest.approx(9.0, rel=0.01)
    bands = measured[:, 1:].mean(0)
    assert (bands / bands[-1] - 1.0).abs().max() < 0.15
    assert math.isfinite(float(bands.sum()))


def test_of_no_image_none_stands_out():
    assert outliers.found(outliers.measures(torch.zeros(0, BOX, BOX), RADIUS_PX)) is None
