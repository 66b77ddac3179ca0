"""Digits and models of the paper's experiments: images in known poses, training on arrays, test bounds.

Experiments of Bepler et al., "Explicitly disentangling image content from translation and rotation
with spatial-VAE", NeurIPS 2019: ``paper_digits``, ``paper_clusters`` and ``paper_galaxies``.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import paper_models, trials
from cryo_svae.errors import CryoSvaeError, InputError
from cryo_svae.imaging import geometry
from cryo_svae.jobs.plan import pick_device
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.training import fit
from cryo_svae.learning.training_store import TrainingStore
from cryo_svae.models.engine import ElboTerms, Posterior
from cryo_svae.particles.preprocessing import Preparation

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
DIGIT_PX = 28
MODELS: dict[str, tuple[str, dict[str, bool]]] = {
    "vanilla VAE": ("vanilla", {}),
    "fixed pose": ("coordinate", {"rotate": False, "translate": False}),
    "spatial-VAE": ("coordinate", {"rotate": True, "translate": True}),
}
Size = TypeVar("Size")


@dataclass(frozen=True)
class Posed:
    """Images (n, N, N) in [0, 1] and their truth: psi in rad, origin (x, y) in px, which digit.

    An image is I(p) = Ref(R(psi) (p + o)).
    """

    images: Tensor
    psi_rad: Tensor
    origin_px: Tensor
    label: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Trained:
    """A model after training, the seconds of it, and images a second."""

    checkpoint: Checkpoint
    seconds: float
    images_per_second: float


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The bytes of a gzipped IDX file, in its shape."""
    if not path.is_file():
        raise InputError(
            path,
            found="no file",
            expected="a gzipped file of MNIST",
            remedy=f"download {MNIST}{path.name} into {path.parent} (or name its folder by --source).",
        )
    data = gzip.decompress(path.read_bytes())
    n_axes = data[3]
    shape = np.frombuffer(data, ">u4", n_axes, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * n_axes).reshape(shape)


