"""Hinge molecules: the steerable engine beside the Bayes limit and the coordinate engine.

    python -m benchmarks.hinge --source ../shared/data/motion [--n-particles 20000] [--seeds 3] [SET ...]

Every set is simulated anew for each seed. The limit is taken on the first images of the set, and the
engine is scored on the same ones. Seconds are of training alone, with everything else off the clock.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import trials
from benchmarks.bayes_limit import posterior_mean
from benchmarks.measures import angle_error_deg, circular_correlation, r_z, shift_rms_px
from cryo_svae.simulate import SimulateConfig, Simulated, load_molecule, simulate

LIMIT_IMAGES = 2000
ENOUGH = 0.95  # share of the limit whose time is taken


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    molecule: str
    snr: float
    shift_std_px: float
    ctf: bool
    z_dim: int


SETS = {
    "adk": Setting("adk", 0.1, 0.0, False, 1),
    "hsp90": Setting("hsp90", 0.1, 0.0, False, 1),
    "adk-shifts": Setting("adk", 0.1, 1.5, False, 1),
    "hsp90-shifts": Setting("hsp90", 0.1, 1.5, False, 1),
    "hsp90-dim": Setting("hsp90", 0.03, 0.0, False, 1),
    "hsp90-dim-shifts": Setting("hsp90", 0.03, 1.5, False, 1),
    "hsp90-ctf": Setting("hsp90", 0.1, 0.0, True, 1),
    "hsp90-ctf-shifts": Setting("hsp90", 0.1, 1.5, True, 1),
    "two-arms": Setting("hsp90-two-arms", 0.1, 0.0, False, 2),
}


def source_of(molecule: str, folder: Path) -> Path:
    """The atoms of a molecule within the folder of structures."""
    return folder / "adk_closed_to_open.npz" if molecule == "adk" else folder


def simulate_set(setting: Setting, n_particles: int, seed: int, folder: Path) -> Simulated:
    """The images of a row."""
    return simulate(
        SimulateConfig(
            molecule=setting.molecule,
            source=source_of(setting.molecule, folder),
            n_particles=n_particles,
            box=40,
            snr=setting.snr,
            shift_std_px=setting.shift_std_px,
            defocus_min_angst=10_000.0 if setting.ctf else None,
            defocus_max_angst=25_000.0 if setting.ctf else None,
            n_micrographs=50,
            seed=seed,
        )
    )


def first(simulated: Simulated, n: int) -> Simulated:
    """The first n images."""
    return Simulated(
        images=simulated.images[:n],
        pixel_size_angst=simulated.pixel_size_angst,
        conformation=simulated.conformation[:n],
        psi_rad=simulated.psi_rad[:n],
        origin_px=simulated.origin_px[:n],
        view_rad=None,
        is_junk=simulated.is_junk[:n],
        noise_std=simulated.noise_std,
        ctf=None if simulated.ctf is None else simulated.ctf[slice(0, n)],
    )


def limit(setting: Setting, simulated: Simulated, folder: Path) -> dict[str, float]:
    """Scores of the posterior means under the truth."""
    part = first(simulated, LIMIT_IMAGES)
    molecule = load_molecule(setting.molecule, source_of(setting.molecule, folder))
    mean = posterior_mean(part, molecule, setting.shift_std_px)
    psi, true_psi = mean.psi_rad.double().numpy(), part.psi_rad.double().numpy()
    row = {
        f"r_z{k + 1}": r_z(
            mean.conformation[:, k].double().numpy(), part.conformation[:, k].double().numpy()
        )
        for k in range(part.conformation.shape[1])
    }
    return row | {
        "rotation": circular_correlation(psi, true_psi),
        "angle_deg": angle_error_deg(psi, true_psi),
        "shift_px": shift_rms_px(mean.origin_px.double().numpy(), part.origin_px.double().numpy(), psi),
    }


def main() -> None:
    """Prints a row a set as it is done, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--n-particles", type=int, default=20_000)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--coordinate-seconds", type=float, default=0.0)
    arguments = parser.parse_args()
    lines = [
        f"{arguments.n_particles} images, 40 px; medians of {arguments.seeds} seeds (share of limit); "
        "and r_z of the worst seed",
        f"{'set':17s} {'engine':12s} {'r_z':14s} {'worst':6s} {'rotation':14s} "
        f"{'angle/deg':>9s} {'shift/px':>9s} {'s to 95 %':>10s} {'s':>6s} {'img/s':>8s}",
    ]
    print("\n".join(lines))
    for name in arguments.sets:
        lines += row_of_set(name, arguments)
        print("\n".join(lines[-3 if arguments.coordinate_seconds else -2 :]), flush=True)
    trials.report("hinge", lines)


