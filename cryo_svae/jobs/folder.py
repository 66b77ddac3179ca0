"""The job folder: what it may hold before a run, its log, and its record of the run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import cryo_svae
from cryo_svae.computing import distributed
from cryo_svae.config import plain, read_yaml, write_yaml
from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.atomic import atomic_path, is_leftover, write_refused
from cryo_svae.formats.mrc import StackInfo

log = logging.getLogger("cryo_svae")

CHECKPOINT = "model.pt"
CONFIG = "config.yaml"
LOCK = ".lock"
RESULT_PATTERNS = (
    CHECKPOINT,
    CONFIG,
    "particles.star",
    "particles.cs",
    "latents.h5",
    "decoded.mrcs",
    "classes.mrcs",
    "classes.star",
    "Class2D/run_it025_*",
    "traversal_*.mrcs",
    "decoded_*.mrcs",
    "average_*.mrcs",
    "epochs.tsv",
    "report.html",
    "logfile.pdf",
    "run.json",
    "run.log",
)


class _Memory(logging.Handler):
    """Keeps the warnings, for the record of the run."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one warning."""
        self.texts.append(record.getMessage())


class _Plain(logging.Formatter):
    """Messages without time or level, except that warnings begin with WARNING."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        mark = "WARNING: " if record.levelno >= logging.WARNING else ""
        return mark + record.getMessage()


class _LogFile(logging.Handler):
    """Appends messages to a file; a refusal of the system ends the job rather than printing a traceback."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Appends one message."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.format(record) + "\n")
        except OSError as error:
            raise OutputError(write_refused(self.path, error)) from error


class Job:
    """A job folder in use; of several processes (see distributed) only the first writes and speaks.

    before_batch: called before each batch of training and each read of images; what it raises ends the job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before_batch: Callable[[], None] = lambda: None
        self._warnings = _Memory()
        self._began = time.time()
        self._timings: dict[str, float] = {}

    def path(self, name: str) -> Path:
        """Path of a file of the job."""
        return self.folder / name

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Messages go to the terminal and to run.log while this lasts."""
        handlers: list[logging.Handler] = [self._warnings]
        if distributed.rank() == 0:
            handlers += [logging.StreamHandler(sys.stdout), _LogFile(self.path("run.log"))]
        for handler in handlers:
            handler.setFormatter(_Plain())
            log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            for handler in handlers:
                log.removeHandler(handler)
                handler.flush()

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds of a part of the job to its record."""
        began = time.monotonic()
        yield
        self._timings[what] = round(time.monotonic() - began, 3)

    def note_waiting(self, what: str, seconds: float) -> None:
        """Adds the seconds that a timed part waited for images to the record, and says their share."""
        self._timings[f"{what}, waiting for images"] = round(seconds, 3)
        log.info(
            "%s waited for images %.0f %% of its time", what, 100 * seconds / max(self._timings[what], 1e-9)
        )

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """The resolved settings, from which the run repeats."""
        if distributed.rank() > 0:
            return
        with atomic_path(self.path(CONFIG)) as temporary:
            write_yaml(temporary, settings)

    def write_record(
        self, inputs: Mapping[str, Any], settings: Mapping[str, Any], device: torch.device
    ) -> None:
        """run.json: versions, settings, inputs with digests, timings, warnings."""
        if distributed.rank() > 0:
            return
        seconds = {**self._timings, "job": round(time.time() - self._began, 3)}
        parts = (f"{what} {spent:.1f} s" for what, spent in seconds.items() if "," not in what)
        log.info("time: %s", ", ".join(parts))
        packages = ("torch", "numpy", "scipy", "mrcfile", "h5py")
        record = {
            "program": f"cryo_svae {cryo_svae.__version__}",
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._began)),
            "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": distributed.n_started(),
            "threads": torch.get_num_threads(),
            "seed": settings["seed"],
            "config": plain(settings),
            "inputs": inputs,
            "seconds": seconds,
            "warnings": self._warnings.texts,
        }
        with atomic_path(self.path("run.json")) as temporary:
            temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def open_job(folder: Path, *, overwrite: bool, resume: bool) -> Iterator[Job]:
    """The folder, made if need be, and this process's alone while this lasts.

    Raises OutputError where another process uses it, or where it holds results and nothing is said of
    what to do with them.
    """
    if overwrite and resume:
        raise InputError(
            "--resume",
            found="--overwrite with it",
            expected="one of the two",
            remedy="--resume goes on with the job, --overwrite starts it anew.",
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(
            "--out", found=f"the file '{folder}'", expected="a folder", remedy="name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made: {error.strerror}.\n  To mend: name a folder that you may write to."
        ) from error
    with _locked(folder):
        results = sorted(path for pattern in RESULT_PATTERNS for path in folder.glob(pattern))
        if results and not (overwrite or resume):
            raise OutputError(
                f"{folder}: holds results ({results[0].name}, …).\n"
                "  To mend: name another folder, or add --resume to go on, or --overwrite to start anew."
            )
        hidden = [*folder.glob(".*"), *folder.glob("*/.*")]
        leftovers = [path for path in hidden if is_leftover(path)]  # of a process that was killed
        for path in [*leftovers, *(results if overwrite else [])]:
            path.unlink()
        yield Job(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which the system frees when this process ends in whatever way."""
    path = folder / LOCK
    try:
        file = path.open("a+")
    except OSError as error:
        raise OutputError(write_refused(path, error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise OutputError(
                f"{folder}: in use by {file.read().strip() or 'another process'}.\n"
                "  To mend: name another folder, or wait until that process has ended."
            ) from error
        except OSError as error:
            log.warning(
                "%s: this file system has no locks (%s): mind that no other job writes there",
                folder,
                error.strerror,
            )
        with contextlib.suppress(OSError):  # a full disk is told of where it matters
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        yield


def settings_to_resume(job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the job's config.yaml; those given again must be the same."""
    path = job.path(CONFIG)
    if not path.exists():
        return dict(given)
    kept = read_yaml(path)
    for name, value in given.items():
        plain = str(value) if isinstance(value, Path) else value
        if name in kept and kept[name] != plain:
            raise InputError(
                f"--{name.replace('_', '-')}",
                found=repr(plain),
                expected=f"{kept[name]!r}, as in {path}",
                remedy="resume with the same settings, or start anew with --overwrite.",
            )
    return {**given, **kept}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_stacks(infos: Iterable[StackInfo]) -> str:
    """SHA-256 of what tells stacks apart without reading them whole: names, sizes, first 64 KiB."""
    whole = hashlib.sha256()
    for info in infos:
        whole.update(f"{info.path}\0{info.path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with info.path.open("rb") as file:
            whole.update(file.read(1 << 16))
    return whole.hexdigest()
