"""Work on batches that a GPU repeats from one recording, so that it never waits for the processor.

A step of training is hundreds of small operations, each of which takes the processor longer to ask for
than the GPU to do. A CUDA graph holds them all and is asked for once. It also holds shapes, addresses and
whatever Python decided when it was recorded: numbers that change from step to step must be tensors,
and what else changes makes a recording of its own.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

TIMES_BEFORE = 2  # work is done before it is recorded: optimisers and libraries make their tables

log = logging.getLogger(__name__)


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Tensor


class Recorded:
    """Calls ``work`` on tensors; on a GPU, from its third time on, by a recording.

    Recordings are told apart by the shapes of the tensors and by ``kind``, which names all else that the
    work depends on. Those of a kind that is past are let go.
    """

    def __init__(self, work: Callable[..., Tensor], device: torch.device, able: bool) -> None:
        self._work = work
        able = able and device.type == "cuda"
        self._kind: Hashable = None
        self._times: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._stream = torch.cuda.Stream(device) if able else None
        self._pool = torch.cuda.graph_pool_handle() if able else None

    def __call__(self, kind: Hashable, *inputs: Tensor) -> Tensor:
        """The work's result; it is overwritten by the next call."""
        if self._stream is None:
            return self._work(*inputs)
        if kind != self._kind:
            self._kind = kind
            self._recordings.clear()
            self._times.clear()
            self._pool = torch.cuda.graph_pool_handle()  # the former went with its last recording
        shapes = tuple(each.shape for each in inputs)
        if shapes not in self._recordings:
            self._times[shapes] += 1
            if self._times[shapes] <= TIMES_BEFORE:
                return self._apart(self._stream, inputs)
            try:
                self._recordings[shapes] = self._record(inputs)
            except RuntimeError as error:
                if not _for_want_of_memory(error):
                    raise
                log.warning("the GPU's memory does not hold a recorded step: going on without")
                self.give_up()
                return self._work(*inputs)
        recording = self._recordings[shapes]
        for own, new in zip(recording.inputs, inputs, strict=True):
            own.copy_(new)
        recording.graph.replay()
        return recording.result

    def give_up(self) -> None:
        """From now on the work is done as it comes: its memory does not suffice twice."""
        self._recordings.clear()
        self._stream = None

    def _apart(self, stream: torch.cuda.Stream, inputs: tuple[Tensor, ...]) -> Tensor:
        """The work on a stream of its own, as CUDA asks of what is recorded later."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self._work(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording:
        own = tuple(each.clone() for each in inputs)
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a former graph that Python lets go of meanwhile would spoil this one
        gc.disable()
        try:
            torch.cuda.empty_cache()  # a recording holds memory of its own
            with torch.cuda.graph(graph, pool=self._pool):
                result = self._work(*own)
        finally:
            gc.enable()
        return _Recording(graph, own, result)


def _for_want_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out first: a recording that is broken off raises errors of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None
