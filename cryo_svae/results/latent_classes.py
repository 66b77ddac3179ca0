"""Classes of z, and images decoded from the latent space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.results.class_probability import mixture_of, most_likely

PARTICLES_A_CLASS = 100
MOST_CLASSES = 50
MOST_FOR_CENTRES = 25_000  # particles that centres are found from; k-means++ takes k numbers of each


@dataclass(frozen=True)
class Classes:
    """Classes of z, largest first; every one has particles, unless there are none at all.

    centre:       (k, d).
    class_number: (n,) the likeliest class of each, 1-based; for unusable particles any.
    probability:  (n,) of that class; 0 for unusable particles.
    n_particles:  (k,) usable particles of each.
    """

    centre: NDArray[np.float64]
    class_number: NDArray[np.intp]
    probability: NDArray[np.float64]
    n_particles: NDArray[np.intp]


def default_classes(n_particles: int) -> int:
    """The default number of classes: one for every hundred particles, but 50 at most."""
    return max(1, min(MOST_CLASSES, n_particles // PARTICLES_A_CLASS))


def classify(table: EstimateTable, n_classes: int, seed: int) -> Classes:
    """k-means (k-means++ start) on the z of usable particles, and the likeliest class of each particle.

    With more than 25,000 particles the centres are found from 25,000 of them, drawn at random. There are
    fewer classes than asked for where there are too few different z, and where z is known so badly that
    a class is no particle's likeliest one.
    """
    from scipy.cluster.vq import kmeans2  # a quarter of a second, for those who classify

    random = np.random.default_rng(seed)
    rows = np.flatnonzero(table.usable)
    if len(rows) > MOST_FOR_CENTRES:
        rows = np.sort(random.choice(rows, MOST_FOR_CENTRES, replace=False))
    z = table.z[rows]
    distinct = np.unique(z, axis=0)
    k = min(n_classes, len(distinct))
    if k <= 1:
        centre = z.mean(0, keepdims=True) if len(z) else np.zeros((1, table.z.shape[1]))
    else:
        centre, _ = kmeans2(z, k, iter=50, minit="++", missing="warn", rng=random)
    mixture = mixture_of(z, _nearest(z, centre), centre)
    std = np.where(table.usable[:, None], table.z_std, 1.0)
    number, probability = most_likely(mixture, table.z, std)
    counts = np.bincount(number[table.usable], minlength=len(centre))
    if counts.any() and not counts.all():
        mixture = mixture[counts > 0]
        number, probability = most_likely(mixture, table.z, std)
        counts = np.bincount(number[table.usable], minlength=len(mixture.centre))
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Classes(
        centre=mixture.centre[order],
        class_number=rank[number] + 1,
        probability=np.where(table.usable, probability, 0.0),
        n_particles=counts[order],
    )


def _nearest(z: NDArray[np.float64], centre: NDArray[np.float64]) -> NDArray[np.intp]:
    number = np.empty(len(z), dtype=np.intp)
    for start in range(0, len(z), 65536):
        part = z[start : start + 65536]
        squares = (part**2).sum(1)[:, None] - 2.0 * part @ centre.T + (centre**2).sum(1)
        number[start : start + 65536] = squares.argmin(1)
    return number


def decode(checkpoint: Checkpoint, z: NDArray[np.float64], device: torch.device) -> Float[Tensor, "k n n"]:
    """The generator's images at z (k, d), pose zero, white particle, without CTF."""
    engine = checkpoint.engine.to(device).eval()
    with torch.no_grad():
        points = torch.from_numpy(np.ascontiguousarray(z)).float().to(device)
        return torch.cat([engine.decode(points[i : i + 16]).cpu() for i in range(0, len(points), 16)])
