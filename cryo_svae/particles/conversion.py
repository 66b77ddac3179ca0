"""STAR to .cs and back, for what both hold; what one cannot hold is named, never dropped in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryo_svae.config import SourceConfig
from cryo_svae.errors import InputError
from cryo_svae.formats.cs import Column, is_cs, read_particles_cs, write_cs
from cryo_svae.formats.mrc import read_stack_info
from cryo_svae.formats.star import StarBlock, StarFile, read_star, write_star
from cryo_svae.particles.particle_set import ParticleColumns, find_blocks, pixel_sizes, refuse_passthrough
from cryo_svae.particles.stacks import find_file, find_stacks, image_names
from cryo_svae.particles.star_and_cs import OPTICS, UID, Noted, cs_fields, star_of_cs

Reals = NDArray[np.float64]

# A CTF without aberrations, as CryoSPARC writes what it imports: shapes; zeros, but a scale of one.
PLAIN_CTF: dict[str, tuple[int, ...]] = {
    "ctf/phase_shift_rad": (),
    "ctf/scale": (),
    "ctf/scale_const": (),
    "ctf/shift_A": (2,),
    "ctf/tilt_A": (2,),
    "ctf/trefoil_A": (2,),
    "ctf/tetra_A": (4,),
    "ctf/anisomag": (4,),
    "ctf/bfactor": (),
}
# Labels whose content is carried, though not as a number of their own.
SAID_OTHERWISE = {
    "rlnImageName",
    "rlnMicrographName",
    "rlnOpticsGroupName",
    "rlnImageDimensionality",
    "rlnImagePixelSize",
    "rlnMagnification",
    "rlnDetectorPixelSize",
    "rlnPixelSize",
    UID,
}


def convert(path: Path, out: Path, source: SourceConfig, *, is_dark: bool) -> list[str]:
    """Writes a particle file in the other form; lines that say what was written and what was left out.

    is_dark: what a STAR file does not say and blob/sign must: whether the protein is dark.
    """
    if is_cs(path) == is_cs(out) or out.suffix.lower() not in (".cs", ".star"):
        raise InputError(
            "the command line",
            found=f"'{path}' and '{out}'",
            expected="a .star and a .cs file",
            remedy="name the file to write by its form, e.g. particles.cs.",
        )
    if is_cs(path):
        if is_dark:
            raise InputError(
                "--dark",
                found=f"it with {path}",
                expected="a STAR file to convert",
                remedy="leave it out: a .cs file says so itself, and a STAR file has no place for it.",
            )
        return _to_star(path, out, source)
    refuse_passthrough(path, source.passthrough)
    return _to_cs(path, out, source, is_dark)


def _to_star(path: Path, out: Path, source: SourceConfig) -> list[str]:
    table = read_particles_cs(path, source.passthrough)
    star, left_out = star_of_cs(table)
    write_star(out, star, block="particles", columns={})
    lines = [f"{len(table):,} particles in {out}"]
    if left_out:
        lines.append(f"not carried: {', '.join(left_out)}")
    if any(not name.endswith(".mrcs") for name in table.fields["blob/path"].tolist()):
        lines.append(
            "RELION reads image stacks only by names that end in .mrcs: link the others by such names"
        )
    return lines


def _to_cs(path: Path, out: Path, source: SourceConfig, is_dark: bool) -> list[str]:
    star = read_star(path)
    block, optics = find_blocks(star)
    columns = ParticleColumns(star, block, optics)
    size = pixel_sizes(columns, source.pixel_size)
    n = len(size)
    noted = Noted(_StarColumns(columns))
    stacks, slices = image_names(star, block)
    box = noted.get("rlnImageSize")
    if box is None:
        infos, stack_of, _ = find_stacks(star, block, source.datadir)
        box = np.array([info.width_px for info in infos], dtype=np.float64)[stack_of]
    fields: dict[str, Column] = {
        "uid": _uids(star, block),
        "blob/path": np.array(stacks, dtype=object),
        "blob/idx": slices.astype("<u4"),
        "blob/shape": np.column_stack([box, box]).astype("<u4"),
        "blob/psize_A": size.astype("<f4"),
        "blob/sign": np.full(n, -1 if is_dark else 1, dtype="<f4"),
    }
    messages: list[str] = []
    group = noted.get("rlnOpticsGroup")
    exposure = np.zeros(n) if group is None else group - 1
    if np.any(exposure < 0):
        exposure = columns.groups()[0].astype(np.float64)
        messages.append("exposure groups are counted anew, as an optics group is numbered below 1")
    fields |= _ctf_fields(noted, exposure)
    fields |= cs_fields(noted, size)
    fields |= _locations(columns, noted, exposure, source.datadir, messages)
    write_cs(out, fields)
    used = noted.asked | SAID_OTHERWISE
    left_out = [label for each in (optics, block) if each is not None for label in each.labels]
    left_out = [label for label in left_out if label not in used]
    left_out += [f"block data_{each.name}" for each in star.blocks if each not in (block, optics)]
    lines = [f"{n:,} particles in {out}", *messages]
    if left_out:
        lines.append(f"not carried: {', '.join(left_out)}")
    return lines


class _StarColumns(Mapping[str, Column]):
    """Numbers (n,) by label, read when asked for."""

    def __init__(self, columns: ParticleColumns) -> None:
        self.columns = columns
        optics = () if columns.optics is None else columns.optics.labels
        self.labels = tuple(dict.fromkeys((*optics, *columns.block.labels)))

    def __getitem__(self, label: str) -> Column:
        values = self.columns.get(label)
        if values is None:
            raise KeyError(label)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)


def _uids(star: StarFile, block: StarBlock) -> Column:
    """The uids that the file carries from CryoSPARC, or new ones made of the image names."""
    if block.has(UID):
        texts = block.text(UID)
        wrong = [row for row, text in enumerate(texts) if not (text.isdecimal() and int(text) < 2**64)]
        if wrong or len(set(texts)) < len(texts):
            raise InputError(
                star.path,
                line=block.line_of(wrong[0]) if wrong else None,
                column=f"_{UID}",
                found=f"'{texts[wrong[0]]}'" if wrong else "a uid twice",
                expected="whole numbers below 2^64, each once",
                remedy="remove the column: new ones are then made.",
            )
        return np.array([int(text) for text in texts], dtype="<u8")
    seen: Counter[str] = Counter()
    uids = np.empty(block.n_rows, dtype="<u8")
    for row, name in enumerate(block.text("rlnImageName")):
        digest = blake2b(f"{seen[name]}:{name}".encode(), digest_size=8).digest()
        uids[row] = int.from_bytes(digest, "little")
        seen[name] += 1
    return uids


def _ctf_fields(noted: Noted, exposure: Reals) -> dict[str, Column]:
    """The CTF but for defocus and angles, without aberrations."""
    fields: dict[str, Column] = {"ctf/exp_group_id": exposure.astype("<u4")}
    for field, label in OPTICS.items():
        values = noted.get(label)
        if values is not None and field != "blob/psize_A":
            fields[field] = values.astype("<f4")
    if noted.get("rlnDefocusU") is not None:
        n = len(exposure)
        fields["ctf/type"] = np.array(["imported"] * n, dtype=object)
        for field, shape in PLAIN_CTF.items():
            fields[field] = np.full((n, *shape), 1 if field == "ctf/scale" else 0, dtype="<f4")
    return fields


def _locations(
    columns: ParticleColumns, noted: Noted, exposure: Reals, datadir: Path | None, messages: list[str]
) -> dict[str, Column]:
    """Micrographs, and where in them the particles are, as shares of their sides."""
    star, block = columns.star, columns.block
    if not block.has("rlnMicrographName"):
        return {}
    names = block.text("rlnMicrographName")
    fields: dict[str, Column] = {
        "location/micrograph_path": np.array(names, dtype=object),
        "location/exp_group_id": exposure.astype("<u4"),
    }
    if not (block.has("rlnCoordinateX") and block.has("rlnCoordinateY")):
        return fields
    shapes: dict[str, tuple[int, int]] = {}
    for name in dict.fromkeys(names):
        path = find_file(star, name, datadir)
        try:
            info = None if path is None else read_stack_info(path)
        except InputError:
            info = None
        if info is None:
            messages.append(
                f"coordinates are left out: as shares of the micrographs' sides they need {name} as an "
                "MRC file (run from the project's folder, or give --datadir)"
            )
            return fields
        shapes[name] = (info.height_px, info.width_px)
    shape = np.array([shapes[name] for name in names])
    x, y = noted.get("rlnCoordinateX"), noted.get("rlnCoordinateY")
    if x is not None and y is not None:
        fields["location/micrograph_shape"] = shape.astype("<u4")
        fields["location/center_x_frac"] = (x / shape[:, 1]).astype("<f4")
        fields["location/center_y_frac"] = (y / shape[:, 0]).astype("<f4")
    return fields
