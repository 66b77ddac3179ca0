"""The plots of the report, each as HTML: poses and merit, what z depends on, resolution, learning."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryo_svae.report import charts, warnings
from cryo_svae.report.charts import Frame
from cryo_svae.report.data import ClassAverages, LearningCurve, ReportData

Reals = NDArray[np.floating[Any]]

PSI_BINS = 36
BINS = 40


def angst_text(value: float, digits: int = 1) -> str:
    """A length in Å, a dash where there is none."""
    return f"{value:.{digits}f} Å" if np.isfinite(value) else "—"


# Distributions --------------------------------------------------------------------------------


def distributions(data: ReportData) -> str:
    """Histograms of shift, psi and figure of merit; nothing where no particle is usable."""
    if not data.usable.any():
        return ""
    good = data.usable
    merit = data.figure_of_merit[good]
    parts = []
    if data.pose_found:
        parts += _shift_charts(data.origin_angst[good], data.shift_prior_angst)
        psi = charts.histogram(
            (data.psi_deg[good].astype(np.float64) + 180.0) % 360.0 - 180.0,
            (-180.0, 180.0),
            PSI_BINS,
            x_label="psi (°)",
            title="histogram of in-plane angles",
            expected=lambda edges: np.diff(edges) / 360.0,
            band=True,
            x_ticks=(-180, -90, 0, 90, 180),
        )
        strength, order, _ = warnings.clustering(data.psi_deg[good])
        text = "In-plane angles. They should be evenly spread, within the band that chance allows. "
        text += f"Strongest clustering {strength:.2f} of 1"
        text += "." if order == 1 else f" (around {order} angles)."
        parts.append((psi, text))
    low, high = min(0.0, float(np.percentile(merit, 0.1))), float(np.percentile(merit, 99.9))
    drawn = charts.histogram(
        merit, (low, max(high, low + 1e-3)), BINS, x_label="figure of merit", title="histogram of merit"
    )
    text = f"Figure of merit: higher is better, about 0 for junk; median {np.median(merit):.2f}."
    return _figures([*parts, (drawn, text)])


def _shift_charts(origin_angst: Reals, prior_std_angst: float | None) -> list[tuple[str, str]]:
    radius = np.hypot(origin_angst[:, 0], origin_angst[:, 1]).astype(np.float64)
    reach = max(float(np.percentile(radius, 99.5)), 1e-3)
    radial = charts.histogram(
        radius,
        (0.0, reach),
        BINS,
        x_label="length of the shift (Å)",
        title="histogram of shift lengths",
        expected=None if prior_std_angst is None else lambda edges: _rayleigh(edges, prior_std_angst),
    )
    text = f"Length of the shifts; median {angst_text(float(np.median(radius)))}."
    if prior_std_angst is not None:
        text += f" The line is the prior, {angst_text(prior_std_angst)} on each axis."
    drawn = _shift_map(origin_angst, reach)
    return [(drawn, "Shifts (rlnOriginXAngst, rlnOriginYAngst), y downwards as in RELION."), (radial, text)]


def _rayleigh(edges: Reals, std: float) -> Reals:
    survival = np.exp(-((edges / std) ** 2) / 2)
    return np.asarray(survival[:-1] - survival[1:])


def _shift_map(origin_angst: Reals, reach: float) -> str:
    n_bins = 48
    clipped = np.clip(origin_angst.astype(np.float64), -reach, reach)
    counts, _, _ = np.histogram2d(
        clipped[:, 1], clipped[:, 0], bins=n_bins, range=[(-reach, reach), (-reach, reach)]
    )
    top = max(float(counts.max()), 1.0)
    side, left, upper = charts.HEIGHT - charts.TOP - charts.BOTTOM, 121, charts.TOP
    cell = side / n_bins
    squares = []
    for row, column in zip(*np.nonzero(counts), strict=True):
        level = 0.12 + 0.88 * (counts[row, column] / top) ** 0.5
        squares.append(
            f'<rect x="{left + column * cell:.2f}" y="{upper + row * cell:.2f}" width="{cell:.2f}" '
            f'height="{cell:.2f}" opacity="{level:.2f}"/>'
        )
    labels = []
    for value in charts.ticks(-reach, reach, most=5):
        place = (value + reach) / (2 * reach) * side
        text = charts.number_text(value)
        labels.append(f'<text x="{left - 7}" y="{upper + place + 4:.1f}" text-anchor="end">{text}</text>')
        x = left + place
        labels.append(f'<text x="{x:.1f}" y="{upper + side + 17}" text-anchor="middle">{text}</text>')
    cross = f"M{left} {upper + side / 2}h{side}M{left + side / 2} {upper}v{side}"
    middle = left + side / 2
    return (
        f'<svg class="chart" viewBox="0 0 {charts.WIDTH} {charts.HEIGHT}" role="img" aria-label="map of '
        f'shifts">'
        f'<rect class="frame" x="{left}" y="{upper}" width="{side}" height="{side}"/>'
        f'<path class="grid" d="{cross}"/><g class="heat">{"".join(squares)}</g>{"".join(labels)}'
        f'<text class="label" x="{middle}" y="{charts.HEIGHT - 5}" text-anchor="middle">x (Å)</text>'
        f'<text class="label" transform="translate({left - 42} {upper + side / 2}) rotate(-90)" '
        'text-anchor="middle">y (Å)</text></svg>'
    )


def leaks(data: ReportData, r2: dict[str, Reals]) -> str:
    """Table of the R² of each dimension of z on psi, shift and defocus, and its content in nats."""
    if not r2:
        return ""
    names = {"psi": "in-plane angle", "shift": "shift", "defocus": "defocus"}
    kl = warnings.kl_of_z(data.z[data.usable], data.z_std[data.usable])
    head = "".join(f"<th>{names[name]}</th>" for name in r2)
    rows = []
    for axis in range(data.z_dim):
        cells = "".join(_leak_cell(float(values[axis])) for values in r2.values())
        rows.append(f"<tr><th>z{axis + 1}</th><td>{kl[axis]:.2f}</td>{cells}</tr>")
    return (
        "<p>z should hold what the particle is, not how it lies or how it was imaged. Each cell is the "
        "share of a dimension’s variance (R², adjusted; 0 where chance explains it) that a regression on "
        f"the nuisance explains; {warnings.R2_THAT_MATTERS:g} or more gives a warning. A dimension of "
        "about 0 nats is not in "
        f'use.</p><table class="leaks"><thead><tr><th></th><th>content (nats)</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _leak_cell(value: float) -> str:
    mark = ' class="high"' if value >= warnings.R2_THAT_MATTERS else ""
    return f'<td{mark}><i style="width:{100 * value:.1f}%"></i><span>{value:.3f}</span></td>'


# Curves ---------------------------------------------------------------------------------------


def resolution(data: ReportData, colours: list[str]) -> str:
    """FRC of the half-sets of each class, and their resolutions by class size."""
    averages = data.averages
    if averages is None:
        return ""
    frequency = averages.frequency_per_angst
    frame = Frame((0.0, float(frequency.max())), (-0.2, 1.02))
    body = "".join(
        f'<path class="level" d="{frame.path(np.array(frame.x), np.array([level, level]))}"/>'
        for level in (0.143, 0.5)
    )
    for k in range(data.n_classes):
        title = f"class {k + 1}: {angst_text(float(averages.resolution_angst[k]))}"
        body += (
            f'<path class="curve" stroke="{colours[k]}" d="{frame.path(frequency, averages.frc[k])}">'
            f"<title>{title}</title></path>"
        )
    filled = np.flatnonzero(np.isfinite(averages.frc).any(1))
    if len(filled):
        median = np.nanmedian(averages.frc[filled], axis=0)
        body += f'<path class="median" d="{frame.path(frequency, median)}"><title>median</title></path>'
    curves = charts.chart(
        frame,
        body,
        x_label="resolution (Å)",
        y_label="FRC",
        title="Fourier ring correlation of each class",
        x_text=lambda value: "∞" if value == 0 else f"{1 / value:.3g}",
    )
    text = (
        "Fourier ring correlation of the half-sets of each class (point at a curve for its class), their "
        "median in bold; dotted at 0.5 and 0.143. The halves share no particle but one model, so where it "
        "has fitted noise the curves stay above 0 and resolutions are optimistic."
    )
    if len(filled):
        outer = averages.frc[filled][:, 3 * len(frequency) // 4 :]
        text += (
            f" In the outer quarter their mean is {charts.number_text(round(float(np.nanmean(outer)), 2))}."
        )
    by_size = _resolution_by_size(data, averages, colours)
    return _figures([(curves, text), (by_size, "Resolution at 0.143 against class size.")])


def _resolution_by_size(data: ReportData, averages: ClassAverages, colours: list[str]) -> str:
    known = np.flatnonzero(np.isfinite(averages.resolution_angst) & (data.class_sizes > 0))
    if len(known) == 0:
        return ""
    sizes, resolutions = np.log10(data.class_sizes[known]), averages.resolution_angst[known]
    frame = Frame(
        (float(sizes.min()) - 0.1, float(sizes.max()) + 0.1),
        (0.0, 1.1 * float(resolutions.max())),
    )
    body, taken = "", list[tuple[float, float]]()
    for k, size, resolution in zip(known, sizes, resolutions, strict=True):
        x, y = frame.at_x(float(size)), frame.at_y(float(resolution))
        body += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colours[k]}">'
        body += f"<title>class {k + 1}</title></circle>"
        if all(abs(x - a) > 18 or abs(y - b) > 10 for a, b in taken):  # else numbers would overlap
            body += f'<text class="small" x="{x + 6:.1f}" y="{y + 4:.1f}">{k + 1}</text>'
            taken.append((x, y))
    low, high = frame.x
    marks = [np.log10(a * 10**b) for b in range(8) for a in (1, 2, 5) if low <= np.log10(a * 10**b) <= high]
    return charts.chart(
        frame,
        body,
        x_label="particles in the class",
        y_label="resolution (Å)",
        title="resolution against class size",
        x_text=lambda value: charts.number_text(round(10**value)),
        x_ticks=marks,
    )


def learning_curves(learning: LearningCurve | None) -> str:
    """The bound and its KL terms by epoch."""
    if learning is None or len(learning.epoch) == 0:
        return ""
    train, held = "curve train", "curve held"
    bounds = [("training", train, learning.elbo), ("held out", held, learning.held_out_elbo)]
    kls = [("of z", train, learning.kl_z), ("of the pose", held, learning.kl_pose)]
    return _figures(
        [
            (
                _epoch_curves(learning.epoch, bounds, "bound (nats a particle)", from_zero=False),
                "Evidence lower bound. Training far above held out means over-fitting; both still rising "
                "means that more epochs would help.",
            ),
            (
                _epoch_curves(learning.epoch, kls, "KL (nats a particle)", from_zero=True),
                "What each particle’s z and pose carry beyond their priors. KL of z at 0 means an empty "
                "latent space.",
            ),
        ]
    )


def _epoch_curves(
    epoch: Reals, series: Sequence[tuple[str, str, Reals]], y_label: str, *, from_zero: bool
) -> str:
    values = np.concatenate([values[np.isfinite(values)] for _, _, values in series])
    if len(values) == 0:
        return ""
    low, high = (min(0.0, float(values.min())) if from_zero else float(values.min())), float(values.max())
    room = 0.05 * (high - low) if high > low else 0.5
    x_high = float(epoch.max()) if len(epoch) > 1 else float(epoch.min()) + 1.0
    frame = Frame((float(epoch.min()), x_high), (low if from_zero else low - room, high + room))
    body, place = "", charts.LEFT + 8
    for name, kind, values in series:
        if not np.isfinite(values).any():
            continue
        body += f'<path class="{kind}" d="{frame.path(epoch, values)}"/>'
        if len(epoch) == 1:
            x, y = frame.at_x(epoch[0]), frame.at_y(values[0])
            body += f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        body += f'<path class="{kind}" d="M{place} 8h16"/><text x="{place + 21}" y="12">{name}</text>'
        place += 110
    whole = [value for value in charts.ticks(*frame.x) if float(value).is_integer()]
    return charts.chart(frame, body, x_label="epoch", y_label=y_label, title=y_label, x_ticks=whole)


def _figures(parts: Sequence[tuple[str, str]]) -> str:
    figures = "".join(
        f"<figure>{drawn}<figcaption>{escape(text)}</figcaption></figure>" for drawn, text in parts if drawn
    )
    return f'<div class="figures">{figures}</div>'
