"""The only place where degrees and radians, Å and pixels, signs, axes and centres meet.

Convention, verified against RELION 3.1.3 (relion_project, relion_stack_create, relion_refine):

* An image ``I[row, col]`` has coordinates x = col - N//2, y = row - N//2; y grows downwards.
* ``o`` is the origin (x, y) in pixels: rlnOriginXAngst, rlnOriginYAngst over the pixel size.
* R(psi) = [[cos psi, -sin psi], [sin psi, cos psi]] acts on the column vector (x, y).
* A particle's point p is the reference's point q = R(psi) (p + o): shift first, then rotate.
* Aligned image A(q) = I(R(-psi) q - o); simulated particle I(p) = Ref(R(psi) (p + o)).

Our models decode at q = R(theta) (p + o) in the same coordinates, so psi is theta in degrees.
"""

from __future__ import annotations

import math
import warnings
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

SHEAR_MARGIN = 0.06  # of the box, on each side: shears by tan(pi / 8) leave circles 1.08 times as wide

Numbers = TypeVar("Numbers", Tensor, NDArray[np.float64], float)


def degrees(angle_rad: Numbers) -> Numbers:
    """Angles in degrees, of angles in radians."""
    return angle_rad * (180.0 / math.pi)


def radians(angle_deg: Numbers) -> Numbers:
    """Angles in radians, of angles in degrees."""
    return angle_deg * (math.pi / 180.0)


def wrap_degrees(angle_deg: Numbers) -> Numbers:
    """The same angles in [-180, 180)."""
    return (angle_deg + 180.0) % 360.0 - 180.0


def wrap_radians(angle_rad: Numbers) -> Numbers:
    """The same angles in [-pi, pi)."""
    return (angle_rad + math.pi) % (2.0 * math.pi) - math.pi


def rotation_vectors_to_euler(
    rotation_vector_rad: Float[np.ndarray, "n 3"],
) -> Float[np.ndarray, "n 3"]:
    """RELION's rlnAngleRot, rlnAngleTilt, rlnAnglePsi (degrees) of CryoSPARC's alignments3D/pose.

    The pose is the rotation Rz(rot) Ry(tilt) Rz(psi), the inverse of RELION's Euler matrix: so read
    in the sources of two converters, cryoDRGN (R_from_relion, parse_pose_csparc) and pyem.
    """
    from scipy.spatial.transform import Rotation  # a third of a second, for .cs files alone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at tilt 0 only rot + psi is defined; scipy then takes psi 0
        euler = Rotation.from_rotvec(rotation_vector_rad).as_euler("ZYZ", degrees=True)
    return np.asarray(euler, dtype=np.float64)


def euler_to_rotation_vectors(
    rot_tilt_psi_deg: Float[np.ndarray, "n 3"],
) -> Float[np.ndarray, "n 3"]:
    """CryoSPARC's alignments3D/pose (rad) of RELION's rot, tilt and psi; see the inverse."""
    from scipy.spatial.transform import Rotation

    rotation = Rotation.from_euler("ZYZ", rot_tilt_psi_deg, degrees=True)
    return np.asarray(rotation.as_rotvec(), dtype=np.float64)


def rotation_matrix(psi_rad: Float[Tensor, "*b"]) -> Float[Tensor, "*b 2 2"]:
    """R(psi), acting on column vectors (x, y)."""
    cos, sin = torch.cos(psi_rad), torch.sin(psi_rad)
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def pixel_grid(box_px: int, device: torch.device | str = "cpu") -> Float[Tensor, "n n 2"]:
    """Coordinates (x, y) in pixels of every pixel [row, col], zero at [N//2, N//2]."""
    axis = torch.arange(box_px, dtype=torch.float32, device=device) - box_px // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1)


def particle_to_reference(
    points_px: Float[Tensor, "*b p 2"], psi_rad: Float[Tensor, "*b"], origin_px: Float[Tensor, "*b 2"]
) -> Float[Tensor, "*b p 2"]:
    """Reference points q = R(psi) (p + o) of particle points p; (x, y) in pixels."""
    return (points_px + origin_px[..., None, :]) @ rotation_matrix(psi_rad).mT


def reference_to_particle(
    points_px: Float[Tensor, "*b p 2"], psi_rad: Float[Tensor, "*b"], origin_px: Float[Tensor, "*b 2"]
) -> Float[Tensor, "*b p 2"]:
    """Particle points p = R(-psi) q - o of reference points q; (x, y) in pixels."""
    return points_px @ rotation_matrix(psi_rad) - origin_px[..., None, :]


