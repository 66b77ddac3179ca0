"""The report: ReportData in, one self-contained HTML file out."""

from __future__ import annotations

import json
import shlex
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryo_svae.formats.atomic import atomic_path
from cryo_svae.report import charts, plots, warnings
from cryo_svae.report.data import ReportData, Traversal
from cryo_svae.report.png import LARGEST_SIDE_PX, data_uri, sheet, shrink, smooth, to_grey
from cryo_svae.report.scatter import scatter_payload
from cryo_svae.results.auto_selection import ranges
from cryo_svae.results.views import Views, views_with_sizes

Reals = NDArray[np.floating[Any]]

SMOOTHING_SHARE_OF_BOX = 0.03
LARGEST_MANIFOLD_PX = 1200
LARGEST_STRIP_TILE_PX = 96

OUTPUTS = {
    "particles.star": "the input with pose, class, figure of merit and z of every particle added",
    "particles.cs": "the same in CryoSPARC's form",
    "latents.h5": "z, pose, class and merit as arrays, for notebooks",
    "decoded.mrcs": "the generator's image at each class centre, without noise or CTF",
    "classes.mrcs": "CTF-corrected averages of the aligned particles of each class",
    "classes.star": "size, resolution and centre in z of each class",
    "Class2D": "the classes in the form that RELION's class selection reads",
    "traversal": "decoded images along one direction of the latent space",
    "model.pt": "the trained model; cryo-svae estimate applies it to other particles",
    "epochs.tsv": "the learning curve, an epoch a row",
    "config.yaml": "every setting of the run, from which it repeats",
    "run.json": "versions, seed, inputs with digests, timings, warnings",
    "run.log": "what the run said",
}


