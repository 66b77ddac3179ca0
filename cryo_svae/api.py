"""cryo_svae in Python: load particles, fit a model, estimate, decode, average.

particles = cryo_svae.load("particles.star")
model = cryo_svae.fit(particles, z_dim=2, invert=True, epochs=10)
table = model.estimate(particles)         # z, psi_deg, origin_angst, … in input order
images = model.decode(table.z[:5])        # (5, box, box), pose zero
classes = model.average(particles, table, n_classes=10)
model.save("model.pt")
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cryo_svae import config
from cryo_svae.config import ComputeConfig, ModelConfig, PoseConfig, PreparationConfig, TrainingConfig
from cryo_svae.errors import InputError
from cryo_svae.jobs.plan import (
    average_classes,
    check_fits,
    fit_checkpoint,
    new_checkpoint,
    pick_device,
    plan_training,
)
from cryo_svae.learning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cryo_svae.learning.estimation import EstimateTable, estimate
from cryo_svae.models import CONFIG_CLASSES
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import ParticleSet, read_particles
from cryo_svae.results import latent_classes
from cryo_svae.results.class_averages import ClassAverages

SOURCE = "fit()"


def load(
    path: str | Path,
    *,
    datadir: str | Path | None = None,
    pixel_size_angst: float | None = None,
    passthrough: str | Path | None = None,
) -> ParticleSet:
    """Reads the particles of a RELION STAR file or a CryoSPARC .cs file, but not yet their images.

    datadir:          folder under which image paths are sought first, as ``--datadir``.
    pixel_size_angst: pixel size in Å for files that hold none, as ``--pixel-size``.
    passthrough:      a .cs file with more fields of the same particles, as ``--passthrough``.
    """
    return read_particles(
        Path(path),
        datadir=None if datadir is None else Path(datadir),
        pixel_size_angst=pixel_size_angst,
        passthrough=None if passthrough is None else Path(passthrough),
    )


def fit(particles: ParticleSet, **options: Any) -> Model:
    """Trains a model on particles; options as on the command line, e.g. ``z_dim=2``, ``epochs=10``."""
    known = (PreparationConfig, ModelConfig, PoseConfig, TrainingConfig, ComputeConfig, *CONFIG_CLASSES)
    config.refuse_unknown(options, known, SOURCE)
    plan = plan_training(options, particles, SOURCE)
    checkpoint = new_checkpoint(plan)
    with tempfile.TemporaryDirectory() as scratch:
        fit_checkpoint(checkpoint, particles, plan, Path(scratch), on_epoch=lambda _: None)
    return Model(checkpoint, plan.settings["device"], plan.settings["seed"])


def load_model(path: str | Path, *, device: str = "auto", seed: int = 0) -> Model:
    """Reads a model from the model.pt of a job, or from a file that ``Model.save`` wrote."""
    return Model(load_checkpoint(Path(path)), device, seed)


@dataclass(frozen=True)
class Model:
    """A trained model. ``seed`` decides how classes and half-sets are drawn in ``average``."""

    checkpoint: Checkpoint
    device: str
    seed: int

    def estimate(self, particles: ParticleSet) -> EstimateTable:
        """Content, pose and figure of merit of every particle, in the order of the file; degrees and Å."""
        check_fits(particles, self.checkpoint)
        return estimate(self.checkpoint, ImageSource(particles), pick_device(self.device))

    def decode(self, z: ArrayLike) -> NDArray[np.float32]:
        """The model's images (k, box, box) at points z (k, d): psi and origin 0, no CTF, protein white."""
        points = np.asarray(z, dtype=np.float64)
        d = self.checkpoint.engine.z_dim
        if points.ndim != 2 or points.shape[1] != d or not np.isfinite(points).all():
            raise InputError(
                "decode()",
                found=f"z of shape {points.shape}",
                expected=f"finite numbers of shape (k, {d})",
                remedy="give one row of numbers for each image.",
            )
        return latent_classes.decode(self.checkpoint, points, pick_device(self.device)).numpy()

    def average(
        self, particles: ParticleSet, table: EstimateTable, n_classes: int
    ) -> tuple[latent_classes.Classes, ClassAverages]:
        """Groups particles of similar z into classes; the classes, and their CTF-corrected averages."""
        device = pick_device(self.device)
        return average_classes(self.checkpoint, ImageSource(particles), table, n_classes, self.seed, device)

    def save(self, path: str | Path) -> None:
        """Writes the model, for ``load_model`` and ``cryo-svae estimate --model``."""
        save_checkpoint(Path(path), self.checkpoint)
