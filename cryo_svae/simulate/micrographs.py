"""Particles cut from simulated micrographs, with neighbours, coloured noise, uneven ice and junk.

Particles are placed at random over a micrograph, not nearer to one another than a given distance. They are
multiplied by the contrast of the micrograph, which a gradient in the thickness of the ice changes from one
side to the other, and by its CTF in Fourier space. Ice crystals, a linear background and noise whose power
falls with frequency are added. Boxes are cut at picks, which lie a little off the centres of the particles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cryo_svae.imaging.ctf import CtfTable, ctf_2d
from cryo_svae.imaging.geometry import pixel_grid
from cryo_svae.simulate.chains import chain
from cryo_svae.simulate.molecules import RANDOM, Molecule, load_molecule
from cryo_svae.simulate.particles import (
    SimulateConfig,
    Simulated,
    draw_ctf,
    draw_views,
    lone_particles,
    micrograph_of,
    pixel_size_of,
    project,
)

AREA_EACH = 1.8  # of a particle, in squares of the least distance; strewing by chance jams at 1.44
NOISE_LENGTH_ANGST = 60.0  # beyond which the noise of ice is correlated
ICE_DIAMETERS = (0.6, 2.0)  # of a crystal, in those of the particle
ICE_DEPTH = (2.0, 6.0)  # of a crystal, in standard deviations of the noise
ICE_LUMPS = 7
TRIES = 2000  # to strew another particle before the micrograph is taken for full
JUDGED = 256  # particles whose variance the signal-to-noise ratio is measured on


def simulate(config: SimulateConfig) -> Simulated:
    """Images of the configured molecule in random conformations and poses, alone or from micrographs."""
    if config.molecule in RANDOM:
        molecule = chain(config.molecule, config.molecule_seed)
    else:
        molecule = load_molecule(config.molecule, config.source)
    return (
        cut_from_micrographs(config, molecule) if config.micrographs else lone_particles(config, molecule)
    )


@dataclass(frozen=True)
class _Field:
    """One micrograph's particles, and where boxes are cut.

    centre_px: (p, 2) of every particle, (x, y) from the corner.
    particle:  (k,) which of them each pick holds; -1 for none.
    pick_px:   (k, 2) integer pixels.
    origin_px: (k, 2) pick less true centre.
    ice_px:    (i, 2) centres of crystals.
    """

    side_px: int
    centre_px: Float[Tensor, "p 2"]
    particle: Int[Tensor, "k"]
    pick_px: Int[Tensor, "k 2"]
    origin_px: Float[Tensor, "k 2"]
    ice_px: Float[Tensor, "i 2"]


def cut_from_micrographs(config: SimulateConfig, molecule: Molecule) -> Simulated:
    """Boxes around picks; SNR: the variance of lone particles, without noise, within the molecule's circle
    over that of the noise.

    Picks of ``ice_fraction`` are on crystals and of ``junk_fraction`` on nothing; both are junk.
    """
    n, generator = config.n_particles, torch.Generator().manual_seed(config.seed)
    pixel_size = pixel_size_of(config, molecule)
    radius_px = molecule.radius_angst() / pixel_size
    ctf = draw_ctf(config, pixel_size, generator)
    noise_std = _noise_std(config, molecule, pixel_size, ctf)
    micrograph = torch.tensor(micrograph_of(n, config.n_micrographs))
    kind = torch.rand(n, generator=generator)
    is_ice = kind < config.of_micrographs("ice_fraction")
    is_junk = kind < config.of_micrographs("ice_fraction") + config.junk_fraction
    conformation, view = molecule.draw(n, generator), None
    psi = (2.0 * torch.rand(n, generator=generator) - 1.0) * math.pi
    if molecule.any_view:
        view = draw_views(n, generator)
    images, origin = torch.zeros(n, config.box, config.box), torch.zeros(n, 2)
    contrast, pick = torch.zeros(n), torch.zeros(n, 2)
    micrographs: dict[int, Tensor] = {}
    for m in micrograph.unique().tolist():
        rows = (micrograph == m).nonzero()[:, 0]
        field = _strew(config, 2.0 * radius_px, is_junk[rows], is_ice[rows], generator)
        # particles that are not picked turn, face and bend by chance as well
        n_all = len(field.centre_px)
        all_psi = (2.0 * torch.rand(n_all, generator=generator) - 1.0) * math.pi
        all_conformation = molecule.draw(n_all, generator)
        all_view = draw_views(n_all, generator) if molecule.any_view else None
        holds = field.particle >= 0
        own = field.particle[holds]
        all_psi[own], all_conformation[own] = psi[rows[holds]], conformation[rows[holds]]
        if all_view is not None and view is not None:
            all_view[own] = view[rows[holds]]
        canvas = _paint(molecule, field, all_psi, all_conformation, all_view, pixel_size, radius_px)
        height = math.exp(
            config.of_micrographs("contrast_std") * float(torch.randn((), generator=generator))
        )
        slope = _plane(field.side_px, generator)
        factor = height * (1.0 - config.of_micrographs("thickness_gradient") * slope)
        canvas = canvas * factor
        if ctf is not None:
            spectrum = torch.fft.rfft2(canvas) * ctf_2d(ctf[rows[:1]], field.side_px)[0]
            canvas = torch.fft.irfft2(spectrum, s=canvas.shape)
        canvas += noise_std * config.of_micrographs("thickness_gradient") * slope
        canvas += noise_std * _crystals(field, 2.0 * radius_px, generator)
        excess = config.of_micrographs("noise_excess")
        canvas += noise_std * coloured_noise(field.side_px, pixel_size, excess, generator)
        micrographs[m] = canvas
        images[rows] = _cut(canvas, field.pick_px, config.box)
        x, y = field.pick_px.unbind(1)
        contrast[rows] = torch.where(is_junk[rows], 0.0, factor[y, x])
        origin[rows], pick[rows] = field.origin_px, field.pick_px.float()
    return Simulated(
        images, pixel_size, conformation, psi, origin, view, is_junk, noise_std, ctf,
        is_ice=is_ice, contrast=contrast, pick_px=pick, micrographs=micrographs,
    )  # fmt: skip


def _noise_std(
    config: SimulateConfig, molecule: Molecule, pixel_size_angst: float, ctf: CtfTable | None
) -> float:
    generator = torch.Generator().manual_seed(config.seed + 1)
    n = min(JUDGED, config.n_particles)
    images = project(
        molecule, molecule.draw(n, generator), torch.zeros(n), torch.zeros(n, 2),
        box_px=config.box, pixel_size_angst=pixel_size_angst,
        view_rad=draw_views(n, generator) if molecule.any_view else None,
    )  # fmt: skip
    if ctf is not None:
        rows = torch.linspace(0, config.n_particles - 1, n).long()
        images = torch.fft.irfft2(
            torch.fft.rfft2(images) * ctf_2d(ctf[rows], config.box), s=images.shape[1:]
        )
    inside = pixel_grid(config.box).norm(dim=-1) <= molecule.radius_angst() / pixel_size_angst
    return math.sqrt(float(images[:, inside].var()) / config.snr)


def _strew(
    config: SimulateConfig,
    diameter_px: float,
    is_junk: Bool[Tensor, "k"],
    is_ice: Bool[Tensor, "k"],
    generator: torch.Generator,
) -> _Field:
    """Places, as many inside as there are picks, no nearer to one another than the spacing."""
    least = config.of_micrographs("spacing") * diameter_px
    inner = max(math.sqrt(AREA_EACH * len(is_junk)) * least, config.box)
    margin = config.box / 2 + diameter_px / 2 + 4.0 * config.shift_std_px + 1.0
    side = 2 * math.ceil((inner + 2.0 * margin) / 2)
    inside = None
    while inside is None or inside.sum() < len(is_junk):  # a larger field where this one is full
        side += 0 if inside is None else 2 * math.ceil(0.05 * side)
        found, inside = _scattered(len(is_junk), side, margin, least, generator)
    picked = found[inside]
    missed = torch.randn(len(picked), 2, generator=generator) * config.shift_std_px
    pick = (picked + missed).round().long()
    centres = torch.cat([picked[~is_junk], found[~inside]])
    particle = torch.where(is_junk, -1, (~is_junk).cumsum(0) - 1)
    return _Field(side, centres, particle, pick, pick.float() - picked, picked[is_ice])


def _scattered(
    n_inside: int, side_px: int, margin_px: float, least_px: float, generator: torch.Generator
) -> tuple[Float[Tensor, "p 2"], Bool[Tensor, "p"]]:
    """Random places no nearer than ``least_px``, until so many, or all there is room for, are off the
    margin; and which these are.
    """
    trials = (torch.rand(TRIES * n_inside, 2, generator=generator) * side_px).numpy()
    within = np.all((trials >= margin_px) & (trials < side_px - margin_px), axis=1)
    kept: list[int] = []
    found, n_found = np.empty((0, 2)), 0
    for number, trial in enumerate(trials):
        if n_found == 0 or np.square(found[:n_found] - trial).sum(1).min() >= least_px**2:
            if n_found == len(found):
                found = np.resize(found, (2 * n_found + 16, 2))
            found[n_found] = trial
            n_found += 1
            kept.append(number)
            n_inside -= int(within[number])
            if n_inside == 0:
                break
    return torch.from_numpy(trials[kept]), torch.from_numpy(within[kept])


def _paint(
    molecule: Molecule,
    field: _Field,
    psi_rad: Float[Tensor, "p"],
    conformation: Float[Tensor, "p k"],
    view_rad: Float[Tensor, "p 2"] | None,
    pixel_size_angst: float,
    radius_px: float,
) -> Float[Tensor, "m m"]:
    """All particles of a micrograph, without CTF."""
    window = 2 * math.ceil(radius_px + 6.0)
    corner = field.centre_px.floor()
    images = project(
        molecule, conformation, psi_rad, corner - field.centre_px,
        box_px=window, pixel_size_angst=pixel_size_angst, view_rad=view_rad,
    )  # fmt: skip
    canvas = torch.zeros(field.side_px + 2 * window, field.side_px + 2 * window)
    for image, (x, y) in zip(images, (corner.long() + window // 2).tolist(), strict=True):
        canvas[y : y + window, x : x + window] += image
    return canvas[window:-window, window:-window]


def _plane(side_px: int, generator: torch.Generator) -> Float[Tensor, "m m"]:
    """From about -1 on one side to 1 on the other, in a random direction."""
    azimuth = 2.0 * math.pi * float(torch.rand((), generator=generator))
    direction = torch.tensor([math.cos(azimuth), math.sin(azimuth)])
    return pixel_grid(side_px) @ direction / (side_px / 2)


def _crystals(field: _Field, diameter_px: float, generator: torch.Generator) -> Float[Tensor, "m m"]:
    """Ice crystals: clusters of round lumps, dense as protein is, in standard deviations of the noise."""
    canvas = torch.zeros(field.side_px, field.side_px)
    points = pixel_grid(field.side_px) + field.side_px // 2
    for place in field.ice_px:
        u = torch.rand(2, generator=generator)
        size = diameter_px * (ICE_DIAMETERS[0] + (ICE_DIAMETERS[1] - ICE_DIAMETERS[0]) * float(u[0]))
        depth = ICE_DEPTH[0] + (ICE_DEPTH[1] - ICE_DEPTH[0]) * float(u[1])
        lumps = place + size / 4.0 * torch.randn(ICE_LUMPS, 2, generator=generator)
        blob = torch.zeros_like(canvas)
        for lump in lumps:
            blob += torch.exp(-0.5 * ((points - lump).norm(dim=-1) / (size / 5.0)).square())
        canvas += depth * blob / blob.max()
    return canvas


def coloured_noise(
    side_px: int, pixel_size_angst: float, excess: float, generator: torch.Generator
) -> Float[Tensor, "m m"]:
    """Noise of variance 1 whose power is 1 + excess at frequency 0 for 1 at the highest, Lorentzian."""
    k = torch.fft.fftfreq(side_px)[:, None], torch.fft.rfftfreq(side_px)[None]
    square = (k[0].square() + k[1].square()) * (NOISE_LENGTH_ANGST / pixel_size_angst) ** 2
    spectrum = torch.fft.rfft2(torch.randn(side_px, side_px, generator=generator))
    noise = torch.fft.irfft2(spectrum * (1.0 + excess / (1.0 + square)).sqrt(), s=(side_px, side_px))
    scaled: Tensor = noise / noise.std()
    return scaled


def _cut(canvas: Float[Tensor, "m m"], pick_px: Int[Tensor, "k 2"], box_px: int) -> Float[Tensor, "k n n"]:
    """Boxes whose pixel N//2 is the pick."""
    offset = torch.arange(box_px) - box_px // 2
    x, y = pick_px.unbind(1)
    boxes: Tensor = canvas[(y[:, None] + offset)[:, :, None], (x[:, None] + offset)[:, None, :]]
    return boxes
