"""Compute of a training step and bytes that a process sends in it, as docs/scaling.md quotes them.

python -m benchmarks.processes --batch 64  # one process
python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.processes

Compute is the processor's time, of one thread. Bytes are those that Linux counts on the loopback
interface, so nothing else should use it meanwhile.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from cryo_svae.computing import distributed
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.training import Schedule, fit
from cryo_svae.learning.training_store import TrainingStore
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.particles.preprocessing import Preparation

SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
Z_DIM = 8


def measure(box_px: int, batch_size: int, n_steps: int) -> str:
    """A row: compute and bytes of a rank, from the second epoch of a training on noise."""
    torch.manual_seed(0)
    engine = SteerableEngine(box_px, Z_DIM, SteerableConfig(max_shift_px=4.0))
    n_particles = batch_size * n_steps
    own = distributed.block(n_particles)
    images = torch.cat(
        [engine.represent(torch.randn(1, box_px, box_px)) for _ in range(own.start, own.stop)]
    )
    store = TrainingStore(images, None, np.arange(n_particles), own.start)
    preparation = Preparation(
        box_px=box_px, pixel_size_angst=2.0, mask_diameter_angst=1.9 * box_px, invert=False
    )
    checkpoint = Checkpoint("steerable", engine, preparation, False, None, 0, [])
    seen: list[tuple[int, float]] = []

    def look(_: Checkpoint) -> None:
        seen.append((int(SENT.read_text()), time.process_time()))

    schedule = Schedule(
        epochs=2,
        batch_size=batch_size,
        learning_rate=1e-4,
        one_cycle=True,
        held_out=0.0,
        patience=None,
        seed=0,
    )
    fit(checkpoint, store, schedule, torch.device("cpu"), look)
    parameters = 4e-6 * sum(p.numel() for p in engine.parameters())
    sent, seconds = ((after - before) / n_steps for before, after in zip(seen[1], seen[2], strict=True))
    return (
        f"| {box_px} | {distributed.world()} | {batch_size} | {batch_size / distributed.world():g} "
        f"| {1e3 * seconds:.0f} | {parameters:.2f} | {1e-6 * sent / distributed.world():.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boxes", type=int, nargs="+", default=[64, 128], help="sides of the images in px")
    parser.add_argument("--batch", type=int, default=128, help="particles in a step, of all processes")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with distributed.processes():
        if distributed.rank() == 0:
            print("| box, px | processes | batch | of a rank | ms a step | gradients, MB | sent, MB |")
            print("|---|---|---|---|---|---|---|")
        for box_px in arguments.boxes:
            row = measure(box_px, arguments.batch, arguments.steps)
            if distributed.rank() == 0:
                print(row, flush=True)


if __name__ == "__main__":
    main()
