"""Some of a job's particles: by class, by an expression, by a list, the best ones, or the others.

Expressions such as ``figure_of_merit > 0.4 and z1 > 0`` are parsed to Python's syntax tree and
walked here, where only what ``_Expression`` names is known; nothing is ever evaluated by Python.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cryo_svae.config import check, option
from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.cs import is_cs, read_cs, write_cs
from cryo_svae.formats.star import StarBlock, StarFile, read_star, write_star
from cryo_svae.results.class_table import class_centres, propose
from cryo_svae.results.views import evened, most_by_balance, views_of

Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]

PARTICLES = "particles.star"
CS_PARTICLES = "particles.cs"
LONGEST_EXPRESSION = 2000
SHORT_NAMES = {
    "psi": ("svaeAnglePsi", "rlnAnglePsi"),
    "psi_std": ("svaePsiStd",),
    "x": ("svaeOriginXAngst", "rlnOriginXAngst"),
    "y": ("svaeOriginYAngst", "rlnOriginYAngst"),
    "class_number": ("rlnClassNumber",),
    "class_probability": ("rlnMaxValueProbDistribution",),
    "figure_of_merit": ("rlnParticleFigureOfMerit",),
    "log_likelihood": ("svaeLogLikelihood",),
}


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which particles: those that every option given allows."""

    classes: str | None = option(None, "their classes, e.g. 1,4-7")
    auto: bool = option(
        False,
        "the classes that size, figure of merit and resolution speak for; all are listed, with the reasons "
        "for what is left out: noise is, but not what aligns well and is something else",
    )
    where: str | None = option(
        None,
        "a condition, e.g. 'figure_of_merit > 0.4 and z1 > 0': any numeric column by its label, or z1, "
        "z2, …, psi, psi_std (degrees), x, y (origin, Å), class_number, class_probability, "
        "figure_of_merit, log_likelihood, defocus (Å); with + - * / abs() and or not < <= == != >= >",
    )
    particles: Path | None = option(
        None, "a text file of particle numbers, counted from 1, such as the report's lasso saves"
    )
    top: str | None = option(
        None, "the best of what the other options allow, by figure of merit, e.g. 50%%"
    )
    min_distance: str | None = option(
        None,
        "of particles picked twice, nearer than this in one micrograph (in Å, e.g. 40, or in pixels of "
        "rlnCoordinateX, e.g. 40px), only the one of the highest figure of merit",
    )
    at_most_per_view: int | None = option(
        None,
        "of each view (classes side by side in z) at most so many of what other options allow, the best "
        "by figure of merit",
    )
    balance: float | None = option(
        None, "the same, so many that views are as full as they are (0), or as the least full one (1)"
    )
    invert: bool = option(False, "take all the others instead")
    onto: Path | None = option(
        None,
        "another extraction of the same particles (unbinned, re-centred, of another box): its rows of them "
        "are written, with the job's poses, classes and z; found by uid, or by micrograph and place",
    )
    tolerance: str = option(
        "20",
        "how far places may differ for --onto (in Å, e.g. 20, or in pixels of rlnCoordinateX, e.g. 8px)",
    )
    templates: Path | None = option(
        None,
        "also write the averages of the classes of --classes or --auto as templates for picking: this STAR "
        "file, and the stack beside it",
    )

    def __post_init__(self) -> None:
        if self.min_distance is not None:
            distance(self.min_distance, "min_distance")
        distance(self.tolerance, "tolerance")
        most, balance = self.at_most_per_view, self.balance
        check(most is None or most >= 1, "at_most_per_view", most, "1 or more")
        check(balance is None or 0 <= balance <= 1, "balance", balance, "0 to 1")
        check(most is None or balance is None, "balance", balance, "it, or --at-most-per-view")
        given = (self.classes, self.where, self.particles, self.top, self.min_distance, most, balance)
        if given == (None,) * len(given) and not self.auto:
            raise InputError(
                "the command line",
                found="nothing to select by",
                expected="--classes, --auto, --where, --particles, --min-distance, --top, --balance or "
                "--at-most-per-view",
                remedy="say which particles, e.g. --top 50%.",
            )
        if self.auto and self.classes is not None:
            raise InputError(
                "--auto",
                found=f"--classes {self.classes} with it",
                expected="one of the two",
                remedy="leave one out: --auto names the classes that it takes.",
            )
        if self.templates is not None and not self.auto and self.classes is None:
            raise InputError(
                "--templates",
                found="no classes to make templates of",
                expected="--classes or --auto with it",
                remedy="name the classes.",
            )


