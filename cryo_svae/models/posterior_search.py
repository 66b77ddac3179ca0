"""Exact posteriors of single particles under a trained steerable engine.

Origins are searched from coarse to fine, at first with contents known from training; then z goes from
there, or from the encoder's answer, to the mode of p(z | image), the pose summed out, and importance
points around it give the means, spreads and the evidence. Nothing of the engine is changed, and no
particle depends on its neighbours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryo_svae.geometry import wrap_radians
from cryo_svae.models.engine import Batch, Posterior
from cryo_svae.models.pose_posterior import Look, disc_of_points, masses, mean_origin, normalised
from cryo_svae.models.refinement import (
    INFLATION,
    LocalModel,
    importance_points,
    newton_mode,
    root_covariance,
    summarise_angle,
)

if TYPE_CHECKING:
    from cryo_svae.models.steerable import SteerableEngine
    from cryo_svae.polar import PolarTransform

COARSE_STEP_PX = 1.5  # of the first search of origins
STEP_STD = 1.4  # steps between origins, in standard deviations: sums over a Gaussian are right to 1e-4
FINE_DISC = 2.3  # radius of the last grid of origins, in steps: it holds all but 1 % of the posterior
FINE_STEP_PX = (0.15, 1.0)  # least and greatest such step
FINER_ANGLES = 2  # times as many rotations are summed over in inference as in training
PIECE = 2**22  # scores held at a time on a CPU; more of them leave the processor's cache
GPU_SHARE = 0.25  # of its memory, for a piece
COPIES = 6  # of its largest arrays that a search holds at a time


class _Seen(NamedTuple):
    """Particles at trial origins.

    origins:   (b, t, 2).
    log_prior: of each origin (b, t).
    z:         the better of two contents (b, d).
    chance:    of each origin under it (b, t), sums to 1.
    """

    origins: Tensor
    look: Look
    log_prior: Tensor
    z: Tensor
    chance: Tensor


class PosteriorSearch(nn.Module):
    """Finds posteriors of batches of particles for one engine; holds what is the same for all of them.

    points:  importance points.
    coarse:  the transform that origins are first searched with.
    widest, wide, fine: grids of origins of the searches, in steps.
    """

    engine: SteerableEngine
    coarse: PolarTransform
    points: Tensor
    widest: Tensor
    wide: Tensor
    fine: Tensor

    def __init__(self, engine: SteerableEngine) -> None:
        super().__init__()
        object.__setattr__(self, "engine", engine)  # whose part this is
        self.coarse = engine.coarser(math.ceil(engine.box_px / (4.0 * COARSE_STEP_PX)))
        radii = {
            "widest": engine.config.max_shift_px / COARSE_STEP_PX,
            "wide": 2.0 if engine.shifts else 0.0,
            "fine": FINE_DISC if engine.shifts else 0.0,
        }
        for name, radius in radii.items():
            self.register_buffer(name, disc_of_points(radius, torch.device("cpu")), persistent=False)
        self.register_buffer("points", importance_points(engine.z_dim), persistent=False)
        self.to(engine.noise_variance.device)

    def posterior(self, batch: Batch) -> Posterior:
        """Posterior of each particle."""
        rows = [torch.arange(len(batch))]
        if batch.ctf is not None and batch.astigmatic is None:
            # apart, so that no particle's CTF is treated by its neighbours'
            turns = batch.ctf.astigmatic.cpu()
            rows = [kind.nonzero()[:, 0] for kind in (~turns, turns)]
        pieces = [piece for kind in rows for piece in kind.split(self._n_at_once()) if len(piece)]
        if len(pieces) == 1:
            return self._posterior(batch)
        found = Posterior.cat([self._posterior(batch[piece]) for piece in pieces])
        if len(rows) == 1:
            return found
        back = torch.argsort(torch.cat(rows))
        return Posterior(**{name: values[back.to(values.device)] for name, values in vars(found).items()})

    def _n_at_once(self) -> int:
        """Particles in a piece."""
        engine = self.engine
        n_psi = FINER_ANGLES * engine.polar.n_angles
        n_scores = len(self.fine) * n_psi * max(len(self.points), engine.z_dim)
        if engine.noise_variance.device.type != "cuda":
            return max(1, PIECE // n_scores)
        n_coarse = len(engine.known_z) * len(self.widest) * FINER_ANGLES * self.coarse.n_angles
        n_spectra = 2 * engine.polar.n_rings * engine.polar.n_angles * len(self.fine)
        bytes_each = 4 * COPIES * max(n_scores, n_coarse, n_spectra)
        memory = torch.cuda.get_device_properties(engine.noise_variance.device).total_memory
        return max(1, int(GPU_SHARE * memory / bytes_each))

    def _posterior(self, batch: Batch) -> Posterior:
        engine = self.engine
        here, z, step_px = self._first_guess(batch)
        seen = self._look_around(batch, here, z, step_px, self.fine)
        look, log_prior = seen.look, seen.log_prior
        mode, curvature = newton_mode(
            seen.z, lambda at: LocalModel(*look.expansion(*self._slopes(at), log_prior))
        )
        root = root_covariance(curvature - self._missing_information(mode, look, log_prior))
        at = mode[:, None] + self.points @ root.mT
        log_proposal = -0.5 * (self.points / INFLATION).square().sum(1)
        log_total, weight, probability = self._weigh(at, log_proposal, look, log_prior)
        z_mean = (weight[..., None] * at).sum(1)
        z_variance = (weight[..., None] * (at - z_mean[:, None]).square()).sum(1)
        volume = torch.linalg.slogdet(root).logabsdet + engine.z_dim * math.log(INFLATION)
        log_evidence = log_total - math.log(len(self.points)) + volume
        psi, psi_std, second_mode = summarise_angle(probability.sum(1))
        origin, origin_variance = mean_origin(probability.sum(2), seen.origins)
        return Posterior(
            z_mean=z_mean,
            z_std=z_variance.sqrt(),
            psi_rad=wrap_radians(psi),
            psi_std_rad=psi_std,
            origin_px=origin,
            origin_std_px=origin_variance.sqrt(),
            figure_of_merit=2.0 * log_evidence / engine.signal_energy.clamp(min=1.0),
            log_likelihood=engine.empty_image(batch) + log_evidence,
            second_mode=second_mode,
        )

    def _weigh(
        self,
        at: Float[Tensor, "b k d"],
        log_proposal: Float[Tensor, "k"],
        look: Look,
        log_prior: Float[Tensor, "b t"],
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b k"], Float[Tensor, "b t n"]]:
        """Log total and shares of the importance weights of k points, and the mean pose posterior."""
        content = self.engine.generator(at.flatten(0, 1)).unflatten(0, at.shape[:2])
        log_weight = -0.5 * at.square().sum(2) - log_proposal
        top, mass = masses(look.scores(content, log_prior[:, None] + log_weight[..., None]))
        of_point = mass.sum((2, 3))
        total = of_point.sum(1)
        return top + torch.log(total), of_point / total[:, None], mass.sum(1) / total[:, None, None]

    def _first_guess(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b d"], Float[Tensor, "b"]]:
        """Origins, z, and the posterior standard deviation of the origin's components in px.

        z is the encoder's or the best of the known contents, whichever explains the particle better.
        """
        engine = self.engine
        here, z = self._coarse_search(batch)
        step_px = torch.full_like(here[:, 0], COARSE_STEP_PX / 2.0 if engine.shifts else 0.0)
        finest = (COARSE_STEP_PX / 4.0, FINE_STEP_PX[0]) if engine.shifts else ()
        for finest_px in finest:
            seen = self._look_around(batch, here, z, step_px, self.wide)
            z = seen.z
            here, variance = mean_origin(seen.chance, seen.origins)
            here = engine.within_reach(here)
            step_px = (STEP_STD * variance.sqrt()).clamp(finest_px, FINE_STEP_PX[1])
        return here, z, step_px

    def _look_around(
        self,
        batch: Batch,
        here: Float[Tensor, "b 2"],
        z: Float[Tensor, "b d"],
        step_px: Float[Tensor, "b"],
        disc: Float[Tensor, "t 2"],
    ) -> _Seen:
        """Particles at origins on a disc in steps, with the better of z and the encoder's answer there."""
        engine = self.engine
        offsets = disc * step_px[:, None, None]
        origins = here[:, None] + offsets
        look, restored = engine.look(batch, here, offsets, rounded=disc is not self.fine)
        log_prior = engine.log_prior(origins, step_px)
        both = torch.stack([z, engine.encode(restored)[0]], 1)
        content = engine.generator(both.flatten(0, 1)).unflatten(0, both.shape[:2])
        log_weight = -0.5 * both.square().sum(2)
        _, mass = masses(look.scores(content, log_prior[:, None] + log_weight[..., None]))
        of_origin = mass.sum(3)
        of_content = of_origin.sum(2)
        first = of_content[:, :1] > of_content[:, 1:]
        chance = torch.where(first, of_origin[:, 0], of_origin[:, 1])
        better = torch.where(first, both[:, 0], both[:, 1])
        return _Seen(origins, look, log_prior, better, chance / chance.sum(1, keepdim=True))

    def _coarse_search(self, batch: Batch) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b d"]]:
        """The best of a grid over the whole disc of origins, and of the known contents."""
        engine = self.engine
        offsets = self.widest * COARSE_STEP_PX
        centre = offsets.new_zeros(len(batch), 2)
        look, _ = engine.look(batch, centre, offsets, self.coarse, rounded=True)
        content = engine.generator(engine.known_z)[..., : self.coarse.n_pairs]
        log_prior = engine.log_prior(offsets.expand(len(batch), -1, -1), COARSE_STEP_PX)
        _, mass = masses(look.scores(content[None], log_prior[:, None]))
        chance = mass.sum(3)
        return offsets[chance.sum(1).argmax(1)], engine.known_z[chance.sum(2).argmax(1)]

    def _slopes(self, z: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b 2 p"], Float[Tensor, "b d 2 p"]]:
        """Generated coefficients, and their derivatives by each component of z."""
        units = torch.eye(z.shape[1], device=z.device)[:, None].expand(-1, len(z), -1)
        content, slopes = self.engine.generator.along(z, units)
        return content, slopes.transpose(0, 1)

    def _missing_information(
        self, z: Float[Tensor, "b d"], look: Look, log_prior: Float[Tensor, "b t"]
    ) -> Float[Tensor, "b d d"]:
        """Information on z lost because the pose is unknown: covariance of the score over poses.

        Louis 1982, J. R. Stat. Soc. B 44, 226.
        """
        content, slopes = self._slopes(z)
        joint = look.scores(content[:, None], log_prior[:, None])[:, 0]
        probability = normalised(joint)[1].flatten(1)[:, None]
        scores = look.inner(slopes).flatten(2)
        centred = scores.sub_(scores @ probability.mT)
        return (centred * probability) @ centred.mT
