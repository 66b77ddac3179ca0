"""The best any method can do: posterior means under the true molecule, noise and priors.

The sum over conformations, angles and shifts is exact on a grid. With T a template and s² the
noise variance, the log posterior is (<I, T> - |T|²/2) / s² + log prior; templates are expressed in
their principal components, so that one matrix product scores an image against the whole grid, and
shifts move the components instead of the images. A CTF multiplies the image in <I, T>, and |T|²
follows from the power spectra.

    python -m benchmarks.bayes_limit --molecule adk --source adk_closed_to_open.npz
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.measures import angle_error_deg, circular_correlation, r_z, shift_rms_px
from cryo_svae.imaging.ctf import ctf_2d, rfft_frequencies
from cryo_svae.simulate import Molecule, SimulateConfig, Simulated, load_molecule, project, simulate

UNEXPLAINED = 1e-4  # part of the templates' energy outside their principal components
NORMAL_REACH = 3.2  # a normal prior is cut at this many standard deviations
SHIFT_REACH = 3.0
BATCH_ELEMENTS = 2**25  # scores held at a time: 128 MB


@dataclass(frozen=True)
class Grid:
    """Points of the sum, and the log prior of each.

    conformation, psi_rad: of each template (k, d) and (k,).
    origin_px:             shifts (s, 2), combined with every template.
    """

    conformation: Float[Tensor, "k d"]
    psi_rad: Float[Tensor, "k"]
    log_prior: Float[Tensor, "k"]
    origin_px: Float[Tensor, "s 2"]
    origin_log_prior: Float[Tensor, "s"]


@dataclass(frozen=True)
class PosteriorMean:
    """Posterior means of n images; psi_rad is the circular mean."""

    conformation: Float[Tensor, "n d"]
    psi_rad: Float[Tensor, "n"]
    origin_px: Float[Tensor, "n 2"]


def make_grid(
    molecule: Molecule,
    shift_std_px: float,
    *,
    n_conformations: int = 24,
    n_angles: int = 120,
    shift_step_px: float = 0.6,
) -> Grid:
    """Even grids over the priors; n_conformations points for each degree of freedom.

    A step must not exceed about 1.5 standard deviations of a particle's posterior. The defaults
    serve SNR 0.1 and below at 40 px: halving every step moves r_z by less than 0.0005.
    """
    if molecule.prior == "normal":
        axis = torch.linspace(-NORMAL_REACH, NORMAL_REACH, n_conformations)
        log_density = -0.5 * axis**2
    else:
        axis = (torch.arange(n_conformations) + 0.5) * (2.0 / n_conformations) - 1.0
        log_density = torch.zeros(n_conformations)
    d = molecule.n_motions
    conformation = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    log_prior = torch.cartesian_prod(*[log_density] * d).reshape(-1, d).sum(1)
    angles = torch.arange(n_angles) * (2.0 * math.pi / n_angles)
    origin = torch.zeros(1, 2)
    if shift_std_px > 0:
        reach = SHIFT_REACH * shift_std_px
        steps = torch.arange(-(reach // shift_step_px), reach // shift_step_px + 1) * shift_step_px
        square = torch.cartesian_prod(steps, steps)
        origin = square[square.norm(dim=1) <= reach]
    return Grid(
        conformation.repeat_interleave(n_angles, 0),
        angles.repeat(len(conformation)),
        log_prior.repeat_interleave(n_angles),
        origin,
        -0.5 * (origin**2).sum(1) / max(shift_std_px, 1e-6) ** 2,
    )


def principal_components(
    templates: Float[Tensor, "k p"],
) -> tuple[Float[Tensor, "k r"], Float[Tensor, "r p"]]:
    """Coefficients and orthonormal components that hold all but UNEXPLAINED of the energy."""
    energy, vectors = torch.linalg.eigh((templates.mT @ templates).double())
    n_left_out = int((energy.clamp(min=0).cumsum(0) < UNEXPLAINED * energy.sum()).sum())
    components = vectors[:, n_left_out:].mT.float()
    return templates @ components.mT, components


def shifted(images: Float[Tensor, "r n n"], origin_px: Float[Tensor, "s 2"]) -> Float[Tensor, "s r n n"]:
    """Images with each origin: content moves by -o, round the edges of the box."""
    phase = torch.exp(2j * math.pi * (rfft_frequencies(images.shape[-1]) @ origin_px.mT)).permute(2, 0, 1)
    return torch.fft.irfft2(torch.fft.rfft2(images) * phase[:, None], s=images.shape[-2:])


def power(templates: Float[Tensor, "k n n"]) -> Float[Tensor, "k q"]:
    """Contributions of the frequencies of rfft2 to |T|²: they sum to it."""
    box = templates.shape[-1]
    twice = torch.full((box // 2 + 1,), 2.0)
    twice[0] = twice[-1] = 1.0
    return (torch.fft.rfft2(templates).abs() ** 2 * twice / box**2).flatten(1)


def posterior_mean(
    simulated: Simulated, molecule: Molecule, shift_std_px: float, grid: Grid | None = None
) -> PosteriorMean:
    """Posterior means of conformation, psi and origin of simulated images seen along z."""
    grid = make_grid(molecule, shift_std_px) if grid is None else grid
    box, variance = simulated.images.shape[-1], simulated.noise_std**2
    templates = project(
        molecule, grid.conformation, grid.psi_rad, torch.zeros(len(grid.psi_rad), 2),
        box_px=box, pixel_size_angst=simulated.pixel_size_angst,
    )  # fmt: skip
    coefficients, components = principal_components(templates.flatten(1))
    moved = shifted(components.reshape(-1, box, box), grid.origin_px).flatten(2)
    spectra = power(templates) if simulated.ctf is not None else None
    half_norm = 0.5 * templates.flatten(1).square().sum(1)
    turn = torch.stack([torch.cos(grid.psi_rad), torch.sin(grid.psi_rad)], 1)
    table = torch.cat([grid.conformation, turn], 1)
    batch = max(1, BATCH_ELEMENTS // (len(grid.psi_rad) * len(grid.origin_px)))
    rows = []
    for start in range(0, len(simulated.images), batch):
        part = slice(start, start + batch)
        images = simulated.images[part]
        if simulated.ctf is not None and spectra is not None:
            ctf = ctf_2d(simulated.ctf[part], box)
            images = torch.fft.irfft2(torch.fft.rfft2(images) * ctf, s=images.shape[1:])
            half_norm = 0.5 * (ctf**2).flatten(1) @ spectra.mT
        seen = torch.einsum("bp,srp->bsr", images.flatten(1), moved)
        scores = (seen @ coefficients.mT).sub_(half_norm.unsqueeze(-2)).div_(variance)
        scores += grid.log_prior + grid.origin_log_prior[:, None]
        chance = torch.softmax(scores.flatten(1), 1).reshape(scores.shape)
        rows.append(torch.cat([chance.sum(1) @ table, chance.sum(2) @ grid.origin_px], 1))
    means = torch.cat(rows)
    d = molecule.n_motions
    return PosteriorMean(means[:, :d], torch.atan2(means[:, d + 1], means[:, d]), means[:, d + 2 :])


def main() -> None:
    """Prints the limit for one molecule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--molecule", default="hinge")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--n-particles", type=int, default=4000)
    parser.add_argument("--box", type=int, default=40)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--shift-std-px", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    config = SimulateConfig(**vars(parser.parse_args()))
    simulated = simulate(config)
    began = time.perf_counter()
    mean = posterior_mean(simulated, load_molecule(config.molecule, config.source), config.shift_std_px)
    seconds = time.perf_counter() - began
    psi, true_psi = mean.psi_rad.double().numpy(), simulated.psi_rad.double().numpy()
    rows = [
        f"r_z {r_z(z.double().numpy(), truth.double().numpy()):.3f}"
        for z, truth in zip(mean.conformation.T, simulated.conformation.T, strict=True)
    ]
    rows.append(f"rotation {circular_correlation(psi, true_psi):.3f}")
    rows.append(f"angle {angle_error_deg(psi, true_psi):.2f}°")
    origin = mean.origin_px.double().numpy()
    rows.append(f"shift {shift_rms_px(origin, simulated.origin_px.double().numpy(), psi):.2f} px")
    print(f"{config.molecule}, SNR {config.snr}, shifts {config.shift_std_px} px:", ", ".join(rows))
    print(f"{seconds:.0f} s for {config.n_particles} images")


if __name__ == "__main__":
    main()
