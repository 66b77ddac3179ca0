"""Damaged and made-up STAR, MRC and .cs files: read rightly, or refused with one InputError?

python -m benchmarks.torture [--cases 100000] [--zoo ../shared/data] [--only star|mrc|cs] [--first 0]

Cases are real files with bytes changed, inserted, left out, repeated or cut off, and files of a grammar of
all that a format knows, in any order; each is made from its number alone. What is read is compared with
what mrcfile, starfile and (where it is installed) gemmi read of the same file, and of one STAR file in a
hundred with what RELION does.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import linecache
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import mrcfile
import numpy as np
import starfile

from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.cs import read_cs
from cryo_svae.formats.mrc import read_images, read_stack_info
from cryo_svae.formats.star import StarBlock, StarFile, read_star, write_star

try:
    from gemmi import cif
except ModuleNotFoundError:  # a judge more where it is there
    cif = None

SHARES = {"star": 0.5, "mrc": 0.4, "cs": 0.1}  # of the cases
SECONDS = 10.0  # a case that takes longer hangs
MEGABYTES = 256  # more than any case may need
LARGEST = 70_000  # bytes of the real files that are damaged


# --- cases -----------------------------------------------------------------------------------------


Draw = Callable[[Random], bytes]  # a case of a generator of random numbers


def damaged(contents: list[bytes], alphabet: bytes, head: int) -> Draw:
    """One of the files with one to four changes, half of them among its first ``head`` bytes."""

    def one(rng: Random) -> bytes:
        content = bytearray(rng.choice(contents))
        for _ in range(rng.randint(1, 4)):
            last = max(len(content) - 1, 0)
            at = rng.randint(0, min(head, last) if rng.random() < 0.5 else last)
            length = rng.randint(1, 200)
            piece = bytes(rng.choices(alphabet, k=rng.randint(1, 6)))
            match rng.choice(["change", "insert", "leave out", "repeat", "cut", "flip"]):
                case "change":
                    content[at : at + 1] = piece[:1]
                case "flip":
                    content[at : at + 1] = bytes(b ^ (1 << rng.randrange(8)) for b in content[at : at + 1])
                case "insert":
                    content[at:at] = piece
                case "leave out":
                    del content[at : at + length]
                case "repeat":
                    content[at:at] = content[at : at + length]
                case "cut":
                    del content[at:]
        return bytes(content)

    return one


STAR_WORDS = [
    *("data_", "data_particles", "data_optics", "loop_", "loop_ ", "_rlnA", "_rlnB #2", "_rlnC", "_"),
    *("save_x", "stop_", "global_", "1", "-2.5", "1e-9", "1e400", "nan", "-inf", "0x10", "1_0", "١", "abc"),
    *("000001@a.mrcs", "'a b'", '"a b"', "'", '"', "it's", "''", "#", "# a comment", ";", "; text", "a;b"),
    *("x" * 300, "\ufeff", "\x00", "µ", "\x85", "\u2028", "\x0b", "\x0c", "\xa0", "$x", "[1", "?", "."),
]
STAR_ROWS = [
    "1 2",
    "3.5 -4e2",
    "'a b' 5",
    "6 # seven",
    "8 9 10",
    "  11\t12  ",
    "loop_ 13",
    "_x 14",
    "data_a 15",
]
RESERVED = ("_", "data_", "loop_", "save_", "stop_", "global_")
HEADERS = [
    "data_\nloop_\n_a\n_b\n",
    "data_particles\n\nloop_ \n_rlnAnglePsi #1 \n_rlnClassNumber #2 \n",
    "",
]


BLANKS = (" ", "\n", "\n", "\t", "\r\n", "\r", "  ", "\n\n")


def star_text(rng: Random) -> bytes:
    """Words of STAR files in any order, behind the head of a table or nothing."""
    oddness = rng.choice([0.0, 0.1, 1.0])
    text = rng.choice(HEADERS)
    for _ in range(rng.randint(0, 14)):
        if rng.random() < oddness:
            text += rng.choice(STAR_WORDS + STAR_ROWS) + rng.choice(BLANKS)
        else:
            text += f"{rng.uniform(-999, 999):.{rng.randint(0, 9)}f} {rng.randint(-99, 99)}\n"
    return text.encode() if rng.random() < 0.5 else text.rstrip().encode()


ODD_INTEGERS = (-(2**31), -1, 0, 1, 2, 3, 4, 6, 12, 101, 1024, 10**9, 2**31 - 1)
MODES = (0, 1, 2, 6, 12)
SHARE_ODD = 0.1  # of the fields of a header


def mrc_file(rng: Random) -> bytes:
    """A header whose fields are right or odd, and as many bytes as it claims, or others."""

    def field(*usual: int) -> int:
        return rng.choice(ODD_INTEGERS if rng.random() < SHARE_ODD else usual)

    order = rng.choice("<>")
    width, height, n_images = (field(*range(1, 10)) for _ in range(3))
    mode, extended = field(*MODES), field(0, 0, 0, 4, 1024)
    header = bytearray(1024)
    sampling = [field(*range(1, 10)) for _ in range(3)]
    struct.pack_into(f"{order}10i", header, 0, width, height, n_images, mode, 0, 0, 0, *sampling)
    header[40:52] = rng.randbytes(12) if rng.random() < SHARE_ODD else struct.pack(f"{order}3f", 9, 9, 9)
    struct.pack_into(f"{order}i", header, 92, extended)
    header[208:212] = rng.choice([b"MAP ", b"MAP\0", b"\0\0\0\0"])
    stamps = [b"DD\0\0", b"DA\0\0", b"\x11\x11\0\0", b"\0\0\0\0", b"\xff\xff\xff\xff"]
    header[212:216] = rng.choice(stamps)
    size = max(extended, 0) + max(width * height * n_images, 0) * {0: 1, 1: 2, 6: 2, 12: 2}.get(mode, 4)
    size += rng.choice([0, 0, 0, -1, 1, 1024])
    content = bytes(header) + rng.randbytes(max(min(size, 4096), 0))
    pack: Callable[[bytes], bytes] = rng.choice([bytes, bytes, gzip.compress, bz2.compress])
    return pack(content)


# --- checks ----------------------------------------------------------------------------------------


def check_star(path: Path, with_relion: bool = False) -> str:
    """What becomes of a STAR file: 'read' or 'refused'; AssertionError where it is read wrongly."""
    try:
        star = read_star(path)
    except InputError:
        return "refused"
    for block in star.blocks:
        for label in block.labels:
            cells = block.text(label)
            assert len(cells) == block.n_rows
            with suppress(InputError):
                np.testing.assert_array_equal(block.numbers(label), [float(cell) for cell in cells])
    out = path.with_name("out.star")
    write_star(out, star, block=star.blocks[0].name, columns={})
    assert out.read_bytes() == path.read_bytes()
    _check_extended(star, out)
    _check_beside_starfile(star)
    if cif is not None:
        _check_beside_gemmi(star)
    if with_relion:
        _check_beside_relion(star)
    return "read"


def _check_extended(star: StarFile, out: Path) -> None:
    """A column added moves no other cell."""
    name = star.blocks[0].name
    block = star.block(name)
    if not block.labels or block.has("svaeZ1"):
        return
    try:
        write_star(out, star, block=name, columns={"svaeZ1": ["-1.5e-3"] * block.n_rows})
    except OutputError:  # a list's text of several lines, which no row can hold
        assert not block.is_loop
        return
    again = read_star(out)
    assert [(b.name, b.n_rows) for b in again.blocks] == [(b.name, b.n_rows) for b in star.blocks]
    for before, after in zip(star.blocks, again.blocks, strict=True):
        assert after.labels == (*before.labels, *(["svaeZ1"] if before is block else []))
        assert all(before.text(label) == after.text(label) for label in before.labels)


def _same_numbers(block: StarBlock, label: str, theirs: list[str], judge: str) -> None:
    """Where both take all cells for numbers, they are the same numbers."""
    try:
        ours = block.numbers(label)
        numbers = np.array([float(text) for text in theirs])
    except (InputError, ValueError):
        return
    np.testing.assert_array_equal(ours, numbers, err_msg=f"{judge}: {label}")


def _check_beside_starfile(star: StarFile) -> None:
    if b"\r" in star._text.data.replace(b"\r\n", b""):
        return  # starfile takes it for a line's end, and then loses rows
    labels = sorted({label for block in star.blocks for label in block.labels})
    linecache.clearcache()  # where starfile fails, it leaves that file's lines there for the next one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            judged = starfile.read(star.path, always_dict=True, parse_as_string=labels)
    except Exception:  # it has no errors of its own
        return
    names = [block.name for block in star.blocks]
    for block in star.blocks:
        table = judged.get(block.name)
        if table is None or names.count(block.name) > 1 or list(table) != list(block.labels):
            continue
        if any(cell.startswith("data_") for cell in block.text(block.labels[0])):
            continue  # starfile takes such a row for a heading, RELION does not
        for label in block.labels:
            theirs = [str(cell) for cell in (table[label] if block.is_loop else [table[label]])]
            _same_numbers(block, label, theirs, "starfile")


def _check_beside_gemmi(star: StarFile) -> None:
    try:
        document = cif.read_string(star._text.data.decode())
    except (ValueError, RuntimeError):
        return
    for block in star.blocks:
        found = [each for each in document if each.name.strip() == block.name]
        cells = [cell for label in block.labels for cell in block.text(label)]
        if len(found) != 1 or any(cell.lower().startswith(RESERVED) for cell in cells):
            continue  # RELION takes such rows for rows up to a blank line, and so do we
        for label in block.labels:
            theirs = [cif.as_string(cell) for cell in found[0].find_values(f"_{label}")]
            _same_numbers(block, label, theirs, "gemmi")


def _check_beside_relion(star: StarFile) -> None:
    for block in star.blocks:
        for label in block.labels:
            done = subprocess.run(
                ["relion_star_printtable", star.path, f"data_{block.name}", f"_{label}"],
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
            words = done.stdout.decode("utf-8", "replace").split()
            if done.returncode == 0 and len(words) == block.n_rows:
                _same_numbers(block, label, words, "RELION")


def check_mrc(path: Path) -> str:
    """What becomes of an MRC file: 'read' or 'refused'; AssertionError where it is read wrongly."""
    try:
        info = read_stack_info(path)
        images = read_images(path, np.array([info.n_images - 1, 0]))
    except InputError:
        return "refused"
    assert images.shape == (2, info.height_px, info.width_px)
    content = path.read_bytes()
    for magic, unpack in ((b"\x1f\x8b", gzip.decompress), (b"BZh", bz2.decompress)):
        if content.startswith(magic):
            content = unpack(content)
    assert images.nbytes <= 8 * len(content)
    if content[152:156] in (b"IMOD", b"DOMI"):  # signs of bytes, which mrcfile does not know
        return "read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            judged = mrcfile.open(path, permissive=True).data
    except (ValueError, OSError, EOFError):
        return "read"
    if judged is not None and judged.ndim >= 2:
        theirs = judged.reshape(-1, *judged.shape[-2:])
        if theirs.shape == (info.n_images, info.height_px, info.width_px):
            np.testing.assert_array_equal(images, theirs[[-1, 0]].astype(np.float32))
    return "read"


def check_cs(path: Path) -> str:
    """What becomes of a .cs file: 'read' or 'refused'."""
    try:
        table = read_cs(path)
    except InputError:
        return "refused"
    assert all(len(values) == len(table) for values in table.fields.values())
    return "read"


@contextmanager
def in_time() -> Iterator[None]:
    """AssertionError in what takes more of the processor's time than a file may."""

    def end(*_: object) -> None:
        raise AssertionError(f"no end after {SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# --- the command -----------------------------------------------------------------------------------


def contents(paths: list[Path]) -> list[bytes]:
    """Files that are small enough to be damaged often."""
    read = [path.read_bytes() for path in sorted(paths)]
    return [content for content in read if len(content) <= LARGEST]


def cases(kind: str, zoo: Path) -> tuple[list[Draw], Callable[[Path], str], str]:
    """Where files of a kind come from, their check, and the ending of their names."""
    if kind == "star":
        real, made = contents(list(zoo.glob("star_zoo/**/*.star"))), [star_text]
        check, ending, alphabet, head = (
            check_star,
            ".star",
            b"\n\n \t'\"#;_-.@eE0123456789dlx\r\xff\0",
            2000,
        )
    elif kind == "mrc":
        real, made = contents(list(zoo.glob("mrc_zoo/*.map*"))), [mrc_file]
        check, ending, alphabet, head = check_mrc, ".mrcs", bytes(range(256)), 256
    else:
        real, made = contents(list(zoo.glob("star_zoo/**/*.cs"))), []
        check, ending, alphabet, head = check_cs, ".cs", bytes(range(256)), 400
    return [*made, *([damaged(real, alphabet, head)] if real else [])], check, ending


def torture(
    kind: str, zoo: Path, numbers: Iterable[int], folder: Path, with_relion: bool = False
) -> Counter[str]:
    """Runs the cases of a kind that have these numbers; how many were read, how many refused, how many
    went wrong. Of the latter, each is printed, and its file kept in the current folder.
    """
    draws, check, ending = cases(kind, zoo)
    seen: Counter[str] = Counter()
    path = folder / f"case{ending}"
    for number in numbers if draws else ():
        rng = Random(f"{kind} {number}")
        content = rng.choice(draws)(rng)
        path.write_bytes(content)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with in_time():
                if with_relion and kind == "star" and number % 100 == 0:
                    seen[check_star(path, with_relion=True)] += 1
                else:
                    seen[check(path)] += 1
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory >= 1000 * MEGABYTES:
                raise AssertionError(f"more than {MEGABYTES} MB")
        except Exception as error:  # a reader may raise anything; the next case is tried all the same
            seen["wrong"] += 1
            kept = Path(f"torture_{kind}_{number}{ending}")
            kept.write_bytes(content)
            print(f"{kept}: {type(error).__name__}: {error}", flush=True)
    return seen


def benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="half of them STAR, then MRC, then .cs")
    parser.add_argument("--zoo", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", choices=("star", "mrc", "cs"))
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    options = parser.parse_args()
    in_memory = Path("/dev/shm")  # the disk's time is not what is tried here
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as folder:
        for kind in [options.only] if options.only else SHARES:
            began, worked = time.monotonic(), time.process_time()
            with_relion = shutil.which("relion_star_printtable") is not None
            n_cases = round(options.cases * (1.0 if options.only else SHARES[kind]))
            numbers = range(options.first, options.first + n_cases)
            seen = torture(kind, options.zoo, numbers, Path(folder), with_relion)
            gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"{kind:5s} {seen.total():7d} cases: {seen['read']} read, {seen['refused']} refused, "
                f"{seen['wrong']} wrong; {time.monotonic() - began:.0f} s "
                f"({time.process_time() - worked:.0f} s of the processor), {gigabytes:.2f} GB at most",
                flush=True,
            )


if __name__ == "__main__":
    benchmark()
