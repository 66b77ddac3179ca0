"""Resolution of class averages: between half-sets, against the truth, and what the noise allows.

    python -m benchmarks.averages [--n-particles 4000] [--box 48] [--snr 0.1] [--classes 20] [--epochs E]

Views of a molecule (shifts of 1 px, CTF of 1 to 2.5 µm) are simulated; the steerable engine is trained on
them, and the particles are estimated, classified and averaged as ``cryo-svae run`` does. Rows:

* found classes, found poses: what a user gets;
* found classes, true poses: the same members, each turned by its truth into the frame of one of them;
* classes of like views, true poses: k-means of the true directions, as many classes. What noise allows.

Columns, FRC averaged over classes and given as the resolution in Å at which it crosses a value:

* half-sets: C, at 0.143 and 0.5;
* members: the average against the mean of its noiseless members in the same poses, at the values
  that C = 0.143 and 0.5 stand for, sqrt(2C / (1 + C)) = 0.5 and 0.816 (Rosenthal & Henderson 2003). It
  is worse than the half-sets say where both halves share fitted noise;
* gap: mean of sqrt(2C / (1 + C)) less that FRC over the rings before C = 0.143;
* one view: the average against its noiseless member most like the mean, at 0.5; and, without any noise,
  the mean of the members against that one. Worse than the members where views mix or poses are wrong;
* views: median angle of the members to that one.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

import cryo_svae
from benchmarks import trials
from cryo_svae.imaging import geometry
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.preprocessing import Preparation, soft_circle
from cryo_svae.results.class_averages import ClassAverages, class_averages, crossing_ring, ring_correlation
from cryo_svae.results.class_averages import soft_edge_px as edge_of
from cryo_svae.simulate import SimulateConfig, Simulated, simulate, view_rotation, write_simulated
from cryo_svae.simulate.molecules import load_molecule
from cryo_svae.simulate.particles import project

HALF, STRICT = 0.5, float(np.sqrt(2 * 0.5 / 1.5))
THRESHOLD = 0.143


@dataclass(frozen=True)
class Row:
    """Curves (rings,), means over classes, and the median angle of views within classes."""

    half_sets: NDArray[np.float64]
    members: NDArray[np.float64]
    one_view: NDArray[np.float64]
    mixing: NDArray[np.float64]
    views_deg: float
    resolution_angst: float


def aligned_truth(
    simulated: Simulated, config: SimulateConfig, table: EstimateTable, row: NDArray[np.intp]
) -> torch.Tensor:
    """Noiseless images (m, n, n) of particles, turned and moved by the poses of a table; no interpolation.

    q' = R(psi) (p + o) of p = R(-psi_t) q - o_t is R(psi - psi_t) q - R(psi) (o_t - o).
    """
    psi = torch.from_numpy(geometry.radians(table.psi_deg[row])).float()
    origin = torch.from_numpy(table.origin_angst[row] / simulated.pixel_size_angst).float()
    none = torch.zeros_like(psi)[:, None].expand(-1, 2)
    moved = geometry.particle_to_reference((simulated.origin_px[row] - origin)[:, None], psi, none)[:, 0]
    return project(
        load_molecule(config.molecule, config.source),
        simulated.conformation[row],
        simulated.psi_rad[row] - psi,
        moved,
        box_px=config.box,
        pixel_size_angst=simulated.pixel_size_angst,
        view_rad=simulated.view_rad[row],
    )


def score(
    simulated: Simulated,
    config: SimulateConfig,
    table: EstimateTable,
    number: NDArray[np.intp],
    averages: ClassAverages,
    preparation: Preparation,
) -> tuple[Row, list[int]]:
    """A row of the table, and the member of each class that is most like its mean."""
    edge = edge_of(config.box)
    mask = soft_circle(config.box, max(preparation.mask_radius_px - edge, 0.0), edge)
    direction = simulated.direction
    curves: list[list[NDArray[np.float64]]] = [[], [], [], []]
    angles, typical = [], []
    for k in range(len(averages.image)):
        row = np.flatnonzero(number == k + 1)
        members = aligned_truth(simulated, config, table, row) * mask
        mean = members.mean(0)
        unit = members / members.flatten(1).norm(dim=1)[:, None, None]
        best = int((unit * mean).sum((-2, -1)).argmax())
        typical.append(int(row[best]))
        cosine = (direction[row] @ direction[row[best]]).clamp(-1, 1)
        angles.append(geometry.degrees(torch.arccos(cosine)))
        average = torch.from_numpy(averages.half[k].mean(0)) * mask
        pairs = ((average, mean), (average, members[best]), (mean, members[best]))
        curves[0].append(averages.frc[k])
        for curve, (a, b) in zip(curves[1:], pairs, strict=True):
            curve.append(ring_correlation(a[None], b[None])[0].numpy())
    means = [np.mean(curve, axis=0) for curve in curves]
    views = float(torch.cat(angles).median())
    return Row(*means, views, float(np.nanmedian(averages.resolution_0143_angst))), typical


def true_poses(
    simulated: Simulated, table: EstimateTable, number: NDArray[np.intp], typical: list[int]
) -> EstimateTable:
    """True poses, each turned in plane into the reference frame of its class's typical member."""
    rotation = view_rotation(simulated.view_rad)
    of_class = rotation[np.array(typical)[number - 1]]
    between = of_class[:, :2] @ rotation[:, :2].mT
    turn = torch.atan2(between[:, 1, 0] - between[:, 0, 1], between[:, 0, 0] + between[:, 1, 1])
    psi = geometry.degrees((simulated.psi_rad + turn).double()).numpy()
    origin = simulated.origin_px.double().numpy() * simulated.pixel_size_angst
    return dataclasses.replace(table, psi_deg=psi, origin_angst=origin)


