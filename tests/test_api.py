"""The Python interface, by its walkthrough."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

import cryo_svae
from cryo_svae.errors import InputError

EXAMPLE = Path(__file__).resolve().parents[1] / "example_data"


def test_the_walkthrough_runs_and_its_model_saves_and_loads(tmp_path, capsys):
    model, z = runpy.run_path(str(EXAMPLE / "walkthrough.py"))["main"](epochs=2)
    assert "class 5" in capsys.readouterr().out
    model.save(tmp_path / "model.pt")
    again = cryo_svae.load_model(tmp_path / "model.pt")
    np.testing.assert_array_equal(again.decode(z[:3]), model.decode(z[:3]))


def test_mistakes_are_named(make_dataset):
    particles = cryo_svae.load(make_dataset())
    with pytest.raises(InputError, match="zdim"):
        cryo_svae.fit(particles, zdim=2)
    model = cryo_svae.fit(particles, z_dim=2, epochs=1, engine="coordinate", hidden=8, encoder_hidden=8)
    with pytest.raises(InputError, match="shape"):
        model.decode([[1.0]])
    with pytest.raises(AttributeError, match="nothing"):
        cryo_svae.nothing  # noqa: B018
