"""Stages of a job: the only place where readers, engines and writers meet."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import cryo_svae
from cryo_svae import averages, config, export, geometry
from cryo_svae.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cryo_svae.class2d import classes_table, write_class2d
from cryo_svae.class_averages import class_averages
from cryo_svae.config import (
    ComputeConfig,
    ModelConfig,
    OutputConfig,
    PreparationConfig,
    SourceConfig,
    TrainingConfig,
)
from cryo_svae.errors import InputError, TrainingError
from cryo_svae.estimation import EstimateTable, estimate
from cryo_svae.formats.atomic import atomic_path
from cryo_svae.formats.mrc import write_stack
from cryo_svae.formats.star import write_tables
from cryo_svae.images import ImageSource
from cryo_svae.job import CHECKPOINT, Job, digest
from cryo_svae.models import CONFIG_CLASSES, ENGINES
from cryo_svae.particles import ParticleSet, read_particles
from cryo_svae.preprocessing import Preparation, plan_preparation, prepared_images
from cryo_svae.report.page import write_report
from cryo_svae.reporting import Findings, gather
from cryo_svae.selection import read_job_particles
from cryo_svae.store import TrainingStore, build_store
from cryo_svae.training import EPOCH_COLUMNS, Schedule, fit, seed_everything

log = logging.getLogger(__name__)

MAX_SHIFT_SHARE_OF_BOX = 0.1
NO_SHIFT_ANGST = 1e-3  # a prior as good as fixed, for engines that need one
CONTRAST_SIGNIFICANCE = 5.0  # standard errors of the mean
CONTRAST_PARTICLES = 2000


def pick_device(name: str) -> torch.device:
    """The device asked for; auto takes a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device",
            found="cuda, which torch does not see",
            expected="a CUDA device and a CUDA build of torch",
            remedy="use --device cpu, or install torch for your GPU.",
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe(particles: ParticleSet) -> list[str]:
    """What was understood of a particle set, a line each."""
    boxes = sorted(set(particles.box_px.tolist()))
    sizes = sorted(set(np.round(particles.pixel_size_angst, 6).tolist()))
    lines = [
        f"particles     {len(particles):,} in {len(particles.stacks):,} stack(s)",
        f"style         {'RELION 3.0, one block' if particles.is_relion30 else 'RELION 3.1 or later'}",
        f"optics        {len(particles.groups)} group(s): {', '.join(particles.groups[:8])}",
        f"box           {', '.join(map(str, boxes))} px",
        f"pixel size    {', '.join(f'{size:g}' for size in sizes)} Å",
    ]
    if particles.ctf is None:
        return [*lines, "CTF           none in the file"]
    defocus = (particles.ctf.defocus_u_angst + particles.ctf.defocus_v_angst) / 2e4
    voltages = sorted(set(particles.ctf.voltage_kv.tolist()))
    return [
        *lines,
        f"CTF           defocus {defocus.min():.2f} to {defocus.max():.2f} µm, "
        f"{', '.join(f'{v:g}' for v in voltages)} kV",
    ]


@dataclass(frozen=True)
class Plan:
    """A training settled: every setting with its default filled in, and what follows from them."""

    settings: dict[str, Any]
    engine_config: Any
    preparation: Preparation


