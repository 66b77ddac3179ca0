"""Damaged and made-up files: read rightly, or refused with one InputError; see benchmarks.torture."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from benchmarks.torture import check_mrc, check_star, torture
from cryo_svae.errors import InputError
from cryo_svae.formats.mrc import read_images
from cryo_svae.formats.star import read_star

N_CASES = 300
CASES = range(N_CASES)  # the same ones each time; benchmarks.torture goes on to others


@pytest.mark.parametrize("kind", ["star", "mrc", "cs"])
def test_damaged_files_are_read_rightly_or_refused(
    shared_data: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = torture(kind, shared_data, CASES, tmp_path)
    assert seen["read"]
    assert seen["refused"]
    assert not seen["wrong"]


@pytest.mark.parametrize("kind", ["star", "mrc"])
def test_made_up_files_are_read_rightly_or_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = torture(kind, tmp_path, CASES, tmp_path)
    assert seen["read"]
    assert seen["refused"]
    assert not seen["wrong"]


def test_the_checks_fail_on_a_wrong_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is off by a little is found out by its judges, and the file is kept."""
    path = tmp_path / "a.star"
    path.write_text("data_\nloop_\n_a\n1.5\n2.5\n")
    assert check_star(path) == "read"
    monkeypatch.setattr("benchmarks.torture.read_star", lambda path: _shifted(read_star(path)))
    with pytest.raises(AssertionError):
        check_star(path)
    monkeypatch.chdir(tmp_path)
    seen = torture("star", tmp_path, range(N_CASES), tmp_path)
    assert seen["wrong"] == len(list(tmp_path.glob("torture_star_*.star"))) > 0
    stack = tmp_path / "a.mrcs"
    header = bytearray(1024)
    struct.pack_into("<4i", header, 0, 2, 2, 1, 2)
    stack.write_bytes(bytes(header) + struct.pack("<4f", 1, 2, 3, 4))
    assert check_mrc(stack) == "read"
    monkeypatch.setattr("benchmarks.torture.read_images", lambda *given: read_images(*given) + 1)
    with pytest.raises(AssertionError):
        check_mrc(stack)


def _shifted(star):
    for block in star.blocks:
        block._bounds[:, 0] += 1
    return star


def test_a_judge_that_fails_says_nothing_of_the_next_file(tmp_path: Path) -> None:
    """starfile keeps the lines of a file it can't read, and gave them for those of the next one."""
    path = tmp_path / "case.star"
    table = "data_particles\n\nloop_\n_rlnAnglePsi #1\n_rlnClassNumber #2\n"
    path.write_text(f"{table}471.44731 -7\n-452.6 52\n160.89 -12\n544.4 36\ndata_optics")
    assert check_star(path) == "read"
    path.write_text(f"{table}497.69171 59\n-20.08 -57\n-448.0733 79\n")
    assert check_star(path) == "read"


@pytest.mark.parametrize("pack", [".mrcs", ".mrcs.gz"])
def test_a_header_that_claims_a_world_of_pixels_costs_nothing(tmp_path: Path, pack: str) -> None:
    header = bytearray(1024)
    struct.pack_into("<4i", header, 0, 10**9, 10**9, 2**31 - 1, 2)
    path = tmp_path / f"big{pack}"
    content = bytes(header) + bytes(100)
    path.write_bytes(gzip.compress(content) if pack.endswith("gz") else content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="1000000000 x 1000000000 px"):
            read_images(path, np.array([0, 5]))
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()
