"""Class images aligned to one another, so that all images of a montage are shown in one frame.

Only the images for display are turned. A model decodes each z in a frame of its own, which changes
smoothly over the latent space, and the poses of the particles belong to that frame; turning them class
by class would make psi jump at every border between classes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryo_svae.imaging import geometry
from cryo_svae.imaging.polar import PolarTransform

TURNS = 1440  # tried between two images: a quarter of a degree
ROUNDS = 3  # of turn, then shift
LARGEST_MOVE = 1 / 8  # of the box


def montage_poses(
    images: Float[Tensor, "k n n"], radius_px: float
) -> tuple[Float[Tensor, "k"], Float[Tensor, "k 2"]]:
    """psi and origin (px) of each image with which ``align_images`` brings it into one frame.

    The first image stays. Each other one is laid on the image that it resembles most at any turn, in
    the order in which a minimum spanning tree reaches them, so that like images end up alike. 0 for
    an image without contrast.
    """
    box_px = images.shape[-1]
    transform = PolarTransform(box_px, radius_px, LARGEST_MOVE * box_px).to(images.device)
    psi, origin = images.new_zeros(len(images)), images.new_zeros(len(images), 2)
    packed = transform(images)
    spectra = _normalised(transform.dense(packed))
    laid = images.clone()
    parent = torch.zeros(len(images), dtype=torch.long)
    likeness = _correlations(spectra[0], spectra).amax(-1)
    waiting = torch.ones(len(images), dtype=torch.bool, device=images.device)
    waiting[:1] = False
    while waiting.any():
        k = int(torch.where(waiting, likeness, -torch.inf).argmax())
        waiting[k] = False
        if likeness[k] > 0:
            other = int(parent[k])
            target = _aligned(transform, packed[other], psi[other], origin[other])
            psi[k], origin[k] = _lay(images[k], packed[k], laid[other], target, transform)
            laid[k] = geometry.align_images(images[k : k + 1], psi[k : k + 1], origin[k : k + 1])[0]
        closer = _correlations(spectra[k], spectra).amax(-1)
        parent[(closer > likeness).cpu()] = k
        likeness = torch.maximum(likeness, closer)
    return psi, origin


def _aligned(
    transform: PolarTransform, packed: Float[Tensor, "2 p"], psi_rad: Float[Tensor, ""], origin_px: Tensor
) -> Complex[Tensor, "r m"]:
    """Spectra of an image brought into its reference's frame: moved by the origin, then turned."""
    moved = transform.spectra(transform.shift(transform.samples(packed[None]), origin_px[None]))[0]
    order = torch.arange(moved.shape[-1], device=moved.device)
    return moved * torch.exp(-1j * psi_rad * order)


def _normalised(spectra: Complex[Tensor, "k r m"]) -> Complex[Tensor, "k r m"]:
    norm = spectra.abs().square().sum((-2, -1)).sqrt()
    return spectra / torch.where(norm > 0, norm, 1.0)[:, None, None]


def _correlations(
    reference: Complex[Tensor, "r m"], spectra: Complex[Tensor, "k r m"]
) -> Float[Tensor, "k t"]:
    """Correlation of each image with a reference at every turn: psi = 2 pi t / 1440.

    A particle's coefficients are exp(i m psi) times those of its reference.
    """
    product = (reference.conj() * spectra).sum(-2)
    correlations: Tensor = torch.fft.ifft(product.conj(), n=TURNS, norm="forward").real
    return correlations


def _lay(
    image: Float[Tensor, "n n"],
    packed: Float[Tensor, "2 p"],
    reference: Float[Tensor, "n n"],
    target: Complex[Tensor, "r m"],
    transform: PolarTransform,
) -> tuple[Float[Tensor, ""], Float[Tensor, "2"]]:
    """psi and origin of an image on a reference, turn and shift found in turns.

    packed: the image's coefficients; target: the reference's spectra.
    """
    psi, origin = image.new_zeros(1), image.new_zeros(1, 2)
    for _ in range(ROUNDS):
        moved = _aligned(transform, packed, torch.zeros_like(psi[0]), origin[0])
        best = _correlations(target, moved[None]).argmax(-1)
        psi = geometry.wrap_radians(best * (2.0 * math.pi / TURNS)).to(psi)
        turned = geometry.align_images(image[None], psi, origin)[0]
        move = _move(turned * transform.mask, reference * transform.mask)
        origin = origin + geometry.reference_to_particle(move[None, None], psi, torch.zeros_like(origin))[0]
    return psi[0], origin[0]


def _move(image: Float[Tensor, "n n"], reference: Float[Tensor, "n n"]) -> Float[Tensor, "2"]:
    """By how much (x, y) in px the content of an image lies off its reference's: add it to lay it on."""
    box_px = image.shape[-1]
    product = torch.fft.rfft2(reference) * torch.fft.rfft2(image).conj()
    peak = torch.fft.fftshift(torch.fft.irfft2(product, s=(box_px, box_px)))
    near = geometry.pixel_grid(box_px, image.device).norm(dim=-1) <= LARGEST_MOVE * box_px
    row, column = divmod(int(torch.where(near, peak, -torch.inf).argmax()), box_px)
    x, y = (float(part) for part in (column - box_px // 2, row - box_px // 2))
    return image.new_tensor(
        [
            x + _vertex(peak[row, column - 1 : column + 2]),
            y + _vertex(peak[row - 1 : row + 2, column]),
        ]
    )


def _vertex(three: Float[Tensor, "3"]) -> float:
    """Where, from the middle one, a parabola through three neighbours is highest; within half a step."""
    before, middle, after = (float(value) for value in three)
    curvature = before - 2.0 * middle + after
    return 0.0 if curvature >= 0 else max(-0.5, min(0.5, 0.5 * (before - after) / curvature))
