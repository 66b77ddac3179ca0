"""Particles as an engine keeps them for training: on the GPU in half precision where they fit, else in
memory, or in half precision on disk when too many.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae.computing import distributed
from cryo_svae.computing.distributed import Share
from cryo_svae.errors import InputError, OutputError
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.models.engine import Batch, Engine
from cryo_svae.particles import outliers
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.known_poses import known_poses
from cryo_svae.particles.preprocessing import CPU, Preparation, prepared_images, working_ctf

IN_MEMORY_BYTES = 2**30
GPU_SHARE = 0.6  # of its free memory, for images; the rest is for the work on a batch


@dataclass
class TrainingStore:
    """n usable particles, of which this process holds m: all, unless there are several.

    image:    (m, …) what ``Engine.represent`` made of them, on the GPU or not.
    ctf:      their CTF parameters on the working grid, where the images are, or None.
    particle: (n,) the row of every usable particle in the particle set.
    first:    row among the n of the first one held.
    outlier:  (n,) True for images that stand out and are not trained on; None where none is.
    waited_s: seconds that whoever asked for batches waited for them.
    """

    image: Float[Tensor, "m ..."]
    ctf: CtfTable | None
    particle: NDArray[np.intp]
    first: int = 0
    outlier: Bool[Tensor, "n"] | None = None
    waited_s: float = 0.0

    def __len__(self) -> int:
        return len(self.particle)

    @property
    def trainable(self) -> Int[Tensor, "k"]:
        """Rows of the n that are no outliers."""
        if self.outlier is None:
            return torch.arange(len(self))
        return (~self.outlier).nonzero()[:, 0]

    @property
    def own(self) -> slice:
        """Rows held."""
        return slice(self.first, self.first + len(self.image))

    @cached_property
    def astigmatic(self) -> bool:
        """Whether the CTF of any particle, of any process, changes with direction."""
        if self.ctf is None:
            return False
        (n_astigmatic,) = distributed.totals(self.ctf.astigmatic.sum())
        return bool(n_astigmatic > 0)

    def fetch(self, row: Int[Tensor, "b"], device: torch.device) -> tuple[Tensor, ...]:
        """What ``batch_of`` needs of rows held, on its way to the device: their numbers alone where the
        images are there, else their images and CTF parameters too.
        """
        if self.image.device == device:
            return (_sent(row, device),)
        ctf = () if self.ctf is None else self.ctf[row].columns().values()
        return tuple(_sent(each, device) for each in (row, self.image[row], *ctf))

    def batch_of(self, row: Int[Tensor, "b"], *fetched: Tensor) -> Batch:
        """The batch, in float32, of what ``fetch`` gave. On a GPU nothing waits for it."""
        if fetched:
            image, *columns = fetched
            ctf = None
            if self.ctf is not None:
                ctf = CtfTable(**dict(zip(self.ctf.columns(), columns, strict=True)))
        else:
            image, ctf = self.image[row], None if self.ctf is None else self.ctf[row]
        return Batch(row + self.first, image.float(), ctf, astigmatic=self.astigmatic)

    def batch(self, index: Int[Tensor, "b"], device: torch.device) -> Batch:
        """The rows ``index``, or those of them that are held, as a batch on the device, in float32."""
        share = None
        if len(self.image) < len(self):
            row = ((index >= self.own.start) & (index < self.own.stop)).nonzero()[:, 0]
            share = Share(row, len(index), n_own=len(row))
            index = index[row]
            if len(row) == 0:
                share = Share(torch.zeros(1, dtype=torch.long), share.n_whole, n_own=0)
                index = torch.tensor([self.first])
        batch = self.batch_of(*self.fetch(index - self.first, device))
        return batch if share is None else replace(batch, share=share.to(device))

    def batches(
        self, index: Int[Tensor, "m"], batch_size: int, device: torch.device = CPU
    ) -> Iterator[Batch]:
        """The rows ``index`` in order, ``batch_size`` at a time."""
        for start in range(0, len(index), batch_size):
            began = time.monotonic()
            batch = self.batch(index[start : start + batch_size], device)
            self.waited_s += time.monotonic() - began
            yield batch


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Values on their way to a device; only a copy from pinned memory is not waited for."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def build_store(
    engine: Engine,
    source: ImageSource,
    preparation: Preparation,
    use_ctf: bool,
    scratch: Path,
    device: torch.device = CPU,
) -> TrainingStore:
    """Prepares and represents every particle of this process once; unusable ones are left out.

    Outliers (see ``outliers``) are not trained on: what an engine learns of all images a few can spoil.

    device:  where the engine is, and images are prepared.
    scratch: folder for the half-precision file that takes what exceeds ``IN_MEMORY_BYTES``. The
    file has no name, so nothing is left behind however the program ends.
    """
    particles = source.particles
    image: Tensor | None = None
    rows: list[NDArray[np.intp]] = []
    filled = 0
    measured = torch.zeros(len(particles), outliers.N_MEASURES, dtype=torch.float64)
    own = np.arange(len(particles))[distributed.block(len(particles))]
    poses = known_poses(particles, preparation)
    for index, images, usable in prepared_images(source, own, preparation, device=device):
        taken = images[usable]
        if poses is not None:
            taken = poses.undone(taken, torch.from_numpy(index)[usable.cpu()])
        kept = engine.represent(taken).detach()
        if image is None:
            image = _allocate((len(own), *kept.shape[1:]), scratch, device)
        most = torch.finfo(image.dtype).max  # a hot pixel may be beyond half precision
        image[filled : filled + len(kept)] = kept.clamp(-most, most)
        rows.append(index[usable.cpu().numpy()])
        measured[rows[-1]] = outliers.measures(images[usable], preparation.mask_radius_px).cpu()
        filled += len(kept)
    usable_of_all = torch.zeros(len(particles), dtype=torch.long)
    n_held = torch.zeros(distributed.world(), dtype=torch.long)
    for row in rows:
        usable_of_all[row] = 1
    n_held[distributed.rank()] = filled
    usable_of_all, n_held = distributed.totals(usable_of_all, n_held)
    (measured,) = distributed.totals(measured)
    if distributed.world() > 1 and not n_held.all():
        raise InputError(
            particles.star.path,
            found=f"no usable particle for process {int(n_held.argmin())} of {len(n_held)}",
            expected=f"{len(n_held)} blocks of particles, some usable in each",
            remedy="start fewer processes (torchrun --nproc-per-node).",
        )
    if image is None:
        raise ValueError("a particle set holds one or more particles")
    ctf = None
    if use_ctf and particles.ctf is not None:
        usable_rows = torch.from_numpy(np.concatenate(rows))
        ctf = working_ctf(particles.ctf, preparation)
        ctf = (ctf if poses is None else poses.turned(ctf))[usable_rows].to(image.device)
    first = int(n_held[: distributed.rank()].sum())
    particle = usable_of_all.nonzero()[:, 0]
    return TrainingStore(image[:filled], ctf, particle.numpy(), first, outliers.found(measured[particle]))


def _allocate(shape: tuple[int, ...], scratch: Path, device: torch.device) -> Tensor:
    if device.type == "cuda" and 2 * math.prod(shape) <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(shape, dtype=torch.float16, device=device)
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