def distance(text: str, option_name: str) -> tuple[float, bool]:
    """A distance such as ``40`` or ``40px``: the number, and whether it is in pixels instead of Å."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(px)?\s*", text, re.ASCII)
    number = float(match[1]) if match else math.nan
    check(0 < number < math.inf, option_name, text, "Å above 0, e.g. 40, or pixels, e.g. 40px")
    return number, bool(match and match[2])


def settle(job: Path, config: SelectionConfig) -> tuple[SelectionConfig, list[str]]:
    """A selection with the classes that --auto stands for named, and lines that say which and why."""
    if not config.auto:
        return config, []
    text, lines = propose(job)
    return replace(config, auto=False, classes=text), lines


def select(job: Path, out: Path, config: SelectionConfig) -> tuple[int, int]:
    """Writes the particles of a job that a selection allows; how many they are, and of how many."""
    config, _ = settle(job, config)
    star, block = read_job_particles(job)
    rows = select_rows(star, block, config)
    if is_cs(out):
        _write_cs_selection(job, block, out, rows)
    else:
        write_selection(star, block, out, rows)
    return len(rows), block.n_rows


def read_job_particles(job: Path) -> tuple[StarFile, StarBlock]:
    """A job's particles.star and its block of particles."""
    path = job / PARTICLES
    if not path.is_file():
        raise InputError(
            job,
            found=f"no {PARTICLES}",
            expected="the folder of a finished job",
            remedy="name the --out folder of cryo-svae run or estimate.",
        )
    star = read_star(path)
    for block in (star.block("particles"), *star.blocks):
        if block is not None and block.has("rlnImageName"):
            return star, block
    raise InputError(
        path,
        column="_rlnImageName",
        found="no such column",
        expected="particles as a job writes them",
        remedy="run the job again.",
    )


def select_rows(star: StarFile, block: StarBlock, config: SelectionConfig) -> NDArray[np.intp]:
    """Rows of the particles that a selection allows, in file order; an empty selection is an error."""
    kept = np.ones(block.n_rows, dtype=bool)
    if config.classes is not None:
        kept &= in_classes(block, config.classes)
    if config.where is not None:
        kept &= fulfils(block, config.where)
    if config.particles is not None:
        kept &= listed(config.particles, block.n_rows)
    if config.min_distance is not None:
        kept = without_duplicates(star, block, kept, config.min_distance)
    if config.top is not None:
        kept = best_of(block, kept, config.top)
    if config.at_most_per_view is not None or config.balance is not None:
        kept = by_view(star, block, kept, config)
    if config.invert:
        kept = ~kept
    if not kept.any():
        raise InputError(
            "the selection",
            found=f"none of {block.n_rows} particles",
            expected="one or more",
            remedy="loosen it; --invert takes the others.",
        )
    return np.flatnonzero(kept)


def write_selection(star: StarFile, block: StarBlock, out: Path, rows: NDArray[np.intp]) -> None:
    """The same STAR file with these rows of its particles; optics and cells to the letter."""
    refuse_itself(out, star.path)
    write_star(out, star, block=block.name, columns={}, rows=rows)


def refuse_itself(out: Path, selected_from: Path) -> None:
    """Raises OutputError where a selection would overwrite what it is made from."""
    if out.exists() and out.samefile(selected_from):
        raise OutputError(f"{out}: is the file selected from.\n  To mend: give --out another name.")


def _write_cs_selection(job: Path, block: StarBlock, out: Path, rows: NDArray[np.intp]) -> None:
    """The same rows of the job's particles.cs, every field to the byte."""
    path = job / CS_PARTICLES
    if not path.is_file():
        raise InputError(
            "--out",
            found=f"'{out}', but the job has no {CS_PARTICLES}",
            expected="a .star file, for a job of a STAR file",
            remedy="select to a .star file; cryo-svae convert makes a .cs file of it.",
        )
    refuse_itself(out, path)
    table = read_cs(path)
    if len(table) != block.n_rows:
        raise InputError(
            path,
            found=f"{len(table)} rows",
            expected=f"{block.n_rows}, as in {PARTICLES}",
            remedy="run cryo-svae estimate again.",
        )
    write_cs(out, table.take(rows).fields)


def in_classes(block: StarBlock, text: str) -> Flags:
    """Particles (n,) of classes such as ``1,4-7``."""
    number = block.integers("rlnClassNumber")
    return named_classes(text, int(number.max(initial=0)))[np.maximum(number, 0)]


def named_classes(text: str, most: int) -> Flags:
    """Which of the numbers 0 … most (``most`` + 1,) a list of classes such as ``1,4-7`` names."""
    wanted = np.zeros(most + 1, dtype=bool)
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= most:
            raise InputError(
                "--classes",
                found=f"'{part.strip()}'",
                expected=f"classes from 1 to {most}, such as 1,4-7",
                remedy="see classes.star or report.html for the classes there are.",
            )
        wanted[first : last + 1] = True
    return wanted


