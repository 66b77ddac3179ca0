"""What every engine offers, and the types that pass between engines, training and estimation.

An engine models images of box N as a generator of spatial coordinates with latent content z,
in-plane rotation theta and origin o, decoded at q = R(theta) (p + o) (see geometry). Radians and
pixels throughout; no files, no prints.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cryo_svae.computing import distributed
from cryo_svae.computing.distributed import Share
from cryo_svae.imaging.ctf import CtfTable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator


def own_precision(like: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device: what is computed in it keeps its own precision."""
    return torch.autocast(like.device.type, enabled=False)


@dataclass(frozen=True)
class Batch:
    """b particles as an engine sees them.

    index:      row of each particle in the training set (row of a per-particle table).
    image:      what ``Engine.represent`` made of the prepared images; float, first axis b.
    ctf:        their CTF parameters, or None where the model has no CTF.
    share:      which rows of a batch of several processes these are; None where they are the whole batch.
    astigmatic: whether the CTF of any may change with direction; None where that is to be looked up, for
                which the processor would wait for a GPU.
    """

    index: Int[Tensor, "b"]
    image: Float[Tensor, "b ..."]
    ctf: CtfTable | None
    share: Share | None = None
    astigmatic: bool | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Int[Tensor, "k"]) -> Batch:
        ctf = None if self.ctf is None else self.ctf[rows]
        return Batch(self.index[rows], self.image[rows], ctf, astigmatic=self.astigmatic)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        ctf = None if self.ctf is None else self.ctf.to(device)
        share = None if self.share is None else self.share.to(device)
        return Batch(self.index.to(device), self.image.to(device), ctf, share, self.astigmatic)

    @property
    def n_whole(self) -> int:
        """Particles in the batch of all processes."""
        return len(self) if self.share is None else self.share.n_whole

    @property
    def n_own(self) -> int:
        """How many of the rows count, from the first; the others only keep this process in step."""
        return len(self) if self.share is None else self.share.n_own

    def draw(self, sample: Callable[..., Tensor], like: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Random numbers, as one process draws them for the whole batch: these rows of them."""
        numbers = sample((self.n_whole, *like.shape[1:]), dtype=like.dtype, device=like.device)
        return numbers if self.share is None else numbers[self.share.row]

    def totals(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Sums over own rows, summed over the processes."""
        return sums if self.share is None else distributed.totals(*sums)

    def first(self, values: Float[Tensor, "b ..."], k: int) -> Float[Tensor, "k ..."]:
        """Values of the first k rows of the whole batch."""
        if self.share is None:
            return values[:k]
        row, own = self.share.row[: self.n_own], values[: self.n_own].detach()
        found = own.new_zeros(min(k, self.n_whole), *own.shape[1:])
        found[row[row < k]] = own[row < k]
        return distributed.totals(found)[0]


@dataclass(frozen=True)
class ElboTerms:
    """Terms of the evidence lower bound, per particle, in nats; elbo = likelihood - KLs."""

    log_likelihood: Float[Tensor, "b"]
    kl_z: Float[Tensor, "b"]
    kl_pose: Float[Tensor, "b"]

    @property
    def elbo(self) -> Float[Tensor, "b"]:
        """The evidence lower bound per particle, in nats."""
        return self.log_likelihood - self.kl_z - self.kl_pose


@dataclass(frozen=True)
class Posterior:
    """What the model believes of b particles; psi in radians, origins (x, y) in pixels.

    figure_of_merit:  higher is better, about 0 for an image without a particle.
    log_likelihood:   the evidence (or its bound) of the image, in nats.
    second_mode:      probability mass of the second-best separate pose mode, 0 where an engine
                      has a single-mode posterior.
    """

    z_mean: Float[Tensor, "b d"]
    z_std: Float[Tensor, "b d"]
    psi_rad: Float[Tensor, "b"]
    psi_std_rad: Float[Tensor, "b"]
    origin_px: Float[Tensor, "b 2"]
    origin_std_px: Float[Tensor, "b"]
    figure_of_merit: Float[Tensor, "b"]
    log_likelihood: Float[Tensor, "b"]
    second_mode: Float[Tensor, "b"]

    @staticmethod
    def cat(parts: list[Posterior]) -> Posterior:
        """Posteriors of consecutive batches as one."""
        return Posterior(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Posterior)))

    def to(self, device: torch.device | str) -> Posterior:
        """The same posterior on another device."""
        return Posterior(*(getattr(self, f.name).to(device) for f in fields(self)))


