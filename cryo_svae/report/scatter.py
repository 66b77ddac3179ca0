"""The latent scatter's numbers: every particle where they fit, a fixed sample where they do not."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryo_svae.report.data import ReportData
from cryo_svae.results import latent_lines

Reals = NDArray[np.floating[Any]]

DRAWN_PARTICLES = 20_000
BYTES_OF_ALL = 10_000_000  # 13.3 MB in base64; with the rest the page stays under 20 MB
UMAP_PARTICLES = 50
PRINCIPAL_AXES = 2
CLEAR_OF_OUTLIERS = 0.5  # of the span between the outer per milles, beyond which values sit at the edge


@dataclass(frozen=True)
class Column:
    """A number of each particle (n,): an axis of the plot, or a colour."""

    key: str
    label: str
    unit: str
    values: Reals


def drawn_particles(usable: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Rows of the particles that are drawn, ascending: all usable ones, or a fixed random sample."""
    rows = np.flatnonzero(usable)
    if len(rows) <= DRAWN_PARTICLES:
        return rows
    chosen = np.random.default_rng(0).choice(rows, DRAWN_PARTICLES, replace=False)
    return np.asarray(np.sort(chosen))


def principal_columns(z: Reals, usable: NDArray[np.bool_]) -> list[Column]:
    """z along its first principal axes, each labelled with its share of the variance."""
    if z.shape[1] < 2 or usable.sum() < 2:
        return []
    axes = latent_lines.principal_axes(z[usable])
    return [
        Column(f"pc{k + 1}", f"pc{k + 1} ({axes.share[k]:.0%})", "", (z - axes.mean) @ axes.direction[:, k])
        for k in range(PRINCIPAL_AXES)
    ]


def umap_columns(z: Reals) -> list[Column]:
    """z in two dimensions by UMAP, where it is installed and z has more than two."""
    if z.shape[1] < 3 or len(z) < UMAP_PARTICLES or np.ptp(z) == 0 or find_spec("umap") is None:
        return []
    import umap  # seconds, so not before it is needed

    placed = umap.UMAP(init="pca", random_state=0, n_jobs=1).fit_transform(z)
    return [Column(f"umap{k + 1}", f"UMAP {k + 1}", "", placed[:, k]) for k in range(2)]


def columns_of(data: ReportData) -> list[Column]:
    """What the plot can show of all particles, those that the lasso needs most first."""
    columns = principal_columns(data.z, data.usable)
    columns += [Column(f"z{k + 1}", f"z{k + 1}", "", data.z[:, k]) for k in range(data.z_dim)]
    columns.append(Column("merit", "figure of merit", "", data.figure_of_merit))
    if data.defocus_angst is not None:
        columns.append(Column("defocus", "defocus", "µm", data.defocus_angst / 1e4))
    if data.pose_found:
        columns.append(Column("psi", "psi", "°", data.psi_deg))
        columns += [
            Column(f"origin_{name}", f"origin {name}", "Å", data.origin_angst[:, k])
            for k, name in enumerate("xy")
        ]
    return columns


def base64_of(values: NDArray[Any], kind: str) -> str:
    """Little-endian bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode()


def limits(values: Reals) -> tuple[float, float]:
    """The range of finite values, far outliers left out."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return 0.0, 1.0
    low, high = np.percentile(finite, [0.1, 99.9])
    room = CLEAR_OF_OUTLIERS * (high - low)
    low, high = max(float(finite.min()), low - room), min(float(finite.max()), high + room)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def quantised(column: Column, rows: NDArray[np.intp], bits: int | None) -> dict[str, Any]:
    """A column in whole steps of its range: of the rows drawn, and with ``bits`` of all particles."""
    low, high = limits(column.values[rows])

    def steps(values: Reals, depth: int) -> str:
        share = (np.nan_to_num(values.astype(np.float64), nan=low) - low) / (high - low)
        return base64_of(np.round(np.clip(share, 0, 1) * (2**depth - 1)), f"u{depth // 8}")

    return {
        "key": column.key,
        "label": column.label,
        "unit": column.unit,
        "low": low,
        "high": high,
        "drawn": steps(column.values[rows], 16),
        "bits": bits,
        "all": None if bits is None else steps(column.values, bits),
    }


def scatter_payload(data: ReportData, colours: list[str]) -> dict[str, Any]:
    """What the page's script draws and searches, ready for JSON.

    Where not all usable particles are drawn, axes also hold all particles, as many as there is room for.
    """
    rows = drawn_particles(data.usable)
    columns = columns_of(data)
    bits = 16 if 2 * len(columns) * data.n_particles <= BYTES_OF_ALL else 8
    sampled = len(rows) < int(data.usable.sum())
    room = BYTES_OF_ALL * 8 // (bits * data.n_particles) if sampled else 0
    axes = [quantised(column, rows, bits if k < room else None) for k, column in enumerate(columns)]
    axes += [quantised(column, np.arange(len(rows)), None) for column in umap_columns(data.z[rows])]
    payload: dict[str, Any] = {
        "particles": data.n_particles,
        "rows": base64_of(rows, "u4"),
        "unusable": base64_of(np.flatnonzero(~data.usable), "u4"),
        "axes": axes,
        "class": base64_of(data.class_number[rows], "u2"),
        "colours": colours,
    }
    if data.micrograph_number is not None:
        seen, short = np.unique(data.micrograph_number[rows], return_inverse=True)
        payload["micrograph"] = base64_of(short, "u2")
        payload["micrographs"] = [data.micrograph_names[number].rsplit("/", 1)[-1] for number in seen]
    return payload