def listed(path: Path, n_particles: int) -> Flags:
    """Particles (n,) whose numbers, counted from 1, stand in a text file: a line each, or by commas."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            path,
            found=getattr(error, "strerror", None) or "a file that is not text",
            expected="a text file of particle numbers",
            remedy="give the file that the report's lasso saved.",
        ) from error
    wanted = np.zeros(n_particles, dtype=bool)
    for line, text in enumerate(lines, start=1):
        for word in text.replace(",", " ").split():
            if not re.fullmatch(r"\d{1,12}", word, re.ASCII) or not 1 <= int(word) <= n_particles:
                raise InputError(
                    path,
                    line=line,
                    found=f"'{word}'",
                    expected=f"particle numbers from 1 to {n_particles}",
                    remedy="use a list made from this job.",
                )
            wanted[int(word) - 1] = True
    return wanted


def best_of(block: StarBlock, kept: Flags, text: str) -> Flags:
    """The share, such as ``50%``, of the kept particles with the highest figures of merit."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", text, re.ASCII)
    share = float(match[1]) / 100 if match else math.nan
    if not 0 < share <= 1:
        raise InputError(
            "--top",
            found=f"'{text}'",
            expected="a share above 0%, at most 100%",
            remedy="write e.g. --top 50%.",
        )
    merit = block.numbers("rlnParticleFigureOfMerit")
    rows = np.flatnonzero(kept)
    best = rows[np.argsort(-merit[rows], kind="stable")[: math.ceil(share * len(rows) - 1e-9)]]
    chosen = np.zeros_like(kept)
    chosen[best] = True
    return chosen


def by_view(star: StarFile, block: StarBlock, kept: Flags, config: SelectionConfig) -> Flags:
    """The kept particles, evened out over the views of the job that they are of."""
    view = views_of(class_centres(star.path.parent))
    of_particle = view[np.clip(block.integers("rlnClassNumber") - 1, 0, len(view) - 1)]
    most = config.at_most_per_view
    if most is None:
        most = most_by_balance(np.bincount(of_particle[kept]), config.balance or 0.0)
    return evened(of_particle, block.numbers("rlnParticleFigureOfMerit"), kept, most)


def without_duplicates(star: StarFile, block: StarBlock, kept: Flags, text: str) -> Flags:
    """The kept particles without those nearer to a better one of their micrograph than a distance.

    From the highest figure of merit down, each that is still there takes its neighbours out.
    """
    least, is_px = distance(text, "min_distance")
    place = _places(star, block, is_px)
    merit = block.numbers("rlnParticleFigureOfMerit")
    _, micrograph = np.unique(block.text("rlnMicrographName"), return_inverse=True)
    order = np.flatnonzero(kept)
    order = order[np.lexsort((-merit[order], micrograph[order]))]
    alone = kept.copy()
    for rows in np.split(order, np.flatnonzero(np.diff(micrograph[order])) + 1):
        for k, row in enumerate(rows):
            if alone[row]:
                later = rows[k + 1 :]
                alone[later[np.hypot(*(place[later] - place[row]).T) < least]] = False
    return alone


def _places(star: StarFile, block: StarBlock, is_px: bool) -> Reals:
    """Places (n, 2) in the micrographs, in their pixels or in Å."""
    for label in ("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY"):
        if not block.has(label):
            raise InputError(
                "--min-distance",
                found=f"particles without {label}",
                expected="the micrograph and the place of each",
                remedy="leave it out, or add the columns of the extraction job.",
            )
    place = np.column_stack([block.numbers("rlnCoordinateX"), block.numbers("rlnCoordinateY")])
    if is_px:
        return place
    from cryo_svae.particles.close_picks import micrograph_pixel_sizes
    from cryo_svae.particles.particle_set import ParticleColumns  # with torch, which costs a second

    size_angst = micrograph_pixel_sizes(ParticleColumns(star, block, star.block("optics")))
    if size_angst is None:
        raise InputError(
            "--min-distance",
            found="a distance in Å, and no pixel size of the micrographs in the file",
            expected="rlnMicrographPixelSize, or a distance in pixels of rlnCoordinateX",
            remedy="give it in these pixels, e.g. --min-distance 40px.",
        )
    return place * size_angst[:, None]


# --- expressions -----------------------------------------------------------------------------------


def fulfils(block: StarBlock, expression: str) -> Flags:
    """Particles (n,) for which an expression over their columns is true.

    Comparisons (chained too) of numbers by < <= == != >= >, joined by and, or, not; numbers are
    literals, names, abs(), + - * / and parentheses. Dividing by zero gives inf or nan, as in numpy.
    Raises InputError, which shows the expression with the place marked.
    """
    return _Expression(block, " ".join(expression.split())).flags()


