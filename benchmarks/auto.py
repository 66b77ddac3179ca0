"""Classes that ``select --auto`` takes: how much noise is left in them, and what is lost.

    python -m benchmarks.auto [--n-particles 3000] [--junk 0.1 0.3 0.5] [--classes 25] [--epochs 20]

Views of a molecule (48 px, SNR 0.15, shifts of 1 px, CTF of 1 to 2.5 µm), some of the images noise
alone, go through training, estimation and classes as in ``cryo-svae run``. A row for each share of noise.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import cryo_svae
from benchmarks import trials
from cryo_svae.results.auto_selection import objections
from cryo_svae.simulate import SimulateConfig, simulate, write_simulated


def row(config: SimulateConfig, n_classes: int, epochs: int) -> str:
    """What is taken of one simulation, in words."""
    simulated = simulate(config)
    with tempfile.TemporaryDirectory() as folder:
        write_simulated(Path(folder), simulated, config)
        particles = cryo_svae.load(Path(folder) / "particles.star")
        model = cryo_svae.fit(particles, z_dim=8, seed=config.seed, epochs=epochs)
        classes, found = model.average(particles, model.estimate(particles), n_classes)
    why = objections(found.n_particles, found.mean_figure_of_merit, found.resolution_05_angst)
    taken = np.array([not each for each in why])[classes.class_number - 1]
    junk = simulated.is_junk.numpy()
    return (
        f"{config.junk_fraction:5.0%} noise: {sum(not each for each in why)} of {len(why)} classes taken; "
        f"{int((taken & junk).sum())} of {int(junk.sum())} noise images in them, "
        f"{int((~taken & ~junk).sum())} of {int((~junk).sum())} particles lost"
    )


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n-particles", type=int, default=3000)
    parser.add_argument("--junk", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    lines = []
    for share in arguments.junk:
        config = SimulateConfig(
            molecule="views",
            n_particles=arguments.n_particles,
            box=48,
            snr=0.15,
            shift_std_px=1.0,
            junk_fraction=share,
            defocus_min_angst=10_000.0,
            defocus_max_angst=25_000.0,
            n_micrographs=30,
            seed=arguments.seed,
        )
        lines.append(row(config, arguments.classes, arguments.epochs))
    trials.report("auto", lines)


if __name__ == "__main__":
    main()
