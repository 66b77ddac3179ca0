from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cryo_svae.errors import InputError
from cryo_svae.imaging.ctf import CtfTable, ctf_2d
from cryo_svae.imaging.geometry import align_images, pixel_grid, rotation_matrix
from cryo_svae.models import refinement, steerable
from cryo_svae.models.engine import Batch, ElboTerms, Posterior
from cryo_svae.models.refinement import mode_around, summarise_angle
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.simulate import SimulateConfig, Simulated, simulate
from tests.models.learning import learn
from tests.models.planted import make_alike

BOX = 32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors: a second thread only spins, and on a busy machine it spins long."""
    torch.set_num_threads(1)


def truth(molecule: str = "hinge", n: int = 256, snr: float = 0.5, shift: float = 0.0, **more) -> Simulated:
    config = SimulateConfig(
        molecule=molecule, n_particles=n, box=BOX, snr=snr, shift_std_px=shift, seed=5, **more
    )
    made = simulate(config)
    made.images.div_(made.noise_std)
    return made


def batches_of(
    engine: SteerableEngine, images: Tensor, ctf: CtfTable | None = None, size: int = 64
) -> list[Batch]:
    kept = engine.represent(images)
    rows = torch.arange(len(images)).split(size)
    return [Batch(row, kept[row], None if ctf is None else ctf[row]) for row in rows]


def new_engine(
    images: Tensor, *, z_dim: int = 1, ctf: CtfTable | None = None, **config: float
) -> SteerableEngine:
    torch.manual_seed(1)
    engine = SteerableEngine(BOX, z_dim, SteerableConfig(**{"max_shift_px": 0.0, **config}))
    engine.start(iter(batches_of(engine, images, ctf)), len(images))
    return engine


def train(engine: SteerableEngine, images: Tensor, epochs: int, ctf: CtfTable | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(2)
    batches = batches_of(engine, images, ctf)
    learn(engine, batches, epochs)


def infer(engine: SteerableEngine, images: Tensor, ctf: CtfTable | None = None) -> Posterior:
    return Posterior.cat([engine.infer(batch) for batch in batches_of(engine, images, ctf)])


def circular(a: Tensor, b: Tensor) -> float:
    return float(torch.exp(1j * (a - b)).mean().abs())


def all_finite(posterior: Posterior) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in vars(posterior).values())


@pytest.fixture(scope="module")
def hinge() -> tuple[SteerableEngine, Simulated]:
    """An engine trained for some seconds on centred particles, and the truth."""
    made = truth(n=1536, snr=0.3)
    engine = new_engine(made.images)
    train(engine, made.images, 20)
    return engine, made


@pytest.fixture(scope="module")
def shifted() -> tuple[SteerableEngine, Simulated]:
    made = truth(n=1024, snr=0.5, shift=1.0)
    engine = new_engine(made.images, max_shift_px=3.0)
    train(engine, made.images, 16)
    return engine, made


def test_short_training_recovers_the_truth(hinge):
    engine, made = hinge
    found = infer(engine, made.images[:512])
    z, c = found.z_mean[:, 0], made.conformation[:512, 0]
    assert torch.corrcoef(torch.stack([z, c]))[0, 1].abs() > 0.9
    assert circular(found.psi_rad, made.psi_rad[:512]) > 0.97
    assert 0.1 < found.z_std.mean() < 0.6
    assert found.figure_of_merit.median() == pytest.approx(1.0, abs=0.4)


def test_short_training_recovers_shifts(shifted):
    engine, made = shifted
    found = infer(engine, made.images[:256])
    assert circular(found.psi_rad, made.psi_rad[:256]) > 0.97
    # the learned frame is displaced by a constant c: o = o_true + R(-psi) c
    error = (rotation_matrix(found.psi_rad) @ (found.origin_px - made.origin_px[:256])[..., None])[..., 0]
    assert (error - error.mean(0)).square().sum(1).mean().sqrt() < 0.6
    assert 0.7 < engine.shift_variance.sqrt() < 1.4


def test_noise_variance_is_the_noise_s(hinge):
    engine, _ = hinge
    assert (engine.noise_variance[1:] - 1.0).abs().max() < 0.1


def test_decoded_images_are_the_aligned_particles(hinge):
    engine, made = hinge
    found = infer(engine, made.images[:512])
    middle = found.z_mean[:, 0].abs() < 0.3
    aligned = align_images(made.images[:512], found.psi_rad, found.origin_px)[middle].mean(0)
    decoded = engine.decode(torch.zeros(1, 1))[0].detach()
    inside = pixel_grid(BOX).norm(dim=-1) < 0.38 * BOX
    assert torch.corrcoef(torch.stack([aligned[inside], decoded[inside]]))[0, 1] > 0.93
    slope = (aligned[inside] * decoded[inside]).sum() / decoded[inside].square().sum()
    assert float(slope) == pytest.approx(1.0, abs=0.15)


def test_a_level_is_no_content(hinge):
    """What the preparation takes for background is off by its own error, and differs between images."""
    engine, made = hinge
    risen = made.images[:8] + torch.linspace(-3.0, 3.0, 8)[:, None, None]
    before, after = infer(engine, made.images[:8]), infer(engine, risen)
    torch.testing.assert_close(after.z_mean, before.z_mean, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(after.log_likelihood, before.log_likelihood, atol=0.1, rtol=1e-3)


def test_origins_are_not_drawn_to_the_middle():
    """By the edge of the disc, say: with the true content, origins grow as the true ones do."""
    made = truth(n=400, snr=0.5, shift=1.5)
    engine = new_engine(made.images, max_shift_px=4.5, shift_std_px=1e3).eval()
    reference = align_images(made.images, made.psi_rad, made.origin_px).mean(0, keepdim=True)
    with torch.no_grad():
        engine.generator.last.weight.zero_()
        engine.generator.last.bias.zero_()
    still = engine.represent(reference)[0]
    engine.generator.mean.copy_(still * (still.square() > 1e-2 * still.square().max()))
    found = infer(engine, made.images).origin_px.flatten()
    true = made.origin_px.flatten()
    assert float(found @ true / true.square().sum()) == pytest.approx(1.0, abs=0.06)


def test_white_noise_fills_the_rings_evenly():
    images = torch.randn(4000, BOX, BOX, generator=torch.Generator().manual_seed(3))
    engine = SteerableEngine(BOX, 1, SteerableConfig(max_shift_px=0.0))
    (batch,) = batches_of(engine, images, size=4000)
    power = (
        engine.polar.ring_sum(engine._seen(batch, engine.full).square().sum(1).mean(0)) / engine.noise_dof
    )
    assert (power[1:] - 1.0).abs().max() < 0.05


def turned(batch: Batch, engine: SteerableEngine, angle_rad: float) -> Batch:
    """The same particles turned by an angle, without interpolation."""
    real, imag = batch.image.unbind(1)
    phase = torch.exp(1j * angle_rad * engine.full.order)
    image = torch.complex(real, imag) * phase
    return Batch(batch.index, torch.stack([image.real, image.imag], 1), batch.ctf)


@pytest.mark.parametrize("angle_rad", [math.pi / 8, math.pi / 2, -2.5])
def test_a_turned_image_has_the_same_z_and_a_turned_psi(hinge, angle_rad):
    engine, made = hinge
    batch = batches_of(engine, made.images[:64])[0]
    before, after = engine.infer(batch), engine.infer(turned(batch, engine, angle_rad))
    assert (after.z_mean - before.z_mean).abs().median() < 0.02
    assert circular(after.psi_rad - before.psi_rad, torch.full((64,), angle_rad)) > 0.999
    torch.testing.assert_close(after.log_likelihood, before.log_likelihood, atol=0.5, rtol=0)


def test_the_encoder_is_invariant_to_its_turns(hinge):
    engine, made = hinge
    engine.eval()
    batch = batches_of(engine, made.images[:64])[0]
    plain, _ = engine.encode(engine._seen(batch, engine.polar))
    rotated, _ = engine.encode(engine._seen(turned(batch, engine, 3 * math.pi / 8), engine.polar))
    torch.testing.assert_close(plain, rotated, atol=1e-4, rtol=1e-3)


def test_a_shifted_image_has_the_same_z_and_a_shifted_origin(shifted):
    engine, made = shifted
    moved = torch.roll(made.images[:128], (1, -1), (1, 2))  # content moves by (x, y) = (-1, +1)
    before, after = infer(engine, made.images[:128]), infer(engine, moved)
    assert (after.z_mean - before.z_mean).abs().median() < 0.15
    assert (after.origin_px - before.origin_px - torch.tensor([1.0, -1.0])).abs().median() < 0.12
    assert circular(after.psi_rad, before.psi_rad) > 0.99


def test_batch_order_and_company_are_irrelevant(shifted):
    engine, made = shifted
    batch = batches_of(engine, made.images[:24])[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    mixed = engine.infer(Batch(batch.index[order], batch.image[order], None))
    whole = engine.infer(batch)
    alone = engine.infer(Batch(batch.index[:1], batch.image[:1], None))
    for name, values in vars(whole).items():
        torch.testing.assert_close(getattr(mixed, name), values[order], atol=3e-3, rtol=1e-3)
        torch.testing.assert_close(getattr(alone, name), values[:1], atol=3e-3, rtol=1e-3)


def test_a_round_ctf_stays_round_beside_an_astigmatic_one():
    made = truth(n=16, defocus_min_angst=10_000.0, defocus_max_angst=25_000.0)
    engine = new_engine(made.images, ctf=made.ctf)
    stretched = replace(made.ctf, defocus_u_angst=made.ctf.defocus_u_angst.clone())
    stretched.defocus_u_angst[::2] += 20_000.0
    assert stretched.astigmatic.tolist() == [True, False] * 8
    batch = batches_of(engine, made.images, stretched)[0]
    whole = engine.infer(batch)
    for rows in (torch.arange(0, 16, 2), torch.arange(1, 16, 2)):
        alone = engine.infer(batch[rows])
        for name, values in vars(alone).items():
            torch.testing.assert_close(getattr(whole, name)[rows], values, atol=1e-3, rtol=1e-3)


def test_infer_leaves_the_engine_alone_and_takes_any_row(shifted):
    engine, made = shifted
    before = {name: value.clone() for name, value in engine.state_dict().items()}
    batch = batches_of(engine, made.images[:8])[0]
    first = engine.infer(Batch(batch.index + 10**6, batch.image, None))
    second = engine.infer(batch)
    torch.testing.assert_close(first.z_mean, second.z_mean)
    for name, value in engine.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_posterior_matches_brute_force_in_image_space(hinge):
    """Pose posterior at fixed content against pixel likelihoods of rotated decoded images."""
    engine, made = hinge
    batch = batches_of(engine, made.images[:16])[0]
    content = engine.generator(torch.zeros(16, 1)).detach()
    variance = engine.noise_variance.clone()
    engine.noise_variance.fill_(1.0)
    look, _ = engine.look(batch, torch.zeros(16, 2), torch.zeros(1, 2))
    pose = look.posterior(content, torch.zeros(16, 1))
    engine.noise_variance.copy_(variance)
    psi = 2 * math.pi / look.n_psi * torch.arange(look.n_psi)
    one = torch.complex(content[0, 0], content[0, 1]) * torch.exp(1j * psi[:, None] * engine.polar.order)
    references = engine.image_of(torch.stack([one.real, one.imag], 1))
    data = engine.full.image(engine._seen(batch, engine.full))
    scores = torch.einsum("byx,pyx->bp", data, references) - 0.5 * references.square().sum((1, 2))
    brute = torch.softmax(scores, 1)
    assert (pose.probability[:, 0] - brute).abs().sum(1).max() < 0.1
    evidence = torch.logsumexp(scores, 1) - math.log(look.n_psi)
    torch.testing.assert_close(pose.log_evidence, evidence, atol=0.5, rtol=0.02)


def empty_image(engine: SteerableEngine, batch: Batch) -> Tensor:
    """Log likelihood of images as noise of the set's variance alone."""
    return engine.empty_image(engine.ring_power(batch), torch.ones(len(batch), engine.own.n_bands))


