"""A simulated set as RELION files: the particles that a run reads, and beside them the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryo_svae.formats.mrc import write_stack
from cryo_svae.formats.star import write_tables
from cryo_svae.imaging.geometry import degrees
from cryo_svae.simulate.particles import SimulateConfig, Simulated, micrograph_of

MICROGRAPH_PX = 4096


def micrograph_name(number: int) -> str:
    """Path of a micrograph (0-based)."""
    return f"micrographs/simulated_{number + 1:04d}.mrc"


def write_simulated(folder: Path, simulated: Simulated, config: SimulateConfig) -> None:
    """Writes particles.mrcs, particles.star (no poses: a run starts blind) and truth.star.

    truth.star lists the same particles with rlnAnglePsi, rlnOriginXAngst, rlnOriginYAngst, for
    any view rlnAngleRot and rlnAngleTilt, svaeTrueConformation1… and svaeIsJunk, from micrographs
    svaeIsIce and svaeTrueContrast as well, and then the micrographs are written beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_stack(
        folder / "particles.mrcs", simulated.images.numpy(), pixel_size_angst=simulated.pixel_size_angst
    )
    optics, particles = _optics(simulated, config), _particles(simulated, config)
    write_tables(folder / "particles.star", {"optics": optics, "particles": particles})
    for number, micrograph in simulated.micrographs.items():
        path = folder / micrograph_name(number)
        path.parent.mkdir(exist_ok=True)
        write_stack(path, micrograph[None].numpy(), pixel_size_angst=simulated.pixel_size_angst)
    truth = {"optics": optics, "particles": {**particles, **_truth(simulated)}}
    write_tables(folder / "truth.star", truth)


def _optics(simulated: Simulated, config: SimulateConfig) -> dict[str, list[str]]:
    return {
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnOpticsGroup": ["1"],
        "rlnImagePixelSize": [f"{simulated.pixel_size_angst:.6f}"],
        "rlnImageSize": [str(config.box)],
        "rlnImageDimensionality": ["2"],
        "rlnVoltage": [f"{config.voltage_kv:.6f}"],
        "rlnSphericalAberration": [f"{config.cs_mm:.6f}"],
        "rlnAmplitudeContrast": [f"{config.amplitude_contrast:.6f}"],
    }


def _particles(simulated: Simulated, config: SimulateConfig) -> dict[str, list[str]]:
    n = len(simulated.images)
    if simulated.pick_px is not None:
        picks = simulated.pick_px.numpy()
    else:
        within = (config.box, MICROGRAPH_PX - config.box)
        picks = np.random.default_rng(config.seed).integers(*within, (n, 2))
    columns = {
        "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(n)],
        "rlnMicrographName": [micrograph_name(m) for m in micrograph_of(n, config.n_micrographs)],
        "rlnCoordinateX": _cells(picks[:, 0]),
        "rlnCoordinateY": _cells(picks[:, 1]),
        "rlnOpticsGroup": ["1"] * n,
    }
    if simulated.ctf is not None:
        columns["rlnDefocusU"] = _cells(simulated.ctf.defocus_u_angst.numpy())
        columns["rlnDefocusV"] = _cells(simulated.ctf.defocus_v_angst.numpy())
        columns["rlnDefocusAngle"] = _cells(degrees(simulated.ctf.defocus_angle_rad).numpy())
    return columns


def _truth(simulated: Simulated) -> dict[str, list[str]]:
    origin_angst = simulated.origin_px.numpy() * simulated.pixel_size_angst
    columns = {
        "rlnAnglePsi": _cells(degrees(simulated.psi_rad).numpy()),
        "rlnOriginXAngst": _cells(origin_angst[:, 0]),
        "rlnOriginYAngst": _cells(origin_angst[:, 1]),
    }
    if simulated.view_rad is not None:
        columns["rlnAngleRot"] = _cells(degrees(simulated.view_rad[:, 0]).numpy())
        columns["rlnAngleTilt"] = _cells(degrees(simulated.view_rad[:, 1]).numpy())
    for k, values in enumerate(simulated.conformation.T.numpy(), start=1):
        columns[f"svaeTrueConformation{k}"] = _cells(values)
    columns["svaeIsJunk"] = [str(int(flag)) for flag in simulated.is_junk]
    if simulated.is_ice is not None and simulated.contrast is not None:
        columns["svaeIsIce"] = [str(int(flag)) for flag in simulated.is_ice]
        columns["svaeTrueContrast"] = _cells(simulated.contrast.numpy())
    return columns


def _cells(values: np.ndarray) -> list[str]:
    return [f"{value:.6f}" for value in values]
