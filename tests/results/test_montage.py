"""Class pictures laid on one another: turned and moved copies come to lie as the first one."""

from __future__ import annotations

import numpy as np
import torch

from cryo_svae.imaging import geometry
from cryo_svae.results.montage import montage_poses
from cryo_svae.simulate import render

BOX = 48
CENTRED = torch.zeros(1, 2)


def molecule(seed: int, beads: int = 60) -> torch.Tensor:
    """A sharp image (n, n) without any symmetry."""
    generator = torch.Generator().manual_seed(seed)
    points = 24.0 * (torch.rand(1, beads, 2, generator=generator) - 0.5)
    return render(points, torch.linspace(0.4, 2.0, beads), 1.2, torch.zeros(1), CENTRED, BOX)[0]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    inside = geometry.pixel_grid(BOX).norm(dim=-1) < 18
    return float(np.corrcoef(a[inside].numpy(), b[inside].numpy())[0, 1])


def test_turned_and_moved_copies_come_to_lie_as_the_first():
    reference = molecule(11)
    psi = torch.tensor([0.0, 0.7, -2.3, 3.0])
    origin = torch.tensor([[0.0, 0.0], [2.0, -1.0], [-3.0, 0.5], [0.0, 2.5]])
    copies = geometry.pose_references(reference.expand(4, -1, -1), psi, origin)
    found_psi, found_origin = montage_poses(copies, 22.0)
    assert geometry.wrap_radians(found_psi - psi).abs().max() < 0.02
    assert (found_origin - origin).abs().max() < 0.2
    assert found_psi[0] == 0
    laid = geometry.align_images(copies, found_psi, found_origin)
    assert min(correlation(image, reference) for image in laid) > 0.98


def test_an_image_is_laid_on_the_one_it_resembles():
    """Two molecules in two poses each: the third and fourth need not know the first."""
    first, other = molecule(11), molecule(12)
    images = geometry.pose_references(
        torch.stack([first, other, first, other]), torch.tensor([0.0, 0.4, 1.1, -2.0]), torch.zeros(4, 2)
    )
    laid = geometry.align_images(images, *montage_poses(images, 22.0))
    assert correlation(laid[0], laid[2]) > 0.98
    assert correlation(laid[1], laid[3]) > 0.98


def test_images_without_contrast_stay_and_disturb_nothing():
    reference = molecule(11)
    images = torch.stack([reference, torch.zeros(BOX, BOX), reference])
    psi, origin = montage_poses(images, 22.0)
    assert psi.abs().max() < 1e-6
    assert origin.abs().max() < 0.05
    for few in (images[1:2], images[:1], torch.zeros(3, BOX, BOX)):
        psi, origin = montage_poses(few, 22.0)
        assert not psi.any()
        assert not origin.any()
