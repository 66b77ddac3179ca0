"""Arrays with attributes in HDF5."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.atomic import atomic_path


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, str]) -> None:
    """Data sets and file attributes, whole or not at all; no time stamps, so equal input is equal bytes."""
    content = BytesIO()  # HDF5's own writer turns a full disk into a RuntimeError
    with h5py.File(content, "w", track_order=True) as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=np.ascontiguousarray(values), track_times=False)
        for name, text in attributes.items():
            file.attrs[name] = text
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The data sets of a file; InputError where it is not an HDF5 file that this program wrote."""
    remedy = "give a finished job, or run cryo-svae estimate again."
    try:
        with h5py.File(path, "r") as file:
            return {name: file[name][()] for name in file}
    except FileNotFoundError as error:
        raise InputError(path, found="no such file", expected="a finished job's", remedy=remedy) from error
    except (OSError, TypeError) as error:
        raise InputError(
            path, found="a file that is not HDF5", expected="a job's latents.h5", remedy=remedy
        ) from error
