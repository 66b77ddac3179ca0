"""What a particle file says of its images is obeyed: flags, factors and distortions, RELION the judge."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryo_svae.formats.mrc import read_images, write_stack
from cryo_svae.formats.star import read_star, write_star, write_tables
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable, ctf_2d, ctf_at, rfft_frequencies, whitener_2d
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.models.engine import Batch
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.preprocessing import Preparation, prepare
from cryo_svae.results.class_averages import class_averages
from cryo_svae.simulate import SimulateConfig, Simulated, simulate
from cryo_svae.simulate.files import write_simulated
from tests.models.learning import learn

BOX = 64
SIZE = 2.0
MAGNIFICATION = (1.03, 0.01, -0.005, 0.98)
MAG_COLUMNS = {
    f"rlnMagMat{place}": [str(value)]
    for place, value in zip(("00", "01", "10", "11"), MAGNIFICATION, strict=True)
}


def molecule_volume() -> np.ndarray:
    rng = np.random.default_rng(0)
    grid = np.mgrid[:BOX, :BOX, :BOX] - BOX // 2
    volume = np.zeros((BOX,) * 3, np.float32)
    for centre in rng.normal(size=(40, 3)) * 7:
        volume += np.exp(-((grid - centre[:, None, None, None]) ** 2).sum(0) / 2.9).astype(np.float32)
    return volume


def optics(**more: list[str]) -> dict[str, list[str]]:
    return {
        "rlnOpticsGroupName": ["a"], "rlnOpticsGroup": ["1"], "rlnImagePixelSize": [str(SIZE)],
        "rlnImageSize": [str(BOX)], "rlnImageDimensionality": ["2"], "rlnVoltage": ["300"],
        "rlnSphericalAberration": ["2.7"], "rlnAmplitudeContrast": ["0.1"], **more,
    }  # fmt: skip


def projected(relion, folder: Path, flags: list[str], of_optics: dict, of_particles: dict) -> tuple:
    """Transforms of RELION's projections as the file asks, and without a CTF; our reading of the file."""
    with mrcfile.new(folder / "volume.mrc") as mrc:
        mrc.set_data(molecule_volume())
        mrc.voxel_size = SIZE
    write_stack(folder / "blank.mrcs", np.zeros((2, BOX, BOX), np.float32), pixel_size_angst=SIZE)
    particles = {
        "rlnImageName": ["000001@blank.mrcs", "000002@blank.mrcs"], "rlnOpticsGroup": ["1"] * 2,
        "rlnDefocusU": ["15000", "21000"], "rlnDefocusV": ["13000", "20000"],
        "rlnDefocusAngle": ["40", "100"], "rlnAngleRot": ["10", "40"], "rlnAngleTilt": ["30", "70"],
        "rlnAnglePsi": ["0", "50"], "rlnOriginXAngst": ["0"] * 2, "rlnOriginYAngst": ["0"] * 2,
    }  # fmt: skip
    tables = {"optics": optics(**of_optics), "particles": {**particles, **of_particles}}
    write_tables(folder / "in.star", tables)
    spectra = []
    for name, more in (("as_asked", ["--ctf", *flags]), ("plain", [])):
        arguments = ["--i", "volume.mrc", "--o", name, "--ang", "in.star", "--angpix", str(SIZE), *more]
        said = relion("relion_project", *arguments, cwd=folder)
        assert (folder / f"{name}.mrcs").exists(), said
        images = torch.from_numpy(np.array(read_images(folder / f"{name}.mrcs", np.arange(2)))).double()
        spectra.append(torch.fft.rfft2(images))
    return (*spectra, read_particles(folder / "in.star"))


