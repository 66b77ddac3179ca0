"""Large particle sets made on a GPU: views of a molecule in float16 stacks with STAR file and truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import torch
from torch import Tensor

from cryo_svae.formats.star import write_tables
from cryo_svae.imaging.ctf import CtfTable, ctf_2d
from cryo_svae.imaging.geometry import degrees
from cryo_svae.simulate import load_molecule, view_rotation
from cryo_svae.simulate.particles import FILLED, PIXEL_BLUR_PX, render

A_STACK = 2000  # particles, of one micrograph and defocus
AT_ONCE = 100


@dataclass(frozen=True)
class Views:
    """Particles of one stack with their truth, on the device they were made on."""

    images: Tensor  # (n, box, box), noise of standard deviation 1
    ctf: CtfTable
    view_rad: Tensor
    psi_rad: Tensor
    origin_px: Tensor


class ViewSet:
    """A molecule seen from all sides, shifts of 1.5 px, CTF of 1 to 2.5 µm with 2 % of astigmatism."""

    def __init__(self, box_px: int, snr: float, source: Path | None, device: torch.device) -> None:
        self.box_px, self.snr, self.device = box_px, snr, device
        molecule = load_molecule("views", source)
        self.pixel_size_angst = 2.0 * molecule.radius_angst() / (FILLED * box_px)
        self.sigma_px = math.hypot(molecule.sigma_angst / self.pixel_size_angst, PIXEL_BLUR_PX)
        self.points = molecule.positions(torch.zeros(1, 0))[0].to(device) / self.pixel_size_angst
        self.weights = molecule.weights.to(device)
        self.noise_std: float | None = None

    def draw(self, n: int) -> Views:
        """n particles of one micrograph, from torch's generator of the device."""
        device, box = self.device, self.box_px
        u = torch.rand(n, 3, device=device)
        view = torch.stack([(2.0 * u[:, 0] - 1.0) * math.pi, torch.acos(2.0 * u[:, 1] - 1.0)], -1)
        psi = (2.0 * u[:, 2] - 1.0) * math.pi
        origin = 1.5 * torch.randn(n, 2, device=device)
        parts = []
        for rows in torch.arange(n, device=device).split(AT_ONCE):
            points = self.points @ view_rotation(view[rows]).mT
            parts.append(render(points[..., :2], self.weights, self.sigma_px, psi[rows], origin[rows], box))
        ctf = self._ctf(n)
        images = torch.fft.irfft2(torch.fft.rfft2(torch.cat(parts)) * ctf_2d(ctf, box), s=(box, box))
        if self.noise_std is None:
            self.noise_std = math.sqrt(float(images.var()) / self.snr)
        return Views(images / self.noise_std + torch.randn_like(images), ctf, view, psi, origin)

    def _ctf(self, n: int) -> CtfTable:
        defocus, angle = torch.rand(2).tolist()
        values = {
            "pixel_size_angst": self.pixel_size_angst, "voltage_kv": 300.0, "cs_mm": 2.7,
            "amplitude_contrast": 0.1, "defocus_u_angst": (10_000 + 15_000 * defocus) * 1.01,
            "defocus_v_angst": (10_000 + 15_000 * defocus) * 0.99, "defocus_angle_rad": angle * math.pi,
            "phase_shift_rad": 0.0,
        }  # fmt: skip
        return CtfTable(**{name: torch.full((n,), v, device=self.device) for name, v in values.items()})


def write_views(folder: Path, views: ViewSet, n_particles: int) -> dict[str, np.ndarray]:
    """Writes particles.star and stacks of 2,000; returns the truth: view_rad, psi_rad, origin_px."""
    folder.mkdir(parents=True)
    names, defocus, truth = [], [], []
    for first in range(0, n_particles, A_STACK):
        made = views.draw(min(A_STACK, n_particles - first))
        stack = folder / f"mic{first // A_STACK:05d}.mrcs"
        with mrcfile.new(stack) as file:
            file.set_data(made.images.half().cpu().numpy())
            file.set_image_stack()
            file.voxel_size = views.pixel_size_angst
        names += [f"{k + 1:06d}@{stack.name}" for k in range(len(made.images))]
        columns = made.ctf.defocus_u_angst, made.ctf.defocus_v_angst, degrees(made.ctf.defocus_angle_rad)
        defocus.append(torch.stack(columns, 1).cpu())
        truth.append([each.double().cpu() for each in (made.view_rad, made.psi_rad, made.origin_px)])
    values = torch.cat(defocus).numpy().T
    optics = {
        "rlnOpticsGroupName": "optics1", "rlnOpticsGroup": "1", "rlnVoltage": "300.0",
        "rlnImagePixelSize": f"{views.pixel_size_angst:.6f}", "rlnImageSize": str(views.box_px),
        "rlnSphericalAberration": "2.7", "rlnAmplitudeContrast": "0.1", "rlnImageDimensionality": "2",
    }  # fmt: skip
    labels = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
    particles = {"rlnImageName": names, "rlnOpticsGroup": ["1"] * n_particles}
    particles |= {label: [f"{v:.2f}" for v in column] for label, column in zip(labels, values, strict=True)}
    write_tables(
        folder / "particles.star", {"optics": {k: [v] for k, v in optics.items()}, "particles": particles}
    )
    parts = [torch.cat(part).numpy() for part in zip(*truth, strict=True)]
    return dict(zip(("view_rad", "psi_rad", "origin_px"), parts, strict=True))
