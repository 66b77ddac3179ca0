"""What a user should know before trusting a job, in words; arrays in, sentences out.

Each sentence gives its number and what to do. A warning needs an effect that matters and evidence
for it: neither does a million particles make 0.1 % worth a word, nor a hundred make noise a fact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from cryo_svae.imaging import geometry
from cryo_svae.results.auto_selection import FEWEST_PARTICLES

Reals = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

SIGNIFICANCE = 1e-3
KL_OF_NOTHING_NATS = 0.05
MERIT_OF_NOTHING = 0.02
CONTRAST_SCORE = 5.0
R2_THAT_MATTERS = 0.1
CLUSTERING_THAT_MATTERS = 0.15  # |mean exp(ik psi)|; the density then varies by 30 %
HARMONICS = 4
FAR_SHIFT = 2.5  # prior standard deviations
FAR_SHARE = math.exp(-(FAR_SHIFT**2) / 2)  # of a 2-D Gaussian
FAR_EXCESS = 3.0
AT_LIMIT = 0.95
AT_LIMIT_SHARE = 0.1


def kl_of_z(z: Reals, z_std: Reals) -> Reals:
    """KL of each dimension's posteriors to N(0, 1), mean over particles, in nats (d,)."""
    variance = np.maximum(z_std.astype(np.float64), 1e-12) ** 2
    per_particle = 0.5 * (z.astype(np.float64) ** 2 + variance - 1.0 - np.log(variance))
    return np.asarray(per_particle.mean(0))


def no_signal(z: Reals, z_std: Reals, figure_of_merit: Reals) -> list[str]:
    """Latents that say nothing, or reconstructions that resemble nothing."""
    if len(z) == 0:
        return []
    found = []
    kl, merit = float(kl_of_z(z, z_std).sum()), float(np.median(figure_of_merit))
    if kl < KL_OF_NOTHING_NATS:
        found.append(
            f"The latent space is empty: z carries {kl:.3f} nats a particle, so every particle gets the "
            "same image and the classes mean nothing. Train for longer, check the contrast (--invert) "
            "and the particle diameter (--mask-diameter), or accept that the particles do not differ."
        )
    if merit < MERIT_OF_NOTHING:
        found.append(
            f"No signal found: the median figure of merit is {merit:.3f}, so the model explains next to "
            "nothing of the images. Check the contrast (--invert), the CTF and the picks; then train for "
            "longer."
        )
    return found


def wrong_contrast(score: float | None, inverted: bool) -> list[str]:
    """Particles darker than their background, where white ones are expected."""
    if score is None or score > -CONTRAST_SCORE:
        return []
    remedy = "run again with --no-invert" if inverted else "run again with --invert"
    return [
        f"The contrast seems wrong: the middle of the particles is {-score:.0f} standard errors darker "
        f"than their background, and the model expects white particles. If the protein is dark, {remedy}."
    ]


def ctf_missing(ctf_used: bool, has_defocus: bool) -> list[str]:
    """A model without the CTF."""
    if ctf_used:
        return []
    if has_defocus:
        return [
            "The CTF was left out of the model although the input gives it, so defocus mixes with content. "
            "Run again without --no-ctf unless the images are CTF-corrected already."
        ]
    return [
        "The input holds no CTF parameters (0 of 3 defocus columns): images and averages are not "
        "CTF-corrected, and z may follow defocus. Estimate the CTF and extract again, unless the images "
        "are corrected already."
    ]


