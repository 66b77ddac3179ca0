"""Stages of a job: the only place where readers, engines and writers meet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cryo_svae
from cryo_svae import config
from cryo_svae.computing import distributed
from cryo_svae.config import ComputeConfig, OutputConfig, PoseConfig, SourceConfig
from cryo_svae.errors import TrainingError
from cryo_svae.formats.atomic import atomic_path
from cryo_svae.formats.mrc import write_stack
from cryo_svae.formats.star import write_tables
from cryo_svae.jobs.findings import Findings, findings, gather
from cryo_svae.jobs.folder import CHECKPOINT, Job, digest, digest_of_stacks
from cryo_svae.jobs.plan import (
    Plan,
    average_classes,
    check_fits,
    contrast_score,
    fit_checkpoint,
    hold_poses,
    new_checkpoint,
    pick_device,
    plan_training,
)
from cryo_svae.learning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cryo_svae.learning.estimation import estimate
from cryo_svae.learning.training import EPOCH_COLUMNS, trains_in_bfloat16
from cryo_svae.particles.close_picks import close_picks
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import UNDISTORTED, ParticleSet, read_source
from cryo_svae.particles.plausibility import doubts, ignored_aberrations
from cryo_svae.particles.preprocessing import Preparation
from cryo_svae.report.page import write_report
from cryo_svae.results import export, latent_classes
from cryo_svae.results.relion_class2d import classes_table, write_class2d
from cryo_svae.results.selection import read_job_particles

log = logging.getLogger(__name__)

CONTRAST_SIGNIFICANCE = 5.0  # standard errors of the mean


def describe(particles: ParticleSet) -> list[str]:
    """What was understood of a particle set, a line each."""
    boxes = sorted(set(particles.box_px.tolist()))
    sizes = sorted(set(np.round(particles.pixel_size_angst, 6).tolist()))
    lines = [
        f"particles     {len(particles):,} in {len(particles.stacks):,} stack(s)",
        f"style         {_style(particles)}",
        f"optics        {len(particles.groups)} group(s): {', '.join(particles.groups[:8])}",
        f"box           {', '.join(map(str, boxes))} px",
        f"pixel size    {', '.join(f'{size:g}' for size in sizes)} Å",
    ]
    if outside := outside_of_project(particles):
        lines.append(f"outside       {len(outside):,} stack(s) of other folders: {', '.join(outside[:4])}")
    if particles.ctf is None:
        where = "file" if particles.cs is None else "file (it may be in a --passthrough file)"
        return [*lines, f"CTF           none in the {where}"]
    defocus = (particles.ctf.defocus_u_angst + particles.ctf.defocus_v_angst) / 2e4
    voltages = sorted(set(particles.ctf.voltage_kv.tolist()))
    return [
        *lines,
        f"CTF           defocus {defocus.min():.2f} to {defocus.max():.2f} µm, "
        f"{', '.join(f'{v:g}' for v in voltages)} kV",
        *_handled(particles),
    ]


def _handled(particles: ParticleSet) -> list[str]:
    """What the file says was done to the images, and is taken into account."""
    ctf = particles.ctf
    named = {
        "phase-flipped": None if ctf is None else ctf.phase_flipped,
        "premultiplied by the CTF": None if ctf is None else ctf.premultiplied,
    }
    said = [f"{int(which.sum()):,} {name}" for name, which in named.items() if which is not None]
    n_distorted = int((particles.magnification != UNDISTORTED).any(1).sum())
    said += [f"{n_distorted:,} distorted (rlnMagMat)"] if n_distorted else []
    return [f"images        {', '.join(said)}"] if said else []


def outside_of_project(particles: ParticleSet) -> list[str]:
    """Stacks that are neither under the current folder nor beside or under the particle file."""
    folders = [Path.cwd().resolve(), particles.star.path.resolve().parent]
    found = [info.path.resolve() for info in particles.stacks]
    return [str(path) for path in found if not any(path.is_relative_to(folder) for folder in folders)]


def _style(particles: ParticleSet) -> str:
    if particles.cs is not None:
        said = {None: "no blob/sign", True: "protein dark (blob/sign)", False: "protein white (blob/sign)"}
        return f"CryoSPARC, {said[particles.is_dark]}"
    return "RELION 3.0, one block" if particles.is_relion30 else "RELION 3.1 or later"


def say_close_picks(particles: ParticleSet, preparation: Preparation) -> None:
    """How many particles may be picked twice, and where they are many a warning."""
    close = close_picks(particles, preparation.mask_diameter_angst)
    if close is not None:
        log.info("close picks   %s", close)
        for line in close.doubts():
            log.warning("%s: %s", particles.star.path, line)


def train(job: Job, particles: ParticleSet, plan: Plan) -> Checkpoint:
    """Trains a model on a particle set, from the job's checkpoint where there is one."""
    job.write_config(plan.settings)
    for name, value in plan.settings.items():
        log.info("%-19s %s", name, value)
    for line in ignored_aberrations(particles, plan.preparation.pixel_size_angst):
        log.warning(line)
    say_close_picks(particles, plan.preparation)
    device = pick_device(plan.settings["device"])
    with job.timed("contrast"):
        check_contrast(ImageSource(particles), plan.preparation, device)
    path = job.path(CHECKPOINT)
    if path.exists():
        checkpoint = load_checkpoint(path)
        log.info("resumed after epoch %d", checkpoint.epochs_done)
    else:
        checkpoint = new_checkpoint(plan)

    def on_epoch(current: Checkpoint) -> None:
        if distributed.rank() > 0:
            return
        save_checkpoint(path, current)
        write_epochs(job.path("epochs.tsv"), current.history)
        if current.history:
            row = current.history[-1]
            log.info(
                "epoch %d/%d  bound %.2f nats (held out %.2f), KL of z %.2f, of pose %.2f, %.1f s",
                row["epoch"],
                plan.settings["epochs"],
                row["elbo"],
                row["held_out_elbo"],
                row["kl_z"],
                row["kl_pose"],
                row["seconds"],
            )

    if trains_in_bfloat16(checkpoint.engine, device):
        log.info("training multiplies matrices in bfloat16")
    with _naming_the_checkpoint(path):
        waited_s = fit_checkpoint(
            checkpoint, particles, plan, job.folder, on_epoch, job.before_batch, job.timed
        )
    for part, seconds in waited_s.items():
        job.note_waiting(part, seconds)
    return checkpoint


