"""A selection brought onto another extraction of the same particles: found there, with its poses.

A particle at p = -o of its box (o the origin) lies at c - o in its micrograph, c the middle of the box. So
where another extraction is centred at c', its origin is o + c' - c: psi and the place in the micrograph
stay, whatever the box and the pixel size. RELION re-centres by the origins, to whole pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.cs import CsTable, is_cs, read_particles_cs, write_cs
from cryo_svae.formats.star import Numbers, StarBlock, StarFile, read_star, write_star
from cryo_svae.particles.close_picks import PLACE, micrograph_pixel_sizes
from cryo_svae.particles.particle_set import ParticleColumns, find_blocks, pixel_sizes
from cryo_svae.particles.star_and_cs import UID, Noted, cs_fields, star_of_cs
from cryo_svae.results.selection import (
    SelectionConfig,
    distance,
    read_job_particles,
    refuse_itself,
    select_rows,
    settle,
)

Reals = NDArray[np.float64]
Rows = NDArray[np.intp]

CARRIED = re.compile(
    r"svae(?!AnglePsi|Origin[XY]Angst)|rln(ClassNumber|MaxValueProbDistribution|ParticleFigureOfMerit)$"
)
NAMED = 5  # lines of particles that are named
SURE_PX = 1.0  # re-centring is to whole pixels: places farther from what origins say were moved otherwise


@dataclass(frozen=True)
class _File:
    """Particles of a file, with where they lie.

    place: (n, 2) in Å of their micrographs, or in pixels where ``is_px``; None where it is not known.
    names: their micrographs.
    """

    star: StarFile
    block: StarBlock
    size_angst: Reals | None
    cs: CsTable | None = None

    @property
    def has_places(self) -> bool:
        return all(self.block.has(label) for label in PLACE)

    def places_px(self) -> Reals:
        return np.column_stack([self.block.numbers(label) for label in PLACE[1:]])

    def uids(self) -> list[str]:
        return self.block.text(UID) if self.block.has(UID) else []


@dataclass(frozen=True)
class Partners:
    """Which of n rows are which of another file's.

    theirs: (n,) their row, or -1.
    unclear: (n,) rows that may be several, or that share theirs with another.
    how:    in words.
    """

    theirs: Rows
    unclear: NDArray[np.bool_]
    how: str


def select_onto(job: Path, out: Path, config: SelectionConfig, onto: Path) -> list[str]:
    """Writes the particles of another file that a selection of a job allows, with the job's poses.

    Returns lines that say how many there are, and which were not found.
    """
    config, _ = settle(job, config)
    star, block = read_job_particles(job)
    rows = select_rows(star, block, config)
    ours, other = _file(star, block), _read(onto)
    _check_out(out, other)
    partners = _partners(ours, rows, other, config.tolerance)
    found = partners.theirs >= 0
    if not found.any():
        raise InputError(
            "--onto",
            found=f"none of the {len(rows):,} selected particles in {onto}",
            expected="another extraction of the same particles",
            remedy="check that its micrographs are the same; --tolerance says how far places may differ.",
        )
    order = np.argsort(partners.theirs[found], kind="stable")
    mine, theirs = rows[found][order], partners.theirs[found][order]
    moved, note = _moved(ours, mine, other, theirs)
    _write(out, ours, mine, other, theirs, moved)
    lines = [f"{len(mine):,} of {len(rows):,} selected particles are in {onto}, {partners.how}{note}"]
    for words, which in (("not there", ~found & ~partners.unclear), ("unclear", partners.unclear)):
        if which.any():
            lines.append(f"{words}: {int(which.sum()):,}, of {star.path} {_named(block, rows[which])}")
    return [*lines, f"{len(mine):,} particles in {out}"]


def _named(block: StarBlock, rows: Rows) -> str:
    lines = ", ".join(str(block.line_of(int(row))) for row in rows[:NAMED])
    return f"line(s) {lines}" + (", …" if len(rows) > NAMED else "")


def _file(star: StarFile, block: StarBlock, cs: CsTable | None = None) -> _File:
    columns = ParticleColumns(star, block, star.block("optics"))
    return _File(star, block, micrograph_pixel_sizes(columns), cs)


def _read(path: Path) -> _File:
    if is_cs(path):
        table = read_particles_cs(path)
        star, _ = star_of_cs(table)
        return _file(star, find_blocks(star)[0], table)
    star = read_star(path)
    return _file(star, find_blocks(star)[0])


def _check_out(out: Path, other: _File) -> None:
    """Raises InputError where the file to write is of another form than the other extraction's."""
    if is_cs(out) != (other.cs is not None):
        raise InputError(
            "--out",
            found=f"'{out}' with --onto {other.star.path}",
            expected="two .star files, or two .cs files",
            remedy="write the form that --onto has; cryo-svae convert makes the other of it.",
        )
    refuse_itself(out, other.star.path)


