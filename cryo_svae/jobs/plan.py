"""What lies between particles and results: settings settled, a model trained, classes averaged."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryo_svae import config
from cryo_svae.config import (
    ComputeConfig,
    ModelConfig,
    OutputConfig,
    PoseConfig,
    PreparationConfig,
    SourceConfig,
    TrainingConfig,
    check,
)
from cryo_svae.errors import InputError, TrainingError
from cryo_svae.imaging import geometry
from cryo_svae.learning.checkpoint import Checkpoint
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.learning.training import Schedule, fit, seed_everything
from cryo_svae.learning.training_store import TrainingStore, build_store
from cryo_svae.models import CONFIG_CLASSES, ENGINES
from cryo_svae.models.engine import TrainingDefaults
from cryo_svae.particles.extent import fitted
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.known_poses import known_poses
from cryo_svae.particles.particle_set import ParticleSet
from cryo_svae.particles.preprocessing import CPU, Preparation, plan_preparation, prepared_images
from cryo_svae.results import latent_classes
from cryo_svae.results.class_averages import ClassAverages, class_averages

log = logging.getLogger(__name__)

MAX_SHIFT_SHARE_OF_BOX = 0.1
NO_SHIFT_ANGST = 1e-3  # a prior as good as fixed, for engines that need one
CONTRAST_PARTICLES = 2000
LEAST_LOWEST_PX = 12  # working pixels, of which origins are first sought at wavelengths of six and more
MOST_HIGHEST_SHARE = 0.125  # of the box: then eight rings are compared


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
    if name == "cuda":  # by its number, as threads that read images know nothing of this one's choice
        return torch.device(name, torch.cuda.current_device())
    return torch.device(name)


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
    of_pose = config.build(PoseConfig, settings, source)
    of_training = config.build(TrainingConfig, settings, source)
    of_compute = config.build(ComputeConfig, settings, source)
    of_output = config.build(OutputConfig, settings, source)
    engine_class, config_class = ENGINES[of_model.engine]
    config.refuse_misplaced(settings, config_class, CONFIG_CLASSES, of_model.engine)
    preparation = plan_preparation(particles, of_images, engine_class.largest_box_px)
    pixel_size_angst = preparation.pixel_size_angst
    use_ctf = particles.ctf is not None if of_images.ctf is None else of_images.ctf
    if of_images.ctf and particles.ctf is None:
        raise InputError(
            "--ctf",
            found="no CTF parameters in the file",
            expected="rlnDefocusU and its companions",
            remedy="leave --ctf out, or estimate the CTF first.",
        )
    whole = preparation
    preparation = fitted(ImageSource(particles), whole, of_images, pick_device(of_compute.device))
    if preparation is not whole:
        diameter = preparation.mask_diameter_angst
        log.info(f"particles fit a circle of {diameter:.0f} Å, by their images (else --mask-diameter)")
    preparation = _with_known_poses(particles, preparation, of_pose, of_model)
    defaults = engine_class.training_defaults
    epochs, batch_size = of_training.epochs, of_training.batch_size
    if epochs is None:
        epochs = defaults.epochs_for(len(particles))
    if batch_size is None:
        device = pick_device(of_compute.device)
        batch_size = _batch_size(defaults, epochs * len(particles), preparation.box_px, device)
    found = {
        "box": preparation.box_px,
        "invert": preparation.invert,
        "mask_diameter": preparation.mask_diameter_angst,
        "ctf": use_ctf,
        "pose": "free",
        "max_shift": _farthest(of_pose, MAX_SHIFT_SHARE_OF_BOX * preparation.box_px * pixel_size_angst),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": defaults.learning_rate_for(batch_size),
        "classes": latent_classes.default_classes(len(particles)),
    }
    engine_config = config.build(config_class, settings, source)
    resolved = config.as_settings(
        of_source, of_images, of_model, of_pose, of_training, of_compute, of_output, engine_config
    )
    for name, value in found.items():
        if resolved[name] is None:
            resolved[name] = value
    if resolved["shift_std"] is None and of_model.engine != "steerable":
        resolved["shift_std"] = max(resolved["max_shift"] / 2, NO_SHIFT_ANGST)
    _check_band(of_model, preparation)
    lengths_angst = {
        "max_shift_px": resolved["max_shift"],
        "shift_std_px": resolved["shift_std"],
        "lowest_resolution_px": resolved["lowest_resolution"],
        "highest_resolution_px": resolved["highest_resolution"],
    }
    lengths_px = {
        name: None if length is None else length / pixel_size_angst
        for name, length in lengths_angst.items()
        if hasattr(engine_config, name)
    }
    engine_config = dataclasses.replace(
        engine_config, mask_radius_px=preparation.mask_radius_px, **lengths_px
    )
    if preparation.known_pose is not None:
        engine_config = engine_class.near_known_poses(
            engine_config, _psi_range_rad(of_pose), resolved["max_shift"] / pixel_size_angst
        )
    others = {name: value for name, value in settings.items() if name not in resolved}
    return Plan({**others, **resolved}, engine_config, preparation)


def _with_known_poses(
    particles: ParticleSet, preparation: Preparation, of_pose: PoseConfig, of_model: ModelConfig
) -> Preparation:
    """A preparation that undoes the file's poses, where they are fixed or searched about and are there."""
    if of_pose.pose is None or of_pose.pose == "free":
        return preparation
    if of_model.max_shift not in (None, _farthest(of_pose, 0.0)):  # as config.yaml repeats it
        raise InputError(
            "--max-shift",
            found=f"it with --pose {of_pose.pose}",
            expected="--shift-range, from the input's origins",
            remedy="leave one out.",
        )
    preparation = dataclasses.replace(preparation, known_pose=of_pose.pose)
    known_poses(particles, preparation)
    return preparation