FEWEST_STEPS = 1500  # of a training whose batches are made larger for a GPU


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """What an engine trains best with, where the user says nothing.

    epochs:        fewest and most passes over the particles.
    images:        images to be seen in all, within these bounds.
    schedule:      "constant" learning rate, or "one-cycle" (up over the first 30 %, then down to 0).
    largest_batch: on a GPU, which few particles leave idle, where steps enough are left.
    batch_bytes:   memory that a step takes for each pixel of each particle, about.
    """

    epochs: tuple[int, int]
    images: int
    batch_size: int
    learning_rate: float
    schedule: Literal["constant", "one-cycle"]
    largest_batch: int
    batch_bytes: int

    def epochs_for(self, n_particles: int) -> int:
        """Passes over n particles."""
        fewest, most = self.epochs
        return min(most, max(fewest, math.ceil(self.images / n_particles)))

    def batch_on_gpu(self, n_images: int, box_px: int, memory_bytes: int) -> int:
        """Particles in a step of a training that sees so many images, on a GPU with so much memory.

        Twice as many as long as ``FEWEST_STEPS`` steps are left and a quarter of the memory holds them.
        """
        batch, room = self.batch_size, memory_bytes / 4 / (self.batch_bytes * box_px**2)
        while 2 * batch <= min(self.largest_batch, n_images / FEWEST_STEPS, room):
            batch *= 2
        return batch

    def learning_rate_for(self, batch_size: int) -> float:
        """The (peak) learning rate; of larger batches, whose gradients are surer, by their square root.

        Malladi et al. 2022, On the SDEs and scaling rules for adaptive gradient algorithms.
        """
        return self.learning_rate * math.sqrt(max(1.0, batch_size / self.batch_size))


class Engine(nn.Module, ABC):
    """A spatial-VAE: trained by ``training.fit``, asked by ``estimation.estimate``.

    Built as ``EngineClass(box_px, z_dim, config)``.

    largest_box_px: box beyond which images are Fourier-cropped unless the user says otherwise.
    kl_weight:      weight of the KL terms in the training loss, set by ``begin_epoch``; of an engine that
                    changes it a tensor, so that a step recorded once repeats with what it is now.
    tables:         names of buffers with a row for each training particle.
    """

    training_defaults: ClassVar[TrainingDefaults]
    largest_box_px: ClassVar[int]
    tables: ClassVar[tuple[str, ...]] = ()
    box_px: int
    z_dim: int
    config: Any
    kl_weight: float | Tensor

    @property
    def stage(self) -> Hashable:
        """What a step does differently from epoch to epoch, other than by the values of tensors."""
        return None

    @property
    def may_idle(self) -> bool:
        """Whether there are epochs in which some parameters play no part."""
        return False

    @property
    def gains_by_bfloat16_on_cpu(self) -> bool:
        """Whether training is the faster for it on a processor that multiplies such matrices."""
        return False

    @staticmethod
    @abstractmethod
    def near_known_poses(config: Any, psi_range_rad: float, max_shift_px: float) -> Any:
        """The config of an engine for images whose known poses are undone, that looks for what is left of
        psi and origin within these alone; a range of 0 is none.
        """

    def stay_near(self, psi_range_rad: float, max_shift_px: float) -> None:
        """From now on, poses are sought within these of psi 0 and origin 0 alone."""
        self.config = self.near_known_poses(self.config, psi_range_rad, max_shift_px)

    @abstractmethod
    def represent(self, images: Float[Tensor, "b n n"]) -> Float[Tensor, "b ..."]:
        """What the engine keeps of prepared images (white particle, background mean 0, sd 1)."""

    @abstractmethod
    def start(self, batches: Iterator[Batch], n_particles: int) -> None:
        """Sets what is read off the data before training (noise level, scale, pose table)."""

    @abstractmethod
    def begin_epoch(self, epoch: int, n_epochs: int) -> None:
        """Told before each epoch (0-based): schedules of KL weight, z delay, search step."""

    @abstractmethod
    def elbo(self, batch: Batch) -> ElboTerms:
        """Bound per particle with its own random draws (torch's global generator)."""

    @abstractmethod
    def infer(self, batch: Batch) -> Posterior:
        """Posterior of each particle, deterministic."""

    @abstractmethod
    def decode(self, z: Float[Tensor, "k d"]) -> Float[Tensor, "k n n"]:
        """Generated images at pose zero, CTF-free, white particle."""
