"""Particles as an engine keeps them for training: in memory, or half-precision on disk when too many."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae.ctf import CtfTable
from cryo_svae.errors import OutputError
from cryo_svae.images import ImageSource
from cryo_svae.models.engine import Batch, Engine
from cryo_svae.preprocessing import Preparation, prepared_images, working_ctf

IN_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True)
class TrainingStore:
    """m usable particles.

    image:    (m, …) what ``Engine.represent`` made of them.
    ctf:      their CTF parameters on the working grid, or None.
    particle: (m,) their row in the particle set.
    """

    image: Float[Tensor, "m ..."]
    ctf: CtfTable | None
    particle: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.image)

    def batch(self, index: Int[Tensor, "b"]) -> Batch:
        """The rows ``index`` as a batch, in float32."""
        return Batch(index, self.image[index].float(), None if self.ctf is None else self.ctf[index])

    def batches(self, index: Int[Tensor, "m"], batch_size: int) -> Iterator[Batch]:
        """The rows ``index`` in order, ``batch_size`` at a time."""
        for start in range(0, len(index), batch_size):
            yield self.batch(index[start : start + batch_size])


def build_store(
    engine: Engine, source: ImageSource, preparation: Preparation, use_ctf: bool, scratch: Path
) -> TrainingStore:
    """Prepares and represents every particle once; unusable ones are left out.

    scratch: folder for the half-precision file that takes what exceeds ``IN_MEMORY_BYTES``. The
    file has no name, so nothing is left behind however the program ends.
    """
    particles = source.particles
    image: Tensor | None = None
    rows: list[NDArray[np.intp]] = []
    filled = 0
    for index, images, usable in prepared_images(source, np.arange(len(particles)), preparation):
        kept = engine.represent(images[usable]).detach()
        if image is None:
            image = _allocate((len(particles), *kept.shape[1:]), scratch)
        image[filled : filled + len(kept)] = kept
        rows.append(index[usable.numpy()])
        filled += len(kept)
    if image is None:
        raise ValueError("a particle set holds one or more particles")
    particle = np.concatenate(rows)
    ctf = None
    if use_ctf and particles.ctf is not None:
        ctf = working_ctf(particles.ctf, preparation)[torch.from_numpy(particle)]
    return TrainingStore(image[:filled], ctf, particle)


def _allocate(shape: tuple[int, ...], scratch: Path) -> Tensor:
    if 4 * math.prod(shape) <= IN_MEMORY_BYTES:
        return torch.empty(shape)
    with tempfile.TemporaryFile(dir=scratch) as file:
        try:  # a mapped file that then finds no room would end the process without a word
            os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
        except OSError as error:
            raise OutputError(
                f"{scratch}: no room for {2 * math.prod(shape) / 1e9:.1f} GB of prepared particles "
                f"({error.strerror}).\n  To mend: free room on that disk, or name another by --out."
            ) from error
        mapped = np.memmap(file, dtype=np.float16, mode="w+", shape=shape)
    return torch.from_numpy(mapped)
