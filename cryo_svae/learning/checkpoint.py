"""Checkpoints: tensors and plain values in one file that loads with ``weights_only=True``."""

from __future__ import annotations

import dataclasses
import io
import logging
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cryo_svae
from cryo_svae.config import alternatives, fits
from cryo_svae.errors import InputError
from cryo_svae.formats.atomic import atomic_path
from cryo_svae.models import ENGINES
from cryo_svae.models.engine import Engine
from cryo_svae.particles.preprocessing import Preparation

log = logging.getLogger(__name__)

FORMAT = 1
LARGEST_BOX_PX, LARGEST_Z_DIM = 4096, 4096  # a file that claims more is damaged
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
    """Reads a checkpoint onto the CPU and checks all of it; raises InputError for any other file."""

    def wrong(found: str) -> InputError:
        return InputError(
            path,
            found=found,
            expected="a checkpoint written by cryo-svae",
            remedy="give the model.pt of a job; if it is damaged, train again.",
        )

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise wrong("no such file") from error
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise wrong(f"a file that torch cannot load ({said[:80]})") from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise wrong("other content")
    if content["format"] != FORMAT or content["engine"] not in ENGINES:
        found = f"format {content['format']}, engine {content['engine']!r} (cryo_svae {content['version']})"
        raise InputError(path, found=found, expected=f"format {FORMAT}", remedy="use that version.")
    if unfit := [name for name, is_fit in PLAIN.items() if not is_fit(content[name])]:
        raise wrong(f"{unfit[0]} of {str(content[unfit[0]])[:40]!r}")
    engine_class, config_class = ENGINES[content["engine"]]
    for name, kind in (("engine_config", config_class), ("preparation", Preparation)):
        if not _is_of(kind, content[name]):
            raise wrong(f"{name} with other fields than {kind.__name__}'s")
    config = config_class(**content["engine_config"])
    try:
        engine = engine_class(content["box_px"], content["z_dim"], config)
        engine.load_state_dict(content["model"])
        if content["optimizer"] is not None:
            torch.optim.Adam(engine.parameters()).load_state_dict(content["optimizer"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise wrong("weights that do not fit") from error
    if not all(bool(values.isfinite().all()) for values in engine.parameters()):
        raise wrong("weights that are not numbers")
    return Checkpoint(
        engine_name=content["engine"],
        engine=engine,
        preparation=Preparation(**content["preparation"]),
        use_ctf=content["use_ctf"],
        optimizer=content["optimizer"],
        epochs_done=content["epochs_done"],
        history=content["history"],
    )


def _is_of(kind: type[Any], values: object) -> bool:
    """Whether a mapping holds the fields of a dataclass, each of its type.

    Those whose default is None may be missing: models older than such a field did without it.
    """
    hints = typing.get_type_hints(kind)
    names = {item.name for item in dataclasses.fields(kind)}
    newer = {item.name for item in dataclasses.fields(kind) if item.default is None}
    if not isinstance(values, dict) or not names - newer <= values.keys() <= names:
        return False
    return all(
        any(fits(value, each) for each in alternatives(hints[name])) for name, value in values.items()
    )


def _is_history(rows: object) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(value, float) for value in row.values()) for row in rows
    )


PLAIN: dict[str, Callable[[Any], bool]] = {
    "box_px": lambda box: fits(box, int) and box in range(2, LARGEST_BOX_PX + 1, 2),
    "z_dim": lambda z_dim: fits(z_dim, int) and 1 <= z_dim <= LARGEST_Z_DIM,
    "use_ctf": lambda use_ctf: fits(use_ctf, bool),
    "epochs_done": lambda epochs: fits(epochs, int) and epochs >= 0,
    "history": _is_history,
}
