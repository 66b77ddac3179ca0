"""How well a job on simulated particles agrees with their truth.

python -m benchmarks.score JOB/particles.star SIMULATION/truth.star
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.measures import angle_error_deg, circular_correlation, r_z, shift_rms_px
from cryo_svae.formats.star import StarBlock, read_star
from cryo_svae.imaging import geometry


def _block(path: Path) -> StarBlock:
    block = read_star(path).block("particles")
    if block is None:
        raise SystemExit(f"{path} has no block data_particles")
    return block


def _columns(block: StarBlock, prefix: str) -> np.ndarray:
    labels = [
        label for label in block.labels if label.startswith(prefix) and label[len(prefix) :].isdigit()
    ]
    return np.stack([block.numbers(label) for label in labels], 1)


def score(estimates: Path, truth: Path) -> dict[str, float]:
    """Measures of ``benchmarks.measures`` on the particles that are no junk."""
    mine, true = _block(estimates), _block(truth)
    if mine.text("rlnImageName") != true.text("rlnImageName"):
        raise SystemExit(f"{estimates} and {truth} hold other particles, or in another order")
    good = true.integers("svaeIsJunk") == 0
    pixel_size_angst = read_star(truth).block("optics").numbers("rlnImagePixelSize")[0]
    psi, true_psi = (geometry.radians(block.numbers("rlnAnglePsi"))[good] for block in (mine, true))
    origin, true_origin = (
        np.stack([block.numbers(f"rlnOrigin{axis}Angst") for axis in "XY"], 1)[good] / pixel_size_angst
        for block in (mine, true)
    )
    z, conformation = _columns(mine, "svaeZ")[good], _columns(true, "svaeTrueConformation")[good]
    scores = {f"r_z{k + 1}": r_z(z, column) for k, column in enumerate(conformation.T)}
    return scores | {
        "rotation": circular_correlation(psi, true_psi),
        "angle error / deg": angle_error_deg(psi, true_psi),
        "shift rms / px": shift_rms_px(origin, true_origin, psi),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("estimates", type=Path)
    parser.add_argument("truth", type=Path)
    for name, value in score(**vars(parser.parse_args())).items():
        print(f"{name:20s} {value:.3f}")
