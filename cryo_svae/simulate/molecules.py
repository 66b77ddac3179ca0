"""Molecules as Gaussian beads whose positions follow a conformation; Å, in three dimensions.

A molecule is seen along its z axis: x goes along columns and y along rows of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryo_svae.errors import InputError
from cryo_svae.imaging.geometry import radians

RANDOM = ("lump", "random-hinge", "random-twist")  # see chains
MOLECULES = ("hinge", "adk", "hsp90", "hsp90-two-arms", "views", "c2", "ring", "noise", *RANDOM)

ADK_ATOMS_PER_BEAD = 8  # about one residue's heavy atoms
HSP90_RESIDUES_PER_BEAD = 4
HSP90_HINGE_RESIDUE = 600
HSP90_FILES = ("monoA_snip.pdb", "monoB_snip.pdb")


@dataclass(frozen=True)
class Molecule:
    """Beads that move with a conformation of n_motions degrees of freedom.

    motion:     positions in Å (n, beads, 3) of conformations (n, n_motions).
    weights:    scattering of each bead (beads,).
    sigma_angst: standard deviation of a bead's Gaussian.
    prior:      each degree of freedom is drawn from N(0, 1) ("normal") or from U(-1, 1).
    any_view:   seen from uniform directions, and not along z alone.
    """

    motion: Callable[[Float[Tensor, "n k"]], Float[Tensor, "n beads 3"]]
    weights: Float[Tensor, "beads"]
    sigma_angst: float
    n_motions: int
    prior: Literal["normal", "uniform"] = "normal"
    any_view: bool = False

    def draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "n k"]:
        """n conformations drawn from the prior."""
        if self.prior == "normal":
            return torch.randn(n, self.n_motions, generator=generator)
        return 2.0 * torch.rand(n, self.n_motions, generator=generator) - 1.0

    def positions(self, conformation: Float[Tensor, "n k"]) -> Float[Tensor, "n beads 3"]:
        """Bead positions in Å at pose zero: the motion without its own shift and in-plane turn.

        Each conformation has its centre of mass at the origin and is turned about z onto
        conformation zero (least squares), so that what remains is change of shape alone and the
        true psi does not depend on who holds the molecule.
        """
        return self._turned_onto_rest(self._centred(conformation))

    def _centred(self, conformation: Float[Tensor, "n k"]) -> Float[Tensor, "n beads 3"]:
        moved = self.motion(conformation)
        share = self.weights / self.weights.sum()
        return moved - torch.einsum("b,nbd->nd", share, moved)[:, None]

    def _turned_onto_rest(self, centred: Float[Tensor, "n beads 3"]) -> Float[Tensor, "n beads 3"]:
        rest = self._centred(torch.zeros(1, self.n_motions))[0, :, :2] * self.weights[:, None]
        cross = torch.einsum("nb,b->n", centred[..., 0], rest[:, 1]) - torch.einsum(
            "nb,b->n", centred[..., 1], rest[:, 0]
        )
        dot = torch.einsum("nbd,bd->n", centred[..., :2], rest)
        return turn_about_z(centred, torch.atan2(cross, dot))

    def radius_angst(self) -> float:
        """Distance of the farthest bead from the z axis (from the centre, for any view)."""
        spread = 1.5 if self.prior == "normal" else 1.0
        ends = torch.stack([torch.full((self.n_motions,), end) for end in (-spread, 0.0, spread)])
        seen = self.positions(ends)[..., : 3 if self.any_view else 2]
        return float(seen.norm(dim=-1).max()) + self.sigma_angst


def turn_about_z(points: Float[Tensor, "n p 3"], angle_rad: Float[Tensor, "n"]) -> Float[Tensor, "n p 3"]:
    """Points turned about the z axis, from x towards y."""
    cos, sin = torch.cos(angle_rad)[:, None], torch.sin(angle_rad)[:, None]
    x, y, z = points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def ball(centre: tuple[float, float, float], radius: float, n_beads: int) -> Float[Tensor, "p 3"]:
    """n_beads evenly filling a ball: a golden spiral whose radius grows with the cube root."""
    index = torch.arange(n_beads) + 0.5
    height = 1.0 - 2.0 * index / n_beads
    azimuth = index * math.pi * (1.0 + math.sqrt(5.0))
    # The spiral runs from pole to pole; taking the shells in another order fills the ball.
    shell = ((index * 0.618034) % 1.0) ** (1.0 / 3.0) * radius
    ring = torch.sqrt(1.0 - height**2)
    unit = torch.stack([ring * torch.cos(azimuth), ring * torch.sin(azimuth), height], -1)
    return unit * shell[:, None] + torch.tensor(centre)


def hinge() -> Molecule:
    """Two unlike arms on a hub, opening by 105° + 22° c; the built-in example."""
    hub = ball((0.0, 0.0, 0.0), 17.0, 32)
    long_arm = torch.cat([ball((26.0, 0.0, 0.0), 15.0, 24), ball((54.0, 8.0, 9.0), 24.0, 72)])
    short_arm = torch.cat([ball((22.0, 0.0, 0.0), 12.0, 16), ball((42.0, 5.0, -8.0), 17.0, 34)])

    def motion(conformation: Float[Tensor, "n 1"]) -> Float[Tensor, "n beads 3"]:
        half = radians(105.0 + 22.0 * conformation[:, 0]) / 2
        n = len(conformation)
        parts = [
            hub.expand(n, -1, -1),
            turn_about_z(long_arm.expand(n, -1, -1), half),
            turn_about_z(short_arm.expand(n, -1, -1), -half),
        ]
        return torch.cat(parts, dim=1)

    return Molecule(motion, torch.ones(len(hub) + len(long_arm) + len(short_arm)), 4.0, 1)


def c2() -> Molecule:
    """Two equal arms, 180° apart, bending at the elbow by 25° c: psi is determined up to 180°."""
    inner = ball((18.0, 0.0, 0.0), 18.0, 40)
    outer = ball((24.0, 12.0, 0.0), 16.0, 30)

    def motion(conformation: Float[Tensor, "n 1"]) -> Float[Tensor, "n beads 3"]:
        n = len(conformation)
        bent = turn_about_z(outer.expand(n, -1, -1), radians(25.0 * conformation[:, 0]))
        arm = torch.cat([inner.expand(n, -1, -1), bent + torch.tensor([24.0, 0.0, 0.0])], dim=1)
        return torch.cat([arm, turn_about_z(arm, torch.full((n,), math.pi))], dim=1)

    return Molecule(motion, torch.ones(2 * (len(inner) + len(outer))), 4.0, 1)


def ring() -> Molecule:
    """A ring whose radius changes by 8 % c: psi cannot be determined."""
    azimuth = torch.arange(48) * (2.0 * math.pi / 48)
    circle = torch.stack([torch.cos(azimuth), torch.sin(azimuth), torch.zeros(48)], -1)

    def motion(conformation: Float[Tensor, "n 1"]) -> Float[Tensor, "n beads 3"]:
        return circle * (40.0 * (1.0 + 0.08 * conformation[:, :, None]))

    return Molecule(motion, torch.ones(48), 5.0, 1)


def still(
    positions: Float[Tensor, "beads 3"], weights: Float[Tensor, "beads"], sigma_angst: float
) -> Molecule:
    """A rigid molecule, to be seen from all sides."""

    def motion(conformation: Float[Tensor, "n 0"]) -> Float[Tensor, "n beads 3"]:
        return positions.expand(len(conformation), -1, -1)

    return Molecule(motion, weights, sigma_angst, 0, any_view=True)


def noise() -> Molecule:
    """No molecule at all."""
    return Molecule(lambda conformation: torch.zeros(len(conformation), 1, 3), torch.zeros(1), 50.0, 0)


def adk(source: Path) -> Molecule:
    """Adenylate kinase, closed (c = -1) to open (c = 1), seen where its motion is in plane.

    source: an .npz with positions_angst (frames, atoms, 3) and mass (atoms,).
    """
    try:
        with np.load(source, allow_pickle=False) as file:
            frames = torch.from_numpy(file["positions_angst"]).float()
            mass = torch.from_numpy(file["mass"]).float()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            source,
            found=str(error),
            expected="an .npz file with arrays positions_angst (frames, atoms, 3) and mass (atoms,)",
            remedy="give the trajectory of adenylate kinase with --source",
        ) from error
    beads, weights = _coarse(frames, mass, ADK_ATOMS_PER_BEAD)
    beads = beads @ _view_of_motion(beads[-1] - beads[0]).mT

    def motion(conformation: Float[Tensor, "n 1"]) -> Float[Tensor, "n beads 3"]:
        place = (conformation[:, 0].clamp(-1.0, 1.0) + 1.0) / 2.0 * (len(beads) - 1)
        before = place.floor().long().clamp(max=len(beads) - 2)
        return torch.lerp(beads[before], beads[before + 1], (place - before)[:, None, None])

    return Molecule(motion, weights, 2.0, 1, prior="uniform")


def _coarse(
    frames: Float[Tensor, "f atoms 3"], mass: Float[Tensor, "atoms"], atoms_per_bead: int
) -> tuple[Float[Tensor, "f beads 3"], Float[Tensor, "beads"]]:
    """Centres of mass and relative masses of runs of consecutive atoms."""
    bead = torch.arange(len(mass)) // atoms_per_bead
    n_beads = int(bead[-1]) + 1
    weights = torch.zeros(n_beads).index_add_(0, bead, mass)
    sums = torch.zeros(len(frames), n_beads, 3).index_add_(1, bead, frames * mass[:, None])
    return sums / weights[:, None], weights / atoms_per_bead


def _view_of_motion(displacement: Float[Tensor, "beads 3"]) -> Float[Tensor, "3 3"]:
    """The rotation whose z axis is the direction in which beads move least."""
    axes = torch.linalg.eigh(displacement.mT @ displacement).eigenvectors
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    z, x = axes[:, 0], axes[:, 2]
    return torch.stack([x, torch.linalg.cross(z, x), z])


def hsp90(source: Path, *, two_arms: bool) -> Molecule:
    """The Hsp90 dimer, each arm turned about its residue 600 by 25° + 10° c, seen along the hinge.

    Arms are the residues before 600 of each chain; a bead is four consecutive C-alphas. c moves
    both arms, or (two_arms) c1 the arm of the first chain and c2 that of the second.
    source: the folder with monoA_snip.pdb and monoB_snip.pdb, the chains of PDB 2CG9.
    """
    first, second = (_c_alphas(source / name) for name in HSP90_FILES)
    arms: list[Tensor] = []
    feet: list[Tensor] = []
    weights, pivots = [], []
    for residues, points in _hinge_view([first, second]):
        in_arm = residues < HSP90_HINGE_RESIDUE
        # The loop about the hinge is disordered: its nearest residue stands in for it.
        pivots.append(points[(residues - HSP90_HINGE_RESIDUE).abs().argmin()])
        for part, beads in ((in_arm, arms), (~in_arm, feet)):
            ones = torch.ones(int(part.sum()))
            positions, weight = _coarse(points[part][None], ones, HSP90_RESIDUES_PER_BEAD)
            beads.append(positions[0])
            weights.append(weight)

    def motion(conformation: Float[Tensor, "n k"]) -> Float[Tensor, "n beads 3"]:
        n, parts = len(conformation), []
        for i, sense in enumerate((1.0, -1.0)):
            angle = radians(25.0 + 10.0 * conformation[:, i if two_arms else 0]) * sense
            opened = turn_about_z((arms[i] - pivots[i]).expand(n, -1, -1), angle) + pivots[i]
            parts += [opened, feet[i].expand(n, -1, -1)]
        return torch.cat(parts, dim=1)

    return Molecule(motion, torch.cat(weights), 5.0, 2 if two_arms else 1)


def _c_alphas(path: Path) -> tuple[Float[Tensor, "p"], Float[Tensor, "p 3"]]:
    """Residue numbers and C-alpha positions in Å of a PDB file."""
    if not path.is_file():
        raise InputError(
            path,
            found="no such file",
            expected=f"the two Hsp90 chains {' and '.join(HSP90_FILES)}",
            remedy="give the folder that holds them with --source",
        )
    lines = [
        line
        for line in path.read_text().splitlines()
        if line.startswith("ATOM") and line[12:16].strip() == "CA"
    ]
    residues = torch.tensor([float(line[22:26]) for line in lines])
    points = [[float(line[start : start + 8]) for start in (30, 38, 46)] for line in lines]
    return residues, torch.tensor(points)


def _hinge_view(
    chains: list[tuple[Float[Tensor, "_"], Float[Tensor, "_ 3"]]],
) -> list[tuple[Float[Tensor, "_"], Float[Tensor, "_ 3"]]]:
    """Chains turned so that the arms point along +y, the first towards -x, the hinge axis along z."""
    arms = [points[residues < HSP90_HINGE_RESIDUE].mean(0) for residues, points in chains]
    feet = [points[residues >= HSP90_HINGE_RESIDUE].mean(0) for residues, points in chains]
    y = torch.nn.functional.normalize(arms[0] + arms[1] - feet[0] - feet[1], dim=0)
    across = arms[1] - arms[0]
    x = torch.nn.functional.normalize(across - (across @ y) * y, dim=0)
    view = torch.stack([x, y, torch.linalg.cross(x, y)])
    return [(residues, points @ view.mT) for residues, points in chains]


def _views(source: Path | None) -> Molecule:
    """A rigid molecule from a folder (Hsp90), an .npz file (open kinase) or the built-in hinge."""
    if source is None:
        return _views_of(hinge())
    return _views_of(hsp90(source, two_arms=False) if source.is_dir() else adk(source))


def _views_of(base: Molecule) -> Molecule:
    """One open shape of a molecule, held still."""
    shape = base.positions(torch.ones(1, 1))[0]
    return still(shape, base.weights, base.sigma_angst)


def load_molecule(name: str, source: Path | None = None) -> Molecule:
    """The molecule of this name (see MOLECULES); adk and hsp90 read their atoms from source.

    Errors: InputError for a missing, superfluous or unreadable source.
    """
    built_in = {"hinge": hinge, "c2": c2, "ring": ring, "noise": noise}
    if name in built_in:
        return built_in[name]()
    if name == "views":
        return _views(source)
    if source is None:
        raise InputError(
            "--source",
            found=f"no source for molecule {name}",
            expected="the file or folder with its atoms (no structure is bundled)",
            remedy="give --source, or use --molecule hinge, which needs none",
        )
    return adk(source) if name == "adk" else hsp90(source, two_arms=name == "hsp90-two-arms")
