"""The engines' bounds against log p(image), computed apart from them: own float64 code of the weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp

from benchmarks.calibration import drawn_from
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.engine import Batch
from cryo_svae.models.steerable import SteerableEngine
from tests.models.planted import make_alike, planted_engine

Reals = NDArray[np.float64]
BOX, RADIUS = 12, 5.0
CONFIG = CoordinateConfig(
    hidden=8, encoder_hidden=16, mask_radius_px=RADIUS, rotation_prior="normal", rotation_std_deg=60.0,
    shift_std_px=0.7, augment_rotation=False,
)  # fmt: skip


def normal_log_density(x: Reals, mean: Reals | float, std: Reals | float) -> Reals:
    """Summed over the last axis, nats."""
    return (-0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2.0 * math.pi)).sum(-1)


class PaperModel:
    """The paper's generative model in numpy: y(p) = MLP(R(psi) (p + o) / (N/2), z) + noise in a disc."""

    def __init__(self, engine: CoordinateEngine) -> None:
        self.weights = {name: w.double().numpy() for name, w in engine.state_dict().items()}
        self.config = engine.config
        axis = np.arange(BOX) - BOX // 2
        row, column = np.nonzero(axis[:, None] ** 2 + axis**2 <= RADIUS**2)
        self.inside, self.points = (row, column), np.stack([axis[column], axis[row]], 1).astype(float)

    def log_likelihood(self, image: Reals, z: Reals, psi: Reals, origin: Reals) -> Reals:
        """log p(image | z, psi, origin) of k samples, nats."""
        w, (cos, sin) = self.weights, (np.cos(psi)[:, None], np.sin(psi)[:, None])
        x, y = (self.points[:, k] + origin[:, k, None] for k in (0, 1))
        turned = np.stack([cos * x - sin * y, sin * x + cos * y], -1) / (BOX / 2)
        of_place = turned @ w["generator.of_coordinates.weight"].T + w["generator.of_coordinates.bias"]
        hidden = np.tanh(of_place + (z @ w["generator.of_z.weight"].T)[:, None])
        hidden = np.tanh(hidden @ w["generator.rest.0.weight"].T + w["generator.rest.0.bias"])
        mean = (hidden @ w["generator.rest.2.weight"].T + w["generator.rest.2.bias"])[..., 0]
        return normal_log_density(image[self.inside], mean, math.exp(w["pixels.log_std"]))

    def posterior(self, image: Reals) -> tuple[Reals, Reals]:
        """Means and standard deviations (psi, x, y, z) of q, as the encoder gives them."""
        w, hidden = self.weights, image[self.inside]
        for layer in (0, 2):
            hidden = np.tanh(w[f"encoder.{layer}.weight"] @ hidden + w[f"encoder.{layer}.bias"])
        mean, log_std = np.split(w["encoder.4.weight"] @ hidden + w["encoder.4.bias"], 2)
        scale = np.array([1.0, self.config.shift_std_px, self.config.shift_std_px, *np.ones(len(mean) - 3)])
        return mean * scale, np.exp(log_std) * scale

    def log_weights(self, image: Reals, n: int, seed: int, widened: float = 1.0) -> Reals:
        """log p(image, latents) - log q(latents) of n samples of q, its deviations widened."""
        mean, std = self.posterior(image)
        std = std * widened
        latents = mean + std * np.random.default_rng(seed).standard_normal((n, len(mean)))
        shift_std, psi_std = self.config.shift_std_px, math.radians(self.config.rotation_std_deg)
        prior = normal_log_density(
            latents, 0.0, np.array([psi_std, shift_std, shift_std, *std[3:] * 0 + 1])
        )
        psi, origin, z = latents[:, 0], latents[:, 1:3], latents[:, 3:]
        return self.log_likelihood(image, z, psi, origin) + prior - normal_log_density(latents, mean, std)


def standard_error(values: Reals) -> float:
    return float(values.std() / math.sqrt(len(values)))


def bounds(engine: CoordinateEngine, image: torch.Tensor, n: int) -> Reals:
    """n draws of the engine's bound of one image."""
    copies = image.expand(n, 1, BOX, BOX)
    with torch.no_grad():
        return engine.elbo(Batch(torch.arange(n), copies, None)).elbo.double().numpy()