def write_report(path: Path, data: ReportData) -> None:
    """Writes the page, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(page(data), encoding="utf-8")


def page(data: ReportData) -> str:
    """The whole page as HTML."""
    colours = charts.class_colours(data.n_classes)
    r2 = explained_by_nuisance(data)
    sections = [
        ("classes", "Classes", _classes(data, colours)),
        ("latent", "Latent space", _latent(data)),
        ("manifold", "Manifold", _manifold(data)),
        ("traversals", "Traversals", _traversals(data)),
        ("examples", "Particles", _examples(data)),
        ("poses", "Poses and merit", plots.distributions(data)),
        ("leaks", "What z follows", plots.leaks(data, r2)),
        ("resolution", "Resolution", plots.resolution(data, colours)),
        ("learning", "Learning", plots.learning_curves(data.learning)),
        ("files", "Files", _files(data)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    bodies = "".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, title, body in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.title)} · cryo_svae</title><style>{_own('report.css')}</style></head>"
        f"<body><header>{_header(data)}</header><nav>{links}</nav>"
        f"<main>{_warnings(list_warnings(data, r2), data)}{bodies}</main>"
        f"<footer>{_footer(data)}</footer>"
        f'<script type="application/json" id="particles">{_json(scatter_payload(data, colours))}</script>'
        f"<script>{_own('report.js')}</script></body></html>\n"
    )


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(payload: object) -> str:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _image(pixels: NDArray[np.uint8], alt: str) -> str:
    height, width = pixels.shape
    return f'<img src="{data_uri(pixels)}" width="{width}" height="{height}" alt="{escape(alt)}">'


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# Summary and warnings -------------------------------------------------------------------------


def explained_by_nuisance(data: ReportData) -> dict[str, Reals]:
    """R² of each dimension of z (d,) on psi, shift and defocus, as far as they are known."""
    good = data.usable
    tables = warnings.regressors(
        data.psi_deg[good] if data.pose_found else None,
        data.origin_angst[good] if data.pose_found else None,
        None if data.defocus_angst is None else data.defocus_angst[good],
    )
    return {name: warnings.explained(data.z[good], table) for name, table in tables.items()}


def list_warnings(data: ReportData, r2: dict[str, Reals]) -> list[str]:
    """Every warning of the job, the gravest first."""
    good = data.usable
    found = warnings.no_signal(data.z[good], data.z_std[good], data.figure_of_merit[good])
    found += warnings.wrong_contrast(data.contrast_score, data.inverted)
    found += warnings.unusable_images(good)
    found += [] if data.close_picks is None else data.close_picks.doubts()
    found += warnings.ctf_missing(data.ctf_used, data.defocus_angst is not None)
    if data.pose_found:
        origins = data.origin_angst[good]
        found += warnings.shifts_at_limit(origins, data.shift_prior_angst, data.max_shift_angst)
    found += warnings.dependence(r2)
    if data.pose_found:
        found += warnings.preferred_angles(data.psi_deg[good], data.class_number[good], data.n_classes)
    views = _views_of(data)
    found += [] if views is None else views.doubts()
    return found + warnings.tiny_classes(data.class_sizes)


def _views_of(data: ReportData) -> Views | None:
    """Classes side by side in z, where there are enough of them."""
    if data.class_centre is None or data.n_classes < 2:
        return None
    return views_with_sizes(data.class_centre, data.class_sizes)


def _header(data: ReportData) -> str:
    facts = [
        (f"{data.n_particles:,}", "particles"),
        (f"{data.box_px} px", f"at {data.pixel_size_angst:.3g} Å"),
        (data.engine, "engine"),
        (f"{data.z_dim}-D", "latent space"),
        (str(data.n_classes), "class" if data.n_classes == 1 else "classes"),
    ]
    if data.averages is not None and np.isfinite(data.averages.resolution_angst).any():
        facts.append(
            (plots.angst_text(float(np.nanmedian(data.averages.resolution_angst))), "median class")
        )
    listed = "".join(f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for value, label in facts)
    return (
        f"<h1>{escape(data.title)}</h1>"
        f'<p class="source">from <code>{escape(data.particles_file)}</code></p><dl>{listed}</dl>'
    )


def _warnings(found: list[str], data: ReportData) -> str:
    if not found:
        checked = ["signal", "images", "CTF", "class sizes"]
        checked += [] if data.contrast_score is None else ["contrast"]
        checked += [] if data.close_picks is None else ["picks"]
        checked += ["shifts", "in-plane angles", "what z follows"] if data.pose_found else []
        return f'<aside class="fine"><h2>No warnings</h2><p>Checked: {", ".join(checked)}.</p></aside>'
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    title = _plural(len(found), "warning")
    return f'<aside class="warn" role="alert"><h2>{title}</h2><ul>{items}</ul></aside>'


# Classes --------------------------------------------------------------------------------------


def _classes(data: ReportData, colours: list[str]) -> str:
    decoded = to_grey(shrink(data.decoded), together=False)
    averages = None if data.averages is None else to_grey(shrink(data.averages.image), together=False)
    cards = []
    for k in range(data.n_classes):
        pictures = _image(decoded[k], f"decoded image of class {k + 1}")
        if averages is not None:
            pictures += _image(averages[k], f"average of class {k + 1}")
        cards.append(_class_card(data, k, pictures, colours[k]))
    command = f"cryo-svae select {shlex.quote(data.job)} --classes "
    intro = "The generator’s image at each class centre. "
    if data.averages is not None:
        intro = (
            "Left, the generator’s image at the class centre; right, the average of its aligned particles, "
            "with the resolution of its two half-sets and their FRC up to Nyquist (dashed: 0.143). "
        )
    return (
        f"<p>{intro}Each image has its own grey scale. Tick classes to get the command that keeps them. "
        "The images are aligned to one another here, so that they can be compared; the files keep the "
        "frame that the particles’ psi and origins belong to (classes.star holds how each is turned).</p>"
        f"{_proposal(data)}{_views(data)}"
        f'<div class="cards{"" if averages is None else " pairs"}">{"".join(cards)}</div>'
        f'<p class="command" id="keep" data-command="{escape(command)}" hidden>'
        "<span></span> <code></code></p>"
    )


def _proposal(data: ReportData) -> str:
    """The classes that select --auto would take, and a button that ticks them."""
    if not data.class_objections:
        return ""
    good = [number for number, why in enumerate(data.class_objections, start=1) if not why]
    command = f"cryo-svae select {shlex.quote(data.job)} --auto"
    if not good:
        return (
            "<p>No class is proposed: each card says what speaks against it "
            f"(so <code>{escape(command)}</code> takes none).</p>"
        )
    return (
        f"<p>Proposed by size, figure of merit and resolution: {ranges(good).replace('-', '–')} "
        f"(what <code>{escape(command)}</code> takes). The others’ cards say what speaks against them. A "
        "contaminant that aligns well cannot be told from a particle by these numbers: look at the images. "
        '<button id="propose">Tick those proposed</button></p>'
    )


def _views(data: ReportData) -> str:
    """How full each group of neighbouring classes is."""
    views = _views_of(data)
    if views is None:
        return ""
    listed = "; ".join(
        f"{classes.replace('-', '–')} ({share:.0%})"
        for classes, share in zip(views.classes, views.shares, strict=True)
    )
    command = f"cryo-svae select {shlex.quote(data.job)} --balance 0.5"
    return (
        f"<p>Views (classes side by side in z, with their shares of the particles): {listed}. "
        f"<code>{escape(command)}</code> evens them out.</p>"
    )


def _class_card(data: ReportData, k: int, pictures: str, colour: str) -> str:
    size, merit = int(data.class_sizes[k]), float(data.class_merits[k])
    share = size / max(1, int(data.class_sizes.sum()))
    lines = f"<span>{size:,}</span> <span>{share:.1%}</span>"
    detail = f'<span title="mean figure of merit">merit {merit:.2f}</span>' if np.isfinite(merit) else ""
    spark = ""
    if data.averages is not None:
        resolution, half = data.averages.resolution_angst[k], data.averages.resolution_05_angst[k]
        title = f"{plots.angst_text(resolution)} at 0.143, {plots.angst_text(half)} at 0.5"
        detail = f'<strong title="{title}">{plots.angst_text(resolution)}</strong> {detail}'
        spark = charts.sparkline(data.averages.frc[k], colour, 0.143)
    objection = data.class_objections[k] if data.class_objections else ""
    against = f'<span class="against">not proposed: {escape(objection)}</span>' if objection else ""
    return (
        f'<label class="card" data-class="{k + 1}" data-size="{size}">'
        f'<span class="pictures">{pictures}</span>'
        f'<span class="line"><input type="checkbox" aria-label="keep class {k + 1}">'
        f'<b style="color:{colour}">{k + 1}</b> {lines}</span>'
        f'<span class="line">{detail}</span>{spark}{against}</label>'
    )


# Latent space ---------------------------------------------------------------------------------


def _latent(data: ReportData) -> str:
    command = f"cryo-svae select {shlex.quote(data.job)} --particles particles.txt"
    return (
        "<p>Each point is a particle; numbers mark class centres. Point at one to see which it is. Draw "
        "around some to choose them (with Shift, to add more), then save their numbers.</p>"
        '<div class="latent"><div class="plot"><canvas id="points"></canvas><canvas id="overlay"></canvas>'
        '<div id="tip" hidden></div></div><div class="panel">'
        '<label>Across <select id="across"></select></label><label>Up <select id="up"></select></label>'
        '<label>Colour <select id="colour"></select></label><div id="legend"></div>'
        '<div id="chosen"><p id="count" aria-live="polite">No particle chosen.</p>'
        '<button id="save" disabled>Save list</button> <button id="clear" disabled>Clear</button>'
        f'<p class="then" id="then" hidden>then <code>{escape(command)}</code></p></div>'
        '<p class="note" id="sampling"></p></div></div>'
    )


def _manifold(data: ReportData) -> str:
    if data.manifold is None:
        return ""
    across, up = np.argsort(data.manifold.across), np.argsort(-data.manifold.up)
    rows, columns = len(up), len(across)
    tile = min(LARGEST_SIDE_PX, LARGEST_MANIFOLD_PX // max(rows, columns))
    images = shrink(data.manifold.image, tile)[up][:, across]
    picture = _image(sheet(to_grey(images, together=True)), "decoded images over the latent space")
    x, y = data.manifold.across[across], data.manifold.up[up]
    (first, second), two = data.manifold.names, rows > 1
    left = f'<div class="up">{_ends(y[0], second, y[-1])}</div>' if two else ""
    below = f'<div class="across">{_ends(x[0], first, x[-1])}</div>'
    rest = ", the other dimensions at their means" if data.z_dim > (2 if two else 1) else ""
    kind = "manifold strip" if rows == 1 else "manifold"
    where = f"the plane of {first} and {second}" if two else first
    return (
        f"<p>The images that the generator makes at points over {where}{rest}, in one pose, without noise "
        f'or CTF; one grey scale for all.</p><div class="{kind}">{left}{picture}{below}</div>'
    )


def _ends(first: float, name: str, last: float) -> str:
    low, high = charts.number_text(round(first, 2)), charts.number_text(round(last, 2))
    return f"<span>{low}</span><b>{name}</b><span>{high}</span>"


def _traversals(data: ReportData) -> str:
    if not data.traversals:
        return ""
    figures = "".join(_traversal(traversal) for traversal in data.traversals)
    return (
        "<p>Decoded images along each axis of z and along its principal axes (pc), between the 2nd and "
        "98th percentiles of the particles, all else at the mean; one grey scale for each. "
        "What changes along an axis is what the model found to vary between particles.</p>"
        f'<div class="traversals">{figures}</div>'
    )


def _traversal(traversal: Traversal) -> str:
    tiles = to_grey(shrink(traversal.image, LARGEST_STRIP_TILE_PX), together=True)
    strip = _image(sheet(tiles[None]), f"decoded images along {traversal.label}")
    label, last = escape(traversal.label), len(tiles) - 1
    values = escape(json.dumps([round(float(value), 4) for value in traversal.values]))
    return (
        f'<figure class="traversal" data-label="{label}" data-values="{values}"><canvas></canvas><div>'
        f"<figcaption><b>{label}</b> <output></output></figcaption>"
        f'<div class="strip">{strip}<i></i></div><div class="player"><button>Pause</button>'
        f'<input type="range" min="0" max="{last}" value="0" aria-label="place along '
        f'{label}"></div></div></figure>'
    )


def _examples(data: ReportData) -> str:
    if data.examples is None or len(data.examples.number) == 0:
        return ""
    images = shrink(data.examples.image)
    raw = to_grey(images, together=False)
    smoothed = to_grey(smooth(images, SMOOTHING_SHARE_OF_BOX * images.shape[-1]), together=False)
    models = to_grey(shrink(data.examples.reconstruction), together=False)
    figures = []
    for k, number in enumerate(data.examples.number.tolist()):
        row = number - 1
        merit = f"{data.figure_of_merit[row]:.2f}".replace("-", "−")
        pictures = _image(raw[k], f"particle {number}")
        pictures += _image(smoothed[k], f"particle {number}, smoothed")
        pictures += _image(models[k], f"reconstruction of particle {number}")
        figures.append(
            f'<figure class="example"><div class="pictures">{pictures}</div>'
            f"<figcaption><b>{number:,}</b> class {data.class_number[row]}, "
            f"merit {merit}</figcaption></figure>"
        )
    return (
        "<p>Particles as the model sees them, the same smoothed for the eye, and their reconstructions "
        "in the pose that was found. All three should show the same thing in the same place at the same "
        f'angle; each has its own grey scale.</p><div class="examples">{"".join(figures)}</div>'
    )


# Files ----------------------------------------------------------------------------------------


def _files(data: ReportData) -> str:
    rows = []
    traversals = [name for name in data.files if name.startswith("traversal")]
    for name in data.files:
        key = "traversal" if name in traversals else name
        shown = f"<code>{escape(name)}</code>"
        if name in traversals[:1] and len(traversals) > 1:
            shown += f" … <code>{escape(traversals[-1])}</code>"
        if key in OUTPUTS and name not in traversals[1:]:
            rows.append(f"<tr><td>{shown}</td><td>{OUTPUTS[key]}</td></tr>")
    if not rows:
        return ""
    return (
        f"<p>In <code>{escape(data.job)}</code>. Angles are in degrees, lengths in Å, poses in RELION’s "
        "convention: shift first, then rotate about pixel N/2; row 0 at the top.</p>"
        f'<table class="files"><tbody>{"".join(rows)}</tbody></table>'
    )


def _footer(data: ReportData) -> str:
    return (
        f"Made by {escape(data.program)}. Images are drawn in 8 bits with row 0 at the top, white "
        f"protein; those larger than {LARGEST_SIDE_PX} px are reduced. The full numbers are in the files."
    )
