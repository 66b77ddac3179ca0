"""What the report shows of a finished job, gathered from its model, its estimates and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import cryo_svae
from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import ctf_2d
from cryo_svae.jobs.folder import Job
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.close_picks import close_picks
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import ParticleSet
from cryo_svae.particles.preprocessing import prepared_images, working_ctf
from cryo_svae.report import data as report
from cryo_svae.results import latent_classes, latent_lines
from cryo_svae.results.class_averages import ClassAverages
from cryo_svae.results.montage import montage_poses

EXAMPLES = 12
MANIFOLD_STEPS = 9


@dataclass(frozen=True)
class Findings:
    """What a job found: estimates, classes, and of each class two images of n pixels.

    decoded:                         (k, n, n) the model's image of each class's centre.
    montage_psi_rad, montage_origin: (k,), (k, 2) in px: the pose of class images in a montage.
    traversals:                      the model's images along lines through z; none where no z is known.
    """

    table: EstimateTable
    classes: latent_classes.Classes
    class_averages: ClassAverages
    decoded: Float[Tensor, "k n n"]
    montage_psi_rad: Float[Tensor, "k"]
    montage_origin_px: Float[Tensor, "k 2"]
    traversals: tuple[report.Traversal, ...]

    def in_one_frame(self, images: Float[Tensor, "k n n"]) -> NDArray[np.float32]:
        """The images of the classes, aligned to one another for display."""
        turned = geometry.align_images(images, self.montage_psi_rad, self.montage_origin_px)
        return np.asarray(turned.numpy())


def findings(
    checkpoint: Checkpoint,
    table: EstimateTable,
    classes: latent_classes.Classes,
    result: ClassAverages,
    device: torch.device,
) -> Findings:
    """Decoded images of the classes, with their poses in the montage, and of the lines through z."""
    decoded = latent_classes.decode(checkpoint, classes.centre, device)
    psi, origin = montage_poses(decoded, checkpoint.preparation.mask_radius_px)
    traversals = _traversals(checkpoint, table, device)
    return Findings(table, classes, result, decoded, psi, origin, traversals)


def gather(
    job: Job,
    particles: ParticleSet,
    checkpoint: Checkpoint,
    found: Findings,
    settings: Mapping[str, Any],
    contrast_score: float,
    device: torch.device,
) -> report.ReportData:
    """All data that the report shows."""
    table, result = found.table, found.class_averages
    preparation, ctf = checkpoint.preparation, particles.ctf
    number, names = _micrographs(particles)
    # of whole poses, which are searched by no prior where they are built on known ones
    is_free = preparation.known_pose is None
    shift_std_px = getattr(checkpoint.engine.config, "shift_std_px", None) if is_free else None
    return report.ReportData(
        title=job.folder.name or str(job.folder),
        particles_file=str(particles.star.path),
        job=str(job.folder),
        program=f"cryo_svae {cryo_svae.__version__}",
        engine=checkpoint.engine_name,
        box_px=preparation.box_px,
        pixel_size_angst=preparation.pixel_size_angst,
        z=table.z,
        z_std=table.z_std,
        psi_deg=table.psi_deg,
        origin_angst=table.origin_angst,
        figure_of_merit=table.figure_of_merit,
        class_number=found.classes.class_number,
        usable=table.usable,
        defocus_angst=None if ctf is None else ((ctf.defocus_u_angst + ctf.defocus_v_angst) / 2).numpy(),
        micrograph_number=number,
        micrograph_names=names,
        decoded=found.in_one_frame(found.decoded),
        class_centre=found.classes.centre,
        averages=report.ClassAverages(
            image=found.in_one_frame(torch.from_numpy(result.image)),
            frequency_per_angst=result.frequency_per_angst,
            frc=result.frc,
            resolution_angst=result.resolution_0143_angst,
            resolution_05_angst=result.resolution_05_angst,
        ),
        traversals=found.traversals,
        manifold=_manifold(checkpoint, table, device),
        examples=_examples(checkpoint, particles, table, device),
        learning=_learning(checkpoint),
        close_picks=close_picks(particles, preparation.mask_diameter_angst),
        contrast_score=contrast_score,
        inverted=preparation.invert,
        ctf_used=checkpoint.use_ctf,
        pose_found=checkpoint.engine_name != "vanilla",
        shift_prior_angst=None if shift_std_px is None else shift_std_px * preparation.pixel_size_angst,
        max_shift_angst=settings.get("max_shift") if is_free else None,
        files=tuple(sorted(path.name for path in job.folder.iterdir() if not path.name.startswith("."))),
    )


def _micrographs(particles: ParticleSet) -> tuple[NDArray[np.intp] | None, tuple[str, ...]]:
    if not particles.block.has("rlnMicrographName"):
        return None, ()
    names, number = np.unique(particles.block.text("rlnMicrographName"), return_inverse=True)
    return number, tuple(names.tolist())


def _traversals(
    checkpoint: Checkpoint, table: EstimateTable, device: torch.device
) -> tuple[report.Traversal, ...]:
    if not table.usable.any():
        return ()
    traversals = []
    for name in latent_lines.line_names(table.z.shape[1]):
        line = latent_lines.line(table.z, table.usable, name)
        images = latent_classes.decode(checkpoint, line.point, device).numpy()
        traversals.append(report.Traversal(label=name, values=line.step, image=images))
    return tuple(traversals)


def _manifold(checkpoint: Checkpoint, table: EstimateTable, device: torch.device) -> report.Manifold | None:
    """Images over the first two dimensions, or principal axes where there are more; the rest at means."""
    if not table.usable.any():
        return None
    z_dim = table.z.shape[1]
    names = ("pc1", "pc2") if z_dim > 2 else ("z1", "z2")
    across = latent_lines.line(table.z, table.usable, names[0], MANIFOLD_STEPS)
    points = across.point[None]
    up = np.zeros(1)
    if z_dim > 1:
        upwards = latent_lines.line(table.z, table.usable, names[1], MANIFOLD_STEPS)
        up, mean = upwards.step, table.z[table.usable].mean(0)
        points = points + (upwards.point - mean)[:, None]
    images = latent_classes.decode(checkpoint, points.reshape(-1, z_dim), device).numpy()
    grid = images.reshape(len(up), MANIFOLD_STEPS, *images.shape[1:])
    return report.Manifold(image=grid, across=across.step, up=up, names=names)


def reconstruct(
    checkpoint: Checkpoint,
    particles: ParticleSet,
    table: EstimateTable,
    row: NDArray[np.intp],
    device: torch.device,
) -> Float[Tensor, "e n n"]:
    """The model's images of particles ``row``, in their poses and under their CTFs."""
    decoded = latent_classes.decode(checkpoint, table.z[row], device)
    psi = torch.from_numpy(geometry.radians(table.psi_deg[row])).float()
    origin = torch.from_numpy(table.origin_angst[row] / checkpoint.preparation.pixel_size_angst).float()
    posed = geometry.pose_references(decoded, psi, origin)
    if not checkpoint.use_ctf or particles.ctf is None:
        return posed
    ctf = working_ctf(particles.ctf, checkpoint.preparation)[torch.from_numpy(row)]
    box_px = posed.shape[-1]
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(posed) * ctf_2d(ctf, box_px), s=(box_px, box_px))
    return filtered


def _examples(
    checkpoint: Checkpoint, particles: ParticleSet, table: EstimateTable, device: torch.device
) -> report.Examples | None:
    """Particles from the best to the worst figure of merit."""
    usable = np.flatnonzero(table.usable)
    if not len(usable):
        return None
    order = usable[np.argsort(-table.figure_of_merit[usable], kind="stable")]
    row = order[np.unique(np.linspace(0, len(order) - 1, EXAMPLES).astype(np.intp))]
    chunks = prepared_images(ImageSource(particles), row, checkpoint.preparation)
    images = torch.cat([images for _, images, _ in chunks])
    reconstruction = reconstruct(checkpoint, particles, table, row, device)
    return report.Examples(number=row + 1, image=images.numpy(), reconstruction=reconstruction.numpy())


def _learning(checkpoint: Checkpoint) -> report.LearningCurve | None:
    if not checkpoint.history:
        return None

    def column(name: str) -> NDArray[np.float64]:
        return np.array([epoch[name] for epoch in checkpoint.history])

    names = ("epoch", "elbo", "held_out_elbo", "kl_z", "kl_pose")
    return report.LearningCurve(**{name: column(name) for name in names})
