"""Jobs killed (SIGKILL) at random moments and resumed, beside the same job left alone: equal to the letter?

python -m benchmarks.kills [--kills 20] [--particles 400] [--seed 0] [--engine steerable]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from cryo_svae.cli import main

RESULTS = ("particles.star", "latents.h5", "decoded.mrcs", "classes.mrcs")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cryo_svae.jobs.stages"])


def _job(arguments: Sequence[str]) -> None:
    """What a killed process does: the command line, on one thread, without a word."""
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        sys.exit(main(arguments))


def run(arguments: Sequence[str], seconds: float | None = None) -> bool:
    """Runs a command in a process of its own, and kills it after so long; whether it was killed."""
    process = PROCESSES.Process(target=_job, args=(list(arguments),))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        raise RuntimeError(f"{' '.join(arguments)}: exit code {process.exitcode}")
    return process.exitcode == -9


def where(job: Path) -> str:
    """How far a killed job had got, by its files."""
    if (job / "particles.star").exists():
        return "pages and Class2D"
    if (job / "decoded.mrcs").exists():
        return "export"
    epochs = job / "epochs.tsv"
    n_rows = len(epochs.read_text().splitlines()) - 1 if epochs.exists() else -1
    return "before any result" if n_rows < 0 else f"after epoch {n_rows}"


def kill_and_resume(arguments: Sequence[str], job: Path, seconds: float) -> str | None:
    """How far the job had got when killed; None where it had ended by then. Afterwards it is whole."""
    if not run([*arguments, "--out", str(job)], seconds):
        return None
    place = where(job)
    run([*arguments, "--out", str(job), "--resume"])
    return place


def differing(a: Path, b: Path) -> list[str]:
    """Names of results that differ between two jobs."""
    names = [name for name in RESULTS if (a / name).exists() or (b / name).exists()]
    return [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()]


def trials(arguments: Sequence[str], folder: Path, n_kills: int, seed: int) -> Counter[tuple[str, str]]:
    """Kills by (how far the job had got, which results then differ from those of a job left alone)."""
    whole = folder / "whole"
    began = time.monotonic()
    run([*arguments, "--out", str(whole)])
    seconds = time.monotonic() - began
    moments = random.Random(seed)
    seen: Counter[tuple[str, str]] = Counter()
    tried = 0
    while seen.total() < n_kills:
        tried += 1
        job = folder / f"job{tried}"
        place = kill_and_resume(arguments, job, moments.uniform(0.0, seconds))
        if place is not None:
            seen[place, ", ".join(differing(whole, job)) or "none"] += 1
    return seen


def benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--particles", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="steerable")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(["simulate", "--out", str(folder / "set"), "--n-particles", str(options.particles)])
        star = str(folder / "set" / "particles.star")
        settings = ["--engine", options.engine, "--epochs", "3", "--device", "cpu"]
        run(["train", star, "--out", str(folder / "model"), *settings])
        jobs = {
            "run": ["run", star, *settings],
            "estimate": [
                "estimate",
                star,
                "--model",
                str(folder / "model" / "model.pt"),
                "--device",
                "cpu",
            ],
        }
        for command, arguments in jobs.items():
            (folder / command).mkdir()
            seen = trials(arguments, folder / command, options.kills, options.seed)
            for (place, names), count in sorted(seen.items()):
                print(f"{command:10s} {count:3d} killed {place:20s} differing afterwards: {names}")


if __name__ == "__main__":
    benchmark()