@pytest.fixture(scope="module")
def paper() -> tuple[CoordinateEngine, torch.Tensor]:
    """A small engine of strong content, and an image that it might have made."""
    torch.manual_seed(4)
    engine = CoordinateEngine(BOX, 2, CONFIG)
    with torch.no_grad():
        for layer in (engine.generator.of_coordinates, engine.generator.of_z, engine.generator.rest[0]):
            layer.weight.mul_(2.0)
        engine.encoder[-1].bias += torch.tensor(
            [0.5, 0.3, -0.3, 0.4, 0.4] + [-1.0] * 5
        )  # far from the priors
        engine.pixels.log_std.fill_(math.log(0.6))
        image = engine.decode(torch.tensor([[0.5, -1.0]]))[0] + 0.6 * torch.randn(BOX, BOX)
    return engine, image


def test_the_paper_s_bound_is_the_mean_log_weight_of_q(paper):
    """E_q[log p(y, latents) - log q], with no formula of a divergence: signs and scales of every KL."""
    engine, image = paper
    ours = bounds(engine, image, 10_000)
    weights = PaperModel(engine).log_weights(image.double().numpy(), 10_000, 1)
    error = math.hypot(standard_error(ours), standard_error(weights))
    assert error < 0.1
    assert abs(ours.mean() - weights.mean()) < 4.0 * error


