"""Draws docs/convention.png: what rlnAnglePsi and rlnOriginX/YAngst mean, with a real example.

python docs/draw_convention.py
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc

from cryo_svae.imaging import geometry

BOX, PSI_DEG, ORIGIN = 64, 50.0, (9.0, 5.0)
INK, BLUE, RED = "#e8e8e8", "#6db3f2", "#ff8a65"


def reference() -> torch.Tensor:
    """An arrow-like shape that has a head, a tail and a left side."""
    grid = geometry.pixel_grid(BOX)
    beads = [(x, 0.0, 2.2) for x in range(-14, 12, 3)] + [
        (12.0, 0.0, 4.0),
        (5.0, -7.0, 2.6),
        (8.0, -4.0, 2.4),
    ]
    return sum(torch.exp(-((grid[..., 0] - x) ** 2 + (grid[..., 1] - y) ** 2) / s**2) for x, y, s in beads)


def frame(axes: Axes, image: torch.Tensor, title: str) -> None:
    """An image with the pixel coordinates of its centre."""
    half = BOX // 2
    extent = (-half - 0.5, half - 0.5, half - 0.5, -half - 0.5)
    axes.imshow(image, cmap="gray", extent=extent, vmin=0, vmax=1.6)
    axes.axhline(0, color=INK, lw=0.5, alpha=0.5)
    axes.axvline(0, color=INK, lw=0.5, alpha=0.5)
    axes.annotate("x", (27, -1.5), color=INK, fontsize=9)
    axes.annotate("y", (1.5, 29), color=INK, fontsize=9)
    axes.set_title(title, fontsize=9.5)
    axes.set_xticks([-half, 0, half - 1], [f"col 0\nx = −{half}", "N//2\nx = 0", f"N−1\nx = {half - 1}"])
    axes.set_yticks([-half, 0, half - 1], ["row 0", "N//2", "N−1"])
    axes.tick_params(labelsize=7, length=2)


def main() -> None:
    """Particle, centred particle, aligned particle."""
    psi, origin = torch.tensor([geometry.radians(PSI_DEG)]), torch.tensor([ORIGIN])
    zero = torch.zeros(1)
    particle = geometry.pose_references(reference()[None], psi, origin)
    centred = geometry.align_images(particle, zero, origin)
    aligned = geometry.align_images(particle, psi, origin)
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    frame(left, particle[0], "particle, as in the stack")
    left.annotate(
        "", (0, 0), (-ORIGIN[0], -ORIGIN[1]), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 1.8}
    )
    left.text(-7, 6, "origin o", color=BLUE, fontsize=9)
    frame(middle, centred[0], "shifted by +o (rlnOriginX/YAngst ÷ pixel size)")
    start = -PSI_DEG
    middle.add_patch(Arc((0, 0), 44, 44, theta1=start, theta2=0, color=RED, lw=1.8))
    tip = 22 * math.cos(0.0), 22 * math.sin(0.0)
    middle.annotate(
        "", tip, (tip[0], tip[1] - 2.5), arrowprops={"arrowstyle": "->", "color": RED, "lw": 1.8}
    )
    middle.text(23, -20, f"psi = +{PSI_DEG:.0f}°", color=RED, fontsize=9, ha="center")
    frame(right, aligned[0], "then turned by psi, clockwise: the reference")
    figure.savefig(Path(__file__).with_name("convention.png"), dpi=130)


if __name__ == "__main__":
    main()
