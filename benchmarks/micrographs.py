"""Particles as they come: what neighbours, coloured noise, uneven ice and junk cost the default engine.

    python -m benchmarks.micrographs --source ../shared/data/motion [--rows ice …] [--molecules hinge …]

All views of a molecule, 64 px of 3.5 Å, CTF of 0.9 to 2.6 µm, z-dim 8; signal-to-noise ratios are those
within the circle around the molecule. Each row is the median over molecules and seeds, the worst beside it.
Hsp90 and the kinase need --source; the others are built in.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import trials
from benchmarks.junk import roc_area
from benchmarks.measures import like_view_errors_deg, neighbour_view_deg
from cryo_svae.simulate import SimulateConfig, simulate

PLAIN = {"contrast_std": 0.0, "thickness_gradient": 0.0, "ice_fraction": 0.0, "noise_excess": 0.0}
AS_THEY_COME = {"shift_std_px": 1.5, "ice_fraction": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "clean": {"spacing": 3.0, "shift_std_px": 0.0, **PLAIN},
    "crowded": {"shift_std_px": 0.0, **PLAIN},
    "coloured": {"spacing": 3.0, "shift_std_px": 0.0, **PLAIN, "noise_excess": 15.0},
    "weak": {"snr": 0.035, "spacing": 3.0, "shift_std_px": 0.0, **PLAIN},
    "no-ice": AS_THEY_COME,
    "ice": {**AS_THEY_COME, "ice_fraction": 0.03},
    "ice-0.28": {**AS_THEY_COME, "ice_fraction": 0.03, "snr": 0.28},
    "empty-0.28": {**AS_THEY_COME, "ice_fraction": 0.03, "junk_fraction": 0.05, "snr": 0.28},
}
MOLECULES: dict[str, dict[str, Any]] = {
    "hinge": {"molecule": "views"},
    "hsp90": {"molecule": "views", "source": ""},
    "kinase": {"molecule": "views", "source": "adk_closed_to_open.npz"},
    "lump-0": {"molecule": "lump", "molecule_seed": 0},
    "lump-1": {"molecule": "lump", "molecule_seed": 1},
}
MEASURES = ("in plane/deg", "within 10 deg", "neighbours/deg", "junk ROC", "s")
HIGHER_IS_BETTER = ("within 10 deg", "junk ROC")
JUDGED = 2000


def config_of(
    row: str, molecule: str, seed: int, n_particles: int, folder: Path | None
) -> SimulateConfig | None:
    """The set of a row; None where its molecule's atoms are not at hand."""
    settings = {"snr": 0.1, **ROWS[row], **MOLECULES[molecule]}
    if "source" in settings:
        if folder is None:
            return None
        settings["source"] = folder / settings["source"]
    return SimulateConfig(
        n_particles=n_particles, box=64, pixel_size_angst=3.5, micrographs=True,
        n_micrographs=max(1, n_particles // 80), defocus_min_angst=9_000.0, defocus_max_angst=26_000.0,
        seed=seed, **settings,
    )  # fmt: skip


def measured(config: SimulateConfig, seed: int, epochs: int | None) -> dict[str, float]:
    """Measures of the default engine on one set."""
    simulated = simulate(config)
    trial = trials.run_trial(
        simulated, "steerable", 8, seed, epochs=epochs, judged=JUDGED, max_shift_px=0.1 * config.box
    )
    found, n = trial.posterior, len(trial.posterior.psi_rad)
    good = ~simulated.is_junk[:n].numpy()
    psi, z, spread = (t.double().numpy() for t in (found.psi_rad, found.z_mean, found.z_std))
    used = z / np.maximum(spread.mean(0), 1e-3)
    view, direction = simulated.view_rad, simulated.direction
    assert view is not None
    assert direction is not None
    errors = like_view_errors_deg(
        psi[good], simulated.psi_rad[:n].double().numpy()[good], view[:n].double().numpy()[good]
    )
    merit = found.figure_of_merit.numpy()
    return {
        "in plane/deg": float(np.median(errors)),
        "within 10 deg": float(np.mean(errors < 10.0)),
        "neighbours/deg": neighbour_view_deg(used[good], direction[:n].double().numpy()[good]),
        "junk ROC": float("nan") if good.all() else roc_area(merit, good),
        "s": trial.seconds,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--molecules", nargs="*", choices=MOLECULES, default=list(MOLECULES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--n-particles", type=int, default=4000)
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    lines = [
        f"{arguments.n_particles} particles, {arguments.seeds} seeds of {', '.join(arguments.molecules)}: "
        "median (worst)",
        f"{'':12s}" + "".join(f"{name:>20s}" for name in MEASURES),
    ]
    for row in arguments.rows:
        found = []
        for molecule in arguments.molecules:
            for seed in range(arguments.seeds):
                config = config_of(row, molecule, seed, arguments.n_particles, arguments.source)
                if config is not None:
                    found.append(measured(config, seed, arguments.epochs))
                    cells = "".join(f"{found[-1][name]:20.3f}" for name in MEASURES)
                    print(f"{row:12s}{cells}  {molecule}, seed {seed}", flush=True)
        lines.append(
            f"{row:12s}" + "".join(_cell(name, [each[name] for each in found]) for name in MEASURES)
        )
    trials.report("micrographs", lines)


def _cell(name: str, values: list[float]) -> str:
    worst = min(values) if name in HIGHER_IS_BETTER else max(values)
    return f"{f'{trials.median(values):.2f} ({worst:.2f})':>20s}"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
