"""The classes.star of a finished job: its classes, and which of them are worth keeping by their numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.star import StarBlock, read_star
from cryo_svae.results.auto_selection import objections, ranges

Reals = NDArray[np.float64]

CLASSES = "classes.star"
NO_RESOLUTION_ANGST = 999.0  # what RELION writes for none; it would read nan as 0


@dataclass(frozen=True)
class JobClasses:
    """What a job's classes.star says of its k classes; NaN for no resolution.

    resolution_angst, resolution_05_angst: (k,) at a half-set FRC of 0.143, and of 0.5.
    """

    n_particles: NDArray[np.int64]
    figure_of_merit: Reals
    resolution_angst: Reals
    resolution_05_angst: Reals

    def __len__(self) -> int:
        return len(self.n_particles)


def _classes_of(job: Path) -> StarBlock:
    path = job / CLASSES
    if not path.is_file():
        raise InputError(
            job,
            found=f"no {CLASSES}",
            expected="the folder of a finished job",
            remedy="name the --out folder of cryo-svae run or estimate.",
        )
    star = read_star(path)
    return star.block("classes") or star.blocks[0]


def read_classes(job: Path) -> JobClasses:
    """A job's classes."""
    block = _classes_of(job)

    def resolution(label: str) -> Reals:
        angst = block.numbers(label)
        return np.where(angst < NO_RESOLUTION_ANGST, angst, np.nan)

    return JobClasses(
        n_particles=block.integers("svaeNrParticles"),
        figure_of_merit=block.numbers("svaeMeanFigureOfMerit"),
        resolution_angst=resolution("rlnEstimatedResolution"),
        resolution_05_angst=resolution("svaeResolution05Angst"),
    )


def class_centres(job: Path) -> Reals:
    """Centres (k, d) of a job's classes in z."""
    block = _classes_of(job)
    z_dim = sum(bool(re.fullmatch(r"svaeZ\d+", label)) for label in block.labels)
    return np.column_stack([block.numbers(f"svaeZ{k}") for k in range(1, max(1, z_dim) + 1)])


def propose(job: Path) -> tuple[str, list[str]]:
    """The classes worth keeping, as e.g. ``1-4,7``, and a line on each class that says why or why not.

    InputError, with these lines, where it is none.
    """
    classes = read_classes(job)
    reasons = objections(classes.n_particles, classes.figure_of_merit, classes.resolution_05_angst)
    lines = []
    for k, reason in enumerate(reasons):
        angst = classes.resolution_05_angst[k]
        said = "no resolution" if np.isnan(angst) else f"{angst:.1f} Å"
        merit = round(classes.figure_of_merit[k], 2) + 0.0  # not -0.00
        lines.append(
            f"class {k + 1:2d}  {classes.n_particles[k]:7,} particles  merit {merit:5.2f}  {said:>13}  "
            f"{'left out: ' + reason if reason else 'taken'}"
        )
    text = ranges([number for number, reason in enumerate(reasons, start=1) if not reason])
    if not text:
        raise InputError(
            "--auto",
            found="no class that its numbers speak for:\n    " + "\n    ".join(lines) + "\n   ",
            expected="one or more",
            remedy="look at report.html, and name classes by --classes.",
        )
    said = f"--auto takes the classes {text}; look at them in report.html, or name others by --classes"
    return text, [*lines, said]
