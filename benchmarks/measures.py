"""How well estimates agree with a simulation's truth; numpy arrays, radians and pixels in.

A model's frame is its own: one global turn and one constant offset (which turns with psi) are
taken off before anything is called an error.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree

from cryo_svae.imaging.geometry import degrees, radians, wrap_radians
from cryo_svae.simulate import view_rotation

Array = NDArray[np.float64]


def r_z(z: Array, conformation: Array) -> float:
    """Correlation of latents (n,) or (n, d) with one true conformation (n,).

    |Pearson| for a single latent; for several, the multiple correlation: |Pearson| between the
    conformation and its best linear prediction from all of them.
    """
    design = np.column_stack([np.ones(len(conformation)), z])
    predicted = design @ np.linalg.lstsq(design, conformation, rcond=None)[0]
    if np.ptp(predicted) < 1e-12 * max(1.0, np.ptp(conformation)):
        return 0.0
    return float(abs(np.corrcoef(predicted, conformation)[0, 1]))


def circular_correlation(psi_rad: Array, true_psi_rad: Array) -> float:
    """Circular correlation of angles (n,): 1 when equal up to one turn, about 0 when unrelated.

    The signed root of Fisher & Lee's coefficient (Biometrika 70, 1983), which compares all pairs of
    angles. For uniform angles it is |mean e^{i(a - b)}|, the value that Jammalamadaka's
    sum sin(a - a0) sin(b - b0) / … has where the mean directions a0 and b0 are right: of uniform
    angles they are not defined, and their estimates scatter that sum by ±0.1 at any n. The sign is
    that of agreement: angles that run backwards score -1.
    """
    a, b = np.exp(1j * psi_rad), np.exp(1j * true_psi_rad)
    numerator = _resultant2(a * b.conj()) - _resultant2(a * b)
    spread = (1.0 - _resultant2(a**2)) * (1.0 - _resultant2(b**2))
    if spread < 1e-12:  # angles without spread correlate with nothing
        return 0.0
    coefficient = numerator / np.sqrt(spread)
    return float(np.sign(coefficient) * np.sqrt(abs(coefficient)))


def _resultant2(unit: NDArray[np.complex128]) -> float:
    return float(abs(np.mean(unit)) ** 2)


def angle_error_deg(psi_rad: Array, true_psi_rad: Array) -> float:
    """Median absolute error in degrees of angles (n,) after one global turn is taken off."""
    error = psi_rad - true_psi_rad
    offset = np.angle(np.mean(np.exp(1j * error)))
    return float(np.median(np.abs(degrees(wrap_radians(error - offset)))))


def shift_rms_px(origin_px: Array, true_origin_px: Array, psi_rad: Array) -> float:
    """Root mean square length in px of the error of origins (n, 2), the frame's offset taken off.

    A frame displaced by c gives o = o_true + R(-psi) c with the model's own psi; c is fitted. For
    scale: an estimate of zero scores sqrt(2) times the standard deviation of each component.
    """
    cos, sin = np.cos(psi_rad), np.sin(psi_rad)
    error = origin_px - true_origin_px
    turned = np.stack([cos * error[:, 0] - sin * error[:, 1], sin * error[:, 0] + cos * error[:, 1]], 1)
    return float(np.sqrt(np.mean(np.sum((turned - turned.mean(0)) ** 2, 1))))


def like_view_errors_deg(
    psi_rad: Array, true_psi_rad: Array, view_rad: Array, within_deg: float = 8.0
) -> Array:
    """Errors in degrees of the relative in-plane angle of all pairs of like views.

    view_rad: true rot and tilt (n, 2). A pair is like where viewing directions differ by less than
    within_deg; its true relative angle is the in-plane turn that best brings one view's reference
    frame onto the other's, so that poles and any smooth gauge of the model cost nothing.
    """
    rotation = view_rotation(torch.from_numpy(np.asarray(view_rad, dtype=np.float64))).numpy()
    chord = 2.0 * np.sin(radians(within_deg) / 2.0)
    i, j = KDTree(rotation[:, 2]).query_pairs(chord, output_type="ndarray").T
    between = np.einsum("pac,pbc->pab", rotation[i, :2], rotation[j, :2])
    turn = np.arctan2(between[:, 1, 0] - between[:, 0, 1], between[:, 0, 0] + between[:, 1, 1])
    own = psi_rad - true_psi_rad
    return np.abs(degrees(wrap_radians(own[i] - own[j] + turn)))


def like_view_error_deg(
    psi_rad: Array, true_psi_rad: Array, view_rad: Array, within_deg: float = 8.0
) -> float:
    """Their median."""
    return float(np.median(like_view_errors_deg(psi_rad, true_psi_rad, view_rad, within_deg)))


def neighbour_view_deg(z: Array, direction: Array) -> float:
    """Median angle in degrees between the true views (n, 3) of nearest neighbours in z (n, d)."""
    nearest = KDTree(z).query(z, k=2)[1][:, 1]
    cosine = np.sum(direction * direction[nearest], axis=1)
    return float(np.median(degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))))
