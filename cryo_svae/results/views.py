"""Views: groups of classes that lie side by side in z, by which one sees how evenly a molecule was seen.

Groups are alike in extent and not in number of particles, for these are what is to be compared. Mirror
views are as far apart in z as others, and so are groups of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryo_svae.results.auto_selection import ranges

Reals = NDArray[np.float64]
Rows = NDArray[np.intp]

MOST_VIEWS = 10
RARE = 0.2  # of an even share: fewer is rare
DOMINANT = 0.5  # of all particles: more is dominant


def views_of(centre: NDArray[np.floating]) -> Rows:
    """The view of each class (k,), numbered from 0 as classes come, of their centres (k, d) in z."""
    from scipy.cluster.hierarchy import fcluster, linkage  # costs a tenth of a second

    if len(centre) < 2:
        return np.zeros(len(centre), dtype=np.intp)
    number = fcluster(linkage(centre, "complete"), MOST_VIEWS, "maxclust")
    _, first, place = np.unique(number, return_index=True, return_inverse=True)
    rank: Rows = np.argsort(np.argsort(first))[place.reshape(-1)]
    return rank


@dataclass(frozen=True)
class Views:
    """The views of a job: the classes (numbers from 1) and the particles of each."""

    classes: tuple[str, ...]
    sizes: NDArray[np.int64]

    @property
    def shares(self) -> Reals:
        """Of all particles."""
        shares: Reals = self.sizes / max(1, int(self.sizes.sum()))
        return shares

    def doubts(self) -> list[str]:
        """Views that are rare among the others, and one that holds most particles."""
        n = len(self.sizes)
        found = []
        for classes, share in zip(self.classes, self.shares, strict=True):
            if n > 2 and share > DOMINANT:
                found.append(
                    f"One view (class {classes}) holds {share:.0%} of the particles: cryo-svae select "
                    "--balance or --at-most-per-view evens views out."
                )
        rare = [each for each, share in zip(self.classes, self.shares, strict=True) if share < RARE / n]
        if rare:
            listed = "; ".join(rare[:4]) + ("; …" if len(rare) > 4 else "")
            found.append(
                f"{len(rare)} of {n} views (class {listed}) hold less than a fifth of an even share: "
                "look before discarding them, where directions are preferred."
            )
        return found


def views_with_sizes(centre: NDArray[np.floating], sizes: NDArray[np.integer]) -> Views:
    """Views of classes with these centres (k, d) and numbers of particles (k,)."""
    view = views_of(centre)
    numbers = [np.flatnonzero(view == each) + 1 for each in range(int(view.max(initial=-1)) + 1)]
    return Views(
        tuple(ranges(each.tolist()) for each in numbers),
        np.array([int(sizes[each - 1].sum()) for each in numbers], dtype=np.int64),
    )


def evened(view: Rows, merit: Reals, kept: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """The kept particles, but of each view (n,) at most so many: those of the highest merit."""
    rows = np.flatnonzero(kept)
    rows = rows[np.lexsort((-merit[rows], view[rows]))]
    _, start, size = np.unique(view[rows], return_index=True, return_counts=True)
    rank = np.arange(len(rows)) - np.repeat(start, size)
    chosen = np.zeros_like(kept)
    chosen[rows[rank < most]] = True
    return chosen


def most_by_balance(sizes: NDArray[np.integer], balance: float) -> int:
    """The most particles of a view, from its largest (balance 0) to its smallest (1), in equal ratios."""
    filled = sizes[sizes > 0]
    if not len(filled):
        return 0
    largest, smallest = float(filled.max()), float(filled.min())
    return round(math.exp((1.0 - balance) * math.log(largest) + balance * math.log(smallest)))
