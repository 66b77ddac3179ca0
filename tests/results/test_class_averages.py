"""Class averages against truth: right frame, CTF undone, honest half-set FRC."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from cryo_svae.formats.mrc import read_images, write_stack
from cryo_svae.formats.star import read_star, write_star
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import ctf_2d, ctf_at
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.known_poses import turned_ctf
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.preprocessing import Preparation, soft_circle
from cryo_svae.results.class_averages import (
    ClassAverages,
    HalfPlane,
    Members,
    Sums,
    aligned_spectra,
    class_averages,
    crossing_ring,
    half_sets,
    ring_correlation,
)
from cryo_svae.simulate import SimulateConfig, render, simulate, write_simulated

BOX, SIZE = 48, 3.0
CPU = torch.device("cpu")
PREPARATION = Preparation(box_px=BOX, pixel_size_angst=SIZE, mask_diameter_angst=38 * SIZE, invert=False)
MASK = soft_circle(BOX, 16.0, 3.0)


def references(n_classes: int) -> torch.Tensor:
    """Sharp molecules without any symmetry."""
    beads, weights = molecule()
    zero = torch.zeros(n_classes)
    images = [
        render(beads[k : k + 1], weights, 0.9, zero[:1], torch.zeros(1, 2), BOX) for k in range(n_classes)
    ]
    return torch.cat(images)


def molecule() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    beads = 24.0 * (torch.rand(3, 60, 2, generator=generator) - 0.5)
    return beads, torch.linspace(0.4, 2.0, 60)


def make_set(folder, *, n: int, snr: float, defocus=None, n_classes: int = 1):
    """A particle set of sharp molecules with its true poses and classes (and its noiseless truth)."""
    lowest, highest = (None, None) if defocus is None else defocus
    config = SimulateConfig(
        n_particles=n, box=BOX, pixel_size_angst=SIZE, shift_std_px=1.5, seed=5,
        defocus_min_angst=lowest, defocus_max_angst=highest, n_micrographs=20,
    )  # fmt: skip
    simulated = simulate(config)
    ctf = simulated.ctf
    if ctf is not None:  # stronger astigmatism than the simulation's 2 %
        stronger = {
            "defocus_u_angst": ctf.defocus_u_angst * 1.1,
            "defocus_v_angst": ctf.defocus_v_angst * 0.9,
        }
        ctf = dataclasses.replace(ctf, **stronger)
    beads, weights = molecule()
    class_number = 1 + np.arange(n) % n_classes
    images = render(
        beads[class_number - 1], weights, 0.9, simulated.psi_rad, simulated.origin_px, BOX
    )  # fmt: skip
    if ctf is not None:
        images = torch.fft.irfft2(torch.fft.rfft2(images) * ctf_2d(ctf, BOX), s=(BOX, BOX))
    noise_std = float(images.std()) / math.sqrt(snr)
    noisy = images + noise_std * torch.randn(images.shape, generator=torch.Generator().manual_seed(6))
    write_simulated(folder, dataclasses.replace(simulated, images=noisy, ctf=ctf), config)
    zeros, ones = np.zeros(n), np.ones(n)
    table = EstimateTable(
        z=np.zeros((n, 2)), z_std=np.zeros((n, 2)),
        psi_deg=geometry.degrees(simulated.psi_rad.double()).numpy(), psi_std_deg=zeros,
        origin_angst=simulated.origin_px.double().numpy() * SIZE, origin_std_angst=zeros,
        figure_of_merit=np.linspace(0, 1, n), log_likelihood=zeros, second_mode=zeros,
        usable=ones.astype(bool),
    )  # fmt: skip
    return ImageSource(read_particles(folder / "particles.star")), table, class_number


def average(source, table, class_number, n_classes=1, use_ctf=False) -> ClassAverages:
    return class_averages(
        source, table, class_number, n_classes, PREPARATION, use_ctf=use_ctf, seed=0, device=CPU
    )


def correlation(a, b) -> float:
    inside = geometry.pixel_grid(BOX).norm(dim=-1).numpy() < 18
    return float(np.corrcoef(np.asarray(a)[inside], np.asarray(b)[inside])[0, 1])


def ring_gain(image, reference) -> np.ndarray:
    """Regression of an image on its reference in each ring: 1 where nothing is lost."""
    plane = HalfPlane(BOX, CPU)
    a, b = plane.spectrum(torch.as_tensor(image).double()), plane.spectrum(reference.double())
    return (plane.ring_sum((a * b.conj()).real) / plane.ring_sum(b.abs() ** 2)).numpy()


def test_with_true_poses_the_average_is_the_reference_and_keeps_its_high_frequencies(tmp_path):
    source, table, number = make_set(tmp_path, n=300, snr=100.0)
    result = average(source, table, number)
    reference = references(1)[0]
    assert correlation(result.image[0], reference) > 0.998
    assert result.resolution_0143_angst[0] == 2 * SIZE
    gain = ring_gain(result.image[0], reference)
    np.testing.assert_allclose(gain[2:22] / gain[2], 1.0, atol=0.02)
    wrong = dataclasses.replace(table, psi_deg=-table.psi_deg)
    assert correlation(average(source, wrong, number).image[0], reference) < 0.8
    wrong = dataclasses.replace(table, origin_angst=-table.origin_angst)
    assert correlation(average(source, wrong, number).image[0], reference) < 0.9


def test_aligned_spectra_are_those_of_aligned_images():
    plane = HalfPlane(BOX, CPU)
    beads, weights = molecule()
    psi, origin = torch.tensor([0.4, -2.0, 3.0]), torch.tensor([[1.3, -0.6], [0.0, 2.0], [-1.7, 0.2]])
    images = render(beads, weights, 1.5, psi, origin, BOX)
    straight = render(beads, weights, 1.5, torch.zeros(3), torch.zeros(3, 2), BOX)
    spectra = aligned_spectra(images, psi, origin, plane)
    error = (spectra - plane.spectrum(straight)).abs().max() / plane.spectrum(straight).abs().max()
    assert error < 0.02


def test_the_turned_ctf_is_the_ctf_at_turned_frequencies(tmp_path):
    source, _, _ = make_set(tmp_path, n=4, snr=1.0, defocus=(10000.0, 20000.0))
    ctf = source.particles.ctf
    psi = torch.tensor([0.3, -1.2, 2.5, 0.9])
    points = geometry.pixel_grid(BOX).reshape(-1, 2)
    ours = ctf_at(turned_ctf(ctf, psi), points / BOX)
    for i in range(4):
        turned = geometry.reference_to_particle(points[None], psi[i : i + 1], torch.zeros(1, 2))[0]
        torch.testing.assert_close(ours[i], ctf_at(ctf[i : i + 1], turned / BOX)[0], atol=2e-3, rtol=0)


def test_the_ctf_is_undone_even_with_astigmatism(tmp_path):
    source, table, number = make_set(tmp_path, n=400, snr=5.0, defocus=(5000.0, 12000.0))
    reference = references(1)[0]
    corrected = average(source, table, number, use_ctf=True).image[0]
    assert correlation(corrected, reference) > 0.98
    gain = ring_gain(corrected, reference)
    np.testing.assert_allclose(gain[2:22] / gain[4], 1.0, atol=0.1)
    assert correlation(average(source, table, number).image[0], reference) < 0.9


@pytest.mark.parametrize("defocus", [None, (8000.0, 25000.0)])
def test_the_half_set_frc_tells_the_frc_against_the_truth(tmp_path, defocus):
    source, table, number = make_set(tmp_path, n=600, snr=0.02, defocus=defocus, n_classes=2)
    result = average(source, table, number, 2, use_ctf=defocus is not None)
    mean = torch.from_numpy(result.half).mean(1)
    for k, reference in enumerate(references(2)):
        against_truth = ring_correlation(mean[k][None] * MASK, reference[None] * MASK)[0].numpy()
        frc = result.frc[k].clip(0, 1)
        predicted = np.sqrt(2 * frc / (1 + frc))
        trusted = frc > 0.3
        assert trusted.sum() > 5
        assert not trusted.all()  # the noise ends it before Nyquist
        assert np.abs(predicted - against_truth)[trusted].max() < 0.12
        assert np.abs((predicted - against_truth)[trusted].mean()) < 0.04
    assert (result.resolution_0143_angst < result.resolution_05_angst).all()
    assert (result.resolution_0143_angst > 2 * SIZE).all()


def test_noise_alone_has_no_resolution_and_leaves_little(tmp_path):
    source, table, number = make_set(tmp_path, n=200, snr=1e-6)
    result = average(source, table, number)
    assert np.abs(result.frc[0, 5:]).mean() < 0.2
    assert np.isnan(result.resolution_05_angst[0]) or result.resolution_05_angst[0] > BOX * SIZE / 4
    assert result.image[0].std() < 0.5 * result.half[0, 0].std()


def test_wiener_s_filter_brings_the_average_nearer_the_truth(tmp_path):
    """Nearer than the mean of the halves, which is its unfiltered self, at a noise that hides detail."""
    source, table, number = make_set(tmp_path, n=200, snr=0.02)
    result = average(source, table, number)
    truth = references(1)[0].numpy()
    filtered, plain = (correlation(x, truth) for x in (result.image[0], result.half[0].mean(0)))
    assert 1.0 - filtered < 0.7 * (1.0 - plain)


def test_the_outermost_ring_is_sampled_as_every_other(tmp_path):
    """At pose 0 the spectrum is that of the image; at half a turn, its conjugate."""
    plane = HalfPlane(BOX, CPU)
    images = torch.randn(2, BOX, BOX) * plane.window
    none = torch.zeros(2)
    plain = aligned_spectra(images, none, torch.zeros(2, 2), plane)
    torch.testing.assert_close(plain, plane.spectrum(images * plane.window), rtol=1e-4, atol=1e-3)
    turned = aligned_spectra(images, none + math.pi, torch.zeros(2, 2), plane)
    torch.testing.assert_close(turned, plain.conj(), rtol=1e-3, atol=2e-3)


def test_images_that_are_no_longer_usable_have_no_part_in_an_average(tmp_path):
    source, table, number = make_set(tmp_path, n=40, snr=5.0, defocus=(10000.0, 20000.0))
    usable = np.arange(40) % 4 > 0
    without = average(source, dataclasses.replace(table, usable=usable), number, use_ctf=True)
    stack = source.particles.stacks[0].path
    images = read_images(stack, np.arange(40))
    images[~usable] = np.nan
    write_stack(stack, images, pixel_size_angst=SIZE)
    subset = half_sets(source.particles, usable, number, 0)
    halves = {"rlnRandomSubset": [str(1 + k) for k in subset.tolist()]}
    write_star(
        tmp_path / "s.star", read_star(source.particles.star.path), block="particles", columns=halves
    )
    spoilt = ImageSource(read_particles(tmp_path / "s.star"))
    with_nan = average(spoilt, table, number, use_ctf=True)
    np.testing.assert_allclose(with_nan.image, without.image, atol=1e-5)


def test_sums_are_in_double_precision_and_of_repeats_too():
    """Batches of any size and with many particles of a class give what adding one after the other does."""
    generator = torch.Generator().manual_seed(2)
    images, row = torch.randn(40, 16, 16, generator=generator), torch.arange(40) // 3 % 3
    members = Members(
        row, torch.rand(40, generator=generator), torch.rand(40, 2, generator=generator), None
    )
    usable, plane = torch.ones(40, dtype=torch.bool), HalfPlane(16, CPU)
    at_once, singly = Sums(4, plane), Sums(4, plane)
    at_once.add(images, usable, members)
    for k in range(40):
        singly.add(images[k : k + 1], usable[k : k + 1], members[k : k + 1])
    torch.testing.assert_close(at_once.signal, singly.signal, rtol=1e-5, atol=1e-5)
    assert at_once.power[:, 0].tolist() == singly.power[:, 0].tolist() == [15, 13, 12, 0]
    many = Sums(1, plane)
    many.signal += 2.0**30  # of which float32 would not tell the rest
    many.add(images[:1], usable[:1], Members(row[:1], members.psi_rad[:1], members.origin_px[:1], None))
    torch.testing.assert_close(
        many.signal[0] - 2.0**30, singly_one(images[0], members, plane), atol=1e-5, rtol=0
    )


def singly_one(image: torch.Tensor, members: Members, plane: HalfPlane) -> torch.Tensor:
    one = aligned_spectra(image[None], members.psi_rad[:1], members.origin_px[:1], plane)
    return one[0].to(torch.complex128)


def test_empty_and_tiny_classes_give_finite_images_and_no_resolution(tmp_path):
    source, table, _ = make_set(tmp_path, n=30, snr=5.0, defocus=(10000.0, 20000.0))
    usable = np.ones(30, dtype=bool)
    usable[29] = False
    table = dataclasses.replace(table, usable=usable)
    number = np.full(30, 1)
    number[[3]], number[[4, 5]], number[[6, 7, 8, 9]], number[29] = 3, 4, 5, 2
    result = average(source, table, number, 6, use_ctf=True)
    assert result.n_particles.tolist() == [22, 0, 1, 2, 4, 0]
    for values in (result.image, result.half, result.frc, result.mean_figure_of_merit):
        assert np.isfinite(values).all()
    assert not result.image[[1, 5]].any()
    assert (result.image[2:5].std((1, 2)) > 0).all()
    assert np.isnan(result.resolution_0143_angst[1:]).all()
    assert np.isfinite(result.resolution_0143_angst[0])
    np.testing.assert_allclose(result.mean_figure_of_merit[2], 3 / 29)


def test_no_usable_particle_at_all(tmp_path):
    source, table, number = make_set(tmp_path, n=6, snr=1.0)
    result = average(source, dataclasses.replace(table, usable=np.zeros(6, dtype=bool)), number)
    assert not result.image.any()
    assert result.n_particles.tolist() == [0]


def test_halves_are_even_in_each_class_or_as_the_file_says(tmp_path):
    source, table, _ = make_set(tmp_path, n=41, snr=1.0)
    number = 1 + np.arange(41) % 3
    half = half_sets(source.particles, table.usable, number, 0)
    for k in (1, 2, 3):
        assert abs(int((2 * half[number == k] - 1).sum())) <= 1
    assert not np.array_equal(half, half_sets(source.particles, table.usable, number, 1))
    star = tmp_path / "particles.star"
    subset = [str(1 + i // 20 % 2) for i in range(41)]
    write_star(tmp_path / "s.star", read_star(star), block="particles", columns={"rlnRandomSubset": subset})
    given = half_sets(read_particles(tmp_path / "s.star"), table.usable, number, 0)
    assert (given + 1).tolist() == [int(cell) for cell in subset]


@pytest.mark.parametrize(
    ("frc", "ring"),
    [
        ([1, 1, 0.9, 0.5, 0.1, 0.6], 3.0),
        ([1, 0.9, 0.7, 0.3, 0.0, 0.0], 2.5),
        ([1, 0.9, 0.9, 0.9, 0.9, 0.9], 6.0),
        ([1, 0.4, 0.9, 0.9, 0.9, 0.9], math.nan),
    ],
)
def test_the_crossing_lies_between_rings(frc, ring):
    np.testing.assert_allclose(crossing_ring(np.array(frc) - 1e-9, 0.5), ring, atol=1e-6)
