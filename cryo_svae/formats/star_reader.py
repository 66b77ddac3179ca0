"""Reading STAR files: lines that give the structure are read one by one, rows of tables many at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.star_table import (
    CONTROL,
    SPACE,
    WHITE,
    StarBlock,
    StarFile,
    Text,
    decode,
    trim_white,
)

_CHUNK_BYTES = 1 << 20
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
_ORDINARY = bytes(set(range(256)) - set(CONTROL))
_LONE_RETURN = re.compile(rb"\r(?![\r\n]|\Z)")


def read_star(path: Path) -> StarFile:
    """The tables of a STAR file; every row is checked to have one cell for each label.

    Raises InputError with line and column where the file is not a STAR file or breaks its rules.
    """
    return parse_star(Path(path), _read_text(Path(path)))


def parse_star(path: Path, data: bytes) -> StarFile:
    """The tables of a file's bytes; ``path`` is for messages."""
    text = Text(path, data, _line_starts(data))
    _check_bytes(text)
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


def _check_bytes(text: Text) -> None:
    """Control bytes are signs of damage, and programs differ over where a cell that holds one ends."""
    odd = text.data.translate(None, _ORDINARY)[:1]  # much faster than a search
    at = text.data.index(odd) if odd else None
    if at is None and b"\r" in text.data and (lone := _LONE_RETURN.search(text.data)):
        at = lone.start()
    if at is not None:
        text.fail(
            int(np.searchsorted(text.line_starts, at, side="right")) - 1,
            f"byte 0x{text.data[at]:02x} within the line",
            "text, and lines that end with a line feed",
            "if the line is damaged, write the file again; if lines end with carriage returns alone, "
            "replace each by a line feed.",
        )


def _skip_white(data: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first places in [start, stop) that are not white space, or stop."""
    buffer = np.frombuffer(data, np.uint8)
    at = starts.copy()
    open_ = np.flatnonzero(at < stops)
    for _ in range(64):
        open_ = open_[buffer[at[open_]] <= SPACE]
        at[open_] += 1
        open_ = open_[at[open_] < stops[open_]]
    for i in open_.tolist():
        at[i] = stops[i] - len(data[at[i] : stops[i]].lstrip(WHITE))
    return at


class _Reader:
    """Walks the lines that give a file its structure; the rows between them are taken in bulk."""

    def __init__(self, text: Text) -> None:
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
            for word, whole in ((b"data_", "data_name"), (b"loop_", "loop_")):
                if self._starts_with(at, word) and not self._is_loop(at):
                    self._fail_line(
                        at,
                        f"{whole} alone on its line",
                        "remove what follows it; if it is a row, remove the blank lines above it.",
                    )
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
        shown = self.text.line(at).strip(WHITE).decode("utf-8", "replace")
        self.text.fail(at, f"'{shown[:60]}{'…' if len(shown) > 60 else ''}'", expected, remedy)

    def _tokens(self, at: int) -> list[tuple[int, int]]:
        """Where the cells of a line begin and end in it, quotes included, comment left out."""
        line, offset = self.text.line(at), int(self.begin[at] - self.text.line_starts[at])
        spans: list[tuple[int, int]] = []
        for match in _TOKEN.finditer(line, offset):
            if match["comment"] is not None:
                break
            begin = match.end() - len(match[0].lstrip(WHITE))
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

    def _starts_with(self, at: int, words: bytes | tuple[bytes, ...]) -> bool:
        return self.text.data.startswith(words, self.begin[at])

    def _heading(self, at: int) -> str | None:
        """The block's name where the line is a ``data_`` heading."""
        if not self._starts_with(at, b"data_"):
            return None
        match = _HEADING.fullmatch(self.text.line(at), self.begin[at] - self.text.line_starts[at])
        return decode(match["name"]) if match else None

    def _is_loop(self, at: int) -> bool:
        if not self._starts_with(at, b"loop_"):
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
            labels.append(decode(line[spans[0][0] + 1 : spans[0][1]]))
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
            labels.append(decode(words[0][1:]))
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
        """The line of the next heading, ``loop_``, or label; the first cell of a row that follows other
        rows may look like any of them.
        """
        for mark in self.marks[np.searchsorted(self.marks, at) :].tolist():
            if not self._starts_with(mark, (b"_", b"data_", b"loop_")):
                continue
            if self._follows_blank(mark) or self._heading(mark) is not None or self._is_loop(mark):
                return int(mark)
        return self.n_lines

    def _follows_blank(self, at: int) -> bool:
        """Whether the line is parted from its rows, and so is none itself (in RELION no line is then)."""
        at -= 1
        while self.first[at] == ord("#"):
            at -= 1
        return bool(self.first[at] == 0)

    def _row_bounds(self, labels: list[str], lines: NDArray[np.int64]) -> NDArray[np.uint32]:
        bounds = np.empty((len(lines), len(labels) + 1), np.uint32)
        for start, stop in self._row_chunks(lines):
            bounds[start:stop] = self._bounds_of(labels, lines[start:stop])
        return bounds

    def _row_chunks(self, lines: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Stretches of rows of some 1 MB."""
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
        white = chunk <= SPACE
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
        bounds[fast, -1] = trim_white(self.text.data, places[:, -1], stops[fast]) - starts[fast]
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