def read_mnist(folder: Path, part: str, n: int) -> tuple[Tensor, NDArray[np.uint8]]:
    """The first n digits of ``train`` or ``t10k``, 28 px, in [0, 1], and which they are."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:n]
    return torch.from_numpy(images.astype(np.float32) / 255.0), read_idx(
        folder / f"{part}-labels-idx1-ubyte.gz"
    )[:n]


def posed(
    digits: Tensor,
    label: NDArray[np.uint8],
    psi_rad: Tensor,
    shift_std_px: float,
    *,
    canvas_px: int = DIGIT_PX,
    binned: int = 1,
    generator: torch.Generator,
) -> Posed:
    """Digits turned by psi and shifted, on a canvas; ``binned``: mean of squares of so many pixels.

    Shifts are N(0, std²), drawn again where a digit (a disc of 28 px) would leave a larger canvas.
    The pose is that of the binned images, in their pixels.
    """
    room = (canvas_px - DIGIT_PX) // 2
    origin = shift_std_px * torch.randn(len(digits), 2, generator=generator)
    while room and bool((outside := (origin.abs() > room).any(1)).any()):
        origin[outside] = shift_std_px * torch.randn(int(outside.sum()), 2, generator=generator)
    parts = []
    for rows in torch.arange(len(digits)).split(2000):
        canvas = torch.nn.functional.pad(digits[rows], (room,) * 4)
        moved = geometry.pose_references(canvas, psi_rad[rows], origin[rows]).clamp(0.0, 1.0)
        parts.append(bin_images(moved, binned))
    return Posed(torch.cat(parts), psi_rad, origin / binned, label)


def bin_images(images: Tensor, binned: int) -> Tensor:
    """Means of squares of pixels; the last two axes."""
    return images if binned == 1 else torch.nn.functional.avg_pool2d(images, binned)


def train(
    engine_name: str,
    images: Tensor,
    z_dim: int,
    *,
    epochs: int,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    one_cycle: bool | None = None,
    seed: int,
    device: str,
    **config: object,
) -> Trained:
    """An engine trained on images (n, N, N) or (n, 3, N, N); batch and rate are its own if not given.

    one_cycle: the rate rises and falls to 0 (see training.learning_rate); the engine's own if None.
    """
    box_px = images.shape[-1]
    preparation = Preparation(
        box_px=box_px, pixel_size_angst=1.0, mask_diameter_angst=float(box_px), invert=False
    )
    checkpoint = trials.untrained(engine_name, z_dim, preparation, False, seed, **config)
    schedule = trials.schedule_of(
        checkpoint, epochs, seed, batch_size=batch_size, learning_rate=learning_rate
    )
    if one_cycle is not None:
        schedule = replace(schedule, one_cycle=one_cycle)
    store = trials.store_of(checkpoint.engine, images.split(1024))
    began = time.perf_counter()
    fit(checkpoint, store, schedule, pick_device(device), lambda _: None)
    seconds = time.perf_counter() - began
    return Trained(checkpoint, seconds, epochs * len(images) / seconds)


def held_out_bound(trained: Trained, images: Tensor, n_samples: int = 3) -> ElboTerms:
    """Bounds (n,) of images that were not trained on, each the mean of so many posterior samples."""
    store = _stored(trained, images)
    return paper_models.bounds(trained.checkpoint, store, torch.arange(len(store)), n_samples)


def _stored(trained: Trained, images: Tensor) -> TrainingStore:
    """Images for the engine, which stays on its device."""
    engine = trained.checkpoint.engine
    device = next(engine.parameters()).device
    store = trials.store_of(engine.cpu(), images.split(1024))
    engine.to(device)
    return store


def mean_image_bound(train_images: Tensor, images: Tensor) -> float:
    """Nats of Bernoulli images under the mean of the training images: a model without latents."""
    mean = train_images.mean(0).clamp(1e-4, 1.0 - 1e-4)
    return float((images * mean.log() + (1.0 - images) * (1.0 - mean).log()).flatten(1).sum(1).mean())


def gain(bound: Tensor, baseline: Tensor) -> str:
    """Mean difference of two bounds of the same images, ± its standard error over the images."""
    difference = (bound - baseline).double()
    return f"{difference.mean():+.2f} ± {difference.std() / len(difference) ** 0.5:.2f}"


def tiles(images: Tensor, columns: int, gap: float = 1.0) -> NDArray[np.float32]:
    """Images (k, N, N) or (k, 3, N, N) side by side, row by row, a pixel of ``gap`` between them."""
    channels_last = images.movedim(1, -1) if images.ndim == 4 else images
    padded = np.pad(
        channels_last.numpy(), [(0, 0), (1, 1), (1, 1)] + [(0, 0)] * (images.ndim - 3), constant_values=gap
    )
    rows = [np.concatenate(list(padded[i : i + columns]), 1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, 0)


def infer(trained: Trained, images: Tensor) -> Posterior:
    """Posterior of images that were not trained on."""
    store = _stored(trained, images)
    return trials.infer(trained.checkpoint, store, torch.arange(len(store)))


def z_grid(side: int, widest: float = 2.0) -> Tensor:
    """Points (side², 2) of the plane of z, row by row from the top left."""
    line = torch.linspace(-widest, widest, side)
    y, x = torch.meshgrid(line.flip(0), line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def parser_of(doc: str, sizes: dict[str, Size]) -> argparse.ArgumentParser:
    """The options that the experiments share."""
    parser = paper_models.parser_of(doc, sizes)
    parser.add_argument("--source", type=Path, required=True, help="folder of the images")
    parser.add_argument("--epochs", type=int, help="passes over the training images [those of the size]")
    parser.add_argument("--z-dims", type=int, nargs="+", help="latent dimensions [those of the size]")
    return parser


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Ends a command with the message of a user's error and its exit code, without a traceback."""
    try:
        yield
    except CryoSvaeError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from None


def size_of(arguments: argparse.Namespace, sizes: dict[str, Size]) -> Size:
    """The size asked for, with what was given in place of its own."""
    given = {name: getattr(arguments, name) for name in ("epochs", "z_dims")}
    return replace(sizes[arguments.size], **{name: value for name, value in given.items() if value})


def described(size: object) -> str:
    """A size in words, for the head of a table."""
    return ", ".join(f"{name} {value}" for name, value in vars(size).items())
