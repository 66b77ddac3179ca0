from __future__ import annotations

import pytest
import torch

from cryo_svae.models.engine import Batch, Posterior
from cryo_svae.models.own_scale import BOUNDS, OwnScale
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.simulate import SimulateConfig, simulate
from tests.models.learning import learn
from tests.models.planted import planted_engine


def test_a_scale_is_the_posterior_mean_of_its_gaussian():
    scales = OwnScale()
    scales.variance.fill_(0.04)
    agreement, energy = torch.tensor([0.0, 60.0, 1e6]), torch.tensor([0.0, 50.0, 1e6])
    mean, variance = scales.found(agreement, energy)
    torch.testing.assert_close(mean, torch.tensor([1.0, 85.0 / 75.0, 1.0]), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(variance, torch.tensor([0.04, 1.0 / 75.0, 1e-6]), rtol=1e-3, atol=0.0)


def test_an_image_of_anything_else_has_a_scale_within_bounds():
    mean, _ = OwnScale().found(torch.tensor([-1e5, 1e7]), torch.tensor([1e3, 1e3]))
    assert mean.tolist() == pytest.approx(list(BOUNDS))


def test_the_prior_is_what_summing_the_scale_out_adds():
    """By brute force: exp(agreement s - energy s²/2), summed over the Gaussian prior of s."""
    scales = OwnScale()
    scales.variance.fill_(0.05)
    agreement, energy = torch.tensor([30.0], dtype=torch.float64), torch.tensor([25.0], dtype=torch.float64)
    s = torch.linspace(-3.0, 5.0, 100_001, dtype=torch.float64)
    prior = torch.exp(-0.5 * (s - 1.0).square() / 0.05) / (2.0 * torch.pi * 0.05) ** 0.5
    exact = torch.log(torch.trapezoid(prior * torch.exp(agreement * s - 0.5 * energy * s.square()), s))
    mean, variance = scales.found(agreement, energy)
    summed = agreement * mean - 0.5 * energy * mean.square() + scales.log_prior(mean, variance)
    assert summed.item() == pytest.approx(exact.item(), abs=1e-4)


def test_infer_finds_how_strong_each_particle_s_content_is():
    torch.set_num_threads(1)
    engine = planted_engine(24, contrast=0.6)
    engine.scales.variance.fill_(0.09)
    scale = 1.0 + 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(0)).clamp(-2.0, 2.0)
    content = engine.decode(torch.zeros(200, 1)).detach() * scale[:, None, None]
    images = content + torch.randn(content.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        guess = engine.eval().search._first_guess(Batch(torch.arange(200), engine.represent(images), None))
    assert (guess.scale - scale).abs().median() < 0.15
    assert torch.corrcoef(torch.stack([guess.scale, scale]))[0, 1] > 0.8


def test_contrast_that_varies_is_not_taken_for_content():
    """A hinge whose particles are stronger and weaker by 35 %: one latent is left for its motion."""
    torch.set_num_threads(1)
    made = simulate(SimulateConfig(n_particles=1500, snr=0.5, shift_std_px=0.0, seed=4))
    generator = torch.Generator().manual_seed(99)
    lone = simulate(SimulateConfig(n_particles=1500, snr=1e6, shift_std_px=0.0, seed=4)).images
    scale = 1.0 + 0.35 * torch.randn(1500, generator=generator).clamp(-2.0, 2.0)
    noise = torch.randn(lone.shape, generator=generator)
    images = lone / made.noise_std * scale[:, None, None] + noise
    torch.manual_seed(0)
    engine = SteerableEngine(32, 1, SteerableConfig(max_shift_px=0.0))
    kept = engine.represent(images)
    batches = [Batch(rows, kept[rows], None) for rows in torch.arange(1500).split(100)]
    engine.start(iter(batches), 1500)
    learn(engine, batches, 10)
    z = Posterior.cat([engine.eval().infer(batch) for batch in batches]).z_mean[:, 0]
    by_motion, by_contrast = (
        abs(float(torch.corrcoef(torch.stack([z, truth]))[0, 1]))
        for truth in (made.conformation[:, 0], scale)
    )
    print(f"z follows the motion by {by_motion:.3f}, contrast by {by_contrast:.3f}")
    assert by_motion > 0.9
    assert by_contrast < 0.2
    found = engine.own_scale
    assert torch.corrcoef(torch.stack([found, scale]))[0, 1] > 0.6