def names_of(block: StarBlock) -> list[str]:
    """The short names that expressions may use for these particles."""
    short = [name for name, labels in SHORT_NAMES.items() if any(map(block.has, labels))]
    z = [f"z{match[1]}" for label in block.labels if (match := re.fullmatch(r"svaeZ(\d+)", label))]
    defocus = ["defocus"] if block.has("rlnDefocusU") and block.has("rlnDefocusV") else []
    return [*z, *short, *defocus]


COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
}
CALCULATE: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _joined(join: np.ufunc, parts: list[Flags]) -> Flags:
    return np.asarray(join.reduce(np.broadcast_arrays(*parts)))


class _Expression:
    """An expression, walked node by node; every value is an array (n,) or a single number."""

    def __init__(self, block: StarBlock, text: str) -> None:
        self.block, self.text = block, text

    def flags(self) -> Flags:
        """Its truth for each row."""
        if len(self.text) > LONGEST_EXPRESSION:
            self._fail(None, f"{len(self.text)} characters", f"at most {LONGEST_EXPRESSION}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's remarks on odd literals
                tree = ast.parse(self.text, mode="eval")
            with np.errstate(all="ignore"):
                value = self._truth(tree.body)
        except SyntaxError as error:
            self._fail_at((error.offset or 1) - 1, 1, "something unreadable", "a condition")
        except (RecursionError, MemoryError, ValueError):
            self._fail(None, "an expression that cannot be read", "a condition")
        return np.broadcast_to(value, self.block.n_rows)

    def _truth(self, node: ast.expr) -> Flags:
        match node:
            case ast.BoolOp(op=ast.And(), values=parts):
                return _joined(np.logical_and, [self._truth(part) for part in parts])
            case ast.BoolOp(values=parts):
                return _joined(np.logical_or, [self._truth(part) for part in parts])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self._truth(operand)
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                for op, right in zip(ops, others, strict=True):
                    if type(op) not in COMPARE:
                        self._fail(right, "a comparison that is not known here", "< <= == != >= or >")
                numbers = [self._number(side) for side in sides]
                truths = [
                    COMPARE[type(op)](a, b) for op, a, b in zip(ops, numbers[:-1], numbers[1:], strict=True)
                ]
                return _joined(np.logical_and, truths)
        self._fail(node, "something that is no condition", "a comparison such as z1 > 0")

    def _number(self, node: ast.expr) -> Reals:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return self._literal(node, value)
            case ast.Name(id=name):
                return self._column(node, name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in CALCULATE:
                result: Reals = CALCULATE[type(op)](self._number(left), self._number(right))
                return result
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._number(operand)
            case ast.Call(func=ast.Name(id="abs"), args=[argument], keywords=[]):
                return np.asarray(np.abs(self._number(argument)))
        self._fail(node, "something that is no number", "a number, a name, + - * / or abs()")

    def _literal(self, node: ast.expr, value: float) -> Reals:
        try:
            return np.asarray(float(value))
        except OverflowError:
            self._fail(node, "a number too large", "a number below 1e308")

    def _column(self, node: ast.expr, name: str) -> Reals:
        if name == "defocus" and name in names_of(self.block):
            return (self._cells(node, "rlnDefocusU") + self._cells(node, "rlnDefocusV")) / 2
        labels = SHORT_NAMES.get(name, (name,))
        if match := re.fullmatch(r"z(\d+)", name, re.ASCII):
            labels = (f"svaeZ{match[1]}",)
        for label in labels:
            if self.block.has(label):
                return self._cells(node, label)
        known = ", ".join([*names_of(self.block), *self.block.labels])
        self._fail(node, f"the unknown name '{name}'", f"one of {known}")

    def _cells(self, node: ast.expr, label: str) -> Reals:
        try:
            return self.block.numbers(label)
        except InputError as error:
            self._fail(node, f"the column {label}, which holds {error.found}", "a column of numbers")

    def _fail(self, node: ast.expr | None, found: str, expected: str) -> NoReturn:
        if node is None or node.end_col_offset is None:
            self._fail_at(0, len(self.text), found, expected)
        raw = self.text.encode()
        start = len(raw[: node.col_offset].decode())
        self._fail_at(start, len(raw[node.col_offset : node.end_col_offset].decode()), found, expected)

    def _fail_at(self, start: int, width: int, found: str, expected: str) -> NoReturn:
        shown = self.text[:LONGEST_EXPRESSION]
        mark = " " * start + "^" * max(1, min(width, len(shown) - start))
        raise InputError(
            "--where",
            found=found,
            expected=expected,
            remedy=f"change what is marked.\n    {shown}\n    {mark}",
        )
