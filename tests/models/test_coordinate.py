"""The paper's engine: its divergences, its invariances, its bound, its options."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryo_svae.errors import InputError
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import ctf_2d
from cryo_svae.models import coordinate_generator
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine, Latents
from cryo_svae.models.divergences import kl_normal
from cryo_svae.models.engine import Batch
from cryo_svae.models.vanilla import VanillaEngine
from tests.imaging.test_ctf import table

BOX = 16
SMALL = CoordinateConfig(hidden=12, encoder_hidden=10, mask_radius_px=7.0)


def batch(n: int = 3, channels: int = 1, ctf=None, box: int = BOX) -> Batch:
    return Batch(torch.arange(n), torch.rand(n, channels, box, box), ctf)


def engine(config: CoordinateConfig = SMALL, z_dim: int = 2, seed: int = 3) -> CoordinateEngine:
    torch.manual_seed(seed)
    return CoordinateEngine(BOX, z_dim, config)


finite = st.floats(-3.0, 3.0)


@settings(max_examples=50, deadline=None)
@given(finite, st.floats(-2.0, 1.0), st.floats(0.2, 4.0))
def test_divergences_equal_torchs_and_are_not_negative(mean, log_std, prior_std):
    q = torch.distributions.Normal(torch.tensor(mean), torch.tensor(log_std).exp())
    p = torch.distributions.Normal(0.0, torch.tensor(prior_std))
    std = torch.tensor([prior_std])
    ours = kl_normal(torch.tensor([[mean]]), torch.tensor([[log_std]]), std, std)
    torch.testing.assert_close(ours[0, 0], torch.distributions.kl_divergence(q, p), atol=1e-4, rtol=1e-4)
    assert float(ours) >= -1e-5


def test_the_free_mean_divergence_of_the_rotation_is_the_papers():
    model = engine(dataclasses.replace(SMALL, translate=False))
    log_std, s = math.log(0.3), math.pi
    paper = -log_std + math.log(s) + 0.3**2 / (2 * s**2) - 0.5
    _, kl_pose = model._kl(Latents(torch.full((1, 5), 1.7), torch.full((1, 5), log_std)))
    assert float(kl_pose) == pytest.approx(paper, abs=1e-6)


@pytest.mark.parametrize("pixels", ["gaussian-unit", "gaussian", "gaussian-per-pixel", "bernoulli"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_pixel_gives_a_finite_bound_with_gradients(pixels, channels):
    model = engine(dataclasses.replace(SMALL, pixels=pixels, channels=channels))
    terms = model.elbo(batch(channels=channels))
    assert terms.elbo.shape == (3,)
    assert (terms.kl_z >= 0).all()
    (-terms.elbo.mean()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert model.decode(torch.zeros(2, 2)).shape == ((2, BOX, BOX) if channels == 1 else (2, 3, BOX, BOX))


def test_gaussian_pixels_in_nats_are_scipys():
    model = engine()
    with torch.no_grad():
        model.pixels.log_std.fill_(0.4)
    expected = torch.distributions.Normal(0.2, math.exp(0.4)).log_prob(torch.tensor(1.5))
    mean, log_std = model.pixels.split(torch.tensor([[0.2]]))
    torch.testing.assert_close(model.pixels.log_prob(mean, log_std, torch.tensor([[1.5]]))[0, 0], expected)


def test_the_softplus_mean_is_never_negative():
    model = engine(dataclasses.replace(SMALL, softplus=True))
    inside = geometry.pixel_grid(BOX).norm(dim=-1) <= 7.0
    images = model.decode(3.0 * torch.randn(4, 2))
    assert (images[:, inside] > 0).all()
    assert not images[:, ~inside].any()


def test_bernoulli_data_outside_zero_to_one_are_refused():
    model = engine(dataclasses.replace(SMALL, pixels="bernoulli"))
    wrong = Batch(torch.arange(2), 3.0 * torch.randn(2, 1, BOX, BOX), None)
    with pytest.raises(InputError, match="--pixels"):
        model.start(iter([wrong]), 2)


def test_the_learned_spread_starts_at_the_datas():
    model = engine()
    model.start(iter([Batch(torch.arange(64), 2.5 * torch.randn(64, 1, BOX, BOX), None)]), 64)
    assert float(model.pixels.log_std.detach().exp()) == pytest.approx(2.5, rel=0.05)


def test_a_posed_generator_is_the_reference_in_the_particles_pose():
    """Decoding at q = R(theta)(p + o) is what geometry calls the particle of that pose."""
    torch.manual_seed(1)
    model = CoordinateEngine(32, 1, dataclasses.replace(SMALL, mask_radius_px=math.inf))
    z, psi, origin = torch.randn(1, 1), torch.tensor([0.8]), torch.tensor([[1.5, -2.0]])
    with torch.no_grad():
        posed = model._image(model.generate(z, psi, origin))[:, 0]
        expected = geometry.pose_references(model.decode(z), psi, origin)
    inside = geometry.pixel_grid(32).norm(dim=-1) < 11
    torch.testing.assert_close(posed[:, inside], expected[:, inside], atol=2e-3, rtol=0)


def test_the_encoders_turned_input_is_undone_before_decoding(monkeypatch):
    """With a perfect encoder, the bound does not depend on the random turn of its input."""
    torch.manual_seed(1)
    model = CoordinateEngine(BOX, 1, dataclasses.replace(SMALL, mask_radius_px=math.inf))
    truth_psi, truth_origin = torch.tensor([0.4]), torch.tensor([[1.0, -0.5]])
    seen = []

    def perfect(images):
        turn = turns[-1]
        origin = (geometry.rotation_matrix(-turn) @ truth_origin[..., None])[..., 0]
        seen.append(images)
        psi = truth_psi[:, None] + turn[:, None]
        return Latents(torch.cat([psi, origin, torch.zeros(1, 1)], 1), torch.full((1, 4), -20.0))

    turns: list[torch.Tensor] = []
    real_rand = torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda *a, **k: turns.append(2 * math.pi * (r := real_rand(*a, **k))) or r
    )
    monkeypatch.setattr(model, "encode", perfect)
    with torch.no_grad():
        image = model._image(model.generate(torch.zeros(1, 1), truth_psi, truth_origin))
        bounds = [float(model.elbo(Batch(torch.arange(1), image, None)).log_likelihood) for _ in range(4)]
    assert np.ptp(bounds) < 1e-2
    assert len(turns) == 4
    # …and what the encoder was shown is the image turned by that angle.
    turned = geometry.pose_references(image[:, 0], turns[0], torch.zeros(1, 2))
    torch.testing.assert_close(seen[0][:, 0], turned)


def test_z_waits_for_its_epochs():
    model = engine(dataclasses.replace(SMALL, z_delay=2))
    for epoch, active in ((0, False), (1, False), (2, True)):
        model.begin_epoch(epoch, 10)
        assert bool((model.elbo(batch()).kl_z > 0).all()) == active


@pytest.mark.parametrize(("candidates", "gains"), [(8, False), (2, True), (1, True)])
def test_while_z_is_held_psi_gains_nothing_by_spreading_wider_than_the_turns(candidates, gains):
    model = engine(dataclasses.replace(SMALL, pose_candidates=candidates, translate=False))

    def cost(log_std: float, epoch: int) -> float:
        model.begin_epoch(epoch, 10)
        with torch.no_grad():
            model.encoder[-1].weight.zero_()
            model.encoder[-1].bias.fill_(log_std)
            return float(model.elbo(batch(1)).kl_pose)

    narrow, spacing, wide = (math.log(x) for x in (0.3, math.tau / 8, 2.0))
    assert cost(narrow, 1) > cost(spacing, 1) + 0.5
    assert (cost(spacing, 1) > cost(wide, 1) + 0.5) == gains
    assert cost(spacing, 2) > cost(wide, 2) + 0.5  # once z is free
    assert cost(wide, 1) >= cost(wide, 2)  # never above the bound


def test_fixed_poses_are_zero_and_cost_nothing():
    model = engine(dataclasses.replace(SMALL, rotate=False, translate=False))
    assert not model.elbo(batch()).kl_pose.any()
    posterior = model.eval().infer(batch())
    assert not posterior.psi_rad.any()
    assert not posterior.origin_px.any()


def test_the_vanilla_vae_ignores_poses():
    torch.manual_seed(0)
    model = VanillaEngine(BOX, 2, SMALL)
    assert torch.isfinite(model.elbo(batch()).elbo).all()
    assert not model.infer(batch()).origin_px.any()
    assert model.decode(torch.zeros(3, 2)).shape == (3, BOX, BOX)


def test_with_a_ctf_the_expected_image_is_the_decoded_one_filtered():
    model = engine(dataclasses.replace(SMALL, mask_radius_px=math.inf))
    ctf = table(1)
    z, zero = torch.randn(1, 2), torch.zeros(1, 2)
    with torch.no_grad():
        mean, _ = model._expected(z, zero[:, 0], zero, ctf_2d(ctf, BOX))
        expected = torch.fft.irfft2(torch.fft.rfft2(model.decode(z)) * ctf_2d(ctf, BOX), s=(BOX, BOX))
    torch.testing.assert_close(model._image(mean)[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_results_do_not_depend_on_the_rest_of_the_batch():
    model = engine().eval()
    whole = batch(4)
    order = torch.tensor([2, 0, 3, 1])
    a, b = model.infer(whole), model.infer(Batch(order, whole.image[order], None))
    torch.testing.assert_close(a.z_mean[order], b.z_mean)
    torch.testing.assert_close(a.log_likelihood[order], b.log_likelihood)


def test_the_bound_is_below_the_evidence_by_importance_sampling():
    """log p(y) >= bound, with log p(y) from many samples of the prior."""
    torch.manual_seed(5)
    config = dataclasses.replace(
        SMALL, pixels="gaussian-unit", augment_rotation=False, rotation_prior="normal"
    )
    model = CoordinateEngine(BOX, 1, config)
    data = batch(1)
    n = 4000
    with torch.no_grad():
        z, psi = torch.randn(n, 1), math.pi * torch.randn(n)
        origin = config.shift_std_px * torch.randn(n, 2)
        many = Batch(torch.arange(n), data.image.expand(n, -1, -1, -1), None)
        evidence = torch.logsumexp(model._log_likelihood(model._seen(many), z, psi, origin), 0) - math.log(
            n
        )
        bound = torch.stack([model.elbo(data).elbo for _ in range(200)]).mean()
    assert float(bound) < float(evidence) + 0.05


def plainly(model: CoordinateEngine, coordinates, z):
    """The generator's formula: an MLP on (x, y, z), every pixel of every image at once."""
    generator, act = model.generator, {"tanh": torch.tanh, "relu": torch.relu}[model.config.activation]
    units = act(generator.of_coordinates(coordinates) + generator.of_z(z)[:, None, :])
    for layer in generator.rest:
        units = layer(units) if isinstance(layer, torch.nn.Linear) else act(units)
    return units


