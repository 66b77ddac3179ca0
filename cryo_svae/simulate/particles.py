"""Simulated particle images and their truth: radians and pixels, no files.

A bead is a Gaussian evaluated at the pixels of ``geometry.pixel_grid``; the pose is applied to
the beads, p = R(-psi) q - o, so an image carries no interpolation error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cryo_svae.errors import InputError
from cryo_svae.imaging.ctf import CtfTable, ctf_2d
from cryo_svae.imaging.geometry import pixel_grid, reference_to_particle
from cryo_svae.simulate.molecules import MOLECULES, Molecule

FILLED = 2 / 3  # part of the box a molecule fills when no pixel size is given
PIXEL_BLUR_PX = 0.7  # a bead is never narrower than this, so that it does not alias
CHUNK = 256  # images rendered at a time
OF_MICROGRAPHS = {  # least, most, default
    "spacing": (0.5, math.inf, 0.9),
    "noise_excess": (0.0, math.inf, 15.0),
    "contrast_std": (0.0, 1.0, 0.2),
    "thickness_gradient": (0.0, 0.6, 0.3),
    "ice_fraction": (0.0, 1.0, 0.03),
}


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """What to simulate."""

    molecule: str = field(
        default="hinge",
        metadata={"help": f"what to draw, one of {', '.join(MOLECULES)}; adk and hsp90 need --source"},
    )
    molecule_seed: int = field(
        default=0, metadata={"help": "which of the random molecules: lump, random-hinge or random-twist"}
    )
    source: Path | None = field(
        default=None,
        metadata={
            "help": "atoms of the molecule: the .npz trajectory for adk, the folder of the two "
            "chains' PDB files for hsp90, either for views"
        },
    )
    n_particles: int = field(default=2000, metadata={"help": "number of images"})
    box: int = field(default=32, metadata={"help": "side of the images in px; even"})
    pixel_size_angst: float | None = field(
        default=None,
        metadata={"help": "pixel size in Å; by default the molecule fills two thirds of the box"},
    )
    snr: float = field(
        default=0.1,
        metadata={
            "help": "variance of the noiseless images inside the circle inscribed in the box, "
            "over the variance of the noise; 0.1 is hard, 1 is easy"
        },
    )
    shift_std_px: float = field(
        default=1.0,
        metadata={"help": "standard deviation in px of each component of the origin; 0 for none"},
    )
    defocus_min_angst: float | None = field(
        default=None,
        metadata={"help": "least defocus in Å, e.g. 10000; without both there is no CTF"},
    )
    defocus_max_angst: float | None = field(
        default=None, metadata={"help": "greatest defocus in Å, e.g. 25000"}
    )
    voltage_kv: float = field(default=300.0, metadata={"help": "acceleration voltage in kV"})
    cs_mm: float = field(default=2.7, metadata={"help": "spherical aberration in mm"})
    amplitude_contrast: float = field(default=0.1, metadata={"help": "amplitude contrast, 0 to 1"})
    junk_fraction: float = field(
        default=0.0, metadata={"help": "part of the images that hold no particle, 0 to 1"}
    )
    n_micrographs: int = field(
        default=10, metadata={"help": "micrographs the particles are spread over; one defocus each"}
    )
    micrographs: bool = field(
        default=False,
        metadata={
            "help": "cut the particles from micrographs, with neighbours, coloured noise, uneven contrast "
            "and ice; the SNR is then that within the circle around the molecule"
        },
    )
    spacing: float | None = field(
        default=None,
        metadata={
            "help": "least distance of particles on a micrograph, in diameters of the molecule [0.9]"
        },
    )
    noise_excess: float | None = field(
        default=None,
        metadata={
            "help": "power of a micrograph's noise at the lowest frequencies over that at the highest, "
            "less 1; 0 for white noise [15]"
        },
    )
    contrast_std: float | None = field(
        default=None, metadata={"help": "standard deviation of the log contrast of micrographs [0.2]"}
    )
    thickness_gradient: float | None = field(
        default=None,
        metadata={
            "help": "change of contrast from the middle of a micrograph to its sides, and of background "
            "in standard deviations of the noise [0.3]"
        },
    )
    ice_fraction: float | None = field(
        default=None, metadata={"help": "part of the picks that are on ice crystals, 0 to 1 [0.03]"}
    )
    seed: int = field(default=0, metadata={"help": "random seed; the same seed gives the same bytes"})

    def __post_init__(self) -> None:
        _require(self.molecule in MOLECULES, "--molecule", self.molecule, f"one of {', '.join(MOLECULES)}")
        _require(self.n_particles >= 1, "--n-particles", self.n_particles, "at least 1")
        _require(self.box >= 8 and self.box % 2 == 0, "--box", self.box, "an even number, at least 8")
        if self.pixel_size_angst is not None:
            _require(self.pixel_size_angst > 0, "--pixel-size-angst", self.pixel_size_angst, "above 0")
        _require(self.snr > 0, "--snr", self.snr, "above 0")
        _require(self.shift_std_px >= 0, "--shift-std-px", self.shift_std_px, "0 or more")
        low, high = self.defocus_min_angst, self.defocus_max_angst
        _require(
            (low is None and high is None) or (low is not None and high is not None and low <= high),
            "--defocus-min-angst",
            f"{low} with --defocus-max-angst {high}",
            "both, the least first, or neither",
        )
        _require(self.voltage_kv > 0, "--voltage-kv", self.voltage_kv, "above 0")
        contrast = self.amplitude_contrast
        _require(0 <= contrast < 1, "--amplitude-contrast", contrast, "at least 0 and below 1")
        _require(0 <= self.junk_fraction <= 1, "--junk-fraction", self.junk_fraction, "0 to 1")
        _require(self.n_micrographs >= 1, "--n-micrographs", self.n_micrographs, "at least 1")
        for name, (least, most, _) in OF_MICROGRAPHS.items():
            value = getattr(self, name)
            option = "--" + name.replace("_", "-")
            expected = f"{least:g} to {most:g}" if most < math.inf else f"{least:g} or more"
            _require(value is None or least <= value <= most, option, value, expected)
            _require(value is None or self.micrographs, option, "no --micrographs", "it with --micrographs")

    def of_micrographs(self, name: str) -> float:
        """The value of an option of micrographs, as given or its default."""
        given: float | None = getattr(self, name)
        return OF_MICROGRAPHS[name][2] if given is None else given


def _require(fine: bool, option: str, found: object, expected: str) -> None:
    if not fine:
        raise InputError(option, found=str(found), expected=expected, remedy=f"change {option}")


@dataclass(frozen=True)
class Simulated:
    """Noisy images with their truth.

    conformation: drawn from the molecule's prior, one column for each degree of freedom.
    origin_px:    RELION origins (x, y) over the pixel size.
    view_rad:     rlnAngleRot and rlnAngleTilt in radians, or None where all are seen along z.
    noise_std:    standard deviation of the noise, in units of the images.
    is_ice:       junk that is an ice crystal.
    contrast:     what each particle was multiplied by; 0 of junk. None where nothing was.
    pick_px:      pixels (x, y) of the micrograph at which the boxes were cut; None where there is none.
    micrographs:  what the boxes were cut from, by number (``micrograph_of``), each of its own side.
    """

    images: Float[Tensor, "n box box"]
    pixel_size_angst: float
    conformation: Float[Tensor, "n k"]
    psi_rad: Float[Tensor, "n"]
    origin_px: Float[Tensor, "n 2"]
    view_rad: Float[Tensor, "n 2"] | None
    is_junk: Bool[Tensor, "n"]
    noise_std: float
    ctf: CtfTable | None
    is_ice: Bool[Tensor, "n"] | None = None
    contrast: Float[Tensor, "n"] | None = None
    pick_px: Float[Tensor, "n 2"] | None = None
    micrographs: Mapping[int, Float[Tensor, "m m"]] = field(default_factory=dict)

    @property
    def direction(self) -> Float[Tensor, "n 3"] | None:
        """Viewing directions in the molecule's frame, unit vectors; None where all are z."""
        return None if self.view_rad is None else view_rotation(self.view_rad)[:, 2]


