"""The Python interface; its walkthrough runs in test_docs.py."""

from __future__ import annotations

import pytest

import cryo_svae
from cryo_svae.errors import InputError


def test_mistakes_are_named(make_dataset):
    particles = cryo_svae.load(make_dataset())
    with pytest.raises(InputError, match="zdim"):
        cryo_svae.fit(particles, zdim=2)
    model = cryo_svae.fit(particles, z_dim=2, epochs=1, engine="coordinate", hidden=8, encoder_hidden=8)
    with pytest.raises(InputError, match="shape"):
        model.decode([[1.0]])
    with pytest.raises(AttributeError, match="nothing"):
        cryo_svae.nothing  # noqa: B018
