"""cryo_svae: content, rotation and shift of cryo-EM particles by spatial variational autoencoders.

In Python: ``load`` particles, ``fit`` a ``Model``, and let it estimate, decode and average; see
``cryo_svae.api`` and example_data/walkthrough.ipynb.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Model", "fit", "load", "load_model"]


def __getattr__(name: str) -> Any:
    """The Python interface, loaded when first asked for, so that ``--help`` need not wait for torch."""
    if name in __all__:
        from cryo_svae import api

        return getattr(api, name)
    raise AttributeError(f"module 'cryo_svae' has no attribute {name!r}")