@contextmanager
def _naming_the_checkpoint(path: Path) -> Iterator[None]:
    """An error of training also says where the last good model is."""
    try:
        yield
    except TrainingError as error:
        if not path.exists():
            raise
        epochs = load_checkpoint(path).epochs_done
        raise TrainingError(f"{error}\n  The last good model, after epoch {epochs}, is {path}.") from error


def check_contrast(images: ImageSource, preparation: Preparation, device: torch.device) -> float:
    """Mean of the middle of the particles, in its standard errors; warns where the protein seems dark."""
    score = contrast_score(images, preparation, device)
    if score < -CONTRAST_SIGNIFICANCE:
        remedy = "use --no-invert" if preparation.invert else "add --invert"
        log.warning("the protein seems dark (%.0f standard errors): %s if so", score, remedy)
    return score


def write_epochs(path: Path, history: list[dict[str, float]]) -> None:
    """epochs.tsv: bounds in nats a particle, and seconds, an epoch a row."""
    rows = ["\t".join(EPOCH_COLUMNS)]
    rows += [
        "\t".join(str(r["epoch"]) if c == "epoch" else f"{r[c]:.6f}" for c in EPOCH_COLUMNS)
        for r in history
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(rows) + "\n")


def write_estimates(
    job: Job, particles: ParticleSet, checkpoint: Checkpoint, settings: Mapping[str, Any]
) -> None:
    """Estimates every particle; writes particles.star, stacks, classes and latents.h5.

    Several processes estimate together; the first averages and writes alone.
    """
    device = pick_device(settings["device"])
    source = ImageSource(particles, job.before_batch)
    with job.timed("estimation"):
        table = estimate(checkpoint, source, device)
    distributed.part()
    if distributed.rank() > 0:
        return
    job.note_waiting("estimation", source.waited_s)
    n_classes = settings["classes"] or latent_classes.default_classes(len(particles))
    with job.timed("averages"):
        classes, result = average_classes(checkpoint, source, table, n_classes, settings["seed"], device)
        found = findings(checkpoint, table, classes, result, device)
    with job.timed("files"):
        _write_files(job, particles, checkpoint, found, settings)
    with job.timed("report"):
        score = contrast_score(source, checkpoint.preparation, device)
        page = gather(job, particles, checkpoint, found, settings, score, device)
        write_report(job.path("report.html"), page)
    if len(classes.centre) < n_classes:
        log.info(
            "fewer classes than the %d asked for: z is not known well enough to tell so many apart",
            n_classes,
        )
    log.info(
        "%d classes of %d particles; open %s",
        len(classes.centre),
        int(table.usable.sum()),
        job.path("report.html"),
    )


