"""Galaxies: test bounds and samples of the spatial-VAE at pose zero, the paper's Figure 5.

    python -m benchmarks.paper_galaxies --source ../shared/data/galaxies [--size SIZE]

Images of 64 px, three colours, Bernoulli; every tenth is kept for the test. The models are the
spatial-VAE, the same with its pose fixed at 0, and a vanilla VAE. As in the paper the rotation's prior has
a free mean and a standard deviation of pi, shifts one of 0.1 of half the box, the encoder's input is
turned at random, generators have 500 units and encoders 5,000; z rests at 0 for the first two epochs.
The folder has 2,000 images, far fewer than the paper's set: samples show no more than the principle.

How far a model brings galaxies into one frame is measured on test images moved by their own poses: the
mean of their complex ellipticities (Ixx - Iyy + 2i Ixy) / (Ixx + Iyy), over the mean of their sizes:
0 for axes in all directions, 1 for one direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import digits, paper_models, trials
from benchmarks.digits import MODELS, Trained
from cryo_svae.errors import InputError
from cryo_svae.imaging import geometry

FILE = "galaxies_64px_rgb.npz"
TEST_EVERY = 10
SHOWN = 12
SHIFT_SHARE = 0.1  # of half the box


@dataclass(frozen=True)
class Size:
    """How much is computed; ``binned``: a pixel is the mean of a square of so many.

    pose_candidates: the paper has 1; without more, galaxies stayed round within the time of a processor.
    """

    n_images: int
    binned: int
    hidden: int
    encoder_hidden: int
    epochs: int
    batch_size: int
    learning_rate: float
    z_dims: tuple[int, ...]
    pose_candidates: int = 1


SIZES = {
    "paper": Size(2_000, 1, 500, 5_000, 300, 100, 1e-4, (20, 50, 100)),
    "unbinned": Size(2_000, 1, 128, 500, 80, 20, 1e-3, (20,), 4),
    "cpu": Size(2_000, 2, 128, 500, 80, 20, 1e-3, (20,), 4),
    "small": Size(2_000, 4, 64, 200, 40, 20, 2e-3, (20,)),
    "quick": Size(800, 4, 32, 100, 20, 10, 5e-3, (10,)),
}


def read_galaxies(folder: Path, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test images (n, 3, N, N) in [0, 1]."""
    path = folder / FILE
    if not path.is_file():
        raise InputError(
            path,
            found="no file",
            expected="a .npz file with 'images' (n, 64, 64, 3), bytes",
            remedy="cut galaxies out of SDSS (Galaxy Zoo, data.galaxyzoo.org) and save them so.",
        )
    with np.load(path, allow_pickle=False) as data:
        images = torch.from_numpy(data["images"][: size.n_images]).movedim(-1, 1).float() / 255.0
    images = digits.bin_images(images, size.binned)
    is_test = torch.arange(len(images)) % TEST_EVERY == 0
    return images[~is_test], images[is_test]


def train_model(name: str, images: torch.Tensor, size: Size, z_dim: int, arguments) -> Trained:
    """A model on galaxies."""
    engine, poses = MODELS[name]
    candidates = size.pose_candidates if poses.get("rotate") else 1
    return digits.train(
        engine,
        images,
        z_dim,
        epochs=size.epochs,
        batch_size=size.batch_size,
        learning_rate=size.learning_rate,
        seed=arguments.seed,
        device=arguments.device,
        pixels="bernoulli",
        channels=3,
        hidden=size.hidden,
        encoder_hidden=size.encoder_hidden,
        shift_std_px=SHIFT_SHARE * images.shape[-1] / 2,
        pose_candidates=candidates,
        **poses,
    )


