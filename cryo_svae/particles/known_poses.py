"""Poses that a particle file holds, undone in its images before an engine sees them.

What an engine finds is then what is left, about psi 0 and origin 0, and is put behind the known pose.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae.errors import InputError
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.particles.particle_set import ParticleColumns, ParticleSet
from cryo_svae.particles.preprocessing import Preparation

FARTHEST = 0.5  # of the box: an origin farther out leaves no particle in it


@dataclass(frozen=True)
class KnownPoses:
    """psi (n,) and origins (n, 2) in working pixels, of all particles of a set."""

    psi_rad: Float[Tensor, "n"]
    origin_px: Float[Tensor, "n 2"]

    def undone(self, images: Float[Tensor, "b m m"], row: Int[Tensor, "b"]) -> Float[Tensor, "b m m"]:
        """Images of these rows in the frame that their poses belong to."""
        psi, origin = (each[row].to(images) for each in (self.psi_rad, self.origin_px))
        return geometry.undo_poses(images, psi, origin)

    def turned(self, ctf: CtfTable) -> CtfTable:
        """The CTF of all particles in that frame."""
        return turned_ctf(ctf, self.psi_rad)

    def then(
        self, row: Int[Tensor, "b"], psi_rad: Float[Tensor, "b"], origin_px: Float[Tensor, "b 2"]
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b 2"]]:
        """The whole poses of these rows, of what is left when the known ones are undone."""
        psi, origin = geometry.composed(
            self.psi_rad[row], self.origin_px[row], psi_rad.double(), origin_px.double()
        )
        return geometry.wrap_radians(psi), origin


def turned_ctf(ctf: CtfTable, psi_rad: Float[Tensor, "b"]) -> CtfTable:
    """The CTF parameters of aligned particles: their astigmatism turns with them.

    The aligned spectrum at azimuth a is the particle's at a - psi.
    """
    return dataclasses.replace(ctf, defocus_angle_rad=ctf.defocus_angle_rad + psi_rad)


def known_poses(particles: ParticleSet, preparation: Preparation) -> KnownPoses | None:
    """The file's psi (rlnAnglePsi) and origins, where a preparation undoes them."""
    if preparation.known_pose is None:
        return None
    columns = ParticleColumns(particles.star, particles.block, particles.star.block("optics"))
    psi_deg = columns.of_particles("rlnAnglePsi")
    if psi_deg is None:
        raise InputError(
            particles.star.path,
            column="_rlnAnglePsi" if particles.cs is None else "alignments2D/pose",
            found=f"no known poses, though --pose {preparation.known_pose} builds on them",
            expected="psi (and origins) of each particle, such as a 2-D or 3-D alignment writes",
            remedy="give the particles of such a job, or leave --pose out.",
        )
    origin_angst = np.column_stack([_origin(columns, particles, axis) for axis in "XY"])
    _check_origins(particles, origin_angst)
    return KnownPoses(
        torch.from_numpy(geometry.radians(psi_deg)),
        torch.from_numpy(origin_angst / preparation.pixel_size_angst),
    )


def _origin(columns: ParticleColumns, particles: ParticleSet, axis: str) -> NDArray[np.float64]:
    """In Å; a missing axis is 0 as RELION takes it, and RELION 3.0's is in pixels."""
    angst = columns.of_particles(f"rlnOrigin{axis}Angst")
    if angst is not None:
        return angst
    px = columns.of_particles(f"rlnOrigin{axis}")
    return np.zeros(len(particles)) if px is None else px * particles.pixel_size_angst


def _check_origins(particles: ParticleSet, origin_angst: NDArray[np.float64]) -> None:
    far = np.abs(origin_angst).max(1) > FARTHEST * particles.box_px * particles.pixel_size_angst
    rows = np.flatnonzero(far)
    if len(rows):
        raise InputError(
            particles.star.path,
            line=particles.block.line_of(int(rows[0])) if particles.cs is None else None,
            column="_rlnOriginXAngst" if particles.cs is None else "alignments2D/shift",
            found=f"an origin of {np.abs(origin_angst[rows[0]]).max():g} Å",
            expected="one within the box",
            remedy="mend it, or extract the particles again, re-centred.",
        )
