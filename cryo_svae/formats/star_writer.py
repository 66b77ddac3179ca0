"""Writing STAR files: a file read before, with columns changed or added and rows chosen; or new tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.atomic import atomic_path
from cryo_svae.formats.printed import Characters, printed
from cryo_svae.formats.star_reader import parse_star
from cryo_svae.formats.star_table import (
    CHUNK_ROWS,
    CONTROL,
    SPACE,
    WHITE,
    StarBlock,
    StarFile,
    Text,
    encode,
    slices,
    trim_white,
    unquote,
    windows,
)

_RESERVED = re.compile(r"""[#"'_;$]|(data_|loop_|save_|stop_|global_)""", re.I)
_SHORT = 16
_UNWRITABLE = re.compile(f"[{CONTROL.decode()}\n\r]")
_MAY_BE_RESERVED = np.isin(np.arange(256), list(b"\n#\"'_;$dDlLsSgG"))


@dataclass(frozen=True, eq=False)
class Numbers:
    """Numbers (n,) as cells, each made when it is written by a format such as ``%.6f``."""

    values: NDArray[np.floating] | NDArray[np.integer]
    form: str

    def __len__(self) -> int:
        return len(self.values)

    def texts(self) -> list[str]:
        """The cells."""
        return [self.form % value for value in self.values.tolist()]


Columns = Mapping[str, Sequence[str] | Numbers]


def quote(cell: str) -> str:
    """The cell as it must stand in a STAR file: in quotes only where it needs them.

    Raises OutputError for text that no STAR row can hold (a line break or other control character, both
    kinds of quotes closing).
    """
    if cell and not _RESERVED.match(cell) and not any(c <= " " for c in cell):
        return cell
    for mark in sorted("\"'", key=cell.count):
        if not _UNWRITABLE.search(cell) and not re.search(rf"{mark}[\x00-\x20]", cell):
            return f"{mark}{cell}{mark}"
    raise OutputError(
        f"{cell!r} cannot be written in a STAR file.\n"
        "  To mend: remove its line breaks, control characters or quotes."
    )


def _quoted(cells: Sequence[str]) -> list[bytes]:
    """Cells ready to be written, checked together: one by one only where any may need quotes."""
    joined = "\n".join(cells)
    raw = encode(joined)
    buffer = np.frombuffer(b"\n" + raw + b"\n", np.uint8)
    separators = np.flatnonzero(buffer <= SPACE)
    if len(separators) != len(cells) + 1 or _MAY_BE_RESERVED[buffer[separators[:-1] + 1]].any():
        return [encode(quote(cell)) for cell in cells]
    return raw.split(b"\n")


def write_star(
    path: Path,
    star: StarFile,
    *,
    block: str,
    columns: Columns,
    rows: NDArray[np.intp] | None = None,
) -> None:
    """Write ``star`` again with changes to the table ``.block(block)``; all else stays to the letter.

    columns: one cell per row written, as text or ``Numbers``; a label that exists has its cells
             replaced in their places, a new one is appended, its label line after the others and its
             cells after each row's last.
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


def _newline(text: Text, at: int) -> bytes:
    """The line end that the file uses at this line."""
    end = text.line_starts[at + 1]
    return b"\r\n" if text.data[end - 2 : end] == b"\r\n" else b"\n"


def _write_loop(
    file: BinaryIO,
    table: StarBlock,
    columns: Columns,
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
    for at in range(0, len(order), CHUNK_ROWS):
        chunk = order[at : at + CHUNK_ROWS]
        new = {label: _ready(cells, slice(at, at + len(chunk))) for label, cells in columns.items()}
        *pieces, last = _pieces_of_rows(table, chunk, begins[chunk], ends[chunk], new)
        if rows is not None and view[-1] != ord("\n"):  # the file's last row may move up
            last = [end if end.endswith(b"\n") else end + newline for end in last]
        file.write(b"".join(chain.from_iterable(zip(*pieces, last, strict=True))))
    file.write(view[ends[-1] :])


def _added(table: StarBlock, columns: Mapping[str, object]) -> list[tuple[int, str]]:
    """New labels and their numbers."""
    return list(enumerate((each for each in columns if not table.has(each)), start=len(table.labels) + 1))


def _label_line(number: int, label: str) -> bytes:
    return encode(f"_{label} #{number} ")


def _comments(data: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Iterator[bytes]:
    """Comment lines that stand between rows."""
    gaps = np.flatnonzero(starts < stops)
    for gap in slices(data, starts[gaps], stops[gaps]):
        yield from (line for line in gap.splitlines(keepends=True) if line.strip(WHITE))


Ready = list[bytes] | Characters  # cells ready to be written


def _ready(cells: Sequence[str] | Numbers, stretch: slice) -> Ready:
    if isinstance(cells, Numbers):
        return printed(cells.values[stretch], cells.form)
    return _quoted(cells[stretch])


def _pieces_of_rows(
    table: StarBlock,
    rows: NDArray[np.intp],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    columns: Mapping[str, Ready],
) -> list[list[bytes]]:
    """What makes up the rows: old text, new cells, old text, … and the rest of the lines."""
    text = table._text
    pieces: list[Ready] = []
    for column, label in enumerate(table.labels):
        if label in columns:
            starts, stops = table._spans(column, rows)
            pieces += [_kept(text, begins, starts), columns[label]]
            begins = trim_white(text.data, starts, stops)
    if added := _added(table, columns):
        _, last = table._spans(len(table.labels) - 1, rows)
        pieces.append(_kept(text, begins, last))
        blank = np.full((1, len(rows)), SPACE, np.uint8)
        pieces += [piece for _, label in added for piece in (blank, columns[label])]
        begins = last
    return list(_joined([*pieces, _kept(text, begins, ends)]))


def _kept(text: Text, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Ready:
    """Old text; white space and the like by its characters."""
    if (stops - starts).max() <= _SHORT and (short := windows(text.buffer, starts, stops)) is not None:
        return short.T
    return slices(text.data, starts, stops)


def _joined(pieces: Iterable[Ready]) -> Iterator[list[bytes]]:
    """The pieces, where neighbours given by their characters come as one."""
    for is_list, group in groupby(pieces, lambda piece: isinstance(piece, list)):
        if is_list:
            yield from (piece for piece in group if isinstance(piece, list))
            continue
        characters = np.ascontiguousarray(np.concatenate(list(group)).T)
        is_there = characters != 0
        stops = np.cumsum(is_there.sum(1))
        yield slices(characters[is_there].tobytes(), np.concatenate([[0], stops[:-1]]), stops)


def _write_list(
    file: BinaryIO,
    table: StarBlock,
    columns: Columns,
    rows: NDArray[np.intp] | None,
) -> None:
    text = table._text
    start, first = text.line_starts, table._label_lines[0]
    end = start[table._lines[-1]] + table._bounds[-1, 1]  # of the last value
    after = int(np.searchsorted(start[:-1], end, side="left" if end == len(text.data) else "right"))
    newline = _newline(text, first)
    file.write(text.data[: start[first]])
    file.writelines(line for line in _lines_of(text, first, after) if line.lstrip(WHITE).startswith(b"#"))
    texts = {label: each.texts() if isinstance(each, Numbers) else each for label, each in columns.items()}
    added = _added(table, columns)
    labels = [*table.labels, *(label for _, label in added)]
    file.write(b"loop_ " + newline)
    file.writelines(_label_line(k, label) + newline for k, label in enumerate(labels, start=1))
    for row in range(1 if rows is None else len(rows)):
        cells = [
            encode(quote(texts[label][row])) if label in texts else _loop_cell(table, column)
            for column, label in enumerate(labels)
        ]
        file.write(b" ".join(cells) + newline)
    file.write(text.data[start[after] :])


def _loop_cell(table: StarBlock, column: int) -> bytes:
    """A list's value as a row can hold it: as it stands, or with the quotes it needs there."""
    (raw,) = table._raw(column, slice(0, 1))
    return raw if raw[:1] in (b'"', b"'") else encode(quote(unquote(raw)))


def _lines_of(text: Text, start: int, stop: int) -> Iterator[bytes]:
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
            file.write(encode(f"\n# version 30001\n\ndata_{name}\n\n"))
            file.writelines(encode(f"_{label:<36} {quote(value):>12}\n") for label, value in values.items())
            file.write(b" \n")
        _write_tables(file, tables)


def star_of_tables(path: Path, tables: Mapping[str, Mapping[str, Sequence[str]]]) -> StarFile:
    """The STAR file that ``write_tables`` would write, in memory; ``path`` names its source in messages."""
    file = BytesIO()
    _write_tables(file, tables)
    return parse_star(path, file.getvalue())


def _write_tables(file: BinaryIO, tables: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    for name, columns in tables.items():
        file.write(encode(f"\n# version 30001\n\ndata_{name}\n\nloop_ \n"))
        file.writelines(_label_line(k, label) + b"\n" for k, label in enumerate(columns, start=1))
        cells = map(_quoted, columns.values())
        file.writelines(b" ".join(c.rjust(12) for c in row) + b" \n" for row in zip(*cells, strict=True))
        file.write(b" \n")
