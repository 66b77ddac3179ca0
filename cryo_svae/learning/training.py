"""Training: one loop for every engine.

Everything random in an epoch is drawn after seeding with (seed, epoch), and the learning rate is
a function of the step alone, so a run resumed from any epoch's checkpoint repeats the rest of an
uninterrupted run. Several processes (see distributed) go through the same batches, each with its own
particles of them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from cryo_svae.computing import distributed
from cryo_svae.errors import TrainingError
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.cuda_graph import Recorded
from cryo_svae.learning.microbatches import Pieces
from cryo_svae.learning.training_store import TrainingStore
from cryo_svae.models.engine import Batch, ElboTerms, Engine

WARM_UP = 0.3  # share of the steps in which a one-cycle learning rate rises
EPOCH_COLUMNS = ("epoch", "elbo", "log_likelihood", "kl_z", "kl_pose", "held_out_elbo", "seconds")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is settled before the first step."""

    epochs: int
    batch_size: int
    learning_rate: float
    one_cycle: bool
    held_out: float
    patience: int | None
    seed: int


def learning_rate(step: int, n_steps: int, schedule: Schedule) -> float:
    """Learning rate at a step: constant, or one cycle of cosines (1/25 up to the peak, down to 0)."""
    if not schedule.one_cycle:
        return schedule.learning_rate
    rise = max(1.0, WARM_UP * n_steps)
    if step < rise:
        low = schedule.learning_rate / 25.0
        return low + (schedule.learning_rate - low) * 0.5 * (1.0 - math.cos(math.pi * step / rise))
    fall = (step - rise) / max(1.0, n_steps - rise)
    return schedule.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, fall)))


def seed_everything(seed: int, epoch: int) -> None:
    """Seeds torch's global generator for an epoch; epoch -1 is for building and starting a model."""
    torch.manual_seed(seed * 1_000_003 + epoch + 1)


def split_held_out(
    n_particles: int, held_out: float, seed: int
) -> tuple[Int[Tensor, "train"], Int[Tensor, "held"]]:
    """Rows to train on and rows kept out; at least one row is trained on."""
    order = torch.randperm(n_particles, generator=torch.Generator().manual_seed(seed))
    n_held = min(round(held_out * n_particles), n_particles - 1)
    return order[n_held:].sort().values, order[:n_held].sort().values


def fit(
    checkpoint: Checkpoint,
    store: TrainingStore,
    schedule: Schedule,
    device: torch.device,
    on_epoch: Callable[[Checkpoint], None],
    before_batch: Callable[[], None] = lambda: None,
) -> None:
    """Trains ``checkpoint.engine`` from where its checkpoint stands; calls ``on_epoch`` after each epoch.

    What ``before_batch`` raises ends training, to be resumed from the last epoch's checkpoint.
    Raises TrainingError on a loss that is not a number.
    """
    engine = checkpoint.engine.to(device)
    rows = store.trainable
    train, held = (rows[part] for part in split_held_out(len(rows), schedule.held_out, schedule.seed))
    if checkpoint.epochs_done == 0:
        seed_everything(schedule.seed, -1)
        engine.start(store.batches(train, schedule.batch_size, device), len(store))
        on_epoch(checkpoint)
    optimizer = _adam(engine, checkpoint.optimizer, device)
    steps = _Steps(engine, store, optimizer, device)
    steps_an_epoch = math.ceil(len(train) / schedule.batch_size)
    for epoch in range(checkpoint.epochs_done, schedule.epochs):
        if _is_stale(checkpoint.history, schedule.patience):
            break
        began = time.monotonic()
        seed_everything(schedule.seed, epoch)
        engine.begin_epoch(epoch, schedule.epochs)
        engine.train()
        order = train[torch.randperm(len(train))]
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        batches = tqdm(
            order.split(schedule.batch_size),
            desc=f"epoch {epoch + 1}/{schedule.epochs}",
            disable=not sys.stderr.isatty() or distributed.rank() > 0,
            leave=False,
        )
        for number, index in enumerate(batches):
            before_batch()
            distributed.stop_together()
            step = epoch * steps_an_epoch + number
            _set_learning_rate(optimizer, learning_rate(step, schedule.epochs * steps_an_epoch, schedule))
            sums += steps.train(index)
        (sums,) = distributed.totals(sums)
        means = (sums / len(train)).tolist()
        held_elbo = _held_out_elbo(steps, held, schedule, device)
        if not all(map(math.isfinite, [*means, held_elbo if len(held) else 0.0])) or not _is_finite(engine):
            raise TrainingError(
                f"epoch {epoch + 1}: the bound is not a number.\n"
                "  To mend: train again from the start with a smaller --learning-rate."
            )
        row = (float(epoch + 1), *means, held_elbo, time.monotonic() - began)
        checkpoint.history.append(dict(zip(EPOCH_COLUMNS, row, strict=True)))
        checkpoint.optimizer = optimizer.state_dict()
        checkpoint.epochs_done = epoch + 1
        for name in engine.tables:
            distributed.unite(getattr(engine, name), store.own)
        on_epoch(checkpoint)


