"""Estimates to files: columns of the particles' STAR and .cs files, and latents in HDF5."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryo_svae.formats.cs import write_cs
from cryo_svae.formats.hdf5 import write_arrays
from cryo_svae.formats.star import Numbers, write_star
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.particle_set import ParticleSet
from cryo_svae.particles.star_and_cs import Noted, cs_fields
from cryo_svae.results.latent_classes import Classes

log = logging.getLogger(__name__)

Reals = NDArray[np.float64]


def _columns(table: EstimateTable, classes: Classes, pose_prefix: str) -> dict[str, tuple[Reals, str]]:
    """The columns of a job: label to values (n,) and the format of their cells."""
    columns = {
        f"{pose_prefix}AnglePsi": (table.psi_deg, "%.6f"),
        f"{pose_prefix}OriginXAngst": (table.origin_angst[:, 0], "%.6f"),
        f"{pose_prefix}OriginYAngst": (table.origin_angst[:, 1], "%.6f"),
        "rlnClassNumber": (classes.class_number.astype(np.float64), "%d"),
        "rlnMaxValueProbDistribution": (classes.probability, "%.6f"),
        "rlnParticleFigureOfMerit": (table.figure_of_merit, "%.6f"),
    }
    for axis, values in enumerate(table.z.T, start=1):
        columns[f"svaeZ{axis}"] = (values, "%.8g")
    for axis, values in enumerate(table.z_std.T, start=1):
        columns[f"svaeZ{axis}Std"] = (values, "%.8g")
    columns["svaePsiStd"] = (table.psi_std_deg, "%.6f")
    columns["svaeOriginStdAngst"] = (table.origin_std_angst, "%.6f")
    columns["svaeLogLikelihood"] = (table.log_likelihood, "%.4f")
    return columns


def star_columns(
    particles: ParticleSet, table: EstimateTable, classes: Classes, overwrite_pose: bool
) -> dict[str, Numbers]:
    """Columns to add to (or replace in) the particles block, label to cells.

    3-D poses of the input are kept unless ``overwrite_pose``; ours then go to svae columns.
    Files in RELION 3.0's style also get their origins in pixels (rlnOriginX, rlnOriginY).
    """
    keeps_pose = particles.has_3d_pose and not overwrite_pose
    columns = _columns(table, classes, "svae" if keeps_pose else "rln")
    if keeps_pose:
        log.warning(
            "the input holds 3-D poses: they are kept, and our psi and origins written as "
            "svaeAnglePsi, svaeOriginXAngst, svaeOriginYAngst (--overwrite-pose replaces them)"
        )
    elif particles.is_relion30:
        origin_px = table.origin_angst / particles.pixel_size_angst[:, None]
        columns |= {f"rlnOrigin{axis}": (origin_px[:, k], "%.6f") for k, axis in enumerate("XY")}
    return {label: Numbers(values, form) for label, (values, form) in columns.items()}


def write_particles(
    path: Path, particles: ParticleSet, table: EstimateTable, classes: Classes, overwrite_pose: bool
) -> None:
    """The input STAR file with our columns; every other cell to the letter."""
    columns = star_columns(particles, table, classes, overwrite_pose)
    write_star(path, particles.star, block=particles.block.name, columns=columns)


def write_cs_particles(path: Path, particles: ParticleSet, table: EstimateTable, classes: Classes) -> None:
    """The input .cs table with our alignments2D/* and svae/* fields; every other field to the byte."""
    if particles.cs is None:
        raise ValueError("particles of a STAR file have no .cs table")
    columns = {label: values for label, (values, _) in _columns(table, classes, "rln").items()}
    ours = cs_fields(Noted(columns), particles.pixel_size_angst)
    write_cs(path, particles.cs.with_fields(ours).fields)
    if any(info.path.suffix != ".mrcs" for info in particles.stacks):
        log.warning(
            "RELION reads image stacks only by names that end in .mrcs: to use particles.star there, link "
            "each stack by such a name and change its rlnImageName"
        )


def write_latents(
    path: Path, table: EstimateTable, classes: Classes, attributes: Mapping[str, str]
) -> None:
    """The estimates as HDF5 data sets, in input order, for notebooks."""
    arrays: dict[str, NDArray[Any]] = {
        "z": table.z.astype(np.float32),
        "z_std": table.z_std.astype(np.float32),
        "psi_deg": table.psi_deg,
        "psi_std_deg": table.psi_std_deg,
        "origin_angst": table.origin_angst,
        "origin_std_angst": table.origin_std_angst,
        "class_number": classes.class_number.astype(np.int32),
        "class_probability": classes.probability,
        "figure_of_merit": table.figure_of_merit,
        "log_likelihood": table.log_likelihood,
        "second_mode": table.second_mode,
        "usable": table.usable,
    }
    units = "degrees (psi_deg, psi_std_deg), Å (origin_angst: x, y), nats (log_likelihood)"
    write_arrays(path, arrays, {"units": units, **attributes})
