"""The page and its warnings: what is planted is said, what is not there is not, names stay text."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryo_svae.report import charts, png, scatter, warnings
from cryo_svae.report.page import page, write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Parsed(HTMLParser):
    """Elements, their attributes, and the texts of scripts and of the rest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append(data)
        else:
            self.text += data


def payload_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="particles">(.*?)</script>', html, re.DOTALL)
    return json.loads(found[1])


# ---- Warnings ---------------------------------------------------------------------------------


def test_a_healthy_job_has_no_warnings(make_report):
    html = page(make_report())
    assert "No warnings" in html
    assert 'class="warn"' not in html


@pytest.mark.parametrize("n", [1_000, 1_000_000])
def test_independence_is_not_warned_of(n):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, 4)).astype(np.float32)
    psi = rng.uniform(-180, 180, n)
    tables = warnings.regressors(psi, rng.normal(0, 5, (n, 2)), rng.uniform(1e4, 3e4, n))
    r2 = {name: warnings.explained(z, table) for name, table in tables.items()}
    assert max(values.max() for values in r2.values()) < 0.02
    assert warnings.dependence(r2) == []
    assert warnings.preferred_angles(psi, rng.integers(1, 11, n), 10) == []


@pytest.mark.parametrize("n", [1_000, 1_000_000])
def test_a_dependence_too_small_to_matter_is_not_warned_of(n):
    rng = np.random.default_rng(1)
    psi = rng.uniform(-180, 180, n)
    z = rng.normal(size=(n, 1)) + 0.05 * np.cos(np.deg2rad(psi))[:, None]
    r2 = warnings.explained(z, warnings.regressors(psi, None, None)["psi"])
    assert warnings.dependence({"psi": r2}) == []
    slightly = np.where(rng.uniform(size=n) < 0.02, 30.0, psi)  # 2 % at one angle
    assert warnings.preferred_angles(slightly, np.ones(n, int), 1) == []


@pytest.mark.parametrize("n", [300, 30_000])
@pytest.mark.parametrize("cause", ["psi", "shift", "defocus"])
def test_a_planted_dependence_is_found(n, cause):
    rng = np.random.default_rng(2)
    psi, origin, defocus = rng.uniform(-180, 180, n), rng.normal(0, 5, (n, 2)), rng.uniform(1e4, 3e4, n)
    signal = {
        "psi": np.sqrt(2) * np.sin(2 * np.deg2rad(psi)),
        "shift": (origin**2).sum(1) / 50 - 1,
        "defocus": (defocus - 2e4) / np.sqrt(12) / 1e4 * 3.46,
    }[cause]
    z = rng.normal(size=(n, 3))
    z[:, 1] += signal / signal.std()  # R² 0.5
    r2 = {k: warnings.explained(z, t) for k, t in warnings.regressors(psi, origin, defocus).items()}
    assert r2[cause][1] == pytest.approx(0.5, abs=0.1)
    (text,) = warnings.dependence(r2)
    assert text.startswith(f"z depends on {cause}: z2 (R² 0.")


def test_constant_nuisances_explain_nothing():
    flat = warnings.regressors(np.zeros(50), np.zeros((50, 2)), np.full(50, 1e4))
    assert "shift" not in flat
    assert "defocus" not in flat
    assert warnings.explained(np.zeros((5, 2)), np.ones((5, 2))).tolist() == [0, 0]


@pytest.mark.parametrize(("fold", "words"), [(1, "one angle"), (2, "2 angles 180°"), (4, "4 angles 90°")])
def test_preferred_angles_are_found_and_described(fold, words):
    rng = np.random.default_rng(4)
    psi = 360 / fold * rng.integers(0, fold, 500) + rng.normal(0, 10, 500)
    found = warnings.preferred_angles(psi, rng.integers(1, 4, 500), 3)
    assert words in found[0]
    assert "within 3 of 3 classes" in found[1]


def test_one_class_with_preferred_angles_is_named():
    rng = np.random.default_rng(5)
    psi, number = rng.uniform(-180, 180, 4000), rng.integers(1, 11, 4000)
    psi[number == 7] = rng.normal(40, 30, int((number == 7).sum()))
    (text,) = warnings.preferred_angles(psi, number, 10)
    assert "1 of 10 classes: class (strength) 7 (0." in text