def plan_training(settings: Mapping[str, Any], particles: ParticleSet, source: str) -> Plan:
    """Settings with every default found from the data; ``source`` is where they are from, for messages."""
    of_source = config.build(SourceConfig, settings, source)
    of_images = config.build(PreparationConfig, settings, source)
    of_model = config.build(ModelConfig, settings, source)
    of_training = config.build(TrainingConfig, settings, source)
    of_compute = config.build(ComputeConfig, settings, source)
    of_output = config.build(OutputConfig, settings, source)
    engine_class, config_class = ENGINES[of_model.engine]
    config.refuse_misplaced(settings, config_class, CONFIG_CLASSES, of_model.engine)
    preparation = plan_preparation(particles, of_images, engine_class.largest_box_px)
    pixel_size_angst = preparation.pixel_size_angst
    if of_images.ctf and particles.ctf is None:
        raise InputError(
            "--ctf",
            found="no CTF parameters in the file",
            expected="rlnDefocusU and its companions",
            remedy="leave --ctf out, or estimate the CTF first.",
        )
    defaults = engine_class.training_defaults
    found = {
        "box": preparation.box_px,
        "mask_diameter": preparation.mask_diameter_angst,
        "ctf": particles.ctf is not None,
        "max_shift": MAX_SHIFT_SHARE_OF_BOX * preparation.box_px * pixel_size_angst,
        "epochs": defaults.epochs_for(len(particles)),
        "batch_size": defaults.batch_size,
        "learning_rate": defaults.learning_rate,
        "classes": averages.default_classes(len(particles)),
    }
    engine_config = config.build(config_class, settings, source)
    resolved = config.as_settings(
        of_source, of_images, of_model, of_training, of_compute, of_output, engine_config
    )
    for name, value in found.items():
        if resolved[name] is None:
            resolved[name] = value
    if resolved["shift_std"] is None and of_model.engine != "steerable":
        resolved["shift_std"] = max(resolved["max_shift"] / 2, NO_SHIFT_ANGST)
    lengths_angst = {"max_shift_px": resolved["max_shift"], "shift_std_px": resolved["shift_std"]}
    lengths_px = {
        name: None if length is None else length / pixel_size_angst
        for name, length in lengths_angst.items()
        if hasattr(engine_config, name)
    }
    engine_config = dataclasses.replace(
        engine_config, mask_radius_px=preparation.mask_radius_px, **lengths_px
    )
    others = {name: value for name, value in settings.items() if name not in resolved}
    return Plan({**others, **resolved}, engine_config, preparation)


def train(job: Job, particles: ParticleSet, plan: Plan) -> Checkpoint:
    """Trains a model on a particle set, from the job's checkpoint where there is one."""
    resolved, preparation = plan.settings, plan.preparation
    job.write_config(resolved)
    for name, value in resolved.items():
        log.info("%-19s %s", name, value)
    device = pick_device(resolved["device"])
    images = ImageSource(particles)
    check_contrast(images, preparation)
    path = job.path(CHECKPOINT)
    if path.exists():
        checkpoint = load_checkpoint(path)
        log.info("resumed after epoch %d", checkpoint.epochs_done)
    else:
        seed_everything(resolved["seed"], -1)
        engine_class, _ = ENGINES[resolved["engine"]]
        engine = engine_class(preparation.box_px, resolved["z_dim"], plan.engine_config)
        checkpoint = Checkpoint(
            resolved["engine"], engine, preparation, resolved["ctf"], None, epochs_done=0, history=[]
        )
    with job.timed("preparation"):
        store = build_store(checkpoint.engine, images, preparation, resolved["ctf"], job.folder)
    report_unusable(particles, store)
    schedule = Schedule(
        epochs=resolved["epochs"],
        batch_size=resolved["batch_size"],
        learning_rate=resolved["learning_rate"],
        one_cycle=checkpoint.engine.training_defaults.schedule == "one-cycle",
        held_out=resolved["held_out"],
        patience=resolved["patience"],
        seed=resolved["seed"],
    )

    def on_epoch(current: Checkpoint) -> None:
        save_checkpoint(path, current)
        write_epochs(job.path("epochs.tsv"), current.history)
        if current.history:
            row = current.history[-1]
            log.info(
                "epoch %d/%d  bound %.2f nats (held out %.2f), KL of z %.2f, of pose %.2f, %.1f s",
                row["epoch"],
                schedule.epochs,
                row["elbo"],
                row["held_out_elbo"],
                row["kl_z"],
                row["kl_pose"],
                row["seconds"],
            )

    with job.timed("training"):
        fit(checkpoint, store, schedule, device, on_epoch)
    return checkpoint


