"""Class averages as templates for picking, for relion_autopick (3.1 to 5) and programs like it.

RELION compares templates in the grey scale that normalised particles have: background 0, noise of
standard deviation 1, protein white (``--invert`` where the micrograph's is dark). It takes a template's
diameter from where its pixels differ from those of the corner, so outside of the particle they are 0.
Templates with detail finer than 20 Å are found even in pure noise (Henderson 2013, PNAS 110, 18037).
Sources: RELION's autopicker.cpp, and the default of its low-pass filter.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.mrc import read_images, read_stack_info, write_stack
from cryo_svae.formats.star import read_star, write_tables
from cryo_svae.imaging import geometry
from cryo_svae.particles.preprocessing import soft_circle
from cryo_svae.results.class_averages import soft_edge_px
from cryo_svae.results.class_table import CLASSES, read_classes
from cryo_svae.results.relion_class2d import project_path
from cryo_svae.results.selection import SelectionConfig, named_classes

FINEST_ANGST = 20.0
ROLL_OFF = 0.25  # of the cut-off frequency, over which the filter falls to 0
AVERAGES = "classes.mrcs"
OPTIMISER = Path("Class2D") / "run_it025_optimiser.star"


def write_templates(job: Path, config: SelectionConfig, path: Path) -> list[str]:
    """Writes the averages of the classes that a selection names, as templates; lines that say so.

    path: the STAR file; the stack stands beside it, by the same name with .mrcs.
    """
    stack = _stack_of(job, path)
    classes = read_classes(job)
    wanted = named_classes(config.classes or "", len(classes))[1:] ^ config.invert
    index = np.flatnonzero(wanted & (classes.n_particles > 0))
    if not len(index):
        raise InputError(
            "--templates",
            found="no class that has particles",
            expected="one or more",
            remedy="name others by --classes.",
        )
    size_angst = read_stack_info(job / AVERAGES).voxel_size_angst
    optimiser = read_star(job / OPTIMISER).blocks[0]
    diameter_angst = float(optimiser.numbers("rlnParticleDiameter")[0])
    finest = torch.from_numpy(np.fmax(classes.resolution_angst[index], FINEST_ANGST))
    images = torch.from_numpy(read_images(job / AVERAGES, index))
    templates = as_templates(images, finest / size_angst, diameter_angst / 2 / size_angst)
    write_stack(stack, templates.numpy(), pixel_size_angst=size_angst)
    columns = {
        "rlnReferenceImage": [f"{k + 1:06d}@{project_path(stack)}" for k in range(len(index))],
        "rlnClassNumber": [str(number) for number in (index + 1).tolist()],
    }
    write_tables(path, {"": columns})
    corrected = optimiser.integers("rlnDoCorrectCtf")[0]
    return [
        f"{len(index)} templates in {path} ({stack.name}): white protein, {FINEST_ANGST:g} Å or coarser, "
        f"{'' if corrected else 'not '}corrected for the CTF",
        f"relion_autopick takes them as --ref {path} --angpix_ref {size_angst:g} --particle_diameter "
        f"{diameter_angst:.0f}{' --ctf' if corrected else ''}, with --invert for dark protein",
    ]


def _stack_of(job: Path, path: Path) -> Path:
    if path.suffix != ".star":
        raise InputError(
            "--templates",
            found=f"'{path}'",
            expected="a name that ends in .star",
            remedy="change the name.",
        )
    stack = path.with_suffix(".mrcs")
    for ours, its in ((path, CLASSES), (stack, AVERAGES)):
        if ours.exists() and (job / its).exists() and ours.samefile(job / its):
            raise OutputError(f"{ours}: is a file of the job.\n  To mend: give --templates another name.")
    return stack


def as_templates(
    images: Float[Tensor, "k n n"], finest_px: Float[Tensor, "k"], radius_px: float
) -> Float[Tensor, "k n n"]:
    """Images without what is finer than a wavelength, centred, background 0; 0 outside of the circle.

    finest_px: the wavelength for each. Centred is the centre of mass of what is white in the circle.
    """
    box_px = images.shape[-1]
    edge = soft_edge_px(box_px)
    circle = soft_circle(box_px, max(radius_px - edge, 0.0), edge)
    centre = geometry.pixel_grid(box_px)
    outside = (centre.norm(dim=-1) > min(radius_px, box_px / 2 - 1)).float()
    spectra = torch.fft.rfft2(images.float())
    ky, kx = torch.fft.fftfreq(box_px)[:, None], torch.fft.rfftfreq(box_px)
    beyond = (torch.hypot(kx, ky) * finest_px.float()[:, None, None] - 1.0) / ROLL_OFF
    spectra = spectra * 0.5 * (1.0 + torch.cos(math.pi * beyond.clamp(0.0, 1.0)))

    def moved(by_px: Float[Tensor, "k 2"]) -> Float[Tensor, "k n n"]:
        x, y = by_px.unbind(-1)
        turn = -2.0 * math.pi * (kx * x[:, None, None] + ky * y[:, None, None])
        plain: Tensor = torch.fft.irfft2(
            spectra * torch.polar(torch.ones_like(turn), turn), s=(box_px,) * 2
        )
        level = (plain * outside).sum((-2, -1)) / outside.sum()
        levelled: Tensor = (plain - level[:, None, None]) * circle
        return levelled

    white = moved(torch.zeros(len(images), 2)).clamp(min=0.0)
    mass = white.sum((-2, -1)).clamp(min=1e-12)
    middle = torch.einsum("kyx,yxc->kc", white, centre) / mass[:, None]
    return moved(-middle)