def test_the_paper_s_bound_is_below_the_evidence_and_comes_up_to_it(paper):
    """By importance sampling; the gap closes as the encoder alone is fitted to the image."""
    engine, image = paper
    evidence = PaperModel(engine)
    parameters = list(engine.encoder.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    gaps = []
    for _ in range(2):
        log_weights = evidence.log_weights(image.double().numpy(), 30_000, 2, widened=1.5)
        exact = logsumexp(log_weights) - math.log(len(log_weights))
        relative = np.exp(log_weights - exact)
        samples = relative.sum() ** 2 / (relative**2).sum()
        gaps.append((exact - bounds(engine, image, 5_000).mean(), samples))
        batch = Batch(torch.arange(16), image.expand(16, 1, BOX, BOX), None)
        for _ in range(150):
            optimizer.zero_grad()
            (-engine.elbo(batch).elbo.mean()).backward()
            optimizer.step()
        evidence = PaperModel(engine)
    (before, _), (after, samples) = gaps
    assert samples > 500, "the estimate rests on a few samples"
    assert -0.05 < after < 0.2 * before
    print(f"gap {before:.2f} nats, with a fitted encoder {after:.3f}; {samples:.0f} effective samples")


def test_the_bound_is_the_evidence_where_the_generator_ignores_its_latents():
    """q the prior, content constant: nothing is lost, and log p(image) is a Gaussian's."""
    engine = CoordinateEngine(BOX, 2, CONFIG)
    with torch.no_grad():
        for layer in (engine.generator.of_coordinates, engine.generator.of_z, engine.encoder[-1]):
            layer.weight.zero_()
        engine.encoder[-1].bias.zero_()
        engine.encoder[-1].bias[5] = math.log(math.radians(CONFIG.rotation_std_deg))
    image = torch.randn(BOX, BOX)
    constant = float(engine.decode(torch.zeros(1, 2))[0, BOX // 2, BOX // 2].detach())
    data = image.double().numpy()[PaperModel(engine).inside]
    exact = normal_log_density(data, constant, 1.0)
    np.testing.assert_allclose(bounds(engine, image, 3), exact, atol=1e-3)


def linear_engine(exact: bool) -> tuple[CoordinateEngine, torch.Tensor, float]:
    """An engine linear in z (rectifiers that never shut), q its exact posterior; an image, log p(image).

    y = a + B z + noise, so y ~ N(a, s² I + B B'), in closed form.
    """
    torch.manual_seed(6)
    config = dataclasses.replace(
        CONFIG, layers=1, hidden=4, activation="relu", rotate=False, translate=False
    )
    engine = CoordinateEngine(BOX, 2, config)
    generator = engine.generator
    with torch.no_grad():
        generator.of_coordinates.bias.fill_(30.0)
        generator.of_z.weight.mul_(2.0)
        engine.pixels.log_std.fill_(math.log(0.8))

        def mean(z: torch.Tensor) -> Reals:
            return engine._inside(engine.decode(z)[:, None])[..., 0].double().numpy()

        zero, *units = mean(torch.cat([torch.zeros(1, 2), torch.eye(2)]))
        slopes = np.stack(units, 1) - zero[:, None]
        data = (
            zero
            + slopes @ np.array([1.0, -0.5])
            + 0.8 * np.random.default_rng(0).standard_normal(len(zero))
        )
        image = engine._image(torch.from_numpy(data).float()[None, :, None])[0, 0]
        precision = np.eye(2) + slopes.T @ slopes / 0.64
        # q is diagonal: a turn of z leaves the model as it is and makes the posterior so
        turn = torch.from_numpy(np.linalg.eigh(precision)[1]).float()
        generator.of_z.weight.copy_(generator.of_z.weight @ turn)
        slopes = slopes @ turn.double().numpy()
        precision = np.eye(2) + slopes.T @ slopes / 0.64
        at = np.linalg.solve(precision, slopes.T @ (data - zero) / 0.64)
        engine.encoder[-1].weight.zero_()
        engine.encoder[-1].bias.zero_()
        engine.encoder[-1].bias[3:5] = torch.from_numpy(at).float() + (0.0 if exact else 0.5)
        engine.encoder[-1].bias[8:10] = torch.from_numpy(-0.5 * np.log(np.diag(precision))).float()
    covariance = 0.64 * np.eye(len(zero)) + slopes @ slopes.T
    left = data - zero
    _, log_det = np.linalg.slogdet(2.0 * math.pi * covariance)
    return engine, image, float(-0.5 * (left @ np.linalg.solve(covariance, left) + log_det))


@pytest.mark.parametrize("exact", [True, False])
def test_the_bound_of_a_linear_generator_is_its_closed_form_evidence(exact):
    """With the exact posterior; and below it by KL(q || posterior) where q is off by a half."""
    engine, image, evidence = linear_engine(exact)
    draws = bounds(engine, image, 5_000)
    std = engine.encoder[-1].bias[8:10].detach().exp().double().numpy()
    lost = 0.0 if exact else 0.5 * float(((0.5 / std) ** 2).sum())
    assert draws.mean() == pytest.approx(evidence - lost, abs=4.0 * standard_error(draws) + 1e-3)


def test_the_bound_with_a_free_mean_is_below_the_evidence_under_every_angle_alike():
    """Quadrature over z and psi, psi uniform: the paper's KL with a free mean costs a little more."""
    torch.manual_seed(8)
    config = dataclasses.replace(
        CONFIG, translate=False, rotation_prior="free-mean", rotation_std_deg=180.0
    )
    engine = CoordinateEngine(BOX, 1, config)
    with torch.no_grad():
        engine.generator.of_coordinates.weight.mul_(3.0)
        engine.pixels.log_std.fill_(math.log(0.5))
        image = engine.decode(torch.tensor([[0.5]]))[0] + 0.5 * torch.randn(BOX, BOX)
    z, psi = np.linspace(-5.0, 5.0, 101), 2.0 * math.pi / 90 * np.arange(90)
    grid_z, grid_psi = (axis.ravel() for axis in np.meshgrid(z, psi))
    seen = PaperModel(engine).log_likelihood(
        image.double().numpy(), grid_z[:, None], grid_psi, np.zeros((len(grid_z), 2))
    )
    prior = normal_log_density(grid_z[:, None], 0.0, 1.0) + math.log(z[1] - z[0]) - math.log(len(psi))
    evidence = logsumexp(seen + prior)
    optimizer = torch.optim.Adam(engine.encoder.parameters(), lr=0.03)
    batch = Batch(torch.arange(16), image.expand(16, 1, BOX, BOX), None)
    for _ in range(150):
        optimizer.zero_grad()
        (-engine.elbo(batch).elbo.mean()).backward()
        optimizer.step()
    gap = evidence - bounds(engine, image, 5_000).mean()
    # a Gaussian of psi costs log(pi) - 1/2 by the paper, and log(2 pi) - log(2 pi e)/2 about all angles
    paper_s_cost = (
        math.log(math.pi) - 0.5 - (math.log(2.0 * math.pi) - 0.5 * math.log(2.0 * math.pi * math.e))
    )
    assert paper_s_cost - 0.02 < gap < paper_s_cost + 0.3


# -- the steerable engine ----------------------------------------------------------------------


def turned_spectra(images: Reals, psi: Reals, k: Reals) -> NDArray[np.complex128]:
    """sum over p of I(p) exp(2 pi i R(-psi) k·p / N): (images, psi, k), by the definition."""
    box = images.shape[-1]
    axis = np.arange(box) - box // 2
    rows = []
    for angle in psi:
        cos, sin = math.cos(angle), math.sin(angle)
        kx, ky = cos * k[:, 0] + sin * k[:, 1], cos * k[:, 1] - sin * k[:, 0]
        along_x, along_y = (np.exp(2j * math.pi / box * q[:, None] * axis) for q in (kx, ky))
        rows.append(np.einsum("kx,ky,nyx->nk", along_x, along_y, images, optimize=True))
    return np.stack(rows, 1)


def integrated_evidence(engine: SteerableEngine, data: Reals, reach_px: float) -> Reals:
    """log of the integral over z, psi and origins of exp(<y, I> - |I|²/2) (b,), by brute force.

    data (b, N, N): noise of variance 1. I(p) = sum_k F_k exp(2 pi i k·R(psi)(p + o) / N) / N², with F the
    discrete Fourier transform of a decoded image: nothing of the engine but ``decode`` and its priors.
    """
    box = data.shape[-1]
    z = np.linspace(-4.0, 4.0, 33)
    with torch.no_grad():
        decoded = engine.decode(torch.from_numpy(z).float()[:, None]).double().numpy()
    axis = np.arange(box) - box // 2
    ky, kx = (values.ravel() for values in np.meshgrid(axis, axis, indexing="ij"))
    k = np.stack([kx, ky], 1)[kx**2 + ky**2 < (box // 2) ** 2].astype(float)
    content = turned_spectra(decoded, np.zeros(1), -k)[:, 0] / box**2
    psi = 2.0 * math.pi / 90 * np.arange(90)
    seen = turned_spectra(data, psi, k)
    steps = np.arange(-reach_px, reach_px + 0.25, 0.5)
    origin = np.stack([values.ravel() for values in np.meshgrid(steps, steps)], 1)
    cos, sin = np.cos(psi), np.sin(psi)
    turned = np.stack(
        [np.outer(cos, origin[:, 0]) - np.outer(sin, origin[:, 1]),
         np.outer(sin, origin[:, 0]) + np.outer(cos, origin[:, 1])], -1,
    )  # fmt: skip
    variance = float(engine.shift_variance)
    prior_o = -0.5 * (origin**2).sum(1) / variance + math.log(0.25 / (2.0 * math.pi * variance))
    prior_z = -0.5 * z**2 - 0.5 * math.log(2.0 * math.pi) + math.log(z[1] - z[0])
    norm = (decoded**2).sum((1, 2))
    parts = []
    for j, q in enumerate(turned):
        wave = np.exp(2j * math.pi / box * q @ k.T)
        scores = np.einsum("bk,ok,zk->boz", seen[:, j], wave, content, optimize=True).real - 0.5 * norm
        parts.append(logsumexp(scores + prior_o[:, None] + prior_z, axis=(1, 2)))
    return logsumexp(np.stack(parts), axis=0) - math.log(len(psi))


def test_the_steerable_engine_s_evidence_is_the_integral_over_z_psi_and_origins():
    """What ``infer`` writes is that, and the bound lies below: in pixels, by brute force."""
    torch.set_num_threads(1)
    engine = planted_engine(24, contrast=0.12, max_shift_px=3.0, shift_std_px=0.8)
    images, _ = drawn_from(engine, 8, seed=3, noise_std=1.0)
    batch = Batch(torch.arange(8), engine.represent(images), None)
    engine.origin_px = torch.zeros(8, 2)
    make_alike(engine, 8)
    with torch.no_grad():
        empty = engine.empty_image(engine.ring_power(batch), engine.own_weight)
        found = engine.infer(batch).log_likelihood - empty
        engine.elbo(batch)  # the origins of a first look
        bound = torch.stack([engine.elbo(batch).elbo for _ in range(40)]).mean(0) - empty
        level = engine.full.image(engine.full(torch.ones(1, 24, 24)))[0]
        excess = engine._levels(batch) - engine.mean_level
    data = images * engine.full.mask - excess[:, None, None] * level
    exact = torch.from_numpy(integrated_evidence(engine, data.double().numpy(), 3.0))
    off, gap = found - exact, exact - bound
    print(
        f"of {exact.numpy().round(1)} nats infer is off by {off.numpy().round(2)}, "
        f"the bound is below by {gap.numpy().round(2)}"
    )
    assert exact.mean() > 15.0, "there is something to integrate"
    assert off.abs().median() < 0.25
    assert off.abs().max() < 0.8
    assert gap.min() > -0.2  # what rings and angles leave out, 0.4 % of the evidence
    assert gap.median() > 0.05
