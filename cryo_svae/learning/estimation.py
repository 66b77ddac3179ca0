"""The posterior of every particle, in the order of the input and in the units of files (degrees, Å)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cryo_svae.computing import distributed
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.microbatches import Pieces
from cryo_svae.models.engine import Batch, Posterior
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.known_poses import KnownPoses, known_poses
from cryo_svae.particles.preprocessing import chunk_size, prepared_images, working_ctf

Reals = NDArray[np.float64]
BATCH_ON_CPU = 256


@dataclass(frozen=True)
class EstimateTable:
    """The estimates of n particles, in the order of the input.

    z, z_std:          (n, d) latent content, and its posterior standard deviation.
    psi_deg:           (n,) in-plane rotation in degrees; psi_std_deg is its posterior standard deviation.
    origin_angst:      (n, 2) origin (x, y) in Å; origin_std_angst (n,) is that of each component.
    figure_of_merit:   (n,) higher is better; about 0 for an image without a particle.
    log_likelihood:    (n,) evidence of the image under the model, in nats.
    second_mode:       (n,) posterior mass of the second-best pose that is apart from the best one.
    usable:            (n,) False for NaN or constant images; all their numbers are 0.
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
    checkpoint: Checkpoint, source: ImageSource, device: torch.device, batch_size: int | None = None
) -> EstimateTable:
    """Posteriors of all particles of a source, read once in order; memory does not grow with images.

    A GPU gets as many particles at a time as are prepared together, unless ``batch_size`` says otherwise,
    and its answers are fetched when it has its next task. Several processes estimate a block of chunks
    each, and all get the whole table.
    """
    engine = checkpoint.engine.to(device).eval()
    n_particles = len(source.particles)
    ctf = None
    if checkpoint.use_ctf and source.particles.ctf is not None:
        ctf = working_ctf(source.particles.ctf, checkpoint.preparation)
    poses = known_poses(source.particles, checkpoint.preparation)
    if poses is not None and ctf is not None:
        ctf = poses.turned(ctf)
    if batch_size is None:
        batch_size = chunk_size(checkpoint.preparation) if device.type == "cuda" else BATCH_ON_CPU
    # written in place: small results kept between large temporaries would hold the heap in pieces
    table = empty_table(n_particles, engine.z_dim)
    pixel_size_angst = checkpoint.preparation.pixel_size_angst
    pieces = Pieces()
    block = distributed.block(n_particles, chunk_size(checkpoint.preparation))
    own = np.arange(n_particles)[block]
    chunks = prepared_images(source, own, checkpoint.preparation, device=device)
    hidden = not sys.stderr.isatty() or distributed.rank() > 0
    progress = tqdm(total=len(own), desc="estimate", disable=hidden, leave=False)
    pending: list[tuple[NDArray[np.intp], Posterior]] = []
    with torch.no_grad(), progress:
        for index, images, usable in chunks:
            kept = index[usable.cpu().numpy()]
            taken = images[usable]
            if poses is not None:
                taken = poses.undone(taken, torch.from_numpy(kept))
            represented = engine.represent(taken)
            asked = []
            for place, turns in _alike(kept, ctf, batch_size):
                row = torch.from_numpy(kept[place])
                batch = Batch(row, represented[place], None if ctf is None else ctf[row], astigmatic=turns)
                found = pieces.of(batch, lambda piece: engine.infer(piece.to(device)))
                asked.append((kept[place], Posterior.cat(found)))
            for estimated, posterior in pending:
                fill(table, estimated, posterior.to("cpu"), pixel_size_angst)
            pending = asked
            progress.update(len(index))
        for estimated, posterior in pending:
            fill(table, estimated, posterior.to("cpu"), pixel_size_angst)
    if poses is not None:
        _behind(table, poses, pixel_size_angst, checkpoint.preparation.known_pose == "fixed")
    for field in fields(table):
        values = torch.from_numpy(getattr(table, field.name))
        distributed.unite(values, block)
    return table


def _behind(table: EstimateTable, poses: KnownPoses, pixel_size_angst: float, is_fixed: bool) -> None:
    """Makes of what was found behind known poses whole poses; fixed ones are certain."""
    row = np.flatnonzero(table.usable)
    rest = geometry.radians(torch.from_numpy(table.psi_deg[row]))
    origin = torch.from_numpy(table.origin_angst[row]) / pixel_size_angst
    if is_fixed:
        rest, origin = torch.zeros_like(rest), torch.zeros_like(origin)
        for certain in (table.psi_std_deg, table.origin_std_angst, table.second_mode):
            certain[row] = 0.0
    psi, whole = poses.then(torch.from_numpy(row), rest, origin)
    table.psi_deg[row] = geometry.degrees(psi).numpy()
    table.origin_angst[row] = (whole * pixel_size_angst).numpy()


def _alike(
    row: NDArray[np.intp], ctf: CtfTable | None, batch_size: int
) -> Iterator[tuple[NDArray[np.intp], bool]]:
    """Places in ``row`` of at most ``batch_size`` particles whose CTF all change with direction, or none.

    Apart, so that no particle's CTF is treated by its neighbours'.
    """
    turns = np.zeros(len(row), dtype=bool)
    if ctf is not None:
        turns = ctf[torch.from_numpy(row)].astigmatic.numpy()
    for kind in (False, True):
        places = np.flatnonzero(turns == kind)
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size], kind
