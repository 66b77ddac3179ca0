"""CryoSPARC .cs files: tables of one row a particle, read and written by cryosparc-tools.

cryosparc-tools is an optional dependency, imported where a .cs file is met.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.atomic import atomic_path

Column = NDArray[Any]

SUFFIX = ".cs"
PARTICLE_FIELDS = ("blob/path", "blob/idx", "blob/shape", "blob/psize_A")
# What a file without images of particles is, by a field that it then has.
OTHER_KINDS = {
    "micrograph_blob/path": "micrographs",
    "movie_blob/path": "movies",
    "map/path": "volumes",
    "mask/path": "masks",
    "alignments2D/pose": "alignments without images",
    "alignments3D/pose": "alignments without images",
    "ctf/df1_A": "CTF parameters without images",
    "location/center_x_frac": "places of particles in micrographs, without their images",
}


@dataclass(frozen=True, eq=False)
class CsTable:
    """n rows of a .cs file.

    path:   the file, for messages.
    fields: name to values (n, …) in file order, ``uid`` among them; texts as arrays of objects.
    """

    path: Path
    fields: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.fields["uid"])

    def take(self, rows: NDArray[np.intp]) -> CsTable:
        """These rows, in this order."""
        return replace(self, fields={name: values[rows] for name, values in self.fields.items()})

    def with_fields(self, new: Mapping[str, Column]) -> CsTable:
        """The same rows with fields added, or replaced in their places."""
        return replace(self, fields={**self.fields, **new})


def is_cs(path: Path) -> bool:
    """Whether a path is one of a CryoSPARC file, by its name."""
    return path.suffix.lower() == SUFFIX


def read_cs(path: Path, passthrough: Path | None = None) -> CsTable:
    """The rows of a .cs file; fields that it lacks are taken from a passthrough file by uid.

    Raises InputError where a file is not a .cs file, or a row has no partner in the passthrough file.
    """
    table = _read(path)
    return table if passthrough is None else _join(table, _read(passthrough))


def read_particles_cs(path: Path, passthrough: Path | None = None) -> CsTable:
    """The same, of a file (with its passthrough file) that holds images of particles."""
    table = read_cs(path, passthrough)
    fields = table.fields
    missing = [name for name in PARTICLE_FIELDS if name not in fields]
    if missing:
        kind = next((f"{kind} ({name})" for name, kind in OTHER_KINDS.items() if name in fields), "")
        raise InputError(
            path,
            column=missing[0],
            found=f"no such field, but {kind}" if kind else "no such field",
            expected="images of particles: " + ", ".join(PARTICLE_FIELDS),
            remedy="give the job's file of particles; its passthrough file goes with --passthrough.",
        )
    if "blob/res_A" in fields:
        raise InputError(
            path,
            column="blob/res_A",
            found="class averages or templates",
            expected="particles",
            remedy="give the job's file of particles, such as ..._particles.cs.",
        )
    if len(table) == 0:
        raise InputError(
            path, found="no rows", expected="particles", remedy="check the job that wrote the file."
        )
    if fields["blob/shape"].shape != (len(table), 2):
        raise InputError(
            path,
            column="blob/shape",
            found=f"{fields['blob/shape'].shape[-1]} numbers an image",
            expected="2, height and width in pixels",
            remedy="give a file of particle images, not of volumes.",
        )
    return table


def write_cs(path: Path, fields: Mapping[str, Column]) -> None:
    """Writes a .cs file, whole or not at all; ``uid`` comes first.

    Raises OutputError where ``path`` cannot be written.
    """
    dataset = _cryosparc("cryosparc.dataset", path).Dataset
    rows = dataset([(name, fields[name]) for name in ("uid", *(each for each in fields if each != "uid"))])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        rows.save(file)


def _cryosparc(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            path,
            found="a CryoSPARC file, and no cryosparc-tools to handle it",
            expected="the package cryosparc-tools beside cryo_svae",
            remedy="pip install 'cryo_svae[cryosparc]', or pip install cryosparc-tools.",
        ) from error


def _read(path: Path) -> CsTable:
    dataset = _cryosparc("cryosparc.dataset", path).Dataset
    not_loaded = _cryosparc("cryosparc.errors", path).DatasetLoadError
    try:
        with path.open("rb"):
            pass
        has_uid = any(field[0] == "uid" for field in dataset.inspect(path)["dtype"])
        loaded = dataset.load(path)
    except OSError as error:
        raise InputError(
            path,
            found=(error.strerror or str(error)).lower(),
            expected="a CryoSPARC file",
            remedy="correct the path, or make the file readable.",
        ) from error
    except not_loaded as error:
        raise InputError(
            path,
            found="a file that is damaged, or of another format",
            expected="a CryoSPARC table (.cs)",
            remedy="give a .cs file of a CryoSPARC job, copied whole.",
        ) from error
    if not has_uid:  # cryosparc-tools would make some up
        raise InputError(
            path,
            column="uid",
            found="no such field",
            expected="a uid for each row",
            remedy="give a .cs file as CryoSPARC wrote it.",
        )
    return CsTable(path, {name: np.array(loaded[name]) for name in loaded.fields()})


def _join(table: CsTable, other: CsTable) -> CsTable:
    uid, theirs = table.fields["uid"], other.fields["uid"]
    for each in (table, other):
        if len(np.unique(each.fields["uid"])) != len(each):
            raise InputError(
                each.path,
                column="uid",
                found="a uid twice",
                expected="each uid once",
                remedy="remove duplicates in CryoSPARC first.",
            )
    order = np.argsort(theirs)
    place = np.minimum(np.searchsorted(theirs[order], uid), len(theirs) - 1)
    rows = order[place] if len(theirs) else np.zeros(0, dtype=np.intp)
    alone = len(uid) if not len(theirs) else int(np.count_nonzero(theirs[rows] != uid))
    if alone:
        raise InputError(
            other.path,
            column="uid",
            found=f"none of the uids of {alone} of the {len(uid)} rows of {table.path}",
            expected="a row for each of them",
            remedy="give the passthrough file of the same job and the same output.",
        )
    return replace(table, fields={**other.take(rows).fields, **table.fields})
