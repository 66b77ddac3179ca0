"""Draws docs/bgal.png from a job on beta-galactosidase: averages of its first 24 classes.

cryo-svae run ../shared/data/bgal/bgal_40px_9.56A.star --out job --invert
python docs/draw_bgal.py job
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cryo_svae.formats.mrc import read_images

ROWS, COLUMNS = 2, 12
RIM_PX = 4  # left out at each side


def main(job: Path) -> None:
    """Two rows of images."""
    averages = read_images(job / "classes.mrcs", np.arange(ROWS * COLUMNS))
    figure = Figure(figsize=(9.6, 1.75), layout="constrained")
    for axis, image in zip(figure.subplots(ROWS, COLUMNS).flat, averages, strict=True):
        axis.imshow(image[RIM_PX:-RIM_PX, RIM_PX:-RIM_PX], cmap="gray")
        axis.set_axis_off()
    figure.savefig(Path(__file__).with_name("bgal.png"), dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