def _write_files(
    job: Job,
    particles: ParticleSet,
    checkpoint: Checkpoint,
    found: Findings,
    settings: Mapping[str, Any],
) -> None:
    """Writes all files of the results except report.html."""
    table, classes, result = found.table, found.classes, found.class_averages
    pixel_size_angst = checkpoint.preparation.pixel_size_angst

    stack = job.path("classes.mrcs")
    stacks = {"decoded.mrcs": found.decoded.numpy(), stack.name: result.image}
    stacks |= {f"traversal_{line.label}.mrcs": line.image for line in found.traversals}
    for name, images in stacks.items():
        write_stack(job.path(name), images, pixel_size_angst=pixel_size_angst)
    columns = classes_table(stack, result, classes.centre, found.montage_psi_rad, found.montage_origin_px)
    write_tables(job.path("classes.star"), {"classes": columns})
    attributes = {
        "program": f"cryo_svae {cryo_svae.__version__}",
        "torch": str(torch.__version__),
        "particles": str(particles.star.path),
        "config": "\n".join(f"{name}: {value}" for name, value in settings.items()),
    }
    export.write_latents(job.path("latents.h5"), table, classes, attributes)
    path = job.path("particles.star")
    export.write_particles(path, particles, table, classes, settings["overwrite_pose"])
    if particles.cs is not None:
        export.write_cs_particles(job.path("particles.cs"), particles, table, classes)
    star, block = read_job_particles(job.folder)
    write_class2d(
        job.path("Class2D"),
        star,
        block,
        table,
        result,
        particle_diameter_angst=checkpoint.preparation.mask_diameter_angst,
        use_ctf=checkpoint.use_ctf,
    )


def write_record(job: Job, particles: ParticleSet, settings: Mapping[str, Any]) -> None:
    """run.json, with what was read."""
    star = particles.star.path
    stacks = {str(info.path): info.path.stat().st_size for info in particles.stacks[:1000]}
    with job.timed("digests"):
        inputs = {
            "star": str(star),
            "sha256": digest(star),
            "particles": len(particles),
            "stack_bytes": stacks,
            "stacks_sha256": digest_of_stacks(particles.stacks),
        }
    if settings.get("passthrough"):
        other = Path(settings["passthrough"])
        inputs |= {"passthrough": str(other), "passthrough_sha256": digest(other)}
    if settings.get("model"):
        inputs |= {"model": str(settings["model"]), "model_sha256": digest(Path(settings["model"]))}
    job.write_record(inputs, settings, pick_device(settings["device"]))


def load_particles(job: Job, settings: Mapping[str, Any], source: str) -> ParticleSet:
    """The particle set that the settings name, described in the log."""
    of_source = config.build(SourceConfig, settings, source)
    with job.timed("particle file"):
        particles = read_source(Path(settings["particles"]), of_source)
    for line in describe(particles):
        log.info(line)
    for line in doubts(particles):
        log.warning(line)
    return particles


def run(job: Job, settings: Mapping[str, Any], source: str) -> None:
    """Trains, estimates and writes everything: the whole job."""
    particles = load_particles(job, settings, source)
    plan = plan_training(settings, particles, source)
    checkpoint = train(job, particles, plan)
    write_estimates(job, particles, checkpoint, plan.settings)
    write_record(job, particles, plan.settings)


def train_only(job: Job, settings: Mapping[str, Any], source: str) -> None:
    """Trains and leaves model.pt."""
    particles = load_particles(job, settings, source)
    plan = plan_training(settings, particles, source)
    train(job, particles, plan)
    write_record(job, particles, plan.settings)


def estimate_only(job: Job, settings: Mapping[str, Any], source: str) -> None:
    """Estimates a particle set, perhaps another one, with a trained model."""
    checkpoint = load_checkpoint(Path(settings["model"]))
    particles = load_particles(job, settings, source)
    check_fits(particles, checkpoint)
    say_close_picks(particles, checkpoint.preparation)
    of_pose = config.build(PoseConfig, settings, source)
    hold_poses(checkpoint, particles, of_pose)
    of_compute = config.build(ComputeConfig, settings, source)
    of_output = config.build(OutputConfig, settings, source)
    resolved = {**settings, **config.as_settings(of_pose, of_compute, of_output)}
    job.write_config(resolved)
    write_estimates(job, particles, checkpoint, resolved)
    write_record(job, particles, resolved)