@pytest.mark.parametrize(
    ("flags", "of_optics", "of_particles"),
    [
        ([], {}, {}),
        ([], {}, {"rlnCtfBfactor": ["100", "30"], "rlnCtfScalefactor": ["0.5", "0.9"]}),
        (["--ctf_phase_flip"], {"rlnCtfDataArePhaseFlipped": ["1"]}, {}),
        (["--ctf2"], {"rlnCtfDataAreCtfPremultiplied": ["1"]}, {}),
        ([], MAG_COLUMNS, {}),
    ],
    ids=["plain", "factors", "phase-flipped", "premultiplied", "magnified"],
)
def test_relion_project_makes_the_images_that_our_forward_model_makes(
    relion, tmp_path, flags, of_optics, of_particles
):
    theirs, plain, particles = projected(relion, tmp_path, flags, of_optics, of_particles)
    # relion_project takes the magnification for its CTF alone, and not for its projections
    matrix = torch.from_numpy(particles.magnification[0]).reshape(2, 2)
    frequency = rfft_frequencies(BOX).double()
    table = particles.ctf
    ours = plain * ctf_at(table, frequency @ matrix.T)
    theirs = theirs * whitener_2d(table, BOX)  # as preparation does; 1 but for premultiplied images
    inside = frequency.norm(dim=-1) < 0.45
    for a, b in zip(ours[:, inside], theirs[:, inside], strict=True):
        correlation = (a * b.conj()).real.sum() / (a.norm() * b.norm())
        assert correlation > 0.999
        assert (a - b).norm() / b.norm() < 0.02  # the scale, which no correlation sees


def beads(matrix: torch.Tensor, size: float, box: int) -> torch.Tensor:
    """A smooth image g(u), u in units of ``size``, as it is seen at pixels x: g(matrix x)."""
    generator = torch.Generator().manual_seed(3)
    centres, image = 6.0 * torch.randn(12, 2, generator=generator), torch.zeros(box, box)
    u = geometry.pixel_grid(box) @ matrix.T.float() * size
    for k, centre in enumerate(centres):
        image += (1 + k % 3) * torch.exp(-(u - centre).square().sum(-1) / 8.0)
    return image[None]


@pytest.mark.parametrize("new_box", [64, 48])
def test_a_distorted_image_is_undistorted_whatever_the_grid(new_box):
    """Frequency k of the image is M k of the specimen, so that f(x) is g(M^-T x) and g(u) is f(M^T u)."""
    matrix = torch.tensor(MAGNIFICATION).double().reshape(2, 2)
    distorted = beads(torch.linalg.inv(matrix).T, 1.0, 64)
    size = 64 / new_box
    plan = Preparation(box_px=new_box, pixel_size_angst=size, mask_diameter_angst=58.0, invert=False)
    right, _ = prepare(beads(torch.eye(2), size, new_box), size, plan)
    found, _ = prepare(distorted, 1.0, plan, MAGNIFICATION)
    left, _ = prepare(distorted, 1.0, plan)
    # there is no noise, so that the scale and level of the background mean nothing
    right, found, left = (each - each[0, 0, 0] for each in (right, found, left))
    right, found, left = (each / each.amax() for each in (right, found, left))
    assert (found - right).abs().max() < 2e-3
    assert (left - right).abs().max() > 0.02


def test_undistorted_images_have_the_background_of_others():
    noise = 3.0 + 2.0 * torch.randn(6, 64, 64, generator=torch.Generator().manual_seed(2))
    plan = Preparation(box_px=48, pixel_size_angst=1.34, mask_diameter_angst=50.0, invert=False)
    found, usable = prepare(noise, 1.0, plan, MAGNIFICATION)
    background = found[:, geometry.pixel_grid(48).norm(dim=-1) > plan.mask_radius_px]
    assert usable.all()
    torch.testing.assert_close(background.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(background.std(1), torch.ones(6), atol=1e-4, rtol=0)


def filtered(images: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:])