def test_shifts_at_the_limits():
    rng = np.random.default_rng(6)
    origin = rng.normal(0, 5, (2000, 2))
    assert warnings.shifts_at_limit(origin, 5.0, 25.0) == []
    (text,) = warnings.shifts_at_limit(origin, 2.5, None)
    assert "--shift-std" in text
    ring = origin / np.hypot(*origin.T)[:, None] * 10
    (text,) = warnings.shifts_at_limit(np.concatenate([origin, ring]), None, 10.0)
    assert "10.0 Å" in text
    assert warnings.shifts_at_limit(origin[:0], 5.0, 25.0) == []
    assert warnings.shifts_at_limit(origin[:3] * 100, None, None) == []


def test_signal_contrast_ctf_images_and_classes():
    ones, zeros = np.ones((100, 2)), np.zeros((100, 2))
    empty, nothing = warnings.no_signal(zeros, ones, np.full(100, 0.001))
    assert "0.000 nats" in empty
    assert "0.001" in nothing
    assert warnings.no_signal(ones, 0.2 * ones, np.full(100, 0.4)) == []
    assert warnings.wrong_contrast(None, False) == warnings.wrong_contrast(-3.0, False) == []
    assert "run again with --invert" in warnings.wrong_contrast(-20.0, False)[0]
    assert "--no-invert" in warnings.wrong_contrast(-20.0, True)[0]
    assert warnings.ctf_missing(True, True) == []
    assert "--no-ctf" in warnings.ctf_missing(False, True)[0]
    assert "no CTF parameters" in warnings.ctf_missing(False, False)[0]
    usable = np.ones(50, bool)
    assert warnings.unusable_images(usable) == []
    usable[[3, 9]] = False
    assert (
        "2 of 50 images hold NaN or no contrast (particle 4, 10) and were"
        in (warnings.unusable_images(usable)[0])
    )
    assert warnings.tiny_classes(np.array([500, 30])) == []
    assert warnings.tiny_classes(np.array([3])) == []
    assert "2 of 3 classes" in warnings.tiny_classes(np.array([500, 3, 0]))[0]


# ---- The page ---------------------------------------------------------------------------------


def test_hostile_names_stay_text(make_report):
    data = make_report(
        title=HOSTILE,
        particles_file=HOSTILE,
        job=HOSTILE,
        program=HOSTILE,
        micrograph_names=(HOSTILE,) * 5,
        files=("particles.star", "traversal_" + HOSTILE),
    )
    html = page(data)
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert not [a for _, attributes in parsed.elements for a in attributes if a.startswith("on")]
    assert "alert(1)" not in "".join(parsed.scripts[-1:])
    assert parsed.text.count(HOSTILE) >= 3
    assert payload_of(html)["micrographs"][0] == HOSTILE.rsplit("/", 1)[-1]


def test_the_page_needs_nothing_from_outside(make_report):
    html = page(make_report())
    assert not re.search(r"https?://|url\(|@import|<link|<iframe", html)
    for _, attributes in Parsed(html).elements:
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert attributes.get("href", "#").startswith("#")


def test_every_section_is_there_and_numbers_are_planted_ones(make_report):
    data = make_report()
    text = Parsed(page(data)).text
    for heading in ("Classes", "Latent space", "Manifold", "Traversals", "Particles", "Poses and merit"):
        assert heading in text
    for heading in ("What z follows", "Resolution", "Learning", "Files"):
        assert heading in text
    assert f"{data.class_sizes[0]:,}" in text
    assert "7.0 Å" in text
    assert "600" in text


def test_optional_parts_may_be_missing(make_report):
    bare = make_report(
        d=1,
        defocus_angst=None,
        micrograph_number=None,
        averages=None,
        traversals=(),
        manifold=None,
        examples=None,
        learning=None,
        contrast_score=None,
        pose_found=False,
        shift_prior_angst=None,
        max_shift_angst=None,
        files=(),
    )
    html = page(bare)
    for key in ("manifold", "traversals", "examples", "resolution", "learning", "files"):
        assert f'id="{key}"' not in html
    assert [axis["key"] for axis in payload_of(html)["axes"]] == ["z1", "merit"]


