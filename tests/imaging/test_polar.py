from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cryo_svae.imaging.geometry import align_images, pixel_grid, reference_to_particle
from cryo_svae.imaging.polar import PolarTransform, fast_length, ring_area, soft_disc

BOX = 40
SPOTS = torch.tensor([[7.0, 1.5], [-3.0, 6.0], [-2.0, -7.0], [1.0, 3.0]])
WEIGHTS = torch.tensor([1.0, 0.7, 1.3, -0.4])


def draw(
    psi_rad: float, origin_px: tuple[float, float], box_px: int = BOX, width_px: float = 2.0
) -> Tensor:
    """Gaussian spots in a pose, evaluated at the pixels: no interpolation."""
    spots = SPOTS * box_px / BOX
    points = reference_to_particle(spots[None], torch.tensor([psi_rad]), torch.tensor([origin_px]))[0]
    distance = (pixel_grid(box_px)[:, :, None] - points).square().sum(-1)
    return (torch.exp(-0.5 * distance / (width_px * box_px / BOX) ** 2) * WEIGHTS).sum(-1)[None]


@pytest.mark.parametrize("box_px", [32, 40, 64, 126])
def test_samples_are_the_exact_fourier_transform(box_px):
    polar = PolarTransform(box_px, box_px / 2)
    image = torch.randn(1, box_px, box_px)
    got = polar._sample(image)[0]
    axis = torch.arange(box_px, dtype=torch.float64) - box_px // 2
    phi = 2 * math.pi / polar.n_angles * torch.arange(polar.n_angles)
    for ring in (0, 1, box_px // 4, polar.n_rings - 1):
        kx, ky = ring * torch.cos(phi.double()), ring * torch.sin(phi.double())
        wave_x = torch.exp(-2j * math.pi / box_px * kx[:, None] * axis)
        wave_y = torch.exp(-2j * math.pi / box_px * ky[:, None] * axis)
        exact = torch.einsum("yx,ax,ay->a", image[0].to(torch.complex128), wave_x, wave_y) / box_px
        wanted = (exact.real + exact.imag) * ring_area(polar.n_rings)[ring].sqrt()
        torch.testing.assert_close(got[ring].double(), wanted, atol=5e-4 * math.sqrt(ring + 1), rtol=0)


def test_one_pixel_at_the_centre_is_flat():
    polar = PolarTransform(BOX, BOX / 2)
    image = torch.zeros(1, BOX, BOX)
    image[0, BOX // 2, BOX // 2] = 1.0
    samples = polar.samples(polar(image)) / ring_area(polar.n_rings).sqrt().float()[:, None]
    torch.testing.assert_close(samples, torch.full_like(samples, 1 / BOX), atol=1e-5, rtol=0)


@pytest.mark.parametrize("box_px", [32, 64, 96])
def test_image_undoes_the_coefficients(box_px):
    polar = PolarTransform(box_px, box_px / 2)
    image = draw(0.4, (0.0, 0.0), box_px)
    back = polar.image(polar(image))
    assert (back - image).abs().max() < 0.015 * image.max()
    assert (back - image).square().mean().sqrt() < 0.004 * image.max()


def test_sum_of_squares_is_the_image_s():
    polar = PolarTransform(BOX, BOX / 2)
    image = draw(0.3, (0.0, 0.0))
    assert float(polar(image).square().sum()) == pytest.approx(float(image.square().sum()), rel=2e-3)


def test_white_noise_has_noise_dof_in_each_ring():
    polar = PolarTransform(BOX, 15.0)
    power = polar(torch.randn(400, BOX, BOX)).square().sum(1).mean(0)
    per_ring = torch.zeros(polar.n_rings).index_add_(0, polar.ring, power)
    ratio = per_ring / polar.noise_dof
    # what the band limit leaves out lies at the edge of the disc
    assert ratio[3:].min() > 0.85
    assert ratio[3:].max() < 1.1


@pytest.mark.parametrize("psi_rad", [0.6, -2.2, 3.0])
def test_turning_multiplies_coefficients_by_phases(psi_rad):
    polar = PolarTransform(BOX, BOX / 2)
    reference, particle = polar(draw(0.0, (0.0, 0.0))), polar(draw(psi_rad, (0.0, 0.0)))
    phase = torch.exp(1j * psi_rad * polar.order)
    wanted = torch.complex(reference[:, 0], reference[:, 1]) * phase
    got = torch.complex(particle[:, 0], particle[:, 1])
    assert (got - wanted).abs().max() < 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("origin_px", [(1.3, -2.1), (-3.0, 0.5)])
def test_centring_is_a_shift_by_plus_the_origin(origin_px):
    polar = PolarTransform(BOX, BOX / 2, 4.0)
    particle, centred = polar(draw(0.0, origin_px)), polar(draw(0.0, (0.0, 0.0)))
    moved = polar.pack(polar.spectra(polar.shift(polar.samples(particle), torch.tensor([origin_px]))))
    assert (moved - centred).abs().max() < 5e-3 * centred.abs().max()
    shifts = torch.tensor([[0.0, 0.0], origin_px])
    trials = polar.shifted_spectra(polar.samples(particle), shifts)
    torch.testing.assert_close(polar.packed_from_orders(trials[:, :, 1]), moved)


@pytest.mark.parametrize("shape", [(5, 2), (3, 5, 2)])
def test_trial_shifts_by_products_are_those_by_fourier_transforms(shape):
    """What a GPU does and what a processor does."""
    polar = PolarTransform(BOX, BOX / 2, 4.0, n_rings=11)
    samples = polar.samples(torch.randn(3, 2, polar.n_pairs))
    shifts = 3.0 * torch.randn(shape)
    by_transform = polar.shifted_spectra(samples, shifts)
    by_product = polar._shifted_spectra_by_product(samples, shifts)
    torch.testing.assert_close(by_product, by_transform, atol=2e-5, rtol=1e-4)


def test_shifts_of_each_particle_s_own_are_those_made_one_by_one():
    """Along x, then along y, with waves used again: points of grids of different steps, and others."""
    polar = PolarTransform(16, 7.0, 3.0)
    samples = polar.samples(polar(torch.randn(3, 16, 16)))
    grid = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).float()
    shifts = torch.cat([torch.tensor([0.3, 0.7, 1.1])[:, None, None] * grid, torch.randn(3, 2, 2)], 1)
    found = polar.shifted_spectra(samples, shifts)
    for t in range(shifts.shape[1]):
        moved = polar.spectra(polar.shift(samples, shifts[:, t]))[..., : polar.n_orders]
        torch.testing.assert_close(found[:, :, t], moved.mT, atol=1e-5, rtol=1e-4)


def test_rings_are_summed_over_their_pairs():
    polar = PolarTransform(BOX, BOX / 2, 4.0)
    sums = polar.ring_sum(torch.ones(2, polar.n_pairs))
    assert torch.equal(sums[1], torch.bincount(polar.ring).float())


def test_pose_law_is_geometry_s():
    """Centre by +origin, then turn back by psi: the coefficients of geometry's aligned image."""
    psi_rad, origin_px = 0.8, (2.0, -1.5)
    polar = PolarTransform(BOX, BOX / 2, 4.0)
    image = draw(psi_rad, origin_px)
    aligned = polar(align_images(image, torch.tensor([psi_rad]), torch.tensor([origin_px])))
    centred = polar.pack(polar.spectra(polar.shift(polar.samples(polar(image)), torch.tensor([origin_px]))))
    turned = torch.complex(centred[:, 0], centred[:, 1]) * torch.exp(-1j * psi_rad * polar.order)
    difference = turned - torch.complex(aligned[:, 0], aligned[:, 1])
    assert difference.abs().max() < 0.03 * turned.abs().max()


def test_soft_disc_is_one_inside_and_zero_outside():
    disc = soft_disc(BOX, 10.0, 3.0)
    distance = pixel_grid(BOX).norm(dim=-1)
    assert (disc[distance <= 7.0] == 1).all()
    assert (disc[distance >= 10.0] == 0).all()


@pytest.mark.parametrize(("at_least", "length"), [(120, 120), (121, 128), (7, 8), (402, 432), (9, 10)])
def test_fast_length(at_least, length):
    assert fast_length(at_least) == length


def test_a_coarser_transform_is_the_beginning_of_the_full_one():
    full, coarse = PolarTransform(BOX, BOX / 2, 4.0), PolarTransform(BOX, BOX / 2, 4.0, n_rings=9)
    packed = full(draw(0.4, (1.0, -2.0)))[..., : coarse.n_pairs]
    torch.testing.assert_close(coarse.pack(coarse.spectra(coarse.samples(packed))), packed)
    assert torch.equal(coarse.order, full.order[: coarse.n_pairs])
    assert torch.equal(coarse.ring, full.ring[: coarse.n_pairs])
    assert torch.equal(coarse.noise_dof, full.noise_dof[:9])
    assert coarse.n_angles < full.n_angles


def test_no_images_have_no_coefficients():
    polar = PolarTransform(BOX, BOX / 2)
    assert polar(torch.zeros(0, BOX, BOX)).shape == (0, 2, polar.n_pairs)
