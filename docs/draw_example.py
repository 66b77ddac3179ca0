"""Draws docs/example.png from a job on example_data: particles above, the latent axis below.

cryo-svae run example_data/particles.star --out job --z-dim 1
python docs/draw_example.py job
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cryo_svae.formats.mrc import read_images

COLUMNS = 11


def main(job: Path) -> None:
    """Two rows of images."""
    root = Path(__file__).resolve().parents[1]
    particles = read_images(root / "example_data" / "particles.mrcs", np.arange(COLUMNS))
    decoded = read_images(job / "traversal_z1.mrcs", np.arange(COLUMNS))
    figure = Figure(figsize=(COLUMNS, 2.15))
    axes = figure.subplots(2, COLUMNS, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    for row, images in zip(axes, (particles, decoded), strict=True):
        low, high = np.percentile(images, [0.5, 99.8])
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high)
            axis.set_axis_off()
    figure.savefig(Path(__file__).with_name("example.png"), dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