def _adam(engine: Engine, state: dict[str, Any] | None, device: torch.device) -> torch.optim.Adam:
    """Adam, from where it stood; on a GPU its learning rate and count of steps are there too."""
    optimizer = torch.optim.Adam(engine.parameters(), fused=True)
    if state is not None:
        optimizer.load_state_dict(state)
    on_gpu = device.type == "cuda"
    for group in optimizer.param_groups:
        group["capturable"] = on_gpu
        group["lr"] = torch.zeros((), device=device) if on_gpu else 0.0
    return optimizer


def _set_learning_rate(optimizer: torch.optim.Adam, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class _Steps:
    """What is done to each batch, in training and to those held out; each recorded on a GPU."""

    def __init__(
        self, engine: Engine, store: TrainingStore, optimizer: torch.optim.Adam, device: torch.device
    ) -> None:
        self.engine, self._store, self._optimizer, self._device = engine, store, optimizer, device
        self._bound = distributed.bound(engine)
        self._pieces = Pieces()
        self._recorded, self._recorded_held_out = (
            Recorded(lambda *rows, work=work: work(store.batch_of(*rows)), device, distributed.world() == 1)
            for work in (self._step, self._look)
        )

    def train(self, index: Int[Tensor, "b"]) -> Tensor:
        """One step of the optimiser; sums of the bound and its parts (4,)."""
        return self._do(self._recorded, self._step, index)

    def held_out(self, index: Int[Tensor, "b"]) -> Tensor:
        """Sum of the bound (1,), nothing learned."""
        return self._do(self._recorded_held_out, self._look, index)

    def _do(self, recorded: Recorded, work: Callable[[Batch], Tensor], index: Int[Tensor, "b"]) -> Tensor:
        store, device = self._store, self._device
        if distributed.world() > 1:
            return work(store.batch(index, device))
        if self._pieces.largest is not None:
            recorded.give_up()
        began = time.monotonic()
        rows = store.fetch(index, device)
        store.waited_s += time.monotonic() - began
        return recorded(self.engine.stage, *rows)

    def _step(self, batch: Batch) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        share = batch.n_whole / distributed.world()  # gradients are averaged over the processes
        work = partial(_backward, self._bound, engine=self.engine, n_particles=share)
        sums = torch.stack(self._pieces.of(batch, work, undo=self._optimizer.zero_grad)).sum(0)
        self._optimizer.step()
        return sums

    def _look(self, batch: Batch) -> Tensor:
        def bound(piece: Batch) -> Tensor:
            return self.engine.elbo(piece).elbo[: piece.n_own].sum(dtype=torch.float64)

        with torch.no_grad():
            return torch.stack(self._pieces.of(batch, bound)).sum(0, keepdim=True)


def _backward(
    bound: Callable[[Batch], ElboTerms], batch: Batch, *, engine: Engine, n_particles: float
) -> Tensor:
    """Adds the gradients of a piece of a batch of n; sums of its bound and the bound's parts."""
    with _autocast(engine, batch.image.device):
        terms = bound(batch)
    losses = engine.kl_weight * (terms.kl_z + terms.kl_pose) - terms.log_likelihood
    (losses[: batch.n_own].sum() / n_particles).backward()
    parts = torch.stack([terms.elbo, terms.log_likelihood, terms.kl_z, terms.kl_pose])
    return parts[:, : batch.n_own].detach().double().sum(1)


def _is_finite(engine: Engine) -> bool:
    return all(bool(values.isfinite().all()) for values in engine.parameters())


def trains_in_bfloat16(engine: Engine, device: torch.device) -> bool:
    """Where the device has matrix units for it and, on a CPU, the engine gains by it."""
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # not in torch before 2.9
        return engine.gains_by_bfloat16_on_cpu and (
            has.get("avx512_bf16", False) or has.get("amx_bf16", False)
        )
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _autocast(engine: Engine, device: torch.device) -> torch.autocast:
    able = trains_in_bfloat16(engine, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=able)


def _held_out_elbo(steps: _Steps, held: Tensor, schedule: Schedule, device: torch.device) -> float:
    """Mean bound of the particles kept out, NaN where there is none; the same draws every epoch."""
    if len(held) == 0:
        return math.nan
    seed_everything(schedule.seed, -1)
    steps.engine.eval()
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for index in held.split(schedule.batch_size):
        total += steps.held_out(index)
    (total,) = distributed.totals(total)
    return float(total / len(held))


def _is_stale(history: list[dict[str, float]], patience: int | None) -> bool:
    """Whether the held-out bound (else the training bound) has not risen for ``patience`` epochs."""
    if patience is None or len(history) <= patience:
        return False
    bounds = [row["elbo"] if math.isnan(row["held_out_elbo"]) else row["held_out_elbo"] for row in history]
    return max(bounds[-patience:]) <= max(bounds[:-patience])
