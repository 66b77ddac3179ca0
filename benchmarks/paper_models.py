"""Engines trained on arrays for the paper's experiments, with images held out to judge them.

Of ``paper_hinge``, ``paper_real`` and, in part, ``digits``: Bepler et al., NeurIPS 2019 (arXiv:1909.11663).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import trials
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.jobs.plan import pick_device
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.training import fit, seed_everything, split_held_out
from cryo_svae.learning.training_store import TrainingStore
from cryo_svae.models.engine import ElboTerms, Posterior
from cryo_svae.particles.preprocessing import Preparation

BATCH = 256  # images looked at together when judged


@dataclass(frozen=True)
class Effort:
    """How long an engine is trained: epochs, but no step is begun after ``minutes`` by the clock.

    batch_size, learning_rate: the engine's own where None.
    """

    epochs: int
    minutes: float = float("inf")
    batch_size: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Trained:
    """A model, the images that it was trained on and those held out, and what its training took.

    held, trained_on: rows of ``store``.
    seen: images trained on, counted each time.
    """

    checkpoint: Checkpoint
    store: TrainingStore
    held: Tensor
    trained_on: Tensor
    seen: int
    minutes: float
    cpu_minutes: float

    @property
    def took(self) -> str:
        """Passes over the training images, and minutes by the clock and of the processor."""
        epochs = self.seen / len(self.trained_on)
        return f"{epochs:6.1f} {self.minutes:7.1f} {self.cpu_minutes:7.1f}"

    @property
    def posterior(self) -> Posterior:
        """Of the images held out."""
        return trials.infer(self.checkpoint, self.store, self.held)


TOOK = f"{'epochs':>6s} {'min':>7s} {'CPU min':>7s}"  # heads Trained.took


def train(
    engine_name: str,
    z_dim: int,
    images: Tensor,
    ctf: CtfTable | None,
    preparation: Preparation,
    effort: Effort,
    *,
    held_out: float,
    seed: int,
    device: str,
    **config: object,
) -> Trained:
    """An engine trained on prepared images (n, N, N), a share of them held out; left on the CPU."""
    config["mask_radius_px"] = preparation.mask_radius_px
    checkpoint = trials.untrained(engine_name, z_dim, preparation, ctf is not None, seed, **config)
    store = trials.store_of(checkpoint.engine, images.split(1024), ctf)
    schedule = trials.schedule_of(
        checkpoint,
        effort.epochs,
        seed,
        batch_size=effort.batch_size,
        learning_rate=effort.learning_rate,
        held_out=held_out,
    )
    train_rows, held = split_held_out(len(store), held_out, seed)
    began, cpu_began, steps = time.monotonic(), time.process_time(), 0

    def before_batch() -> None:
        nonlocal steps
        if time.monotonic() - began > 60.0 * effort.minutes:
            raise TimeoutError
        steps += 1

    with contextlib.suppress(TimeoutError):
        fit(checkpoint, store, schedule, pick_device(device), lambda _: None, before_batch)
    minutes, cpu = (time.monotonic() - began) / 60.0, (time.process_time() - cpu_began) / 60.0
    checkpoint.engine.cpu()
    steps_an_epoch = math.ceil(len(train_rows) / schedule.batch_size)
    whole, rest = divmod(steps, steps_an_epoch)
    seen = whole * len(train_rows) + rest * schedule.batch_size
    return Trained(checkpoint, store, held, train_rows, seen, minutes, cpu)


def bounds(checkpoint: Checkpoint, store: TrainingStore, rows: Tensor, n_samples: int = 3) -> ElboTerms:
    """Bound of each of some rows of a store (n,), the mean of so many posterior samples."""
    engine = checkpoint.engine.eval()
    device = next(engine.parameters()).device
    seed_everything(0, -1)
    samples = []
    with torch.no_grad():
        for _ in range(n_samples):
            terms = [engine.elbo(batch) for batch in store.batches(rows, BATCH, device)]
            samples.append(
                [torch.cat([getattr(t, f.name) for t in terms]).cpu() for f in fields(ElboTerms)]
            )
    return ElboTerms(*(torch.stack(parts).mean(0) for parts in zip(*samples, strict=True)))


def decode(checkpoint: Checkpoint, z: Tensor) -> Tensor:
    """Generated images (k, …, N, N) at pose zero, without CTF."""
    engine = checkpoint.engine.eval()
    device = next(engine.parameters()).device
    with torch.no_grad():
        return torch.cat([engine.decode(part.to(device)).cpu() for part in z.split(64)])


def parser_of(doc: str | None, sizes: dict[str, object]) -> argparse.ArgumentParser:
    """The options that the experiments share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=list(sizes), default="paper", help="see SIZES in this file")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="--size quick")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def save_figure(figure: Figure, name: str) -> Path:
    """Writes results/NAME.png."""
    trials.RESULTS.mkdir(exist_ok=True)
    path = trials.RESULTS / f"{name}.png"
    figure.savefig(path, dpi=100)
    return path


def draw_rows(rows: dict[str, Tensor], titles: list[str]) -> Figure:
    """A figure with a row of images for each name (k, N, N), grey over the row's own range."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(0.95 * columns + 1.4, 0.98 * len(rows) + 0.25))
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    figure.subplots_adjust(left=1.4 / (0.95 * columns + 1.4), right=0.995, bottom=0.01, top=1 - 0.04)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        low, high = np.percentile(images.numpy(), [0.5, 99.8])
        row[0].text(-0.08, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=8)
        for axis, image in zip(row, images.numpy(), strict=False):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=7, pad=2)
    return figure