def check_contrast(images: ImageSource, preparation: Preparation) -> float:
    """Mean of the particles' middle over its standard error; warns where the protein seems dark."""
    score = contrast_score(images, preparation)
    if score < -CONTRAST_SIGNIFICANCE:
        remedy = "leave --invert out" if preparation.invert else "add --invert"
        log.warning("the protein seems dark (%.0f standard errors): %s if so", score, remedy)
    return score


def contrast_score(images: ImageSource, preparation: Preparation) -> float:
    """Standard errors by which the middle of the particles is brighter than their background."""
    n_particles = len(images.particles)
    index = np.unique(np.linspace(0, n_particles - 1, min(n_particles, CONTRAST_PARTICLES)).astype(np.intp))
    middle = geometry.pixel_grid(preparation.box_px).norm(dim=-1) < 0.5 * preparation.mask_radius_px
    chunks = prepared_images(images, index, preparation)
    means = torch.cat([prepared[usable][:, middle].mean(1) for _, prepared, usable in chunks])
    if len(means) < 2:
        return 0.0
    return float(means.mean() / (means.std() / len(means) ** 0.5).clamp_min(1e-12))


def report_unusable(particles: ParticleSet, store: TrainingStore) -> None:
    """Warns of NaN and constant images; stops where nothing else is left."""
    usable = np.zeros(len(particles), dtype=bool)
    usable[store.particle] = True
    bad = np.flatnonzero(~usable)
    if len(bad):
        lines = ", ".join(str(particles.block.line_of(int(row))) for row in bad[:5])
        log.warning(
            "%d image(s) hold NaN or are constant (%s, line %s%s): left out of training, figure of merit 0",
            len(bad),
            particles.star.path.name,
            lines,
            ", …" if len(bad) > 5 else "",
        )
    if len(store) == 0:
        raise TrainingError(
            f"{particles.star.path}: every image holds NaN or is constant.\n"
            "  To mend: check the stacks and the job that wrote them."
        )


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
) -> EstimateTable:
    """Estimates every particle; writes particles.star, stacks, classes and latents.h5."""
    device = pick_device(settings["device"])
    source = ImageSource(particles)
    with job.timed("estimation"):
        table = estimate(checkpoint, source, device)
    n_classes = settings["classes"] or averages.default_classes(len(particles))
    classes = averages.classify(table, n_classes, settings["seed"])
    pixel_size_angst = checkpoint.preparation.pixel_size_angst

    def write(name: str, images: Float[Tensor, "k n n"]) -> None:
        write_stack(job.path(name), images.numpy(), pixel_size_angst=pixel_size_angst)

    write("decoded.mrcs", averages.decode(checkpoint, classes.centre, device))
    for axis in range(table.z.shape[1] if table.usable.any() else 0):
        points = averages.traversal_points(table, axis)
        write(f"traversal_z{axis + 1}.mrcs", averages.decode(checkpoint, points, device))
    with job.timed("averages"):
        result = class_averages(
            source,
            table,
            classes.class_number,
            len(classes.centre),
            checkpoint.preparation,
            use_ctf=checkpoint.use_ctf,
            seed=settings["seed"],
            device=device,
        )
    stack = job.path("classes.mrcs")
    write(stack.name, torch.from_numpy(result.image))
    write_tables(job.path("classes.star"), {"classes": classes_table(stack, result, classes.centre)})
    attributes = {
        "program": f"cryo_svae {cryo_svae.__version__}",
        "torch": str(torch.__version__),
        "particles": str(particles.star.path),
        "config": "\n".join(f"{name}: {value}" for name, value in settings.items()),
    }
    export.write_latents(job.path("latents.h5"), table, classes.class_number, attributes)
    export.write_particles(
        job.path("particles.star"), particles, table, classes.class_number, settings["overwrite_pose"]
    )
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
    with job.timed("report"):
        found = Findings(table, classes, result)
        score = contrast_score(source, checkpoint.preparation)
        page = gather(job, particles, checkpoint, found, settings, score, device)
        write_report(job.path("report.html"), page)
    log.info(
        "%d classes of %d particles; open %s",
        len(classes.centre),
        int(table.usable.sum()),
        job.path("report.html"),
    )
    return table


