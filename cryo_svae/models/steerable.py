"""The steerable engine: a spatial-VAE in polar Fourier space whose pose is summed out exactly.

The generator maps z to the angular coefficients of an image, a function of polar coordinates; a
rotation multiplies them by phases, so that one short FFT scores an image at every angle. The bound
is log sum over poses p(pose) p(y | z, pose) - KL(q(z | y) || N(0, I)), with the pose summed out on
a grid (all angles, times origins around the particle's current one) and z sampled once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cryo_svae.config import check, derived, option
from cryo_svae.ctf import ctf_at, electron_wavelength_angst
from cryo_svae.geometry import wrap_radians
from cryo_svae.models.engine import Batch, ElboTerms, Engine, Posterior, TrainingDefaults
from cryo_svae.models.invariant_encoder import InvariantEncoder
from cryo_svae.models.pose_posterior import Look, PosePosterior
from cryo_svae.models.refinement import (
    INFLATION,
    LocalModel,
    importance_points,
    newton_mode,
    summarise_angle,
)
from cryo_svae.polar import PolarTransform

KL_WARM_UP = 0.4  # share of the epochs in which the weight of the KL terms rises from 0 to 1
NARROWING = 0.5  # share of the epochs in which the origin search narrows
MEMORY = 0.98  # of the running averages of the noise and shift variances, per batch
FINEST_STEP_PX = 0.5  # of the origin search while training; the grid is jittered
COARSE_STEP_PX = 1.5  # of the first origin search of a particle never seen
COARSE_CONTENTS = 4  # contents it is tried with
ASTIGMATIC_RAD = 0.2  # a CTF phase that differs by less with direction is taken as round
HIDDEN = 256


def disc_of_points(radius: float, device: torch.device) -> Float[Tensor, "t 2"]:
    """Integer points (x, y) within a radius."""
    axis = torch.arange(-math.floor(radius), math.floor(radius) + 1, device=device)
    points = torch.cartesian_prod(axis, axis)
    return points[points.square().sum(1) <= radius**2 + 1e-6].float()


@dataclass(frozen=True, kw_only=True)
class SteerableConfig:
    """The steerable engine."""

    epochs: int = derived(20, "passes over the particles")
    batch_size: int = derived(128, "particles in a step")
    learning_rate: float = derived(2e-3, "peak learning rate of Adam")
    max_shift_px: float = derived(4.0, "largest origin searched, in pixels; 0 for centred particles")
    shift_std_px: float | None = derived(None, "standard deviation of origins in pixels; learned if None")
    mask_radius_px: float = derived(math.inf, "radius of the soft disc that holds the particle, in pixels")
    schedule: ClassVar[str] = "one-cycle"

    def __post_init__(self) -> None:
        check(self.max_shift_px >= 0.0, "max_shift_px", self.max_shift_px, "pixels, 0 or more")
        std_ok = self.shift_std_px is None or self.shift_std_px > 0.0
        check(std_ok, "shift_std_px", self.shift_std_px, "pixels above 0")
        check(self.mask_radius_px > 0.0, "mask_radius_px", self.mask_radius_px, "pixels above 0")


class PolarGenerator(nn.Module):
    """Content z to packed angular coefficients: a network scaled by the data's rms, about their mean."""

    scale: Tensor
    mean: Tensor

    def __init__(self, polar: PolarTransform, z_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(z_dim, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 2 * polar.n_pairs),
        )
        self.register_buffer("scale", torch.zeros(2, polar.n_pairs))
        self.register_buffer("mean", torch.zeros(2, polar.n_pairs))

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b 2 p"]:
        """Coefficients of each z, in the reference's frame and without CTF."""
        relative: Tensor = self.layers(z).float()
        return relative.view(len(z), 2, -1) * self.scale + self.mean