def exact_evidence(engine: SteerableEngine, batch: Batch) -> Tensor:
    z = torch.linspace(-4, 4, 161)[:, None]
    look, _ = engine.look(batch, torch.zeros(len(batch), 2), torch.zeros(1, 2))
    logs = torch.stack(
        [
            look.posterior(
                engine.generator(at.expand(len(batch), 1)), torch.zeros(len(batch), 1)
            ).log_evidence
            - 0.5 * float(at) ** 2
            for at in z
        ]
    )
    return torch.logsumexp(logs, 0) + math.log(0.05 / math.sqrt(2 * math.pi)) + empty_image(engine, batch)


def test_the_bound_is_below_the_exact_evidence_and_infer_close_to_it(hinge):
    engine, made = hinge
    engine.eval()
    engine = copy.deepcopy(engine)
    make_alike(engine, len(engine.own_weight))
    batch = batches_of(engine, made.images[:64])[0]
    with torch.no_grad():
        exact = exact_evidence(engine, batch)
        bound = torch.stack([engine.elbo(batch).elbo for _ in range(20)]).mean(0)
    gap = exact - bound
    assert -0.1 < gap.mean() < 1.5
    found = engine.infer(batch)
    assert (found.log_likelihood - exact).abs().median() < 0.1


def test_gradient_is_that_of_the_log_evidence(hinge):
    """The hand-made gradient with respect to content against finite differences."""
    engine, made = hinge
    batch = batches_of(engine, made.images[:4])[0]
    content = engine.generator(torch.zeros(4, 1)).detach()
    look, _ = engine.look(batch, torch.zeros(4, 2), torch.zeros(1, 2))
    pose = look.posterior(content, torch.zeros(4, 1))
    direction = torch.randn(content.shape, generator=torch.Generator().manual_seed(0)) * content.abs()
    up, down = (
        look.posterior(content + sign * 1e-2 * direction, torch.zeros(4, 1)).log_evidence
        for sign in (1, -1)
    )
    slope = ((pose.aligned - pose.filtered) * direction).sum((1, 2))
    torch.testing.assert_close((up - down) / 2e-2, slope, atol=0.05, rtol=0.05)