def test_odd_jobs_still_make_a_page(make_report):
    data = make_report(n=40)
    nothing = np.zeros(40, bool)
    page(make_report(n=40, usable=nothing))
    page(make_report(n=40, k=3, class_number=np.ones(40, int)))  # empty classes
    page(make_report(n=1))
    curves = data.learning
    page(make_report(learning=type(curves)(**{k: v[:1] for k, v in vars(curves).items()})))
    lost = {**vars(curves), "held_out_elbo": np.full(5, np.nan)}
    page(make_report(learning=type(curves)(**lost)))
    averages = {**vars(data.averages), "frc": np.full_like(data.averages.frc, np.nan)}
    for name in ("resolution_angst", "resolution_05_angst"):
        averages[name] = np.full(2, np.nan)
    page(make_report(averages=type(data.averages)(**averages)))
    page(make_report(decoded=np.zeros((2, 24, 24))))


def test_a_million_particles_fit_in_20_mb(make_report, tmp_path, monkeypatch):
    monkeypatch.setattr(scatter, "find_spec", lambda name: None)  # UMAP takes a time of its own
    n, d, k, box = 1_000_000, 8, 50, 128
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(k, box, box))
    data = make_report(
        n=n,
        d=d,
        k=k,
        decoded=noise,
        averages=None,
        micrograph_number=np.arange(n) // 100,
        micrograph_names=tuple(f"MotionCorr/job002/a_long_name_{i:07d}.mrc" for i in range(n // 100)),
    )
    began = time.perf_counter()
    write_report(tmp_path / "report.html", data)
    assert time.perf_counter() - began < 15
    assert (tmp_path / "report.html").stat().st_size < 20e6
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    payload = payload_of((tmp_path / "report.html").read_text())
    complete = [axis["key"] for axis in payload["axes"] if axis["all"]]
    assert complete == ["pc1", "pc2", *(f"z{a + 1}" for a in range(8))]


def test_equal_input_makes_equal_pages(make_report):
    assert page(make_report(n=25_000)) == page(make_report(n=25_000))


# ---- Parts ------------------------------------------------------------------------------------


def test_png_is_read_back():
    image = np.random.default_rng(0).integers(0, 256, (5, 9), dtype=np.uint8)
    read = matplotlib.image.imread(io.BytesIO(png.grey_png(image)))
    assert np.array_equal(np.round(read * 255), image)


def test_grey_levels_and_sheets():
    ramp = np.linspace(0, 1, 100).reshape(10, 10)
    grey = png.to_grey(np.stack([ramp, 100 * ramp, 0 * ramp]), together=False)
    assert np.array_equal(grey[0], grey[1])
    assert (grey[0].min(), grey[0].max()) == (0, 255)
    assert (grey[2] == 128).all()
    assert png.to_grey(np.stack([ramp, 100 * ramp]), together=True)[0].max() < 5
    tiles = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1)
    assert png.sheet(tiles).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert png.to_grey(np.full((2, 2), np.nan), together=True).tolist() == [[128, 128], [128, 128]]


def test_shrinking_keeps_values_and_the_centre():
    y, x = np.mgrid[:256, :256] - 128
    small = png.shrink(np.exp(-((x - 20) ** 2 + (y + 40) ** 2) / 800.0)[None], 64)[0]
    assert small.shape == (64, 64)
    assert np.unravel_index(small.argmax(), small.shape) == (32 - 10, 32 + 5)
    assert small.max() == pytest.approx(1.0, abs=0.01)


def test_scatter_numbers_come_back(make_report):
    usable = np.ones(600, bool)
    usable[7] = False
    data = make_report(usable=usable)
    payload = scatter.scatter_payload(data, ["#000000", "#ffffff"])
    axis = next(axis for axis in payload["axes"] if axis["key"] == "z2")
    steps = np.frombuffer(base64.b64decode(axis["drawn"]), "<u2")
    back = axis["low"] + steps * (axis["high"] - axis["low"]) / 65535
    z2 = data.z[usable, 1]
    assert np.abs(back - z2)[np.abs(z2) < 0.6].max() < 1e-4
    assert axis["all"] is None
    assert (
        np.frombuffer(base64.b64decode(payload["rows"]), "<u4").tolist() == np.flatnonzero(usable).tolist()
    )
    assert np.frombuffer(base64.b64decode(payload["unusable"]), "<u4").tolist() == [7]


def test_principal_axes_find_the_clumps(make_report):
    data = make_report(d=3)
    first, second = scatter.principal_columns(data.z, data.usable)
    assert abs(np.corrcoef(first.values, data.z[:, 0])[0, 1]) > 0.999
    assert first.label.startswith("pc1 (9")
    assert abs(np.corrcoef(first.values, second.values)[0, 1]) < 1e-6


def test_umap_axes_come_where_it_is_installed(make_report, monkeypatch):
    data = make_report(d=3)
    monkeypatch.setattr(scatter, "find_spec", lambda name: None)
    assert "umap1" not in [a["key"] for a in scatter.scatter_payload(data, [])["axes"]]


@pytest.mark.filterwarnings("ignore")  # the library's and its compiler's own
def test_umap_keeps_the_clumps_apart(make_report):
    pytest.importorskip("umap", reason="UMAP is not installed (pip install 'cryo_svae[umap]')")
    data = make_report(d=3)
    first, second = scatter.umap_columns(data.z)
    assert (first.label, second.label) == ("UMAP 1", "UMAP 2")
    placed = np.stack([first.values, second.values], 1)
    centres = np.stack([placed[data.class_number == k].mean(0) for k in (1, 2)])
    nearest = np.linalg.norm(placed[:, None] - centres, axis=-1).argmin(1) + 1
    assert (nearest == data.class_number).mean() > 0.99
    assert scatter.umap_columns(data.z[:, :2]) == []
    assert scatter.umap_columns(np.zeros_like(data.z)) == []


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 9))
def test_ticks_are_few_and_within(low, width, most):
    high = low + width
    if not high > low:
        return
    found = charts.ticks(low, high, most)
    assert 1 <= len(found) <= most
    slack = 1e-6 * width + 4 * np.spacing(max(abs(low), abs(high)))
    assert all(low - slack <= value <= high + slack for value in found)


