"""A hinge in every in-plane rotation: the paper's Table 1 and Figure 4, with the Bayes limit beside.

    python -m benchmarks.paper_hinge --source ../shared/data/motion [--size SIZE] [--minutes 15]

The paper simulated 5HDB, whose images are no longer to be had; Hsp90, its arms opened, stands in (without
--source: the built-in hinge). Centred, psi uniform; a fifth of the images is held out, and every
number is of those. ``paper``, the default, is its size (16,000 + 4,000 images of 40 px, 2 x 500 units) and
wants a GPU. The table goes to results/paper_hinge.txt, the figure to results/paper_hinge.png.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import paper_models, trials
from benchmarks.bayes_limit import posterior_mean
from benchmarks.measures import circular_correlation, r_z
from benchmarks.paper_models import Effort, Trained
from cryo_svae.imaging import geometry
from cryo_svae.particles.preprocessing import Preparation, prepare
from cryo_svae.simulate import Molecule, SimulateConfig, Simulated, load_molecule, project, simulate

HELD_OUT = 0.2
COLUMNS = 9  # of the figure
OUTER = 0.03  # quantiles of conformation and of z that a manifold runs between are this and 1 - this


@dataclass(frozen=True)
class Size:
    """How much is computed.

    snr: as 0.1 at 40 px; an image of fewer pixels holds as much of it where a pixel holds more.
    """

    n_particles: int
    box_px: int
    snr: float
    hidden: int
    encoder_hidden: int
    z_delay: int
    pose_candidates: int
    spatial: Effort
    vanilla: Effort
    steerable_epochs: int


SIZES = {
    "paper": Size(20_000, 40, 0.1, 500, 500, 2, 1, Effort(100), Effort(100), 20),
    "wide": Size(
        20_000, 40, 0.1, 500, 500, 1, 4,
        Effort(100, minutes=60, batch_size=25, learning_rate=2e-4), Effort(100), 20,
    ),
    "cpu": Size(
        20_000, 40, 0.1, 64, 256, 1, 4,
        Effort(100, minutes=25, batch_size=25, learning_rate=1e-3),
        Effort(20, learning_rate=1e-3), 20,
    ),
    "small": Size(
        5_000, 24, 0.28, 64, 256, 2, 4,
        Effort(100, minutes=25, batch_size=25, learning_rate=1e-3),
        Effort(40, batch_size=50, learning_rate=1e-3), 40,
    ),
    "quick": Size(
        1_250, 24, 0.28, 64, 128, 2, 4,
        Effort(8, batch_size=25, learning_rate=2e-3), Effort(20, batch_size=25, learning_rate=1e-3), 25,
    ),
}  # fmt: skip
MODELS = {
    "vanilla, 1-D": ("vanilla", 1),
    "vanilla, 2-D": ("vanilla", 2),
    "steerable": ("steerable", 1),
    "spatial-VAE": ("coordinate", 1),
}


@dataclass(frozen=True)
class Row:
    """What the held-out images of a model give: z (n, d); psi (n,) in rad, None where it has none."""

    name: str
    z: Tensor
    psi_rad: Tensor | None
    took: str

    def scores(self, truth: Simulated) -> tuple[float, float]:
        """Correlations with conformation and with rotation, of whichever latent has the best.

        A content coordinate counts for rotation by its multiple correlation with the cosines and sines
        of psi, 2 psi and 3 psi: the kindest measure of a number against an angle, as vanilla models
        tend to learn the turn of an oblong or three-cornered blob, one whole turn of psi 2 or 3 of it.
        """
        conformation, psi = truth.conformation[:, 0].double().numpy(), truth.psi_rad.double().numpy()
        coordinates = self.z.double().numpy().T
        of_conformation = max(r_z(z, conformation) for z in coordinates)
        if self.psi_rad is not None:
            return of_conformation, circular_correlation(self.psi_rad.double().numpy(), psi)
        turn = np.stack([wave(m * psi) for m in (1, 2, 3) for wave in (np.cos, np.sin)], 1)
        return of_conformation, max(r_z(turn, z) for z in coordinates)

    def text(self, truth: Simulated) -> str:
        """A line of the table."""
        conformation, rotation = self.scores(truth)
        return f"{self.name:14s} {conformation:12.3f} {rotation:9.3f} {self.took}"


def rows_of(simulated: Simulated, rows: Tensor) -> Simulated:
    """Some of the images; all are centred, in focus and seen along z."""
    names = ("images", "conformation", "psi_rad", "origin_px", "is_junk")
    return dataclasses.replace(simulated, **{name: getattr(simulated, name)[rows] for name in names})


def train_model(name: str, simulated: Simulated, size: Size, arguments) -> Trained:
    """A model of the table, with the paper's settings as far as the size has them."""
    engine, z_dim = MODELS[name]
    box, pixel_size = simulated.images.shape[-1], simulated.pixel_size_angst
    preparation = Preparation(
        box_px=box, pixel_size_angst=pixel_size, mask_diameter_angst=(box - 2) * pixel_size, invert=False
    )
    effort = size.vanilla if engine == "vanilla" else size.spatial
    config: dict[str, object] = {"hidden": size.hidden, "encoder_hidden": size.encoder_hidden}
    if engine == "coordinate":
        config |= {
            "translate": False,
            "z_delay": size.z_delay,
            "pose_candidates": size.pose_candidates,
        }
        if arguments.minutes is not None:
            effort = dataclasses.replace(effort, minutes=arguments.minutes)
    elif engine == "steerable":
        effort, config = Effort(size.steerable_epochs), {"max_shift_px": 0.0}
    images = prepare(simulated.images, pixel_size, preparation)[0]
    return paper_models.train(
        engine, z_dim, images, None, preparation, effort,
        held_out=HELD_OUT, seed=arguments.seed, device=arguments.device, **config,
    )  # fmt: skip