def shifts_at_limit(
    origin_angst: Reals, prior_std_angst: float | None, max_shift_angst: float | None
) -> list[str]:
    """More particles far from the middle than the shift prior expects, or at the edge of the search."""
    n_particles = len(origin_angst)
    if n_particles == 0:
        return []
    radius = np.hypot(origin_angst[:, 0], origin_angst[:, 1])
    found = []
    if prior_std_angst is not None and prior_std_angst > 0:
        far = int((radius > FAR_SHIFT * prior_std_angst).sum())
        surprise = special.bdtrc(far - 1, n_particles, FAR_SHARE)
        if far > FAR_EXCESS * FAR_SHARE * n_particles and surprise < SIGNIFICANCE:
            found.append(
                f"{far / n_particles:.0%} of the shifts are longer than {FAR_SHIFT * prior_std_angst:.1f} "
                f"Å ({FAR_SHIFT:g} standard deviations of the prior), where {FAR_SHARE:.0%} would be "
                "expected: the prior holds particles back. Raise --shift-std and --max-shift, or centre "
                "the particles."
            )
    if max_shift_angst is not None and max_shift_angst > 0:
        share = float((radius > AT_LIMIT * max_shift_angst).mean())
        if share > AT_LIMIT_SHARE:
            found.append(
                f"{share:.0%} of the shifts end at the limit of the search ({max_shift_angst:.1f} Å): the "
                "true ones may be longer. Raise --max-shift, or centre the particles and extract them "
                "again."
            )
    return found


def regressors(
    psi_deg: Reals | None, origin_angst: Reals | None, defocus_angst: Reals | None
) -> dict[str, Reals]:
    """What z should not follow: name to columns (n, p) of a regression; varying ones alone."""
    columns: dict[str, list[Reals]] = {}
    if psi_deg is not None:
        psi = geometry.radians(psi_deg.astype(np.float64))
        columns["psi"] = [np.cos(psi), np.sin(psi), np.cos(2 * psi), np.sin(2 * psi)]
    if origin_angst is not None:
        x, y = origin_angst.astype(np.float64).T
        columns["shift"] = [x, y, x**2, y**2, x * y]
    if defocus_angst is not None:
        defocus = defocus_angst.astype(np.float64)
        centred = defocus - defocus.mean() if len(defocus) else defocus
        columns["defocus"] = [centred, centred**2]
    tables = {name: np.stack(parts, 1) for name, parts in columns.items()}
    return {name: table for name, table in tables.items() if len(table) and table.std(0).max() > 1e-9}


def explained(z: Reals, columns: Reals) -> Reals:
    """Adjusted R² of the regression of each dimension of z (n, d) on columns (n, p); (d,).

    0 where an F test cannot tell it from chance, and where there are too few particles.
    """
    n, p = columns.shape
    if n < p + 10 or z.shape[1] == 0:
        return np.zeros(z.shape[1])
    spread = columns.std(0)
    design = (columns - columns.mean(0))[:, spread > 1e-9] / spread[spread > 1e-9]
    target = z.astype(np.float64) - z.mean(0)
    basis, weight, _ = np.linalg.svd(design.T @ design / n)
    kept = weight > 1e-9 * weight[0]
    scores = design @ basis[:, kept] / np.sqrt(weight[kept])
    p = int(kept.sum())
    total = np.maximum((target**2).mean(0), 1e-300)
    r2 = np.clip(((scores.T @ target / n) ** 2).sum(0) / total, 0.0, 1.0 - 1e-12)
    by_chance = special.fdtrc(p, n - p - 1, r2 / p / ((1 - r2) / (n - p - 1)))
    adjusted = 1.0 - (1.0 - r2) * (n - 1) / (n - p - 1)
    return np.where(by_chance < SIGNIFICANCE / z.shape[1], np.maximum(adjusted, 0.0), 0.0)


_WHY = {
    "psi": "the in-plane angle leaks into the content, so classes may hold one view at several angles. "
    "Train for longer, or use --engine steerable, which sums angles out.",
    "shift": "the position in the box leaks into the content. Raise --max-shift, centre the particles, or "
    "train for longer.",
    "defocus": "the latent space partly sorts particles by defocus rather than by structure. Model the CTF "
    "(--ctf), and check it.",
}


def dependence(r2: Mapping[str, Reals]) -> list[str]:
    """Dimensions of z that follow psi, shift or defocus; ``r2`` holds R² of each dimension by name."""
    found = []
    for name, values in r2.items():
        axes = [int(axis) for axis in np.argsort(-values) if values[axis] >= R2_THAT_MATTERS]
        if axes:
            listed = ", ".join(f"z{axis + 1} (R² {values[axis]:.2f})" for axis in axes[:5])
            more = f" and {len(axes) - 5} more dimensions" if len(axes) > 5 else ""
            found.append(f"z depends on {name}: {listed}{more}: {_WHY[name]}")
    return found


