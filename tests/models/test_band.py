"""Bounds of resolution: what lies beyond them is neither seen, nor generated, nor counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cryo_svae.cli import main
from cryo_svae.errors import InputError
from cryo_svae.formats.mrc import read_images
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.imaging.geometry import pixel_grid
from cryo_svae.learning.checkpoint import load_checkpoint
from cryo_svae.models.band import band_2d, is_within, share_of_plane
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.engine import Batch, Engine, Posterior
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.models.vanilla import VanillaEngine
from cryo_svae.simulate import SimulateConfig, Simulated, simulate
from tests.conftest import optics_columns
from tests.imaging.test_ctf import table
from tests.models.learning import learn

BOX = 32
LOWEST_PX, HIGHEST_PX = 6.4, 2.9  # rings 5 to 11


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def hinge(n: int, snr: float = 1.0) -> Simulated:
    made = simulate(SimulateConfig(n_particles=n, box=BOX, snr=snr, shift_std_px=0.0, seed=5))
    made.images.div_(made.noise_std)
    return made


def steerable(**config: float) -> SteerableEngine:
    torch.manual_seed(1)
    return SteerableEngine(BOX, 1, SteerableConfig(max_shift_px=0.0, **config))


def batch_of(engine: Engine, images: Tensor, ctf: CtfTable | None = None) -> Batch:
    return Batch(torch.arange(len(images)), engine.represent(images), ctf)


def trained(engine: SteerableEngine, images: Tensor, epochs: int) -> SteerableEngine:
    kept = engine.represent(images)
    batches = [Batch(rows, kept[rows], None) for rows in torch.arange(len(images)).split(64)]
    engine.start(iter(batches), len(images))
    learn(engine, batches, epochs)
    return engine


def power_outside(images: Tensor, lowest_px: float | None, highest_px: float | None) -> float:
    """Share of the images' power beyond bounds."""
    power = torch.fft.rfft2(images).abs().square()
    return float((power * (1.0 - band_2d(BOX, lowest_px, highest_px))).sum() / power.sum())


def test_bounds_hold_the_frequencies_between_two_wavelengths():
    frequency = torch.arange(16) / BOX
    assert is_within(frequency, LOWEST_PX, HIGHEST_PX).nonzero()[:, 0].tolist() == list(range(5, 12))
    assert is_within(frequency, None, HIGHEST_PX).nonzero()[:, 0].tolist() == list(range(12))
    assert is_within(frequency, None, None).all()


@pytest.mark.parametrize("bounds", [(None, None), (LOWEST_PX, None), (LOWEST_PX, HIGHEST_PX)])
def test_the_share_is_that_of_the_whole_plane(bounds):
    axis = torch.fft.fftfreq(BOX)
    whole = is_within(torch.hypot(axis[:, None], axis), *bounds)
    assert share_of_plane(band_2d(BOX, *bounds)) == pytest.approx(float(whole.mean()), abs=1e-6)


def test_the_steerable_engine_sees_and_generates_rings_within_the_bounds_alone():
    images = hinge(200).images
    engine = trained(steerable(lowest_resolution_px=LOWEST_PX, highest_resolution_px=HIGHEST_PX), images, 4)
    outside = (engine.full.ring < 5) | (engine.full.ring > 11)
    assert (engine.represent(images)[..., outside] == 0).all()
    assert engine.n_rings <= 12
    # rings of the inside of the disc, whose edge widens them
    with torch.no_grad():
        decoded = engine.decode(torch.zeros(1, 1))
    assert power_outside(decoded, LOWEST_PX * 1.3, HIGHEST_PX / 1.2) < 0.03


def test_rings_are_taken_in_up_to_the_highest_resolution():
    images = hinge(1500, snr=4.0).images
    wide, narrow = (
        trained(steerable(**bounds), images, 6) for bounds in ({}, {"highest_resolution_px": 4.5})
    )
    assert wide.n_rings > 9
    assert narrow.n_rings == 8  # 0 to 7: 32 px / 7 is 4.6 px


def same(first: Posterior, second: Posterior, tolerance: float) -> bool:
    turn = torch.exp(1j * first.psi_rad) - torch.exp(1j * second.psi_rad)
    names = ("z_mean", "log_likelihood", "figure_of_merit")
    parts = [getattr(first, name) - getattr(second, name) for name in names]
    return all(float(part.abs().max()) < tolerance for part in (turn, *parts))


def test_the_steerable_posterior_does_not_know_what_is_coarser_than_the_lowest_resolution():
    images = hinge(200).images
    blob = torch.exp(-pixel_grid(BOX).square().sum(-1) / (2 * 4.0**2))  # its transform ends at ring 4
    blind, seeing = (
        trained(steerable(**bounds), images, 4) for bounds in ({"lowest_resolution_px": 5.0}, {})
    )
    for engine, expected in ((blind, True), (seeing, False)):
        plain, beside = (engine.infer(batch_of(engine, each)) for each in (images, images + 5.0 * blob))
        assert same(plain, beside, 0.05) == expected


