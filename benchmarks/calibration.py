"""Do the standard deviations mean what they say? Coverage of 68 % and 95 % intervals on simulations.

    python -m benchmarks.calibration [--source ../shared/data/motion] [--n-particles 8000] [SET ...]

Two questions of each trained model, and they are kept apart.

* *own*: images drawn from the trained model itself (z from its prior, psi uniform, origins from its
  prior, white noise). Here the truth of z is known without any choice, and the model is right: what is
  off is the inference's fault.
* *true*: the simulated molecule. z is known up to a smooth change of variable, and psi and origin up to
  a frame that may turn and move with the conformation. Both are read off without any noisy estimate:
  the noiseless image of each of some conformations is laid on the generator's images, and the z, psi and
  origin where it fits best are what the model calls this conformation and pose. (A regression of the
  true conformation on the estimates would take its scale from the very errors that are judged.) What is
  off here beyond *own* is the fault of the model: a generator learned from noisy images, and a prior of z.

Intervals are mean ± 1 and ± 1.96 standard deviations; ``ratio`` is rms error over rms standard deviation,
1 when right and above 1 when the deviations are too small.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from benchmarks import trials
from benchmarks.hinge import Setting, first, simulate_set, source_of
from cryo_svae.imaging.geometry import degrees, pixel_grid, pose_references, rotation_matrix, wrap_radians
from cryo_svae.models.coordinate import CoordinateEngine
from cryo_svae.models.engine import Batch, Engine, Posterior
from cryo_svae.models.steerable import SteerableEngine
from cryo_svae.simulate import Molecule, Simulated, load_molecule, project

SETS = {
    "hinge": Setting("hinge", 0.1, 0.0, False, 1),
    "hinge-dim": Setting("hinge", 0.03, 0.0, False, 1),
    "hinge-shifts": Setting("hinge", 0.1, 1.5, False, 1),
    "hinge-ctf-shifts": Setting("hinge", 0.1, 1.5, True, 1),
    "adk": Setting("adk", 0.1, 0.0, False, 1),
    "adk-dim": Setting("adk", 0.03, 0.0, False, 1),
    "adk-shifts": Setting("adk", 0.1, 1.5, False, 1),
    "adk-ctf-shifts": Setting("adk", 0.1, 1.5, True, 1),
}
# The coordinate engine, for a processor: fewer units than the paper's 500, and the surer search of poses.
REDUCED = {
    "hidden": 64,
    "encoder_hidden": 256,
    "pose_candidates": 4,
    "batch_size": 25,
    "learning_rate": 1e-3,
}
JUDGED = 2000
CONFORMATIONS = 25  # laid on the generator's images
Z_REACH, Z_STEP, N_PSI = 4.0, 0.1, 180  # of the search for where they fit best
HALF_WIDTH_95 = 1.96
ONE_MODE = 0.01  # of psi's probability that a second mode holds, below which there is none


@dataclass(frozen=True)
class Truth:
    """What a perfect estimate would say, in the model's own frame: z (n,), psi (n,), origin (n, 2)."""

    z: Tensor
    psi_rad: Tensor
    origin_px: Tensor


@dataclass(frozen=True)
class Coverage:
    """How often intervals hold the truth, and rms error over rms standard deviation."""

    within_68: float
    within_95: float
    ratio: float
    median_std: float


def coverage(error: Tensor, std: Tensor) -> Coverage:
    """Of errors and standard deviations of one shape."""
    off = error.abs() / std
    ratio = error.square().mean().sqrt() / std.square().mean().sqrt()
    inside = [float((off <= k).float().mean()) for k in (1.0, HALF_WIDTH_95)]
    return Coverage(inside[0], inside[1], float(ratio), float(std.median()))


def coverages(found: Posterior, truth: Truth, shifts: bool) -> dict[str, Coverage]:
    """Of z (one latent), of psi, and of each component of the origin.

    The deviation of psi is that of its main mode: it is judged on all images, and on those where no
    second mode holds 1 %.
    """
    turned, one_mode = wrap_radians(found.psi_rad - truth.psi_rad), found.second_mode < ONE_MODE
    rows = {
        "z": coverage(found.z_mean[:, 0] - truth.z, found.z_std[:, 0]),
        "psi": coverage(turned, found.psi_std_rad),
        "psi, one mode": coverage(turned[one_mode], found.psi_std_rad[one_mode]),
    }
    if shifts:
        error = found.origin_px - truth.origin_px
        rows["origin"] = coverage(error, found.origin_std_px[:, None].expand_as(error))
    return rows


# -- the model's own images ------------------------------------------------------------------


