"""Exact posteriors of single particles under a trained steerable engine.

Origins are searched from coarse to fine, at first with contents known from training; then z goes from
there, or from the encoder's answer, to the mode of p(z | image), the pose summed out, and importance
points around it give the means, spreads and the evidence. The last two happen in the ``ContentSpace``, on
a CPU at the rotations alone that may matter. Nothing of the engine is changed, and no particle depends on
its neighbours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cryo_svae.imaging.geometry import wrap_radians
from cryo_svae.models.content_space import ContentSpace, drawn_z
from cryo_svae.models.engine import Batch, Posterior
from cryo_svae.models.pose_posterior import ByOrder, disc_of_points, masses, mean_origin
from cryo_svae.models.refinement import (
    INFLATION,
    importance_points,
    newton_mode,
    root_covariance,
    summarise_angle,
)

if TYPE_CHECKING:
    from cryo_svae.imaging.polar import PolarTransform
    from cryo_svae.models.steerable import SteerableEngine

COARSE_STEP_PX = 1.5  # of the first search of origins
STEP_STD = 1.4  # steps between origins, in standard deviations: sums over a Gaussian are right to 1e-4
FINE_DISC = 2.3  # radius of the last grid of origins, in steps: it holds all but 1 % of the posterior
FINE_STEP_PX = (0.15, 1.0)  # least and greatest such step
FINER_ANGLES = 2  # times as many rotations are summed over in inference as in training
PIECE = 2**22  # numbers in the largest arrays on a CPU; more of them leave the processor's cache
GPU_SHARE = 0.25  # of its memory, for a piece
UNLIKELY = 1e-6  # probability of a rotation that is left out, its neighbours no likelier
NEIGHBOURS = 2
COPIES = 6  # of its largest arrays that a search holds at a time


class _Guess(NamedTuple):
    """What is known of particles when they are looked at closely.

    origin:  (b, 2).
    z:       (b, d).
    step_px: between the origins to look at (b,).
    near:    probability of each rotation, or of a neighbour if that is likelier (b, n).
    power:   of each ring of the image (b, r), see ``SteerableEngine.ring_power``.
    left:    power of each ring that content does not explain, in units of the set's noise (b, r).
    scale:   of the content (b,), and the variance of its posterior (b,).
    """

    origin: Tensor
    z: Tensor
    step_px: Tensor
    near: Tensor
    power: Tensor
    left: Tensor
    scale: Tensor
    scale_variance: Tensor


class _Prepared(NamedTuple):
    """What is made of a generator once, for all particles.

    known: contents known from training, of the rings of the coarse search.
    """

    space: ContentSpace
    known: ByOrder


class PosteriorSearch(nn.Module):
    """Finds posteriors of batches of particles for one engine; holds what is the same for all of them.

    points:  importance points.
    drawn:   z whose contents the content space is laid through.
    coarse, outline: transforms of fewer rings, for the first grid of origins and for the next.
    widest, wide, fine: grids of origins of the searches, in steps.
    """

    engine: SteerableEngine
    coarse: PolarTransform
    outline: PolarTransform
    drawn: Tensor
    points: Tensor
    widest: Tensor
    wide: Tensor
    fine: Tensor

    def __init__(self, engine: SteerableEngine) -> None:
        super().__init__()
        object.__setattr__(self, "engine", engine)  # whose part this is
        self._kept: tuple[object, _Prepared] | None = None
        self.outline = engine.coarser(math.ceil(engine.box_px / (2.0 * COARSE_STEP_PX)))
        self.coarse = engine.coarser(math.ceil(engine.box_px / (4.0 * COARSE_STEP_PX)))
        radii = {
            "widest": engine.config.max_shift_px / COARSE_STEP_PX,
            "wide": 2.0 if engine.shifts else 0.0,
            "fine": FINE_DISC if engine.shifts else 0.0,
        }
        for name, radius in radii.items():
            self.register_buffer(name, disc_of_points(radius, torch.device("cpu")), persistent=False)
        self.register_buffer("drawn", drawn_z(engine.z_dim), persistent=False)
        self.register_buffer("points", importance_points(engine.z_dim), persistent=False)
        self.to(engine.noise_variance.device)

    def posterior(self, batch: Batch) -> Posterior:
        """Posterior of each particle."""
        rows = [torch.arange(len(batch))]
        if batch.ctf is not None and batch.astigmatic is None:
            # apart, so that no particle's CTF is treated by its neighbours'
            turns = batch.ctf.astigmatic.cpu()
            rows = [kind.nonzero()[:, 0] for kind in (~turns, turns) if bool(kind.any())]
        if len(rows) == 1:
            return self._of_one_kind(batch)
        found = Posterior.cat([self._of_one_kind(batch[kind]) for kind in rows])
        return _in_order(found, torch.cat(rows))

    def _of_one_kind(self, batch: Batch) -> Posterior:
        """Posterior of each particle of a batch whose CTFs are all round, or all not."""
        rows = torch.arange(len(batch)).split(self._n_at_once())
        guesses = [self._first_guess(batch if len(rows) == 1 else batch[piece]) for piece in rows]
        if len(rows) == 1:
            return self._posterior(batch, guesses[0])
        guess = _Guess(*(torch.cat(values) for values in zip(*guesses, strict=True)))
        found, order = [], []
        for piece in self._alike(guess):
            here = piece.to(guess.z.device)
            found.append(self._posterior(batch[piece], _Guess(*(values[here] for values in guess))))
            order.append(piece)
        return _in_order(Posterior.cat(found), torch.cat(order))

    def _alike(self, guess: _Guess) -> list[Int[Tensor, "k"]]:
        """Rows in pieces of particles to which as many rotations matter; on a GPU as they come."""
        most = self._n_at_once()
        if self._on_gpu:
            return list(torch.arange(len(guess.z)).split(most))
        n_likely, order = torch.sort((guess.near > UNLIKELY).sum(1), stable=True)
        each = len(self.fine) * max(len(self.points), len(self._prepared().space.basis))
        pieces, start = [], 0
        for end, width in enumerate(n_likely.tolist(), 1):
            if end == len(order) or end - start == most or (end + 1 - start) * width * each > PIECE:
                pieces.append(order[start:end])
                start = end
        return pieces

    @property
    def _on_gpu(self) -> bool:
        return self.points.device.type == "cuda"

    def _prepared(self) -> _Prepared:
        """What is made of the generator; anew whenever it has learned."""
        engine = self.engine
        tensors = [*engine.generator.parameters(), *engine.generator.buffers()]
        tensors += [engine.noise_variance, engine.known_z]
        made_of = (self.points.device, *(tensor._version for tensor in tensors))
        if self._kept is None or self._kept[0] != made_of:
            n_psi = FINER_ANGLES * engine.polar.n_angles
            space = ContentSpace(engine.generator, engine.polar, engine.noise, self.drawn, n_psi)
            known = engine.generator(engine.known_z)[..., : self.coarse.n_pairs]
            n_angles, psi_range_rad = self.coarse.n_angles, engine.config.psi_range_rad
            self._kept = made_of, _Prepared(space, ByOrder(self.coarse, known, n_angles, psi_range_rad))
        return self._kept[1]

    def train(self, mode: bool = True) -> PosteriorSearch:
        """Recorded steps of training change the generator without counting versions."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _n_at_once(self) -> int:
        """Particles in a piece."""
        engine, polar = self.engine, self.engine.polar
        k, n_origins = len(self._prepared().space.basis), len(self.fine)
        if not self._on_gpu:
            return max(1, PIECE // (2 * polar.n_orders * n_origins * max(polar.n_rings, k)))
        n_psi = FINER_ANGLES * polar.n_angles
        n_scores = max(n_origins * n_psi * max(len(self.points), k), polar.n_angles * k**2)
        n_coarse = len(engine.known_z) * len(self.widest) * self.coarse.n_angles
        n_spectra = 2 * polar.n_rings * polar.n_angles * n_origins
        bytes_each = 4 * COPIES * max(n_scores, n_coarse, n_spectra)
        memory = torch.cuda.get_device_properties(self.points.device).total_memory
        return max(1, int(GPU_SHARE * memory / bytes_each))

    def _posterior(self, batch: Batch, guess: _Guess) -> Posterior:
        engine = self.engine
        offsets = self.fine * guess.step_px[:, None, None]
        origins = guess.origin[:, None] + offsets
        log_prior = engine.log_prior(origins, guess.step_px)
        weight = engine.own.weight(guess.left)
        look, restored = engine.look(batch, guess.origin, offsets, weight=weight, scale=guess.scale)
        space = self._prepared().space
        angle = self._likely_angles(guess.near)
        sight = space.seen(look, angle)
        tried = torch.stack([guess.z, engine.encode(restored)[0]], 1)
        log_weight = -0.5 * tried.square().sum(2)
        _, mass = masses(sight.scores(space.coordinates(tried), log_prior[:, None] + log_weight[..., None]))
        better = tried[torch.arange(len(tried), device=tried.device), mass.sum((2, 3)).argmax(1)]
        mode, curvature = newton_mode(better, lambda at: sight.local_model(*space.slopes(at), log_prior))
        root = root_covariance(curvature - sight.missing_information(*space.slopes(mode), log_prior))
        at = mode[:, None] + self.points @ root.mT
        log_proposal = -0.5 * (self.points / INFLATION).square().sum(1)
        log_weight = -0.5 * at.square().sum(2) - log_proposal
        top, mass = masses(sight.scores(space.coordinates(at), log_prior[:, None] + log_weight[..., None]))
        of_point = mass.sum((2, 3))
        total = of_point.sum(1, keepdim=True)
        share, probability = of_point / total, mass.sum(1) / total[..., None]
        z_mean = (share[..., None] * at).sum(1)
        z_variance = (share[..., None] * (at - z_mean[:, None]).square()).sum(1)
        volume = torch.linalg.slogdet(root).logabsdet + engine.z_dim * math.log(INFLATION)
        log_evidence = top + torch.log(total[:, 0]) - math.log(len(self.points)) + volume
        log_evidence = log_evidence + engine.scales.log_prior(guess.scale, guess.scale_variance)
        of_angle = probability.new_zeros(len(angle), look.n_psi).scatter(1, angle, probability.sum(2))
        psi, psi_std, second_mode = summarise_angle(of_angle)
        origin, origin_variance = mean_origin(probability.sum(1), origins)
        return Posterior(
            z_mean=z_mean,
            z_std=z_variance.sqrt(),
            psi_rad=wrap_radians(psi),
            psi_std_rad=psi_std,
            origin_px=origin,
            origin_std_px=origin_variance.sqrt(),
            figure_of_merit=2.0
            * (log_evidence - engine.own.misfit(guess.left))
            / engine.signal_energy.clamp(min=1.0),
            log_likelihood=engine.empty_image(guess.power, weight) + log_evidence,
            second_mode=second_mode,
        )

    def _likely_angles(self, near: Float[Tensor, "b n"]) -> Int[Tensor, "b w"]:
        """The rotations that may matter to each particle, as many as to any of them.

        On a GPU, which is not waited for, all of them.
        """
        if self._on_gpu:
            return torch.arange(near.shape[1], device=near.device).expand(len(near), -1)
        return near.topk(int((near > UNLIKELY).sum(1).max()), 1).indices

    def _first_guess(self, batch: Batch) -> _Guess:
        """Where and at which rotations to look, and z to begin with."""
        engine = self.engine
        power = engine.ring_power(batch)
        left = power / engine.noise_variance
        here, z = self._coarse_search(batch, engine.own.weight(left))
        step_px = torch.full_like(here[:, 0], COARSE_STEP_PX / 2.0 if engine.shifts else 0.0)
        one = torch.ones_like(step_px)
        guess = _Guess(here, z, step_px, one[:, None], power, left, one, torch.zeros_like(one))
        if engine.shifts:
            guess = self._look_around(batch, guess, self.outline, COARSE_STEP_PX / 4.0)
        return self._look_around(batch, guess, engine.polar, FINE_STEP_PX[0])

    def _look_around(
        self,
        batch: Batch,
        guess: _Guess,
        polar: PolarTransform,
        finest_px: float,
    ) -> _Guess:
        """A better guess from origins on a disc in steps.

        Where all rings are looked at, z is the encoder's if that explains the particle better, and what
        is left unexplained is found.
        """
        engine, z = self.engine, guess.z
        offsets = self.wide * guess.step_px[:, None, None]
        origins = guess.origin[:, None] + offsets
        weight = engine.own.weight(guess.left)
        look, restored = engine.look(batch, guess.origin, offsets, polar, weight, rounded=True)
        log_prior = engine.log_prior(origins, guess.step_px)
        tried = z[:, None]
        if polar is engine.polar:
            tried = torch.stack([z, engine.encode(restored)[0]], 1)
        content = engine.generator(tried.flatten(0, 1)).unflatten(0, tried.shape[:2])[..., : polar.n_pairs]
        log_weight = -0.5 * tried.square().sum(2)
        _, mass = masses(look.scores(content, log_prior[:, None] + log_weight[..., None]))
        row, best = torch.arange(len(z), device=z.device), mass.sum((2, 3)).argmax(1)
        mass = mass[row, best]
        mass = mass / mass.sum((1, 2), keepdim=True)
        of_origin = mass.sum(2)
        origin, variance = mean_origin(of_origin, origins)
        left, scale = guess.left, (guess.scale, guess.scale_variance)
        if polar is engine.polar:
            content = content[row, best]
            aligned, filtered = look.aligned(mass), look.filtered(content[:, None], mass.sum(1))[:, 0]
            energy = (filtered * content).sum((1, 2))
            scale = engine.scales.found((aligned * content).sum((1, 2)), energy)
            factor = scale[0][:, None, None]
            left = engine.unexplained(
                guess.power, content, factor * aligned, factor.square() * filtered, weight
            )
            left = left / engine.noise_variance
        return _Guess(
            engine.within_reach(origin),
            tried[row, best],
            (STEP_STD * variance.sqrt()).clamp(finest_px, FINE_STEP_PX[1]),
            _greatest_near(mass.sum(1)),
            guess.power,
            left,
            *scale,
        )

    def _coarse_search(
        self, batch: Batch, weight: Float[Tensor, "b k"]
    ) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b d"]]:
        """The best of a grid over the whole disc of origins, and of the known contents."""
        engine = self.engine
        offsets = self.widest * COARSE_STEP_PX
        centre = offsets.new_zeros(len(batch), 2)
        look, _ = engine.look(batch, centre, offsets, self.coarse, weight, rounded=True)
        log_prior = engine.log_prior(offsets[None], COARSE_STEP_PX)
        _, chance = masses(look.greatest(self._prepared().known) + log_prior[..., None])
        return offsets[chance.sum(2).argmax(1)], engine.known_z[chance.sum(1).argmax(1)]


def _greatest_near(of_angle: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """The greatest of the values of each rotation and its neighbours."""
    around = nn.functional.pad(of_angle[:, None], (NEIGHBOURS, NEIGHBOURS), mode="circular")
    greatest: Tensor = nn.functional.max_pool1d(around, 2 * NEIGHBOURS + 1, 1)[:, 0]
    return greatest


def _in_order(found: Posterior, row: Int[Tensor, "b"]) -> Posterior:
    """Posteriors of rows ``row`` in the order of the rows."""
    back = torch.argsort(row)
    return Posterior(**{name: values[back.to(values.device)] for name, values in vars(found).items()})
