"""z and poses seen from the space of generated contents, against the coefficients themselves."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.models import content_space, posterior_search
from cryo_svae.models.content_space import ContentSpace, drawn_z
from cryo_svae.models.engine import Batch
from cryo_svae.models.pose_posterior import ByOrder, Look, normalised
from cryo_svae.models.posterior_search import FINER_ANGLES
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.simulate import SimulateConfig, simulate
from tests.models.planted import make_alike, planted_engine

BOX, N = 24, 6
CTFS = ["none", "round", "astigmatic"]


@pytest.fixture(autouse=True)
def one_thread_and_no_gradients():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def ctf_of(kind: str, n: int) -> CtfTable | None:
    if kind == "none":
        return None
    spread = 4000.0 if kind == "astigmatic" else 0.0
    column = {
        "pixel_size_angst": 4.0, "voltage_kv": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1,
        "defocus_u_angst": 20000.0 + spread, "defocus_v_angst": 20000.0 - spread, "defocus_angle_rad": 0.6,
        "phase_shift_rad": 0.0,
    }  # fmt: skip
    return CtfTable(**{name: torch.full((n,), value) for name, value in column.items()})


def wild_engine(
    z_dim: int = 2, shift_px: float = 3.0, psi_range_rad: float | None = None
) -> SteerableEngine:
    """A generator drawn at random, of strong and curved content; noise that differs from ring to ring."""
    torch.manual_seed(3)
    config = SteerableConfig(max_shift_px=shift_px, psi_range_rad=psi_range_rad)
    engine = SteerableEngine(BOX, z_dim, config).eval()
    generator, ring = engine.generator, engine.full.ring
    generator.last.weight.normal_(0.0, 0.2)
    generator.layers[0].weight.mul_(2.0)
    falling = torch.exp(-0.3 * ring)
    generator.scale.copy_(torch.stack([falling, falling * (engine.full.order > 0)]))
    generator.mean.copy_(generator.scale * torch.randn(generator.scale.shape))
    engine.noise_variance.copy_(torch.linspace(0.2, 0.1, engine.full.n_rings))
    engine.signal_power.copy_(engine.noise_variance)
    engine.known_z.normal_()
    return engine


def space_of(engine: SteerableEngine) -> ContentSpace:
    n_psi = FINER_ANGLES * engine.polar.n_angles
    return ContentSpace(engine.generator, engine.polar, engine.noise, drawn_z(engine.z_dim), n_psi)


def look_of(engine: SteerableEngine, kind: str) -> tuple[Look, Tensor]:
    """Particles made by the engine, in noise, at some origins; and the origins' log prior."""
    content = engine.generator(torch.randn(N, engine.z_dim))
    noise = engine.noise[engine.polar.ring].sqrt() * torch.randn(content.shape)
    batch = Batch(torch.arange(N), content + noise, ctf_of(kind, N))
    offsets = torch.tensor([[0.0, 0.0], [0.5, 0.0], [-0.5, 0.8]]).expand(N, -1, -1)
    look, _ = engine.look(batch, torch.zeros(N, 2), offsets)
    return look, engine.log_prior(offsets, 0.5)


def content_at(space: ContentSpace, at: Tensor) -> Tensor:
    """Coefficients of points of the space."""
    return torch.einsum("...k,kcp->...cp", at, space.basis)


def test_coordinates_are_those_of_the_generated_contents():
    """All but as much as may be left out, in units of the noise; of a plane nothing is left out."""
    for engine in (wild_engine(), planted_engine(BOX, contrast=0.2)):
        space = space_of(engine)
        z = torch.randn(300, engine.z_dim)
        off = engine.generator(z) - content_at(space, space.coordinates(z))
        rms = (off.square() / engine.noise[engine.polar.ring]).sum((1, 2)).mean().sqrt()
        assert rms < 2.0 * content_space.LEFT_OUT
    assert rms < 2e-3
    assert len(space.basis) == content_space.BLOCK


def test_the_space_is_as_large_as_the_contents_need(monkeypatch):
    engine = wild_engine()
    wide = space_of(engine)
    monkeypatch.setattr(content_space, "LEFT_OUT", 10.0 * content_space.LEFT_OUT)
    assert len(space_of(engine).basis) < len(wide.basis) < 256
    engine.generator.last.weight.zero_()
    same = space_of(engine)
    content = content_at(same, same.coordinates(torch.randn(5, 2)))
    torch.testing.assert_close(content, engine.generator(torch.zeros(5, 2)))


