"""Estimation of many particles in many stacks: memory, and the share of its time spent waiting for images.

python -m benchmarks.estimate_scale [--counts 20000 100000 1000000] [--stacks 2000] [--box 32]
                                    [--limit-gb 2.0] [--train]

Each count is one cryo-svae estimate in a process of its own, on the first images of every stack. The model
is as small as can be, so that reading weighs as much as it can. No process is given more memory of its
own than the limit (RLIMIT_DATA; files that it maps are not counted), whatever the size of the stacks.
With --train, an epoch of the steerable engine on the most particles comes last: prepared images that
exceed 1 GiB are kept on disk, in half precision. (What is known of each particle stays in memory.)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from cryo_svae.formats.mrc import write_stack
from cryo_svae.formats.star import write_tables

OPTICS = {
    "rlnOpticsGroupName": ["optics1"],
    "rlnOpticsGroup": ["1"],
    "rlnImagePixelSize": ["3.0"],
    "rlnImageSize": ["32"],
    "rlnImageDimensionality": ["2"],
}
COMMAND = "import sys; from cryo_svae.cli import main; sys.exit(main(sys.argv[1:]))"


def write_stacks(folder: Path, n_stacks: int, n_images: int, box: int) -> None:
    """Stacks of blobs in noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:box, :box] - box // 2
    blob = np.exp(-((x / 3.0) ** 2 + (y / 6.0) ** 2)).astype(np.float32)
    for k in range(n_stacks):
        images = blob + rng.standard_normal((n_images, box, box), dtype=np.float32)
        write_stack(folder / f"stack_{k:04d}.mrcs", images, pixel_size_angst=3.0)


def write_star(folder: Path, n_stacks: int, n_each: int) -> Path:
    """A STAR file of the first images of every stack."""
    path = folder / f"particles_{n_stacks * n_each}.star"
    names = [f"{i + 1:06d}@stack_{k:04d}.mrcs" for k in range(n_stacks) for i in range(n_each)]
    particles = {"rlnImageName": names, "rlnOpticsGroup": ["1"] * len(names)}
    write_tables(path, {"optics": OPTICS, "particles": particles})
    return path


def run(limit_gb: float, *arguments: object) -> float:
    """Runs a command with so much memory at most; the most pages it held, mapped files included, in GB."""
    limit = int(limit_gb * 1e9)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
    return usage.ru_maxrss / 1e6


def seconds_of(job: Path) -> dict[str, float]:
    """What a job's stages took."""
    seconds: dict[str, float] = json.loads((job / "run.json").read_text())["seconds"]
    return seconds


def benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[20_000, 100_000, 1_000_000])
    parser.add_argument("--stacks", type=int, default=2000)
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    limit = options.limit_gb
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_stacks(folder, options.stacks, max(options.counts) // options.stacks, options.box)
        size = sum(path.stat().st_size for path in folder.glob("*.mrcs"))
        print(f"{options.stacks} stacks, {size / 1e9:.1f} GB; memory limited to {limit:.1f} GB", flush=True)
        small = write_star(folder, 100, min(options.counts) // options.stacks)
        tiny = [
            "--engine",
            "coordinate",
            "--layers",
            1,
            "--hidden",
            8,
            "--encoder-hidden",
            8,
            "--epochs",
            1,
        ]
        run(limit, "train", small, "--out", folder / "model", *tiny)
        model = folder / "model" / "model.pt"
        for count in options.counts:
            star, job = write_star(folder, options.stacks, count // options.stacks), folder / f"job_{count}"
            memory = run(limit, "estimate", star, "--model", model, "--out", job)
            seconds = seconds_of(job)
            waiting = seconds["estimation, waiting for images"] / seconds["estimation"]
            print(
                f"{count:8d} estimated, {memory:.2f} GB at most, {100 * waiting:.0f} % waiting: {seconds}",
                flush=True,
            )
        if options.train:
            job = folder / "trained"
            memory = run(limit, "train", star, "--out", job, "--epochs", 1)
            print(f"{count:8d} trained on, {memory:.2f} GB at most: {seconds_of(job)}", flush=True)


if __name__ == "__main__":
    benchmark()
