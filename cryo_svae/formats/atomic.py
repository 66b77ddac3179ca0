"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryo_svae.errors import OutputError

_REMEDIES = {
    errno.ENOSPC: "free some room on that disk, or write to another one.",
    errno.EDQUOT: "free some of your disk quota, or write to another disk.",
    errno.EACCES: "write to a folder where you may create files, or have its permissions changed.",
    errno.EPERM: "write to a folder where you may create files, or have its permissions changed.",
    errno.EROFS: "write to a folder on a disk that is not read-only.",
    errno.ENOENT: "make the folder first, or correct its name.",
    errno.ENOTDIR: "give a path whose parents are folders.",
    errno.EISDIR: "give another name, or remove the folder of that name.",
    errno.ENAMETOOLONG: "give a shorter name.",
}

_TEMPORARY = re.compile(r"\..{1,64}\.[0-9a-f]{8}\.part(\.[^.]+)?")


def is_leftover(path: Path) -> bool:
    """Whether a name is one that ``atomic_path`` gives while writing, and a killed process left."""
    return bool(_TEMPORARY.fullmatch(path.name))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends well.

    It keeps the extension of ``path``, by which mrcfile and RELION choose the format. The file is
    on the disk (fsync) before it is renamed; after any exception it is removed and what stood at
    ``path`` is still there.

    Raises OutputError where the system refuses (disk full, read-only or missing folder).
    """
    temporary = path.with_name(f".{path.stem[:64]}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        temporary.touch(exist_ok=False)  # refuses now rather than after hours of work
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(write_refused(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_refused(path: Path, error: OSError) -> str:
    """The message of an OutputError: what the system said, and what helps."""
    what = error.strerror or str(error)
    remedy = _REMEDIES.get(error.errno or 0, "look at the disk and the folder, then try again.")
    return f"{path}: cannot be written: {what}.\n  To mend: {remedy}"
