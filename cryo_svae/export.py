"""Estimates to files: columns of the particles' STAR file, and latents in HDF5."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryo_svae.estimation import EstimateTable
from cryo_svae.formats.results import write_arrays
from cryo_svae.formats.star import write_star
from cryo_svae.particles import ParticleSet

log = logging.getLogger(__name__)


def _texts(values: NDArray[np.float64], form: str) -> list[str]:
    return [form % value for value in values.tolist()]


def star_columns(
    particles: ParticleSet, table: EstimateTable, class_number: NDArray[np.intp], overwrite_pose: bool
) -> dict[str, list[str]]:
    """Columns to add to (or replace in) the particles block, label to cells.

    3-D poses of the input are kept unless ``overwrite_pose``; ours then go to svae columns.
    Files in RELION 3.0's style also get their origins in pixels (rlnOriginX, rlnOriginY).
    """
    pose = {
        "AnglePsi": _texts(table.psi_deg, "%.6f"),
        "OriginXAngst": _texts(table.origin_angst[:, 0], "%.6f"),
        "OriginYAngst": _texts(table.origin_angst[:, 1], "%.6f"),
    }
    if particles.has_3d_pose and not overwrite_pose:
        log.warning(
            "the input holds 3-D poses: they are kept, and our psi and origins written as "
            "svaeAnglePsi, svaeOriginXAngst, svaeOriginYAngst (--overwrite-pose replaces them)"
        )
        columns = {f"svae{name}": cells for name, cells in pose.items()}
    else:
        columns = {f"rln{name}": cells for name, cells in pose.items()}
        if particles.is_relion30:
            origin_px = table.origin_angst / particles.pixel_size_angst[:, None]
            columns["rlnOriginX"] = _texts(origin_px[:, 0], "%.6f")
            columns["rlnOriginY"] = _texts(origin_px[:, 1], "%.6f")
    columns["rlnClassNumber"] = [str(number) for number in class_number.tolist()]
    columns["rlnParticleFigureOfMerit"] = _texts(table.figure_of_merit, "%.6f")
    for axis in range(table.z.shape[1]):
        columns[f"svaeZ{axis + 1}"] = _texts(table.z[:, axis], "%.8g")
    for axis in range(table.z.shape[1]):
        columns[f"svaeZ{axis + 1}Std"] = _texts(table.z_std[:, axis], "%.8g")
    columns["svaePsiStd"] = _texts(table.psi_std_deg, "%.6f")
    columns["svaeOriginStdAngst"] = _texts(table.origin_std_angst, "%.6f")
    columns["svaeLogLikelihood"] = _texts(table.log_likelihood, "%.4f")
    return columns


def write_particles(
    path: Path,
    particles: ParticleSet,
    table: EstimateTable,
    class_number: NDArray[np.intp],
    overwrite_pose: bool,
) -> None:
    """The input STAR file with our columns; every other cell to the letter."""
    columns = star_columns(particles, table, class_number, overwrite_pose)
    write_star(path, particles.star, block=particles.block.name, columns=columns)


def write_latents(
    path: Path, table: EstimateTable, class_number: NDArray[np.intp], attributes: Mapping[str, str]
) -> None:
    """The estimates as HDF5 data sets, in input order, for notebooks."""
    arrays: dict[str, NDArray[Any]] = {
        "z": table.z.astype(np.float32),
        "z_std": table.z_std.astype(np.float32),
        "psi_deg": table.psi_deg,
        "psi_std_deg": table.psi_std_deg,
        "origin_angst": table.origin_angst,
        "origin_std_angst": table.origin_std_angst,
        "class_number": class_number.astype(np.int32),
        "figure_of_merit": table.figure_of_merit,
        "log_likelihood": table.log_likelihood,
        "second_mode": table.second_mode,
        "usable": table.usable,
    }
    units = "degrees (psi_deg, psi_std_deg), Å (origin_angst: x, y), nats (log_likelihood)"
    write_arrays(path, arrays, {"units": units, **attributes})
