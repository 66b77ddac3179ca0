"""The contrast transfer function in RELION's convention.

With lam the electron wavelength in Å, k the spatial frequency in 1/Å and az = atan2(ky, kx)
(from +col towards +row), U, V the defoci in Å and Q0 the amplitude contrast:

    df(az) = (U + V)/2 + (U - V)/2 cos(2 (az - defocus angle))
    CTF    = sin(pi lam df k² - pi/2 Cs lam³ k⁴ + atan(Q0/√(1 - Q0²)) + phase shift)

CTF(0) = +Q0: particles are white on dark. Agrees with ``relion_project --ctf`` to 1e-7 in
float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ASTIGMATIC_RAD = 0.2  # a phase that differs by less with direction is taken as round


@dataclass(frozen=True, kw_only=True)
class CtfTable:
    """CTF parameters of n particles; every field is a float tensor (n,)."""

    pixel_size_angst: Float[Tensor, "n"]
    voltage_kv: Float[Tensor, "n"]
    cs_mm: Float[Tensor, "n"]
    amplitude_contrast: Float[Tensor, "n"]
    defocus_u_angst: Float[Tensor, "n"]
    defocus_v_angst: Float[Tensor, "n"]
    defocus_angle_rad: Float[Tensor, "n"]
    phase_shift_rad: Float[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.pixel_size_angst)

    def __getitem__(self, index: Int[Tensor, "b"] | slice) -> CtfTable:
        return CtfTable(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def astigmatic(self) -> Bool[Tensor, "n"]:
        """Whether each changes too much with direction, at the Nyquist frequency, to be taken as round."""
        half = (self.defocus_u_angst - self.defocus_v_angst).abs() / 2
        wavelength = electron_wavelength_angst(self.voltage_kv)
        differs: Tensor = math.pi * wavelength * half / (2.0 * self.pixel_size_angst) ** 2 > ASTIGMATIC_RAD
        return differs

    def to(self, device: torch.device | str) -> CtfTable:
        """The same table on another device."""
        return CtfTable(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def electron_wavelength_angst(voltage_kv: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Relativistic electron wavelength in Å."""
    volt = voltage_kv * 1e3
    return 12.2643247 / torch.sqrt(volt * (1.0 + 0.978466e-6 * volt))


def ctf_at(table: CtfTable, frequency_px: Float[Tensor, "*k 2"]) -> Float[Tensor, "b *k"]:
    """CTF of each of b particles at frequencies (kx, ky) in cycles per pixel."""
    expand = (slice(None),) + (None,) * (frequency_px.ndim - 1)

    def column(values: Tensor) -> Tensor:
        return values.to(frequency_px.dtype)[expand]

    kx, ky = frequency_px[..., 0], frequency_px[..., 1]
    k2 = (kx**2 + ky**2)[None] / column(table.pixel_size_angst) ** 2
    azimuth = torch.atan2(ky, kx)[None]
    wavelength = column(electron_wavelength_angst(table.voltage_kv.double()))
    u, v = column(table.defocus_u_angst), column(table.defocus_v_angst)
    defocus = (u + v) / 2 + (u - v) / 2 * torch.cos(2 * (azimuth - column(table.defocus_angle_rad)))
    q0 = column(table.amplitude_contrast)
    phase = (
        math.pi * wavelength * defocus * k2
        - 0.5 * math.pi * column(table.cs_mm) * 1e7 * wavelength**3 * k2**2
        + torch.atan(q0 / torch.sqrt(1.0 - q0**2))
        + column(table.phase_shift_rad)
    )
    return torch.sin(phase)


def rfft_frequencies(box_px: int, device: torch.device | str = "cpu") -> Float[Tensor, "n half 2"]:
    """Frequencies (kx, ky) in cycles per pixel of ``torch.fft.rfft2`` of an N x N image."""
    ky = torch.fft.fftfreq(box_px, device=device)
    kx = torch.fft.rfftfreq(box_px, device=device)
    ky, kx = torch.meshgrid(ky, kx, indexing="ij")
    return torch.stack([kx, ky], -1)


def ctf_2d(table: CtfTable, box_px: int) -> Float[Tensor, "b n half"]:
    """CTF of each particle in the layout of ``torch.fft.rfft2``."""
    return ctf_at(table, rfft_frequencies(box_px, table.pixel_size_angst.device))
