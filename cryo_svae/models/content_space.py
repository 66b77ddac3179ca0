"""Generated contents as points of a space of few dimensions, and particles seen from it.

What a generator makes of all z lies close to a plane of few dimensions: its last layer is linear, and what
it is given varies smoothly. A particle's inner products with the directions of that plane are computed
once, for the poses that matter; the score of any z in any of these poses is then a short sum, without
Fourier transforms or coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryo_svae.imaging.polar import PolarTransform
from cryo_svae.models.polar_generator import PolarGenerator
from cryo_svae.models.pose_posterior import ByOrder, Look, normalised, waves
from cryo_svae.models.refinement import LocalModel

DRAWS = 512  # contents that the plane is laid through
LEFT_OUT = 0.05  # of contents, rms in units of the noise; so many nats scores are off by
LEAST_SIZE = 1e-6  # of a direction, in units of the largest
BLOCK = 16  # vectors, which take a processor as long as one
BLOCKS_ON_GPU = 4  # always, for a GPU is not waited for
NEGLIGIBLE_POWER = 1e-6  # of an angular order of a CTF's power, in units of its mean


def drawn_z(z_dim: int) -> Float[Tensor, "n d"]:
    """Fixed quasi-random points of N(0, I)."""
    sobol = torch.quasirandom.SobolEngine(z_dim, scramble=True, seed=3).draw(DRAWS)
    z: Tensor = torch.special.ndtri(sobol.clamp(1e-4, 1.0 - 1e-4))
    return z


class ContentSpace:
    """The plane closest to the contents of z ~ N(0, I), measured in units of the noise.

    basis: its centre, then k - 1 directions (k, 2, p). The point of coordinates (1, a) is the centre plus
           the sum of the directions times a.
    """

    def __init__(
        self,
        generator: PolarGenerator,
        polar: PolarTransform,
        noise: Float[Tensor, "r"],
        drawn_z: Float[Tensor, "n d"],
        n_psi: int,
    ) -> None:
        self.polar = polar
        self._generator = generator
        hidden = generator.layers(drawn_z)
        self._centre = hidden.mean(0)
        whiten = noise[polar.ring].rsqrt()
        linear = (generator.of_hidden() * whiten).flatten(1).double()
        drawn = (hidden - self._centre).double() @ linear
        power, across = (values.flip(-1) for values in torch.linalg.eigh(drawn @ drawn.mT))
        power = power.clamp(min=torch.finfo(power.dtype).tiny)
        kept = slice(BLOCK * _n_blocks(power / len(drawn)) - 1)
        size = power.sqrt().clamp(min=LEAST_SIZE * power[0].sqrt())
        directions = (across / size)[:, kept].mT @ drawn
        self._project = (linear @ directions.mT).float()
        centre = generator.content(self._centre[None])
        self.basis = torch.cat([centre, directions.float().unflatten(1, (2, -1)) / whiten])
        self._by_order = ByOrder(polar, self.basis, n_psi)
        n_even = polar.n_angles // 4 + 1
        both = torch.where(torch.arange(n_even, device=noise.device) > 0, 2.0, 1.0)
        # Re sum of x exp(i order psi) over both signs of each even order
        self._half_turns = waves(n_even, n_psi // 2, noise.device) * torch.cat([both, -both])
        self._of_pairs: Tensor | None = None

    def coordinates(self, z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Coordinates of the contents of z."""
        return self._coordinates(self._generator.layers(z))

    def _coordinates(self, hidden: Tensor) -> Tensor:
        along = (hidden - self._centre) @ self._project
        return torch.cat([torch.ones_like(along[..., :1]), along], -1)

    def slopes(self, z: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b d k"]]:
        """Coordinates of the contents of z, and their derivatives by each component of z."""
        units = torch.eye(z.shape[1], device=z.device)[:, None].expand(-1, len(z), -1)
        hidden, slope = self._generator.hidden_along(z, units)
        along = slope.transpose(0, 1) @ self._project
        return self._coordinates(hidden), torch.cat([torch.zeros_like(along[..., :1]), along], -1)

    def _pair_spectra(self, n_even: int) -> Float[Tensor, "e q s"]:
        """Angular correlations of pairs of the basis with what repeats after half a turn.

        For each of the first even orders, real and imaginary parts of each ring in rows q; for all pairs
        real, then imaginary parts of the products in columns s.
        """
        if self._of_pairs is None or len(self._of_pairs) < n_even:
            samples = self.polar.samples(self.basis)
            rows = []
            for ring in samples.unbind(1):  # one at a time: all of them are large
                here, opposite = ring.chunk(2, -1)
                folded = (here[:, None] * here).addcmul_(opposite[:, None], opposite)
                rows.append(torch.fft.rfft(folded)[..., :n_even].flatten(0, 1).mT / samples.shape[-1])
            spectra = torch.stack(rows, 1)
            real, imag = spectra.real, spectra.imag
            self._of_pairs = torch.cat([torch.cat([real, imag], -1), torch.cat([imag, -real], -1)], 1)
        return self._of_pairs[:n_even]

    def seen(self, look: Look, angle: Int[Tensor, "b w"]) -> Sight:
        """What a look shows at some of its rotations; the others are taken for impossible."""
        products = self._by_order.products(look.spectra)
        inner = self._by_order.turns[angle] @ products.flatten(2)
        power = torch.fft.rfft(look.power, norm="forward")
        n_even = _how_many_matter(power)
        power = power[..., :n_even]
        by_ring = torch.cat([power.real, power.imag], 1).permute(2, 0, 1)
        energy = (by_ring @ self._pair_spectra(n_even)).unflatten(-1, (2, -1)).permute(1, 2, 0, 3)
        half_turns = self._half_turns.unflatten(1, (2, -1))[..., :n_even].flatten(1)
        return Sight(
            inner.unflatten(-1, (-1, len(self.basis))).flatten(1, 2),
            energy.flatten(1, 2).unflatten(-1, (len(self.basis), -1)),
            half_turns[angle % len(half_turns)],
            look.spectra.shape[2],
            log_prior if isinstance(log_prior := look.log_prior_psi, float) else log_prior[angle],
        )


def _n_blocks(power: Float[Tensor, "n"]) -> int:
    """Blocks of vectors, the centre among them, that leave out little of the power of directions."""
    if power.device.type == "cuda":
        return BLOCKS_ON_GPU
    left_out = power.sum() - power.cumsum(0)
    return math.ceil((1 + int((left_out > LEFT_OUT**2).sum()) + 1) / BLOCK)


def _how_many_matter(power: Complex[Tensor, "b r e"]) -> int:
    """Even orders up to the last that matters; on a GPU, which is not waited for, all."""
    if power.device.type == "cuda":
        return power.shape[-1]
    size = power.abs().amax((0, 1))
    return int((size > NEGLIGIBLE_POWER * size[0]).nonzero().max()) + 1


@dataclass(frozen=True)
class Sight:
    """b particles in poses of w angles and t origins, seen from a content space of k coordinates.

    inner:      <S_o h y / sigma², R_psi q> of each vector q of the basis (b, w t, k).
    energy:     <h² R_psi q / sigma², R_psi q'> of each two of them (b, e, k, k), by the waves of psi that
                it is the sum of.
    half_turns: these waves at each angle (b, w, e).
    log_prior_psi: log prior masses of these angles (b, w), or the one number that all have.
    """

    inner: Float[Tensor, "b c k"]
    energy: Float[Tensor, "b e k k"]
    half_turns: Float[Tensor, "b w e"]
    n_origins: int
    log_prior_psi: Float[Tensor, "b w"] | float

    def scores(
        self, at: Float[Tensor, "b n k"], log_prior: Float[Tensor, "b #n t"]
    ) -> Float[Tensor, "b n w t"]:
        """l(psi, o) + log prior masses of n contents: of psi, and those given of the trial origins."""
        by_wave = (at[:, None] @ self.energy).mul_(at[:, None]).sum(-1)
        energy = by_wave.mT @ self.half_turns.mT
        inner = (at @ self.inner.mT).unflatten(-1, (-1, self.n_origins))
        of_psi = self.log_prior_psi
        prior = log_prior[:, :, None] + (of_psi if isinstance(of_psi, float) else of_psi[:, None, :, None])
        scores: Tensor = inner.sub_(0.5 * energy[..., None]).add_(prior)
        return scores

    def local_model(
        self, at: Float[Tensor, "b k"], slopes: Float[Tensor, "b d k"], log_prior: Float[Tensor, "b t"]
    ) -> LocalModel:
        """Log evidence of contents; its gradient along slopes, and the complete-data information."""
        log_evidence, probability = normalised(self.scores(at[:, None], log_prior[:, None])[:, 0])
        aligned = probability.flatten(1)[:, None] @ self.inner
        waves = probability.sum(2)[:, None] @ self.half_turns
        along = slopes @ (waves @ self.energy.flatten(2)).unflatten(2, self.energy.shape[2:])[:, 0]
        filtered = along @ at[..., None]
        gradient = slopes @ aligned.mT - filtered
        return LocalModel(log_evidence, gradient[..., 0], along @ slopes.mT)

    def missing_information(
        self, at: Float[Tensor, "b k"], slopes: Float[Tensor, "b d k"], log_prior: Float[Tensor, "b t"]
    ) -> Float[Tensor, "b d d"]:
        """Information on z lost because the pose is unknown: covariance of the score over poses.

        Louis 1982, J. R. Stat. Soc. B 44, 226.
        """
        probability = normalised(self.scores(at[:, None], log_prior[:, None]))[1].flatten(1)[:, None]
        scores = slopes @ self.inner.mT
        centred = scores.sub_(scores @ probability.mT)
        information: Tensor = (centred * probability) @ centred.mT
        return information