def test_class_colours_differ():
    assert len(set(charts.class_colours(50))) == 50


def test_largest_z2_is_at_the_top_of_the_manifold(make_report):
    html = page(make_report())
    source = re.search(r'<img src="data:image/png;base64,([^"]+)"[^>]*alt="decoded images over', html)[1]
    image = matplotlib.image.imread(io.BytesIO(base64.b64decode(source)))
    assert image.shape == (3 * 24, 7 * 24)
    assert image[:24].max() > image[-24:].max()


def test_classes_that_numbers_speak_against_say_so_and_the_others_are_proposed(make_report):
    report = make_report(k=3)
    merit = np.where(report.class_number == 2, 0.01, report.figure_of_merit)
    text = page(make_report(k=3, figure_of_merit=merit))
    assert "Proposed by size, figure of merit and resolution: 1,3 (what <code>cryo-svae select" in text
    assert text.count("not proposed:") == 1
    assert "not proposed: merit 0.01, below half of 0.60" in text
    none = page(make_report(k=3, figure_of_merit=0 * merit))
    assert "No class is proposed" in none
    assert 'id="propose"' not in none
    assert "roposed" not in page(make_report(k=3, averages=None))


def test_views_are_shown_with_their_shares_and_uneven_ones_warned_of(make_report):
    number = np.repeat([1, 2, 3, 4], [420, 1, 100, 79])
    centre = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 3.0]])
    said = page(make_report(n=600, k=4, class_number=number, class_centre=centre))
    assert "1 (70%); 2 (0%); 3 (17%); 4 (13%)" in said
    assert "cryo-svae select job042 --balance 0.5" in said
    assert "One view (class 1) holds 70% of the particles" in said
    assert "1 of 4 views (class 2) hold less than a fifth" in said
    assert "Views (classes" not in page(make_report())
