"""Real particles: our classes beside those of RELION's 2-D classification, averaged by the same code.

    python -m benchmarks.real --data ../shared/data [apoferritin bgal]

Both programs align and sort the same particles into as many classes, within the circle that ours finds.
Their poses and classes then go through ``class_averages``, so that only poses and classes differ; a montage
of both is written to results/. With --coordinate the paper's engine is beside them.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import cryo_svae
from benchmarks import trials
from benchmarks.relion import classify
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.preprocessing import Preparation
from cryo_svae.results.class_averages import ClassAverages, class_averages

SEED = 0


@dataclass(frozen=True)
class Setting:
    """A set and how both programs are told to look at it."""

    star: str
    max_shift_angst: float
    z_dim: int
    classes: int


SETS = {
    "apoferritin": Setting("apoferritin/apof_48px_3.0A_relion31.star", 12.0, 2, 4),
    "bgal": Setting("bgal/bgal_40px_9.56A.star", 30.0, 4, 10),
}


def ours(
    setting: Setting, particles, engine: str = "steerable", **options
) -> tuple[cryo_svae.Model, EstimateTable, np.ndarray, float]:
    """Model, estimates, classes and seconds."""
    began = time.perf_counter()
    model = cryo_svae.fit(
        particles,
        engine=engine,
        z_dim=setting.z_dim,
        invert=True,
        max_shift=setting.max_shift_angst,
        seed=SEED,
        **options,
    )
    table = model.estimate(particles)
    classes, _ = model.average(particles, table, setting.classes)
    return model, table, classes.class_number, time.perf_counter() - began


def relion(
    setting: Setting, star: Path, like: EstimateTable, preparation: Preparation, iterations: int
) -> tuple[EstimateTable, np.ndarray, float]:
    """The same from relion_refine, on the particles as relion_preprocess normalises them."""
    pixel_size_angst = preparation.pixel_size_angst
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (stack,) = star.parent.glob("*.mrcs")
        radius = int(preparation.mask_radius_px)
        subprocess.run(
            f"relion_preprocess --operate_on {stack.resolve()} --operate_out white.mrcs --norm"
            f" --bg_radius {radius} --invert_contrast --set_angpix {pixel_size_angst}".split(),
            cwd=work, check=True, capture_output=True,
        )  # fmt: skip
        (work / star.name).write_text(star.read_text().replace(stack.name, "white.mrcs"))
        found = classify(
            work / star.name,
            classes=setting.classes,
            iterations=iterations,
            diameter_angst=preparation.mask_diameter_angst,
            offset_range_px=round(setting.max_shift_angst / pixel_size_angst),
            pad=2,
            threads=1,
        )
    table = replace(like, psi_deg=found.psi_deg, origin_angst=found.origin_angst)
    return table, found.class_number, found.seconds


def line(name: str, averages: ClassAverages, seconds: float) -> str:
    """Resolutions of the classes, weighted by their sizes."""
    share = averages.n_particles / averages.n_particles.sum()
    ring = (averages.frc * share[:, None]).sum(0)
    curve = " ".join(f"{value:5.2f}" for value in ring[2::2])
    filled = int((averages.n_particles > 0).sum())
    return f"{name:16s} {seconds:6.0f} {filled:8d}   {curve}"


def draw(path: Path, rows: dict[str, np.ndarray]) -> None:
    """Class averages, a row each, largest class first."""
    from matplotlib.figure import Figure

    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.2 * columns, 1.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_title(name, loc="left", fontsize=8)
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image, cmap="gray")
    trials.RESULTS.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Prints a table a set and draws its classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--relion-iterations", type=int, default=15)
    parser.add_argument(
        "--coordinate", action="store_true", help="the paper's engine as well, softplus pixels"
    )
    arguments = parser.parse_args()
    lines = []
    for name in arguments.sets:
        setting, star = SETS[name], arguments.data / SETS[name].star
        particles = cryo_svae.load(star)
        model, table, number, seconds = ours(setting, particles)
        preparation = model.checkpoint.preparation
        found = {"ours": (table, number, seconds)}
        found["RELION"] = relion(setting, star, table, preparation, arguments.relion_iterations)
        if arguments.coordinate:
            _, its_table, its_number, its_seconds = ours(setting, particles, "coordinate", softplus=True)
            found["coordinate engine"] = (its_table, its_number, its_seconds)
        side = preparation.box_px * preparation.pixel_size_angst
        shells = " ".join(f"{side / ring:5.1f}" for ring in range(2, preparation.box_px // 2, 2))
        lines += [
            f"{name}: FRC of half-sets, mean of classes",
            f"{'':16s} {'s':>6s} {'classes':>8s}   {shells} Å",
        ]
        pictures = {}
        for program, (its_table, its_number, its_seconds) in found.items():
            averages = class_averages(
                ImageSource(particles), its_table, its_number, setting.classes, preparation,
                use_ctf=model.checkpoint.use_ctf, seed=SEED, device=torch.device("cpu"),
            )  # fmt: skip
            lines.append(line(program, averages, its_seconds))
            together = class_averages(
                ImageSource(particles), its_table, np.ones_like(its_number), 1, preparation,
                use_ctf=model.checkpoint.use_ctf, seed=SEED, device=torch.device("cpu"),
            )  # fmt: skip
            lines.append(line(f"{program}, as one", together, its_seconds))
            order = np.argsort(-averages.n_particles)
            pictures[f"{program}: class averages"] = averages.image[order]
        centres = np.stack(
            [table.z[number == k + 1].mean(0) for k in range(setting.classes) if (number == k + 1).any()]
        )
        pictures["ours: decoded"] = model.decode(centres)
        draw(trials.RESULTS / f"real_{name}.png", pictures)
        print("\n".join(lines), flush=True)
    trials.report("real", lines)


if __name__ == "__main__":
    main()