class SteerableEngine(Engine):
    """See the module's docstring; the interface is ``engine.Engine``.

    noise_variance: of each ring (r,), per pixel; a running average of the posterior residuals.
    shift_variance: of each component of the origin, px².
    signal_energy:  running average of <h² c / sigma², c>, the log evidence scale of a particle.
    origin_px:      current origin of each training particle (n, 2).
    """

    training_defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        epochs=(6, 150), images=300_000, batch_size=128, learning_rate=2e-3, schedule="one-cycle"
    )
    largest_box_px: ClassVar[int] = 128

    noise_variance: Tensor
    shift_variance: Tensor
    signal_energy: Tensor
    origin_px: Tensor

    def __init__(self, box_px: int, z_dim: int, config: SteerableConfig) -> None:
        super().__init__()
        self.box_px, self.z_dim, self.config = box_px, z_dim, config
        self.kl_weight, self.search_step_px = 1.0, FINEST_STEP_PX
        self.polar = PolarTransform(box_px, min(config.mask_radius_px, box_px / 2), config.max_shift_px)
        self.encoder = InvariantEncoder(self.polar, z_dim)
        self.generator = PolarGenerator(self.polar, z_dim)
        std = config.max_shift_px / 2 if config.shift_std_px is None else config.shift_std_px
        self.register_buffer("noise_variance", torch.ones(self.polar.n_rings))
        self.register_buffer("shift_variance", torch.tensor(std**2))
        self.register_buffer("signal_energy", torch.tensor(1.0))
        self.register_buffer("origin_px", torch.zeros(0, 2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        table = state_dict.get(prefix + "origin_px")
        if table is not None:  # as many rows as the particles it was trained on
            self.origin_px = self.origin_px.new_zeros(table.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def represent(self, images: Float[Tensor, "b n n"]) -> Float[Tensor, "b 2 p"]:
        """Packed angular coefficients of prepared images."""
        return self.polar(images)

    def start(self, batches: Iterator[Batch], n_particles: int) -> None:
        """Noise from the rings' power, scale and mean of the generator, all origins 0."""
        total = torch.zeros_like(self.generator.scale, dtype=torch.float64)
        power, n = torch.zeros_like(total), 0
        for batch in batches:
            power += batch.image.double().square().sum(0)
            total += batch.image.double().sum(0)
            n += len(batch)
        per_ring = self._by_ring(power.sum(0).float() / n)
        self.noise_variance.copy_((per_ring / self.polar.noise_dof).clamp(min=1e-6))
        rms = (per_ring / self._by_ring(torch.full_like(per_ring[self.polar.ring], 2.0))).sqrt()
        unturned = (self.polar.order == 0).float()
        self.generator.scale.copy_(
            rms[self.polar.ring] * torch.stack([torch.ones_like(unturned), 1.0 - unturned])
        )
        self.generator.mean.zero_()
        self.generator.mean[0] = unturned * (total[0] / n).float()
        self.origin_px = self.origin_px.new_zeros(n_particles, 2)

    def begin_epoch(self, epoch: int, n_epochs: int) -> None:
        """KL weight, and step of the origin search from the prior's width down to ``FINEST_STEP_PX``."""
        self.kl_weight = min(1.0, (epoch + 1) / (KL_WARM_UP * n_epochs))
        done = min(1.0, epoch / max(1.0, NARROWING * n_epochs))
        widest = max(FINEST_STEP_PX, self.config.max_shift_px / 2)
        self.search_step_px = widest ** (1.0 - done) * FINEST_STEP_PX**done

    def elbo(self, batch: Batch) -> ElboTerms:
        """Bound per particle; moves the particles' origins and, while training, the running averages."""
        with torch.no_grad(), torch.autocast(batch.image.device.type, enabled=False):
            here, offsets = self._trial_origins(batch.index)
            look, centred = self._look(batch, here, offsets)
        mean, log_std = self._encode(centred)
        origins = here[:, None] + offsets
        log_prior = self._log_prior(origins, self.search_step_px)
        mean = mean + self._improvement(look, log_prior, mean.detach(), log_std.detach())
        content = self.generator(mean + torch.randn_like(mean) * log_std.exp())
        with torch.no_grad(), torch.autocast(batch.image.device.type, enabled=False):
            pose = look.posterior(content, log_prior)
            expected = ((pose.aligned - 0.5 * pose.filtered) * content).sum((1, 2))
            residual = pose.aligned - pose.filtered
            if self.training:
                self._learn(batch, content, pose, origins)
            self._move(batch.index, pose, origins)
        # The value is ``expected``; the gradient is that of the log evidence (see pose_posterior).
        slope = (residual * (content - content.detach())).sum((1, 2))
        kl_z = 0.5 * (mean.square() + torch.exp(2.0 * log_std) - 1.0 - 2.0 * log_std).sum(-1)
        return ElboTerms(self._empty_image(batch) + expected + slope, kl_z, pose.kl.clamp(min=0.0))

    @torch.no_grad()
    def _improvement(
        self,
        look: Look,
        log_prior: Float[Tensor, "b t"],
        mean: Float[Tensor, "b d"],
        log_std: Float[Tensor, "b d"],
    ) -> Float[Tensor, "b d"]:
        """A step of q's mean up the log posterior of z: its slope, scaled by q's variance, to the
        top of the Gauss-Newton parabola along it. It costs one generator pass forth and two back.
        """
        with torch.autocast(mean.device.type, enabled=False):
            content, pull_back = torch.func.vjp(self.generator, mean)
            pose = look.posterior(content, log_prior)
            (slope,) = pull_back(pose.aligned - pose.filtered)
            slope = slope - mean
            direction = slope * torch.exp(2.0 * log_std)
            _, along = torch.func.jvp(self.generator, (mean,), (direction,))
            bend = (look.filtered(along, pose.probability.sum(1)) * along).sum((1, 2)) + direction.square().sum(1)
            length = (slope * direction).sum(1) / bend.clamp(min=1e-12)
            return direction * length[:, None]

    def decode(self, z: Float[Tensor, "k d"]) -> Float[Tensor, "k n n"]:
        """Generated images at pose zero, CTF-free, white particle, inside the soft disc."""
        return self.polar.image(self.generator(z))

    # -- what a batch looks like -------------------------------------------------------------

    @property
    def _shifts(self) -> bool:
        return self.config.max_shift_px > 0.0

    def _by_ring(self, values: Float[Tensor, "p"]) -> Float[Tensor, "r"]:
        return torch.zeros_like(self.noise_variance).index_add_(0, self.polar.ring, values)

    def _trial_origins(self, index: Int[Tensor, "b"]) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "t 2"]]:
        """Where the particles are now, and jittered offsets around it."""
        device = self.origin_px.device
        if not self._shifts:
            return torch.zeros(len(index), 2, device=device), torch.zeros(1, 2, device=device)
        jitter = torch.rand(2, device=device) - 0.5
        return self.origin_px[index], (disc_of_points(2.0, device) + jitter) * self.search_step_px

    def _ctf(self, batch: Batch) -> Float[Tensor, "b r a"]:
        """CTF on the polar samples; one angle where it is round, and 1 without CTF."""
        device = self.noise_variance.device
        table = batch.ctf
        if table is None:
            return torch.ones(len(batch), self.polar.n_rings, 1, device=device)
        mean = (table.defocus_u_angst + table.defocus_v_angst) / 2
        half = (table.defocus_u_angst - table.defocus_v_angst).abs() / 2
        wavelength = electron_wavelength_angst(table.voltage_kv)
        differs = math.pi * wavelength * half / (2.0 * table.pixel_size_angst) ** 2
        if float(differs.max()) <= ASTIGMATIC_RAD:
            table, n_angles = replace(table, defocus_u_angst=mean, defocus_v_angst=mean), 1
        else:
            n_angles = self.polar.n_angles
        radius = torch.arange(self.polar.n_rings, device=device)[:, None] / self.box_px
        phi = 2.0 * math.pi / n_angles * torch.arange(n_angles, device=device)
        return ctf_at(table, torch.stack([radius * torch.cos(phi), radius * torch.sin(phi)], -1)).float()

    def _look(
        self, batch: Batch, here: Float[Tensor, "b 2"], offsets: Float[Tensor, "*each t 2"]
    ) -> tuple[Look, Float[Tensor, "b 2 p"]]:
        """Particles at trial origins here + offsets, and their filtered coefficients h y / sigma² at ``here``."""
        polar, images = self.polar, batch.image.float()
        ctf = self._ctf(batch)
        by_variance = ctf / self.noise_variance[:, None]
        power = ctf * by_variance
        if not self._shifts and ctf.shape[-1] == 1:
            centred = images * by_variance[:, None, polar.ring, 0]
            return Look(polar, polar.dense(centred)[:, None], power), centred
        samples = polar.shift(polar.samples(images), here) * by_variance
        spectra = polar.shifted_spectra(samples, offsets)
        return Look(polar, spectra, power), polar.pack(polar.spectra(samples))

    def _encode(self, centred: Float[Tensor, "b 2 p"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        mean, log_std = self.encoder(centred * self.noise_variance[self.polar.ring].sqrt())
        return mean.float(), log_std.float()

    def _log_prior(
        self, origins: Float[Tensor, "b t 2"], step_px: Float[Tensor, "*b"] | float
    ) -> Float[Tensor, "b t"]:
        """Log prior mass of origins that stand for squares of a side of step_px; all 0 without shifts."""
        if not self._shifts:
            return origins.new_zeros(origins.shape[:2])
        density = -0.5 * origins.square().sum(-1) / self.shift_variance - torch.log(
            2.0 * math.pi * self.shift_variance
        )
        mass = density + 2.0 * torch.log(torch.as_tensor(step_px, device=origins.device))[..., None]
        return mass - torch.logsumexp(mass, 1, keepdim=True).clamp(min=0.0)

    def _empty_image(self, batch: Batch) -> Float[Tensor, "b"]:
        """Log likelihood of each image as noise alone, nats."""
        variance = self.noise_variance
        whitened = batch.image.float().square() / variance[self.polar.ring]
        constant = (self.polar.noise_dof * torch.log(2.0 * math.pi * variance)).sum()
        return -0.5 * whitened.sum((1, 2)) - 0.5 * constant

    # -- what is learned without gradients ---------------------------------------------------

    def _learn(
        self,
        batch: Batch,
        content: Float[Tensor, "b 2 p"],
        pose: PosePosterior,
        origins: Float[Tensor, "b t 2"],
    ) -> None:
        """Running averages: residual power of each ring, origin variance, energy of a particle."""
        explained = (2.0 * pose.aligned - pose.filtered) * content
        residual = batch.image.float().square() - explained * self.noise_variance[self.polar.ring]
        power = self._by_ring(residual.sum((0, 1))) / (len(batch) * self.polar.noise_dof)
        self.noise_variance.lerp_(power.clamp(min=1e-6), 1.0 - MEMORY)
        self.signal_energy.lerp_((pose.filtered * content).sum((1, 2)).mean(), 1.0 - MEMORY)
        if self._shifts and self.config.shift_std_px is None:
            second = (pose.probability.sum(-1) * origins.square().sum(-1)).sum(1).mean() / 2
            self.shift_variance.lerp_(second.clamp(min=0.01), 1.0 - MEMORY)

    def _move(self, index: Int[Tensor, "b"], pose: PosePosterior, origins: Float[Tensor, "b t 2"]) -> None:
        if self._shifts:
            self.origin_px[index] = self._within(self._mean_origin(pose, origins))

    def _within(self, origin: Float[Tensor, "b 2"]) -> Float[Tensor, "b 2"]:
        length = origin.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        return origin * (self.config.max_shift_px / length).clamp(max=1.0)

    @staticmethod
    def _mean_origin(pose: PosePosterior, origins: Float[Tensor, "b t 2"]) -> Float[Tensor, "b 2"]:
        return (pose.probability.sum(-1)[..., None] * origins).sum(1)

    # -- inference ---------------------------------------------------------------------------

    @torch.no_grad()
    def infer(self, batch: Batch) -> Posterior:
        """Exact posteriors: coarse-to-fine origins, Newton steps and importance points for z."""
        with torch.autocast(batch.image.device.type, enabled=False):
            training = self.training
            self.eval()
            posterior = self._infer(batch)
            self.train(training)
        return posterior

    def _infer(self, batch: Batch) -> Posterior:
        here, z, step = self._first_guess(batch)
        offsets = disc_of_points(2.3, here.device) if self._shifts else here.new_zeros(1, 2)
        trials = offsets * step[:, None, None]
        look, _ = self._look(batch, here, trials)
        origins = here[:, None] + trials
        log_prior = self._log_prior(origins, step)
        mode, root = newton_mode(z, lambda at: self._local_model(at, look, log_prior))
        points = importance_points(self.z_dim).to(mode)
        weights, probability = [], torch.zeros_like(look.spectra[:, :, 0, 0].real)[..., None]
        top = torch.full_like(step, -math.inf)
        for point in points:
            at = mode + root @ point
            pose = look.posterior(self.generator(at), log_prior)
            log_proposal = -0.5 * (point / INFLATION).square().sum()
            log_weight = pose.log_evidence - 0.5 * at.square().sum(1) - log_proposal
            weights.append(log_weight)
            new_top = torch.maximum(top, log_weight)
            probability = (
                probability * torch.exp(top - new_top)[:, None, None]
                + pose.probability * torch.exp(log_weight - new_top)[:, None, None]
            )
            top = new_top
        log_weights = torch.stack(weights, 1)
        weight = torch.softmax(log_weights, 1)
        at = mode[:, None] + points @ root.mT
        z_mean = (weight[..., None] * at).sum(1)
        z_std = (weight[..., None] * (at - z_mean[:, None]).square()).sum(1).sqrt()
        log_volume = torch.linalg.slogdet(root).logabsdet + self.z_dim * math.log(INFLATION)
        log_evidence = torch.logsumexp(log_weights, 1) - math.log(len(points)) + log_volume
        probability = probability / probability.sum((1, 2), keepdim=True)
        psi, psi_std, second = summarise_angle(probability.sum(1))
        by_origin = probability.sum(2)
        origin = (by_origin[..., None] * origins).sum(1)
        spread = (by_origin * (origins - origin[:, None]).square().sum(-1)).sum(1) / 2
        return Posterior(
            z_mean=z_mean,
            z_std=z_std,
            psi_rad=wrap_radians(psi),
            psi_std_rad=psi_std,
            origin_px=origin,
            origin_std_px=spread.sqrt(),
            figure_of_merit=2.0 * log_evidence / self.signal_energy.clamp(min=1e-3),
            log_likelihood=self._empty_image(batch) + log_evidence,
            second_mode=second,
        )

    def _first_guess(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b d"], Float[Tensor, "b"]]:
        """Origins, encoded z, and the step of a grid of origins that covers the posterior."""
        nowhere = torch.zeros(len(batch), 2, device=self.origin_px.device)
        if not self._shifts:
            look, centred = self._look(batch, nowhere, nowhere[:1])
            return nowhere, self._encode(centred)[0], nowhere[:, 0]
        here = self._coarse_origins(batch, nowhere)
        offsets = disc_of_points(2.0, here.device)
        step = COARSE_STEP_PX / 2
        for _ in range(2):
            look, centred = self._look(batch, here, offsets * step)
            z = self._encode(centred)[0]
            origins = here[:, None] + offsets * step
            pose = look.posterior(self.generator(z), self._log_prior(origins, step))
            here = self._within(self._mean_origin(pose, origins))
        by_origin = pose.probability.sum(-1)
        spread = (by_origin * (origins - here[:, None]).square().sum(-1)).sum(1) / 2
        _, centred = self._look(batch, here, nowhere[:1])
        return here, self._encode(centred)[0], (0.8 * spread.sqrt()).clamp(0.15, 1.0)

    def _coarse_origins(self, batch: Batch, nowhere: Float[Tensor, "b 2"]) -> Float[Tensor, "b 2"]:
        """Best of a grid over the whole disc of origins, for a few contents drawn from the prior."""
        offsets = disc_of_points(self.config.max_shift_px / COARSE_STEP_PX, nowhere.device) * COARSE_STEP_PX
        look, _ = self._look(batch, nowhere, offsets)
        log_prior = self._log_prior(offsets.expand(len(batch), -1, -1), COARSE_STEP_PX)
        contents = self.generator(importance_points(self.z_dim).to(nowhere)[:COARSE_CONTENTS])
        scores = torch.stack(
            [
                torch.logsumexp(
                    look.inner(c.expand(len(batch), -1, -1))
                    - 0.5 * look.energy(c.expand(len(batch), -1, -1))[:, None],
                    -1,
                )
                for c in contents
            ]
        )
        best = (torch.logsumexp(scores, 0) + log_prior).argmax(1)
        return offsets[best]

    def _local_model(
        self, z: Float[Tensor, "b d"], look: Look, log_prior: Float[Tensor, "b t"]
    ) -> LocalModel:
        content, slopes = self._content_and_slopes(z)
        pose = look.posterior(content, log_prior)
        gradient = torch.einsum("dbcp,bcp->bd", slopes, pose.aligned - pose.filtered)
        psi = pose.probability.sum(1)
        filtered = torch.stack([look.filtered(slope, psi) for slope in slopes])
        curvature = torch.einsum("dbcp,ebcp->bde", slopes, filtered)
        scores = torch.stack([look.inner(slope) for slope in slopes], 1)
        mean = (pose.probability[:, None] * scores).sum((2, 3))
        centred = (scores - mean[..., None, None]).flatten(2)
        missing = (centred * pose.probability.flatten(1)[:, None]) @ centred.mT
        return LocalModel(pose.log_evidence, gradient, curvature, missing)

    def _content_and_slopes(
        self, z: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, "b 2 p"], Float[Tensor, "d b 2 p"]]:
        """Generated coefficients, and their derivatives by each component of z."""
        slopes = []
        for unit in torch.eye(self.z_dim, device=z.device):
            content, slope = torch.func.jvp(self.generator, (z,), (unit.expand_as(z),))
            slopes.append(slope)
        return content, torch.stack(slopes)
