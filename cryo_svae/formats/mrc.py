"""Stacks of images in MRC files: read a few images at a time, written as a stream.

Read: modes 0, 1, 2, 6 and 12, either byte order, extended headers, gzip and bzip2, volumes (their
sections are the images) and single images. RELION 3.1 and older programs leave version, statistics
and machine stamp wrong. So only those fields of the header are used that say where the pixels lie, and
they must agree with the file's size to the byte. No file is kept open, and no memory is allocated before
that check.

Written: mode 2, little endian, space group 0 (a stack), to the MRC2014 standard.
"""

from __future__ import annotations

import bz2
import gzip
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path
from threading import Lock

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.atomic import atomic_path

_HEADER_BYTES = 1024
_CHUNK_BYTES = 1 << 24
_DTYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_REFUSED_MODES = {3: "complex 16-bit integers", 4: "complex numbers", 101: "4-bit integers"}
_MODES = {*_DTYPES, *_REFUSED_MODES}
_IMOD_STAMP = 1146047817
_NOT_MRC = "give an MRC file (.mrcs, .mrc, .map; also .gz or .bz2)."
_decompressing = Lock()
_REWRITE = "copy the file again from its source, or write it again with the program it came from."


@dataclass(frozen=True)
class StackInfo:
    """The size of a stack, from its header; voxel_size_angst is 0.0 where the header has none."""

    path: Path
    n_images: int
    height_px: int
    width_px: int
    mode: int
    voxel_size_angst: float


@dataclass(frozen=True)
class _Layout:
    """Where the pixels lie in the (decompressed) file."""

    info: StackInfo
    offset: int
    dtype: np.dtype[np.generic]

    @property
    def image_bytes(self) -> int:
        return self.info.height_px * self.info.width_px * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        return self.offset + self.info.n_images * self.image_bytes


# --- reading ---------------------------------------------------------------------------------------


def read_stack_info(path: Path) -> StackInfo:
    """What the header says, checked against the file's size (of a compressed file when it is read).

    Raises InputError where there is no such file, or it is no MRC file, or cut short.
    """
    path = Path(path)
    with _opened(path) as (file, n_bytes):
        return _read_layout(path, file, n_bytes).info


def read_images(path: Path, indices: NDArray[np.intp]) -> NDArray[np.float32]:
    """``read_pixels`` in float32."""
    return read_pixels(path, indices).astype(np.float32, copy=False)


def read_pixels(path: Path, indices: NDArray[np.intp]) -> NDArray[np.generic]:
    """Images (k, h, w) of a stack by 0-based indices, in their order, repeats included.

    Of the stack's own type, in the machine's byte order. Of a plain file only these images are read,
    each run of neighbours at once. A compressed file is decompressed whole, and the last one is kept.
    Raises InputError as ``read_stack_info``, or where there is no such image.
    """
    path = Path(path)
    with _opened(path) as (file, n_bytes):
        layout = _read_layout(path, file, n_bytes)
        _check_indices(layout.info, indices)
        if n_bytes is None:
            status = path.stat()
            with _decompressing:  # or each of several readers would do it
                images = _decompressed(path, status.st_mtime_ns, status.st_size)[indices]
        else:
            images = _read_runs(layout, file, np.asarray(indices, np.intp))
    return images.astype(images.dtype.newbyteorder("="), copy=False)


