"""What a RELION STAR file and a CryoSPARC .cs file both hold of a particle, and how each writes it.

blob/path without a leading >, blob/idx from 0: rlnImageName, slices from 1
ctf/exp_group_id from 0: rlnOpticsGroup from 1; with blob/psize_A, blob/shape, ctf/accel_kv, ctf/cs_mm,
    ctf/amp_contrast and location/micrograph_psize_A its row of data_optics
ctf/df1_A, df2_A, df_angle_rad, phase_shift_rad: rlnDefocusU, V (Å), rlnDefocusAngle, rlnPhaseShift (°)
ctf/scale, bfactor: rlnCtfScalefactor, rlnCtfBfactor (Å²)
ctf/anisomag, row by row, with the identity taken off: rlnMagMat00, 01, 10, 11 of data_optics
ctf/tilt_A (Å): rlnBeamTiltX, Y (mrad) of data_optics, whose sines are tilt_A over the spherical aberration
alignments2D/pose (rad), shift (px of psize_A): AnglePsi (°), OriginXAngst, OriginYAngst; same signs
alignments3D/pose (rotation vector), shift, split from 0: rlnAngleRot, Tilt, Psi, origins, rlnRandomSubset
alignments2D/class (beside a 3-D pose alone, alignments3D/class) from 0: rlnClassNumber from 1; with
    class_posterior: rlnMaxValueProbDistribution
location/center_x_frac, center_y_frac of micrograph_shape (y, x): rlnCoordinateX, rlnCoordinateY (px)
svae/z, z_std, …: svaeZ1, …, svaeZ1Std, …
uid: ucsfUid, pyem's name for it

The 2-D pose goes to rln labels where there is no 3-D pose, to svae labels beside one. Sources: pyem's
csparc2star and, for the sign and the zero of classes, a second public converter; not verified against
a CryoSPARC server. blob/sign -1 is taken as dark protein: so it is in the seven images of EMPIAR-10076
whose .cs file says -1. A comment in one public script reads it the other way, so contrast is tested too.
That anisomag + I turns frequencies of the image into those of the specimen, as RELION's matrix does, and
how its numbers are ordered, is what CryoSPARC's developers and a public program that reads it say
(pyem copies it without adding I); trefoil_A and tetra_A have no agreed counterpart and are not carried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.cs import Column, CsTable
from cryo_svae.formats.star import StarFile, star_of_tables
from cryo_svae.imaging import geometry

Reals = NDArray[np.float64]
Texts = dict[str, list[str]]
Convert = Callable[[Reals], Reals]

UID = "ucsfUid"
EULER = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
POSE_2D = ("rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginX", "rlnOriginY")
CLASS_PROBABILITY = "rlnMaxValueProbDistribution"
OPTICS = {
    "blob/psize_A": "rlnImagePixelSize",
    "ctf/accel_kv": "rlnVoltage",
    "ctf/cs_mm": "rlnSphericalAberration",
    "ctf/amp_contrast": "rlnAmplitudeContrast",
    "location/micrograph_psize_A": "rlnMicrographPixelSize",
}
MAG_MATRIX = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
BEAM_TILT = ("rlnBeamTiltX", "rlnBeamTiltY")
# Fields that a STAR file does not hold, and need not where they are 0.
NOTHING_AT_ZERO = ("ctf/scale_const", "ctf/shift_A", "ctf/trefoil_A", "ctf/tetra_A")
MM_ANGST = 1e7


def _same(values: Reals) -> Reals:
    return values


class _Pair(NamedTuple):
    field: str
    label: str
    dtype: str = "<f4"
    to_star: Convert = _same
    to_cs: Convert = _same


PAIRS = (
    _Pair("ctf/df1_A", "rlnDefocusU"),
    _Pair("ctf/df2_A", "rlnDefocusV"),
    _Pair("ctf/df_angle_rad", "rlnDefocusAngle", "<f4", geometry.degrees, geometry.radians),
    _Pair("ctf/phase_shift_rad", "rlnPhaseShift", "<f4", geometry.degrees, geometry.radians),
    _Pair("ctf/scale", "rlnCtfScalefactor"),
    _Pair("ctf/bfactor", "rlnCtfBfactor"),
    _Pair("svae/figure_of_merit", "rlnParticleFigureOfMerit"),
    _Pair("svae/pose_std", "svaePsiStd", "<f4", geometry.degrees, geometry.radians),
    _Pair("svae/shift_std_A", "svaeOriginStdAngst"),
    _Pair("svae/log_likelihood", "svaeLogLikelihood", "<f8"),
)
LATENTS = {"svae/z": "", "svae/z_std": "Std"}  # field to the end of its labels


class Noted:
    """Columns by name, and which of them were asked for."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = columns
        self.asked: set[str] = set()

    def get(self, name: str) -> Column | None:
        """A column, or None."""
        self.asked.add(name)
        return self.columns.get(name)


