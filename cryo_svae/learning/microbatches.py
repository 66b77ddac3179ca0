"""Batches divided into smaller parts, for a GPU whose memory does not hold a whole batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from cryo_svae.errors import TrainingError
from cryo_svae.models.engine import Batch

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Pieces:
    """Does work on batches, whole or, once the GPU's memory did not suffice, in pieces.

    largest: particles in a piece, None while none was too large.
    """

    def __init__(self) -> None:
        self.largest: int | None = None

    def of(
        self, batch: Batch, work: Callable[[Batch], Result], undo: Callable[[], None] = lambda: None
    ) -> list[Result]:
        """The work's results on the pieces of a batch, in order.

        Where memory runs out the pieces are halved from then on, which is warned of; ``undo`` takes back
        what work left behind, and the batch begins anew. Raises TrainingError where not even one fits.
        """
        while True:
            size = min(self.largest or len(batch), len(batch))
            try:
                rows = torch.arange(len(batch)).split(size)
                return [work(batch if len(rows) == 1 else batch[row]) for row in rows]
            except torch.OutOfMemoryError as error:
                if batch.image.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise  # a recording, without which the batch may fit
                if batch.share is not None:  # the other processes would wait for pieces they do not have
                    raise TrainingError(
                        "the GPU's memory does not hold a process's part of a batch.\n"
                        "  To mend: use a smaller --batch-size, or more processes."
                    ) from error
                message = str(error).splitlines()[0]
            undo()
            torch.cuda.empty_cache()  # outside the except clause, whose error holds the tensors
            if size == 1:
                raise TrainingError(
                    f"the GPU's memory does not hold one particle ({message}).\n"
                    "  To mend: use a smaller --box, another GPU, or --device cpu."
                )
            self.largest = (size + 1) // 2
            log.warning(
                "the GPU's memory does not hold %d particles at a time: going on with %d",
                size,
                self.largest,
            )
