"""Settings: frozen dataclasses whose fields are at once command-line options, YAML keys and checks.

A field's ``metadata["help"]`` is its help on the command line; its annotation says how text is
read; ``__post_init__`` says what is allowed. Settings come from, in rising order: the defaults,
``--config FILE.yaml``, the command line. A run writes what it resolved to ``JOB/config.yaml``,
and repeats from that file.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from cryo_svae.errors import InputError

Config = TypeVar("Config")
EngineName = Literal["steerable", "coordinate", "vanilla"]


def option(default: Any, help_text: str) -> Any:
    """A dataclass field with its default and its help (purpose, unit, advice)."""
    return field(default=default, metadata={"help": help_text})


def derived(default: Any, help_text: str) -> Any:
    """A field that is no option: it is worked out from the data and from options in other units."""
    return field(default=default, metadata={"help": help_text, "derived": True})


def check(condition: bool, name: str, found: object, expected: str) -> None:
    """Raises the InputError of an option whose value is not allowed."""
    if not condition:
        flag = "--" + name.replace("_", "-")
        raise InputError(flag, found=repr(found), expected=expected, remedy=f"give {flag} another value.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where particles are read from."""

    datadir: Path | None = option(
        None, "folder under which image paths of the particle file are sought first"
    )
    pixel_size: float | None = option(None, "pixel size in Å, for files that do not hold one")
    passthrough: Path | None = option(None, "passthrough .cs file of a CryoSPARC job, joined by uid")

    def __post_init__(self) -> None:
        check(self.pixel_size is None or self.pixel_size > 0, "pixel_size", self.pixel_size, "Å above 0")


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """How images are prepared."""

    box: int | None = option(
        None, "working box in pixels (even), reached by Fourier cropping [their own, at most 64 or 128]"
    )
    invert: bool | None = option(
        None,
        "the protein is dark in the images: change their sign [as blob/sign of a .cs file says, else no]",
    )
    mask_diameter: float | None = option(
        None,
        "diameter in Å of the circle that holds the particle; outside is background [found from images]",
    )
    ctf: bool | None = option(None, "model the CTF [yes where the file holds CTF parameters]")

    def __post_init__(self) -> None:
        box_ok = self.box is None or (self.box >= 8 and self.box % 2 == 0)
        check(box_ok, "box", self.box, "an even number of pixels, 8 or more")
        diameter_ok = self.mask_diameter is None or self.mask_diameter > 0
        check(diameter_ok, "mask_diameter", self.mask_diameter, "Å above 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained."""

    engine: EngineName = option(
        "steerable", "steerable sums poses out exactly; coordinate is the paper's MLP; vanilla has no pose"
    )
    z_dim: int = option(2, "number of latent content dimensions")
    max_shift: float | None = option(
        None,
        "largest shift in Å of a particle from the middle of its box; 0 for centred [10 %% of the box]",
    )
    shift_std: float | None = option(
        None, "standard deviation of the shifts in Å [steerable learns it, others take half of --max-shift]"
    )
    lowest_resolution: float | None = option(
        None,
        "wavelengths longer than this (Å) are not compared, e.g. 60 where a micelle would be [all are]",
    )
    highest_resolution: float | None = option(
        None,
        "wavelengths shorter than this (Å) are not compared, though they are averaged, e.g. 10 [all are; "
        "steerable looks as far as it finds signal]",
    )

    def __post_init__(self) -> None:
        check(self.z_dim >= 1, "z_dim", self.z_dim, "1 or more")
        check(self.max_shift is None or self.max_shift >= 0, "max_shift", self.max_shift, "Å, 0 or more")
        check(self.shift_std is None or self.shift_std > 0, "shift_std", self.shift_std, "Å above 0")
        highest, lowest = self.highest_resolution, self.lowest_resolution
        check(highest is None or highest > 0, "highest_resolution", highest, "Å above 0")
        lowest_ok = lowest is None or lowest > (highest or 0)
        check(lowest_ok, "lowest_resolution", lowest, f"Å above {highest or 0:g}")


@dataclass(frozen=True, kw_only=True)
class PoseConfig:
    """What is known of poses."""

    pose: Literal["free", "fixed", "prior"] | None = option(
        None,
        "free finds poses; fixed keeps psi and origins of the input (classification without alignment); "
        "prior searches about them [free; where particles are estimated, as the model was trained]",
    )
    psi_range: float = option(20.0, "with --pose prior, how far psi may be from the input's, in degrees")
    shift_range: float = option(10.0, "with --pose prior, how far origins may be from the input's, in Å")

    def __post_init__(self) -> None:
        check(0 < self.psi_range <= 180, "psi_range", self.psi_range, "degrees above 0, at most 180")
        check(self.shift_range >= 0, "shift_range", self.shift_range, "Å, 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is trained."""

    epochs: int | None = option(None, "passes over the particles [by their number]")
    batch_size: int | None = option(
        None, "particles in a step [128, steerable, or 100; more on a GPU with many particles]"
    )
    learning_rate: float | None = option(None, "(peak) learning rate of Adam [by engine and batch size]")
    held_out: float = option(0.1, "share of the particles kept from training, for the learning curve")
    patience: int | None = option(
        None, "stop after so many epochs without a better held-out bound [train all epochs]"
    )

    def __post_init__(self) -> None:
        check(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "1 or more")
        check(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        rate_ok = self.learning_rate is None or self.learning_rate > 0
        check(rate_ok, "learning_rate", self.learning_rate, "a number above 0")
        check(0.0 <= self.held_out < 1.0, "held_out", self.held_out, "a share, 0 or more and below 1")
        check(self.patience is None or self.patience >= 1, "patience", self.patience, "1 or more")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How things are computed."""

    seed: int = option(0, "seed of every random choice; equal seeds make equal CPU runs")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")

    def __post_init__(self) -> None:
        check(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written."""

    classes: int | None = option(None, "number of classes of z [by the number of particles, at most 50]")
    overwrite_pose: bool = option(False, "write rln pose columns even over 3-D poses of the input")

    def __post_init__(self) -> None:
        check(self.classes is None or self.classes >= 1, "classes", self.classes, "1 or more")


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def options_of(config_class: type) -> list[Field[Any]]:
    """The fields that are options."""
    return [item for item in fields(config_class) if "derived" not in item.metadata]


def add_options(parser: argparse.ArgumentParser, *config_classes: type) -> None:
    """An option for each field of the classes; the parsed namespace holds only what was given."""
    for config_class in config_classes:
        group = parser.add_argument_group(
            (config_class.__doc__ or config_class.__name__).split("\n")[0].rstrip(".")
        )
        hints = typing.get_type_hints(config_class)
        for item in options_of(config_class):
            kinds = [kind for kind in alternatives(hints[item.name]) if kind is not type(None)]
            help_text = item.metadata["help"]
            if item.default is not None and item.default is not False:
                help_text += f" [{item.default}]"
            settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text}
            if bool in kinds:
                settings["action"] = argparse.BooleanOptionalAction
            elif typing.get_origin(kinds[0]) is Literal:
                settings["choices"] = typing.get_args(kinds[0])
            else:
                settings |= {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
            group.add_argument("--" + item.name.replace("_", "-"), **settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, as a flat mapping of option names to values."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(
            path, found=str(error.strerror), expected="a readable YAML file", remedy="check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        raise InputError(
            path,
            line=None if place is None else place.line + 1,
            found="text that is not YAML",
            expected="lines such as 'z_dim: 2'",
            remedy="write one option a line, as in a job's config.yaml.",
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            path,
            found=type(content).__name__,
            expected="lines such as 'z_dim: 2'",
            remedy="write one option a line, as in a job's config.yaml.",
        )
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as YAML and JSON hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    """Settings as YAML, in their order, to a file that did not hold them before."""
    path.write_text(yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True))


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a field's type; a whole number is a number."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, str | Path)
    return isinstance(value, kind)


def build(config_class: type[Config], settings: Mapping[str, Any], source: str) -> Config:
    """An instance of a config class from those settings that are its fields, their types checked."""
    hints = typing.get_type_hints(config_class)
    values = {}
    for item in options_of(config_class):
        if item.name not in settings:
            continue
        value = settings[item.name]
        kinds = alternatives(hints[item.name])
        if not any(fits(value, kind) for kind in kinds):
            names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
            raise InputError(
                source, column=item.name, found=repr(value), expected=names, remedy="mend this setting."
            )
        if value is not None and Path in kinds:
            value = Path(value)
        elif value is not None and float in kinds:
            value = float(value)
        values[item.name] = value
    return config_class(**values)


def refuse_unknown(settings: Mapping[str, Any], config_classes: Sequence[type], source: str) -> None:
    """Raises InputError for settings that no class knows."""
    known = [item.name for config_class in config_classes for item in options_of(config_class)]
    for name in settings:
        if name not in known:
            raise InputError(
                source,
                column=name,
                found="an unknown setting",
                expected="one of " + ", ".join(sorted(known)),
                remedy="remove it, or mend its name.",
            )


def refuse_misplaced(
    settings: Mapping[str, Any], chosen: type, others: Sequence[type], engine: str
) -> None:
    """Raises InputError for options of other engines' classes that the chosen one has not."""
    own = {item.name for item in options_of(chosen)}
    foreign = {item.name for other in others for item in options_of(other)} - own
    for name in settings:
        if name in foreign:
            raise InputError(
                "--" + name.replace("_", "-"),
                found=f"it with --engine {engine}",
                expected="an option that this engine has",
                remedy="leave it out, or choose another --engine.",
            )


def as_settings(*configs: Any) -> dict[str, Any]:
    """The fields of several configs as one flat mapping, as written to YAML."""
    return {
        item.name: getattr(config, item.name) for config in configs for item in options_of(type(config))
    }
