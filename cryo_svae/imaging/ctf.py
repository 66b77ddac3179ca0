"""The contrast transfer function in RELION's convention.

With lam the electron wavelength in Å, k the spatial frequency in 1/Å and az = atan2(ky, kx)
(from +col towards +row), U, V the defoci in Å and Q0 the amplitude contrast:

    df(az) = (U + V)/2 + (U - V)/2 cos(2 (az - defocus angle))
    CTF    = sin(pi lam df k² - pi/2 Cs lam³ k⁴ + atan(Q0/√(1 - Q0²)) + phase shift)
             · scale · exp(-B k²/4)

CTF(0) = +Q0: particles are white on dark. Agrees with ``relion_project --ctf`` to 1e-7 in
float64.

What reaches a model is an image y of content x under white noise n:

    plain images            y = C x + n
    phase-flipped images    y = |C| x + n'    (n' has the statistics of n)
    premultiplied images    y = C (C x + n)

Premultiplied images are prepared by dividing by C (``whitener_2d``), so that all are of the first form;
where C is nearly 0 that is not wholly possible, and the CTF of prepared images (``ctf_at``) is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ASTIGMATIC_RAD = 0.2  # a phase that differs by less with direction is taken as round

LEAST_CTF = 0.1  # a smaller one is not wholly divided out of premultiplied images


@dataclass(frozen=True, kw_only=True)
class CtfTable:
    """CTF parameters of n particles; every field is a tensor (n,), or None where none has that property.

    scale, b_factor_angst2: the CTF is ``scale`` exp(-B k²/4) times the sine.
    phase_flipped:          whether the sign of the CTF was undone in the images.
    premultiplied:          whether the images on disk were multiplied by their CTF.
    """

    pixel_size_angst: Float[Tensor, "n"]
    voltage_kv: Float[Tensor, "n"]
    cs_mm: Float[Tensor, "n"]
    amplitude_contrast: Float[Tensor, "n"]
    defocus_u_angst: Float[Tensor, "n"]
    defocus_v_angst: Float[Tensor, "n"]
    defocus_angle_rad: Float[Tensor, "n"]
    phase_shift_rad: Float[Tensor, "n"]
    scale: Float[Tensor, "n"] | None = None
    b_factor_angst2: Float[Tensor, "n"] | None = None
    phase_flipped: Bool[Tensor, "n"] | None = None
    premultiplied: Bool[Tensor, "n"] | None = None

    def __len__(self) -> int:
        return len(self.pixel_size_angst)

    def __getitem__(self, index: Int[Tensor, "b"] | slice) -> CtfTable:
        return self._each(lambda column: column[index])

    def columns(self) -> dict[str, Tensor]:
        """The columns that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in named.items() if column is not None}

    def _each(self, change: Callable[[Tensor], Tensor]) -> CtfTable:
        return CtfTable(**{name: change(column) for name, column in self.columns().items()})

    @property
    def astigmatic(self) -> Bool[Tensor, "n"]:
        """Whether each changes too much with direction, at the Nyquist frequency, to be taken as round."""
        half = (self.defocus_u_angst - self.defocus_v_angst).abs() / 2
        wavelength = electron_wavelength_angst(self.voltage_kv)
        differs: Tensor = math.pi * wavelength * half / (2.0 * self.pixel_size_angst) ** 2 > ASTIGMATIC_RAD
        return differs

    def to(self, device: torch.device | str) -> CtfTable:
        """The same table on another device."""
        return self._each(lambda column: column.to(device))


def electron_wavelength_angst(voltage_kv: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Relativistic electron wavelength in Å."""
    volt = voltage_kv * 1e3
    return 12.2643247 / torch.sqrt(volt * (1.0 + 0.978466e-6 * volt))


def ctf_at(table: CtfTable, frequency_px: Float[Tensor, "*k 2"]) -> Float[Tensor, "b *k"]:
    """CTF of each of b particles' prepared images at frequencies (kx, ky) in cycles per pixel."""
    ctf = _ctf_without_premultiplying(table, frequency_px)
    each = (slice(None),) + (None,) * (frequency_px.ndim - 1)
    if table.premultiplied is not None:
        passed = (ctf / LEAST_CTF).square().clamp(max=1.0)
        ctf = torch.where(table.premultiplied[each], ctf * passed, ctf)
    return ctf


def _ctf_without_premultiplying(
    table: CtfTable, frequency_px: Float[Tensor, "*k 2"]
) -> Float[Tensor, "b *k"]:
    """The CTF that plain images have, its absolute value where their phases were flipped."""
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
    ctf = torch.sin(phase)
    if table.b_factor_angst2 is not None:
        ctf = ctf * torch.exp(-0.25 * column(table.b_factor_angst2) * k2)
    if table.scale is not None:
        ctf = ctf * column(table.scale)
    if table.phase_flipped is not None:
        ctf = torch.where(table.phase_flipped[expand], ctf.abs(), ctf)
    return ctf


def whitener_2d(table: CtfTable, box_px: int) -> Float[Tensor, "b n half"]:
    """What premultiplied images, C (C x + n), are multiplied by to have white noise; 1 for the others.

    1/C, but C/c² where |C| is below c = LEAST_CTF: there the noise is less than it is taken for.
    Multiplied by the CTF again, as a likelihood does, they are what they were before.
    """
    ctf = _ctf_without_premultiplying(table, rfft_frequencies(box_px, table.pixel_size_angst.device))
    if table.premultiplied is None:
        return torch.ones_like(ctf)
    whitener = ctf / ctf.square().clamp(min=LEAST_CTF**2)
    return torch.where(table.premultiplied[:, None, None], whitener, 1.0)


def rfft_frequencies(box_px: int, device: torch.device | str = "cpu") -> Float[Tensor, "n half 2"]:
    """Frequencies (kx, ky) in cycles per pixel of ``torch.fft.rfft2`` of an N x N image."""
    ky = torch.fft.fftfreq(box_px, device=device)
    kx = torch.fft.rfftfreq(box_px, device=device)
    ky, kx = torch.meshgrid(ky, kx, indexing="ij")
    return torch.stack([kx, ky], -1)


def ctf_2d(table: CtfTable, box_px: int) -> Float[Tensor, "b n half"]:
    """CTF of each particle in the layout of ``torch.fft.rfft2``."""
    return ctf_at(table, rfft_frequencies(box_px, table.pixel_size_angst.device))