def test_bulk_that_varies_is_no_content_where_it_is_coarser_than_the_lowest_resolution():
    """A micelle: a blob of another strength around each particle, stronger than the hinge's motion."""
    made = hinge(1500, snr=0.5)
    strength = torch.randn(len(made.images), generator=torch.Generator().manual_seed(3))
    blob = torch.exp(-pixel_grid(BOX).square().sum(-1) / (2 * 4.5**2))
    images = made.images + 2.0 * strength[:, None, None] * blob

    def found(**bounds: float) -> tuple[float, float]:
        torch.manual_seed(2)
        engine = trained(steerable(**bounds), images, 15)
        z = engine.infer(batch_of(engine, images)).z_mean[:, 0]
        pairs = ((z, made.conformation[:, 0]), (z, strength))
        return tuple(abs(float(np.corrcoef(a.numpy(), b.numpy())[0, 1])) for a, b in pairs)

    motion, bulk = found(lowest_resolution_px=10.0)
    assert motion > 0.9
    assert bulk < 0.1
    motion, bulk = found()
    assert motion < 0.3
    assert bulk > 0.9


@pytest.mark.parametrize("engine_class", [CoordinateEngine, VanillaEngine])
@pytest.mark.parametrize("ctf", [None, table(6)], ids=["no CTF", "CTF"])
def test_the_mlp_engines_do_not_know_what_is_beyond_the_bounds(engine_class, ctf):
    config = CoordinateConfig(
        hidden=8, encoder_hidden=8, lowest_resolution_px=LOWEST_PX, highest_resolution_px=HIGHEST_PX
    )
    torch.manual_seed(0)
    engine = engine_class(BOX, 2, config).eval()
    images = hinge(6).images
    grid = pixel_grid(BOX)
    coarse = torch.cos(2 * math.pi * 3 * grid[..., 0] / BOX)
    fine = torch.cos(2 * math.pi * (8 * grid[..., 0] + 10 * grid[..., 1]) / BOX)
    with torch.no_grad():
        plain, beside = (
            engine.infer(batch_of(engine, each, ctf))
            for each in (images, images + 3.0 * coarse - 2.0 * fine)
        )
        assert same(plain, beside, 1e-3)
        assert power_outside(engine.decode(torch.zeros(1, 2)), LOWEST_PX, HIGHEST_PX) < 1e-9


def test_pixels_within_bounds_count_by_the_share_of_frequencies_that_is_left():
    """Two images of white noise of variance 1 differ by half their squared distance to the mean."""
    config = CoordinateConfig(hidden=8, encoder_hidden=8, highest_resolution_px=4.0, rotate=False)
    torch.manual_seed(0)
    engine = CoordinateEngine(BOX, 1, config).eval()
    with torch.no_grad():
        engine.pixels.log_std.fill_(0.5 * math.log(engine.share))
        batch = batch_of(engine, torch.randn(2, BOX, BOX))
        zeros = torch.zeros(2, 1)
        said = engine._log_likelihood(engine._seen(batch), zeros, zeros[:, 0], torch.zeros(2, 2))
        mean, _ = engine._expected(zeros, zeros[:, 0], torch.zeros(2, 2), engine._seen(batch).ctf)
        squares = (engine._inside(batch.image) - mean).square().sum((1, 2))
    assert float(said[0] - said[1]) == pytest.approx(float(squares[1] - squares[0]) / 2, rel=1e-4)


def test_bernoulli_pixels_have_no_band():
    with pytest.raises(InputError, match="--pixels"):
        CoordinateConfig(pixels="bernoulli", highest_resolution_px=4.0)


@pytest.mark.parametrize("engine", ["steerable", "coordinate", "vanilla"])
def test_a_job_within_bounds_keeps_them_in_its_model(make_dataset, tmp_path, engine):
    small = [] if engine == "steerable" else ["--hidden", "8", "--encoder-hidden", "8"]
    star, job = (
        str(make_dataset(30, box=32, optics=optics_columns(1, rlnImageSize=["32"]))),
        tmp_path / "job",
    )
    bounds = ["--lowest-resolution", "31", "--highest-resolution", "6"]
    assert main(["run", star, "--out", str(job), "--engine", engine, "--epochs", "2", *bounds, *small]) == 0
    assert "lowest_resolution: 31.0" in (job / "config.yaml").read_text()
    decoded = torch.from_numpy(read_images(job / "decoded.mrcs", np.arange(1)))
    assert power_outside(decoded, 1.3 * 31 / 2.5, 6 / 2.5 / 1.2) < 0.1  # noise, at the disc's edge too
    older = torch.load(job / "model.pt", weights_only=True)  # of before there were bounds
    for name in ("lowest_resolution_px", "highest_resolution_px"):
        assert older["engine_config"].pop(name) > 0
    torch.save(older, tmp_path / "older.pt")
    assert load_checkpoint(tmp_path / "older.pt").engine.config.lowest_resolution_px is None
    again = tmp_path / "again"
    assert main(["estimate", star, "--model", str(job / "model.pt"), "--out", str(again)]) == 0
    assert (again / "particles.star").read_bytes() == (job / "particles.star").read_bytes()


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        (["--lowest-resolution", "-1"], "--lowest-resolution"),
        (["--highest-resolution", "0"], "--highest-resolution"),
        (["--lowest-resolution", "10", "--highest-resolution", "12"], "--lowest-resolution: found 10"),
        (["--lowest-resolution", "29"], "30.0 Å or more, twelve working pixels"),
        (["--highest-resolution", "30"], "10.0 Å or less, an eighth of the box"),
    ],
)
def test_bounds_that_leave_too_little_are_refused(make_dataset, tmp_path, capsys, bounds, said):
    assert (
        main(
            [
                "run",
                str(make_dataset(6, box=32, optics=optics_columns(1, rlnImageSize=["32"]))),
                "--out",
                str(tmp_path / "job"),
                *bounds,
            ]
        )
        == 2
    )
    assert said in capsys.readouterr().err