# --- the same particles ----------------------------------------------------------------------------


def _partners(ours: _File, rows: Rows, other: _File, tolerance: str) -> Partners:
    """By uid where both files have some in common, else by place."""
    mine, theirs = ours.uids(), other.uids()
    if set(mine) & set(theirs):
        return by_uid([mine[row] for row in rows.tolist()], theirs)
    for each in (ours, other):
        for label in PLACE:
            if not each.block.has(label):
                raise InputError(
                    each.star.path,
                    column=f"_{label}",
                    found="no such column, and no uids in common",
                    expected="the micrograph and the place of each particle",
                    remedy="add the columns of the extraction job.",
                )
    return _by_place(ours, rows, other, tolerance)


def by_uid(mine: list[str], theirs: list[str]) -> Partners:
    """Partners of the same uid; unclear is one that the other file has twice."""
    row_of = {uid: row for row, uid in enumerate(theirs)}
    times = Counter(theirs)
    unclear = np.array([times[uid] > 1 for uid in mine], dtype=bool)
    found = np.array([row_of.get(uid, -1) for uid in mine], dtype=np.intp)
    return Partners(np.where(unclear, -1, found), unclear, "by uid")


def _by_place(ours: _File, rows: Rows, other: _File, tolerance: str) -> Partners:
    number, is_px = distance(tolerance, "tolerance")
    sizes = _sizes(ours, other)
    if sizes is None and not is_px:
        raise InputError(
            "--tolerance",
            found=f"{tolerance} Å, and no pixel size of the micrographs in either file",
            expected="rlnMicrographPixelSize, or a distance in pixels of rlnCoordinateX",
            remedy="give it in these pixels, e.g. --tolerance 8px.",
        )
    mine, theirs = ours.places_px()[rows], other.places_px()
    pixel = 1.0
    picked = {"at the same places": mine}
    if sizes is not None:
        size, their_size = sizes[0][rows], sizes[1]
        pixel = float(np.median(their_size))
        mine, theirs = mine * size[:, None], theirs * their_size[:, None]
        picked = {"at the same places": mine, "re-centred": mine - _origins_angst(ours.block)[rows]}
    within = number * pixel if is_px and sizes is not None else number
    here, there = map(np.array, _same_names(ours.block.text(PLACE[0]), other.block.text(PLACE[0])))
    # another extraction is centred either on the picks or on the particles, all through
    tried = {how: nearest(place, here[rows], theirs, there, within, pixel) for how, place in picked.items()}
    how = min(tried, key=lambda each: (-int((tried[each][0].theirs >= 0).sum()), tried[each][1]))
    partners, _ = tried[how]
    return Partners(partners.theirs, partners.unclear, f"by place ({how})")


def _same_names(mine: list[str], theirs: list[str]) -> tuple[list[str], list[str]]:
    """Micrographs' names as they can be compared: whole, or their last parts where no whole one agrees."""
    if set(mine) & set(theirs):
        return mine, theirs
    return [Path(name).name for name in mine], [Path(name).name for name in theirs]


def nearest(
    mine: Reals, here: NDArray[np.str_], theirs: Reals, there: NDArray[np.str_], within: float, pixel: float
) -> tuple[Partners, float]:
    """The nearest of their places (m, 2) to each of mine (n, 2), no farther than ``within``; and the mean
    distance.

    here, there: the micrographs of both, which must be the same.
    Unclear are those to which a second is as near within a factor of two and a pixel, and those that share
    one.
    """
    from scipy.spatial import cKDTree  # costs a tenth of a second

    _, number = np.unique(np.concatenate([here, there]), return_inverse=True)
    apart = 10.0 * within * number.astype(np.float64)
    known = np.isfinite(theirs).all(1)
    points = np.column_stack([theirs, apart[len(mine) :]])[known]
    sought = np.column_stack([np.nan_to_num(mine, nan=-1e9), apart[: len(mine)]])
    far, index = cKDTree(points).query(sought, k=2, distance_upper_bound=within * (1 + 1e-9))
    found = np.isfinite(far[:, 0])
    row = np.full(len(mine), -1, dtype=np.intp)
    row[found] = np.flatnonzero(known)[index[found, 0]]
    unclear = found & (far[:, 1] <= 2.0 * far[:, 0] + pixel)
    taken = np.bincount(row[found], minlength=len(theirs))
    unclear |= found & (taken[row] > 1)
    mean = float(far[found, 0].mean()) if found.any() else within
    return Partners(np.where(unclear, -1, row), unclear, ""), mean


