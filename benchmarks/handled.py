"""A hinge set handed on as other programs do, and flagged so: plain, phase-flipped, premultiplied, mixed.

    python -m benchmarks.handled [--n-particles 4000] [--epochs 20] [--seed 0]

Each copy goes through files and the whole job. r_z and rotation are against the truth; the FRC is the mean,
over the rings of class averages by the true conformation at the poses found, and over five classes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import trials
from benchmarks.measures import circular_correlation, r_z
from cryo_svae.cli import main as cryo_svae
from cryo_svae.formats.star import read_star, write_star
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable, ctf_2d
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.preprocessing import Preparation
from cryo_svae.results.class_averages import class_averages
from cryo_svae.simulate import SimulateConfig, Simulated, simulate
from cryo_svae.simulate.files import write_simulated

COPIES = ("plain", "phase-flipped", "premultiplied", "mixed")
CLASSES = 5


def handled(images: torch.Tensor, ctf: CtfTable, copy: str) -> tuple[torch.Tensor, dict[str, list[str]]]:
    """The images of a copy, and the columns that say what was done to them."""
    n, box_px = len(images), images.shape[-1]
    which = torch.ones(n, dtype=torch.bool)
    which[::2] = copy != "mixed"
    if copy == "plain":
        return images, {}
    transfer = ctf_2d(ctf, box_px)
    factor = torch.sign(transfer) if copy == "phase-flipped" else transfer
    factor = torch.where(which[:, None, None], factor, 1.0)
    label = "rlnCtfDataArePhaseFlipped" if copy == "phase-flipped" else "rlnCtfDataAreCtfPremultiplied"
    done = torch.fft.irfft2(torch.fft.rfft2(images) * factor, s=(box_px, box_px))
    return done, {label: [str(int(each)) for each in which]}


def scores(star: Path, made: Simulated) -> list[float]:
    """r_z, agreement of psi, mean FRC."""
    block = read_star(star).block("particles")
    assert block is not None
    psi_deg = block.numbers("rlnAnglePsi")
    origin = np.column_stack([block.numbers(f"rlnOrigin{axis}Angst") for axis in "XY"])
    truth, none = made.conformation[:, 0].double().numpy(), np.zeros(len(psi_deg))
    table = EstimateTable(
        z=none[:, None], z_std=none[:, None], psi_deg=psi_deg, psi_std_deg=none, origin_angst=origin,
        origin_std_angst=none, figure_of_merit=none, log_likelihood=none, second_mode=none,
        usable=np.ones(len(none), dtype=bool),
    )  # fmt: skip
    number = 1 + np.argsort(np.argsort(truth)) * CLASSES // len(truth)
    size = made.pixel_size_angst
    box_px = made.images.shape[-1]
    plan = Preparation(
        box_px=box_px, pixel_size_angst=size, mask_diameter_angst=(box_px - 2) * size, invert=False
    )
    cpu = torch.device("cpu")
    source = ImageSource(read_particles(star))
    found = class_averages(source, table, number, CLASSES, plan, use_ctf=True, seed=0, device=cpu)
    psi = geometry.radians(psi_deg)
    rotation = circular_correlation(psi, made.psi_rad.double().numpy())
    return [r_z(block.numbers("svaeZ1"), truth), rotation, float(found.frc[:, 1:].mean())]


def main() -> None:
    """Prints a row a copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n-particles", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = SimulateConfig(
        n_particles=arguments.n_particles, box=40, snr=0.2, shift_std_px=1.0, seed=arguments.seed,
        defocus_min_angst=10_000.0, defocus_max_angst=25_000.0,
    )  # fmt: skip
    made = simulate(config)
    assert made.ctf is not None
    lines = [f"{'copy':15s} {'r_z':>7s} {'rotation':>9s} {'FRC':>7s}"]
    with tempfile.TemporaryDirectory() as folder:
        for copy in COPIES:
            images, columns = handled(made.images, made.ctf, copy)
            here = Path(folder) / copy
            write_simulated(here, replace(made, images=images), config)
            star = read_star(here / "particles.star")
            write_star(here / "flagged.star", star, block="particles", columns=columns)
            words = ["run", str(here / "flagged.star"), "--out", str(here / "job"), "--z-dim", "1"]
            assert cryo_svae([*words, "--epochs", str(arguments.epochs), "--device", "cpu"]) == 0
            row = scores(here / "job" / "particles.star", made)
            lines.append(f"{copy:15s} {row[0]:7.4f} {row[1]:9.4f} {row[2]:7.4f}")
    trials.report("handled", lines)


if __name__ == "__main__":
    main()
