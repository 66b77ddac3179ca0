"""A steerable engine whose generator is planted and not trained, so that its own images are its truth."""

from __future__ import annotations

import math

import torch

from cryo_svae.imaging.ctf import rfft_frequencies
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.simulate import load_molecule, project

BLUR_PX = 1.2


def planted_engine(
    box_px: int, *, contrast: float, max_shift_px: float = 0.0, shift_std_px: float = 1.0
) -> SteerableEngine:
    """Noise of variance 1; content of z is that of the hinge at rest and z times its motion.

    Blurred, so that next to nothing lies beyond the last ring.
    """
    torch.manual_seed(11)
    molecule = load_molecule("hinge")
    conformation = torch.tensor([[-1.0], [0.0], [1.0]])
    size = 3.0 * molecule.radius_angst() / box_px
    images = project(
        molecule, conformation, torch.zeros(3), torch.zeros(3, 2), box_px=box_px, pixel_size_angst=size
    )
    config = SteerableConfig(max_shift_px=max_shift_px, shift_std_px=shift_std_px)
    engine = SteerableEngine(box_px, 1, config)
    with torch.no_grad():
        blur = torch.exp(-2.0 * (math.pi * BLUR_PX * rfft_frequencies(box_px).norm(dim=-1)) ** 2)
        images = torch.fft.irfft2(torch.fft.rfft2(images) * blur, s=images.shape[1:])
        before, rest, after = engine.represent(contrast * images)
        generator = engine.generator
        z = torch.linspace(-4.0, 4.0, 81)[:, None]
        identity = torch.linalg.lstsq(generator.layers(z).double(), z.double(), driver="gelsd").solution
        motion = torch.ones(2 * engine.full.n_pairs, 1) @ identity.float().mT
        generator.last.weight.copy_(motion)
        generator.last.bias.zero_()
        generator.mean.copy_(rest)
        generator.scale.copy_((after - before) / 2.0)
        engine.mean_level.copy_(rest[0] @ engine.level[0] / engine.level.square().sum())
        engine.signal_power.copy_(engine.full.ring_sum(rest.square().sum(0)) / engine.noise_dof)
        engine.signal_energy.copy_(rest.square().sum())
    return engine.eval()


def make_alike(engine: SteerableEngine, n_particles: int) -> None:
    """Noise and scale are the same for all of n particles, as in images drawn from the engine's model."""
    engine.own.strength.fill_(torch.inf)
    engine.scales.variance.fill_(1e-9)
    engine.own_weight = torch.ones(n_particles, engine.own.n_bands)
    engine.own_scale = torch.ones(n_particles)
