from __future__ import annotations

import math

import pytest
import torch

from cryo_svae.imaging.geometry import pixel_grid
from cryo_svae.models.engine import Batch
from cryo_svae.models.own_noise import OwnNoise
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.simulate import SimulateConfig, simulate

DOF = 2.0 * math.pi * torch.arange(16.0) + 0.2


def power_of_noise(n: int, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Chi-squared powers of n particles on 16 rings."""
    generator = torch.Generator().manual_seed(0)
    mean = DOF.expand(n, -1)
    return scale * (mean + (2.0 * mean).sqrt() * torch.randn(n, 16, generator=generator)).clamp(min=0.0)


def test_every_ring_is_in_one_band_of_numbers_enough():
    own = OwnNoise(DOF)
    assert (own.in_band.sum(1) == 1.0).all()
    assert own.dof.sum().item() == pytest.approx(float(DOF.sum()), rel=1e-6)
    assert own.dof.min() > 30.0


def test_noise_that_is_the_same_for_all_is_found_without_bias():
    own, power = OwnNoise(DOF), power_of_noise(20_000)
    variance = torch.full((16,), 3.0)  # a wrong one to begin with
    for _ in range(12):
        trust = own.of_rings(own.weight(power / variance), 16)
        variance = own.variance((trust * power).sum(0), trust.sum(0), DOF)
    assert (variance - 1.0)[1:].abs().max() < 0.02


def test_a_particle_as_much_noisier_is_weighed_as_much_less():
    own = OwnNoise(1e3 * DOF)  # so many numbers that no prior matters
    weight = own.weight(1e3 * DOF * torch.tensor([[1.0], [4.0], [100.0]]))
    torch.testing.assert_close(weight[:, 0], torch.tensor([1.0, 0.25, 0.01]), rtol=0.01, atol=0.0)
    assert (weight[1:].diff(dim=1).abs() < 0.01).all()


def test_without_a_prior_all_weights_are_one():
    own = OwnNoise(DOF)
    own.strength.fill_(torch.inf)
    weight = own.weight(power_of_noise(5, 9.0))
    assert (weight == 1.0).all()
    assert (own.log_prior(weight) == 0.0).all()


def test_weights_of_one_are_the_likeliest_of_the_prior():
    own = OwnNoise(DOF)
    ones = torch.ones(1, own.n_bands)
    assert own.log_prior(ones).item() == 0.0
    for factor in (0.5, 2.0):
        assert own.log_prior(factor * ones).item() < 0.0


def test_misfit_is_of_the_spectrum_and_not_of_the_strength():
    own, power = OwnNoise(DOF), power_of_noise(500)
    torch.testing.assert_close(own.misfit(power), own.misfit(3.0 * power), rtol=1e-3, atol=1e-3)
    iced = power * torch.where(torch.arange(16) < 4, 6.0, 1.0)
    assert own.misfit(iced).quantile(0.05) > own.misfit(power).quantile(0.99)


@pytest.fixture(scope="module")
def iced() -> tuple[SteerableEngine, torch.Tensor, torch.Tensor]:
    """An engine begun with particles of which some are under bright blobs; images, and which these are."""
    made = simulate(SimulateConfig(n_particles=400, snr=0.3, shift_std_px=0.0))
    is_iced = torch.arange(400) % 20 == 0
    blob = torch.exp(-0.5 * (pixel_grid(32).norm(dim=-1) / 3.5).square())
    images = made.images / made.noise_std + 10.0 * blob * is_iced[:, None, None]
    engine = SteerableEngine(32, 1, SteerableConfig(max_shift_px=0.0))
    batches = [Batch(rows, engine.represent(images[rows]), None) for rows in torch.arange(400).split(100)]
    engine.start(iter(batches), 400)
    return engine, images, is_iced


def test_a_few_bright_images_do_not_make_the_noise(iced):
    engine, images, is_iced = iced
    clean = SteerableEngine(32, 1, SteerableConfig(max_shift_px=0.0))
    rest = images[~is_iced]
    clean.start(iter([Batch(torch.arange(len(rest)), clean.represent(rest), None)]), len(rest))
    plain = engine.full.ring_sum(engine.represent(images).square().sum(1)).mean(0) / engine.noise_dof
    ratio = engine.noise_variance / clean.noise_variance
    assert (plain / clean.noise_variance)[1:3].min() > 1.8  # as a mean it would be that of the ice
    assert (ratio[1:3] - 1.0).abs().max() < 0.3
    assert (ratio[4:] - 1.0).abs().max() < 0.1


def test_bright_images_weigh_little_where_they_are_bright(iced):
    engine, _, is_iced = iced
    assert engine.own_weight[is_iced, 0].max() < 0.2
    assert engine.own_weight[~is_iced, 0].median() > 0.8
    assert (engine.own_weight[is_iced, -1].median() - 1.0).abs() < 0.2


def test_the_merit_of_an_image_that_no_content_explains_is_low(iced):
    engine, images, is_iced = iced
    for _ in range(3):
        for rows in torch.arange(400).split(100):
            engine.elbo(Batch(rows, engine.represent(images[rows]), None))
    merit = engine.infer(Batch(torch.arange(400), engine.represent(images), None)).figure_of_merit
    assert merit[is_iced].max() < merit[~is_iced].quantile(0.05)


def test_a_model_of_an_earlier_version_has_weights_of_one(iced):
    engine, _, _ = iced
    state = {name: value for name, value in engine.state_dict().items() if name != "own_weight"}
    other = SteerableEngine(32, 1, SteerableConfig(max_shift_px=0.0))
    other.load_state_dict(state)
    assert other.own_weight.shape == engine.own_weight.shape
    assert (other.own_weight == 1.0).all()