def clustering(psi_deg: Reals) -> tuple[float, int, float]:
    """Strongest of the resultants |mean exp(ik psi)|, k = 1…4; its k; and the chance of it in flat angles.

    0 for a flat histogram, 1 for a single angle (or k equally spaced ones). Rayleigh's test, with
    Bonferroni's correction for the four harmonics.
    """
    if len(psi_deg) == 0:
        return 0.0, 1, 1.0
    psi = geometry.radians(psi_deg.astype(np.float64))
    orders = range(1, HARMONICS + 1)
    strength = [math.hypot(np.cos(k * psi).mean(), np.sin(k * psi).mean()) for k in orders]
    best = int(np.argmax(strength))
    chance = min(1.0, HARMONICS * math.exp(-len(psi) * strength[best] ** 2))
    return strength[best], best + 1, chance


def preferred_angles(psi_deg: Reals, class_number: Integers, n_classes: int) -> list[str]:
    """In-plane angles that cluster, overall or within classes."""
    advice = (
        "A search that stuck gives this (train for longer, or use --engine steerable); so does a symmetric "
        "particle, where it is harmless, and directional structure in the images (edges, gradients, "
        "overlaps)."
    )
    found = []
    strength, order, chance = clustering(psi_deg)
    if strength >= CLUSTERING_THAT_MATTERS and chance < SIGNIFICANCE:
        found.append(
            f"In-plane angles are not flat over all particles: strength {strength:.2f} (0 flat, 1 all "
            f"alike), {_around(order)}. {advice}"
        )
    uneven: list[tuple[float, int]] = []
    order_of_psi = np.argsort(class_number, kind="stable")
    edges = np.searchsorted(class_number[order_of_psi], np.arange(1, n_classes + 2))
    for number in range(1, n_classes + 1):
        members = order_of_psi[edges[number - 1] : edges[number]]
        strength, _, chance = clustering(psi_deg[members])
        if strength >= CLUSTERING_THAT_MATTERS and chance < SIGNIFICANCE / n_classes:
            uneven.append((strength, number))
    if uneven:
        listed = ", ".join(f"{number} ({s:.2f})" for s, number in sorted(uneven, reverse=True)[:6])
        more = ", …" if len(uneven) > 6 else ""
        found.append(
            f"In-plane angles cluster within {len(uneven)} of {n_classes} classes: class (strength) "
            f"{listed}{more}." + ("" if found else f" {advice}")
        )
    return found


def _around(order: int) -> str:
    return "around one angle" if order == 1 else f"around {order} angles {360 // order}° apart"


def unusable_images(usable: NDArray[np.bool_]) -> list[str]:
    """Images that hold NaN or are constant."""
    bad = int((~usable).sum())
    if bad == 0:
        return []
    first = ", ".join(str(row + 1) for row in np.flatnonzero(~usable)[:5]) + (", …" if bad > 5 else "")
    noun, verb = ("image holds", "was") if bad == 1 else ("images hold", "were")
    return [
        f"{bad:,} of {len(usable):,} {noun} NaN or no contrast (particle {first}) and {verb} left out, "
        "with figure of merit 0. Check the job that wrote the stacks."
    ]


def tiny_classes(sizes: Integers) -> list[str]:
    """Classes with hardly any particle."""
    if len(sizes) < 2:
        return []
    tiny = np.flatnonzero(sizes < FEWEST_PARTICLES) + 1
    if len(tiny) == 0:
        return []
    listed = ", ".join(map(str, tiny[:8])) + (", …" if len(tiny) > 8 else "")
    few = f"fewer than {FEWEST_PARTICLES} particles"
    return [
        f"{len(tiny)} of {len(sizes)} classes with {few} (class {listed}): such averages are mostly "
        "noise. Ask for fewer classes (--classes), or discard them."
    ]