def _read_runs(layout: _Layout, file: BufferedIOBase, indices: NDArray[np.intp]) -> NDArray[np.generic]:
    info = layout.info
    images = np.empty((len(indices), info.height_px, info.width_px), layout.dtype)
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), len(indices)]
    for start, stop in zip(starts, stops, strict=True):
        if start < stop:
            first = int(indices[start])
            file.seek(layout.offset + first * layout.image_bytes)
            wanted = images[start:stop].view(np.uint8).data.cast("B")
            n_read = file.readinto(wanted)
            if n_read != len(wanted):
                raise _cut_short(
                    layout, f"the file's end inside image {first + n_read // layout.image_bytes + 1}"
                )
    return images


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedIOBase, int | None]]:
    """The file and its size; decompressed, and of unknown size, where its first bytes ask for it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("a folder, or no regular file")
        with path.open("rb") as file:
            magic = file.peek(3)[:3]
            if magic[:2] == b"\x1f\x8b":
                yield gzip.GzipFile(fileobj=file), None
            elif magic == b"BZh":
                yield bz2.BZ2File(file), None
            else:
                yield file, os.fstat(file.fileno()).st_size
    except (EOFError, zlib.error) as error:
        raise InputError(
            path, found=f"broken compression ({error})", expected="a whole file", remedy=_REWRITE
        ) from error
    except OSError as error:
        raise InputError(
            path,
            found=(error.strerror or str(error)).lower(),
            expected="an MRC file",
            remedy="correct the path (RELION's are relative to the project folder), or mend the file.",
        ) from error


def _read_layout(path: Path, file: BufferedIOBase, n_bytes: int | None) -> _Layout:
    raw = file.read(_HEADER_BYTES)
    if len(raw) < _HEADER_BYTES:
        raise InputError(
            path,
            found=f"a file of {len(raw)} bytes",
            expected=f"an MRC file, whose header alone has {_HEADER_BYTES}",
            remedy=_REWRITE,
        )
    layout = _parse_header(path, raw)
    if n_bytes is not None:
        _check_size(layout, n_bytes)
    return layout


def _parse_header(path: Path, raw: bytes) -> _Layout:
    order = _byte_order(raw)
    header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
    mode, extended = int(header["mode"]), int(header["nsymbt"])
    width, height, n_images = int(header["nx"]), int(header["ny"]), int(header["nz"])
    if min(width, height, n_images) < 1 or extended < 0 or mode not in _MODES:
        claim = f"a header of {width} x {height} x {n_images} pixels and mode {mode}"
        raise InputError(
            path,
            found=claim if raw[208:211] == b"MAP" else "bytes that are no MRC header",
            expected="an MRC file",
            remedy=_NOT_MRC,
        )
    if mode in _REFUSED_MODES:
        raise InputError(
            path,
            found=f"mode {mode} ({_REFUSED_MODES[mode]})",
            expected="images in mode 0, 1, 2, 6 or 12",
            remedy="write real images in mode 2 (float32), e.g. with relion_image_handler.",
        )
    dtype = np.dtype(f"{order}{_DTYPES[mode]}")
    # IMOD marks its files, and in them sets a flag where bytes are signed
    if mode == 0 and _imod_fields(header) == (_IMOD_STAMP, 0):
        dtype = np.dtype("u1")
    voxel_size = _voxel_size_angst(float(header["cella"]["x"]), int(header["mx"]))
    info = StackInfo(path, n_images, height, width, mode, voxel_size)
    return _Layout(info, _HEADER_BYTES + extended, dtype)


def _byte_order(raw: bytes) -> str:
    """'<' or '>': that in which the mode is known, for machine stamps are often wrong."""
    known = [order for order in "<>" if int(np.frombuffer(raw, f"{order}i4", 1, 12)[0]) in _MODES]
    if len(known) == 1:
        return known[0]
    return ">" if raw[212] == 0x11 else "<"  # mode 0 reads alike


def _imod_fields(header: np.void) -> tuple[int, int]:
    """IMOD's stamp (bytes 152 to 155) and its flag for signed bytes (bit 0 of the next word)."""
    stamp, flags = np.frombuffer(header.tobytes(), header.dtype["nx"], 2, 152).tolist()
    return stamp, flags & 1


def _voxel_size_angst(cell_angst: float, intervals: int) -> float:
    if intervals < 1 or not np.isfinite(cell_angst) or cell_angst <= 0:
        return 0.0
    return cell_angst / intervals


def _check_size(layout: _Layout, n_bytes: int) -> None:
    if n_bytes < layout.file_bytes:
        raise _cut_short(layout, f"{n_bytes} bytes")
    if n_bytes > layout.file_bytes:
        raise InputError(
            layout.info.path,
            found=f"{n_bytes} bytes",
            expected=f"{layout.file_bytes}, as {_shape(layout)} take",
            remedy=f"mend the header, or {_NOT_MRC}",
        )


def _cut_short(layout: _Layout, found: str) -> InputError:
    return InputError(
        layout.info.path,
        found=found,
        expected=f"{layout.file_bytes} bytes, as {_shape(layout)} take (is the file cut short?)",
        remedy=_REWRITE,
    )


def _shape(layout: _Layout) -> str:
    info = layout.info
    return f"{info.n_images} images of {info.width_px} x {info.height_px} px in mode {info.mode}"