def bound_and_gradients(model: CoordinateEngine, data: Batch):
    torch.manual_seed(7)
    model.zero_grad()
    bound = model.elbo(data).elbo
    bound.mean().backward()
    return bound.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("layers", [1, 3])
def test_piece_by_piece_the_bound_and_its_gradients_are_the_formulas(monkeypatch, activation, layers):
    model = engine(dataclasses.replace(SMALL, activation=activation, layers=layers)).double()
    data = Batch(torch.arange(5), torch.rand(5, 1, BOX, BOX, dtype=torch.float64), None)
    monkeypatch.setattr(
        coordinate_generator, "UNITS_AT_A_TIME", 2 * len(model.inside) * model.config.hidden
    )
    by_pieces = bound_and_gradients(model, data)
    monkeypatch.setattr(model.generator, "forward", lambda q, z: plainly(model, q, z))
    torch.testing.assert_close(by_pieces, bound_and_gradients(model, data), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pixels", ["gaussian", "bernoulli"])
def test_bfloat16_holds_the_bound_and_its_gradients(pixels):
    """Beside float32 with the same draws: 1 part in 1,000 of the bound, cosine of gradients 0.999."""
    model = engine(dataclasses.replace(SMALL, hidden=200, pixels=pixels, augment_rotation=False))
    data = batch(8)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.elbo(data).elbo
    half.mean().backward()
    half_gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    torch.manual_seed(7)
    single = model.elbo(data).elbo
    model.zero_grad()
    single.mean().backward()
    single_gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(half, single, rtol=1e-3, atol=0.0)
    assert half.dtype == torch.float32
    assert float(torch.cosine_similarity(half_gradients, single_gradients, 0)) > 0.999


def test_under_autocast_poses_keep_float32():
    """A rounded coordinate would be a pixel moved by 0.1 px at the rim of a box of 64."""
    model = engine()
    z, psi, origin = torch.randn(2, 2), torch.tensor([0.8, -1.0]), torch.tensor([[1.5, -2.0], [0.3, 0.1]])
    seen = []
    model.generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.generate(z, psi, origin)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(z, psi, origin)
    assert torch.equal(*seen)