def drawn_from(engine: Engine, n: int, seed: int, noise_std: float) -> tuple[Tensor, Truth]:
    """Images (n, box, box) of the engine's own generative model without CTF, and their truth."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(n, engine.z_dim, generator=random)
    psi = 2.0 * math.pi * torch.rand(n, generator=random) - math.pi
    origin = torch.randn(n, 2, generator=random) * origin_std_px(engine)
    with torch.no_grad():
        images = posed(engine, z, psi, origin)
    noise = torch.randn(images.shape, generator=random)
    return images + noise_std * noise, Truth(z[:, 0], psi, origin)


def origin_std_px(engine: Engine) -> float:
    """Standard deviation of each component of the origin under the engine's prior; 0 where fixed."""
    if isinstance(engine, SteerableEngine):
        return float(engine.shift_variance.sqrt()) if engine.shifts else 0.0
    return engine.config.shift_std_px if engine.config.translate else 0.0


def posed(engine: Engine, z: Tensor, psi_rad: Tensor, origin_px: Tensor) -> Tensor:
    """The generator's images in poses, without interpolation where the engine can do so."""
    if isinstance(engine, CoordinateEngine):
        mean, _ = engine.pixels.split(engine.generate(z, psi_rad, origin_px))
        return engine._image(mean)[:, 0]
    if not isinstance(engine, SteerableEngine):
        return pose_references(engine.decode(z), psi_rad, origin_px)
    polar = engine.polar
    phase = torch.exp(1j * psi_rad[:, None] * polar.order)
    real, imag = engine.generator(z).unbind(1)
    turned = torch.complex(real, imag) * phase
    samples = polar.shift(polar.samples(torch.stack([turned.real, turned.imag], 1)), -origin_px)
    return engine.image_of(polar.pack(polar.spectra(samples)))


