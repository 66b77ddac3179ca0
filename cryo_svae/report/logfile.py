"""logfile.pdf: the results of a finished job on two pages, for programs that show PDF but not HTML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryo_svae.formats.atomic import atomic_path
from cryo_svae.formats.hdf5 import read_arrays
from cryo_svae.formats.mrc import read_images
from cryo_svae.formats.star import read_star
from cryo_svae.results.class_table import NO_RESOLUTION_ANGST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

A4_INCHES = (8.27, 11.69)
MONTAGE_ROWS, MONTAGE_COLUMNS = 8, 6


def write_logfile(folder: Path) -> None:
    """Writes logfile.pdf from the files of a job: its class averages, then its distributions."""
    from matplotlib.backends.backend_pdf import PdfPages

    no_date = {"CreationDate": None}  # equal jobs, equal bytes
    with (
        atomic_path(folder / "logfile.pdf") as temporary,
        PdfPages(temporary, metadata=no_date) as pages,
    ):
        pages.savefig(_classes_page(folder))
        pages.savefig(_distributions_page(folder))


def _page(title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=A4_INCHES, layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _classes_page(folder: Path) -> Figure:
    [classes] = read_star(folder / "classes.star").blocks
    size = classes.integers("svaeNrParticles").tolist()
    resolution = classes.numbers("rlnEstimatedResolution").tolist()
    shown = min(len(size), MONTAGE_ROWS * MONTAGE_COLUMNS)
    images = read_images(folder / "classes.mrcs", np.arange(shown))
    record = json.loads((folder / "run.json").read_text())
    lines = [f"{record['program']}: {folder}", f"{sum(size):,} particles of {record['inputs']['star']}"]
    lines.append(f"averages of {shown} of {len(size)} classes: particles, resolution (FRC 0.143)")
    lines += [f"Warning: {text}" for text in record["warnings"]]
    figure = _page("\n".join(lines))
    axes = np.asarray(figure.subplots(MONTAGE_ROWS, MONTAGE_COLUMNS)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for k, image in enumerate(images):
        axes[k].imshow(image, cmap="gray")
        reached = "" if resolution[k] == NO_RESOLUTION_ANGST else f", {resolution[k]:.1f} Å"
        axes[k].set_title(f"{k + 1}: {size[k]:,}{reached}", fontsize=7)
    return figure


def _distributions_page(folder: Path) -> Figure:
    found = read_arrays(folder / "latents.h5")
    z, origin = found["z"], found["origin_angst"]
    figure = _page("distributions over the particles, and learning")
    axes = np.asarray(figure.subplots(3, 2)).ravel()
    if z.shape[1] > 1:
        _density(axes[0], z[:, :2], "z1", "z2")
    else:
        _histogram(axes[0], z[:, 0], "z1")
    _histogram(axes[1], found["figure_of_merit"], "figure of merit")
    _histogram(axes[2], found["psi_deg"], "psi, degrees")
    _density(axes[3], origin, "origin x, Å", "origin y, Å")
    axes[3].set_aspect("equal")
    number, count = np.unique(found["class_number"], return_counts=True)
    axes[4].bar(number, count)
    axes[4].set(xlabel="class", ylabel="particles")
    epochs = np.genfromtxt(folder / "epochs.tsv", names=True, ndmin=1)
    axes[5].plot(epochs["epoch"], epochs["elbo"], ".-", label="trained on")
    axes[5].plot(epochs["epoch"], epochs["held_out_elbo"], ".-", label="held out")
    axes[5].set(xlabel="epoch", ylabel="bound, nats a particle")
    axes[5].legend(fontsize=8)
    return figure


def _histogram(axis: Axes, values: np.ndarray[Any, Any], name: str) -> None:
    axis.hist(values, bins=50)
    axis.set(xlabel=name, ylabel="particles")


def _density(axis: Axes, points: np.ndarray[Any, Any], name_x: str, name_y: str) -> None:
    """Points (n, 2) as counts: a page stays small however many there are."""
    axis.hist2d(points[:, 0], points[:, 1], bins=60, cmap="magma", rasterized=True)
    axis.set(xlabel=name_x, ylabel=name_y)
