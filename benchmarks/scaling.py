"""Cost against the number of particles and the box: seconds an epoch, images/s, peak memory; a plot.

    python -m benchmarks.scaling

Each point runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch

from benchmarks import trials
from cryo_svae.simulate import SimulateConfig, simulate

PARTICLES = [5_000, 10_000, 20_000, 50_000, 100_000]
BOXES = [32, 40, 64, 96, 128, 192, 256]
JUDGED = 1000  # images that estimation is timed on


def point(engine: str, n_particles: int, box: int, epochs: int) -> dict[str, float]:
    """One measurement, in this process."""
    base = simulate(SimulateConfig(n_particles=min(n_particles, 2000), box=box, snr=0.1, shift_std_px=1.0))
    repeats = -(-n_particles // len(base.images))
    index = torch.arange(len(base.images)).repeat(repeats)[:n_particles]
    simulated = type(base)(
        images=base.images[index],
        pixel_size_angst=base.pixel_size_angst,
        conformation=base.conformation[index],
        psi_rad=base.psi_rad[index],
        origin_px=base.origin_px[index],
        view_rad=None,
        is_junk=base.is_junk[index],
        noise_std=base.noise_std,
        ctf=None,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    trial = trials.run_trial(simulated, engine, 2, 0, epochs=epochs, judged=JUDGED)
    return {
        "epoch_s": trial.seconds / epochs,
        "rate": trial.images_per_second,
        "infer_rate": trial.infer_images_per_second,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "images_gb": before,
    }


def measure(engine: str, n_particles: int, box: int, epochs: int) -> dict[str, float]:
    """One measurement, in a process of its own."""
    where = [engine, str(n_particles), str(box), str(epochs)]
    command = [sys.executable, "-m", "benchmarks.scaling", "--point", *where]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints two tables and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--point", nargs=4)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.point:
        engine, n_particles, box, epochs = arguments.point
        print(json.dumps(point(engine, int(n_particles), int(box), int(epochs))))
        return
    particles, boxes = (PARTICLES[:2], BOXES[:3]) if arguments.quick else (PARTICLES, BOXES)
    lines = [f"{'what':22s} s/epoch  img/s train  img/s infer  peak GB"]
    by_n = [measure("steerable", n, 40, 1) for n in particles]
    by_box = [measure("steerable", 2000, box, 1) for box in boxes]
    lines += [_line(f"{n:,} x 40 px", row) for n, row in zip(particles, by_n, strict=True)]
    lines += [_line(f"2,000 x {box} px", row) for box, row in zip(boxes, by_box, strict=True)]
    for box in (40, 64):
        paper, ours = measure("coordinate", 200, box, 1), measure("steerable", 8000, box, 1)
        lines += [_line(f"coordinate, {box} px", paper), _line(f"steerable, {box} px", ours)]
        lines.append(f"steerable over coordinate, {box} px: {ours['rate'] / paper['rate']:.0f} x")
    trials.report("scaling", lines)
    _draw(particles, by_n, boxes, by_box)


def _line(name: str, row: dict[str, float]) -> str:
    seconds, rate, infer, peak = (row[key] for key in ("epoch_s", "rate", "infer_rate", "peak_gb"))
    return f"{name:22s} {seconds:7.2f} {rate:12.0f} {infer:12.0f} {peak:8.2f}"


def _draw(particles, by_n, boxes, by_box) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(particles, [row["epoch_s"] for row in by_n], "o-")
    left.set(xlabel="particles of 40 px", ylabel="seconds an epoch")
    right.loglog(boxes, [row["rate"] for row in by_box], "o-")
    right.set(xlabel="box / px", ylabel="images/s in training")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    trials.RESULTS.mkdir(exist_ok=True)
    figure.savefig(trials.RESULTS / "scaling.png", dpi=130)


if __name__ == "__main__":
    main()
