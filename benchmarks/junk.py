"""Noise-only images mixed in: how well the figure of merit tells them from particles.

python -m benchmarks.junk --source ../shared/data/motion [--n-particles 10000] [--seeds 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from benchmarks import trials
from cryo_svae.simulate import SimulateConfig, simulate


def roc_area(merit: np.ndarray, is_particle: np.ndarray) -> float:
    """Chance that a particle's merit exceeds that of a junk image (Mann-Whitney)."""
    rank = rankdata(merit)
    n, m = int(is_particle.sum()), int((~is_particle).sum())
    return float((rank[is_particle].sum() - n * (n + 1) / 2) / (n * m))


def main() -> None:
    """Prints the ROC area of each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--n-particles", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    areas = []
    for seed in range(arguments.seeds):
        simulated = simulate(
            SimulateConfig(
                molecule="hsp90",
                source=arguments.source,
                n_particles=arguments.n_particles,
                box=40,
                snr=0.1,
                shift_std_px=1.5,
                junk_fraction=0.1,
                seed=seed,
            )
        )
        trial = trials.run_trial(
            simulated, "steerable", 1, seed, epochs=arguments.epochs, max_shift_px=4.5, judged=2000
        )
        areas.append(roc_area(trial.posterior.figure_of_merit.numpy(), ~simulated.is_junk[:2000].numpy()))
    trials.report(
        "junk", [f"10 % noise-only images, ROC area of the figure of merit: {trials.median(areas):.4f}"]
    )


if __name__ == "__main__":
    main()