def test_slopes_are_the_derivatives_of_the_coordinates():
    space = space_of(wild_engine())
    z, step = torch.randn(4, 2), 1e-2
    at, slopes = space.slopes(z)
    torch.testing.assert_close(at, space.coordinates(z))
    for k, unit in enumerate(step * torch.eye(2)):
        difference = (space.coordinates(z + unit) - space.coordinates(z - unit)) / (2.0 * step)
        torch.testing.assert_close(slopes[:, k], difference, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("kind", CTFS)
@pytest.mark.parametrize("psi_range_rad", [None, 0.7])
def test_scores_are_those_of_the_coefficients(kind, psi_range_rad):
    """At each particle's own choice of rotations, be some of them out of range."""
    engine = wild_engine(psi_range_rad=psi_range_rad)
    look, log_prior = look_of(engine, kind)
    space = space_of(engine)
    angle = torch.rand(N, look.n_psi).argsort(1)[:, :11]
    at = space.coordinates(torch.randn(N, 5, 2))
    found = space.seen(look, angle).scores(at, log_prior[:, None])
    exact = look.scores(content_at(space, at), log_prior[:, None])
    chosen = exact.gather(3, angle[:, None, None].expand(-1, 5, 3, -1))
    torch.testing.assert_close(found, chosen.transpose(2, 3), atol=3e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", CTFS)
def test_the_local_model_is_that_of_the_log_evidence(kind):
    """Its gradient by finite differences, its information by the filtered slopes."""
    engine = wild_engine()
    look, log_prior = look_of(engine, kind)
    space = space_of(engine)
    sight = space.seen(look, torch.arange(look.n_psi).expand(N, -1))
    z, step = 0.5 * torch.randn(N, 2), 3e-3
    at, slopes = space.slopes(z)
    model = sight.local_model(at, slopes, log_prior)
    pose = look.posterior(content_at(space, at), log_prior)
    torch.testing.assert_close(model.log_evidence, pose.log_evidence, atol=3e-3, rtol=1e-4)
    for k in range(2):
        up, down = (
            look.posterior(content_at(space, at + sign * step * slopes[:, k]), log_prior).log_evidence
            for sign in (1.0, -1.0)
        )
        torch.testing.assert_close((up - down) / (2.0 * step), model.gradient[:, k], atol=0.3, rtol=2e-2)
    along = content_at(space, slopes)
    filtered = look.filtered(along, pose.probability.sum(1))
    information = filtered.flatten(2) @ along.flatten(2).mT
    torch.testing.assert_close(model.curvature, information, atol=1e-2, rtol=1e-3)
    # what is not known of the pose: the score's covariance over poses
    score = look.inner(along).flatten(2)
    chance = pose.probability.flatten(1)[:, None]
    centred = score - (score * chance).sum(2, keepdim=True)
    missing = (centred * chance) @ centred.mT
    torch.testing.assert_close(
        sight.missing_information(at, slopes, log_prior), missing, atol=2e-2, rtol=1e-2
    )


@pytest.mark.parametrize("psi_range_rad", [None, 0.0, 0.7])
def test_the_greatest_score_is_that_of_the_best_rotation_within_range(psi_range_rad):
    engine = wild_engine(psi_range_rad=psi_range_rad)
    look, _ = look_of(engine, "round")
    content = engine.generator(engine.known_z[:7])
    found = look.greatest(ByOrder(engine.polar, content, look.n_psi, psi_range_rad))
    scores = look.scores(content[None].expand(N, -1, -1, -1), torch.zeros(N, 1, 3))
    psi = 2.0 * math.pi * torch.arange(look.n_psi) / look.n_psi
    n_inside = int((torch.cos(psi) > math.cos(psi_range_rad or 0.0) - 1e-6).sum())
    best = scores.amax(3) + math.log(look.n_psi if psi_range_rad is None else n_inside)
    torch.testing.assert_close(found, best.transpose(1, 2), atol=3e-3, rtol=1e-4)


def trained(molecule: str, *, shift_px: float, epochs: int) -> tuple[SteerableEngine, Batch]:
    """An engine trained for some seconds, and some of its particles."""
    made = simulate(
        SimulateConfig(molecule=molecule, n_particles=1536, box=BOX, snr=0.4, shift_std_px=shift_px, seed=5)
    )
    images = made.images / made.noise_std
    torch.manual_seed(1)
    engine = SteerableEngine(BOX, 1, SteerableConfig(max_shift_px=3.0 * shift_px))
    kept = engine.represent(images)
    batches = [Batch(row, kept[row], None) for row in torch.arange(len(images)).split(64)]
    engine.start(iter(batches), len(images))
    optimizer = torch.optim.Adam(engine.parameters(), 2e-3)
    with torch.enable_grad():
        for epoch in range(epochs):
            engine.begin_epoch(epoch, epochs)
            for k in torch.randperm(len(batches)):
                terms = engine.elbo(batches[k])
                optimizer.zero_grad()
                (
                    -(terms.log_likelihood - engine.kl_weight * (terms.kl_z + terms.kl_pose)).mean()
                ).backward()
                optimizer.step()
    return engine.eval(), Batch(torch.arange(96), kept[:96], None)


class Exact(NamedTuple):
    """Mean and deviation of z (b,), masses of the rotations (b, n), and the log evidence (b,)."""

    z_mean: Tensor
    z_std: Tensor
    of_angle: Tensor
    log_likelihood: Tensor


def summed_over_all(engine: SteerableEngine, batch: Batch, step_px: float) -> Exact:
    """By a sum over z from -4.5 to 4.5, all rotations, and all origins that are searched."""
    reach = engine.config.max_shift_px
    axis = torch.arange(-reach, reach + 1e-3, step_px) if reach else torch.zeros(1)
    origins = torch.cartesian_prod(axis, axis)
    look, _ = engine.look(batch, torch.zeros(len(batch), 2), origins)
    log_prior = engine.log_prior(origins.expand(len(batch), -1, -1), step_px)
    z = torch.linspace(-4.5, 4.5, 61)
    parts = [
        look.scores(engine.generator(at.expand(len(batch), 1))[:, None], log_prior[:, None])[:, 0]
        - 0.5 * at.square()
        for at in z
    ]
    log_evidence, of_z = normalised(torch.stack([torch.logsumexp(part.flatten(1), 1) for part in parts], 1))
    mean = of_z @ z
    variance = (of_z * (z - mean[:, None]).square()).sum(1)
    of_angle = torch.stack([(part - log_evidence[:, None, None]).exp().sum(1) for part in parts]).sum(0)
    volume = torch.log((z[1] - z[0]) / torch.tensor(2.0 * torch.pi).sqrt())
    empty = engine.empty_image(engine.ring_power(batch), torch.ones(len(batch), engine.own.n_bands))
    return Exact(mean, variance.sqrt(), of_angle, log_evidence + volume + empty)


@pytest.mark.parametrize(("molecule", "shift_px", "epochs"), [("hinge", 1.0, 12), ("c2", 0.0, 8)])
def test_posteriors_are_the_sums_over_all_z_rotations_and_origins(molecule, shift_px, epochs):
    engine, batch = trained(molecule, shift_px=shift_px, epochs=epochs)
    make_alike(engine, len(engine.own_weight))
    batch = batch[torch.arange(40)]
    found, exact = engine.infer(batch), summed_over_all(engine, batch, 0.5)
    off = (found.z_mean[:, 0] - exact.z_mean).abs() / exact.z_std
    assert off.median() < 0.05
    assert off.quantile(0.95) < 0.3
    assert (found.z_std[:, 0] / exact.z_std - 1.0).abs().median() < 0.08
    assert (found.log_likelihood - exact.log_likelihood).abs().median() < 0.15
    if molecule == "c2":  # of two modes each has the mass that it should have
        n_psi = exact.of_angle.shape[1]
        peak = (found.psi_rad / (2.0 * torch.pi) * n_psi).round().long()[:, None]
        half_turn = (peak + torch.arange(-n_psi // 4, n_psi // 4)) % n_psi
        second = 1.0 - exact.of_angle.gather(1, half_turn).sum(1)
        assert (found.second_mode - second).abs().median() < 0.01
        assert found.second_mode.median() > 0.15


@pytest.mark.parametrize("molecule", ["hinge", "c2", "ring"])
def test_rotations_left_out_do_not_matter(monkeypatch, molecule):
    engine, batch = trained(molecule, shift_px=1.0, epochs=4)
    some = engine.infer(batch)
    monkeypatch.setattr(posterior_search, "UNLIKELY", -1.0)
    every = engine.infer(batch)
    for name, values in vars(every).items():
        off = (getattr(some, name) - values).abs()
        if name == "psi_rad":
            off = torch.minimum(off, 2.0 * torch.pi - off)
        assert off.quantile(0.9) < 2e-3, name


def test_pieces_hold_every_particle_once():
    engine = wild_engine()
    batch = Batch(torch.arange(40), torch.randn(40, 2, engine.full.n_pairs), None)
    guess = engine.search._first_guess(batch)
    pieces = engine.search._alike(guess)
    assert torch.cat(pieces).sort().values.tolist() == list(range(40))
    width = (guess.near > posterior_search.UNLIKELY).sum(1)
    assert torch.cat([width[piece] for piece in pieces]).diff().min() >= 0


def test_what_is_prepared_follows_the_generator():
    """Also where a recorded step of training changes it, which leaves no trace in the tensors' versions."""
    engine = wild_engine()
    batch = Batch(torch.arange(N), torch.randn(N, 2, engine.full.n_pairs), None)
    first = engine.search._prepared()
    assert engine.search._prepared() is first
    engine.generator.last.weight.mul_(1.1)
    second = engine.search._prepared()
    assert second is not first
    engine.train()
    engine.generator.last.weight.data.mul_(1.1)
    engine.eval()
    third = engine.search._prepared()
    assert third is not second
    other = SteerableEngine(BOX, 2, engine.config).eval()
    other.load_state_dict(engine.state_dict())
    for name, values in vars(engine.infer(batch)).items():
        torch.testing.assert_close(getattr(other.infer(batch), name), values)
