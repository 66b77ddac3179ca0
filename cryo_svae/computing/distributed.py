"""Several processes at one job, started by torchrun: the only module that knows of them.

Each process (rank) holds a block of the particles; a batch is drawn by all alike, and each takes the
rows it holds. Random numbers are drawn for the whole batch by every rank from the same seed, sums are
summed over the ranks, gradients by DistributedDataParallel; so the result is that of one process within
rounding, whatever the number of ranks. Rank 0 alone writes. In one process everything here does nothing.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cryo_svae.errors import ProcessError

_BITS = {8: torch.int64, 4: torch.int32, 1: torch.uint8}


@dataclass
class _Place:
    """Where this process stands; rank and n_started stay when the processes part."""

    rank: int = 0
    world: int = 1
    n_started: int = 1
    restarted: bool = False
    stop_asked: bool = False


_place = _Place()


def rank() -> int:
    """Number of this process, 0 for the one that writes."""
    return _place.rank


def world() -> int:
    """How many processes work together now."""
    return _place.world


def n_started() -> int:
    """How many processes the job was started with."""
    return _place.n_started


def restarted() -> bool:
    """Whether torchrun started the processes again, after one was lost."""
    return _place.restarted


@contextmanager
def processes() -> Iterator[None]:
    """While this lasts, the processes that torchrun started work together (NCCL on GPUs, else gloo).

    SIGTERM and Ctrl-C are noted, for ``stop_together`` to end all ranks at the same batch.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    # Adam imports it; imported while the group stands, it holds on to the group, whose threads then
    # outlive it and now and then abort the process at its end
    importlib.import_module("torch._dynamo")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _place.rank, _place.world = dist.get_rank(), dist.get_world_size()
    _place.n_started = _place.world
    # Each node counts its own restarts.
    (restarts,) = totals(torch.tensor(int(os.environ["TORCHELASTIC_RESTART_COUNT"])))
    _place.restarted = bool(restarts > 0)
    before = {number: signal.signal(number, _ask_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
        part()
    except RuntimeError as error:
        if _place.stop_asked:
            raise KeyboardInterrupt from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ProcessError(
                f"process {rank()} of {n_started()}: another process ended.\n"
                "  To mend: see what that one said; with --resume the job goes on from its last checkpoint."
            ) from error
        raise
    finally:
        _leave()
        for number, handler in before.items():
            signal.signal(number, handler)


def part() -> None:
    """Ends the common work, at the same place in every rank; rank 0 goes on alone."""
    if _place.world > 1:
        dist.barrier()  # a rank that leaves closes the connections that others' last sum still needs
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        gc.collect()  # of what DistributedDataParallel made, which holds on to the group as well
        dist.destroy_process_group()
    _place.world = 1


def _ask_stop(*_: object) -> None:
    _place.stop_asked = True


def stop_if_asked() -> None:
    """KeyboardInterrupt where this process was told to stop."""
    if _place.stop_asked:
        raise KeyboardInterrupt


def stop_together() -> None:
    """KeyboardInterrupt in every rank where any was told to stop."""
    (asked,) = totals(torch.tensor(float(_place.stop_asked)))
    if asked > 0:
        raise KeyboardInterrupt


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Rank 0 does what is within before the others do, and none goes on before all have."""
    if _place.world > 1 and _place.rank > 0:
        dist.barrier()
    yield
    if _place.world > 1:
        if _place.rank == 0:
            dist.barrier()
        dist.barrier()


def block(n: int, unit: int = 1) -> slice:
    """This rank's part of n things, in whole ``unit``s; the blocks follow one another in order of rank."""
    units = -(-n // unit)
    first, last = (min(n, unit * (units * k // _place.world)) for k in (_place.rank, _place.rank + 1))
    return slice(first, last)


def totals(*parts: Tensor) -> tuple[Tensor, ...]:
    """Each tensor summed over the ranks, all in one message; of one type, on one device."""
    if _place.world == 1:
        return parts
    flat = torch.cat([part.detach().flatten() for part in parts])
    dist.all_reduce(flat)
    pieces = flat.split([part.numel() for part in parts])
    return tuple(sums.view_as(part) for sums, part in zip(pieces, parts, strict=True))


def unite(table: Tensor, own: slice) -> None:
    """Fills a table, of which each rank has its own rows right, with the rows of all; to the bit."""
    if _place.world > 1:
        table[: own.start] = 0
        table[own.stop :] = 0
        dist.all_reduce(table.view(_BITS[table.element_size()]))


@dataclass(frozen=True)
class Share:
    """Which rows of a batch of the whole job a process holds.

    row:     (b,) their places in the whole batch.
    n_whole: size of the whole batch.
    n_own:   how many of the b count: all, or none where a row stands in for an empty share, so that
             the rank takes part in every sum.
    """

    row: Int[Tensor, "b"]
    n_whole: int
    n_own: int

    def to(self, device: torch.device | str) -> Share:
        """The same share on another device."""
        return Share(self.row.to(device), self.n_whole, self.n_own)


class _Bound(nn.Module):
    """An engine's bound as the forward pass that DistributedDataParallel wraps.

    It owns the parameters alone: buffers are running averages, the same in every rank, and tables, each
    rank's own.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.learned = nn.ParameterList(engine.parameters())
        self.elbo = engine.elbo

    def forward(self, batch: Any) -> Any:
        """``engine.elbo``."""
        return self.elbo(batch)


def bound(engine: Any) -> Callable[[Any], Any]:
    """``engine.elbo``, whose gradients are averaged over the ranks in backward passes."""
    if _place.world == 1:
        elbo: Callable[[Any], Any] = engine.elbo
        return elbo
    return DistributedDataParallel(_Bound(engine), find_unused_parameters=engine.may_idle)
