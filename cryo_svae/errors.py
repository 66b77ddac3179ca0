"""Errors a user can mend; the command line prints them without a traceback and exits with 2."""

from __future__ import annotations

from pathlib import Path


class CryoSvaeError(Exception):
    """Something the user can mend: the message says what is wrong and what to do."""

    exit_code = 2


class InputError(CryoSvaeError):
    """A file or option is not what it should be: place, found, expected, cure.

    Reads as ``particles.star:184: column _rlnImageName (#3): found 'a.mrcs', expected
    '<slice>@<stack>'.`` and a second line ``To mend: …``.

    path:     the file (or the option, e.g. ``--box``) at fault.
    line:     1-based line number in it, where that makes sense.
    column:   name of the column, or of the field.
    found:    what is there.
    expected: what should be there.
    remedy:   what the user can do.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        found: str,
        expected: str,
        remedy: str,
        line: int | None = None,
        column: str | None = None,
    ) -> None:
        self.path = str(path)
        self.line = line
        self.column = column
        self.found = found
        self.expected = expected
        self.remedy = remedy
        place = self.path if line is None else f"{self.path}:{line}"
        where = f"{place}: " if column is None else f"{place}: column {column}: "
        super().__init__(f"{where}found {found}, expected {expected}.\n  To mend: {remedy}")


class OutputError(CryoSvaeError):
    """An output could not be written (disk full, read-only folder, results already there)."""


class TrainingError(CryoSvaeError):
    """Training cannot go on (no usable particle, a loss that is not a number)."""


class ProcessError(CryoSvaeError):
    """One of several processes at a job was lost."""
