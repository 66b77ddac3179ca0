"""Particles of a RELION STAR or a CryoSPARC .cs file: rows, their optics joined, their images found."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cryo_svae.config import SourceConfig
from cryo_svae.errors import InputError
from cryo_svae.formats.cs import CsTable, is_cs, read_particles_cs
from cryo_svae.formats.mrc import StackInfo
from cryo_svae.formats.star import StarBlock, StarFile, read_star
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.particles.stacks import find_stacks
from cryo_svae.particles.star_and_cs import MAG_MATRIX, field_of, star_of_cs

log = logging.getLogger(__name__)

MICROMETRE_ANGST = 1e4
UNDISTORTED = (1.0, 0.0, 0.0, 1.0)
MOST_DISTORTION = 0.2  # of a side; more is no lens, but a matrix of another meaning
FLAGS = {
    "phase_flipped": "rlnCtfDataArePhaseFlipped",
    "premultiplied": "rlnCtfDataAreCtfPremultiplied",
}
FACTORS = {"scale": ("rlnCtfScalefactor", 1.0), "b_factor_angst2": ("rlnCtfBfactor", 0.0)}
# What microscopes have: (label, least, most, in words, what to do).
BOUNDS = (
    ("rlnVoltage", 20.0, 3000.0, "20 to 3000 kV", "give it in kV, not in V."),
    ("rlnSphericalAberration", -20.0, 20.0, "-20 to 20 mm", "give it in mm."),
    ("rlnAmplitudeContrast", -0.999, 0.999, "a share below 1", "give it as a share: 0.1 for 10 %."),
    ("rlnDefocusU", -3e5, 3e5, "at most 300,000 Å (30 µm) either way", "give it in Å."),
    ("rlnDefocusV", -3e5, 3e5, "at most 300,000 Å (30 µm) either way", "give it in Å."),
)
LEAST_DEFOCUS_ANGST = 50.0  # where all are nearer to focus, and not 0, they are given in µm


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
    magnification:       (n, 4) matrix M, row by row; frequency k of the image is M k of the specimen.
    ctf:                 their CTF parameters (pixel size of the images on disk), or None; undistorted.
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
    magnification: NDArray[np.float64]
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
    _refuse_subtomograms(columns)
    stacks, stack_of, slice_of = find_stacks(star, block, datadir)
    pixel_size = pixel_sizes(columns, pixel_size_angst)
    _check_images(columns, np.array([info.width_px for info in stacks])[stack_of], stacks, stack_of)
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
        magnification=_magnification(columns),
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


def _refuse(
    columns: ParticleColumns, label: str, bad: NDArray[np.bool_], expected: str, remedy: str
) -> None:
    """Raises InputError at the first bad value (n,) of a column."""
    rows = np.flatnonzero(bad)
    values = columns.get(label)
    if not len(rows) or values is None:
        return
    block, row = columns.block, int(rows[0])
    if columns.optics is not None and columns.row_of_optics is not None and columns.optics.has(label):
        block, row = columns.optics, int(columns.row_of_optics[row])
    raise InputError(
        columns.star.path,
        line=block.line_of(row),
        column=f"_{label}",
        found=f"{values[rows[0]]:g}",
        expected=expected,
        remedy=remedy,
    )


def _refuse_subtomograms(columns: ParticleColumns) -> None:
    """Raises InputError where a file of RELION 5 says that its images are stacks or volumes of tilts."""
    general = columns.star.block("general")
    for block in (columns.block, columns.optics, general):
        for label in ("rlnTomoVisibleFrames", "rlnTomoSubTomosAre2DStacks"):
            if block is None or not block.has(label):
                continue
            text = block.text(label)[0]
            if label == "rlnTomoVisibleFrames" or block.numbers(label).any():
                raise InputError(
                    columns.star.path,
                    line=block.line_of(0),
                    column=f"_{label}",
                    found=f"'{text}': pseudo-subtomograms, each of several tilts",
                    expected="single 2-D images of particles",
                    remedy="give images of single particles; subtomograms cannot be taken.",
                )


def _check_images(
    columns: ParticleColumns,
    box_px: NDArray[np.intp],
    stacks: tuple[StackInfo, ...],
    stack_of: NDArray[np.intp],
) -> None:
    """Raises InputError where the file says that its images are no 2-D images of the stacks' size."""
    for label in ("rlnImageSize", "rlnImageSizeX", "rlnImageSizeY"):
        size = None if is_cs(columns.star.path) else columns.get(label)  # see _check_boxes
        if size is not None:
            wrong = size != box_px
            path = stacks[stack_of[int(wrong.argmax())]].path
            expected = f"{box_px[int(wrong.argmax())]}, the side of the images in {path}"
            remedy = "correct it, or give the stack it was written for."
            _refuse(columns, label, wrong, expected, remedy)
    for label in ("rlnImageDimensionality", "rlnDataDimensionality"):
        dimensions = columns.get(label)
        if dimensions is not None:
            remedy = "extract the particles as 2-D images; volumes cannot be taken."
            _refuse(columns, label, dimensions != 2, "2", remedy)
    depth = columns.get("rlnImageSizeZ")
    if depth is not None:
        remedy = "extract the particles as 2-D images; volumes cannot be taken."
        _refuse(columns, "rlnImageSizeZ", depth > 1, "1", remedy)


