"""The steerable engine: a spatial-VAE in polar Fourier space whose pose is summed out exactly.

The generator maps z to the angular coefficients of an image, a function of polar coordinates; a
rotation multiplies them by phases, so that one short FFT scores an image at every angle. The bound
is log sum over poses p(pose) p(y | z, pose) - KL(q(z | y) || N(0, I)), with the pose summed out on
a grid (all angles, times origins around the particle's current one) and z sampled once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cryo_svae.computing import distributed
from cryo_svae.config import check, derived
from cryo_svae.imaging.ctf import ctf_at
from cryo_svae.imaging.polar import PolarTransform
from cryo_svae.models.band import is_within
from cryo_svae.models.engine import (
    Batch,
    ElboTerms,
    Engine,
    Posterior,
    TrainingDefaults,
    own_precision,
)
from cryo_svae.models.invariant_encoder import InvariantEncoder
from cryo_svae.models.own_noise import OwnNoise
from cryo_svae.models.own_scale import OwnScale
from cryo_svae.models.polar_generator import PolarGenerator
from cryo_svae.models.pose_posterior import (
    LOG_IMPOSSIBLE,
    Look,
    PosePosterior,
    disc_of_points,
    mean_origin,
    rotations_within,
)
from cryo_svae.models.posterior_search import FINER_ANGLES, PosteriorSearch
from cryo_svae.models.refinement import FARTHEST_Z

KL_WARM_UP = 0.4  # share of the epochs in which the weight of the KL terms rises from 0 to 1
NARROWING = 0.5  # share of the epochs in which the origin search narrows
MEMORY = 0.98  # of the running averages of the noise and shift variances, per batch
FINEST_STEP_PX = 0.5  # of the origin search while training; the grid is jittered
TRIALS = 2.0  # radius of the grid of trial origins, in steps: 13 of them
LEAST_SCALE = 0.1  # of the generator, over the data's rms; more makes rings without signal noisy
FARTHEST_STEP = 1.0  # of a step of q's mean, standard deviations of the prior
MOST_SNR = 10.0  # of a ring, in undoing the CTF for the encoder: its noise grows at most 1.7-fold
FIRST_RINGS = 0.5  # share of the rings that training begins with
GROUPS = 100  # of alike particles in a set; where the mean of one is noise, there is nothing to learn
MARGIN = 2  # rings beyond the last that show signal, so that more can come
CONTENTS = 3  # independent images that the set's content is priced as, by its prior
KNOWN = 64  # contents kept, with which new particles are first compared
KNOWN_ANEW = 2  # of them taken from each batch
NEAR_RINGS = 5  # over which the generator's scale is smoothed
SAMPLED = 4096  # particles whose noise is found before anything else
ROUNDS = 12  # of weights by the noise and noise by the weights
LEAST_CTF_POWER = 0.01  # mean square of the CTF; rings that let less through are taken as this


@dataclass(frozen=True, kw_only=True)
class SteerableConfig:
    """The steerable engine."""

    epochs: int = derived(20, "passes over the particles")
    batch_size: int = derived(128, "particles in a step")
    learning_rate: float = derived(2e-3, "peak learning rate of Adam")
    max_shift_px: float = derived(4.0, "largest origin searched, in pixels; 0 for centred particles")
    shift_std_px: float | None = derived(None, "standard deviation of origins in pixels; learned if None")
    mask_radius_px: float = derived(math.inf, "radius of the soft disc that holds the particle, in pixels")
    lowest_resolution_px: float | None = derived(None, "longest wavelength compared, in pixels")
    highest_resolution_px: float | None = derived(None, "shortest wavelength compared, in pixels")
    psi_range_rad: float | None = derived(None, "largest rotation searched, either way; all if None")
    schedule: ClassVar[str] = "one-cycle"

    def __post_init__(self) -> None:
        check(self.max_shift_px >= 0.0, "max_shift_px", self.max_shift_px, "pixels, 0 or more")
        std_ok = self.shift_std_px is None or self.shift_std_px > 0.0
        check(std_ok, "shift_std_px", self.shift_std_px, "pixels above 0")
        check(self.mask_radius_px > 0.0, "mask_radius_px", self.mask_radius_px, "pixels above 0")


class SteerableEngine(Engine):
    """See the module's docstring; the interface is ``engine.Engine``.

    n_rings:        rings looked at, from the centre; grows with the resolution of what is learned.
    noise_variance: of each ring (r,), per pixel; a running average of the posterior residuals.
    signal_power:   of each ring (r,), per pixel; a running average of the generated content.
    shift_variance: of each component of the origin, px².
    signal_energy:  running average of <h² c / sigma², c>, the log evidence scale of a particle.
    origin_px:      current origin of each training particle (n, 2).
    own_weight:     weights of each training particle in bands of rings (n, k), see ``own_noise``.
    own_scale:      scale of the content of each training particle (n,), see ``own_scale``.
    compared:       1 for rings within the bounds of resolution (r,), 0 for the others.
    level:          coefficients of the soft disc itself (2, p); the imaginary ones are 0.
    mean_level:     of the training images, in units of the disc.
    noise_dof:      how many independent numbers white noise has on each ring (r,), the level taken off.
    known_z:        contents of some training particles (k, d), seen last.
    search_step_px: spacing of the trial origins.
    around:         trial origins (t, 2) in such steps.
    """

    training_defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        epochs=(10, 60),
        images=250_000,
        batch_size=128,
        learning_rate=2e-3,
        schedule="one-cycle",
        largest_batch=2048,
        batch_bytes=350,
    )
    largest_box_px: ClassVar[int] = 128
    tables: ClassVar[tuple[str, ...]] = ("origin_px", "own_weight", "own_scale")

    compared: Tensor
    level: Tensor
    mean_level: Tensor
    noise_dof: Tensor
    n_rings: Tensor
    noise_variance: Tensor
    shift_variance: Tensor
    signal_power: Tensor
    signal_energy: Tensor
    origin_px: Tensor
    own_weight: Tensor
    own_scale: Tensor
    known_z: Tensor
    kl_weight: Tensor
    search_step_px: Tensor
    around: Tensor

    def __init__(self, box_px: int, z_dim: int, config: SteerableConfig) -> None:
        super().__init__()
        self.box_px, self.z_dim, self.config = box_px, z_dim, config
        self.mask_radius_px = min(config.mask_radius_px, box_px / 2)
        self.full = PolarTransform(box_px, self.mask_radius_px, config.max_shift_px)
        self.polar = self.full
        bounds = (config.lowest_resolution_px, config.highest_resolution_px)
        compared = is_within(torch.arange(self.full.n_rings) / box_px, *bounds)
        self.register_buffer("compared", compared, persistent=False)
        n_compared = int(compared.sum())
        self.most_rings = 1 + int(compared.nonzero().max())
        self.first_rings = self.most_rings - n_compared + math.ceil(FIRST_RINGS * n_compared)
        disc = self.represent(torch.ones(1, box_px, box_px))[0, 0] * (self.full.order == 0)
        self.register_buffer("level", torch.stack([disc, torch.zeros_like(disc)]), persistent=False)
        self.register_buffer("mean_level", torch.tensor(0.0))
        taken = torch.zeros(self.full.n_rings).index_add_(0, self.full.ring, disc.square())
        left = self.full.noise_dof - taken / taken.sum()
        self.register_buffer("noise_dof", torch.maximum(left, 0.1 * self.full.noise_dof), persistent=False)
        self.encoder = InvariantEncoder(self.full, z_dim)
        self.generator = PolarGenerator(self.full, z_dim)
        std = config.max_shift_px / 2 if config.shift_std_px is None else config.shift_std_px
        self.register_buffer("n_rings", torch.tensor(self.full.n_rings))
        self.register_buffer("noise_variance", torch.ones(self.full.n_rings))
        self.register_buffer("shift_variance", torch.tensor(std**2))
        self.register_buffer("signal_power", torch.zeros(self.full.n_rings))
        self.register_buffer("signal_energy", torch.tensor(1.0))
        self.register_buffer("origin_px", torch.zeros(0, 2))
        self.own = OwnNoise(self.compared * self.noise_dof)
        self.register_buffer("own_weight", torch.ones(0, self.own.n_bands))
        self.scales = OwnScale()
        self.register_buffer("own_scale", torch.ones(0))
        self.register_buffer("known_z", torch.randn(KNOWN, z_dim))
        self.register_buffer("kl_weight", torch.tensor(1.0), persistent=False)
        self.register_buffer("search_step_px", torch.tensor(FINEST_STEP_PX), persistent=False)
        around = disc_of_points(TRIALS if config.max_shift_px > 0.0 else 0.0, self.origin_px.device)
        self.register_buffer("around", around, persistent=False)
        self.search = PosteriorSearch(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        table = state_dict.get(prefix + "origin_px")
        if table is not None:  # as many rows as the particles it was trained on
            self.origin_px = self.origin_px.new_zeros(table.shape)
            self.own_weight = self.own_weight.new_ones(len(table), self.own.n_bands)
            # models of earlier versions have none
            state_dict.setdefault(prefix + "own_weight", self.own_weight)
            self.own_scale = self.own_weight.new_ones(len(table))
            state_dict.setdefault(prefix + "own_scale", self.own_scale)
            state_dict.setdefault(prefix + "scales.variance", self.scales.variance)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._look_as_far_as(int(self.n_rings))

    @staticmethod
    def near_known_poses(
        config: SteerableConfig, psi_range_rad: float, max_shift_px: float
    ) -> SteerableConfig:
        """Uniform rotations within the range, and origins no farther than the largest shift."""
        return replace(config, psi_range_rad=psi_range_rad, max_shift_px=max_shift_px)

    def stay_near(self, psi_range_rad: float, max_shift_px: float) -> None:
        """The search for posteriors, and its grids, go no farther; nor than the model was trained to."""
        super().stay_near(psi_range_rad, min(max_shift_px, self.config.max_shift_px))
        self.search = PosteriorSearch(self)

    def represent(self, images: Float[Tensor, "b n n"]) -> Float[Tensor, "b 2 p"]:
        """Packed angular coefficients of prepared images; 0 on rings that are not compared."""
        return self.full.forward(images) * self.compared[self.full.ring]

    def start(self, batches: Iterator[Batch], n_particles: int) -> None:
        """Noise from the rings' power, scale and mean of the generator from the data, all origins 0."""
        self._look_as_far_as(self.full.n_rings)
        polar, ring = self.polar, self.polar.ring
        power, passed = torch.zeros_like(self.noise_variance), torch.zeros_like(self.noise_variance)
        plain, total = torch.zeros_like(self.generator.mean), torch.zeros_like(self.generator.mean)
        level, n = torch.zeros_like(self.mean_level), 0
        through, trusted = torch.zeros_like(passed), torch.zeros_like(passed)
        self.mean_level.zero_()
        self.own_weight = self.own_weight.new_ones(n_particles, self.own.n_bands)
        self.own_scale = self.own_scale.new_ones(n_particles)
        sample = list(self._sampled(batches))
        self._start_noise(sample)
        for batch in itertools.chain(sample, batches):
            own = slice(batch.n_own)
            ctf, image = self._ctf(batch, polar).mean(-1)[own], self._seen(batch, polar)[own]
            weight = self.own.weight(self.ring_power(batch)[own] / self.noise_variance)
            self.own_weight[batch.index[own]] = weight
            trust = self.own.of_rings(weight, polar.n_rings)
            believed = image * trust[:, None, ring]
            level += self._levels(batch)[own].sum()
            plain += believed.sum(0)
            power += polar.ring_sum((image * believed).sum((0, 1)))
            passed += (trust * ctf.square()).sum(0)
            through += (trust * ctf).sum(0)
            trusted += trust.sum(0)
            total += (believed * ctf[:, None, ring]).sum(0)
            n += batch.n_whole
        sums = distributed.totals(power, passed, total, plain, level, through, trusted)
        power, passed, total, plain, level, through, trusted = sums
        self.mean_level.copy_(level / n)
        # so far the images were summed without any level
        risen = self.mean_level * self.level[0]
        power = power + polar.ring_sum(2.0 * risen * plain[0] + trusted[ring] * risen.square())
        total[0] += risen * through[ring]
        self.noise_variance.copy_(self.own.variance(power, trusted, self.noise_dof))
        # Before its CTF, content is as much larger as the CTF is small.
        passed = passed.clamp(min=LEAST_CTF_POWER * n)
        unturned = (polar.order == 0).float()
        mean = total / passed[ring] * unturned
        # The mean over all turns shows each ring's signal free of noise; a learning step in
        # proportion to it, and not to the noise, keeps rings without signal quiet.
        signal = nn.functional.avg_pool1d(
            self.polar.ring_sum(mean.square().sum(0))[None],
            NEAR_RINGS,
            1,
            NEAR_RINGS // 2,
            count_include_pad=False,
        )[0]
        power = power / (self.polar.ring_sum(2.0 - unturned) * passed)
        scale = torch.minimum(signal + LEAST_SCALE**2 * power, power).sqrt()[ring]
        self.generator.scale.copy_(torch.stack([scale, scale * (1.0 - unturned)]))
        self.generator.mean.copy_(mean)
        self.generator.start_prior(self.noise)
        self.origin_px = self.origin_px.new_zeros(n_particles, 2)
        self._look_as_far_as(self.first_rings)

    def _sampled(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The first batches, of ``SAMPLED`` particles in all."""
        n = 0
        while n < SAMPLED and (batch := next(batches, None)) is not None:
            n += batch.n_whole
            yield batch

    def _start_noise(self, sample: list[Batch]) -> None:
        """Noise variance that is not bent by a few strong outliers, no content known yet."""
        power = torch.cat([self.ring_power(batch)[: batch.n_own] for batch in sample])
        trust = torch.ones_like(power)
        for _ in range(ROUNDS):
            total, trusted = distributed.totals((trust * power).sum(0), trust.sum(0))
            self.noise_variance.copy_(self.own.variance(total, trusted, self.noise_dof))
            trust = self.own.of_rings(self.own.weight(power / self.noise_variance), power.shape[1])

    def begin_epoch(self, epoch: int, n_epochs: int) -> None:
        """KL weight, step of the origin search from the prior's width down to ``FINEST_STEP_PX``, rings."""
        self.kl_weight.fill_(min(1.0, (epoch + 1) / (KL_WARM_UP * n_epochs)))
        done = min(1.0, epoch / max(1.0, NARROWING * n_epochs))
        widest = max(FINEST_STEP_PX, self.config.max_shift_px / 2)
        self.search_step_px.fill_(widest ** (1.0 - done) * FINEST_STEP_PX**done)
        if epoch > 0 and not torch.isinf(self.own.strength).any():
            self.own.learn_strength(self.own_weight)
        self._march()

    @property
    def stage(self) -> int:
        """How many rings are looked at."""
        return self.polar.n_rings

    def _march(self) -> None:
        """Looks ``MARGIN`` rings beyond the last whose signal a group of particles would show."""
        enough = self.signal_power > GROUPS / max(1, len(self.origin_px)) * self.noise_variance
        last = int(enough.nonzero().max()) if bool(enough.any()) else 0
        wanted = min(last + 1 + MARGIN, self.most_rings)
        if wanted > self.polar.n_rings:
            self._look_as_far_as(wanted)

    def _look_as_far_as(self, n_rings: int) -> None:
        """Compares and generates rings 0 … n_rings - 1; the rest is taken as noise."""
        self.polar = self.full
        self.polar = self.coarser(n_rings)
        self.n_rings.fill_(self.polar.n_rings)
        self.generator.n_pairs = self.polar.n_pairs
        self.search = PosteriorSearch(self)

    def coarser(self, n_rings: int) -> PolarTransform:
        """The transform of the inner rings, of those looked at."""
        if n_rings >= self.polar.n_rings:
            return self.polar
        shape = (self.box_px, self.mask_radius_px, self.config.max_shift_px)
        return PolarTransform(*shape, n_rings).to(self.noise_variance.device)

    @property
    def noise(self) -> Float[Tensor, "r"]:
        """Noise variance of the rings looked at."""
        return self.noise_variance[: self.polar.n_rings]

    def elbo(self, batch: Batch) -> ElboTerms:
        """Bound per particle; moves the particles' origins and, while training, the running averages."""
        with torch.no_grad(), own_precision(batch.image):
            here, offsets = self._trial_origins(batch.index)
            weight, power = self.own_weight[batch.index], self.ring_power(batch)
            scale = self.own_scale[batch.index]
            look, restored = self.look(
                batch, here, offsets, weight=weight, scale=scale, rounded=self.training
            )
        mean, log_std = self.encode(restored)
        origins = here[:, None] + offsets
        log_prior = self.log_prior(origins, self.search_step_px)
        mean = mean + self._improvement(look, log_prior, mean.detach(), log_std.detach())
        content = self.generator(mean + batch.draw(torch.randn, mean) * log_std.exp())
        with torch.no_grad(), own_precision(batch.image):
            pose = look.posterior(content, log_prior)
            agreement = (pose.aligned * content).sum((1, 2))
            energy = (pose.filtered * content).sum((1, 2))
            expected = agreement - 0.5 * energy
            residual = pose.aligned - pose.filtered
            scale, scale_variance = self.scales.found(agreement / scale, energy / scale.square())
            expected = expected + self.scales.log_prior(scale, scale_variance)
            unexplained = self.unexplained(power, content, pose.aligned, pose.filtered, weight)
            if self.training:
                second_moment = (scale - 1.0).square() + scale_variance
                self._learn(batch, content, pose, origins, weight, unexplained, energy, second_moment)
                self.known_z.copy_(torch.cat([self.known_z, batch.first(mean, KNOWN_ANEW)])[-KNOWN:])
            self._move(batch, pose, origins)
            own = slice(batch.n_own)
            self.own_weight[batch.index[own]] = self.own.weight(unexplained[own] / self.noise_variance)
            self.own_scale[batch.index[own]] = scale[own]
        # The value is ``expected``; the gradient is that of the log evidence (see pose_posterior), and
        # of the log prior of the content.
        if self.training:
            price = self.kl_weight * CONTENTS / max(1, len(self.origin_px))
            residual = residual - self.generator.prior_pull(content.detach(), self.noise, price)
        slope = (residual * (content - content.detach())).sum((1, 2))
        kl_z = 0.5 * (mean.square() + torch.exp(2.0 * log_std) - 1.0 - 2.0 * log_std).sum(-1)
        return ElboTerms(self.empty_image(power, weight) + expected + slope, kl_z, pose.kl.clamp(min=0.0))

    @torch.no_grad()
    def _improvement(
        self,
        look: Look,
        log_prior: Float[Tensor, "b t"],
        mean: Float[Tensor, "b d"],
        log_std: Float[Tensor, "b d"],
    ) -> Float[Tensor, "b d"]:
        """A step of q's mean up the log posterior of z: its slope, scaled by q's variance, to the
        top of the Gauss-Newton parabola along it, but no farther than ``FARTHEST_STEP``: where the
        parabola is a poor picture, long steps drove z apart and whole runs into collapse. It costs
        one generator pass forth and two back.
        """
        with own_precision(mean):
            with torch.enable_grad():
                z = mean.requires_grad_()
                content = self.generator(z)
            pose = look.posterior(content.detach(), log_prior)
            (slope,) = torch.autograd.grad(content, z, pose.aligned - pose.filtered)
            slope = slope - mean
            direction = slope * torch.exp(2.0 * log_std)
            _, along = self.generator.along(mean, direction[None])
            filtered = look.filtered(along[0][:, None], pose.probability.sum(1))[:, 0]
            bend = (filtered * along[0]).sum((1, 2)) + direction.square().sum(1)
            length = (slope * direction).sum(1) / bend.clamp(min=1e-12)
            step = direction * length[:, None]
            step = step * (FARTHEST_STEP / step.norm(dim=1, keepdim=True)).clamp(max=1.0)
            better: Tensor = (mean + step).clamp(-FARTHEST_Z, FARTHEST_Z)
            return better - mean

    def decode(self, z: Float[Tensor, "k d"]) -> Float[Tensor, "k n n"]:
        """Generated images at pose zero, CTF-free, white particle, inside the soft disc."""
        return self.image_of(self.generator(z))

    def image_of(self, content: Float[Tensor, "k 2 p"]) -> Float[Tensor, "k n n"]:
        """Images of the coefficients of the rings looked at."""
        return self.full.image(nn.functional.pad(content, (0, self.full.n_pairs - content.shape[-1])))

    # -- what a batch looks like -------------------------------------------------------------

    @property
    def shifts(self) -> bool:
        """Whether particles may be off centre."""
        return bool(self.config.max_shift_px > 0.0)

    def _levels(self, batch: Batch) -> Float[Tensor, "b"]:
        """Level of each image inside the soft disc."""
        levels: Tensor = batch.image[:, 0].float() @ (self.level[0] / self.level.square().sum())
        return levels

    def _seen(self, batch: Batch, polar: PolarTransform) -> Float[Tensor, "b 2 p"]:
        """Coefficients of a transform's rings, of images brought to the set's mean level inside the disc.

        The level that the preparation takes for background is known from few pixels, and its error
        fills the whole disc: left in, it is the strongest variation of many sets, and z is spent on it.
        """
        excess = (self._levels(batch) - self.mean_level)[:, None, None]
        image = batch.image[..., : polar.n_pairs].float()
        return torch.addcmul(image, excess, self.level[:, : polar.n_pairs], value=-1.0)

    def _trial_origins(self, index: Int[Tensor, "b"]) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "t 2"]]:
        """Where the particles are now, and jittered offsets around it."""
        device = self.origin_px.device
        if not self.shifts:
            return torch.zeros(len(index), 2, device=device), self.around
        jitter = torch.rand(2, device=device) - 0.5
        return self.origin_px[index], (self.around + jitter) * self.search_step_px

    def _ctf(self, batch: Batch, polar: PolarTransform) -> Float[Tensor, "b r a"]:
        """CTF on the polar samples of half a turn; one angle where it is round, and 1 without CTF."""
        device = self.noise_variance.device
        table = batch.ctf
        if table is None:
            return torch.ones(len(batch), polar.n_rings, 1, device=device)
        n_angles = polar.n_angles // 2
        turns = bool(table.astigmatic.any()) if batch.astigmatic is None else batch.astigmatic
        if not turns:
            mean = (table.defocus_u_angst + table.defocus_v_angst) / 2
            table, n_angles = replace(table, defocus_u_angst=mean, defocus_v_angst=mean), 1
        radius = torch.arange(polar.n_rings, device=device)[:, None] / self.box_px
        phi = math.pi / n_angles * torch.arange(n_angles, device=device)
        return ctf_at(table, torch.stack([radius * torch.cos(phi), radius * torch.sin(phi)], -1)).float()

    def look(
        self,
        batch: Batch,
        here: Float[Tensor, "b 2"],
        offsets: Float[Tensor, "*each t 2"],
        polar: PolarTransform | None = None,
        weight: Float[Tensor, "b k"] | None = None,
        scale: Float[Tensor, "b"] | None = None,
        rounded: bool = False,
    ) -> tuple[Look, Float[Tensor, "b 2 p"]]:
        """Particles at trial origins here + offsets; and centred at ``here`` for the encoder.

        A coarser ``polar`` than the engine's looks at fewer rings; ``weight`` is that of each particle's
        own noise and ``scale`` that of its content, by default 1; ``rounded`` as in the transform's
        ``shifted_spectra``. The encoder is shown y / sigma (noise of variance 1) with its CTF undone as far
        as the ring's signal-to-noise ratio allows (Wiener).
        """
        polar = self.polar if polar is None else polar
        ring, variance = polar.ring, self.noise_variance[: polar.n_rings, None]
        trust = 1.0 if weight is None else self.own.of_rings(weight, polar.n_rings)[..., None]
        noise = variance / trust
        images, ctf = self._seen(batch, polar), self._ctf(batch, polar)
        if scale is not None:
            ctf = ctf * scale[:, None, None]
        by_variance = ctf / noise
        power = ctf * by_variance
        snr = (self.signal_power[: polar.n_rings, None] / variance).clamp(max=MOST_SNR)
        restore = (1.0 + snr) / (1.0 + snr * ctf.square()) * noise.sqrt()
        n_psi = polar.n_angles * (1 if self.training else FINER_ANGLES)
        if not self.shifts and ctf.shape[-1] == 1:
            centred = images * by_variance[:, None, ring, 0]
            spectra = polar.by_order(centred)[:, :, None]
            look = Look(polar, spectra, power, n_psi, self.log_prior_psi(n_psi))
            return look, centred * restore[:, None, ring, 0]
        samples = _both_halves(polar.shift(polar.samples(images), here), by_variance)
        restored = polar.pack(polar.spectra(_both_halves(samples, restore)))
        spectra = polar.shifted_spectra(samples, offsets, rounded)
        return Look(polar, spectra, power, n_psi, self.log_prior_psi(n_psi)), restored

    def encode(self, restored: Float[Tensor, "b 2 p"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Mean and log standard deviation of q(z | image)."""
        mean, log_std = self.encoder(self.polar.by_order(restored))
        return FARTHEST_Z * torch.tanh(mean.float() / FARTHEST_Z), log_std.float()

    def log_prior_psi(self, n_psi: int) -> Float[Tensor, "n"] | float:
        """Log prior mass of rotations psi_j = 2 pi j / n_psi: uniform within the range, or over all."""
        if self.config.psi_range_rad is None:
            return -math.log(n_psi)
        j = torch.arange(n_psi, device=self.noise_variance.device)
        reach = rotations_within(self.config.psi_range_rad, n_psi)
        inside = torch.minimum(j, n_psi - j) <= reach
        n_inside = min(2 * reach + 1, n_psi)
        return torch.where(inside, -math.log(n_inside), LOG_IMPOSSIBLE)

    def log_prior(
        self, origins: Float[Tensor, "b t 2"], step_px: Float[Tensor, "*b"] | float
    ) -> Float[Tensor, "b t"]:
        """Log prior mass of origins that stand for squares of a side of step_px; all 0 without shifts."""
        if not self.shifts:
            return origins.new_zeros(origins.shape[:2])
        density = -0.5 * origins.square().sum(-1) / self.shift_variance - torch.log(
            2.0 * math.pi * self.shift_variance
        )
        side = torch.log(step_px)[..., None] if isinstance(step_px, Tensor) else math.log(step_px)
        mass = density + 2.0 * side
        return mass - torch.logsumexp(mass, 1, keepdim=True).clamp(min=0.0)

    def empty_image(self, power: Float[Tensor, "b r"], weight: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
        """Log likelihood of images as noise of their own alone, and log prior of its weights, nats.

        power: of each ring of the images, see ``ring_power``.
        """
        variance = self.noise_variance / self.own.of_rings(weight, self.full.n_rings)
        constant = (self.compared * self.noise_dof * torch.log(2.0 * math.pi * variance)).sum(1)
        return self.own.log_prior(weight) - 0.5 * (power / variance).sum(1) - 0.5 * constant

    def ring_power(self, batch: Batch) -> Float[Tensor, "b r"]:
        """Sum of squares on each ring of images brought to the set's mean level."""
        return self.full.ring_sum(self._seen(batch, self.full).square().sum(1))

    def unexplained(
        self,
        power: Float[Tensor, "b r"],
        content: Float[Tensor, "b 2 p"],
        aligned: Float[Tensor, "b 2 p"],
        filtered: Float[Tensor, "b 2 p"],
        weight: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b r"]:
        """What is left of the rings' power when content is taken out, the posterior mean over poses.

        aligned, filtered: as in ``PosePosterior``, of a look with these weights.
        """
        explained = self.polar.ring_sum(((2.0 * aligned - filtered) * content).sum(1))
        explained = explained * self.noise / self.own.of_rings(weight, self.polar.n_rings)
        return power - nn.functional.pad(explained, (0, power.shape[1] - explained.shape[1]))

    # -- what is learned without gradients ---------------------------------------------------

    def _learn(
        self,
        batch: Batch,
        content: Float[Tensor, "b 2 p"],
        pose: PosePosterior,
        origins: Float[Tensor, "b t 2"],
        weight: Float[Tensor, "b k"],
        unexplained: Float[Tensor, "b r"],
        energy: Float[Tensor, "b"],
        scale_moment: Float[Tensor, "b"],
    ) -> None:
        """Running averages: residual power of each ring, variances of origins and scales, energy."""
        own, n = slice(batch.n_own), batch.n_whole
        trust = self.own.of_rings(weight, self.polar.n_rings)
        drawn = content.square() * trust.clamp(max=1.0)[:, None, self.polar.ring]
        power, trusted, content_power, total_energy, second, moment = batch.totals(
            (trust * unexplained[:, : self.polar.n_rings])[own].sum(0),
            trust[own].sum(0),
            drawn[own].sum((0, 1)),
            energy[own].sum(),
            (pose.probability.sum(-1) * origins.square().sum(-1))[own].sum(1).sum(),
            scale_moment[own].sum(),
        )
        dof = self.noise_dof[: self.polar.n_rings]
        signal = self.polar.ring_sum(content_power) / (n * dof)
        self.noise.lerp_(self.own.variance(power, trusted, dof), 1.0 - MEMORY)
        self.signal_power[: self.polar.n_rings].lerp_(signal, 1.0 - MEMORY)
        self.generator.learn_prior(content_power / n, self.noise, 1.0 - MEMORY)
        self.signal_energy.lerp_(total_energy / n, 1.0 - MEMORY)
        self.scales.learn(moment / n, 1.0 - MEMORY)
        if self.shifts and self.config.shift_std_px is None:
            self.shift_variance.lerp_((second / n / 2).clamp(min=0.01), 1.0 - MEMORY)

    def _move(self, batch: Batch, pose: PosePosterior, origins: Float[Tensor, "b t 2"]) -> None:
        if self.shifts:
            here = self.within_reach(mean_origin(pose.probability.sum(-1), origins)[0])
            self.origin_px[batch.index[: batch.n_own]] = here[: batch.n_own]

    def within_reach(self, origin: Float[Tensor, "b 2"]) -> Float[Tensor, "b 2"]:
        """Origins no longer than the largest shift."""
        length = origin.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        shortened: Tensor = origin * (self.config.max_shift_px / length).clamp(max=1.0)
        return shortened

    def infer(self, batch: Batch) -> Posterior:
        """Exact posteriors: coarse-to-fine origins, Newton steps and importance points for z."""
        training = self.training
        self.eval()
        with torch.no_grad(), own_precision(batch.image):
            posterior = self.search.posterior(batch)
        self.train(training)
        return posterior


def _both_halves(samples: Float[Tensor, "b r a"], values: Float[Tensor, "b r h"]) -> Float[Tensor, "b r a"]:
    """Samples times what repeats after half a turn, or is the same all around (h = 1)."""
    product: Tensor = samples.unflatten(-1, (2, -1)) * values[:, :, None]
    return product.flatten(-2)
