"""The pose convention, by one-pixel answers and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryo_svae.imaging import geometry
from cryo_svae.simulate import render

angles = st.floats(-10.0, 10.0)
shifts = st.tuples(st.floats(-3.0, 3.0), st.floats(-3.0, 3.0))


def one_pixel(box: int, x: int, y: int) -> torch.Tensor:
    image = torch.zeros(1, box, box)
    image[0, box // 2 + y, box // 2 + x] = 1.0
    return image


def where(image: torch.Tensor) -> tuple[int, int]:
    """(x, y) of the brightest pixel."""
    box = image.shape[-1]
    row, col = divmod(int(image.flatten().argmax()), box)
    return col - box // 2, row - box // 2


def test_positive_origin_moves_content_to_larger_columns_and_rows():
    aligned = geometry.align_images(one_pixel(16, 1, -2), torch.zeros(1), torch.tensor([[3.0, 1.0]]))
    assert where(aligned) == (4, -1)


def test_positive_psi_turns_content_clockwise_with_row_zero_at_the_top():
    aligned = geometry.align_images(one_pixel(16, 4, 0), torch.tensor([math.pi / 2]), torch.zeros(1, 2))
    assert where(aligned) == (0, 4)  # from the right to the bottom


def test_shift_comes_before_rotation():
    origin = torch.tensor([[2.0, 0.0]])
    aligned = geometry.align_images(one_pixel(16, 2, 0), torch.tensor([math.pi / 2]), origin)
    assert where(aligned) == (0, 4)


def test_the_centre_is_pixel_half_n_for_even_boxes():
    for psi in (0.3, 1.0, 2.5):
        turned = geometry.align_images(one_pixel(16, 0, 0), torch.tensor([psi]), torch.zeros(1, 2))
        assert where(turned) == (0, 0)


def test_alignment_agrees_with_the_affine_transform_of_scipy():
    rng = np.random.default_rng(1)
    box, psi, origin = 32, 0.7, np.array([1.3, -2.1])
    image = scipy.ndimage.gaussian_filter(rng.standard_normal((box, box)), 2.0)
    matrix = np.array([[math.cos(psi), -math.sin(psi)], [math.sin(psi), math.cos(psi)]])
    centre = np.array([box // 2, box // 2])
    expected = scipy.ndimage.affine_transform(
        image, matrix, offset=centre - matrix @ centre - origin[::-1], order=3
    )
    aligned = geometry.align_images(
        torch.from_numpy(image)[None].float(), torch.tensor([psi]), torch.from_numpy(origin)[None].float()
    )[0].numpy()
    y, x = np.mgrid[:box, :box] - box // 2
    inside = x**2 + y**2 < (0.35 * box) ** 2
    assert np.corrcoef(aligned[inside], expected[inside])[0, 1] > 0.999


@settings(max_examples=40, deadline=None)
@given(angles, shifts)
def test_to_the_reference_and_back_is_the_identity(psi, origin):
    points = torch.tensor([[[1.0, 2.0], [-3.0, 0.5]]], dtype=torch.float64)
    pose = torch.tensor([psi], dtype=torch.float64), torch.tensor([origin], dtype=torch.float64)
    back = geometry.reference_to_particle(geometry.particle_to_reference(points, *pose), *pose)
    torch.testing.assert_close(back, points)


def test_posing_then_aligning_gives_the_reference_back():
    box = 32
    grid = geometry.pixel_grid(box)
    reference = torch.exp(-((grid[..., 0] - 4) ** 2 + (grid[..., 1] + 3) ** 2) / 18.0)[None]
    pose = torch.tensor([2.1]), torch.tensor([[1.4, -0.8]])
    back = geometry.align_images(geometry.pose_references(reference, *pose), *pose)
    assert float((back - reference).abs().max()) < 0.02


@given(st.floats(-1e4, 1e4))
def test_wrapping_keeps_the_angle(angle_deg):
    wrapped = geometry.wrap_degrees(angle_deg)
    assert -180.0 <= wrapped < 180.0
    turns = (wrapped - angle_deg) / 360.0
    assert turns == pytest.approx(round(turns), abs=1e-6)
    assert geometry.radians(geometry.degrees(1.0)) == pytest.approx(1.0)
    assert (
        geometry.wrap_radians(geometry.radians(angle_deg))
        == pytest.approx(geometry.radians(wrapped), abs=1e-6)
        or abs(abs(wrapped) - 180.0) < 1e-3
    )


def test_undone_poses_are_the_reference_to_the_last_detail():
    """Dots, as wide as a pixel, in every quarter turn; and white noise stays white and as strong."""
    n, box = 24, 48
    generator = torch.Generator().manual_seed(4)
    psi = torch.linspace(-7.0, 7.0, n)
    origin = 6.0 * (torch.rand(n, 2, generator=generator) - 0.5)
    dots = 24.0 * (torch.rand(1, 9, 2, generator=generator) - 0.5)
    weights = torch.linspace(0.5, 2.0, 9)
    reference = render(dots, weights, 1.2, torch.zeros(1), torch.zeros(1, 2), box)[0]
    posed = render(dots.expand(n, -1, -1), weights, 1.2, psi, origin, box)
    undone = geometry.undo_poses(posed, psi, origin)
    inside = geometry.pixel_grid(box).norm(dim=-1) < 22
    error = (undone - reference)[:, inside].square().mean(1).sqrt() / reference[inside].std()
    assert error.max() < 2e-3
    blurred = geometry.align_images(posed, psi, origin)
    assert (blurred - reference)[:, inside].square().mean() > 25 * error.square().mean() * reference.var()


def test_undone_poses_leave_white_noise_white_and_as_strong():
    n, box = 200, 48
    generator = torch.Generator().manual_seed(4)
    psi, origin = 7.0 * torch.randn(n, generator=generator), 2.0 * torch.randn(n, 2, generator=generator)
    noise = torch.randn(n, box, box, generator=generator)
    inside = (geometry.pixel_grid(box).norm(dim=-1) < 22).float()
    frequency = geometry.pixel_grid(box).norm(dim=-1) / box

    def powers(images: torch.Tensor) -> list[float]:
        power = torch.fft.fftshift(torch.fft.fft2(images * inside).abs().square().mean(0)) / inside.sum()
        bands = [(frequency > low) & (frequency < low + 0.15) for low in (0.0, 0.15, 0.3)]
        return [float(power[band].mean()) for band in bands]

    assert powers(geometry.undo_poses(noise, psi, origin)) == pytest.approx([1.0] * 3, abs=0.03)
    assert powers(geometry.align_images(noise, psi, origin))[2] < 0.8


def test_two_poses_one_after_the_other_are_one():
    generator = torch.Generator().manual_seed(5)
    psi, then = torch.rand(2, 6, generator=generator) * 6.0
    origin, then_origin = torch.randn(2, 6, 2, generator=generator)
    points = torch.randn(6, 10, 2, generator=generator)
    first = geometry.particle_to_reference(points, psi, origin)
    both = geometry.particle_to_reference(points, *geometry.composed(psi, origin, then, then_origin))
    torch.testing.assert_close(both, geometry.particle_to_reference(first, then, then_origin))
