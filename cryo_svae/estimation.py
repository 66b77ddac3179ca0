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
from cryo_svae.preprocessing import chunk_size, prepared_images, working_ctf

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


def empty_table(n_particles: int, z_dim: int) -> EstimateTable:
    """A table of zeros, in which no particle is usable."""
    n, vectors = n_particles, {"z": z_dim, "z_std": z_dim, "origin_angst": 2}
    names = [field.name for field in fields(EstimateTable) if field.name != "usable"]
    reals = {name: np.zeros((n, vectors[name]) if name in vectors else n) for name in names}
    return EstimateTable(**reals, usable=np.zeros(n, dtype=bool))


def fill(
    table: EstimateTable, row: NDArray[np.intp], posterior: Posterior, pixel_size_angst: float
) -> None:
    """Writes the posteriors of particles ``row`` into the table."""
    columns = {
        "z": posterior.z_mean,
        "z_std": posterior.z_std,
        "psi_deg": geometry.degrees(posterior.psi_rad),
        "psi_std_deg": geometry.degrees(posterior.psi_std_rad),
        "origin_angst": posterior.origin_px * pixel_size_angst,
        "origin_std_angst": posterior.origin_std_px * pixel_size_angst,
        "figure_of_merit": posterior.figure_of_merit,
        "log_likelihood": posterior.log_likelihood,
        "second_mode": posterior.second_mode,
    }
    for name, values in columns.items():
        getattr(table, name)[row] = values.double().numpy()
    table.usable[row] = True


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
    # written in place: small results kept between large temporaries would hold the heap in pieces
    table = empty_table(n_particles, engine.z_dim)
    pieces = Pieces()
    block = distributed.block(n_particles, chunk_size(checkpoint.preparation))
    own = np.arange(n_particles)[block]
    chunks = prepared_images(source, own, checkpoint.preparation, device=device)
    hidden = not sys.stderr.isatty() or distributed.rank() > 0
    progress = tqdm(total=len(own), desc="estimate", disable=hidden, leave=False)
    with torch.no_grad(), progress:
        for index, images, usable in chunks:
            kept = index[usable.cpu().numpy()]
            represented = engine.represent(images[usable])
            for start in range(0, len(kept), batch_size):
                row = torch.from_numpy(kept[start : start + batch_size])
                image = represented[start : start + batch_size]
                batch = Batch(row, image, None if ctf is None else ctf[row])
                found = pieces.of(batch, lambda piece: engine.infer(piece.to(device)).to("cpu"))
                fill(table, row.numpy(), Posterior.cat(found), checkpoint.preparation.pixel_size_angst)
            progress.update(len(index))
    for field in fields(table):
        values = torch.from_numpy(getattr(table, field.name))
        distributed.unite(values, block)
    return table
