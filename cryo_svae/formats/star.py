"""STAR files, read without loss and written back to the letter.

The grammar is RELION's: ``data_name`` headings, ``loop_`` tables of one row per line, lists of
``_label value``, ``#`` comments, cells in '...' or "..." (a quote closes only before white space, so
``it's`` is a plain cell), and text between two lines that begin with ``;``. A ``#`` or a quote inside
a cell is part of it. A data block with several tables becomes several ``StarBlock`` of one name.

A file is read once, as bytes. Tables keep the places of their cells, 4 bytes a cell, and no copies, so
a million particles take little more memory than their file. Tokens are found for many rows at once;
only rows with quotes or comments take the exact, slow way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain, repeat
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.atomic import atomic_path

_SPACE = 32  # every byte up to the space separates cells
_WHITE = bytes(range(_SPACE + 1))
_CHUNK_BYTES = 1 << 24
_CHUNK_ROWS = 1 << 15
_TOKEN = re.compile(
    rb"""[\x00-\x20]*(?:
        (?P<comment>\#.*)
      | "(?P<double>[^\n]*?)"(?=[\x00-\x20]|\Z)
      | '(?P<single>[^\n]*?)'(?=[\x00-\x20]|\Z)
      | (?P<open>["'].*)
      | (?P<plain>[^\x00-\x20]+)
    )""",
    re.VERBOSE,
)
_HEADING = re.compile(rb"data_(?P<name>[^\x00-\x20]*)([\x00-\x20]+(#.*)?)?")
_LOOP = re.compile(rb"loop_([\x00-\x20]+(#.*)?)?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf|infinity|nan)", re.I | re.A)
_RESERVED = re.compile(r"""[#"'_;$]|(data_|loop_|save_|stop_|global_)""", re.I)
_UNWRITABLE = re.compile(r"[\n\r\0]")
_MAY_BE_RESERVED = np.isin(np.arange(256), list(b"\n#\"'_;$dDlLsSgG"))
_LARGEST_EXACT_INTEGER = 2.0**53


# --- the public types ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Text:
    """A file's bytes and where its lines begin."""

    path: Path
    data: bytes
    line_starts: NDArray[np.int64]  # one more than there are lines: the last is the file's length

    @property
    def buffer(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.data, np.uint8)

    def line(self, index: int) -> bytes:
        """The line, without its end."""
        return self.data[self.line_starts[index] : self.line_starts[index + 1]].rstrip(b"\r\n")

    def fail(
        self, index: int, found: str, expected: str, remedy: str, column: str | None = None
    ) -> NoReturn:
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
    _text: _Text = field(repr=False)
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
        return [cell for chunk in self._chunks() for cell in map(_unquote, self._raw(column, chunk))]

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
        return (slice(at, min(at + _CHUNK_ROWS, self.n_rows)) for at in range(0, self.n_rows, _CHUNK_ROWS))

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
        return [cell.rstrip(_WHITE) for cell in _slices(self._text.data, *self._spans(column, rows))]

    def _parse(self, column: int, rows: slice) -> NDArray[np.float64]:
        starts, stops = self._spans(column, rows)
        width = int((stops - starts).max())
        buffer = self._text.buffer
        if 0 < width <= 64 and starts.max() + width <= len(buffer):
            # the stretch from this cell to the next holds the cell, then only white space
            cells = np.lib.stride_tricks.sliding_window_view(buffer, width)[starts]
            cells[(cells <= _SPACE) | (np.arange(width) >= (stops - starts)[:, None])] = 0
            try:
                values = cells.view(f"S{width}")[:, 0].astype(np.float64)
            except ValueError:
                pass
            else:
                if not (cells == ord("_")).any():  # Python reads 1_000, nobody else does
                    return values
        return np.array(
            [self._number(column, rows.start + i, c) for i, c in enumerate(self._raw(column, rows))]
        )

    def _number(self, column: int, row: int, raw: bytes) -> float:
        text = _unquote(raw)
        if not _NUMBER.fullmatch(text):
            self._fail(column, row, "a number")
        return float(text)

    def _fail(self, column: int, row: int, expected: str) -> NoReturn:
        found = _unquote(self._raw(column, np.array([row]))[0])
        self._text.fail(
            int(self._lines[row if self.is_loop else column]),
            found=f"'{found}'",
            expected=expected,
            remedy="correct this cell, or remove its row (relion_star_handler can select rows).",
            column=f"_{self.labels[column]} (#{column + 1})",
        )


@dataclass(frozen=True, eq=False)
class StarFile:
    """A STAR file as read: its tables in file order, and behind them every byte of the file."""

    path: Path
    blocks: tuple[StarBlock, ...]
    _text: _Text = field(repr=False)

    def block(self, name: str) -> StarBlock | None:
        """The first table under ``data_<name>``, or None."""
        return next((block for block in self.blocks if block.name == name), None)


# --- reading ---------------------------------------------------------------------------------------


def read_star(path: Path) -> StarFile:
    """The tables of a STAR file; every row is checked to have one cell for each label.

    Raises InputError with line and column where the file is not a STAR file or breaks its rules.
    """
    return _parse(Path(path), _read_text(Path(path)))


def _parse(path: Path, data: bytes) -> StarFile:
    text = _Text(path, data, _line_starts(data))
    return StarFile(path, tuple(_Reader(text).blocks()), text)


def _read_text(path: Path) -> bytes:
    try:
        if path.stat() and not path.is_file():
            raise OSError("a folder, or no regular file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            path,
            found=(error.strerror or str(error)).lower(),
            expected="a STAR file",
            remedy="correct the path, or make the file readable.",
        ) from error
    if not data or data.isspace():
        raise InputError(
            path,
            found="an empty file",
            expected="a STAR file",
            remedy="run the program that should have written it again.",
        )
    if b"\0" in data:
        found = "an MRC file" if data[208:211] == b"MAP" else "a file that is not text"
        raise InputError(
            path,
            found=found,
            expected="a STAR file",
            remedy="give the .star file that describes the particles, in UTF-8.",
        )
    return data


def _line_starts(data: bytes) -> NDArray[np.int64]:
    buffer = np.frombuffer(data, np.uint8)
    ends = [
        np.flatnonzero(buffer[at : at + _CHUNK_BYTES] == ord("\n")) + (at + 1)
        for at in range(0, len(data), _CHUNK_BYTES)
    ]
    last = [] if data.endswith(b"\n") else [len(data)]
    return np.concatenate([[0], *ends, last]).astype(np.int64)


def _skip_white(data: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first places in [start, stop) that are not white space, or stop."""
    buffer = np.frombuffer(data, np.uint8)
    at = starts.copy()
    open_ = np.flatnonzero(at < stops)
    for _ in range(64):
        open_ = open_[buffer[at[open_]] <= _SPACE]
        at[open_] += 1
        open_ = open_[at[open_] < stops[open_]]
    for i in open_.tolist():
        at[i] = stops[i] - len(data[at[i] : stops[i]].lstrip(_WHITE))
    return at


def _trim_white(data: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places after the last in [start, stop) that is not white space, or start."""
    buffer = np.frombuffer(data, np.uint8)
    at = stops.copy()
    open_ = np.flatnonzero(at > starts)
    for _ in range(64):
        open_ = open_[buffer[at[open_] - 1] <= _SPACE]
        at[open_] -= 1
        open_ = open_[at[open_] > starts[open_]]
    for i in open_.tolist():
        at[i] = starts[i] + len(data[starts[i] : at[i]].rstrip(_WHITE))
    return at


class _Reader:
    """Walks the lines that give a file its structure; the rows between them are taken in bulk."""

    def __init__(self, text: _Text) -> None:
        self.text = text
        starts, stops = text.line_starts[:-1].copy(), text.line_starts[1:]
        if text.data.startswith(b"\xef\xbb\xbf"):
            starts[0] = 3  # the byte order mark some editors write
        self.n_lines = len(starts)
        self.begin = _skip_white(text.data, starts, stops)
        # first byte of each line; 0 for a blank one
        self.first = np.where(
            self.begin < stops, text.buffer[np.minimum(self.begin, len(text.data) - 1)], 0
        )
        self.is_content = (self.first != 0) & (self.first != ord("#"))
        self.marks = np.flatnonzero(np.isin(self.first, list(b"_dl")))

    def blocks(self) -> Iterator[StarBlock]:
        name: str | None = None
        found_table = True
        at = self._next_content(0)
        while at < self.n_lines:
            if (heading := self._heading(at)) is not None:
                if not found_table and name is not None:
                    yield self._empty(name)
                name, found_table = heading, False
                at = self._next_content(at + 1)
                continue
            if name is None:
                self._fail_line(
                    at, "a data_ heading before any data", "add a line such as data_particles above it."
                )
            found_table = True
            if self._is_loop(at):
                block, at = self._loop(name, at)
            elif self.first[at] == ord("_"):
                block, at = self._list(name, at)
            else:
                self._fail_line(
                    at, "loop_ and labels before rows", "add loop_ and one _label line for each column."
                )
            yield block
        if name is None:
            self.text.fail(
                self.n_lines - 1,
                "the end of the file",
                "a data_ heading",
                "give a STAR file, with blocks such as data_particles.",
            )
        if not found_table:
            yield self._empty(name)

    def _empty(self, name: str) -> StarBlock:
        return StarBlock(
            name, (), False, 0, self.text, (), np.empty(0, np.int64), np.empty((0, 2), np.uint32)
        )

    def _next_content(self, at: int) -> int:
        while at < self.n_lines and not self.is_content[at]:
            at += 1
        return at

    def _fail_line(self, at: int, expected: str, remedy: str) -> NoReturn:
        shown = self.text.line(at).strip(_WHITE).decode("utf-8", "replace")
        self.text.fail(at, f"'{shown[:60]}{'…' if len(shown) > 60 else ''}'", expected, remedy)

    def _tokens(self, at: int) -> list[tuple[int, int]]:
        """Where the cells of a line begin and end in it, quotes included, comment left out."""
        line, offset = self.text.line(at), int(self.begin[at] - self.text.line_starts[at])
        spans: list[tuple[int, int]] = []
        for match in _TOKEN.finditer(line, offset):
            if match["comment"] is not None:
                break
            begin = match.end() - len(match[0].lstrip(_WHITE))
            if match["open"] is not None:
                self.text.fail(
                    at,
                    f"a quote that is not closed: {match['open'][:40].decode('utf-8', 'replace')}",
                    "the same quote again before white space or the line's end",
                    "close the quote, or put the cell in the other kind of quotes.",
                    column=f"#{len(spans) + 1}",
                )
            spans.append((begin, match.end()))
        return spans

    def _words(self, at: int) -> list[bytes]:
        line = self.text.line(at)
        return [line[a:b] for a, b in self._tokens(at)]

    def _heading(self, at: int) -> str | None:
        """The block's name where the line is a ``data_`` heading."""
        if not self.text.data.startswith(b"data_", self.begin[at]):
            return None
        match = _HEADING.fullmatch(self.text.line(at), self.begin[at] - self.text.line_starts[at])
        return _decode(match["name"]) if match else None

    def _is_loop(self, at: int) -> bool:
        if not self.text.data.startswith(b"loop_", self.begin[at]):
            return False
        return bool(_LOOP.fullmatch(self.text.line(at), self.begin[at] - self.text.line_starts[at]))

    # --- lists ---

    def _list(self, name: str, at: int) -> tuple[StarBlock, int]:
        labels: list[str] = []
        label_lines: list[int] = []
        value_lines: list[int] = []
        bounds: list[tuple[int, int]] = []
        while at < self.n_lines and self.first[at] == ord("_"):
            line, spans = self.text.line(at), self._tokens(at)
            labels.append(_decode(line[spans[0][0] + 1 : spans[0][1]]))
            label_lines.append(at)
            if len(spans) > 2:
                self._fail_line(at, "a label and one value", "put a value that holds blanks in quotes.")
            following = self._next_content(at + 1)
            if len(spans) == 1 and following < self.n_lines and self.text.line(following).startswith(b";"):
                value_lines.append(following)
                at = self._end_of_text(following)
                start = self.text.line_starts
                bounds.append((0, int(start[at] - start[following]) + 1))
                following = self._next_content(at + 1)
            else:  # some programs leave an empty value out
                value_lines.append(at)
                bounds.append(spans[1] if len(spans) == 2 else (spans[0][1],) * 2)
            at = following
        self._check_unique(labels, label_lines)
        block = StarBlock(
            name,
            tuple(labels),
            False,
            1,
            self.text,
            tuple(label_lines),
            np.array(value_lines, np.int64),
            np.array(bounds, np.uint32),
        )
        return block, at

    def _end_of_text(self, at: int) -> int:
        for end in range(at + 1, self.n_lines):
            if self.text.line(end).startswith(b";"):
                return end
        self._fail_line(at, "a line that begins with ; to end this text", "add it.")

    def _check_unique(self, labels: list[str], lines: list[int]) -> None:
        if len(set(labels)) == len(labels):
            return
        at = next(i for i, label in enumerate(labels) if label in labels[:i])
        self.text.fail(
            lines[at],
            f"label _{labels[at]} for the second time in this table",
            "each label once",
            "remove one of the two columns (relion_star_handler --remove_column), or rename it.",
        )

    # --- loops ---

    def _loop(self, name: str, at: int) -> tuple[StarBlock, int]:
        labels: list[str] = []
        label_lines: list[int] = []
        opening, at = at, self._next_content(at + 1)
        while at < self.n_lines and self.first[at] == ord("_"):
            words = self._words(at)
            if len(words) > 1:
                self._fail_line(
                    at, "a label alone on its line after loop_", "remove what follows the label."
                )
            labels.append(_decode(words[0][1:]))
            label_lines.append(at)
            at = self._next_content(at + 1)
        if not labels:
            self._fail_line(opening, "labels after loop_", "add one _label line for each column.")
        self._check_unique(labels, label_lines)
        end = self._end_of_loop(at)
        lines = np.flatnonzero(self.is_content[at:end]) + at
        bounds = self._row_bounds(labels, lines)
        block = StarBlock(
            name, tuple(labels), True, len(lines), self.text, tuple(label_lines), lines, bounds
        )
        return block, end

    def _end_of_loop(self, at: int) -> int:
        """The line of the next heading, ``loop_``, or label; a first cell may look like any of them."""
        for mark in self.marks[np.searchsorted(self.marks, at) :].tolist():
            if self.first[mark] == ord("_"):
                if self.first[mark - 1] == 0:  # a row follows its rows; a label begins anew
                    return int(mark)
            elif self._heading(mark) is not None or self._is_loop(mark):
                return int(mark)
        return self.n_lines

    def _row_bounds(self, labels: list[str], lines: NDArray[np.int64]) -> NDArray[np.uint32]:
        bounds = np.empty((len(lines), len(labels) + 1), np.uint32)
        for start, stop in self._row_chunks(lines):
            bounds[start:stop] = self._bounds_of(labels, lines[start:stop])
        return bounds

    def _row_chunks(self, lines: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Stretches of rows of some 16 MB."""
        begin = self.text.line_starts[lines]
        start = 0
        while start < len(lines):
            stop = max(start + 1, int(np.searchsorted(begin, begin[start] + _CHUNK_BYTES)))
            yield start, stop
            start = stop

    def _bounds_of(self, labels: list[str], lines: NDArray[np.int64]) -> NDArray[np.uint32]:
        starts, begin, stops = (
            self.text.line_starts[lines],
            self.begin[lines],
            self.text.line_starts[lines + 1],
        )
        chunk = self.text.buffer[starts[0] : stops[-1]]
        white = chunk <= _SPACE
        cells = np.flatnonzero(white[:-1] & ~white[1:]) + 1
        if not white[0]:
            cells = np.concatenate([[0], cells])
        cells += starts[0]
        first = np.searchsorted(cells, begin)
        count = np.searchsorted(cells, stops) - first
        special = cells[np.isin(self.text.buffer[cells], list(b"#\"'"))]
        owner = np.searchsorted(starts, special, side="right") - 1  # or the row above a comment line
        slow = np.zeros(len(lines), bool)
        slow[owner[special < stops[owner]]] = True

        n_labels = len(labels)
        bounds = np.empty((len(lines), n_labels + 1), np.uint32)
        for row in np.flatnonzero(slow | (count != n_labels)).tolist():
            spans = self._tokens(int(lines[row]))
            self._check_count(labels, int(lines[row]), len(spans))
            bounds[row] = [*(a for a, _ in spans), spans[-1][1]]
        fast = np.flatnonzero(~slow)
        places = cells[first[fast, None] + np.arange(n_labels)]
        bounds[fast, :-1] = places - starts[fast, None]
        bounds[fast, -1] = _trim_white(self.text.data, places[:, -1], stops[fast]) - starts[fast]
        return bounds

    def _check_count(self, labels: list[str], at: int, n_cells: int) -> None:
        if n_cells == len(labels):
            return
        column = f"_{labels[n_cells]} (#{n_cells + 1})" if n_cells < len(labels) else f"#{len(labels) + 1}"
        self.text.fail(
            at,
            f"a row of {n_cells} cell{'s' * (n_cells != 1)}",
            f"{len(labels)}, one for each label",
            "complete or remove this row; put a cell that holds blanks in quotes.",
            column=column,
        )


# --- cells -----------------------------------------------------------------------------------------


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _unquote(raw: bytes) -> str:
    if raw[:1] in (b'"', b"'"):
        raw = raw[1:-1]
    elif raw[:1] == b";" and b"\n" in raw:
        raw = re.sub(rb"\r?\n;\Z", b"", raw[1:])
    return _decode(raw)


def quote(cell: str) -> str:
    """The cell as it must stand in a STAR file: in quotes only where it needs them.

    Raises OutputError for text that no STAR row can hold (a line break, both kinds of quotes closing).
    """
    if cell and not _RESERVED.match(cell) and not any(c <= " " for c in cell):
        return cell
    for mark in sorted("\"'", key=cell.count):
        if not _UNWRITABLE.search(cell) and not re.search(rf"{mark}[\x00-\x20]", cell):
            return f"{mark}{cell}{mark}"
    raise OutputError(
        f"{cell!r} cannot be written in a STAR file.\n  To mend: remove its line breaks or quotes."
    )


def _quoted(cells: Sequence[str]) -> list[bytes]:
    """Cells ready to be written, checked together: one by one only where any may need quotes."""
    joined = "\n".join(cells)
    raw = _encode(joined)
    buffer = np.frombuffer(b"\n" + raw + b"\n", np.uint8)
    separators = np.flatnonzero(buffer <= _SPACE)
    if len(separators) != len(cells) + 1 or _MAY_BE_RESERVED[buffer[separators[:-1] + 1]].any():
        return [_encode(quote(cell)) for cell in cells]
    return raw.split(b"\n")


# --- writing ---------------------------------------------------------------------------------------


def write_star(
    path: Path,
    star: StarFile,
    *,
    block: str,
    columns: Mapping[str, Sequence[str]],
    rows: NDArray[np.intp] | None = None,
) -> None:
    """Write ``star`` again with changes to the table ``.block(block)``; all else stays to the letter.

    columns: one text per row written; a label that exists has its cells replaced in their places, a new
             one is appended, its label line after the others and its cells after each row's last.
    rows:    which rows to write, in this order (default: all). A comment between rows then comes
             before them.

    A list whose values change becomes a loop of one row. Raises InputError where there is no such
    block, OutputError where ``path`` cannot be written.
    """
    table = star.block(block)
    if table is None:
        known = ", ".join(f"data_{each.name}" for each in star.blocks)
        raise InputError(
            star.path, found=known, expected=f"a block data_{block}", remedy="give a file that has it."
        )
    if not table.labels and columns:
        raise InputError(
            star.path,
            found=f"no table in block data_{block}",
            expected="rows to which columns can be added",
            remedy="remove the empty block, or give a file whose block has rows.",
        )
    n_rows = table.n_rows if rows is None else len(rows)
    if wrong := [label for label, cells in columns.items() if len(cells) != n_rows]:
        raise ValueError(f"{n_rows} rows to write, but not as many cells for {', '.join(wrong)}")
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        if not table.labels or (not columns and rows is None):
            file.write(star._text.data)
        elif table.is_loop:
            _write_loop(file, table, columns, rows)
        else:
            _write_list(file, table, columns, rows)


def _newline(text: _Text, at: int) -> bytes:
    """The line end that the file uses at this line."""
    end = text.line_starts[at + 1]
    return b"\r\n" if text.data[end - 2 : end] == b"\r\n" else b"\n"


def _write_loop(
    file: BinaryIO,
    table: StarBlock,
    columns: Mapping[str, Sequence[str]],
    rows: NDArray[np.intp] | None,
) -> None:
    text = table._text
    view = memoryview(text.data)
    newline = _newline(text, table._label_lines[-1])
    after_header = int(text.line_starts[table._label_lines[-1] + 1])
    file.write(view[:after_header])
    if view[after_header - 1] != ord("\n"):
        file.write(newline)
    file.writelines(_label_line(k, label) + newline for k, label in _added(table, columns))
    if not table.n_rows:
        file.write(view[after_header:])
        return
    begins, ends = text.line_starts[table._lines], text.line_starts[table._lines + 1]
    if rows is None:
        order: NDArray[np.intp] = np.arange(table.n_rows)
        begins = np.concatenate([[after_header], ends[:-1]])  # with what stands between two rows
    else:
        order = rows
        if len(rows) and table.labels[0] not in columns and view[begins[rows[0]]] == ord("_"):
            # would be taken for a label now that it follows the labels
            first = table.text(table.labels[0])
            columns = {**columns, table.labels[0]: [first[row] for row in rows]}
        file.write(view[after_header : begins[0]])
        file.writelines(_comments(text.data, ends[:-1], begins[1:]))
    for at in range(0, len(order), _CHUNK_ROWS):
        chunk = order[at : at + _CHUNK_ROWS]
        new = {label: cells[at : at + len(chunk)] for label, cells in columns.items()}
        pieces = _row_pieces(table, chunk, begins[chunk], ends[chunk], new)
        if rows is not None and view[-1] != ord("\n"):  # the file's last row may move up
            pieces[-1] = [tail if tail.endswith(b"\n") else tail + newline for tail in pieces[-1]]
        file.write(b"".join(chain.from_iterable(zip(*pieces, strict=True))))
    file.write(view[ends[-1] :])


def _added(table: StarBlock, columns: Mapping[str, Sequence[str]]) -> list[tuple[int, str]]:
    """New labels and their numbers."""
    return list(enumerate((each for each in columns if not table.has(each)), start=len(table.labels) + 1))


def _label_line(number: int, label: str) -> bytes:
    return _encode(f"_{label} #{number} ")


def _slices(data: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> list[bytes]:
    return [data[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]


def _comments(data: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Iterator[bytes]:
    """Comment lines that stand between rows."""
    gaps = np.flatnonzero(starts < stops)
    for gap in _slices(data, starts[gaps], stops[gaps]):
        yield from (line for line in gap.splitlines(keepends=True) if line.strip(_WHITE))


def _row_pieces(
    table: StarBlock,
    rows: NDArray[np.intp],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    columns: Mapping[str, Sequence[str]],
) -> list[list[bytes]]:
    """What to join row by row: old text, a new cell, old text, … and the rest of the line."""
    data = table._text.data
    pieces: list[list[bytes]] = []
    for column, label in enumerate(table.labels):
        if label in columns:
            starts, stops = table._spans(column, rows)
            pieces += [_slices(data, begins, starts), _quoted(columns[label])]
            begins = _trim_white(data, starts, stops)
    if added := _added(table, columns):
        _, last = table._spans(len(table.labels) - 1, rows)
        cells = (_quoted(columns[label]) for _, label in added)
        pieces += [_slices(data, begins, last), [b" ".join(each) for each in zip(repeat(b""), *cells)]]
        begins = last
    return [*pieces, _slices(data, begins, ends)]


def _write_list(
    file: BinaryIO,
    table: StarBlock,
    columns: Mapping[str, Sequence[str]],
    rows: NDArray[np.intp] | None,
) -> None:
    text = table._text
    start, first = text.line_starts, table._label_lines[0]
    end = start[table._lines[-1]] + table._bounds[-1, 1]  # of the last value
    after = int(np.searchsorted(start[:-1], end, side="left" if end == len(text.data) else "right"))
    newline = _newline(text, first)
    file.write(text.data[: start[first]])
    file.writelines(line for line in _lines_of(text, first, after) if line.lstrip(_WHITE).startswith(b"#"))
    added = _added(table, columns)
    labels = [*table.labels, *(label for _, label in added)]
    file.write(b"loop_ " + newline)
    file.writelines(_label_line(k, label) + newline for k, label in enumerate(labels, start=1))
    for row in range(1 if rows is None else len(rows)):
        cells = [
            _encode(quote(columns[label][row])) if label in columns else _loop_cell(table, column)
            for column, label in enumerate(labels)
        ]
        file.write(b" ".join(cells) + newline)
    file.write(text.data[start[after] :])


def _loop_cell(table: StarBlock, column: int) -> bytes:
    """A list's value as a row can hold it: as it stands, or with the quotes it needs there."""
    (raw,) = table._raw(column, slice(0, 1))
    return raw if raw[:1] in (b'"', b"'") else _encode(quote(_unquote(raw)))


def _lines_of(text: _Text, start: int, stop: int) -> Iterator[bytes]:
    return (text.data[text.line_starts[i] : text.line_starts[i + 1]] for i in range(start, stop))


def write_tables(
    path: Path,
    tables: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    lists: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write a new STAR file as RELION lays it out: first the lists, then the tables.

    tables: block name to (label to cells); labels without the leading underscore.
    lists:  block name to (label to value).

    Raises OutputError where ``path`` cannot be written.
    """
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        for name, values in (lists or {}).items():
            file.write(_encode(f"\n# version 30001\n\ndata_{name}\n\n"))
            file.writelines(
                _encode(f"_{label:<36} {quote(value):>12}\n") for label, value in values.items()
            )
            file.write(b" \n")
        _write_tables(file, tables)


def star_of_tables(path: Path, tables: Mapping[str, Mapping[str, Sequence[str]]]) -> StarFile:
    """The STAR file that ``write_tables`` would write, in memory; ``path`` names its source in messages."""
    file = BytesIO()
    _write_tables(file, tables)
    return _parse(path, file.getvalue())


def _write_tables(file: BinaryIO, tables: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    for name, columns in tables.items():
        file.write(_encode(f"\n# version 30001\n\ndata_{name}\n\nloop_ \n"))
        file.writelines(_label_line(k, label) + b"\n" for k, label in enumerate(columns, start=1))
        cells = map(_quoted, columns.values())
        file.writelines(b" ".join(c.rjust(12) for c in row) + b" \n" for row in zip(*cells, strict=True))
        file.write(b" \n")