def handled(made: Simulated, kind: str) -> tuple[torch.Tensor, CtfTable]:
    """Copies of images as other programs would hand them on, with flags that say so."""
    ctf = made.ctf
    n = len(ctf)
    if kind == "flipped":
        flags = {"phase_flipped": torch.ones(n, dtype=torch.bool)}
        return filtered(made.images, torch.sign(ctf_2d(ctf, made.images.shape[-1]))), dataclasses.replace(
            ctf, **flags
        )
    which = torch.ones(n, dtype=torch.bool)
    if kind == "mixed":
        which[::2] = False
    if kind == "plain":
        return made.images, ctf
    transfer = ctf_2d(ctf, made.images.shape[-1])
    transfer = torch.where(which[:, None, None], transfer, 1.0)
    return filtered(made.images, transfer), dataclasses.replace(ctf, premultiplied=which)


def seen_by_engines(images: torch.Tensor, ctf: CtfTable) -> torch.Tensor:
    return images if ctf.premultiplied is None else filtered(images, whitener_2d(ctf, images.shape[-1]))


KINDS = ["flipped", "premultiplied", "mixed"]


@pytest.fixture(scope="module")
def made() -> Simulated:
    """A hinge under noise and a CTF, in units of the noise."""
    config = SimulateConfig(
        n_particles=1536, box=32, snr=0.3, shift_std_px=0.0, seed=5,
        defocus_min_angst=10_000.0, defocus_max_angst=25_000.0,
    )  # fmt: skip
    simulated = simulate(config)
    simulated.images.div_(simulated.noise_std)
    return simulated


def batches(engine, images: torch.Tensor, ctf: CtfTable, size: int = 128) -> list[Batch]:
    kept = engine.represent(seen_by_engines(images, ctf))
    return [Batch(row, kept[row], ctf[row]) for row in torch.arange(len(images)).split(size)]


def trained(images: torch.Tensor, ctf: CtfTable, epochs: int) -> SteerableEngine:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    engine = SteerableEngine(images.shape[-1], 1, SteerableConfig(max_shift_px=0.0))
    these = batches(engine, images, ctf)
    engine.start(iter(these), len(images))
    learn(engine, these, epochs)
    return engine


def quality(engine: SteerableEngine, images: torch.Tensor, ctf: CtfTable, made: Simulated) -> list[float]:
    """|correlation| of z with the truth, and agreement of psi."""
    found = [engine.infer(batch) for batch in batches(engine, images, ctf)]
    z = torch.cat([each.z_mean for each in found])[:, 0]
    psi = torch.cat([each.psi_rad for each in found])
    r_z = torch.corrcoef(torch.stack([z, made.conformation[:, 0]]))[0, 1].abs()
    return [float(r_z), float(torch.exp(1j * (psi - made.psi_rad)).mean().abs())]


@pytest.fixture(scope="module")
def of_plain(made) -> tuple[SteerableEngine, list[float]]:
    images, ctf = handled(made, "plain")
    engine = trained(images, ctf, 16)
    return engine, quality(engine, images, ctf, made)


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_handled_otherwise_and_flagged_so_is_learned_as_well(made, of_plain, kind):
    _, before = of_plain
    images, ctf = handled(made, kind)
    after = quality(trained(images, ctf, 16), images, ctf, made)
    np.testing.assert_allclose(after, before, atol=0.01)


def off(engine: SteerableEngine, other: SteerableEngine) -> float:
    """By how much the amplitudes of two engines' decoded images differ, ring by ring, over all of them."""
    amplitude, its_amplitude = (
        each.full.ring_sum(each.represent(each.decode(torch.zeros(1, 1))).square().sum(1)).sqrt()
        for each in (engine, other)
    )
    return float((amplitude - its_amplitude).detach().abs().sum() / its_amplitude.detach().sum())


def test_a_flag_that_is_not_there_is_missed(made, of_plain):
    """Poses and z bear it, but what is decoded is no longer the molecule."""
    engine, _ = of_plain
    images, ctf = handled(made, "premultiplied")
    flagged, unflagged = trained(images, ctf, 16), trained(images, made.ctf, 16)
    print(
        f"amplitudes off by {off(flagged, engine):.3f} with the flag, {off(unflagged, engine):.3f} without"
    )
    assert off(flagged, engine) < 0.1
    assert off(unflagged, engine) > 0.2


