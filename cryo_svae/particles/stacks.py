"""Image stacks that a particle file names: found, and checked to hold what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.mrc import StackInfo, read_stack_info
from cryo_svae.formats.star import StarBlock, StarFile

MOST_DIGITS = 19  # of a number in 64 bits


class _Slices(dict[str, int]):
    """0-based numbers of images by their texts; -1 for what is no number above 0."""

    def __missing__(self, text: str) -> int:
        is_number = text.isdecimal() and text.isascii() and len(text) < MOST_DIGITS
        self[text] = int(text) - 1 if is_number else -1
        return self[text]


def image_names(star: StarFile, block: StarBlock) -> tuple[list[str], NDArray[np.intp]]:
    """The stack that rlnImageName names for each particle, and the 0-based image (n,) in it."""
    names = block.text("rlnImageName")
    slices = _Slices()
    slice_of = np.fromiter((slices[name.partition("@")[0]] for name in names), np.intp, len(names))
    stacks = [name.partition("@")[2] for name in names]
    if (slice_of < 0).any() or not all(stacks):
        row = next(row for row, stack in enumerate(stacks) if slice_of[row] < 0 or not stack)
        raise InputError(
            star.path,
            line=block.line_of(row),
            column=f"_rlnImageName (#{block.labels.index('rlnImageName') + 1})",
            found=f"'{names[row]}'",
            expected="'<slice>@<stack>', slices counted from 1",
            remedy="name the image within its stack, e.g. '000001@stack.mrcs'.",
        )
    return stacks, slice_of


def find_stacks(
    star: StarFile, block: StarBlock, datadir: Path | None
) -> tuple[tuple[StackInfo, ...], NDArray[np.intp], NDArray[np.intp]]:
    """The stacks of rlnImageName, each particle's (n,) index into them and its 0-based image there.

    Raises InputError where a stack or an image is not there, or a box is odd or not square.
    """
    names, slice_of = image_names(star, block)
    index_of: dict[str, int] = {}
    stack_of = np.fromiter(
        (index_of.setdefault(name, len(index_of)) for name in names), np.intp, len(names)
    )
    first_rows = np.unique(stack_of, return_index=True)[1]
    lines = [block.line_of(int(row)) for row in first_rows]
    infos = [_stack(star, name, line, datadir) for name, line in zip(index_of, lines, strict=True)]
    sizes = np.array([info.n_images for info in infos])
    beyond = np.flatnonzero(slice_of >= sizes[stack_of])
    if len(beyond):
        row = int(beyond[0])
        info = infos[stack_of[row]]
        raise InputError(
            star.path,
            line=block.line_of(row),
            column="_rlnImageName",
            found=f"slice {slice_of[row] + 1}",
            expected=f"at most {info.n_images}, the number of images in {info.path}",
            remedy="check that the stack is the one the file was written for, and complete.",
        )
    return tuple(infos), stack_of, slice_of


def _stack(star: StarFile, name: str, line: int, datadir: Path | None) -> StackInfo:
    info = read_stack_info(_resolve(star, name, line, datadir))
    if info.width_px != info.height_px or info.width_px % 2:
        raise InputError(
            info.path,
            found=f"images of {info.width_px} x {info.height_px} px",
            expected="square images with an even number of pixels a side",
            remedy="extract or re-scale the particles to an even box.",
        )
    return info


def find_file(star: StarFile, name: str, datadir: Path | None) -> Path | None:
    """Where a file that a particle file names is: under ``datadir`` (there by its last name too), in the
    current folder (the project's), beside and above the particle file; None where it is not.
    """
    here = star.path.resolve().parent
    folders = [Path.cwd(), here, *here.parents]
    candidates = [folder / name for folder in folders]
    if datadir is not None:
        if not datadir.is_dir():
            raise InputError(
                "--datadir", found=f"no folder '{datadir}'", expected="a folder", remedy="check the path."
            )
        candidates = [datadir / name, datadir / Path(name).name, *candidates]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _resolve(star: StarFile, name: str, line: int, datadir: Path | None) -> Path:
    path = find_file(star, name, datadir)
    if path is not None:
        return path
    raise InputError(
        star.path,
        line=line,
        column="_rlnImageName",
        found=f"stack '{name}', which is not there",
        expected=f"it under the current folder {Path.cwd()}, or beside or above the particle file",
        remedy="run from the project's folder, or say where the stacks are by --datadir.",
    )
