"""Picks that lie closer together in their micrograph than particles do: one particle, picked twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cryo_svae.particles.particle_set import ParticleColumns, ParticleSet

CLOSE = 0.25  # of the diameter of the circle that holds a particle
SHARE_THAT_MATTERS = 0.01
PLACE = ("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY")


@dataclass(frozen=True)
class ClosePicks:
    """How many of n particles have another within a distance in their micrograph.

    distance_px: the same distance in pixels of rlnCoordinateX, as ``select --min-distance`` takes it.
    """

    count: int
    n_particles: int
    distance_angst: float
    distance_px: float

    def __str__(self) -> str:
        share = f"{self.count / self.n_particles:.1%}"
        return f"{self.count:,} particles ({share}) lie within {self.distance_angst:.0f} Å of another"

    def doubts(self) -> list[str]:
        """What they probably are and what to do, where they are more than chance brings together."""
        if self.count <= SHARE_THAT_MATTERS * self.n_particles:
            return []
        return [
            f"Picked twice? {self}. They count twice, and in both half-sets, which makes resolutions look "
            f"better: after a run, cryo-svae select --min-distance {self.distance_px:.0f} keeps one of each"
        ]


def close_picks(particles: ParticleSet, diameter_angst: float) -> ClosePicks | None:
    """Particles nearer to another than a quarter of their diameter; None where places are not known.

    Pixels of micrographs are as large as the file says (rlnMicrographPixelSize); where it does not, as
    those of the images, which are no smaller, so that no two picks are called close for want of that.
    """
    from scipy.spatial import cKDTree  # costs a tenth of a second

    block = particles.block
    if not all(block.has(label) for label in PLACE):
        return None
    columns = ParticleColumns(particles.star, block, particles.star.block("optics"))
    size_angst = columns.get("rlnMicrographPixelSize")
    if size_angst is None:
        size_angst = particles.pixel_size_angst
    place = np.column_stack([block.numbers(label) * size_angst for label in PLACE[1:]])
    _, micrograph = np.unique(block.text(PLACE[0]), return_inverse=True)
    distance = CLOSE * diameter_angst
    known = np.isfinite(place).all(1)
    apart = np.column_stack([place, 2.0 * distance * micrograph])[known]
    nearest = cKDTree(apart).query(apart, k=2, distance_upper_bound=distance)[0][:, 1]
    return ClosePicks(
        count=int(np.isfinite(nearest).sum()),
        n_particles=len(particles),
        distance_angst=distance,
        distance_px=distance / float(np.median(size_angst)),
    )
