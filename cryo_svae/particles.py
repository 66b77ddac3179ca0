"""Particles of a RELION STAR or a CryoSPARC .cs file: rows, their optics joined, their images found."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cryo_svae import geometry
from cryo_svae.config import SourceConfig
from cryo_svae.ctf import CtfTable
from cryo_svae.errors import InputError
from cryo_svae.formats.cs import CsTable, is_cs, read_particles_cs
from cryo_svae.formats.mrc import StackInfo
from cryo_svae.formats.star import StarBlock, StarFile, read_star
from cryo_svae.interchange import field_of, star_of_cs
from cryo_svae.stacks import find_stacks

log = logging.getLogger(__name__)

MICROMETRE_ANGST = 1e4


@dataclass(frozen=True)
class ParticleSet:
    """n particles in file order.

    star, block:         the file they came from, whole, and its block of particles; of a .cs file, the
                         STAR file in memory that says the same.
    optics_group:        (n,) index into ``groups``.
    groups:              names or numbers of the optics groups, for messages.
    stacks:              image stacks, each checked: even square boxes.
    stack_of, slice_of:  (n,) index into ``stacks``, 0-based image within it.
    box_px:              (n,) box of each particle's image.
    pixel_size_angst:    (n,).
    ctf:                 their CTF parameters (pixel size of the images on disk), or None.
    has_3d_pose:         whether the file holds nonzero rlnAngleRot or rlnAngleTilt.
    is_relion30:         one block without optics groups, origins in pixels.
    cs:                  the .cs table they came from, or None.
    is_dark:             whether the file says that the protein is dark (.cs), or None.
    """

    star: StarFile
    block: StarBlock
    optics_group: NDArray[np.intp]
    groups: tuple[str, ...]
    stacks: tuple[StackInfo, ...]
    stack_of: NDArray[np.intp]
    slice_of: NDArray[np.intp]
    box_px: NDArray[np.intp]
    pixel_size_angst: NDArray[np.float64]
    ctf: CtfTable | None
    has_3d_pose: bool
    is_relion30: bool
    cs: CsTable | None = None
    is_dark: bool | None = None

    def __len__(self) -> int:
        return len(self.slice_of)

    def place_of(self, row: int) -> str:
        """Where in the file a particle stands, for messages."""
        return f"line {self.block.line_of(row)}" if self.cs is None else f"row {row + 1}"


def read_particles(
    path: Path,
    *,
    datadir: Path | None = None,
    pixel_size_angst: float | None = None,
    passthrough: Path | None = None,
) -> ParticleSet:
    """Particles of a STAR file of RELION 3.0, 3.1, 4 or 5, or of a CryoSPARC .cs file.

    datadir:          folder under which image paths are sought first; then the current folder
                      (the project's), then the file's and its parents.
    pixel_size_angst: for files that hold none.
    passthrough:      a .cs file with more fields of the same particles.
    Raises InputError, with file, line and column.
    """
    if is_cs(path):
        table = read_particles_cs(path, passthrough)
        star, _ = star_of_cs(table)
        try:
            particles = _particles_of_star(star, datadir, pixel_size_angst)
        except InputError as error:
            raise _in_words_of_cs(error, star) from error
        _check_boxes(particles, table)
        return replace(particles, cs=table, is_dark=_is_dark(table))
    refuse_passthrough(path, passthrough)
    return _particles_of_star(read_star(path), datadir, pixel_size_angst)


def refuse_passthrough(path: Path, passthrough: Path | None) -> None:
    """Raises InputError where a passthrough file is given with a STAR file."""
    if passthrough is not None:
        raise InputError(
            "--passthrough",
            found=f"it with {path}",
            expected="particles in a .cs file",
            remedy="leave it out: a STAR file has no passthrough file.",
        )


def read_source(path: Path, source: SourceConfig) -> ParticleSet:
    """``read_particles`` with the options of a job."""
    return read_particles(
        path,
        datadir=source.datadir,
        pixel_size_angst=source.pixel_size,
        passthrough=source.passthrough,
    )


def _particles_of_star(star: StarFile, datadir: Path | None, pixel_size_angst: float | None) -> ParticleSet:
    block, optics = find_blocks(star)
    columns = ParticleColumns(star, block, optics)
    group_of, groups = columns.groups()
    stacks, stack_of, slice_of = find_stacks(star, block, datadir)
    pixel_size = pixel_sizes(columns, pixel_size_angst)
    angles = [columns.of_particles(name) for name in ("rlnAngleRot", "rlnAngleTilt")]
    return ParticleSet(
        star=star,
        block=block,
        optics_group=group_of,
        groups=groups,
        stacks=stacks,
        stack_of=stack_of,
        slice_of=slice_of,
        box_px=np.array([info.width_px for info in stacks], dtype=np.intp)[stack_of],
        pixel_size_angst=pixel_size,
        ctf=_ctf(columns, pixel_size),
        has_3d_pose=any(a is not None and bool(np.any(a != 0)) for a in angles),
        is_relion30=optics is None,
    )


def _in_words_of_cs(error: InputError, star: StarFile) -> InputError:
    """An error in the STAR file made of a .cs file, told by the field and row of the latter."""
    block = star.block("particles")
    if error.path != str(star.path) or error.column is None or block is None:
        return error
    field = field_of(error.column.split()[0].removeprefix("_"))
    row = -1 if error.line is None else error.line - block.line_of(0)
    return InputError(
        error.path,
        column=f"{field}, row {row + 1}" if row >= 0 else field,
        found=error.found,
        expected=error.expected,
        remedy=error.remedy,
    )


def _check_boxes(particles: ParticleSet, table: CsTable) -> None:
    shape = table.fields["blob/shape"]
    wrong = np.flatnonzero((shape != particles.box_px[:, None]).any(1))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            table.path,
            column=f"blob/shape, row {row + 1}",
            found=f"{shape[row, 1]} x {shape[row, 0]} px",
            expected=f"{particles.box_px[row]} px, as in {particles.stacks[particles.stack_of[row]].path}",
            remedy="check that the stack is the one the file was written for.",
        )


def _is_dark(table: CsTable) -> bool | None:
    """What blob/sign says of all images: -1 that the protein is dark; None where there is no such field."""
    sign = table.fields.get("blob/sign")
    if sign is None:
        return None
    if not (np.all(sign < 0) or np.all(sign > 0)):
        raise InputError(
            table.path,
            column="blob/sign",
            found="both signs, or 0",
            expected="images of one contrast: all -1 (protein dark) or all 1 (white)",
            remedy="split the set by its contrast.",
        )
    return bool(sign[0] < 0)


def find_blocks(star: StarFile) -> tuple[StarBlock, StarBlock | None]:
    """The block of particles and that of optics groups (None in RELION 3.0's style)."""
    block = star.block("particles")
    if block is None:
        tables = [b for b in star.blocks if b.name != "optics" and b.has("rlnImageName")]
        if len(tables) > 1:
            raise InputError(
                star.path,
                found=f"{len(tables)} blocks with rlnImageName",
                expected="one block of particles, named data_particles",
                remedy="name the block of particles data_particles.",
            )
        if tables:
            block = tables[0]
        elif len(star.blocks) == 1:
            block = star.blocks[0]
    if block is None:
        names = ", ".join(f"data_{b.name}" for b in star.blocks)
        raise InputError(
            star.path,
            found=f"blocks {names}",
            expected="a block data_particles with a column rlnImageName",
            remedy="give the STAR file of particles, not of micrographs or of a model.",
        )
    if not block.has("rlnImageName"):
        raise InputError(
            star.path,
            column="_rlnImageName",
            found="no such column",
            expected="'<slice>@<stack>' for every particle",
            remedy="extract the particles first (RELION's Particle extraction), or add the column.",
        )
    if block.n_rows == 0:
        raise InputError(
            star.path,
            found=f"an empty block data_{block.name}",
            expected="particles",
            remedy="check the job that wrote the file.",
        )
    return block, star.block("optics")


class ParticleColumns:
    """Numbers of the particles, wherever the file holds them: their own block or the optics."""

    def __init__(self, star: StarFile, block: StarBlock, optics: StarBlock | None) -> None:
        self.star, self.block, self.optics = star, block, optics
        self.row_of_optics: NDArray[np.intp] | None = None
        if optics is not None:
            self.row_of_optics = self._join(optics)

    def _join(self, optics: StarBlock) -> NDArray[np.intp]:
        ids = optics.integers("rlnOpticsGroup")
        if len(np.unique(ids)) != len(ids):
            raise InputError(
                self.star.path,
                column="_rlnOpticsGroup",
                found="an optics group listed twice",
                expected="each group once",
                remedy="number the groups of data_optics differently.",
            )
        wanted = self.block.integers("rlnOpticsGroup")
        order = np.argsort(ids)
        place = np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)
        rows = order[place]
        missing = np.flatnonzero(ids[rows] != wanted)
        if len(missing):
            first = int(missing[0])
            raise InputError(
                self.star.path,
                line=self.block.line_of(first),
                column="_rlnOpticsGroup",
                found=f"group {wanted[first]}",
                expected="one of data_optics: " + ", ".join(map(str, ids)),
                remedy="add the group to data_optics, or mend the number.",
            )
        return rows

    def groups(self) -> tuple[NDArray[np.intp], tuple[str, ...]]:
        """Each particle's (n,) optics group, and the names of the groups."""
        if self.optics is None or self.row_of_optics is None:
            return np.zeros(self.block.n_rows, dtype=np.intp), ("all particles",)
        label = "rlnOpticsGroupName" if self.optics.has("rlnOpticsGroupName") else "rlnOpticsGroup"
        return self.row_of_optics, tuple(self.optics.text(label))

    def has(self, label: str) -> bool:
        """Whether the optics groups or the particles have such a column."""
        return self.block.has(label) or (self.optics is not None and self.optics.has(label))

    def of_particles(self, label: str) -> NDArray[np.float64] | None:
        """A finite number for each particle, from its own block."""
        return self._finite(self.block, label) if self.block.has(label) else None

    def get(self, label: str) -> NDArray[np.float64] | None:
        """A finite number for each particle, from its optics group or its own block."""
        if self.optics is not None and self.row_of_optics is not None and self.optics.has(label):
            return self._finite(self.optics, label)[self.row_of_optics]
        return self.of_particles(label)

    def _finite(self, block: StarBlock, label: str) -> NDArray[np.float64]:
        values = block.numbers(label)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise InputError(
                self.star.path,
                line=block.line_of(int(bad[0])),
                column=f"_{label}",
                found=f"'{block.text(label)[int(bad[0])]}'",
                expected="a number",
                remedy="mend the value, or leave the particle out.",
            )
        return values


def pixel_sizes(columns: ParticleColumns, given_angst: float | None) -> NDArray[np.float64]:
    """Pixel sizes (n,) in Å of the images on disk, or the one given where the file holds none."""
    sizes = columns.get("rlnImagePixelSize")
    label = "_rlnImagePixelSize"
    if sizes is None:
        magnification = columns.get("rlnMagnification")
        detector_um = columns.get("rlnDetectorPixelSize")
        if magnification is not None and detector_um is not None:
            label = "_rlnMagnification"
            with np.errstate(divide="ignore"):
                sizes = detector_um * MICROMETRE_ANGST / magnification
    if sizes is None:
        sizes, label = columns.get("rlnPixelSize"), "_rlnPixelSize"
    path = columns.star.path
    if sizes is None:
        if given_angst is None:
            raise InputError(
                path,
                column="_rlnImagePixelSize",
                found="no pixel size",
                expected="rlnImagePixelSize in data_optics, or rlnMagnification with rlnDetectorPixelSize",
                remedy="give it by --pixel-size, in Å.",
            )
        return np.full(columns.block.n_rows, given_angst)
    if not np.all((sizes > 0) & np.isfinite(sizes)):
        raise InputError(
            path,
            column=label,
            found="a pixel size of 0 or less",
            expected="Å above 0",
            remedy="mend the file's pixel size.",
        )
    if given_angst is not None and not np.allclose(sizes, given_angst, rtol=1e-3):
        raise InputError(
            "--pixel-size",
            found=f"{given_angst:g} Å where {path} says {sizes[0]:g} Å",
            expected="the file's own pixel size",
            remedy="leave --pixel-size out, or mend the file.",
        )
    return sizes


def _ctf(columns: ParticleColumns, pixel_size_angst: NDArray[np.float64]) -> CtfTable | None:
    """CTF parameters, where the file holds any; a part of them only is an error."""
    if not columns.has("rlnDefocusU"):
        return None
    labels = {
        "voltage_kv": "rlnVoltage",
        "cs_mm": "rlnSphericalAberration",
        "amplitude_contrast": "rlnAmplitudeContrast",
        "defocus_u_angst": "rlnDefocusU",
        "defocus_v_angst": "rlnDefocusV",
        "defocus_angle_rad": "rlnDefocusAngle",
    }
    values = {}
    for name, label in labels.items():
        found = columns.get(label)
        if found is None:
            raise InputError(
                columns.star.path,
                column=f"_{label}",
                found="no such column, though rlnDefocusU is there",
                expected="a complete set of CTF parameters",
                remedy="add the column, or remove rlnDefocusU to work without a CTF.",
            )
        values[name] = found
    phase_shift_deg = columns.get("rlnPhaseShift")
    if phase_shift_deg is None:  # no phase plate
        phase_shift_deg = np.zeros(len(pixel_size_angst))
    checks = [
        ("rlnVoltage", values["voltage_kv"] > 0, "kV above 0"),
        ("rlnAmplitudeContrast", np.abs(values["amplitude_contrast"]) < 1, "a share below 1"),
    ]
    for label, good, expected in checks:
        if not np.all(good):
            raise InputError(
                columns.star.path,
                column=f"_{label}",
                found="a value out of range",
                expected=expected,
                remedy="mend the value.",
            )
    values["defocus_angle_rad"] = geometry.radians(values["defocus_angle_rad"])
    return CtfTable(
        pixel_size_angst=torch.from_numpy(pixel_size_angst.copy()),
        phase_shift_rad=torch.from_numpy(geometry.radians(phase_shift_deg)),
        **{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()},
    )