def test_divergences_are_not_negative(shifted):
    engine, made = shifted
    terms = engine.elbo(batches_of(engine, made.images[:64])[0])
    assert isinstance(terms, ElboTerms)
    assert (terms.kl_z >= 0).all()
    assert (terms.kl_pose >= 0).all()
    torch.testing.assert_close(terms.elbo, terms.log_likelihood - terms.kl_z - terms.kl_pose)


@pytest.mark.parametrize("astigmatism_angst", [0.0, 8000.0])
def test_a_ctf_is_taken_into_account(astigmatism_angst):
    """Content seen through a CTF: the particle's evidence is best at its own psi and defocus."""
    n, made = 8, truth(n=1, snr=1e6)
    column = {
        "pixel_size_angst": made.pixel_size_angst, "voltage_kv": 300.0, "cs_mm": 2.7,
        "amplitude_contrast": 0.1, "defocus_u_angst": 15000.0 + astigmatism_angst,
        "defocus_v_angst": 15000.0 - astigmatism_angst, "defocus_angle_rad": 0.7, "phase_shift_rad": 0.0,
    }  # fmt: skip
    ctf = CtfTable(**{name: torch.full((n,), value) for name, value in column.items()})
    reference = align_images(made.images, made.psi_rad, made.origin_px)
    engine = SteerableEngine(BOX, 1, SteerableConfig(max_shift_px=0.0))
    content = engine.polar(reference)
    psi = 2 * math.pi / engine.polar.n_angles * (9 * torch.arange(n))
    turned_content = torch.complex(content[0, 0], content[0, 1]) * torch.exp(
        1j * psi[:, None] * engine.polar.order
    )
    particles = engine.polar.image(torch.stack([turned_content.real, turned_content.imag], 1))
    particles = torch.fft.irfft2(torch.fft.rfft2(particles) * ctf_2d(ctf, BOX), s=(BOX, BOX))
    batch = Batch(torch.arange(n), engine.represent(particles), ctf)
    engine.noise_variance.fill_(float(content.square().mean()) * 0.05)
    look, _ = engine.look(batch, torch.zeros(n, 2), torch.zeros(1, 2))
    assert look.power.shape[-1] == (1 if astigmatism_angst == 0.0 else engine.polar.n_angles // 2)
    pose = look.posterior(content.expand(n, -1, -1), torch.zeros(n, 1))
    assert torch.equal(pose.probability[:, 0].argmax(1), 9 * torch.arange(n))
    # at the truth nothing is left over: what is aligned is what the CTF filtered
    left = (pose.aligned - pose.filtered).square().sum((1, 2)) / pose.aligned.square().sum((1, 2))
    assert left.max() < 0.03


def test_one_defocus_leaves_what_its_zeros_hide_at_rest():
    """With the same zeros in every image the rings there say nothing, and nothing is made up."""
    made = truth(n=1536, snr=0.3, defocus_min_angst=15000.0, defocus_max_angst=15000.0, n_micrographs=1)
    engine = new_engine(made.images, ctf=made.ctf)
    train(engine, made.images, 16, made.ctf)
    found = infer(engine, made.images[:256], made.ctf[slice(0, 256)])
    assert all_finite(found)
    z, c = found.z_mean[:, 0], made.conformation[:256, 0]
    assert torch.corrcoef(torch.stack([z, c]))[0, 1].abs() > 0.9
    assert circular(found.psi_rad, made.psi_rad[:256]) > 0.95
    with torch.no_grad():
        images = engine.decode(found.z_mean)
    assert images.abs().amax() < 10 * images.std()


def test_two_fold_symmetry_is_a_second_mode():
    made = truth("c2", n=4000, snr=0.3)
    engine = new_engine(made.images)
    train(engine, made.images, 5)
    found = infer(engine, made.images[:128])
    assert all_finite(found)
    assert 0.2 < found.second_mode.median() < 0.55
    assert found.psi_std_rad.median() < 0.5
    assert circular(2 * found.psi_rad, 2 * made.psi_rad[:128]) > 0.9


@pytest.mark.parametrize("molecule", ["ring", "noise"])
def test_what_has_no_angle_says_so(molecule):
    # Without a prior on the content the generator takes noise for features of the ring, and turns by them.
    made = truth(molecule, n=2000, snr=0.3)
    engine = new_engine(made.images)
    train(engine, made.images, 12)
    found = infer(engine, made.images)
    assert all_finite(found)
    if molecule == "ring":
        assert found.psi_std_rad.median() > 1.2  # 1.81 knows nothing
    else:
        assert found.figure_of_merit.median() < 0.3


@pytest.mark.parametrize("n", [1, 3])
def test_very_few_particles(n):
    made = truth(n=n)
    engine = new_engine(made.images, z_dim=2, max_shift_px=2.0)
    train(engine, made.images, 3)
    assert all_finite(infer(engine, made.images))


def test_checkpoint_resumes_to_the_bit(tmp_path):
    made = truth(n=64, shift=1.0)
    one = new_engine(made.images, z_dim=2, max_shift_px=3.0)
    train(one, made.images, 2)
    torch.save(one.state_dict(), tmp_path / "model.pt")
    other = SteerableEngine(BOX, 2, SteerableConfig(max_shift_px=3.0))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    train(one, made.images, 2)
    train(other, made.images, 2)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_start_reads_scale_and_noise_off_the_data():
    made = truth(n=128)
    engine = new_engine(made.images)
    power = engine.represent(made.images).square().sum(1).mean(0)
    ring = engine.full.ring == 9
    assert float(engine.noise_variance[9] * engine.noise_dof[9]) == pytest.approx(
        float(power[ring].sum()), rel=0.02
    )
    assert engine.generator.mean[0, engine.full.order > 0].abs().max() == 0


def test_modes_of_an_angle():
    psi = 2 * math.pi / 72 * torch.arange(72)
    centre = 10.3 * 2 * math.pi / 72
    one = torch.softmax(20 * torch.cos(psi - centre), 0)
    two = 0.6 * one + 0.4 * one.roll(36)
    mean, std, second = summarise_angle(torch.stack([one, two, torch.full((72,), 1 / 72)]))
    assert mean[:2].tolist() == pytest.approx([centre] * 2, abs=0.01)
    assert std[:2].tolist() == pytest.approx([1 / math.sqrt(20)] * 2, rel=0.05)
    assert float(std[2]) == pytest.approx(math.pi / math.sqrt(3), rel=0.05)
    assert second.tolist() == pytest.approx([0.0, 0.4, 0.0], abs=0.01)
    assert mode_around(two[None], torch.tensor([10]))[0, 46] == 0


def test_narrow_modes_are_found_between_grid_points():
    psi = 2 * math.pi / 72 * torch.arange(72)
    centre = 20.3 * 2 * math.pi / 72
    mean, std, _ = summarise_angle(torch.softmax(2000 * torch.cos(psi - centre), 0)[None])
    assert float(mean) == pytest.approx(centre, abs=0.005)
    assert float(std) == pytest.approx(1 / math.sqrt(2000), rel=0.1)


@pytest.mark.parametrize("wrong", [{"max_shift_px": -1.0}, {"shift_std_px": 0.0}, {"mask_radius_px": 0.0}])
def test_config_is_checked(wrong):
    with pytest.raises(InputError, match="expected"):
        SteerableConfig(**wrong)


def test_it_looks_as_far_out_as_there_is_signal(hinge):
    engine, made = hinge
    clean = align_images(made.images, made.psi_rad, made.origin_px).mean(0, keepdim=True)
    assert BOX // 4 <= engine.polar.n_rings < engine.full.n_rings
    beyond = engine.noise_variance[engine.polar.n_rings :]
    assert (beyond - 1.0).abs().max() < 0.1, "signal is left beyond the last ring"
    decoded = engine.decode(torch.zeros(1, 1))
    power = engine.polar.ring_sum(engine.represent(clean)[..., : engine.polar.n_pairs].square().sum((0, 1)))
    assert power[-1] < 0.01 * power.max()
    assert decoded.shape == (1, BOX, BOX)


def test_rings_are_taken_in_as_their_signal_is_learned():
    engine = SteerableEngine(BOX, 1, SteerableConfig(max_shift_px=0.0))
    made = truth(n=256)
    engine.start(iter(batches_of(engine, made.images)), 256)
    first = engine.polar.n_rings
    engine.begin_epoch(0, 10)
    assert engine.polar.n_rings == first, "nothing is learned yet"
    engine.signal_power[:first] = engine.noise
    engine.begin_epoch(1, 10)
    assert engine.polar.n_rings == first + steerable.MARGIN
    other = SteerableEngine(BOX, 1, SteerableConfig(max_shift_px=0.0))
    other.load_state_dict(engine.state_dict())
    assert other.polar.n_rings == engine.polar.n_rings
    assert other.decode(torch.zeros(1, 1)).equal(engine.decode(torch.zeros(1, 1)))


def test_schedules_rise_and_narrow():
    engine = SteerableEngine(BOX, 1, SteerableConfig(max_shift_px=4.0))
    weights, steps = [], []
    for epoch in range(10):
        engine.begin_epoch(epoch, 10)
        weights.append(engine.kl_weight)
        steps.append(engine.search_step_px)
    assert weights == sorted(weights)
    assert weights[0] > 0
    assert weights[-1] == 1.0
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == steerable.FINEST_STEP_PX
    assert len(refinement.importance_points(3)) == 2 * refinement.PAIRS


def test_the_encoder_cannot_run_away():
    """Unbounded means of q made single seeds collapse, and all of them with a CTF."""
    made = truth(n=16)
    engine = new_engine(made.images).eval()
    mean, _ = engine.encode(1e4 * engine._seen(batches_of(engine, made.images)[0], engine.polar))
    assert mean.abs().max() <= refinement.FARTHEST_Z


def test_the_improvement_goes_up_and_not_far(hinge):
    """Of q's mean in training, from wherever the encoder left it."""
    engine, made = hinge
    batch = batches_of(engine, made.images[:64])[0]
    look, _ = engine.look(batch, torch.zeros(64, 2), torch.zeros(1, 2))
    flat = torch.zeros(64, 1)

    def height(z: Tensor) -> Tensor:
        return look.posterior(engine.generator(z), flat).log_evidence - 0.5 * z.square().sum(1)

    for start, std in ((0.0, 0.3), (2.0, 0.3), (-5.9, 3.0)):
        mean = torch.full((64, 1), start)
        step = engine._improvement(look, flat, mean, torch.full((64, 1), math.log(std)))
        assert step.abs().max() <= steerable.FARTHEST_STEP + 1e-6
        assert (mean + step).abs().max() <= refinement.FARTHEST_Z
        assert (height(mean + step) > height(mean)).float().mean() > 0.8


def test_undoing_the_ctf_amplifies_noise_no_more_than_the_strongest_ring_allows():
    made = truth(n=16, defocus_min_angst=10_000.0, defocus_max_angst=25_000.0)
    engine = new_engine(made.images, ctf=made.ctf).eval()
    engine.signal_power.copy_(1e6 * engine.noise_variance)
    batch = batches_of(engine, made.images, made.ctf)[0]
    _, restored = engine.look(batch, torch.zeros(16, 2), torch.zeros(1, 2))
    whitened = engine._seen(batch, engine.polar) / engine.noise[engine.polar.ring].sqrt()
    most = (1.0 + steerable.MOST_SNR) / (2.0 * math.sqrt(steerable.MOST_SNR))
    assert (restored.abs() <= 1.001 * most * whitened.abs() + 1e-6).all()