# --- .cs to STAR -----------------------------------------------------------------------------------


def star_of_cs(table: CsTable) -> tuple[StarFile, list[str]]:
    """A STAR file, in memory, of a table of particles; and the names of the fields it cannot hold.

    Numbers are the shortest texts from which ``cs_fields`` makes the same bits again (3-D poses: ten
    digits of each angle).
    """
    noted = Noted(table.fields)
    group, optics = _optics(table, noted)
    paths = [path.removeprefix(">") for path in table.fields["blob/path"].tolist()]
    names = [
        f"{i + 1:06d}@{path}" for i, path in zip(table.fields["blob/idx"].tolist(), paths, strict=True)
    ]
    particles: Texts = {"rlnImageName": names}
    micrographs = noted.get("location/micrograph_path")
    if micrographs is not None:
        particles["rlnMicrographName"] = [path.removeprefix(">") for path in micrographs.tolist()]
    particles |= _coordinates(table, noted)
    particles["rlnOpticsGroup"] = [str(number) for number in group.tolist()]
    for pair in PAIRS:
        values = noted.get(pair.field)
        if values is not None:
            particles[pair.label] = _texts(_flat(table, pair.field), pair.to_star, pair.to_cs)
    particles |= _alignments(table, noted)
    for field, ending in LATENTS.items():
        values = noted.get(field)
        if values is not None:
            columns = values.reshape(len(table), -1).T
            particles |= {f"svaeZ{k}{ending}": _texts(each) for k, each in enumerate(columns, start=1)}
    particles[UID] = [str(uid) for uid in table.fields["uid"].tolist()]
    used = {"uid", "blob/path", "blob/idx", "blob/shape", *noted.asked}
    used |= {name for name in NOTHING_AT_ZERO if name in table.fields and not table.fields[name].any()}
    star = star_of_tables(table.path, {"optics": optics, "particles": particles})
    return star, [name for name in table.fields if name not in used]


def field_of(label: str) -> str:
    """The field from which ``star_of_cs`` makes a column, for messages."""
    fields = {
        "rlnImageName": "blob/path",
        **{label: field for field, label in OPTICS.items()},
        **{pair.label: pair.field for pair in PAIRS},
        **dict.fromkeys(MAG_MATRIX, "ctf/anisomag"),
    }
    return fields.get(label, label)


def _flat(table: CsTable, field: str, width: int = 0) -> Column:
    """A field, checked to hold one finite number a row (or ``width`` numbers)."""
    values = table.fields[field]
    if values.shape != ((len(table), width) if width else (len(table),)) or values.dtype.kind not in "fiu":
        raise InputError(
            table.path,
            column=field,
            found=f"values of type {values.dtype} and shape {values.shape[1:]}",
            expected=f"{width or 1} number(s) a row",
            remedy="give a .cs file as CryoSPARC wrote it.",
        )
    wrong = np.flatnonzero(~np.isfinite(values).reshape(len(table), -1).all(1))
    if len(wrong):  # RELION would read nan as 0
        raise InputError(
            table.path,
            column=f"{field}, row {wrong[0] + 1}",
            found=f"'{values[wrong[0]]}'",
            expected="a number",
            remedy="mend the value, or leave the particle out.",
        )
    return values


