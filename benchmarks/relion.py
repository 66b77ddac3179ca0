"""RELION's 2-D classification, run on a STAR file of simulated or real particles."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryo_svae.formats.star import read_star


@dataclass(frozen=True)
class Classified:
    """Poses and classes in the order of the STAR file's rows; (n,), (n, 2), (n,)."""

    psi_deg: np.ndarray
    origin_angst: np.ndarray
    class_number: np.ndarray
    seconds: float


def classify(
    star: Path,
    *,
    classes: int,
    iterations: int,
    diameter_angst: float,
    offset_range_px: int,
    pad: int,
    threads: int,
) -> Classified:
    """Runs relion_refine in the folder of the STAR file, with CTF where the file has it."""
    block = read_star(star).block("particles")
    command = [
        f"relion_refine --o ./run --i {star.name} --dont_combine_weights_via_disc --preread_images",
        f"--pool 30 --pad {pad} --iter {iterations} --tau2_fudge 2 --flatten_solvent --zero_mask",
        f"--particle_diameter {diameter_angst:.0f} --K {classes} --oversampling 1 --psi_step 12",
        f"--offset_range {offset_range_px} --offset_step 2 --norm --scale --j {threads}",
        f"--random_seed 1 {'--ctf' if block.has('rlnDefocusU') else ''}",
    ]
    began = time.perf_counter()
    subprocess.run(" ".join(command).split(), cwd=star.parent, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    found = read_star(star.parent / f"run_it{iterations:03d}_data.star").block("particles")
    row_of = {name: row for row, name in enumerate(block.text("rlnImageName"))}
    order = np.argsort([row_of[name] for name in found.text("rlnImageName")])
    return Classified(
        psi_deg=found.numbers("rlnAnglePsi")[order],
        origin_angst=np.stack([found.numbers(f"rlnOrigin{axis}Angst")[order] for axis in "XY"], 1),
        class_number=found.integers("rlnClassNumber")[order].astype(np.intp),
        seconds=seconds,
    )