def write_record(job: Job, particles: ParticleSet, settings: Mapping[str, Any]) -> None:
    """run.json, with what was read."""
    star = particles.star.path
    stacks = {str(info.path): info.path.stat().st_size for info in particles.stacks[:1000]}
    inputs = {"star": str(star), "sha256": digest(star), "particles": len(particles), "stack_bytes": stacks}
    job.write_record(inputs, settings["seed"], pick_device(settings["device"]))


def load_particles(settings: Mapping[str, Any], source: str) -> ParticleSet:
    """The particle set that the settings name, described in the log."""
    of_source = config.build(SourceConfig, settings, source)
    particles = read_particles(
        Path(settings["particles"]), datadir=of_source.datadir, pixel_size_angst=of_source.pixel_size
    )
    for line in describe(particles):
        log.info(line)
    return particles


def run(job: Job, settings: Mapping[str, Any], source: str) -> None:
    """Trains, estimates and writes everything: the whole job."""
    particles = load_particles(settings, source)
    plan = plan_training(settings, particles, source)
    checkpoint = train(job, particles, plan)
    write_estimates(job, particles, checkpoint, plan.settings)
    write_record(job, particles, plan.settings)


def train_only(job: Job, settings: Mapping[str, Any], source: str) -> None:
    """Trains and leaves model.pt."""
    particles = load_particles(settings, source)
    plan = plan_training(settings, particles, source)
    train(job, particles, plan)
    write_record(job, particles, plan.settings)


def estimate_only(job: Job, settings: Mapping[str, Any], source: str) -> None:
    """Estimates a particle set, perhaps another one, with a trained model."""
    checkpoint = load_checkpoint(Path(settings["model"]))
    particles = load_particles(settings, source)
    check_fits(particles, checkpoint)
    of_compute = config.build(ComputeConfig, settings, source)
    of_output = config.build(OutputConfig, settings, source)
    resolved = {**settings, **config.as_settings(of_compute, of_output)}
    job.write_config(resolved)
    write_estimates(job, particles, checkpoint, resolved)
    write_record(job, particles, resolved)


def check_fits(particles: ParticleSet, checkpoint: Checkpoint) -> None:
    """Raises InputError where a model cannot be applied to a particle set."""
    grid = checkpoint.preparation
    needed_angst = grid.box_px * grid.pixel_size_angst
    field_angst = float((particles.box_px * particles.pixel_size_angst).min())
    if field_angst < needed_angst * (1 - 1e-6):
        raise InputError(
            particles.star.path,
            found=f"images of {field_angst:.1f} Å a side",
            expected=f"at least {needed_angst:.1f} Å, the side of the model's box",
            remedy="extract the particles in a larger box, or train a model on them.",
        )
    if float(particles.pixel_size_angst.max()) > grid.pixel_size_angst * (1 + 1e-6):
        raise InputError(
            particles.star.path,
            found=f"a pixel size of {particles.pixel_size_angst.max():g} Å",
            expected=f"at most {grid.pixel_size_angst:g} Å, the model's",
            remedy="extract the particles at a finer pixel size, or train a model on them.",
        )
    if checkpoint.use_ctf and particles.ctf is None:
        raise InputError(
            particles.star.path,
            column="_rlnDefocusU",
            found="no CTF parameters",
            expected="those that the model was trained with",
            remedy="estimate the CTF first, or train with --no-ctf.",
        )
