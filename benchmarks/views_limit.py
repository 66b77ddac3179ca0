"""The best any method can do on views of a known 3-D molecule, for a part of the particles.

Templates are projections along an even grid of directions. All are compared with a particle at its true
origin, over every in-plane angle; those that matter, over origins around it too, under the prior of the
shifts. What is left is the posterior of direction and psi under the truth, on a grid.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.measures import neighbour_view_deg
from cryo_svae.imaging.geometry import degrees, wrap_radians
from cryo_svae.models.engine import Batch
from cryo_svae.models.pose_posterior import Look, disc_of_points, normalised
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.simulate import Simulated, load_molecule, project, view_rotation

N_TEMPLATES = 5000  # 3° apart
STEP_PX = 0.35  # of the grid of origins
MATTERS = 9.0  # nats below the best template


def even_views(n: int) -> Float[Tensor, "n 2"]:
    """Rot and tilt of n directions on a golden spiral."""
    index = torch.arange(n) + 0.5
    rot = (index * math.pi * (1.0 + math.sqrt(5.0))) % (2.0 * math.pi)
    return torch.stack([rot, torch.acos(1.0 - 2.0 * index / n)], 1)


def limit(simulated: Simulated, source: Path | None, shift_std_px: float, n: int) -> dict[str, float]:
    """Measures of the posterior under the truth for the first n particles (see ``measures``)."""
    box, views = simulated.images.shape[-1], even_views(N_TEMPLATES)
    engine = SteerableEngine(box, 1, SteerableConfig(max_shift_px=3.0 * shift_std_px)).eval()
    engine.noise_variance.fill_(simulated.noise_std**2)
    engine.shift_variance.fill_(shift_std_px**2)
    nothing, upright = torch.zeros(N_TEMPLATES, 0), torch.zeros(N_TEMPLATES)
    clean = project(
        load_molecule("views", source), nothing, upright, torch.zeros(N_TEMPLATES, 2),
        box_px=box, pixel_size_angst=simulated.pixel_size_angst, view_rad=views,
    )  # fmt: skip
    templates = torch.cat([engine.represent(part) for part in clean.split(500)])
    frames, true_frames = view_rotation(views.double()), view_rotation(simulated.view_rad[:n].double())
    particles = Batch(
        torch.arange(n),
        engine.represent(simulated.images[:n]),
        None if simulated.ctf is None else simulated.ctf[slice(0, n)],
    )
    psi, direction = torch.zeros(n), torch.zeros(n, 3, dtype=torch.float64)
    for k in range(n):
        batch = particles[torch.tensor([k])]
        chance, angles = _posterior(engine, batch, simulated.origin_px[k : k + 1], templates)
        mean = (chance.sum(1).double()[:, None] * frames[:, 2]).sum(0)
        direction[k] = mean / mean.norm()
        # psi in the true view's frame: a template's frame is turned onto it
        between = true_frames[k, :2] @ frames[:, :2].mT
        turn = torch.atan2(between[:, 1, 0] - between[:, 0, 1], between[:, 0, 0] + between[:, 1, 1])
        psi[k] = torch.angle((chance * torch.exp(1j * (angles + turn.float()[:, None]))).sum())
    view_error = torch.acos((direction * true_frames[:, 2]).sum(1).clamp(-1.0, 1.0)).numpy()
    psi_error = wrap_radians(psi - simulated.psi_rad[:n])
    pairs = wrap_radians(psi_error[:, None] - psi_error)[torch.triu(torch.ones(n, n), 1) > 0]
    return {
        "in_plane": float(degrees(pairs.abs().median())),
        "neighbours": _neighbours(view_error, len(simulated.images)),
        "view_error": float(degrees(np.median(view_error))),
    }


def _posterior(
    engine: SteerableEngine,
    batch: Batch,
    origin_px: Float[Tensor, "1 2"],
    templates: Float[Tensor, "k 2 p"],
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "n"]]:
    """Probability of each template and psi, and the psi in radians."""
    offsets = disc_of_points(2.3, origin_px.device) * STEP_PX
    look, _ = engine.look(batch, origin_px, offsets)
    log_prior = engine.log_prior(origin_px[:, None] + offsets, STEP_PX)
    middle = len(offsets) // 2
    at_truth = Look(look.polar, look.spectra[:, :, middle : middle + 1], look.power, look.n_psi)
    scores = at_truth.scores(templates[None], torch.zeros(1, 1, 1))[0]
    best = torch.logsumexp(scores, (1, 2))
    matters = (best > best.max() - MATTERS).nonzero()[:, 0]
    chance = torch.zeros(len(templates), look.n_psi)
    chance[matters] = normalised(look.scores(templates[None, matters], log_prior[:, None]))[1][0].sum(1)
    return chance, 2.0 * math.pi / look.n_psi * torch.arange(look.n_psi)


def _neighbours(view_error_rad: np.ndarray, n: int) -> float:
    """Angle between true views of nearest neighbours, if n estimates erred as these do."""
    random = np.random.default_rng(0)
    true, aside = random.normal(size=(2, n, 3))
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    aside -= np.sum(aside * true, axis=1, keepdims=True) * true
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    error = random.choice(view_error_rad, n)[:, None]
    return neighbour_view_deg(true * np.cos(error) + aside * np.sin(error), true)
