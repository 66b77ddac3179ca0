"""Straight lines through the latent space, along its axes and along the principal axes of z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.floating[Any]]

STEPS = 11
PERCENT = (2, 98)  # of the particles, between which images are decoded
PRINCIPAL_AXES_SHOWN = 3


@dataclass(frozen=True)
class PrincipalAxes:
    """Principal axes of z, the one of largest variance first.

    mean: (d,); direction: (d, d), a unit vector a column, its largest component positive;
    share: (d,) of the variance.
    """

    mean: Reals
    direction: Reals
    share: Reals


@dataclass(frozen=True)
class Line:
    """A line through the mean of z.

    place: (n,) where each particle projects onto it: its own z on a latent axis, its distance from
           the mean on a principal axis.
    step:  (s,) places at the 2nd to 98th percentiles of the usable particles.
    point: (s, d) the same in the latent space.
    """

    place: NDArray[np.float64]
    step: NDArray[np.float64]
    point: NDArray[np.float64]


def principal_axes(z: Reals) -> PrincipalAxes:
    """Principal axes of z (n, d); without spread, the latent axes and shares of 0."""
    doubles = z.astype(np.float64)
    n, d = doubles.shape
    if n < 2 or d == 0:
        return PrincipalAxes(doubles.mean(0) if n else np.zeros(d), np.eye(d), np.zeros(d))
    mean = doubles.mean(0)
    variance, axes = np.linalg.eigh((doubles - mean).T @ (doubles - mean) / n)
    variance, axes = np.maximum(variance[::-1], 0.0), axes[:, ::-1]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(d)] < 0, -1.0, 1.0)
    return PrincipalAxes(mean, axes, variance / max(float(variance.sum()), 1e-300))


def line_names(z_dim: int) -> list[str]:
    """The lines that a job shows: every latent axis; of two or more, up to three principal ones too."""
    shown = min(z_dim, PRINCIPAL_AXES_SHOWN) if z_dim > 1 else 0
    return [f"z{k + 1}" for k in range(z_dim)] + [f"pc{k + 1}" for k in range(shown)]


def line(z: Reals, usable: NDArray[np.bool_], name: str, n_steps: int = STEPS) -> Line:
    """The line ``z1`` … ``zd`` or ``pc1`` … ``pcd`` through z (n, d), of which one is usable at least."""
    axes = principal_axes(z[usable])
    number = int(name.lstrip("zpc")) - 1
    if name.startswith("pc"):
        direction, zero = axes.direction[:, number], axes.mean
    else:
        direction, zero = np.eye(z.shape[1])[number], np.zeros(z.shape[1])
    place = (z.astype(np.float64) - zero) @ direction
    step = np.percentile(place[usable], np.linspace(*PERCENT, n_steps))
    point = axes.mean + np.outer(step - (axes.mean - zero) @ direction, direction)
    return Line(place=place, step=step, point=point)