def like_views(simulated: Simulated, n_classes: int, seed: int) -> tuple[NDArray[np.intp], list[int]]:
    """Classes (n,) of like true directions, and the most central member of each."""
    direction = simulated.direction.double().numpy()
    centre, label = kmeans2(direction, n_classes, minit="++", iter=50, rng=np.random.default_rng(seed))
    distance = np.linalg.norm(direction - centre[label], axis=1)
    central = [int(np.where(label == k, distance, np.inf).argmin()) for k in range(n_classes)]
    return label.astype(np.intp) + 1, central


def rows_of(config: SimulateConfig, n_classes: int, epochs: int | None) -> tuple[dict[str, Row], float]:
    """The rows of the table by name, and the seconds of training."""
    simulated = simulate(config)
    with tempfile.TemporaryDirectory() as folder:
        write_simulated(Path(folder), simulated, config)
        particles = cryo_svae.load(Path(folder) / "particles.star")
        began = time.perf_counter()
        options = {} if epochs is None else {"epochs": epochs}
        model = cryo_svae.fit(particles, z_dim=8, seed=config.seed, **options)
        seconds = time.perf_counter() - began
        table = model.estimate(particles)
        classes, found = model.average(particles, table, n_classes)
        preparation, number = model.checkpoint.preparation, classes.class_number

        def average(poses: EstimateTable, numbers: NDArray[np.intp], k: int) -> ClassAverages:
            return class_averages(
                ImageSource(particles), poses, numbers, k, preparation,
                use_ctf=True, seed=config.seed, device=torch.device("cpu"),
            )  # fmt: skip

        rows = {}
        name = "found classes, found poses"
        rows[name], typical = score(simulated, config, table, number, found, preparation)
        turned = true_poses(simulated, table, number, typical)
        again = average(turned, number, len(found.image))
        name = "found classes, true poses"
        rows[name], _ = score(simulated, config, turned, number, again, preparation)
        number, central = like_views(simulated, n_classes, config.seed)
        turned = true_poses(simulated, table, number, central)
        best = average(turned, number, n_classes)
        name = "classes of like views, true poses"
        rows[name], _ = score(simulated, config, turned, number, best, preparation)
    return rows, seconds


def line(name: str, row: Row, side_angst: float) -> str:
    """One row as text."""
    expected = np.sqrt(2 * row.half_sets.clip(0) / (1 + row.half_sets.clip(0)))
    trusted = np.arange(1, int(np.nan_to_num(crossing_ring(row.half_sets, THRESHOLD), nan=1)) + 1)
    gap = float((expected - row.members)[trusted[trusted < len(expected)]].mean())
    at = (
        (row.half_sets, THRESHOLD),
        (row.members, HALF),
        (row.half_sets, 0.5),
        (row.members, STRICT),
        (row.one_view, HALF),
        (row.mixing, HALF),
    )
    columns = [f"{side_angst / crossing_ring(curve, value):8.1f}" for curve, value in at]
    return f"{name:34s} {' '.join(columns)} {gap:+8.3f} {row.views_deg:7.1f}° {row.resolution_angst:8.1f}"


def main() -> None:
    """Prints the table, and the curves of the first row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n-particles", type=int, default=4000)
    parser.add_argument("--box", type=int, default=48)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = SimulateConfig(
        molecule="views",
        n_particles=arguments.n_particles,
        box=arguments.box,
        snr=arguments.snr,
        shift_std_px=1.0,
        defocus_min_angst=10_000.0,
        defocus_max_angst=25_000.0,
        n_micrographs=40,
        seed=arguments.seed,
    )
    rows, seconds = rows_of(config, arguments.classes, arguments.epochs)
    pixel_size_angst = simulate(dataclasses.replace(config, n_particles=1)).pixel_size_angst
    side_angst = config.box * pixel_size_angst
    lines = [
        f"{config.n_particles} views of {config.box} px of {pixel_size_angst:.2f} Å, SNR {config.snr:g}, "
        f"{arguments.classes} classes, seed {config.seed}; training {seconds:.0f} s",
        f"{'resolution/Å of the mean FRC':34s}     half  members     half  members one view   mixing",
        f"{'':34s}    0.143      0.5      0.5    0.816      0.5      0.5      gap   views   median class",
        *(line(name, row, side_angst) for name, row in rows.items()),
        "",
        "ring      Å   half-sets  expected  members  one view   (found classes, found poses)",
    ]
    found = rows["found classes, found poses"]
    for ring in range(1, len(found.half_sets)):
        half = max(found.half_sets[ring], 0.0)
        lines.append(
            f"{ring:4d} {side_angst / ring:6.1f} {found.half_sets[ring]:11.3f} "
            f"{np.sqrt(2 * half / (1 + half)):9.3f} {found.members[ring]:8.3f} {found.one_view[ring]:9.3f}"
        )
    trials.report("averages", lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