def _texts(values: Column, to_star: Convert = _same, to_cs: Convert = _same) -> list[str]:
    """Converted numbers as the shortest texts, of 6 digits or more, that convert back to the same bits."""
    converted = to_star(values.astype(np.float64))
    texts = np.array([f"{value:.6g}" for value in converted.tolist()], dtype=object)
    for digits in range(7, 18):
        back = to_cs(texts.astype(np.float64)).astype(values.dtype)
        wrong = np.flatnonzero((back != values) & np.isfinite(converted))
        if not len(wrong):
            break
        texts[wrong] = [f"{value:.{digits}g}" for value in converted[wrong].tolist()]
    return [str(text) for text in texts]


def _optics(table: CsTable, noted: Noted) -> tuple[NDArray[np.intp], Texts]:
    """The optics group of each particle, numbered from 1, and their table."""
    names = [name for name in OPTICS if noted.get(name) is not None]
    exposure, of_micrograph = noted.get("ctf/exp_group_id"), noted.columns.get("location/exp_group_id")
    if exposure is None:
        exposure = of_micrograph
    if exposure is not None and of_micrograph is not None and np.array_equal(exposure, of_micrograph):
        noted.asked.add("location/exp_group_id")
    ids = np.zeros(len(table)) if exposure is None else exposure.astype(np.float64)
    shape = table.fields["blob/shape"].astype(np.float64)
    lens = _lens(table, noted)
    keys = np.column_stack(
        [ids, shape, *(_flat(table, name).astype(np.float64) for name in names), *lens.values()]
    )
    _, first, place = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    whole = ids[first].astype(np.int64)
    is_one_to_one = len(np.unique(whole)) == len(whole)
    numbers = whole + 1 if is_one_to_one else np.arange(len(first)) + 1
    optics: Texts = {
        "rlnOpticsGroupName": [
            f"exposure_group_{k}" if is_one_to_one else f"exposure_group_{k}_{n}"
            for k, n in zip(whole.tolist(), numbers.tolist(), strict=True)
        ],
        "rlnOpticsGroup": [str(number) for number in numbers.tolist()],
        "rlnImageSize": [str(int(size)) for size in shape[first, 1].tolist()],
        "rlnImageDimensionality": ["2"] * len(first),
    }
    if not is_one_to_one:  # then the numbers of the exposure groups stand in names alone
        noted.asked -= {"ctf/exp_group_id", "location/exp_group_id"}
    optics |= {OPTICS[name]: _texts(table.fields[name][first]) for name in names}
    for label, values in lens.items():
        to_star, to_cs = _of_lens(label, table, first)
        optics[label] = _texts(values[first], to_star, to_cs)
    return numbers[place.reshape(-1)], optics


def _lens(table: CsTable, noted: Noted) -> dict[str, Column]:
    """Distortion and beam tilt, as the .cs file has them, by the label of each; none where all are 0."""
    columns: dict[str, Column] = {}
    if noted.get("ctf/anisomag") is not None:
        anisomag = _flat(table, "ctf/anisomag", 4)
        columns |= dict(zip(MAG_MATRIX, anisomag.T, strict=True)) if anisomag.any() else {}
    if noted.get("ctf/tilt_A") is not None:
        tilt = _flat(table, "ctf/tilt_A", 2)
        cs_angst = MM_ANGST * np.abs(table.fields.get("ctf/cs_mm", np.zeros(len(table))))
        if tilt.any() and np.all(np.abs(tilt) < cs_angst[:, None]):
            columns |= dict(zip(BEAM_TILT, tilt.T, strict=True))
        elif tilt.any():
            noted.asked.discard("ctf/tilt_A")
    return columns


def _of_lens(label: str, table: CsTable, rows: NDArray[np.intp]) -> tuple[Convert, Convert]:
    """How numbers of ``_lens`` in these rows become those of a STAR file, and back."""
    if label in MAG_MATRIX:
        one = float(label in ("rlnMagMat00", "rlnMagMat11"))
        return lambda v: v + one, lambda v: v - one
    cs_mm = table.fields["ctf/cs_mm"][rows].astype(np.float64)
    return lambda v: beam_tilt_mrad(v, cs_mm), lambda v: tilt_angst(v, cs_mm)


