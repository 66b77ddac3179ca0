"""Picks that lie closer together in their micrograph than particles do: one particle, picked twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryo_svae.particles.particle_set import ParticleColumns, ParticleSet

CLOSE = 0.25  # of the diameter of the circle that holds a particle
SHARE_THAT_MATTERS = 0.01
Reals = NDArray[np.float64]

ORIGINAL = "rlnMicrographOriginalPixelSize"
PLACE = ("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY")


@dataclass(frozen=True, kw_only=True)
class ClosePicks:
    """How many of n particles have another within a distance in their micrograph.

    option: the same distance as ``select --min-distance`` takes it.
    note:   what the count leaves open, as the micrographs' pixel size is not in the file; or nothing.
    """

    count: int
    n_particles: int
    distance_angst: float
    option: str
    note: str = ""

    def __str__(self) -> str:
        share = f"{self.count / self.n_particles:.1%}"
        near = f"{self.count:,} particles ({share}) lie within {self.distance_angst:.0f} Å of another"
        return near + (f" ({self.note})" if self.note else "")

    def doubts(self) -> list[str]:
        """What they probably are and what to do, where they are more than chance brings together."""
        if self.count <= SHARE_THAT_MATTERS * self.n_particles:
            return []
        return [
            f"Picked twice? {self}. They count twice, and in both half-sets, which makes resolutions look "
            f"better: after a run, cryo-svae select --min-distance {self.option} keeps one of each"
        ]


def micrograph_pixel_sizes(columns: ParticleColumns) -> Reals | None:
    """Sizes (n,) in Å of the pixels that places are counted in; None where the file holds none.

    RELION's extraction leaves only that of the movies, which differs where those were binned.
    """
    size_angst = columns.get("rlnMicrographPixelSize")
    return columns.get(ORIGINAL) if size_angst is None else size_angst


def close_picks(particles: ParticleSet, diameter_angst: float) -> ClosePicks | None:
    """Particles nearer to another than a quarter of their diameter; None where places are not known.

    Where the file does not say how large pixels of micrographs are, they are as large as those of the
    images, which are no smaller: the count is then the least that there are, and says so.
    """
    from scipy.spatial import cKDTree  # costs a tenth of a second

    block = particles.block
    if not all(block.has(label) for label in PLACE):
        return None
    columns = ParticleColumns(particles.star, block, particles.star.block("optics"))
    size_angst = micrograph_pixel_sizes(columns)
    place = np.column_stack([block.numbers(label) for label in PLACE[1:]])
    place *= (particles.pixel_size_angst if size_angst is None else size_angst)[:, None]
    _, micrograph = np.unique(block.text(PLACE[0]), return_inverse=True)
    distance = CLOSE * diameter_angst
    known = np.isfinite(place).all(1)
    apart = np.column_stack([place, 2.0 * distance * micrograph])[known]
    nearest = cKDTree(apart).query(apart, k=2, distance_upper_bound=distance)[0][:, 1]
    option = f"{distance:.0f}"
    if size_angst is None:
        option = f"{distance / float(np.median(particles.pixel_size_angst)):.0f}px"
    return ClosePicks(
        count=int(np.isfinite(nearest).sum()),
        n_particles=len(particles),
        distance_angst=distance,
        option=option,
        note=_note(columns, size_angst, particles.pixel_size_angst),
    )


def _note(columns: ParticleColumns, size_angst: Reals | None, image_angst: Reals) -> str:
    if size_angst is None:
        return (
            "or more: without rlnMicrographPixelSize in the file, micrographs are taken to be binned "
            "like the images"
        )
    if columns.has("rlnMicrographPixelSize") or np.allclose(size_angst, image_angst):
        return ""
    return f"by {ORIGINAL}, fewer where movies were binned"