def _psi_range_rad(of_pose: PoseConfig) -> float:
    return geometry.radians(of_pose.psi_range) if of_pose.pose == "prior" else 0.0


def _farthest(of_pose: PoseConfig, free_angst: float) -> float:
    """The largest shift in Å that is looked for."""
    if of_pose.pose is None or of_pose.pose == "free":
        return free_angst
    return of_pose.shift_range if of_pose.pose == "prior" else 0.0


def hold_poses(checkpoint: Checkpoint, particles: ParticleSet, of_pose: PoseConfig) -> None:
    """Has a trained model keep the file's poses, or search about them, as far as it was trained to."""
    trained = checkpoint.preparation.known_pose
    allowed = {None: ("free", "prior", "fixed"), "prior": ("prior", "fixed"), "fixed": ("fixed",)}[trained]
    pose = of_pose.pose or trained or "free"
    if pose not in allowed:
        raise InputError(
            "--pose",
            found=f"{pose}, of a model that was trained with --pose {trained}",
            expected=" or ".join(allowed),
            remedy="leave it out, or train a model so.",
        )
    if of_pose.pose is None or of_pose.pose == "free":
        known_poses(particles, checkpoint.preparation)
        return
    checkpoint.preparation = dataclasses.replace(checkpoint.preparation, known_pose=of_pose.pose)
    known_poses(particles, checkpoint.preparation)
    farthest_px = _farthest(of_pose, 0.0) / checkpoint.preparation.pixel_size_angst
    checkpoint.engine.stay_near(_psi_range_rad(of_pose), farthest_px)


def _check_band(of_model: ModelConfig, preparation: Preparation) -> None:
    """Raises InputError where bounds of resolution leave too little to align by."""
    size_angst = preparation.pixel_size_angst
    highest = of_model.highest_resolution or 2 * size_angst
    lowest = of_model.lowest_resolution or math.inf
    least, most = LEAST_LOWEST_PX * size_angst, MOST_HIGHEST_SHARE * preparation.box_px * size_angst
    check(highest <= most, "highest_resolution", highest, f"{most:.1f} Å or less, an eighth of the box")
    for bound, why in ((least, "twelve working pixels"), (2 * highest, "twice the highest resolution")):
        check(lowest >= bound, "lowest_resolution", lowest, f"{bound:.1f} Å or more, {why}")


def _batch_size(defaults: TrainingDefaults, n_images: int, box_px: int, device: torch.device) -> int:
    if device.type != "cuda":
        return defaults.batch_size
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    return defaults.batch_on_gpu(n_images, box_px, memory_bytes)


def new_checkpoint(plan: Plan) -> Checkpoint:
    """An untrained model."""
    settings = plan.settings
    seed_everything(settings["seed"], -1)
    engine_class, _ = ENGINES[settings["engine"]]
    engine = engine_class(plan.preparation.box_px, settings["z_dim"], plan.engine_config)
    return Checkpoint(
        settings["engine"], engine, plan.preparation, settings["ctf"], None, epochs_done=0, history=[]
    )


