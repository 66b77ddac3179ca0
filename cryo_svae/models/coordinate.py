"""The paper's engine: an MLP on spatial coordinates and z (Bepler et al., NeurIPS 2019).

The generator maps (x, y, z) to the distribution of the pixel at (x, y). Rotation and shift act on
the coordinates: the pixel at p is decoded at q = R(theta) (p + o). One inference MLP gives means
and standard deviations of theta, o and z from the flattened image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryo_svae.computing import distributed
from cryo_svae.config import check, derived, option
from cryo_svae.errors import InputError
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import ctf_2d
from cryo_svae.models.band import band_2d, share_of_plane
from cryo_svae.models.coordinate_generator import CoordinateGenerator, mlp
from cryo_svae.models.divergences import kl_normal
from cryo_svae.models.engine import (
    Batch,
    ElboTerms,
    Engine,
    Posterior,
    TrainingDefaults,
    own_precision,
)
from cryo_svae.models.pixels import PixelKind, PixelLikelihood

FEWEST_FOR_BFLOAT16 = 64  # units of a hidden layer from which a CPU gains a fifth or more


@dataclass(frozen=True, kw_only=True)
class CoordinateConfig:
    """The paper's engines, coordinate and vanilla."""

    layers: int = option(2, "hidden layers of the generator and of the encoder")
    hidden: int = option(500, "units of a hidden layer of the generator (the paper: 500, real EM 1,000)")
    encoder_hidden: int = option(500, "units of a hidden layer of the encoder (the paper: 500 to 5,000)")
    activation: Literal["tanh", "relu"] = option("tanh", "activation of the hidden layers")
    pixels: PixelKind = option("gaussian", "distribution of a pixel; gaussian learns one spread")
    softplus: bool = option(False, "keep the mean of Gaussian pixels positive by a softplus")
    rotate: bool = option(True, "infer the rotation; --no-rotate fixes it at 0")
    translate: bool = option(True, "infer the shift; --no-translate fixes it at 0")
    rotation_prior: Literal["free-mean", "normal"] = option(
        "free-mean", "KL of the rotation: about a free mean (all angles alike), or about 0"
    )
    rotation_std_deg: float = option(180.0, "standard deviation of the rotation's prior in degrees")
    z_delay: int = option(2, "epochs for which z stays 0 at the start, so that pose is learned first")
    augment_rotation: bool = option(True, "turn the encoder's input by a random angle while training")
    pose_candidates: int = option(
        1, "turns of an image among which the encoder's best pose is taken (the paper: 1; 8 is surer)"
    )
    shift_std_px: float = derived(2.0, "standard deviation of the shift's prior in pixels")
    mask_radius_px: float = derived(math.inf, "radius of the circle of pixels modelled")
    lowest_resolution_px: float | None = derived(None, "longest wavelength compared, in pixels")
    highest_resolution_px: float | None = derived(None, "shortest wavelength compared, in pixels")
    channels: int = derived(1, "channels of the images; cryo-EM has one")

    def __post_init__(self) -> None:
        check(self.layers >= 1, "layers", self.layers, "1 or more")
        check(self.hidden >= 1, "hidden", self.hidden, "1 or more")
        check(self.encoder_hidden >= 1, "encoder_hidden", self.encoder_hidden, "1 or more")
        check(self.rotation_std_deg > 0, "rotation_std_deg", self.rotation_std_deg, "degrees above 0")
        check(self.z_delay >= 0, "z_delay", self.z_delay, "0 or more")
        check(self.pose_candidates >= 1, "pose_candidates", self.pose_candidates, "1 or more")
        check(self.shift_std_px > 0, "shift_std_px", self.shift_std_px, "pixels above 0")
        check(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        pixels_ok = not self.is_banded or self.pixels != "bernoulli"
        check(pixels_ok, "pixels", self.pixels, "Gaussian pixels where resolutions are bounded")

    @property
    def is_banded(self) -> bool:
        """Whether images are compared within bounds of resolution."""
        return self.lowest_resolution_px is not None or self.highest_resolution_px is not None


class Latents(NamedTuple):
    """Means and log standard deviations that the encoder gives, of psi (rad), origin x and y (px), z."""

    mean: Float[Tensor, "b latents"]
    log_std: Float[Tensor, "b latents"]


class _Seen(NamedTuple):
    """Images, the same with phases flipped where their CTF is negative, and the CTF where there is one.

    The CTF ends at the bounds of resolution; where these alone are there, it is 1 between them.
    """

    image: Float[Tensor, "b c n n"]
    flipped: Float[Tensor, "b c n n"]
    ctf: Float[Tensor, "b n half"] | None


class CoordinateEngine(Engine):
    """The spatial-VAE of the paper, with the CTF inside the generative model where there is one.

    Images (b, N, N), or (b, channels, N, N), are kept as they are. Without a CTF the pixels within
    the mask are modelled; with one the generator fills the mask, its image is multiplied by the
    CTF in Fourier space, and the pixels within the mask are compared. Bounds of resolution are a CTF
    of 0 beyond them, by which the images are multiplied too; then pixels are not independent, and
    their likelihood counts by the share of the frequencies that are left.
    """

    training_defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        epochs=(20, 200),
        images=500_000,
        batch_size=100,
        learning_rate=1e-4,
        schedule="constant",
        largest_batch=100,  # the paper's
        batch_bytes=8000,
    )
    largest_box_px: ClassVar[int] = 64

    band: Tensor
    inside: Tensor
    coordinates_px: Tensor
    unit: Tensor
    prior_std: Tensor
    mean_std: Tensor

    def __init__(self, box_px: int, z_dim: int, config: CoordinateConfig) -> None:
        super().__init__()
        self.box_px = box_px
        self.z_dim = z_dim
        self.config = config
        self.kl_weight = 1.0
        self.z_active = True
        band = band_2d(box_px, config.lowest_resolution_px, config.highest_resolution_px)
        self.register_buffer("band", band, persistent=False)
        self.share = share_of_plane(band)
        grid = geometry.pixel_grid(box_px).reshape(-1, 2)
        inside = torch.nonzero(grid.norm(dim=-1) <= config.mask_radius_px)[:, 0]
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("coordinates_px", grid[inside], persistent=False)
        self.pixels = PixelLikelihood(config.pixels, config.channels, config.softplus)
        shift, rotation = config.shift_std_px, geometry.radians(config.rotation_std_deg)
        self.register_buffer("unit", torch.tensor([1.0, shift, shift] + [1.0] * z_dim), persistent=False)
        prior_std = torch.tensor([rotation, shift, shift] + [1.0] * z_dim)
        self.register_buffer("prior_std", prior_std, persistent=False)
        mean_std = prior_std.clone()
        if config.rotation_prior == "free-mean":
            mean_std[0] = math.inf
        self.register_buffer("mean_std", mean_std, persistent=False)
        self.encoder = mlp(
            len(inside) * config.channels,
            config.encoder_hidden,
            2 * len(prior_std),
            config.layers,
            config.activation,
        )
        self.generator = self.build_generator()

    def build_generator(self) -> nn.Module:
        """The network behind ``generate``."""
        config = self.config
        return CoordinateGenerator(
            self.z_dim, self.pixels.outputs, config.hidden, config.layers, config.activation
        )

    def generate(
        self, z: Float[Tensor, "b d"], psi_rad: Float[Tensor, "b"], origin_px: Float[Tensor, "b 2"]
    ) -> Float[Tensor, "b p out"]:
        """Generator's output at the pixels within the mask, in a pose."""
        points = self.coordinates_px.expand(len(z), -1, -1)
        with own_precision(z):
            posed = geometry.particle_to_reference(points, psi_rad, origin_px)
        output: Tensor = self.generator(posed / (self.box_px / 2), z)
        return output

    @staticmethod
    def near_known_poses(
        config: CoordinateConfig, psi_range_rad: float, max_shift_px: float
    ) -> CoordinateConfig:
        """A pose of normal priors half as wide as the ranges, or none where they are 0; images are seen as
        they stand, not turned.
        """
        turns, moves = psi_range_rad > 0.0, max_shift_px > 0.0
        return dataclasses.replace(
            config,
            rotate=config.rotate and turns,
            translate=config.translate and moves,
            augment_rotation=False,
            pose_candidates=1,
            rotation_prior="normal",
            rotation_std_deg=geometry.degrees(psi_range_rad) / 2.0 if turns else config.rotation_std_deg,
            shift_std_px=max_shift_px / 2.0 if moves else config.shift_std_px,
        )

    def represent(self, images: Float[Tensor, "b *c n n"]) -> Float[Tensor, "b c n n"]:
        """Images with a channel axis, within the bounds of resolution."""
        kept = images.reshape(len(images), self.config.channels, self.box_px, self.box_px)
        return self._within_band(kept)

    def start(self, batches: Iterator[Batch], n_particles: int) -> None:
        """Starts the learned standard deviation at the data's; checks Bernoulli data."""
        sums = self.coordinates_px.new_zeros(4, dtype=torch.float64)
        for batch in batches:
            data = self._inside(batch.image)[: batch.n_own].double()
            outside = ((data < 0) | (data > 1)).sum(dtype=torch.float64)
            count = torch.full_like(outside, data.numel())
            sums += torch.stack([count, data.sum(), (data**2).sum(), outside])
        n, total, squares, n_outside = distributed.totals(sums)[0].tolist()  # the one wait for a GPU
        if self.config.pixels == "bernoulli" and n_outside > 0:
            raise InputError(
                "--pixels",
                found="bernoulli, for images with values outside 0 to 1",
                expected="images between 0 and 1",
                remedy="use --pixels gaussian for cryo-EM images.",
            )
        if self.config.pixels == "gaussian":
            variance = squares / n - (total / n) ** 2
            with torch.no_grad():
                self.pixels.log_std.fill_(0.5 * math.log(max(variance, 1e-12)))

    def begin_epoch(self, epoch: int, n_epochs: int) -> None:
        """z is held at 0 for the first epochs."""
        self.z_active = epoch >= self.config.z_delay

    @property
    def stage(self) -> bool:
        """Whether z is held at 0."""
        return self.z_active

    @property
    def may_idle(self) -> bool:
        """With no pose to tell, the encoder is idle while z is held at 0."""
        return self.config.z_delay > 0 and not (self.config.rotate or self.config.translate)

    @property
    def gains_by_bfloat16_on_cpu(self) -> bool:
        """The layers of every pixel are most of the work, where they are of some size."""
        return bool(self.config.hidden >= FEWEST_FOR_BFLOAT16)

    @property
    def _is_whole(self) -> bool:
        return len(self.inside) == self.box_px**2

    def _inside(self, images: Float[Tensor, "b c n n"]) -> Float[Tensor, "b p c"]:
        flat = images.flatten(2)
        return (flat if self._is_whole else flat.index_select(2, self.inside)).mT

    def _image(self, pixels: Float[Tensor, "b p c"]) -> Float[Tensor, "b c n n"]:
        flat = pixels.mT
        if not self._is_whole:
            flat = flat.new_zeros(*flat.shape[:2], self.box_px**2).index_copy(2, self.inside, flat)
        return flat.reshape(len(pixels), -1, self.box_px, self.box_px)

    def _filter(self, images: Float[Tensor, "b c n n"], ctf: Float[Tensor, "b n half"]) -> Tensor:
        box = (self.box_px, self.box_px)
        filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * ctf[:, None], s=box)
        return filtered

    def _within_band(self, images: Float[Tensor, "b c n n"]) -> Float[Tensor, "b c n n"]:
        if not self.config.is_banded:
            return images
        return self._filter(images, self.band.expand(len(images), -1, -1))

    def _seen(self, batch: Batch) -> _Seen:
        """A batch with its CTF, which is worked out once however often it is used."""
        if batch.ctf is None:
            band = self.band.expand(len(batch), -1, -1) if self.config.is_banded else None
            return _Seen(batch.image, batch.image, band)
        ctf = ctf_2d(batch.ctf, self.box_px) * self.band
        return _Seen(batch.image, self._filter(batch.image, torch.sign(ctf)), ctf)

    def encode(self, images: Float[Tensor, "b c n n"]) -> Latents:
        """What the inference network says of images, whose phases are flipped where the CTF is negative."""
        means, log_stds = self.encoder(self._inside(images).flatten(1)).chunk(2, -1)
        return Latents(means * self.unit, log_stds + torch.log(self.unit))

    def _split(self, values: Float[Tensor, "b latents"]) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = values.split([1, 2, self.z_dim], 1)
        return parts

    def _parts(self, values: Float[Tensor, "b latents"]) -> tuple[Tensor, Tensor, Tensor]:
        """psi (b,), origin (b, 2) and z (b, d) of values of all latents; 0 where the pose is fixed."""
        psi, origin, z = self._split(values)
        psi = psi if self.config.rotate else torch.zeros_like(psi)
        return psi.squeeze(1), origin if self.config.translate else torch.zeros_like(origin), z

    def _held(self, z: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        return z if self.z_active else torch.zeros_like(z)

    def _expected(
        self, z: Tensor, psi_rad: Tensor, origin_px: Tensor, ctf: Float[Tensor, "b n half"] | None
    ) -> tuple[Tensor, Tensor]:
        """Mean (b, p, c) and log standard deviation of the pixels within the mask."""
        mean, log_std = self.pixels.split(self.generate(z, psi_rad, origin_px))
        if ctf is not None:
            mean = self._inside(self._filter(self._image(mean), ctf))
        return mean, log_std

    def _log_likelihood(self, seen: _Seen, z: Tensor, psi_rad: Tensor, origin_px: Tensor) -> Tensor:
        mean, log_std = self._expected(z, psi_rad, origin_px, seen.ctf)
        return self.share * self.pixels.log_prob(mean, log_std, self._inside(seen.image)).sum((1, 2))

    def _encode_turned(self, images: Float[Tensor, "b c n n"], turn: Float[Tensor, "b"] | None) -> Latents:
        """The encoder's word on images turned by ``turn`` (rad), the turn taken off its pose.

        I'(p) = I(R(turn) p), so what the encoder sees has psi' = psi + turn and o' = R(-turn) o. A
        spread that differs in x and y is not turned along.
        """
        if turn is None:
            return self.encode(images)
        flat = images.flatten(0, 1)
        every = turn.repeat_interleave(images.shape[1], 0)
        turned = geometry.pose_references(flat, every, flat.new_zeros(len(flat), 2))
        latents = self.encode(turned.reshape(images.shape))
        psi, origin, z = self._split(latents.mean)
        origin = (geometry.rotation_matrix(turn) @ origin[..., None])[..., 0]
        return latents._replace(mean=torch.cat([psi - turn[:, None], origin, z], 1))

    def _turn(self, batch: Batch, seen: _Seen) -> Float[Tensor, "b"] | None:
        """How to turn the encoder's input, None for not at all.

        A random angle while training; then that of the candidate turns, evenly spaced from there,
        whose mean pose explains the image best.
        """
        config = self.config
        augment = self.training and config.augment_rotation
        n_candidates = config.pose_candidates
        if not config.rotate or not (augment or n_candidates > 1):
            return None
        first = batch.image.new_zeros(len(batch))
        if augment:
            first = 2.0 * math.pi * batch.draw(torch.rand, first)
        if n_candidates == 1:
            return first
        turns = [first + 2.0 * math.pi * k / n_candidates for k in range(n_candidates)]
        with torch.no_grad():
            scores = []
            for turn in turns:
                with own_precision(batch.image):
                    latents = self._encode_turned(seen.flipped, turn)
                psi, origin, z = self._parts(latents.mean)
                scores.append(self._log_likelihood(seen, self._held(z), psi, origin))
            best = torch.stack(scores).argmax(0)
        return torch.stack(turns).gather(0, best[None])[0]

    def _kl(self, latents: Latents) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """KL of z and of the pose; the choice among c turns is one of c equals, so it costs log c nats.

        While z is held, psi gains nothing by spreading wider than the turns are apart: else it spreads to
        the prior where shapes are round at first, as the mean of digits in every rotation is, and they
        stay round.
        """
        config, (mean, log_std) = self.config, latents
        spacing = 2.0 * math.pi / config.pose_candidates
        if not self.z_active and spacing < geometry.radians(config.rotation_std_deg):
            log_std = torch.cat([log_std[:, :1].clamp(max=math.log(spacing)), log_std[:, 1:]], 1)
        psi, origin, z = self._parts(kl_normal(mean, log_std, self.prior_std, self.mean_std))
        pose = psi + origin.sum(-1)
        return z.sum(-1), pose + math.log(config.pose_candidates) if config.rotate else pose

    def elbo(self, batch: Batch) -> ElboTerms:
        """The paper's bound, one posterior sample a particle."""
        seen = self._seen(batch)
        turn = self._turn(batch, seen)
        with own_precision(batch.image):
            latents = self._encode_turned(seen.flipped, turn)
        mean, log_std = latents
        noise = torch.cat([batch.draw(torch.randn, each) for each in self._split(mean)], 1)
        psi, origin, z = self._parts(mean + torch.exp(log_std) * noise)
        log_likelihood = self._log_likelihood(seen, self._held(z), psi, origin)
        kl_z, kl_pose = self._kl(latents)
        return ElboTerms(log_likelihood, self._held(kl_z), kl_pose)

    def infer(self, batch: Batch) -> Posterior:
        """The encoder's means and spreads; log_likelihood is the bound taken at the means.

        figure_of_merit is the correlation of the image with its reconstruction, negative ones 0.
        """
        seen = self._seen(batch)
        latents = self._encode_turned(seen.flipped, self._turn(batch, seen))
        psi, origin, z = self._parts(latents.mean)
        psi_std, origin_std, z_std = self._parts(torch.exp(latents.log_std))
        mean, log_std = self._expected(z, psi, origin, seen.ctf)
        data = self._inside(seen.image)
        kl_z, kl_pose = self._kl(latents)
        bound = self.share * self.pixels.log_prob(mean, log_std, data).sum((1, 2)) - kl_z - kl_pose
        expected = self.pixels.expectation(mean).flatten(1)
        a = expected - expected.mean(1, keepdim=True)
        b = data.flatten(1) - data.flatten(1).mean(1, keepdim=True)
        correlation = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
        return Posterior(
            z_mean=z,
            z_std=z_std,
            psi_rad=geometry.wrap_radians(psi),
            psi_std_rad=psi_std,
            origin_px=origin,
            origin_std_px=origin_std.mean(1),
            figure_of_merit=correlation.clamp_min(0.0),
            log_likelihood=bound,
            second_mode=torch.zeros_like(psi),
        )

    def decode(self, z: Float[Tensor, "k d"]) -> Float[Tensor, "k *c n n"]:
        """Expected images at pose zero, without CTF, within the bounds of resolution; (k, 3, N, N) for RGB.

        0 outside the mask, where there are no such bounds.
        """
        zero = z.new_zeros(len(z), 2)
        mean, _ = self.pixels.split(self.generate(z, zero[:, 0], zero))
        images = self._within_band(self._image(self.pixels.expectation(mean)))
        return images[:, 0] if self.config.channels == 1 else images