def _check_indices(info: StackInfo, indices: NDArray[np.intp]) -> None:
    bad = (indices < 0) | (indices >= info.n_images)
    if np.any(bad):
        raise InputError(
            info.path,
            found=f"image {int(indices[bad.argmax()]) + 1} asked for",
            expected=f"1 to {info.n_images}, the images in this stack",
            remedy="correct the number before the @ of rlnImageName, or give the stack it was made for.",
        )


@lru_cache(maxsize=1)
def _decompressed(path: Path, mtime_ns: int, size: int) -> NDArray[np.generic]:
    """Every image of a compressed stack, of the state of the file that time and size tell."""
    with _opened(path) as (file, n_bytes):
        layout = _read_layout(path, file, n_bytes)
        file.seek(0)
        content = bytearray()  # grows with what is there, whatever the header claims
        while len(content) <= layout.file_bytes and (chunk := file.read(_CHUNK_BYTES)):
            content += chunk
    _check_size(layout, len(content))
    info = layout.info
    pixels = np.frombuffer(content, layout.dtype, offset=layout.offset)
    return pixels.reshape(info.n_images, info.height_px, info.width_px)


# --- writing ---------------------------------------------------------------------------------------


def write_stack(
    path: Path,
    images: NDArray[np.floating] | Iterable[NDArray[np.floating]],
    *,
    pixel_size_angst: float,
    n_images: int | None = None,
) -> None:
    """Write images as a float32 stack with voxel size and statistics set; whole or not at all.

    images:   (n, h, w), or an iterable of such pieces, for stacks larger than memory.
    n_images: how many there must be in all, where that is known.

    Raises OutputError where ``path`` cannot be written.
    """
    pieces = [images] if isinstance(images, np.ndarray) else images
    statistics = _Statistics()
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(bytes(_HEADER_BYTES))
        for piece in pieces:
            pixels = np.ascontiguousarray(piece, "<f4")
            statistics.add(pixels)
            file.write(pixels.data)
        if n_images not in (None, statistics.shape[0]):
            raise ValueError(f"{statistics.shape[0]} images to write, {n_images} announced")
        file.seek(0)
        file.write(_header(statistics, pixel_size_angst).tobytes())


class _Statistics:
    """Shape, extremes, mean and spread of pixels that come piece by piece."""

    def __init__(self) -> None:
        self.shape = (0, 0, 0)
        self.minimum, self.maximum = np.inf, -np.inf
        self.mean = self.squares = 0.0
        self.n_pixels = 0

    def add(self, pixels: NDArray[np.float32]) -> None:
        """Take in images (k, h, w), by the pairwise update of Chan, Golub and LeVeque (1979)."""
        n, height, width = pixels.shape
        if self.shape[0] and self.shape[1:] != (height, width):
            raise ValueError(f"images of {self.shape[1:]} and {(height, width)} px in one stack")
        self.shape = (self.shape[0] + n, height, width)
        if not pixels.size:
            return
        self.minimum = min(self.minimum, float(pixels.min()))
        self.maximum = max(self.maximum, float(pixels.max()))
        mean = float(pixels.mean(dtype=np.float64))
        total, delta = self.n_pixels + pixels.size, mean - self.mean
        self.squares += float(pixels.var(dtype=np.float64)) * pixels.size
        self.squares += delta**2 * self.n_pixels * pixels.size / total
        self.mean += delta * pixels.size / total
        self.n_pixels = total


def _header(statistics: _Statistics, pixel_size_angst: float) -> NDArray[np.void]:
    n_images, height, width = statistics.shape
    if not statistics.n_pixels:
        raise ValueError("an MRC file holds at least one image")
    header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
    header["nx"], header["ny"], header["nz"] = width, height, n_images
    header["mx"], header["my"], header["mz"] = width, height, 1  # one section deep: a stack
    header["mode"] = 2
    for axis, pixels in (("x", width), ("y", height), ("z", 1)):
        header["cella"][axis] = pixels * pixel_size_angst
    for angle in ("alpha", "beta", "gamma"):
        header["cellb"][angle] = 90.0
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    header["dmin"], header["dmax"], header["dmean"] = (
        statistics.minimum,
        statistics.maximum,
        statistics.mean,
    )
    header["rms"] = np.sqrt(statistics.squares / statistics.n_pixels)
    header["map"] = b"MAP "
    header["machst"] = (0x44, 0x44, 0, 0)
    header["nversion"] = 20141
    header["nlabl"] = 1
    header["label"][0] = b"cryo_svae".ljust(80)
    return header
