"""Random molecules, made of chains of round domains, so that measurements need not rest on one shape.

Each seed gives another molecule. Every domain touches the one before it, like beads on a string that folds
back at random. The sizes of the domains differ, so that the two ends are never alike.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cryo_svae.imaging.geometry import radians
from cryo_svae.simulate.molecules import Molecule, ball, still, turn_about_z

MASS_KDA = 150.0
VOLUME_ANGST3_PER_KDA = 1210.0  # of protein
BEAD_ANGST3 = 700.0
SIGMA_ANGST = 4.0
OVERLAP = 0.85  # distance of consecutive domains, in units of the sum of their radii
HINGE_DEG = (14.0, 22.0)  # per standard deviation of the conformation
TWIST_DEG = (25.0, 40.0)


def _domains(n_domains: int, generator: torch.Generator) -> tuple[Float[Tensor, "d 3"], Float[Tensor, "d"]]:
    """Centres and radii in Å of touching balls that hold a protein of ``MASS_KDA``."""
    radius = 0.6 + 0.8 * torch.rand(n_domains, generator=generator)
    radius *= (MASS_KDA * VOLUME_ANGST3_PER_KDA / (4.0 / 3.0 * math.pi * radius.pow(3).sum())) ** (
        1.0 / 3.0
    )
    centres = torch.zeros(1, 3)
    while len(centres) < n_domains:
        k = len(centres)
        step = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
        trial = centres[-1] + step * OVERLAP * (radius[k - 1] + radius[k])
        apart = (trial - centres[:-1]).norm(dim=1) > 0.9 * OVERLAP * (radius[: k - 1] + radius[k])
        if bool(apart.all()):
            centres = torch.cat([centres, trial[None]])
    return centres, radius


def _beads(centre: Float[Tensor, "3"], radius_angst: float) -> Float[Tensor, "p 3"]:
    n_beads = max(8, round(4.0 / 3.0 * math.pi * radius_angst**3 / BEAD_ANGST3))
    return ball((float(centre[0]), float(centre[1]), float(centre[2])), radius_angst, n_beads)


def lump(seed: int) -> Molecule:
    """Five to eight domains folded together, to be seen from all sides."""
    generator = torch.Generator().manual_seed(seed)
    n_domains = int(torch.randint(5, 9, (), generator=generator))
    centres, radius = _domains(n_domains, generator)
    points = torch.cat([_beads(c, float(r)) for c, r in zip(centres, radius, strict=True)])
    points = points - points.mean(0)
    return still(points, torch.ones(len(points)), SIGMA_ANGST)


def _halves(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Beads of the first and of the last domains of a flat chain, and the joint between them."""
    n_domains = int(torch.randint(4, 7, (), generator=generator))
    centres, radius = _domains(n_domains, generator)
    # the plane in which the chain is widest faces the viewer
    spread = centres - centres.mean(0)
    axes = torch.linalg.eigh(spread.mT @ spread).eigenvectors.flip(1)
    centres = spread @ axes * torch.tensor([1.0, 1.0, 0.5])
    cut = n_domains // 2
    parts = [_beads(c, float(r)) for c, r in zip(centres, radius, strict=True)]
    return torch.cat(parts[:cut]), torch.cat(parts[cut:]), (centres[cut - 1] + centres[cut]) / 2.0


def random_hinge(seed: int) -> Molecule:
    """Two halves of a chain that bend in the plane of the image about their joint."""
    generator = torch.Generator().manual_seed(seed)
    body, arm, joint = _halves(generator)
    low, high = HINGE_DEG
    rate = radians(low + (high - low) * float(torch.rand((), generator=generator)))

    def motion(conformation: Float[Tensor, "n 1"]) -> Float[Tensor, "n beads 3"]:
        n = len(conformation)
        bent = turn_about_z((arm - joint).expand(n, -1, -1), rate * conformation[:, 0]) + joint
        return torch.cat([body.expand(n, -1, -1), bent], dim=1)

    return Molecule(motion, torch.ones(len(body) + len(arm)), SIGMA_ANGST, 1)


def random_twist(seed: int) -> Molecule:
    """Two halves of a chain, one of which turns about the line from the other to it."""
    generator = torch.Generator().manual_seed(seed)
    body, arm, joint = _halves(generator)
    low, high = TWIST_DEG
    rate = radians(low + (high - low) * float(torch.rand((), generator=generator)))
    axis = torch.nn.functional.normalize(
        (arm.mean(0) - body.mean(0)) * torch.tensor([1.0, 1.0, 0.0]), dim=0
    )
    x, z = axis, torch.tensor([0.0, 0.0, 1.0])
    frame = torch.stack([torch.linalg.cross(z, x), z, x])  # its third row is the axis of the twist

    def motion(conformation: Float[Tensor, "n 1"]) -> Float[Tensor, "n beads 3"]:
        n = len(conformation)
        local = ((arm - joint) @ frame.mT).expand(n, -1, -1)
        turned = turn_about_z(local, rate * conformation[:, 0]) @ frame + joint
        return torch.cat([body.expand(n, -1, -1), turned], dim=1)

    return Molecule(motion, torch.ones(len(body) + len(arm)), SIGMA_ANGST, 1)


def chain(name: str, seed: int) -> Molecule:
    """The random molecule of this kind (see ``molecules.RANDOM``) and seed."""
    return {"lump": lump, "random-hinge": random_hinge, "random-twist": random_twist}[name](seed)
