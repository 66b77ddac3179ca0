"""Many views of a 3-D molecule: in-plane error of like views, and views of neighbours in z.

    python -m benchmarks.views --source ../shared/data/motion [--n-particles 8000] [--seeds 3] [--relion]

The molecule is seen from uniform directions, 64 px, SNR 0.1, shifts of 1 px, CTF of 1 to 2.5 µm. Without
--source it is the built-in hinge at rest. The limit (``views_limit``) is taken on some of the
particles. With --relion, RELION's 2-D classification runs on the same particles (its classes stand in
for z).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import trials
from benchmarks.measures import like_view_error_deg, neighbour_view_deg
from benchmarks.relion import classify
from benchmarks.views_limit import limit
from cryo_svae.imaging import geometry
from cryo_svae.simulate import SimulateConfig, Simulated, simulate, view_rotation, write_simulated

SHIFT_STD_PX = 1.0


def config_of(n_particles: int, seed: int, source: Path | None) -> SimulateConfig:
    """The set of the table."""
    return SimulateConfig(
        molecule="views",
        source=source,
        n_particles=n_particles,
        box=64,
        snr=0.1,
        shift_std_px=SHIFT_STD_PX,
        defocus_min_angst=10_000.0,
        defocus_max_angst=25_000.0,
        n_micrographs=50,
        seed=seed,
    )


def directions(simulated: Simulated) -> np.ndarray:
    """Viewing directions (n, 3)."""
    return view_rotation(simulated.view_rad.double())[:, 2].numpy()


def steerable_row(simulated: Simulated, seed: int, epochs: int | None) -> dict[str, float]:
    """Measures of our engine after training."""
    trial = trials.run_trial(simulated, "steerable", 8, seed, epochs=epochs, max_shift_px=3.0)
    psi, z = (t.double().numpy() for t in (trial.posterior.psi_rad, trial.posterior.z_mean))
    spread = trial.posterior.z_std.double().mean(0).numpy()
    used = z / np.maximum(spread, 1e-3)  # distances in units of what is known of each axis
    return {
        "in_plane": like_view_error_deg(
            psi, simulated.psi_rad.double().numpy(), simulated.view_rad.double().numpy()
        ),
        "neighbours": neighbour_view_deg(used, directions(simulated)),
        "seconds": trial.seconds,
        "rate": trial.images_per_second,
    }


def relion_row(
    simulated: Simulated, config: SimulateConfig, classes: int, iterations: int
) -> dict[str, float]:
    """Measures of relion_refine's classes: in-plane error over pairs of like views in one class."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_simulated(work, simulated, config)
        found = classify(
            work / "particles.star",
            classes=classes,
            iterations=iterations,
            diameter_angst=0.9 * config.box * simulated.pixel_size_angst,
            offset_range_px=3,
            pad=1,
            threads=1,
        )
    psi, number = geometry.radians(found.psi_deg), found.class_number
    errors = []
    true_psi, view = simulated.psi_rad.double().numpy(), simulated.view_rad.double().numpy()
    for k in np.unique(number):
        mine = number == k
        if mine.sum() > 10:
            errors += [like_view_error_deg(psi[mine], true_psi[mine], view[mine])] * int(mine.sum())
    return {
        "in_plane": float(np.nanmedian(errors)),
        "neighbours": float("nan"),
        "seconds": found.seconds,
        "rate": len(psi) * iterations / found.seconds,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--n-particles", type=int, default=8000)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit-images", type=int, default=300)
    parser.add_argument("--relion", action="store_true")
    parser.add_argument("--relion-classes", type=int, default=50)
    parser.add_argument("--relion-iterations", type=int, default=25)
    arguments = parser.parse_args()
    lines = [
        f"{arguments.n_particles} views of 64 px, medians of {arguments.seeds} seeds",
        f"{'program':24s} in-plane/deg  neighbours in z/deg  s  img/s (a pass)",
    ]
    rows, limits = [], []
    for seed in range(arguments.seeds):
        simulated = simulate(config_of(arguments.n_particles, seed, arguments.source))
        limits.append(limit(simulated, arguments.source, SHIFT_STD_PX, arguments.limit_images))
        rows.append(steerable_row(simulated, seed, arguments.epochs))
    lines.append(_line("limit", limits))
    lines.append(_line("steerable, z-dim 8", rows))
    print("\n".join(lines), flush=True)
    if arguments.relion and shutil.which("relion_refine"):
        config = config_of(arguments.n_particles, 0, arguments.source)
        row = relion_row(simulate(config), config, arguments.relion_classes, arguments.relion_iterations)
        lines.append(
            _line(f"RELION, K {arguments.relion_classes}, {arguments.relion_iterations} it", [row])
        )
    trials.report("views", lines)


def _line(name: str, rows: list[dict[str, float]]) -> str:
    values = {key: trials.median([row[key] for row in rows]) for key in rows[0]}
    text = f"{name:24s} {values['in_plane']:12.2f} {values['neighbours']:20.2f}"
    if "seconds" not in values:
        return text
    return f"{text} {values['seconds']:6.0f} {values['rate']:8.0f}"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
