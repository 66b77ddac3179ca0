"""All data that the report shows, as plain arrays and strings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryo_svae.particles.close_picks import ClosePicks
from cryo_svae.results.auto_selection import objections

Reals = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class ClassAverages:
    """CTF-corrected averages of k classes, in the order of ``ReportData.decoded``.

    image:               (k, m, m).
    frequency_per_angst: (s,) of the shells, in 1/Å.
    frc:                 (k, s) between the two half-sets of each class; NaN where there is none.
    resolution_angst:    (k,) where the FRC falls below 0.143; NaN where it cannot be told.
    resolution_05_angst: (k,) where it falls below 0.5.
    """

    image: Reals
    frequency_per_angst: Reals
    frc: Reals
    resolution_angst: Reals
    resolution_05_angst: Reals


@dataclass(frozen=True, kw_only=True)
class Traversal:
    """Decoded images (s, m, m) at s values of one direction in the latent space, e.g. ``z1``."""

    label: str
    values: Reals
    image: Reals


@dataclass(frozen=True, kw_only=True)
class Manifold:
    """Decoded images over two directions of the latent space; one row where there is one dimension.

    image: (rows, columns, m, m); across: (columns,) and up: (rows,) in any order, along these directions.
    names: of the two, e.g. ("z1", "z2").
    """

    image: Reals
    across: Reals
    up: Reals
    names: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Particles beside their reconstructions in the same pose, both (e, m, m); number is 1-based (e,)."""

    number: Integers
    image: Reals
    reconstruction: Reals


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Means per particle in nats at the end of each epoch, all (epochs,); held_out_elbo may be NaN."""

    epoch: Reals
    elbo: Reals
    held_out_elbo: Reals
    kl_z: Reals
    kl_pose: Reals


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page of a job with n particles, d latent dimensions and k classes.

    Per particle, in input order, degrees and Å, RELION's convention: z, z_std (n, d); psi_deg,
    figure_of_merit, class_number (1-based), usable (n,); origin_angst (n, 2) as (x, y);
    defocus_angst (n,), the mean of U and V; micrograph_number (n,), 0-based into micrograph_names.

    title, particles_file, program: names to show; any text is safe.
    job:               the job folder as the user would type it, for the commands shown.
    decoded:           (k, m, m) the generator's images at the class centres.
    class_centre:      (k, d) these centres in z.
    close_picks:       particles that lie close to another in their micrograph, where places are known.
    contrast_score:    standard errors by which the middle of particles is brighter than the rest.
    inverted:          --invert was given.
    ctf_used:          the model has the CTF in it.
    pose_found:        False for an engine without pose (vanilla): its angles are all zero.
    shift_prior_angst: standard deviation of the shifts' prior on each axis.
    max_shift_angst:   largest shift searched, where the engine has such a limit.
    files:             names in the job folder, for the table of outputs.
    """

    title: str
    particles_file: str
    job: str
    program: str
    engine: str
    box_px: int
    pixel_size_angst: float

    z: Reals
    z_std: Reals
    psi_deg: Reals
    origin_angst: Reals
    figure_of_merit: Reals
    class_number: Integers
    usable: NDArray[np.bool_]
    defocus_angst: Reals | None = None
    micrograph_number: Integers | None = None
    micrograph_names: tuple[str, ...] = ()

    decoded: Reals
    class_centre: Reals | None = None
    averages: ClassAverages | None = None
    traversals: tuple[Traversal, ...] = ()
    manifold: Manifold | None = None
    examples: Examples | None = None
    learning: LearningCurve | None = None

    close_picks: ClosePicks | None = None
    contrast_score: float | None = None
    inverted: bool = False
    ctf_used: bool = False
    pose_found: bool = True
    shift_prior_angst: float | None = None
    max_shift_angst: float | None = None
    files: tuple[str, ...] = ()

    @property
    def n_particles(self) -> int:
        """All particles, unusable ones too."""
        return len(self.usable)

    @property
    def z_dim(self) -> int:
        """Latent dimensions."""
        return int(self.z.shape[1])

    @property
    def n_classes(self) -> int:
        """Classes, empty ones too."""
        return len(self.decoded)

    @cached_property
    def class_sizes(self) -> Integers:
        """Usable particles of each class (k,)."""
        return np.bincount(self.class_number[self.usable] - 1, minlength=self.n_classes)

    @cached_property
    def class_merits(self) -> Reals:
        """Mean figure of merit of the usable particles of each class (k,); NaN for empty ones."""
        weight = self.figure_of_merit[self.usable].astype(np.float64)
        total = np.bincount(self.class_number[self.usable] - 1, weights=weight, minlength=self.n_classes)
        sizes = self.class_sizes
        return np.where(sizes > 0, total / np.maximum(sizes, 1), np.nan)

    @cached_property
    def class_objections(self) -> list[str]:
        """Why each class had better be left out, empty for those worth keeping; [] without averages."""
        if self.averages is None:
            return []
        return objections(self.class_sizes, self.class_merits, self.averages.resolution_05_angst)
