"""Real particles with many latents: the paper's Figure 6, and what z-dim and softplus do.

    python -m benchmarks.paper_real --data ../shared/data [apoferritin bgal] [--size SIZE]

Apoferritin (EMPIAR-10146) and beta-galactosidase (EMPIAR-10017) in place of the paper's CODH/ACS and
antibody. psi is free, shifts are N(0, (4 px)²), the encoder's input is turned at random; both engines, a
tenth of the images held out. ``paper``, the default, is its size (z of 20, 2 x 1,000 tanh units, 1,000
epochs) and wants a GPU. results/paper_real.txt holds for each model

    bound     of the held-out images, nats each, and its gain over the smallest z-dim ± standard error
    train -   the bound of as many images trained on less that of those held out: what is learned by heart
    KL z      nats that z holds of a held-out image
    spread    standard deviation of decoded pixels outside of the particle and inside of the mask, in
              units of the noise; and over that of the pixels within the particle

(bounds of the two engines are of different representations of an image: compare within an engine), and
results/paper_real_SET.png images decoded along lines between the posterior means of pairs of particles.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cryo_svae
from benchmarks import paper_models, trials
from benchmarks.paper_models import Effort, Trained
from cryo_svae.config import PreparationConfig
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.preprocessing import Preparation, plan_preparation, prepared_images, working_ctf

HELD_OUT = 0.1
SHIFT_STD_PX = 4.0  # in pixels of the images on disk
LARGEST_BOX_PX = 64
PAIRS = 3
STEPS = 8  # images decoded between two particles, ends included


@dataclass(frozen=True)
class Setting:
    """A set: diameters of its particle and of the mask, and how far the steerable engine seeks it."""

    star: str
    diameter_angst: float
    mask_diameter_angst: float
    max_shift_angst: float
    invert: bool


SETS = {
    "apoferritin": Setting("apoferritin/apof_48px_3.0A_relion31.star", 122.0, 138.0, 12.0, True),
    "bgal": Setting("bgal/bgal_40px_9.56A.star", 220.0, 320.0, 30.0, True),
}


@dataclass(frozen=True)
class Size:
    """How much is computed; box_px None: that of the images on disk; n_particles None: all."""

    n_particles: int | None
    box_px: int | None
    hidden: int
    encoder_hidden: int
    z_delay: int
    pose_candidates: int
    spatial: Effort
    steerable_epochs: int
    z_dims: tuple[int, ...]


SIZES = {
    "paper": Size(None, None, 1000, 1000, 2, 1, Effort(1000), 60, (2, 5, 10, 20)),
    "long": Size(None, 32, 128, 256, 2, 4, Effort(60, batch_size=25, learning_rate=1e-3), 40, (2, 20)),
    "cpu": Size(
        2_000, 24, 64, 256, 2, 4, Effort(10, batch_size=25, learning_rate=1e-3), 20, (2, 5, 10, 20)
    ),
    "small": Size(
        1_500, 20, 64, 128, 1, 4, Effort(8, batch_size=25, learning_rate=2e-3), 15, (2, 5, 10, 20)
    ),
    "quick": Size(300, 16, 32, 64, 1, 2, Effort(6, batch_size=25, learning_rate=2e-3), 10, (2, 10)),
}


@dataclass(frozen=True)
class Images:
    """Prepared images (n, N, N) of a set and the radius of its particle in px."""

    images: Tensor
    ctf: CtfTable | None
    preparation: Preparation
    radius_px: float
    shift_std_px: float
    max_shift_px: float


@dataclass(frozen=True)
class Row:
    """A model and what was measured of it; bound (n,) of the held-out images in nats."""

    engine: str
    z_dim: int
    softplus: bool
    trained: Trained
    bound: Tensor
    surplus: float
    kl_z: float
    background: float
    contrast: float

    def text(self, baseline: Row) -> str:
        """A line of the table."""
        difference = (self.bound - baseline.bound).double()
        error = float(difference.std() / len(difference) ** 0.5)
        gain = "" if self is baseline else f"{float(difference.mean()):+8.2f} ± {error:.2f}"
        name = self.engine + (", softplus" if self.softplus else "")
        return (
            f"{name:22s} {self.z_dim:3d} {float(self.bound.mean()):10.2f} {gain:16s} {self.surplus:8.2f} "
            f"{self.kl_z:6.2f} {self.background:7.4f} {self.background / self.contrast:6.3f} "
            f"{self.trained.took}"
        )


HEAD = (
    f"{'engine':22s} {'z':>3s} {'bound':>10s} {'gain':16s} {'train -':>8s} {'KL z':>6s} {'spread':>7s} "
    f"{'/part.':>6s} {paper_models.TOOK}"
)


def read(star: Path, setting: Setting, size: Size, seed: int) -> Images:
    """The usable particles of a set, or so many of them, drawn at random."""
    particles = cryo_svae.load(star)
    config = PreparationConfig(
        box=size.box_px, invert=setting.invert, mask_diameter=setting.mask_diameter_angst
    )
    preparation = plan_preparation(particles, config, LARGEST_BOX_PX)
    chosen = np.random.default_rng(seed).permutation(len(particles))[: size.n_particles]
    images, rows = [], []
    for index, prepared, usable in prepared_images(ImageSource(particles), np.sort(chosen), preparation):
        images.append(prepared[usable])
        rows.append(index[usable.numpy()])
    ctf = particles.ctf
    if ctf is not None:
        ctf = working_ctf(ctf, preparation)[torch.from_numpy(np.concatenate(rows))]
    pixel_size = preparation.pixel_size_angst
    return Images(
        torch.cat(images),
        ctf,
        preparation,
        setting.diameter_angst / 2 / pixel_size,
        SHIFT_STD_PX * float(np.max(particles.pixel_size_angst)) / pixel_size,
        setting.max_shift_angst / pixel_size,
    )


def train_model(engine: str, z_dim: int, softplus: bool, images: Images, size: Size, arguments) -> Trained:
    """One model of the table."""
    if engine == "steerable":
        effort, config = Effort(size.steerable_epochs), {"max_shift_px": images.max_shift_px}
    else:
        effort = size.spatial
        if arguments.minutes is not None:
            effort = dataclasses.replace(effort, minutes=arguments.minutes)
        config = {
            "hidden": size.hidden,
            "encoder_hidden": size.encoder_hidden,
            "z_delay": size.z_delay,
            "pose_candidates": size.pose_candidates,
            "shift_std_px": images.shift_std_px,
            "softplus": softplus,
        }
    return paper_models.train(
        engine, z_dim, images.images, images.ctf, images.preparation, effort,
        held_out=HELD_OUT, seed=arguments.seed, device=arguments.device, **config,
    )  # fmt: skip


def spread_outside(decoded: Tensor, radius_px: float, mask_radius_px: float) -> tuple[float, float]:
    """Standard deviations of the pixels of images (k, N, N) outside of the particle and within it.

    Outside is between ``radius_px`` and ``mask_radius_px`` from the middle.
    """
    distance = geometry.pixel_grid(decoded.shape[-1]).norm(dim=-1)
    outside = decoded[:, (distance > radius_px) & (distance <= mask_radius_px)]
    return float(outside.std()), float(decoded[:, distance <= radius_px].std())


def measure(engine: str, z_dim: int, softplus: bool, trained: Trained, images: Images) -> Row:
    """What a model does with the images held out."""
    terms = paper_models.bounds(trained.checkpoint, trained.store, trained.held)
    as_many = paper_models.bounds(
        trained.checkpoint, trained.store, trained.trained_on[: len(trained.held)]
    ).elbo
    decoded = paper_models.decode(trained.checkpoint, trained.posterior.z_mean)
    background, contrast = spread_outside(decoded, images.radius_px, images.preparation.mask_radius_px)
    surplus = float(as_many.mean() - terms.elbo.mean())
    kl_z = float(terms.kl_z.mean())
    return Row(engine, z_dim, softplus, trained, terms.elbo, surplus, kl_z, background, contrast)


def interpolations(row: Row, images: Images, pairs: Tensor) -> dict[str, Tensor]:
    """For each pair of held-out particles: one aligned, the images decoded between them, the other."""
    posterior, held = row.trained.posterior, row.trained.held
    name = {"coordinate": "spatial-VAE", "steerable": "steerable"}[row.engine]
    rows = {}
    for k, pair in enumerate(pairs):
        share = torch.linspace(0.0, 1.0, STEPS)[:, None]
        line = posterior.z_mean[pair[0]] * (1.0 - share) + posterior.z_mean[pair[1]] * share
        decoded = paper_models.decode(row.trained.checkpoint, line)
        aligned = geometry.align_images(
            images.images[held[pair]], posterior.psi_rad[pair], posterior.origin_px[pair]
        )
        aligned = (aligned - aligned.mean()) / aligned.std() * decoded.std() + decoded.mean()
        label = name + (", softplus" if row.softplus else "")
        rows[f"pair {k + 1}\n{label}"] = torch.cat([aligned[:1], decoded, aligned[1:]])
    return rows


def run_set(name: str, star: Path, setting: Setting, arguments) -> tuple[list[Row], list[str]]:
    """Trains and judges the models of a set, and draws its figure; prints each line as it is known."""
    size = SIZES[arguments.size]
    if arguments.z_dims is not None:
        size = dataclasses.replace(size, z_dims=tuple(arguments.z_dims))
    if arguments.epochs is not None:
        size = dataclasses.replace(size, spatial=dataclasses.replace(size.spatial, epochs=arguments.epochs))
    images = read(star, setting, size, arguments.seed)
    grid = images.preparation
    lines = [
        f"{name}: {len(images.images)} particles, {grid.box_px} px of {grid.pixel_size_angst:.2f} Å, "
        f"size {arguments.size}: {size}",
        HEAD,
    ]
    print("\n".join(lines), flush=True)
    models = [(engine, z, False) for engine in ("steerable", "coordinate") for z in size.z_dims]
    models.append(("coordinate", size.z_dims[-1], True))
    rows: list[Row] = []
    for engine, z_dim, softplus in models:
        trained = train_model(engine, z_dim, softplus, images, size, arguments)
        rows.append(measure(engine, z_dim, softplus, trained, images))
        baseline = next(row for row in rows if row.engine == engine)
        lines.append(rows[-1].text(baseline))
        print(lines[-1], flush=True)
    n_held = len(rows[0].trained.held)
    generator = torch.Generator().manual_seed(arguments.seed)
    pairs = torch.randperm(n_held, generator=generator)[: 2 * PAIRS].reshape(PAIRS, 2)
    shown = [interpolations(row, images, pairs) for row in rows if row.z_dim == size.z_dims[-1]]
    by_pair = {
        label: images_between
        for of_pair in zip(*(each.items() for each in shown), strict=True)
        for label, images_between in of_pair
    }
    titles = ["particle", "its mean", *[""] * (STEPS - 2), "its mean", "particle"]
    paper_models.save_figure(paper_models.draw_rows(by_pair, titles), f"paper_real_{name}")
    return rows, lines


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = paper_models.parser_of(__doc__, SIZES)
    parser.add_argument("--minutes", type=float, help="most minutes of a model's training by the clock")
    parser.add_argument("sets", nargs="*", default=list(SETS), help=" ".join(SETS))
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--z-dims", type=int, nargs="+", help="latent dimensions [those of the size]")
    parser.add_argument("--epochs", type=int, help="of the spatial-VAE [those of the size]")
    arguments = parser.parse_args(argv)
    lines = []
    for name in arguments.sets:
        lines += run_set(name, arguments.data / SETS[name].star, SETS[name], arguments)[1]
    trials.report("paper_real", lines)


if __name__ == "__main__":
    main()