def row_of_set(name: str, arguments: argparse.Namespace) -> list[str]:
    """Limit and engines of one set."""
    setting = SETS[name]
    limits, runs = [], {"steerable": [], "coordinate": []}
    times: dict[str, list[float]] = {"steerable": [], "coordinate": []}
    speed: dict[str, list[tuple[float, float]]] = {"steerable": [], "coordinate": []}
    shifts = {"max_shift_px": 3.0 * setting.shift_std_px}
    for seed in range(arguments.seeds):
        simulated = simulate_set(setting, arguments.n_particles, seed, arguments.source)
        best = limit(setting, simulated, arguments.source)
        limits.append(best)
        zs = [key for key in best if key.startswith("r_z")]
        targets = {key: ENOUGH * best[key] for key in [*zs, "rotation"]}
        budgets = {"steerable": float("inf"), "coordinate": arguments.coordinate_seconds}
        for engine, budget in budgets.items():
            if budget == 0.0 or (engine == "coordinate" and seed > 0):
                continue
            options = shifts if engine == "steerable" else {"translate": setting.shift_std_px > 0}
            trial = trials.run_trial(
                simulated,
                engine,
                setting.z_dim,
                seed,
                epochs=arguments.epochs if engine == "steerable" else None,
                time_limit_s=budget,
                watch=500,
                judged=LIMIT_IMAGES,
                **options,
            )
            index = torch.arange(len(trial.posterior.psi_rad))
            runs[engine].append(trials.scores(trial.posterior, simulated, index))
            times[engine].append(trials.seconds_to(trial, targets))
            speed[engine].append((trial.seconds, trial.images_per_second))
    rows = [_row(name, "limit", limits, limits, None, None)]
    for engine, scores in runs.items():
        if scores:
            rows.append(_row(name, engine, scores, limits[: len(scores)], times[engine], speed[engine]))
    return rows


def _row(name, engine, scores, limits, times, speed) -> str:
    """Medians over seeds, with their share of the limit."""
    zs = [key for key in scores[0] if key.startswith("r_z")]

    def of_limit(keys: list[str]) -> str:
        value = trials.median([min(row[key] for key in keys) for row in scores])
        share = trials.median(
            [min(row[key] / best[key] for key in keys) for row, best in zip(scores, limits, strict=True)]
        )
        return f"{value:.3f} ({share:.3f})" if engine != "limit" else f"{value:.3f}"

    worst = min(row[key] for row in scores for key in zs)
    angle = trials.median([row["angle_deg"] for row in scores])
    shift = trials.median([row["shift_px"] for row in scores])
    text = (
        f"{name:17s} {engine:12s} {of_limit(zs):14s} {worst:6.3f} {of_limit(['rotation']):14s} "
        f"{angle:9.2f} {shift:9.2f}"
    )
    if times is None:
        return text
    seconds = trials.median([s for s, _ in speed])
    rate = trials.median([r for _, r in speed])
    return f"{text} {trials.median(times):10.0f} {seconds:6.0f} {rate:8.0f}"


if __name__ == "__main__":
    main()
