"""What is done with a finished job: images from anywhere in the latent space, and a new report."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryo_svae import config
from cryo_svae.config import ComputeConfig, SourceConfig
from cryo_svae.errors import InputError
from cryo_svae.formats.hdf5 import read_arrays
from cryo_svae.formats.mrc import write_stack
from cryo_svae.jobs.findings import findings, gather
from cryo_svae.jobs.folder import CHECKPOINT, CONFIG, Job
from cryo_svae.jobs.plan import average_classes, contrast_score, pick_device
from cryo_svae.learning.checkpoint import Checkpoint, load_checkpoint
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import ParticleSet, read_source
from cryo_svae.report.page import write_report
from cryo_svae.results import latent_classes, latent_lines
from cryo_svae.results.class_averages import class_averages

NEAREST_PARTICLES = 200  # averaged about a point of the latent space


@dataclass(frozen=True)
class FinishedJob:
    """A job read back from its folder."""

    job: Job
    settings: dict[str, Any]
    particles: ParticleSet
    checkpoint: Checkpoint
    table: EstimateTable

    @property
    def device(self) -> torch.device:
        """Where the job computes."""
        return pick_device(self.settings["device"])


def read_job(folder: Path) -> FinishedJob:
    """The particles, model and estimates of a finished job; InputError where one is missing."""
    path = folder / CONFIG
    if not path.exists():
        raise InputError(
            folder,
            found=f"no {CONFIG}",
            expected="a job folder",
            remedy="give the --out of a finished run.",
        )
    settings = config.read_yaml(path)
    source = config.build(SourceConfig, settings, str(path))
    compute = config.build(ComputeConfig, settings, str(path))
    particles = read_source(Path(settings["particles"]), source)
    arrays = read_arrays(folder / "latents.h5")
    doubles = {name: values.astype(np.float64) for name, values in arrays.items() if name != "usable"}
    columns = {**arrays, **doubles}
    table = EstimateTable(**{item.name: columns[item.name] for item in fields(EstimateTable)})
    if len(table) != len(particles):
        raise InputError(
            folder / "latents.h5",
            found=f"{len(table)} particles",
            expected=f"{len(particles)}, as in {particles.star.path}",
            remedy="run cryo-svae estimate again: the particle file has changed.",
        )
    model = Path(settings.get("model") or folder / CHECKPOINT)
    resolved = {**settings, **config.as_settings(source, compute)}
    return FinishedJob(Job(folder), resolved, particles, load_checkpoint(model), table)


def redraw_report(folder: Path) -> Path:
    """Writes report.html anew, from what the job holds; its path."""
    done = read_job(folder)
    source = ImageSource(done.particles)
    n_classes = done.settings.get("classes") or latent_classes.default_classes(len(done.particles))
    seed = done.settings["seed"]
    classes, result = average_classes(done.checkpoint, source, done.table, n_classes, seed, done.device)
    found = findings(done.checkpoint, done.table, classes, result, done.device)
    score = contrast_score(source, done.checkpoint.preparation, done.device)
    path = done.job.path("report.html")
    write_report(
        path, gather(done.job, done.particles, done.checkpoint, found, done.settings, score, done.device)
    )
    return path


def point_of(text: str, z_dim: int) -> NDArray[np.float64]:
    """z (1, d) of text such as "0.5,-1"."""
    try:
        point = np.array([[float(number) for number in text.split(",")]])
    except ValueError:
        point = np.full((1, 0), np.nan)
    if point.shape[1] != z_dim or not np.isfinite(point).all():
        raise InputError(
            "--z",
            found=f"'{text}'",
            expected=f"{z_dim} numbers, comma between them",
            remedy=f"write e.g. --z={','.join(['0.5'] * z_dim)}.",
        )
    return point


def check_line(name: str, z_dim: int) -> None:
    """Raises InputError unless a name is that of a latent or principal axis, "z1" or "pc1"."""
    names = [f"{kind}{k + 1}" for kind in ("z", "pc") for k in range(z_dim)]
    if name not in names:
        raise InputError(
            "--along", found=f"'{name}'", expected=f"one of {', '.join(names)}", remedy="name one of these."
        )


def average_at(folder: Path, z: str | None, along: str | None) -> list[Path]:
    """Decodes at a point or along an axis, and averages the particles there; the stacks written.

    About one point the 200 nearest particles are averaged; along an axis each
    particle goes to its nearest step on that axis.
    """
    done = read_job(folder)
    table, z_dim = done.table, done.checkpoint.engine.z_dim
    if (z is None) == (along is None):
        raise InputError(
            "the command line", found="neither or both", expected="--z or --along", remedy="give one."
        )
    bin_of = np.zeros(len(table), dtype=np.intp)
    usable = table.usable
    if z is not None:
        points, name = point_of(z, z_dim), "z" + z.replace(",", "_")
        distance = np.where(usable, ((table.z - points) ** 2).sum(1), np.inf)
        nearest = np.argsort(distance, kind="stable")[:NEAREST_PARTICLES]
        near = np.zeros(len(table), dtype=bool)
        near[nearest] = True
        usable = usable & near
    else:
        name = f"along_{along}"
        check_line(along or "", z_dim)
        line = latent_lines.line(table.z, usable, along or "")
        points, bin_of = line.point, np.abs(line.place[:, None] - line.step).argmin(1)
    preparation = done.checkpoint.preparation
    result = class_averages(
        ImageSource(done.particles),
        replace(table, usable=usable),
        bin_of + 1,
        len(points),
        preparation,
        use_ctf=done.checkpoint.use_ctf,
        seed=done.settings["seed"],
        device=done.device,
    )
    stacks = {
        f"decoded_{name}.mrcs": latent_classes.decode(done.checkpoint, points, done.device).numpy(),
        f"average_{name}.mrcs": result.image,
    }
    for file, images in stacks.items():
        write_stack(done.job.path(file), images, pixel_size_angst=preparation.pixel_size_angst)
    return [done.job.path(file) for file in stacks]
