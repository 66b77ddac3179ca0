"""What a particle file says that is hardly meant, and what it says that no model here takes in."""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import electron_wavelength_angst
from cryo_svae.particles.labels import FIELDS, LABELS
from cryo_svae.particles.particle_set import ParticleColumns, ParticleSet

Reals = NDArray[np.float64]

MOST_PHASE_RAD = math.pi / 4  # at the working Nyquist frequency, that is not worth a word
LIKELY_CONTRAST = 0.5  # of amplitude; a phase plate is told by its phase shift
SIZE_TOLERANCE = 0.02  # between a stack's header and the file
NO_SIZE_ANGST = (0.0, 1.0)  # what programs write in headers that know no pixel size
# Labels that nothing here reads, and the value of which that does not matter.
NEUTRAL = {"rlnMagnificationCorrection": 1.0, "rlnCtfBfactorPerElectronDose": 0.0, "rlnIsFlip": 0.0}


def doubts(particles: ParticleSet) -> list[str]:
    """Warnings on a particle set: place, found, expected. Empty where all is well."""
    return [
        *_unlisted(particles),
        *_unread(particles),
        *_repeated(particles),
        *_sizes(particles),
        *([] if particles.ctf is None else _ctf(particles)),
    ]


def _say(particles: ParticleSet, column: str, row: int | None, found: str, expected: str) -> str:
    place = str(particles.star.path)
    if row is not None:
        place += f", {particles.place_of(row)}"
    return f"{place}: column {column}: found {found}, expected {expected}"


def _unlisted(particles: ParticleSet) -> list[str]:
    if particles.cs is not None:
        names = [name for name in particles.cs.fields if re.match(r"(blob|ctf)/", name)]
        unknown = [name for name in names if name not in FIELDS]
    else:
        optics = particles.star.block("optics")
        names = [] if optics is None else list(optics.labels)
        unknown = [f"_{name}" for name in names if name.startswith("rln") and name not in LABELS]
    return [
        _say(particles, name, None, "it, unknown here", "no more; it is not modelled") for name in unknown
    ]


def _unread(particles: ParticleSet) -> list[str]:
    columns = ParticleColumns(particles.star, particles.block, particles.star.block("optics"))
    lines = []
    for label, neutral in NEUTRAL.items():
        values = columns.get(label)
        if values is not None and len(rows := np.flatnonzero(values != neutral)):
            found = f"{values[rows[0]]:g} ({len(rows):,} particle(s))"
            expected = f"{neutral:g}: it is not modelled"
            lines.append(_say(particles, f"_{label}", int(rows[0]), found, expected))
    return lines


def _repeated(particles: ParticleSet) -> list[str]:
    order = np.lexsort((particles.slice_of, particles.stack_of))
    stack, number = particles.stack_of[order], particles.slice_of[order]
    again = order[1:][(np.diff(stack) == 0) & (np.diff(number) == 0)]
    if not len(again):
        return []
    found = f"{len(again):,} image(s) that another row names too"
    return [_say(particles, "_rlnImageName", int(again.min()), found, "each image once: it counts twice")]


def _sizes(particles: ParticleSet) -> list[str]:
    lines = []
    _, first = np.unique(particles.stack_of, return_index=True)
    for info, row in zip(particles.stacks, first.tolist(), strict=True):
        said, header = float(particles.pixel_size_angst[row]), info.voxel_size_angst
        known = not any(math.isclose(header, none, abs_tol=1e-6) for none in NO_SIZE_ANGST)
        if known and abs(header / said - 1.0) > SIZE_TOLERANCE:
            expected = f"{header:g} Å, as the header of {info.path} says; the file's is taken"
            lines.append(_say(particles, "_rlnImagePixelSize", row, f"{said:g} Å", expected))
    more = [f"the same of {len(lines) - 1:,} more stack(s)"] if len(lines) > 1 else []
    return lines[:1] + more


def _ctf(particles: ParticleSet) -> list[str]:
    table = particles.ctf
    assert table is not None
    u, v = table.defocus_u_angst.numpy(), table.defocus_v_angst.numpy()
    contrast = table.amplitude_contrast.numpy()
    cases = [
        ("_rlnDefocusU", (u == 0) & (v == 0), "no defocus, where others have some", "the CTF fit of each"),
        ("_rlnDefocusU", u + v < 0, "overfocus", "underfocus, counted positive"),
        ("_rlnAmplitudeContrast", contrast < 0, "a contrast below 0", "a share from 0 to 1"),
        ("_rlnAmplitudeContrast", contrast > LIKELY_CONTRAST, "a contrast above 0.5", "about 0.1"),
    ]
    lines = []
    for column, is_so, found, expected in cases:
        rows = np.flatnonzero(is_so)
        if len(rows) and not (expected.startswith("the CTF") and len(rows) == len(u)):
            lines.append(
                _say(particles, column, int(rows[0]), f"{found} ({len(rows):,} particle(s))", expected)
            )
    return lines