def fit_checkpoint(
    checkpoint: Checkpoint,
    particles: ParticleSet,
    plan: Plan,
    scratch: Path,
    on_epoch: Callable[[Checkpoint], None],
    before_batch: Callable[[], None] = lambda: None,
    timed: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> dict[str, float]:
    """Trains a model from where its checkpoint stands; ``scratch`` takes what exceeds the memory.

    Its two parts, "preparing" and "training", are each done within ``timed`` of that name; returns the
    seconds in which either waited for images, of the disk and in batches. What ``before_batch`` raises
    ends both.
    """
    settings = plan.settings
    source = ImageSource(particles, before_batch)
    device = pick_device(settings["device"])
    engine = checkpoint.engine.to(device)
    with timed("preparing"):
        store = build_store(engine, source, plan.preparation, settings["ctf"], scratch, device)
    report_unusable(particles, store)
    schedule = Schedule(
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        one_cycle=engine.training_defaults.schedule == "one-cycle",
        held_out=settings["held_out"],
        patience=settings["patience"],
        seed=settings["seed"],
    )
    with timed("training"):
        fit(checkpoint, store, schedule, device, on_epoch, before_batch)
    return {"preparing": source.waited_s, "training": store.waited_s}


def average_classes(
    checkpoint: Checkpoint,
    source: ImageSource,
    table: EstimateTable,
    n_classes: int,
    seed: int,
    device: torch.device,
) -> tuple[latent_classes.Classes, ClassAverages]:
    """Classes of z, and the CTF-corrected averages of their aligned particles."""
    classes = latent_classes.classify(table, n_classes, seed)
    return classes, class_averages(
        source,
        table,
        classes.class_number,
        len(classes.centre),
        checkpoint.preparation,
        use_ctf=checkpoint.use_ctf,
        seed=seed,
        device=device,
    )


def contrast_score(images: ImageSource, preparation: Preparation, device: torch.device = CPU) -> float:
    """Standard errors by which the middle of the particles is brighter than their background."""
    n_particles = len(images.particles)
    index = np.unique(np.linspace(0, n_particles - 1, min(n_particles, CONTRAST_PARTICLES)).astype(np.intp))
    middle = geometry.pixel_grid(preparation.box_px).norm(dim=-1) < 0.5 * preparation.mask_radius_px
    weight = (middle / middle.sum()).flatten().to(device)
    chunks = prepared_images(images, index, preparation, device=device)
    means = torch.cat([(prepared.flatten(1) @ weight)[usable] for _, prepared, usable in chunks])
    if len(means) < 2:
        return 0.0
    return float(means.mean() / (means.std() / len(means) ** 0.5).clamp_min(1e-12))


def report_unusable(particles: ParticleSet, store: TrainingStore) -> None:
    """Warns of NaN and constant images and of outliers; stops where nothing else is left."""
    usable = np.zeros(len(particles), dtype=bool)
    usable[store.particle] = True
    if not usable.all():
        log.warning(
            "%s: left out of training, figure of merit 0",
            _named(particles, np.flatnonzero(~usable), "hold NaN or are constant"),
        )
    if store.outlier is not None:
        log.warning(
            "%s: left out of training, as a few such images can spoil it for all; they are estimated all "
            "the same",
            _named(
                particles,
                store.particle[store.outlier.numpy()],
                "are far brighter than the others, or far stronger at low resolution (hot pixels? ice?)",
            ),
        )
    if len(store) == 0:
        raise TrainingError(
            f"{particles.star.path}: every image holds NaN or is constant.\n"
            "  To mend: check the stacks and the job that wrote them."
        )


def _named(particles: ParticleSet, rows: NDArray[np.intp], what: str) -> str:
    """How many images are something, and where the first of them are."""
    places = ", ".join(particles.place_of(int(row)) for row in rows[:5])
    more = ", …" if len(rows) > 5 else ""
    return f"{len(rows)} image(s) {what} ({particles.star.path.name}, {places}{more})"


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
    if particles.is_dark not in (None, grid.invert):
        log.warning(
            "%s says that the protein is %s (blob/sign), but the model was trained %s --invert",
            particles.star.path.name,
            "dark" if particles.is_dark else "white",
            "with" if grid.invert else "without",
        )
    if checkpoint.use_ctf and particles.ctf is None:
        raise InputError(
            particles.star.path,
            column="_rlnDefocusU",
            found="no CTF parameters",
            expected="those that the model was trained with",
            remedy="estimate the CTF first, or train with --no-ctf.",
        )