def manifold(trained: Trained, row: Row, k: int, truth: Simulated) -> Tensor:
    """Decoded images along coordinate k of z, others at their median; turned and ordered as the truth."""
    z = row.z.median(0).values.repeat(COLUMNS, 1)
    steps = torch.quantile(row.z[:, k], torch.linspace(OUTER, 1 - OUTER, COLUMNS))
    rises = float(np.corrcoef(row.z[:, k].numpy(), truth.conformation[:, 0].numpy())[0, 1]) >= 0
    z[:, k] = steps if rises else steps.flip(0)
    images = paper_models.decode(trained.checkpoint, z)
    if row.psi_rad is None:
        return images
    offset = torch.exp(1j * (row.psi_rad - truth.psi_rad)).mean().angle()
    return geometry.pose_references(images, offset.repeat(COLUMNS), images.new_zeros(COLUMNS, 2))


def true_manifold(molecule: Molecule, truth: Simulated) -> Tensor:
    """Noiseless images between the same quantiles of the conformation, at pose zero."""
    steps = torch.quantile(truth.conformation[:, 0], torch.linspace(OUTER, 1 - OUTER, COLUMNS))
    return project(
        molecule, steps[:, None], torch.zeros(COLUMNS), torch.zeros(COLUMNS, 2),
        box_px=truth.images.shape[-1], pixel_size_angst=truth.pixel_size_angst,
    )  # fmt: skip


def simulated_and_molecule(size: Size, source: Path | None, seed: int) -> tuple[Simulated, Molecule]:
    """The images, and the molecule they show."""
    name = "hinge" if source is None else "hsp90"
    simulated = simulate(
        SimulateConfig(
            molecule=name,
            source=source,
            n_particles=size.n_particles,
            box=size.box_px,
            snr=size.snr,
            shift_std_px=0.0,
            seed=seed,
        )
    )
    return simulated, load_molecule(name, source)


def run(arguments) -> dict[str, tuple[float, float]]:
    """Trains and judges the models; writes table and figure; their scores."""
    size = SIZES[arguments.size]
    simulated, molecule = simulated_and_molecule(size, arguments.source, arguments.seed)
    head = f"{'hinge' if arguments.source is None else 'hsp90'}, size {arguments.size}: {size}"
    lines = [head, f"{'held-out images':14s} {'conformation':>11s} {'rotation':>9s} {paper_models.TOOK}"]
    print("\n".join(lines), flush=True)
    pictures: dict[str, Tensor] = {}
    scores: dict[str, tuple[float, float]] = {}
    for name in arguments.models:
        trained = train_model(name, simulated, size, arguments)
        truth = rows_of(simulated, trained.held)
        if not pictures:
            order = torch.quantile(truth.conformation[:, 0], torch.linspace(OUTER, 1 - OUTER, COLUMNS))[
                :, None
            ]
            like = (truth.conformation[:, 0] - order).abs().argmin(1)
            pictures = {"truth": true_manifold(molecule, truth), "particles": truth.images[like]}
            limit = posterior_mean(truth, molecule, 0.0)
            row = Row("Bayes limit", limit.conformation, limit.psi_rad, "")
            lines.append(row.text(truth))
            scores[row.name] = row.scores(truth)
            print(lines[-1], flush=True)
        posterior = trained.posterior
        has_pose = trained.checkpoint.engine_name != "vanilla"
        row = Row(name, posterior.z_mean, posterior.psi_rad if has_pose else None, trained.took)
        lines.append(row.text(truth))
        scores[name] = row.scores(truth)
        print(lines[-1], flush=True)
        for k in range(row.z.shape[1]):
            label = name if row.z.shape[1] == 1 else f"{name}, $z_{k + 1}$"
            pictures[label] = manifold(trained, row, k, truth)
        titles = ["closed"] + [""] * (COLUMNS - 2) + ["open"]
        paper_models.save_figure(paper_models.draw_rows(pictures, titles), "paper_hinge")
    trials.report("paper_hinge", lines)
    return scores


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """The command."""
    parser = paper_models.parser_of(__doc__, SIZES)
    parser.add_argument("--minutes", type=float, help="most minutes of a model's training by the clock")
    parser.add_argument("--source", type=Path, help="folder of the chains of Hsp90 [the built-in hinge]")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