def ignored_aberrations(particles: ParticleSet, pixel_size_angst: float) -> list[str]:
    """Aberrations that turn phases by over 45° within the working grid's frequencies, a line each.

    pixel_size_angst: of the working grid. What a shift or a constant phase makes up for does not count.
    """
    if particles.ctf is None:
        return []
    wavelength = float(electron_wavelength_angst(particles.ctf.voltage_kv.double().min()[None])[0])
    found = _of_cs if particles.cs is not None else _of_star
    limit = 2.0 * pixel_size_angst
    return [
        f"{particles.star.path}: column {name}: found up to {geometry.degrees(phase):.0f}° of phase "
        f"at {limit:.1f} Å, expected less than 45°: it is not modelled"
        for name, phase in found(particles, wavelength, 0.5 / pixel_size_angst).items()
        if phase > MOST_PHASE_RAD
    ]


def _plane(highest: float) -> tuple[Reals, Reals]:
    """Radii in 1/Å and angles of points within the highest frequency."""
    radius, angle = np.meshgrid(
        np.linspace(0.0, highest, 24), np.linspace(0, 2 * math.pi, 24, endpoint=False)
    )
    return radius.ravel(), angle.ravel()


def _beyond_shift(phase: Reals, radius: Reals, angle: Reals) -> float:
    """The largest phase left when a constant and a shift have made up for what they can."""
    known = np.column_stack([np.ones_like(radius), radius * np.cos(angle), radius * np.sin(angle)])
    left = phase - known @ np.linalg.lstsq(known, phase, rcond=None)[0]
    return float(np.abs(left).max())


def _of_star(particles: ParticleSet, wavelength: float, highest: float) -> dict[str, float]:
    radius, angle = _plane(highest)
    found: dict[str, float] = {}
    assert particles.ctf is not None
    cs_angst = float(particles.ctf.cs_mm.abs().max()) * 1e7
    tables = [particles.block, particles.star.block("optics")]
    for block in (each for each in tables if each is not None):
        for label in ("rlnBeamTiltX", "rlnBeamTiltY"):
            if block.has(label):
                tilt_rad = 1e-3 * float(np.abs(np.nan_to_num(block.numbers(label))).max())
                phase = 2 * math.pi * cs_angst * wavelength**2 * tilt_rad * radius**3 * np.cos(angle)
                found[f"_{label}"] = _beyond_shift(phase, radius, angle)
        for label, first in (("rlnOddZernike", 1), ("rlnEvenZernike", 0)):
            if block.has(label):
                phases = [_zernike(text, first, radius, angle) for text in dict.fromkeys(block.text(label))]
                found[f"_{label}"] = max(_beyond_shift(phase, radius, angle) for phase in phases)
    return found


def _of_cs(particles: ParticleSet, wavelength: float, highest: float) -> dict[str, float]:
    """Phases of CryoSPARC's coefficients in Å, each at its largest; their directions do not matter here.

    Factors are those of two public programs that read .cs files: of coma 2 pi lam², of trefoil a third of
    it; of two-fold (the first two of tetra_A) 2 pi lam³, of four-fold astigmatism a quarter of it.
    """
    fields = {} if particles.cs is None else particles.cs.fields
    radius, angle = _plane(highest)
    cubed, fourth = 2 * math.pi * wavelength**2 * radius**3, 2 * math.pi * wavelength**3 * radius**4
    waves = {
        "ctf/tilt_A": [(slice(0, 2), cubed * np.cos(angle))],
        "ctf/trefoil_A": [(slice(0, 2), cubed * np.cos(3 * angle) / 3)],
        "ctf/tetra_A": [
            (slice(0, 2), fourth * np.cos(2 * angle)),
            (slice(2, 4), fourth * np.cos(4 * angle) / 4),
        ],
    }
    return {
        name: sum(
            float(np.linalg.norm(fields[name][:, part], axis=1).max()) * _beyond_shift(wave, radius, angle)
            for part, wave in parts
        )
        for name, parts in waves.items()
        if name in fields
    }


def _zernike(text: str, first_order: int, radius: Reals, angle: Reals) -> Reals:
    """Phase of RELION's coefficients: orders n, n + 2, …, in each m = -n, -n + 2, … n; radii in 1/Å."""
    coefficients = [float(each) for each in re.findall(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?", text)]
    phase = np.zeros_like(radius)
    n = first_order
    while coefficients:
        here, coefficients = coefficients[: n + 1], coefficients[n + 1 :]
        for m, coefficient in zip(range(-n, n + 1, 2), here, strict=False):
            wave = np.sin(-m * angle) if m < 0 else np.cos(m * angle)
            phase += coefficient * _radial(n, abs(m), radius) * wave
        n += 2
    return phase


def _radial(n: int, m: int, radius: Reals) -> Reals:
    """Zernike's radial polynomial."""
    total = np.zeros_like(radius)
    for s in range((n - m) // 2 + 1):
        below = math.factorial(s) * math.factorial((n + m) // 2 - s) * math.factorial((n - m) // 2 - s)
        total += (-1) ** s * math.factorial(n - s) / below * radius ** (n - 2 * s)
    return total
