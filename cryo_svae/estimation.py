"""Posterior of every particle, in input order, in file units."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cryo_svae import distributed, geometry
from cryo_svae.checkpoint import Checkpoint
from cryo_svae.images import ImageSource
from cryo_svae.models.engine import Batch, Posterior
from cryo_svae.pieces import Pieces
from cryo_svae.preprocessing import CHUNK, prepared_images, working_ctf

Reals = NDArray[np.float64]


@dataclass(frozen=True)
class EstimateTable:
    """What is known of n particles, in input order; degrees and Å.

    usable: (n,) False for NaN or constant images; all their numbers are 0.
    Others as in ``Posterior``: z, z_std (n, d); origin_angst (n, 2) as (x, y); the rest (n,).
    """

    z: Reals
    z_std: Reals
    psi_deg: Reals
    psi_std_deg: Reals
    origin_angst: Reals
    origin_std_angst: Reals
    figure_of_merit: Reals
    log_likelihood: Reals
    second_mode: Reals
    usable: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.usable)


def to_table(
    posterior: Posterior, row: NDArray[np.intp], n_particles: int, pixel_size_angst: float
) -> EstimateTable:
    """Posteriors of particles ``row`` among n, the others being unusable."""

    def spread(values: torch.Tensor) -> Reals:
        table = np.zeros((n_particles, *values.shape[1:]))
        table[row] = values.double().numpy()
        return table

    usable = np.zeros(n_particles, dtype=bool)
    usable[row] = True
    return EstimateTable(
        z=spread(posterior.z_mean),
        z_std=spread(posterior.z_std),
        psi_deg=spread(geometry.degrees(posterior.psi_rad)),
        psi_std_deg=spread(geometry.degrees(posterior.psi_std_rad)),
        origin_angst=spread(posterior.origin_px * pixel_size_angst),
        origin_std_angst=spread(posterior.origin_std_px * pixel_size_angst),
        figure_of_merit=spread(posterior.figure_of_merit),
        log_likelihood=spread(posterior.log_likelihood),
        second_mode=spread(posterior.second_mode),
        usable=usable,
    )


def estimate(
    checkpoint: Checkpoint, source: ImageSource, device: torch.device, batch_size: int = 256
) -> EstimateTable:
    """Posteriors of all particles of a source, read once in order; memory does not grow with images.

    Several processes estimate a block of chunks each, and all get the whole table.
    """
    engine = checkpoint.engine.to(device).eval()
    n_particles = len(source.particles)
    ctf = None
    if checkpoint.use_ctf and source.particles.ctf is not None:
        ctf = working_ctf(source.particles.ctf, checkpoint.preparation)
    parts: list[Posterior] = []
    pieces = Pieces()
    own = np.arange(n_particles)[distributed.block(n_particles, CHUNK)]
    rows = [own[:0]]
    chunks = prepared_images(source, own, checkpoint.preparation, CHUNK)
    hidden = not sys.stderr.isatty() or distributed.rank() > 0
    progress = tqdm(total=len(own), desc="estimate", disable=hidden, leave=False)
    with torch.no_grad(), progress:
        for index, images, usable in chunks:
            kept = index[usable.numpy()]
            represented = engine.represent(images[usable])
            for start in range(0, len(kept), batch_size):
                row = torch.from_numpy(kept[start : start + batch_size])
                image = represented[start : start + batch_size]
                batch = Batch(row, image, None if ctf is None else ctf[row])
                parts += pieces.of(batch, lambda piece: engine.infer(piece.to(device)).to("cpu"))
            rows.append(kept)
            progress.update(len(index))
    posterior = Posterior.cat(parts) if parts else _nothing(engine.z_dim)
    pixel_size_angst = checkpoint.preparation.pixel_size_angst
    table = to_table(posterior, np.concatenate(rows), n_particles, pixel_size_angst)
    for field in fields(table):
        values = torch.from_numpy(getattr(table, field.name))
        distributed.unite(values, distributed.block(n_particles, CHUNK))
    return table


def _nothing(z_dim: int) -> Posterior:
    shapes = {"z_mean": (0, z_dim), "z_std": (0, z_dim), "origin_px": (0, 2)}
    return Posterior(*(torch.zeros(shapes.get(f.name, (0,))) for f in fields(Posterior)))
