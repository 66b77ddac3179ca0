"""A STAR file in memory: its tables, which refer to the bytes of the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError

SPACE = 32  # every byte up to the space separates cells
WHITE = bytes(range(SPACE + 1))
CONTROL = bytes(set(range(SPACE)) - set(b"\t\n\r"))  # no text of ours or of others holds them
CHUNK_ROWS = 8000  # no power of two, at which transposing is slow
_WIDEST = 256
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf|infinity|nan)", re.I | re.A)
_LARGEST_EXACT_INTEGER = 2.0**53


@dataclass(frozen=True, eq=False)
class Text:
    """A file's bytes and where its lines begin."""

    path: Path
    data: bytes
    line_starts: NDArray[np.int64]  # one more than there are lines: the last is the file's length

    @property
    def buffer(self) -> NDArray[np.uint8]:
        """The bytes as an array."""
        return np.frombuffer(self.data, np.uint8)

    def line(self, index: int) -> bytes:
        """The line, without its end."""
        return self.data[self.line_starts[index] : self.line_starts[index + 1]].rstrip(b"\r\n")

    def fail(
        self, index: int, found: str, expected: str, remedy: str, column: str | None = None
    ) -> NoReturn:
        """Raises the InputError of a line."""
        raise InputError(
            self.path, line=index + 1, column=column, found=found, expected=expected, remedy=remedy
        )