def beam_tilt_mrad(tilt_angst: Reals, cs_mm: Reals) -> Reals:
    """RELION's beam tilt of ctf/tilt_A."""
    return 1e3 * np.arcsin(tilt_angst / (MM_ANGST * cs_mm))


def tilt_angst(beam_tilt_mrad: Reals, cs_mm: Reals) -> Reals:
    """ctf/tilt_A of RELION's beam tilt."""
    return MM_ANGST * cs_mm * np.sin(1e-3 * beam_tilt_mrad)


def _coordinates(table: CsTable, noted: Noted) -> Texts:
    """Centres in pixels of their micrographs."""
    names = ("location/center_x_frac", "location/center_y_frac", "location/micrograph_shape")
    if not all(name in noted.columns for name in names):
        return {}
    x, y, shape = (_flat(table, name, 2 if name == names[2] else 0) for name in names)
    noted.asked |= set(names)
    height, width = shape.astype(np.float64).T
    return {
        "rlnCoordinateX": _texts(x, lambda v: v * width, lambda v: v / width),
        "rlnCoordinateY": _texts(y, lambda v: v * height, lambda v: v / height),
    }


def _alignments(table: CsTable, noted: Noted) -> Texts:
    columns: Texts = {}
    is_3d = noted.get("alignments3D/pose") is not None
    is_2d = noted.get("alignments2D/pose") is not None
    if is_3d:
        pose = _flat(table, "alignments3D/pose", 3).astype(np.float64)
        euler = geometry.rotation_vectors_to_euler(pose)
        columns |= {label: [f"{a:.10g}" for a in euler[:, k]] for k, label in enumerate(EULER)}
        columns |= _origins(table, noted, "alignments3D", "rln")
        split = noted.get("alignments3D/split")
        if split is not None:
            columns["rlnRandomSubset"] = [str(int(half) + 1) for half in split.tolist()]
    if is_2d:
        prefix = "svae" if is_3d else "rln"
        pose = _flat(table, "alignments2D/pose")
        columns[f"{prefix}AnglePsi"] = _texts(pose, geometry.degrees, geometry.radians)
        columns |= _origins(table, noted, "alignments2D", prefix)
    for space, there in (("alignments2D", is_2d or not is_3d), ("alignments3D", is_3d and not is_2d)):
        number = noted.get(f"{space}/class") if there else None
        if number is not None:
            columns["rlnClassNumber"] = [str(int(k) + 1) for k in number.tolist()]
            if noted.get(f"{space}/class_posterior") is not None:
                columns[CLASS_PROBABILITY] = _texts(_flat(table, f"{space}/class_posterior"))
    return columns


def _origins(table: CsTable, noted: Noted, space: str, prefix: str) -> Texts:
    if noted.get(f"{space}/shift") is None:
        return {}
    shift = _flat(table, f"{space}/shift", 2)
    size_name = f"{space}/psize_A" if noted.get(f"{space}/psize_A") is not None else "blob/psize_A"
    size = _flat(table, size_name).astype(np.float64)
    return {
        f"{prefix}Origin{axis}Angst": _texts(shift[:, k], lambda v: v * size, lambda v: v / size)
        for k, axis in enumerate("XY")
    }


# --- STAR to .cs -----------------------------------------------------------------------------------


def cs_fields(columns: Noted, pixel_size_angst: Reals) -> dict[str, Column]:
    """The numeric fields of particles from their STAR columns (n,), as numbers by label.

    pixel_size_angst: (n,) of their images, which becomes alignments*/psize_A.
    """
    fields: dict[str, Column] = {}
    for pair in PAIRS:
        values = columns.get(pair.label)
        if values is not None:
            fields[pair.field] = pair.to_cs(values).astype(pair.dtype)
    fields |= _lens_fields(columns)
    fields |= _pose_fields(columns, pixel_size_angst)
    for field, ending in LATENTS.items():
        labels = [name for name in columns.columns if re.fullmatch(rf"svaeZ[1-9]\d*{ending}", name)]
        ordered = [columns.columns[f"svaeZ{k}{ending}"] for k in range(1, len(labels) + 1)]
        columns.asked |= set(labels)
        if ordered:
            fields[field] = np.column_stack(ordered).astype("<f4")
    return fields