def _sample(images: Float[Tensor, "b n n"], points_px: Float[Tensor, "b p 2"]) -> Float[Tensor, "b n n"]:
    box_px = images.shape[-1]
    index = points_px + box_px // 2
    grid = (2.0 * index + 1.0) / box_px - 1.0
    sampled = torch.nn.functional.grid_sample(
        images[:, None],
        grid.reshape(len(images), box_px, box_px, 2),
        mode="bicubic",
        padding_mode="zeros",
        align_corners=False,
    )
    return sampled[:, 0]


def align_images(
    images: Float[Tensor, "b n n"], psi_rad: Float[Tensor, "b"], origin_px: Float[Tensor, "b 2"]
) -> Float[Tensor, "b n n"]:
    """Particles in the reference's frame, A(q) = I(R(-psi) q - o): bicubic, zero outside.

    Does what ``relion_stack_create --apply_transformation`` does.
    """
    grid = pixel_grid(images.shape[-1], images.device).to(images.dtype).reshape(1, -1, 2)
    grid = grid.expand(len(images), -1, -1)
    return _sample(images, reference_to_particle(grid, psi_rad, origin_px))


def pose_references(
    references: Float[Tensor, "b n n"], psi_rad: Float[Tensor, "b"], origin_px: Float[Tensor, "b 2"]
) -> Float[Tensor, "b n n"]:
    """References in their particles' poses, I(p) = Ref(R(psi) (p + o)): bicubic, zero outside."""
    grid = pixel_grid(references.shape[-1], references.device).to(references.dtype).reshape(1, -1, 2)
    grid = grid.expand(len(references), -1, -1)
    return _sample(references, particle_to_reference(grid, psi_rad, origin_px))


def undo_poses(
    images: Float[Tensor, "b n n"], psi_rad: Float[Tensor, "b"], origin_px: Float[Tensor, "b 2"]
) -> Float[Tensor, "b n n"]:
    """What ``align_images`` does, by Fourier interpolation: white noise stays white, and no detail is lost.

    A shift, quarter turns, and three shears of at most an eighth of a turn; right within the circle that
    touches the box. Corners hold what the box's periodic continuation brings there.
    """
    n = images.shape[-1]
    phase = -2.0 * math.pi * _frequencies(n, images) * origin_px[:, 0, None, None]
    along_rows = _ramped(images, phase)
    phase = -2.0 * math.pi * _frequencies(n, images) * origin_px[:, 1, None, None]
    shifted = _ramped(along_rows.mT, phase).mT
    quarters = torch.round(psi_rad / (0.5 * math.pi))
    rest = psi_rad - 0.5 * math.pi * quarters
    up, across = _mirrored(shifted, -2), _mirrored(shifted, -1)
    turned = torch.stack([shifted, up.mT, _mirrored(up, -1), across.mT])
    turned = turned[quarters.long() % 4, torch.arange(len(images), device=images.device)]
    margin = math.ceil(SHEAR_MARGIN * n)
    sheared = torch.nn.functional.pad(turned, (margin,) * 4)
    slant, tilt = torch.tan(0.5 * rest), -torch.sin(rest)
    sheared = _sheared(_sheared(sheared, slant).mT, tilt).mT
    return _sheared(sheared, slant)[:, margin : margin + n, margin : margin + n]


def _frequencies(n: int, like: Tensor) -> Float[Tensor, "half"]:
    frequencies: Tensor = torch.fft.rfftfreq(n, device=like.device, dtype=like.dtype)
    return frequencies


def _ramped(images: Float[Tensor, "b n n"], phase: Float[Tensor, "b #n half"]) -> Float[Tensor, "b n n"]:
    """Rows whose Fourier coefficients are turned by phases."""
    spectrum = torch.fft.rfft(images) * torch.polar(torch.ones_like(phase), phase)
    moved: Tensor = torch.fft.irfft(spectrum, n=images.shape[-1])
    return moved


def _sheared(images: Float[Tensor, "b n n"], slant: Float[Tensor, "b"]) -> Float[Tensor, "b n n"]:
    """J(x, y) = I(x + slant y, y)."""
    n = images.shape[-1]
    y = torch.arange(n, device=images.device, dtype=images.dtype) - n // 2
    return _ramped(images, 2.0 * math.pi * _frequencies(n, images) * (slant[:, None] * y)[..., None])


def _mirrored(images: Float[Tensor, "b n n"], axis: int) -> Float[Tensor, "b n n"]:
    """Row or column -x in the place of x, zero staying at N//2."""
    return images.flip(axis).roll(1, axis)


def composed(
    psi_rad: Float[Tensor, "b"],
    origin_px: Float[Tensor, "b 2"],
    then_psi_rad: Float[Tensor, "b"],
    then_origin_px: Float[Tensor, "b 2"],
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b 2"]]:
    """The one pose, psi and origin, of particles brought into one frame and from there into another."""
    back = (then_origin_px[:, None] @ rotation_matrix(psi_rad))[:, 0]
    return psi_rad + then_psi_rad, origin_px + back