def test_premultiplied_images_are_prepared_as_plain_ones_but_where_the_ctf_is_nearly_0(made):
    plain, premultiplied = (handled(made, kind) for kind in ("plain", "premultiplied"))
    n = 64
    plan = Preparation(box_px=32, pixel_size_angst=4.0, mask_diameter_angst=100.0, invert=False)
    whitener = whitener_2d(premultiplied[1][slice(0, n)], 32)
    a, _ = prepare(plain[0][:n], 4.0, plan)
    b, _ = prepare(premultiplied[0][:n], 4.0, plan, whitener=whitener)
    a, b = torch.fft.rfft2(a), torch.fft.rfft2(b)
    passed = ctf_2d(plain[1][slice(0, n)], 32).abs() > 0.1
    passed[:, 0, 0] = False  # the mean of the background is taken off each
    scale = (a.conj() * b)[passed].real.sum() / a[passed].abs().square().sum()
    assert float(scale) == pytest.approx(1.0, abs=0.05)
    assert (b / scale - a)[passed].norm() < 0.03 * a[passed].norm()
    torch.testing.assert_close(
        ctf_2d(premultiplied[1], 32)[slice(0, n)][passed], ctf_2d(plain[1], 32)[slice(0, n)][passed]
    )


@pytest.mark.parametrize("kind", ["flipped", "premultiplied", "mixed"])
def test_averages_of_copies_are_alike(tmp_path, kind):
    config = SimulateConfig(
        n_particles=400, box=48, pixel_size_angst=2.5, snr=0.3, shift_std_px=1.0, seed=5,
        defocus_min_angst=8_000.0, defocus_max_angst=25_000.0,
    )  # fmt: skip
    simulated = simulate(config)
    n, zeros = len(simulated.images), np.zeros(len(simulated.images))
    table = EstimateTable(
        z=np.zeros((n, 1)), z_std=np.zeros((n, 1)),
        psi_deg=geometry.degrees(simulated.psi_rad.double()).numpy(), psi_std_deg=zeros,
        origin_angst=simulated.origin_px.double().numpy() * 2.5, origin_std_angst=zeros,
        figure_of_merit=zeros, log_likelihood=zeros, second_mode=zeros, usable=np.ones(n, dtype=bool),
    )  # fmt: skip
    plan = Preparation(box_px=48, pixel_size_angst=2.5, mask_diameter_angst=90.0, invert=False)
    found = []
    for name in ("plain", kind):
        images, ctf = handled(simulated, name)
        write_simulated(tmp_path / name, dataclasses.replace(simulated, images=images), config)
        star = read_star(tmp_path / name / "particles.star")
        flags = {
            "rlnCtfDataArePhaseFlipped": ctf.phase_flipped,
            "rlnCtfDataAreCtfPremultiplied": ctf.premultiplied,
        }
        columns = {k: [str(int(each)) for each in v] for k, v in flags.items() if v is not None}
        write_star(tmp_path / name / "flagged.star", star, block="particles", columns=columns)
        source = ImageSource(read_particles(tmp_path / name / "flagged.star"))
        ones = np.ones(n, dtype=np.intp)
        cpu = torch.device("cpu")
        found.append(class_averages(source, table, ones, 1, plan, use_ctf=True, seed=0, device=cpu))
    before, after = (each.image[0] for each in found)
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.99
    assert after.std() == pytest.approx(before.std(), rel=0.05)
    frc, again = (each.frc[0] for each in found)
    known = frc > 0.9  # beyond, noise that lies elsewhere in a small box moves single rings by more
    assert known.sum() > 8
    np.testing.assert_allclose(again[known], frc[known], atol=0.01)