def _magnification(columns: ParticleColumns) -> NDArray[np.float64]:
    """Anisotropic magnification (n, 4), undistorted where the file has none."""
    found = [columns.get(label) for label in MAG_MATRIX]
    n = columns.block.n_rows
    if all(each is None for each in found):
        return np.tile(UNDISTORTED, (n, 1))
    for label, each, one in zip(MAG_MATRIX, found, UNDISTORTED, strict=True):
        if each is None:
            raise InputError(
                columns.star.path,
                column=f"_{label}",
                found="no such column, though another of the matrix is there",
                expected="all four: " + ", ".join(MAG_MATRIX),
                remedy="add the column, or remove the others.",
            )
        expected = f"within {MOST_DISTORTION} of {one:g}"
        remedy = "mend the matrix, or remove it (none is 1, 0, 0, 1 in STAR and 0, 0, 0, 0 in .cs files)."
        _refuse(columns, label, np.abs(each - one) > MOST_DISTORTION, expected, remedy)
    return np.column_stack([each for each in found if each is not None])


def _flags(columns: ParticleColumns) -> dict[str, torch.Tensor]:
    """What was done to the images, by field of CtfTable, where it was done to any."""
    flags = {}
    for name, label in FLAGS.items():
        values = columns.get(label)
        if values is None:
            continue
        _refuse(columns, label, (values != 0) & (values != 1), "0 or 1", "write 1 for yes, 0 for no.")
        if values.any():
            flags[name] = torch.from_numpy(values != 0)
    return flags


def _factors(columns: ParticleColumns) -> dict[str, torch.Tensor]:
    """Scale and B-factor of the CTF, where any differs from none."""
    factors = {}
    for name, (label, neutral) in FACTORS.items():
        values = columns.get(label)
        if values is not None and np.any(values != neutral):
            factors[name] = torch.from_numpy(np.ascontiguousarray(values))
    if "scale" in factors:
        _refuse(
            columns,
            "rlnCtfScalefactor",
            factors["scale"].numpy() <= 0,
            "above 0",
            "mend the value, or remove the column.",
        )
    return factors


def _ctf(columns: ParticleColumns, pixel_size_angst: NDArray[np.float64]) -> CtfTable | None:
    """CTF parameters, where the file holds any; a part of them only is an error."""
    flags = _flags(columns)
    if not columns.has("rlnDefocusU"):
        if "premultiplied" in flags:
            raise InputError(
                columns.star.path,
                column="_rlnDefocusU",
                found="no such column, though images are premultiplied by their CTF",
                expected="the CTF they were multiplied by",
                remedy="add the CTF parameters, or extract the particles without premultiplying.",
            )
        return None
    corrected = columns.get("rlnCtfDataAreCtfCorrected")
    if corrected is not None:
        remedy = "extract them uncorrected, or remove the CTF parameters to work without a CTF."
        _refuse(columns, "rlnCtfDataAreCtfCorrected", corrected != 0, "0, images with their CTF", remedy)
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
    for label, least, most, words, remedy in BOUNDS:
        found = columns.get(label)
        if found is not None:
            _refuse(columns, label, (found < least) | (found > most), words, remedy)
    defocus = np.abs(values["defocus_u_angst"])
    if defocus.any() and defocus.max() < LEAST_DEFOCUS_ANGST:
        _refuse(columns, "rlnDefocusU", defocus > 0, "Å", "give the defocus in Å: 15000 for 1.5 µm.")
    values["defocus_angle_rad"] = geometry.radians(values["defocus_angle_rad"])
    return CtfTable(
        pixel_size_angst=torch.from_numpy(pixel_size_angst.copy()),
        phase_shift_rad=torch.from_numpy(geometry.radians(phase_shift_deg)),
        **{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()},
        **_factors(columns),
        **flags,
    )