# -- the molecule's images -------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where a trained model keeps each conformation: z (k,), psi (k,), origin (k, 2) of a fit.

    The reference of the model at z is the molecule's image in pose (psi, origin).
    """

    conformation: Tensor
    z: Tensor
    psi_rad: Tensor
    origin_px: Tensor
    misfit: float

    def truth(self, simulated: Simulated) -> Truth:
        """The simulation's truth in the model's frame, interpolated between conformations."""
        at = simulated.conformation[:, 0].double().numpy()

        def interpolated(values: Tensor) -> Tensor:
            knots = self.conformation.double().numpy()
            return torch.from_numpy(np.interp(at, knots, values.double().numpy())).float()

        psi = simulated.psi_rad - interpolated(self.psi_rad)
        moved = torch.stack([interpolated(column) for column in self.origin_px.T], 1)
        back = (rotation_matrix(-psi) @ moved[..., None])[..., 0]
        return Truth(interpolated(self.z), wrap_radians(psi), simulated.origin_px - back)


def frame_of(engine: Engine, molecule: Molecule, simulated: Simulated) -> Frame:
    """Lays noiseless images of conformations on the generator's, by least squares.

    Grey levels are those of the preparation: noise of standard deviation 1. The level of a disc is
    free, since the engine takes it for none of the content.
    """
    box, scale = engine.box_px, 1.0 / simulated.noise_std
    mask, level = disc_of(engine)
    reach = 2.2 if molecule.prior == "normal" else 1.0
    grid = torch.linspace(-reach, reach, CONFORMATIONS)[:, None]

    def seen(conformation: Tensor, psi: Tensor, origin: Tensor) -> Tensor:
        images = project(
            molecule, conformation, psi, origin, box_px=box, pixel_size_angst=simulated.pixel_size_angst
        )
        return levelled((images * scale * mask).flatten(1), level)

    def made(z: Tensor) -> Tensor:
        with torch.no_grad():
            return levelled(engine.decode(z).flatten(1), level)

    z = torch.arange(-Z_REACH, Z_REACH + Z_STEP / 2, Z_STEP)[:, None]
    psi = 2.0 * math.pi / N_PSI * torch.arange(N_PSI)
    contents = made(z)
    rows, misfit = [], []
    for c in grid:
        turned = seen(c.expand(N_PSI, 1), psi, torch.zeros(N_PSI, 2))
        apart = turned.square().sum(1)[:, None] - 2.0 * turned @ contents.T + contents.square().sum(1)
        best_psi, best_z = divmod(int(apart.argmin()), len(z))

        def residual(p: np.ndarray, c: Tensor = c) -> np.ndarray:
            at = torch.from_numpy(p).float()
            left = seen(c[None], at[1:2], at[None, 2:]) - made(at[None, :1])
            return left[0].double().numpy()

        start = np.array([float(z[best_z, 0]), float(psi[best_psi]), 0.0, 0.0])
        fit = least_squares(residual, start, diff_step=1e-3, x_scale=[0.3, 0.1, 0.5, 0.5])
        rows.append(fit.x)
        energy = float(seen(c[None], torch.zeros(1), torch.zeros(1, 2)).square().sum())
        misfit.append(2.0 * fit.cost / energy)
    table = torch.from_numpy(np.array(rows)).float()
    unwrapped = torch.from_numpy(np.unwrap(table[:, 1].numpy())).float()
    return Frame(grid[:, 0], table[:, 0], unwrapped, table[:, 2:], float(np.mean(misfit)))


def disc_of(engine: Engine) -> tuple[Tensor, Tensor]:
    """The mask of an engine's images, and the unit image of a disc's level."""
    if isinstance(engine, SteerableEngine):
        mask = engine.full.mask
        level = engine.full.image(engine.full(torch.ones(1, engine.box_px, engine.box_px)))[0]
        return mask, level / level.norm()
    mask = (pixel_grid(engine.box_px).norm(dim=-1) <= engine.config.mask_radius_px).float()
    return mask, torch.zeros_like(mask)


def levelled(images: Tensor, level: Tensor) -> Tensor:
    """Images (n, p) without their part along the level."""
    unit = level.flatten()
    return images - (images @ unit)[:, None] * unit


def one_turn(found: Posterior, simulated: Simulated) -> Coverage:
    """Coverage of psi after one global turn is taken off, whatever the conformation."""
    error = found.psi_rad - simulated.psi_rad
    offset = torch.exp(1j * error).mean().angle()
    return coverage(wrap_radians(error - offset), found.psi_std_rad)


# -- the table -------------------------------------------------------------------------------


def rows_of(name: str, engine_name: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """Trains one engine on one set, and judges it."""
    setting = SETS[name]
    simulated = simulate_set(setting, arguments.n_particles, seed, arguments.source)
    shifts = setting.shift_std_px > 0
    changes: dict[str, Any] = {"max_shift_px": 3.0 * setting.shift_std_px}
    if engine_name == "coordinate":
        changes = {"translate": shifts, **REDUCED}
    trial = trials.run_trial(
        simulated, engine_name, setting.z_dim, seed, epochs=arguments.epochs, judged=JUDGED, **changes
    )
    engine = trial.checkpoint.engine
    judged = first(simulated, JUDGED)
    images, own_truth = drawn_from(engine, JUDGED, seed, 1.0)
    kept = engine.represent(images)
    with torch.no_grad():
        own = Posterior.cat(
            [engine.infer(Batch(rows, kept[rows], None)) for rows in torch.arange(JUDGED).split(256)]
        )
    frame = frame_of(
        engine, load_molecule(setting.molecule, source_of(setting.molecule, arguments.source)), simulated
    )
    score = trials.scores(trial.posterior, simulated, torch.arange(JUDGED))
    truth = frame.truth(judged)
    rows = [
        f"{name}, {engine_name}, seed {seed}: {trial.seconds:.0f} s of training, r_z {score['r_z1']:.3f}, "
        f"rotation {score['rotation']:.3f}; generator off by {100 * frame.misfit:.1f} % of the energy, "
        f"its frame turns by {degrees(float(np.ptp(frame.psi_rad.numpy()))):.1f}° with the conformation, "
        f"true z have mean {float(truth.z.mean()):+.2f} and sd {float(truth.z.std()):.2f}; "
        f"{100 * float((trial.posterior.second_mode < ONE_MODE).float().mean()):.0f} % have one mode of psi"
    ]
    rows += [_row("own", key, row) for key, row in coverages(own, own_truth, shifts).items()]
    rows += [_row("true", key, row) for key, row in coverages(trial.posterior, truth, shifts).items()]
    rows.append(_row("true", "psi, one turn", one_turn(trial.posterior, judged)))
    return rows


def _row(truth: str, what: str, row: Coverage) -> str:
    return (
        f"  {truth:5s} {what:14s} {100 * row.within_68:6.1f} {100 * row.within_95:6.1f} "
        f"{row.ratio:7.2f} {row.median_std:11.3f}"
    )


def main() -> None:
    """Prints the rows of a set as it is done, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["hinge", "hinge-dim", "hinge-shifts"])
    parser.add_argument("--source", type=Path)
    parser.add_argument("--n-particles", type=int, default=8000)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--engine", choices=["steerable", "coordinate"], default="steerable")
    arguments = parser.parse_args()
    lines = [
        f"{arguments.n_particles} images, 40 px, {JUDGED} judged; nominal 68.3 % and 95.0 %",
        f"  {'truth':5s} {'of':14s} {'68 %':>6s} {'95 %':>6s} {'ratio':>7s} {'median std':>11s}",
    ]
    print("\n".join(lines))
    for name in arguments.sets:
        for seed in range(arguments.seeds):
            rows = rows_of(name, arguments.engine, seed, arguments)
            print("\n".join(rows), flush=True)
            lines += rows
    trials.report("calibration", lines)


if __name__ == "__main__":
    main()
