"""Which classes seem worth keeping, by their sizes, figures of merit and resolutions.

Classes of noise are left out. A contaminant that aligns well makes a class that is good by all of these
numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

FEWEST_PARTICLES = 20  # of fewer an average is mostly noise
USUAL = 0.75  # quantile of the particles by their class's merit, where up to half of them are junk
MERIT_SHARE = 0.5  # of the usual figure of merit, at least
RESOLUTION_FACTOR = 1.5  # of the median resolution, at most


def objections(n_particles: Integers, figure_of_merit: Reals, resolution_angst: Reals) -> list[str]:
    """Reasons to leave out each of k classes; no reason for those worth keeping.

    figure_of_merit:  (k,) means of the members; NaN for an empty class.
    resolution_angst: (k,) at a half-set FRC of 0.5 (0.143 is crossed late by chance); NaN for none.
    """
    merit = np.nan_to_num(figure_of_merit.astype(np.float64))
    usual = _quantile(merit, n_particles, USUAL)
    seen = (merit >= MERIT_SHARE * usual) & (merit > 0) & np.isfinite(resolution_angst)
    median = _quantile(resolution_angst[seen].astype(np.float64), n_particles[seen], 0.5)
    found = []
    for n, its_merit, angst in zip(n_particles.tolist(), merit, resolution_angst, strict=True):
        if n < FEWEST_PARTICLES:
            found.append(f"{n} particles, fewer than {FEWEST_PARTICLES}")
        elif its_merit <= 0 or its_merit < MERIT_SHARE * usual:
            found.append(f"merit {round(its_merit, 2) + 0.0:.2f}, below half of {usual:.2f}")
        elif np.isnan(angst):
            found.append("no resolution at an FRC of 0.5")
        elif angst > RESOLUTION_FACTOR * median:
            found.append(
                f"{angst:.1f} Å at an FRC of 0.5, above {RESOLUTION_FACTOR:g} times {median:.1f} Å"
            )
        else:
            found.append("")
    return found


def _quantile(values: NDArray[np.float64], weight: Integers, share: float) -> float:
    """The least of the values that a share of the weight does not exceed; 0 where there are none."""
    if not weight.sum():
        return 0.0
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(below, share * below[-1])])


def ranges(numbers: list[int]) -> str:
    """Whole numbers in rising order as e.g. 1-4,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