@dataclass(frozen=True, eq=False)
class StarBlock:
    """One table of a STAR file: a loop, or a list of labels with one value each (one row).

    name:    what follows ``data_``; often empty in RELION 3.0 files.
    labels:  column names in file order, without the leading underscore.
    is_loop: False for a list.
    n_rows:  rows of the loop; 1 for a list (0 where it has no labels at all).
    """

    name: str
    labels: tuple[str, ...]
    is_loop: bool
    n_rows: int
    _text: Text = field(repr=False)
    _label_lines: tuple[int, ...] = field(repr=False)
    _lines: NDArray[np.int64] = field(repr=False)  # (n_rows,) of a loop, (n_labels,) of a list
    _bounds: NDArray[np.uint32] = field(repr=False)
    # (n_rows, n_labels + 1) places in the row's line where cells begin, and where the last one ends;
    # of a list: (n_labels, 2) places in the value's line where the value begins and ends

    def has(self, label: str) -> bool:
        """Whether there is such a column."""
        return label in self.labels

    def text(self, label: str) -> list[str]:
        """The cells of a column as text, without their quotes."""
        column = self._column(label)
        texts: list[str] = []
        for chunk in self._chunks():
            cells = self._cells(column, chunk)
            if cells is None or np.isin(cells[:, 0], list(b"\"';")).any():
                texts += map(unquote, self._raw(column, chunk))
            else:
                texts += decode(b"\n".join(_joined(cells).tolist())).split("\n")
        return texts

    def numbers(self, label: str) -> NDArray[np.float64]:
        """The cells of a column as numbers; nan and inf, where a program wrote them, come as such.

        Raises InputError at the first cell that is not a number.
        """
        column = self._column(label)
        values = np.empty(self.n_rows)
        for chunk in self._chunks():
            values[chunk] = self._parse(column, chunk)
        return values

    def integers(self, label: str) -> NDArray[np.int64]:
        """The cells of a column as whole numbers (``3`` or ``3.000000``)."""
        values = self.numbers(label)
        bad = ~(
            np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < _LARGEST_EXACT_INTEGER)
        )
        if bad.any():
            self._fail(self._column(label), int(bad.argmax()), "a whole number")
        return values.astype(np.int64)

    def line_of(self, row: int) -> int:
        """The 1-based line of the file on which a row stands (of a list: its first value)."""
        return int(self._lines[row]) + 1

    def _column(self, label: str) -> int:
        if label in self.labels:
            return self.labels.index(label)
        known = ", ".join(f"_{name}" for name in self.labels) or "no labels"
        raise InputError(
            self._text.path,
            found=f"no column _{label} in block data_{self.name}, which has {known}",
            expected=f"a column _{label}",
            remedy=f"give a file whose block data_{self.name} has _{label}.",
        )

    def _chunks(self) -> Iterator[slice]:
        return (slice(at, min(at + CHUNK_ROWS, self.n_rows)) for at in range(0, self.n_rows, CHUNK_ROWS))

    def _spans(
        self, column: int, rows: slice | NDArray[np.intp]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the cells begin in the file, and where they end or white space follows them."""
        if not self.is_loop:
            start, stop = self._bounds[column] + self._text.line_starts[self._lines[column]]
            n = len(np.arange(1)[rows])
            return np.full(n, start, np.int64), np.full(n, stop, np.int64)
        line = self._text.line_starts[self._lines[rows]]
        return line + self._bounds[rows, column], line + self._bounds[rows, column + 1]

    def _raw(self, column: int, rows: slice | NDArray[np.intp]) -> list[bytes]:
        """The cells as they stand in the file, with their quotes."""
        return [cell.rstrip(WHITE) for cell in slices(self._text.data, *self._spans(column, rows))]

    def _cells(self, column: int, rows: slice) -> NDArray[np.uint8] | None:
        """The bytes of cells (n, width), zeros behind each; None where one is empty or long."""
        starts, stops = self._spans(column, rows)
        cells = windows(self._text.buffer, starts, stops)
        if cells is None or not (stops > starts).all():
            return None
        cells[cells <= SPACE] = 0  # between this cell and the next
        return cells

    def _parse(self, column: int, rows: slice) -> NDArray[np.float64]:
        cells = self._cells(column, rows)
        if cells is not None and not (cells == ord("_")).any():  # Python reads 1_000, nobody else does
            if (cells[1:] == cells[0]).all():
                cells = cells[:1]
            try:
                return np.broadcast_to(_joined(cells).astype(np.float64), rows.stop - rows.start)
            except ValueError:
                pass
        return np.array(
            [self._number(column, rows.start + i, c) for i, c in enumerate(self._raw(column, rows))]
        )

    def _number(self, column: int, row: int, raw: bytes) -> float:
        text = unquote(raw)
        if not _NUMBER.fullmatch(text):
            self._fail(column, row, "a number")
        return float(text)

    def _fail(self, column: int, row: int, expected: str) -> NoReturn:
        found = unquote(self._raw(column, np.array([row]))[0])
        self._text.fail(
            int(self._lines[row if self.is_loop else column]),
            found=f"'{found}'",
            expected=expected,
            remedy="correct this cell, or remove its row (relion_star_handler can select rows).",
            column=f"_{self.labels[column]} (#{column + 1})",
        )


@dataclass(frozen=True, eq=False)
class StarFile:
    """A STAR file in memory: its tables in file order, which refer to the bytes of the file."""

    path: Path
    blocks: tuple[StarBlock, ...]
    _text: Text = field(repr=False)

    def block(self, name: str) -> StarBlock | None:
        """The first table under ``data_<name>``, or None."""
        return next((block for block in self.blocks if block.name == name), None)


def _joined(cells: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Rows of bytes (n, width) as n byte strings without the zeros at their ends."""
    return cells.view(f"S{cells.shape[1]}")[:, 0]


def windows(
    buffer: NDArray[np.uint8], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.uint8] | None:
    """The bytes of each stretch [start, stop) as rows (n, width), zeros behind them; None where one is long
    or at the end of the buffer.
    """
    widths = stops - starts
    width = max(int(widths.max(initial=0)), 1)
    if width > _WIDEST or starts.max(initial=0) + width > len(buffer):
        return None
    rows: NDArray[np.uint8] = np.lib.stride_tricks.sliding_window_view(buffer, width)[starts]
    rows[np.arange(width) >= widths[:, None]] = 0
    return rows


def slices(data: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> list[bytes]:
    """The bytes of each stretch [start, stop)."""
    return [data[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]


def decode(raw: bytes) -> str:
    """Text of bytes that may not be UTF-8; ``encode`` gives the same bytes again."""
    return raw.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """The inverse of ``decode``."""
    return text.encode("utf-8", "surrogateescape")


def unquote(raw: bytes) -> str:
    """A cell's text without its quotes, or without the semicolons around a text of several lines."""
    if raw[:1] in (b'"', b"'"):
        raw = raw[1:-1]
    elif raw[:1] == b";" and b"\n" in raw:
        raw = re.sub(rb"\r?\n;\Z", b"", raw[1:])
    return decode(raw)


def trim_white(data: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places after the last in [start, stop) that is not white space, or start."""
    buffer = np.frombuffer(data, np.uint8)
    at = stops.copy()
    open_ = np.flatnonzero(at > starts)
    for _ in range(64):
        open_ = open_[buffer[at[open_] - 1] <= SPACE]
        at[open_] -= 1
        open_ = open_[at[open_] > starts[open_]]
    for i in open_.tolist():
        at[i] = starts[i] + len(data[starts[i] : at[i]].rstrip(WHITE))
    return at
