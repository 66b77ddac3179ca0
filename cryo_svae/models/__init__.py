"""The engines: tensors in, tensors out; no files, no prints."""

from __future__ import annotations

from typing import Any

from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.models.vanilla import VanillaEngine

ENGINES: dict[str, tuple[Any, Any]] = {
    "steerable": (SteerableEngine, SteerableConfig),
    "coordinate": (CoordinateEngine, CoordinateConfig),
    "vanilla": (VanillaEngine, CoordinateConfig),
}
"""Name to (engine class, its config class)."""

CONFIG_CLASSES: tuple[Any, ...] = tuple(dict.fromkeys(config for _, config in ENGINES.values()))
"""Each engine's config class once, for the command line."""