def _sizes(ours: _File, other: _File) -> tuple[Reals, Reals] | None:
    """Pixel sizes of the micrographs for both files, from one where the other has none."""
    mine, theirs = ours.size_angst, other.size_angst
    if mine is None:
        return None if theirs is None else (np.full(ours.block.n_rows, np.median(theirs)), theirs)
    return mine, np.full(other.block.n_rows, np.median(mine)) if theirs is None else theirs


# --- their poses -----------------------------------------------------------------------------------


def _pose_prefix(block: StarBlock) -> str:
    return "svae" if block.has("svaeAnglePsi") else "rln"


def _origins_angst(block: StarBlock) -> Reals:
    prefix = _pose_prefix(block)
    return np.column_stack([block.numbers(f"{prefix}Origin{axis}Angst") for axis in "XY"])


def _moved(ours: _File, mine: Rows, other: _File, theirs: Rows) -> tuple[Reals, str]:
    """How far the middle of each box (m, 2) moved in Å, and a remark where that is no re-centring."""
    if not (ours.has_places and other.has_places):
        return np.zeros((len(mine), 2)), "; places are not known, and taken to be the same"
    before, after = ours.places_px()[mine], other.places_px()[theirs]
    sizes = _sizes(ours, other)
    if sizes is None:
        if np.abs(after - before).max() > 1e-3:
            raise InputError(
                other.star.path,
                column=f"_{PLACE[1]}",
                found="places that differ from the job's, and no pixel size of the micrographs in a file",
                expected="rlnMicrographPixelSize, by which origins in Å follow",
                remedy="add it to data_optics of one of them.",
            )
        return np.zeros((len(mine), 2)), ""
    moved = after * sizes[1][theirs][:, None] - before * sizes[0][mine][:, None]
    left = np.hypot(*(moved + _origins_angst(ours.block)[mine]).T) / sizes[1][theirs]
    far = float(np.median(np.hypot(*moved.T) / sizes[1][theirs]))
    if far > SURE_PX and float(np.median(left)) > SURE_PX:
        return moved, (
            f"; their places are {far:.1f} px from the job's, and not where its origins would move them: "
            "check that they are the same particles, and the micrographs' pixel size"
        )
    return moved, ""


def _write(out: Path, ours: _File, mine: Rows, other: _File, theirs: Rows, moved: Reals) -> None:
    block = ours.block
    origin = _origins_angst(block)[mine] + moved
    numbers: dict[str, Reals] = {
        "AnglePsi": block.numbers(f"{_pose_prefix(block)}AnglePsi")[mine],
        "OriginXAngst": origin[:, 0],
        "OriginYAngst": origin[:, 1],
    }
    carried = [label for label in block.labels if CARRIED.match(label)]
    if other.cs is not None:
        columns = {f"rln{name}": values for name, values in numbers.items()}
        columns |= {label: block.numbers(label)[mine] for label in carried}
        size = other.cs.fields["blob/psize_A"][theirs].astype(np.float64)
        table = other.cs.take(theirs)
        write_cs(out, table.with_fields(cs_fields(Noted(columns), size)).fields)
        return
    optics = other.star.block("optics")
    prefix = "svae" if _pose_prefix(block) == "svae" or _has_3d_pose(other.block) else "rln"
    if prefix == "rln" and optics is None:  # RELION 3.0 reads origins in pixels
        size = pixel_sizes(ParticleColumns(other.star, other.block, None), None)[theirs]
        numbers |= {"OriginX": origin[:, 0] / size, "OriginY": origin[:, 1] / size}
    cells: dict[str, list[str] | Numbers] = {
        f"{prefix}{name}": Numbers(values, "%.6f") for name, values in numbers.items()
    }
    for label in carried:
        texts = block.text(label)
        cells[label] = [texts[row] for row in mine.tolist()]
    write_star(out, other.star, block=other.block.name, columns=cells, rows=theirs)


def _has_3d_pose(block: StarBlock) -> bool:
    angles = [block.numbers(label) for label in ("rlnAngleRot", "rlnAngleTilt") if block.has(label)]
    return any(bool(np.any(each != 0)) for each in angles)
