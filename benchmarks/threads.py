"""Threads of the processor, on an idle machine and beside another job.

    python -m benchmarks.threads [--threads 1 2] [--epochs 5] [--relion]

Seconds an epoch and images a second estimated, of the example. ``spinning`` is the program with OpenMP's
threads as they are by default, which spin where they wait; ``sleeping`` as ``cryo-svae`` starts them, a
thousand turns and then asleep. The other job is an endless loop in a process of its own. With --relion,
RELION's 2-D classification of the same particles with as many threads (--j), seconds an iteration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import trials
from benchmarks.relion import classify

EXAMPLE = Path("example_data")
DIAMETER_ANGST = 150.0
ENTRIES = {
    "spinning": "import sys; from cryo_svae.cli import main; sys.exit(main())",
    "sleeping": "from cryo_svae.cli import entry_point; entry_point()",
}


@contextlib.contextmanager
def other_job(there: bool) -> Iterator[None]:
    """While this lasts an endless loop takes one core, or nothing does."""
    if not there:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        try:
            yield
        finally:
            loop.kill()


def ours(entry: str, threads: int, epochs: int, folder: Path) -> tuple[float, float]:
    """Median seconds an epoch, and images/s estimated, of a whole job in a process of its own."""
    job = folder / "job"
    command = [
        "run",
        str(folder / "set" / "particles.star"),
        "--out",
        str(job),
        "--overwrite",
        "--z-dim",
        "1",
        "--epochs",
        str(epochs),
    ]
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    subprocess.run(
        [sys.executable, "-c", ENTRIES[entry], *command, "--threads", str(threads), "--device", "cpu"],
        env={name: value for name, value in os.environ.items() if name not in names},
        capture_output=True,
        check=True,
    )
    rows = (job / "epochs.tsv").read_text().splitlines()[1:]
    record = json.loads((job / "run.json").read_text())
    rate = record["inputs"]["particles"] / record["seconds"]["estimation"]
    return float(np.median([float(row.split("\t")[-1]) for row in rows])), rate


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--relion", action="store_true")
    arguments = parser.parse_args()
    lines = [f"{'':22s} {'idle: s an epoch, images/s':>28s} {'beside a job: the same':>28s}"]
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(EXAMPLE, Path(name) / "set")
        for threads in arguments.threads:
            for entry in ENTRIES:
                figures = []
                for busy in (False, True):
                    with other_job(busy):
                        figures.append(ours(entry, threads, arguments.epochs, Path(name)))
                texts = (f"{epoch:18.2f} {rate:9.0f}" for epoch, rate in figures)
                lines.append(f"{threads} threads, {entry:11s} " + " ".join(texts))
                print(lines[-1], flush=True)
            if arguments.relion:
                spent = []
                for busy in (False, True):
                    with other_job(busy):
                        found = classify(
                            Path(name) / "set" / "particles.star", classes=10, iterations=3,
                            diameter_angst=DIAMETER_ANGST, offset_range_px=3, pad=1, threads=threads,
                        )  # fmt: skip
                    spent.append(found.seconds / 3)
                lines.append(f"{threads} threads, RELION      {spent[0]:18.2f} {'':9s} {spent[1]:18.2f}")
                print(lines[-1], flush=True)
    trials.report("threads", lines)


if __name__ == "__main__":
    main()
