"""Files appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from cryo_svae.errors import OutputError
from cryo_svae.formats.atomic import atomic_path


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "stack.mrcs"
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".mrcs"
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_alone(tmp_path: Path, stop: type[BaseException]) -> None:
    path = tmp_path / "particles.star"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise stop

    with pytest.raises(stop):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_told_before_the_work(tmp_path: Path) -> None:
    expected = r"absent/a\.star: cannot be written: No such file.*\n  To mend: make the folder first"
    with pytest.raises(OutputError, match=expected), atomic_path(tmp_path / "absent" / "a.star"):
        pytest.fail("the block must not run")


def test_a_folder_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.star").mkdir()
    with (
        pytest.raises(OutputError, match="remove the folder"),
        atomic_path(tmp_path / "a.star") as temporary,
    ):
        temporary.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.star"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OutputError, match="No space left on device"),
        atomic_path(tmp_path / "a") as temporary,
    ):
        temporary.write_bytes(b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), atomic_path(tmp_path / "a"):
        pytest.fail("the block must not run")
