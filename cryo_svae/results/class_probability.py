"""How likely a particle is to be of each class of z, given how well its own z is known.

Classes are taken as a mixture of Gaussians with the centres, shares and spreads of the classes of
k-means. What an image says of z is its posterior N(z, z_std²) without the prior N(0, I) that every
engine has: a Gaussian of variance v = z_std² / (1 - z_std²) around z / (1 - z_std²). So

    p(class k | image) ~ share_k N(z / (1 - z_std²); centre_k, spread_k + v).

The mixture is not fitted further: where z varies without gaps, EM lets a few classes swallow the rest
(of twenty classes of views of a molecule two took 64 % of the particles).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Integers = NDArray[np.intp]

AT_ONCE = 16_384  # particles; each takes several numbers of each class
LEAST_STD, MOST_STD = 1e-3, 1.0 - 1e-6  # of z: beyond them nothing changes but digits are lost


@dataclass(frozen=True)
class Mixture:
    """k classes in d dimensions of z.

    centre: (k, d).
    share:  (k,) of the particles, above 0, sums to 1.
    spread: (k, d) variance of z in the class along each dimension.
    """

    centre: Reals
    share: Reals
    spread: Reals

    def __getitem__(self, some: NDArray[np.bool_]) -> Mixture:
        return Mixture(self.centre[some], self.share[some] / self.share[some].sum(), self.spread[some])


def mixture_of(z: Reals, number: Integers, centre: Reals) -> Mixture:
    """The mixture of classes of which particles z (n, d) are members; ``number`` (n,) counts from 0.

    Each class is given one more member that varies as all members do, so that one of few members, or
    of none, has a spread and a share too.
    """
    k = len(centre)
    square = (z - centre[number]) ** 2
    pooled = square.mean(0) if len(z) else np.ones(z.shape[1])
    counts = np.bincount(number, minlength=k) + 1.0
    sums = [np.bincount(number, weights=each, minlength=k) for each in square.T]
    spread = (np.column_stack(sums) + pooled) / counts[:, None]
    return Mixture(centre, counts / counts.sum(), spread)


def most_likely(mixture: Mixture, z: Reals, z_std: Reals) -> tuple[Integers, Reals]:
    """The likeliest class (n,) of particles, from 0, and its probability; z and z_std are (n, d)."""
    number, probability = np.empty(len(z), dtype=np.intp), np.empty(len(z))
    for start in range(0, len(z), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        chance = probabilities(mixture, z[some], z_std[some])
        number[some], probability[some] = chance.argmax(1), chance.max(1)
    return number, probability


def probabilities(mixture: Mixture, z: Reals, z_std: Reals) -> Reals:
    """The probability of each class (n, k); rows sum to 1."""
    std = z_std.clip(LEAST_STD, MOST_STD)
    unexplained = 1.0 - std**2
    seen, variance = z / unexplained, std**2 / unexplained
    log_chance = np.tile(np.log(mixture.share), (len(z), 1))
    for axis in range(z.shape[1]):
        width = mixture.spread[:, axis] + variance[:, axis, None]
        away = seen[:, axis, None] - mixture.centre[:, axis]
        log_chance -= 0.5 * (np.log(width) + away**2 / width)
    chance = np.exp(log_chance - log_chance.max(1, keepdims=True))
    return np.asarray(chance / chance.sum(1, keepdims=True))
