"""The CTF, with RELION as the judge."""

from __future__ import annotations

import math

import mrcfile
import numpy as np
import pytest
import torch

from cryo_svae.formats.mrc import read_images, write_stack
from cryo_svae.formats.star import write_tables
from cryo_svae.imaging.ctf import CtfTable, ctf_2d, ctf_at, electron_wavelength_angst


def table(n: int = 1, **changes: float) -> CtfTable:
    values = {
        "pixel_size_angst": 2.0,
        "voltage_kv": 300.0,
        "cs_mm": 2.7,
        "amplitude_contrast": 0.1,
        "defocus_u_angst": 17000.0,
        "defocus_v_angst": 15000.0,
        "defocus_angle_rad": 0.6,
        "phase_shift_rad": 0.0,
    }
    return CtfTable(
        **{name: torch.full((n,), value).double() for name, value in {**values, **changes}.items()}
    )


def test_wavelengths_of_the_usual_microscopes():
    wavelengths = electron_wavelength_angst(torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64))
    np.testing.assert_allclose(wavelengths, [0.0370144, 0.0250793, 0.0196875], rtol=1e-5)


def test_particles_are_white_at_low_frequency():
    assert float(ctf_2d(table(), 32)[0, 0, 0]) == pytest.approx(0.1, abs=1e-6)


def test_a_phase_plate_adds_its_phase():
    frequency = torch.zeros(1, 2)
    shifted = ctf_at(table(phase_shift_rad=math.pi / 2), frequency)
    assert float(shifted) == pytest.approx(math.cos(math.asin(0.1)), abs=1e-6)


def test_the_defocus_angle_runs_from_columns_to_rows():
    along = table(defocus_v_angst=5000.0, defocus_angle_rad=math.pi / 2)
    on_rows = ctf_at(along, torch.tensor([[0.0, 0.1]]).double())
    round_one = table(defocus_v_angst=17000.0)
    torch.testing.assert_close(on_rows, ctf_at(round_one, torch.tensor([[0.1, 0.0]]).double()))


def test_tables_are_taken_apart_by_particle():
    two = CtfTable(
        **{k: torch.tensor([float(v[0]), 2 * float(v[0])]) for k, v in table().columns().items()}
    )
    assert len(two) == 2
    torch.testing.assert_close(ctf_2d(two[torch.tensor([1])], 8), ctf_2d(two, 8)[1:])


def test_agrees_with_relion_project(relion, tmp_path):
    box = 32
    volume = np.zeros((box, box, box), dtype=np.float32)
    volume[box // 2, box // 2, box // 2] = 1.0
    with mrcfile.new(tmp_path / "delta.mrc") as mrc:
        mrc.set_data(volume)
        mrc.voxel_size = 2.0
    cases = [
        table(),
        table(defocus_angle_rad=2.0, phase_shift_rad=1.2, voltage_kv=200.0, amplitude_contrast=0.07),
    ]
    write_stack(tmp_path / "blank.mrcs", np.zeros((2, box, box), np.float32), pixel_size_angst=2.0)
    degrees = 180.0 / math.pi

    def column(name: str, factor: float = 1.0) -> list[str]:
        return [f"{float(getattr(case, name)) * factor:.9f}" for case in cases]

    write_tables(
        tmp_path / "in.star",
        {
            "optics": {
                "rlnOpticsGroupName": ["a", "b"],
                "rlnOpticsGroup": ["1", "2"],
                "rlnImagePixelSize": ["2.0", "2.0"],
                "rlnImageSize": [str(box)] * 2,
                "rlnImageDimensionality": ["2", "2"],
                "rlnVoltage": column("voltage_kv"),
                "rlnSphericalAberration": column("cs_mm"),
                "rlnAmplitudeContrast": column("amplitude_contrast"),
            },
            "particles": {
                "rlnImageName": ["000001@blank.mrcs", "000002@blank.mrcs"],
                "rlnOpticsGroup": ["1", "2"],
                "rlnDefocusU": column("defocus_u_angst"),
                "rlnDefocusV": column("defocus_v_angst"),
                "rlnDefocusAngle": column("defocus_angle_rad", degrees),
                "rlnPhaseShift": column("phase_shift_rad", degrees),
                "rlnAngleRot": ["0", "0"],
                "rlnAngleTilt": ["0", "0"],
                "rlnAnglePsi": ["0", "0"],
                "rlnOriginXAngst": ["0", "0"],
                "rlnOriginYAngst": ["0", "0"],
            },
        },
    )
    said = relion(
        "relion_project", "--i", "delta.mrc", "--o", "out", "--ang", "in.star", "--ctf", "--angpix", 2.0,
        cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "out.mrcs").exists(), said
    images = torch.from_numpy(read_images(tmp_path / "out.mrcs", np.arange(2))).double()
    transfer = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(1, 2)))
    ours = torch.cat([ctf_2d(case, box) for case in cases])
    frequency = torch.fft.fftfreq(box)[:, None] ** 2 + torch.fft.rfftfreq(box)[None] ** 2
    inside = frequency < 0.45**2  # relion_project masks the corners
    scale = (transfer.real[:, inside] * ours[:, inside]).sum() / (ours[:, inside] ** 2).sum()
    assert float((transfer.real / scale - ours)[:, inside].abs().max()) < 1e-4
