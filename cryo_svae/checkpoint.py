"""Checkpoints: tensors and plain values in one file that loads with ``weights_only=True``."""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cryo_svae
from cryo_svae.errors import InputError
from cryo_svae.formats.atomic import atomic_path
from cryo_svae.models import ENGINES
from cryo_svae.models.engine import Engine
from cryo_svae.preprocessing import Preparation

log = logging.getLogger(__name__)

FORMAT = 1
KEYS = {
    "format",
    "version",
    "engine",
    "box_px",
    "z_dim",
    "engine_config",
    "preparation",
    "use_ctf",
    "model",
    "optimizer",
    "epochs_done",
    "history",
}


@dataclass
class Checkpoint:
    """A model, how its images were prepared, and how far its training got.

    engine_name:  key of ``models.ENGINES``.
    use_ctf:      whether the CTF is in the model.
    optimizer:    state of Adam, None before the first epoch.
    epochs_done:  whole epochs trained.
    history:      one mapping an epoch, as in epochs.tsv.
    """

    engine_name: str
    engine: Engine
    preparation: Preparation
    use_ctf: bool
    optimizer: dict[str, Any] | None
    epochs_done: int
    history: list[dict[str, float]]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint whole or not at all."""
    engine = checkpoint.engine
    content = {
        "format": FORMAT,
        "version": cryo_svae.__version__,
        "engine": checkpoint.engine_name,
        "box_px": engine.box_px,
        "z_dim": engine.z_dim,
        "engine_config": dataclasses.asdict(engine.config),
        "preparation": dataclasses.asdict(checkpoint.preparation),
        "use_ctf": checkpoint.use_ctf,
        "model": engine.state_dict(),
        "optimizer": checkpoint.optimizer,
        "epochs_done": checkpoint.epochs_done,
        "history": checkpoint.history,
    }
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into a RuntimeError
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; InputError where it is not one of ours."""
    expected = "a checkpoint written by cryo-svae"
    remedy = "give the model.pt of a job; if it is damaged, train again."
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(path, found="no such file", expected=expected, remedy=remedy) from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        found = f"a file that torch cannot load ({str(error).splitlines()[0][:80]})"
        raise InputError(path, found=found, expected=expected, remedy=remedy) from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise InputError(path, found="other content", expected=expected, remedy=remedy)
    if content["format"] != FORMAT or content["engine"] not in ENGINES:
        found = f"format {content['format']}, engine {content['engine']!r} (cryo_svae {content['version']})"
        raise InputError(path, found=found, expected=f"format {FORMAT}", remedy="use that version.")
    engine_class, config_class = ENGINES[content["engine"]]
    engine = engine_class(content["box_px"], content["z_dim"], config_class(**content["engine_config"]))
    try:
        engine.load_state_dict(content["model"])
    except RuntimeError as error:
        raise InputError(path, found="weights that do not fit", expected=expected, remedy=remedy) from error
    return Checkpoint(
        engine_name=content["engine"],
        engine=engine,
        preparation=Preparation(**content["preparation"]),
        use_ctf=content["use_ctf"],
        optimizer=content["optimizer"],
        epochs_done=content["epochs_done"],
        history=content["history"],
    )
