"""Molecules in motion: RELION-convention particle sets whose truth is known."""

from cryo_svae.simulate.files import write_simulated
from cryo_svae.simulate.micrographs import simulate
from cryo_svae.simulate.molecules import MOLECULES, Molecule, load_molecule
from cryo_svae.simulate.particles import (
    SimulateConfig,
    Simulated,
    project,
    render,
    view_rotation,
)

__all__ = [
    "MOLECULES",
    "Molecule",
    "SimulateConfig",
    "Simulated",
    "load_molecule",
    "project",
    "render",
    "simulate",
    "view_rotation",
    "write_simulated",
]