def view_rotation(view_rad: Float[Tensor, "n 2"]) -> Float[Tensor, "n 3 3"]:
    """Molecule to reference coordinates: RELION's Euler matrix of rot and tilt at psi = 0."""
    (cr, ct), (sr, st) = torch.cos(view_rad).unbind(-1), torch.sin(view_rad).unbind(-1)
    rows = [ct * cr, ct * sr, -st, -sr, cr, torch.zeros_like(cr), st * cr, st * sr, ct]
    return torch.stack(rows, -1).reshape(-1, 3, 3)


def render(
    points_px: Float[Tensor, "n beads 2"],
    weights: Float[Tensor, "beads"],
    sigma_px: float,
    psi_rad: Float[Tensor, "n"],
    origin_px: Float[Tensor, "n 2"],
    box_px: int,
) -> Float[Tensor, "n box box"]:
    """Images of Gaussian beads at reference points (x, y), posed by psi and origin.

    A bead of weight w has its peak value w. A Gaussian is separable, so an image is the product
    of a (box, beads) and a (beads, box) matrix.
    """
    posed = reference_to_particle(points_px, psi_rad, origin_px)
    axis = pixel_grid(box_px, points_px.device)[0, :, 0]
    profile = torch.exp(-0.5 * ((posed[..., None] - axis) / sigma_px) ** 2)
    return (profile[:, :, 1] * weights[:, None]).mT @ profile[:, :, 0]


