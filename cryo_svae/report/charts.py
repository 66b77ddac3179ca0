"""Plain charts as inline SVG: they scale, print and follow the page's colours without a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.floating[Any]]

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 68, 12, 20, 42

_BASE = ["#4477aa", "#d9606f", "#2f8f4e", "#b8a52f", "#4bb3d3", "#a8437f"]
_BASE += ["#e08a2c", "#7d64b0", "#2a9d8f", "#b0683a", "#8a9440", "#cf6fa8"]
_SHADES = (0.0, -0.35, 0.4, -0.18, 0.2)


def class_colours(n_classes: int) -> list[str]:
    """A colour for each class, as #rrggbb, legible on white and on black; they repeat after 60."""
    colours = []
    for number in range(n_classes):
        base = _BASE[number % len(_BASE)]
        shade = _SHADES[number // len(_BASE) % len(_SHADES)]
        towards = 255 if shade > 0 else 0
        parts = [int(base[k : k + 2], 16) for k in (1, 3, 5)]
        mixed = [round(part + abs(shade) * (towards - part)) for part in parts]
        colours.append("#" + "".join(f"{part:02x}" for part in mixed))
    return colours


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between low and high, at most so many."""
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if (high - low) / (s * power) <= most - 1 + 1e-9)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number_text(value: float) -> str:
    """A number for an axis: short, with a true minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "0" if text == "-0" else text.replace("-", "−")


@dataclass(frozen=True)
class Frame:
    """Axes from data to the chart's points; y grows upwards."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at_x(self, value: float) -> float:
        """Place of a value along the width."""
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        """Place of a value along the height."""
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def path(self, x: Reals, y: Reals) -> str:
        """A line through those points that are numbers; gaps where they are not."""
        parts, pen = [], "M"
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            if not (math.isfinite(a) and math.isfinite(b)):
                pen = "M"
                continue
            shown = min(max(b, self.y[0]), self.y[1])
            parts.append(f"{pen}{self.at_x(a):.1f} {self.at_y(shown):.1f}")
            pen = "L"
        return "".join(parts)


def chart(
    frame: Frame,
    body: str,
    *,
    x_label: str,
    y_label: str,
    title: str,
    x_text: Callable[[float], str] = number_text,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """An SVG of a frame with axes; ``body`` is SVG in the frame's points."""
    parts = []
    bottom = HEIGHT - BOTTOM
    for value in ticks(*frame.y, most=5):
        y = frame.at_y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number_text(value)}</text>')
    for value in ticks(*frame.x) if x_ticks is None else x_ticks:
        x = frame.at_x(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        text = escape(x_text(value))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
    middle = (TOP + bottom) / 2
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + body
        + f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'
        + f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
        + f"{escape(x_label)}</text>"
        + f'<text class="label" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        + f"{escape(y_label)}</text></svg>"
    )


def bars(frame: Frame, edges: Reals, counts: Reals) -> str:
    """Histogram bars."""
    floor = frame.at_y(0.0)
    parts = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        left, right, top = frame.at_x(low), frame.at_x(high), frame.at_y(count)
        if floor - top > 0.05:
            parts.append(f"M{left + 0.4:.1f} {floor:.1f}V{top:.1f}H{right - 0.4:.1f}V{floor:.1f}Z")
    return f'<path class="bar" d="{"".join(parts)}"/>'


def histogram(
    values: Reals,
    span: tuple[float, float],
    n_bins: int,
    *,
    x_label: str,
    title: str,
    expected: Callable[[Reals], Reals] | None = None,
    band: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """Counts of values in equal bins; those beyond the span are left out.

    expected: share of the particles in each bin, given its edges; drawn as a line, and with ``band``
    the two standard deviations about it that chance gives.
    """
    counts, edges = np.histogram(values, bins=n_bins, range=span)
    top = float(counts.max(initial=1))
    body = ""
    if expected is not None:
        mean = expected(edges) * len(values)
        middle = (edges[:-1] + edges[1:]) / 2
        spread = 2 * np.sqrt(mean)
        top = max(top, float((mean + (spread if band else 0)).max()))
    frame = Frame(span, (0.0, top * 1.06))
    body = bars(frame, edges, counts.astype(np.float64))
    if expected is not None:
        if band:
            outline = np.concatenate([middle, middle[::-1]])
            limits = np.concatenate([mean + spread, (mean - spread)[::-1]])
            body += f'<path class="band" d="{frame.path(outline, limits)}Z"/>'
        body += f'<path class="expected" d="{frame.path(middle, mean)}"/>'
    return chart(frame, body, x_label=x_label, y_label="particles", title=title, x_ticks=x_ticks)


def sparkline(values: Reals, colour: str, threshold: float) -> str:
    """A small curve between 0 and 1 with a dashed threshold, without axes."""
    width, height = 112, 30
    x = np.linspace(1, width - 1, max(len(values), 2))[: len(values)]
    y = 1 + (height - 2) * (1 - np.clip(values, 0.0, 1.0))
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    level = 1 + (height - 2) * (1 - threshold)
    line = f'<path class="curve" stroke="{colour}" d="M{"L".join(points)}"/>' if points else ""
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="threshold" d="M0 {level:.1f}H{width}"/>{line}</svg>'
    )