def _lens_fields(columns: Noted) -> dict[str, Column]:
    """Distortion and beam tilt of STAR columns, where they are there whole."""
    fields: dict[str, Column] = {}
    wanted = {"ctf/anisomag": MAG_MATRIX, "ctf/tilt_A": (*BEAM_TILT, "rlnSphericalAberration")}
    for field, labels in wanted.items():
        if not all(label in columns.columns for label in labels):
            continue
        values = [columns.columns[label] for label in labels]
        columns.asked |= set(labels)
        if field == "ctf/anisomag":
            parts = np.column_stack(values) - np.eye(2).ravel()
        else:
            parts = np.column_stack([tilt_angst(each, values[2]) for each in values[:2]])
        fields[field] = parts.astype("<f4")
    return fields


def _pose_fields(columns: Noted, pixel_size_angst: Reals) -> dict[str, Column]:
    euler = [columns.get(label) for label in EULER]
    is_3d = any(angle is not None and bool(np.any(angle != 0)) for angle in euler[:2])
    zeros = np.zeros(len(pixel_size_angst))
    fields: dict[str, Column] = {}
    if is_3d:
        angles = np.column_stack([zeros if angle is None else angle for angle in euler])
        fields["alignments3D/pose"] = geometry.euler_to_rotation_vectors(angles).astype("<f4")
        origin = _origins_angst(columns, "rln", pixel_size_angst)
        fields |= _shift_fields("alignments3D", origin, pixel_size_angst)
        half = columns.get("rlnRandomSubset")
        if half is not None and np.isin(half, (1, 2)).all():
            fields["alignments3D/split"] = (half - 1).astype("<u4")
        else:
            columns.asked.discard("rlnRandomSubset")
    has_rln = any(label in columns.columns for label in POSE_2D)
    prefix = "svae" if is_3d or not has_rln else "rln"
    psi = columns.get(f"{prefix}AnglePsi")
    origin = _origins_angst(columns, prefix, pixel_size_angst)
    is_2d = psi is not None or origin is not None
    if is_2d:
        fields["alignments2D/pose"] = geometry.radians(zeros if psi is None else psi).astype("<f4")
        fields |= _shift_fields("alignments2D", origin, pixel_size_angst)
    number = columns.get("rlnClassNumber")
    if number is not None and np.all((number >= 1) & (number == np.rint(number))):
        space = "alignments3D" if is_3d and not is_2d else "alignments2D"
        fields[f"{space}/class"] = (number - 1).astype("<u4")
        probability = columns.get(CLASS_PROBABILITY)
        if probability is not None:
            fields[f"{space}/class_posterior"] = probability.astype("<f4")
    else:  # class 0, RELION's word for none, has no counterpart
        columns.asked.discard("rlnClassNumber")
    return fields


def _origins_angst(columns: Noted, prefix: str, pixel_size_angst: Reals) -> Reals | None:
    """Origins (n, 2), a missing axis being 0 as RELION takes it; None where there is none."""
    origin = [columns.get(f"{prefix}Origin{axis}Angst") for axis in "XY"]
    if prefix == "rln":  # RELION 3.0's are in pixels
        old = [columns.get(f"rlnOrigin{axis}") for axis in "XY"]
        origin = [
            here if here is not None or px is None else px * pixel_size_angst
            for here, px in zip(origin, old, strict=True)
        ]
    if all(axis is None for axis in origin):
        return None
    zeros = np.zeros(len(pixel_size_angst))
    return np.column_stack([zeros if axis is None else axis for axis in origin])


def _shift_fields(space: str, origin_angst: Reals | None, pixel_size_angst: Reals) -> dict[str, Column]:
    size = pixel_size_angst.astype("<f4")
    origin = np.zeros((len(size), 2)) if origin_angst is None else origin_angst
    shift = origin / size[:, None].astype(np.float64)
    return {f"{space}/shift": shift.astype("<f4"), f"{space}/psize_A": size}