def project(
    molecule: Molecule,
    conformation: Float[Tensor, "n k"],
    psi_rad: Float[Tensor, "n"],
    origin_px: Float[Tensor, "n 2"],
    *,
    box_px: int,
    pixel_size_angst: float,
    view_rad: Float[Tensor, "n 2"] | None = None,
) -> Float[Tensor, "n box box"]:
    """Noiseless images, without CTF, of a molecule's conformations in their poses."""
    sigma_px = math.hypot(molecule.sigma_angst / pixel_size_angst, PIXEL_BLUR_PX)
    images = torch.empty(len(conformation), box_px, box_px)
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        points = molecule.positions(conformation[part]) / pixel_size_angst
        if view_rad is not None:
            points = points @ view_rotation(view_rad[part]).mT
        images[part] = render(
            points[..., :2], molecule.weights, sigma_px, psi_rad[part], origin_px[part], box_px
        )
    return images


def pixel_size_of(config: SimulateConfig, molecule: Molecule) -> float:
    """The pixel size in Å: as configured, or such that the molecule fills ``FILLED`` of the box."""
    if config.pixel_size_angst is not None:
        return config.pixel_size_angst
    return 2.0 * molecule.radius_angst() / (FILLED * config.box)


def lone_particles(config: SimulateConfig, molecule: Molecule) -> Simulated:
    """Images of a molecule alone in random conformations and poses, with white noise.

    psi is uniform, origins are Gaussian, defoci are uniform over micrographs. SNR: the variance of
    the noiseless, CTF-multiplied particles (junk left out) over all pixels within box/2 of the
    centre, divided by the noise variance. Images of ``noise`` have noise of variance 1.
    """
    pixel_size = pixel_size_of(config, molecule)
    n, generator = config.n_particles, torch.Generator().manual_seed(config.seed)
    conformation = molecule.draw(n, generator)
    psi = (2.0 * torch.rand(n, generator=generator) - 1.0) * math.pi
    origin = torch.randn(n, 2, generator=generator) * config.shift_std_px
    view = draw_views(n, generator) if molecule.any_view else None
    is_junk = torch.rand(n, generator=generator) < config.junk_fraction
    if config.molecule == "noise":
        is_junk = torch.ones(n, dtype=torch.bool)
    ctf = draw_ctf(config, pixel_size, generator)
    images = project(
        molecule, conformation, psi, origin,
        box_px=config.box, pixel_size_angst=pixel_size, view_rad=view,
    )  # fmt: skip
    if ctf is not None:
        images = torch.fft.irfft2(torch.fft.rfft2(images) * ctf_2d(ctf, config.box), s=images.shape[1:])
    images[is_junk] = 0.0
    noise_std = 1.0
    if not is_junk.all():
        inside = pixel_grid(config.box).norm(dim=-1) <= config.box / 2
        noise_std = math.sqrt(float(images[~is_junk][:, inside].var()) / config.snr)
    images += torch.randn(images.shape, generator=generator) * noise_std
    return Simulated(images, pixel_size, conformation, psi, origin, view, is_junk, noise_std, ctf)


def draw_views(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """Rot and tilt of n directions, uniform on the sphere."""
    u = torch.rand(n, 2, generator=generator)
    return torch.stack([(2.0 * u[:, 0] - 1.0) * math.pi, torch.acos(2.0 * u[:, 1] - 1.0)], -1)


def micrograph_of(n_particles: int, n_micrographs: int) -> list[int]:
    """The micrograph (0-based) of each particle: runs of like length."""
    return [i * n_micrographs // n_particles for i in range(n_particles)]


def draw_ctf(config: SimulateConfig, pixel_size: float, generator: torch.Generator) -> CtfTable | None:
    """One defocus for each micrograph, 2 % astigmatic at a random angle."""
    low, high = config.defocus_min_angst, config.defocus_max_angst
    if low is None or high is None:
        return None
    micrograph = micrograph_of(config.n_particles, config.n_micrographs)
    drawn = torch.rand(config.n_micrographs, 2, generator=generator)[micrograph]
    defocus = low + (high - low) * drawn[:, 0]
    ones = torch.ones(config.n_particles)
    return CtfTable(
        pixel_size_angst=ones * pixel_size,
        voltage_kv=ones * config.voltage_kv,
        cs_mm=ones * config.cs_mm,
        amplitude_contrast=ones * config.amplitude_contrast,
        defocus_u_angst=defocus * 1.01,
        defocus_v_angst=defocus * 0.99,
        defocus_angle_rad=drawn[:, 1] * math.pi,
        phase_shift_rad=ones * 0.0,
    )