def in_one_frame(images: torch.Tensor, psi_rad: torch.Tensor, origin_px: torch.Tensor) -> float:
    """|mean| over mean size of the ellipticities of images (n, N, N), moved by their poses."""
    moved = geometry.align_images(images, psi_rad, origin_px).clamp(min=0.0)
    x, y = geometry.pixel_grid(images.shape[-1]).unbind(-1)
    inside = torch.hypot(x, y) <= images.shape[-1] / 2 - 1
    weight = moved * inside
    weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-12)
    x = x - (weight * x).sum((1, 2), keepdim=True)
    y = y - (weight * y).sum((1, 2), keepdim=True)
    xx, yy, xy = ((weight * product).sum((1, 2)) for product in (x * x, y * y, x * y))
    ellipticity = torch.complex(xx - yy, 2.0 * xy) / (xx + yy).clamp(min=1e-12)
    return float(ellipticity.mean().abs() / ellipticity.abs().mean())


def draw(test: torch.Tensor, models: dict[str, Trained], z_dim: int, seed: int) -> None:
    """Test images; each model's reconstructions at pose zero; samples of each at pose zero."""
    rows = [("test images", test[:SHOWN])]
    for name, trained in models.items():
        z = digits.infer(trained, test[:SHOWN]).z_mean
        rows.append((f"{name}:\ndecoded at pose zero", paper_models.decode(trained.checkpoint, z)))
    sampled = torch.randn(2 * SHOWN, z_dim, generator=torch.Generator().manual_seed(seed))
    for name, trained in models.items():
        rows.append((f"{name}:\nsamples", paper_models.decode(trained.checkpoint, sampled)))
    heights = [-(-len(images) // SHOWN) for _, images in rows]
    figure = Figure(figsize=(SHOWN, 1.02 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), 1, gridspec_kw={"height_ratios": heights})
    for axis, (name, images) in zip(axes, rows, strict=True):
        axis.imshow(digits.tiles(images.clamp(0.0, 1.0), SHOWN))
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    paper_models.save_figure(figure, f"paper_galaxies_z{z_dim}")


def main(arguments_given: list[str] | None = None) -> None:
    """Prints a row a model as it is done, and writes table and figures."""
    parser = digits.parser_of(__doc__, SIZES)
    arguments = parser.parse_args(arguments_given)
    size = digits.size_of(arguments, SIZES)
    lines = [
        f"size {arguments.size}: {digits.described(size)}; seed {arguments.seed}; bounds in nats an image,",
        "3 posterior samples each; gain over the vanilla VAE ± standard error over the test images",
        f"{'model':12s} {'z-dim':>5s} {'test':>10s} {'gain':>16s} {'train':>10s} {'no latent':>10s} "
        f"{'KL z':>7s} {'one frame':>9s} {'s':>7s} {'img/s':>7s}",
    ]
    print("\n".join(lines))
    with digits.refusals():
        train, test = read_galaxies(arguments.source, size)
        grey = test.mean(1)
        floor = digits.mean_image_bound(train, test)
        for z_dim in size.z_dims:
            models: dict[str, Trained] = {}
            baseline = None
            for name in MODELS:
                trained = train_model(name, train, size, z_dim, arguments)
                models[name] = trained
                terms = digits.held_out_bound(trained, test)
                found = digits.infer(trained, test)
                gain = "" if baseline is None else digits.gain(terms.elbo, baseline)
                baseline = terms.elbo if baseline is None else baseline
                trained_elbo = trained.checkpoint.history[-1]["elbo"]
                lines.append(
                    f"{name:12s} {z_dim:5d} {terms.elbo.mean():10.1f} {gain:>16s} "
                    f"{trained_elbo:10.1f} {floor:10.1f} {terms.kl_z.mean():7.1f} "
                    f"{in_one_frame(grey, found.psi_rad, found.origin_px):9.3f} "
                    f"{trained.seconds:7.0f} {trained.images_per_second:7.0f}"
                )
                print(lines[-1], flush=True)
                trials.write("paper_galaxies", lines)
            draw(test, models, z_dim, arguments.seed)


if __name__ == "__main__":
    main()
