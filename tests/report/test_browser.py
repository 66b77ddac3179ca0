"""The page at work in a real browser: a script added to a copy of it plays the user, and tells."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from cryo_svae.report.charts import class_colours
from cryo_svae.report.page import page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt-get install chromium)")

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
]

# Errors are caught before the page's own scripts run; `tell` leaves what a script found in the page.
LISTENER = """<script>
window.faults = [];
window.addEventListener("error", (event) => faults.push(event.message));
window.addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
window.tell = (found) => {
  const node = document.createElement("pre");
  node.id = "told";
  node.textContent = JSON.stringify({ ...found, faults });
  document.body.appendChild(node);
};
</script>"""

HELPERS = """
const by = (id) => document.getElementById(id);
const overlay = by("overlay"), box = overlay.getBoundingClientRect();
function point(kind, x, y, more = {}) {
  const place = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  overlay.dispatchEvent(new PointerEvent(kind, { bubbles: true, button: 0, ...place, ...more }));
}
function drag(corners, more = {}) {
  point("pointerdown", ...corners[0], more);
  for (const corner of corners) point("pointermove", ...corner, more);
  point("pointerup", ...corners[corners.length - 1], more);
}
const rectangle = (left, right) => [[left, 0], [right, 0], [right, 1], [left, 1]];
let saved = null;
URL.createObjectURL = (blob) => { saved = blob; return "#"; };
let name = null;
HTMLAnchorElement.prototype.click = function () { name = this.download; };
"""


@pytest.fixture
def browse(tmp_path: Path):
    """Runs the browser on a page; returns what it prints."""

    def run(path: Path, *options: str) -> str:
        folder = tmp_path / "profile"
        done = subprocess.run(
            [str(BROWSER), *QUIET, f"--user-data-dir={folder}", *options, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return done.stdout

    return run


@pytest.fixture
def play(tmp_path: Path, browse):
    """What a script, added to the page of some data, tells; no error may have come up."""

    def run(data, script: str, *options: str) -> dict:
        text = page(data).replace("<body>", "<body>" + LISTENER, 1)
        added = f"<script>(async () => {{{HELPERS}\n{script}}})()</script></body>"
        path = tmp_path / "played.html"
        path.write_text(text.replace("</body>", added, 1), encoding="utf-8")
        printed = browse(path, "--window-size=1280,900", "--dump-dom", *options)
        told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', printed, re.DOTALL)[1]))
        assert told.pop("faults") == []
        return told

    return run


def test_a_lasso_saves_the_numbers_of_the_particles_inside(make_report, play):
    usable = np.ones(600, bool)
    usable[[0, 1, 2, 3]] = False
    data = make_report(usable=usable)
    told = play(
        data,
        """
        drag(rectangle(0.5, 1));
        by("save").click();
        const right = await saved.text(), count = by("count").textContent;
        drag(rectangle(0, 0.5), { shiftKey: true });
        by("save").click();
        const both = await saved.text();
        drag([[0.5, 0.5], [0.5, 0.5]]);
        tell({ right, both, name, count, after: by("count").textContent, disabled: by("save").disabled });
        """,
    )
    inside = np.flatnonzero(usable & (data.z[:, 0] > 0)) + 1
    assert told["right"] == "".join(f"{number}\n" for number in inside)
    assert [int(number) for number in told["both"].split()] == (np.flatnonzero(usable) + 1).tolist()
    assert told["name"] == "particles.txt"
    assert told["count"] == f"{len(inside)} particles chosen ({100 * len(inside) / 596:.1f}\u00a0%)."
    assert told["after"] == "No particle chosen."
    assert told["disabled"] is True


def test_a_lasso_on_a_sampled_page_takes_every_particle(make_report, play):
    data = make_report(n=60_000)
    told = play(
        data,
        """
        drag(rectangle(0.5, 1));
        by("save").click();
        tell({ numbers: await saved.text(), note: by("sampling").textContent });
        """,
    )
    inside = np.flatnonzero(data.z[:, 0] > 0) + 1
    assert [int(number) for number in told["numbers"].split()] == inside.tolist()
    assert told["note"].startswith("20,000 of 60,000 usable particles are drawn")


def test_pointing_shows_the_particle(make_report, play):
    data = make_report()
    z = data.z.copy()
    z[122] = (6.0, 4.0)  # alone, at the top right
    told = play(
        make_report(z=z),
        """
        const seen = new Set();
        for (let x = 0.9; x < 1; x += 0.005) for (let y = 0; y < 0.1; y += 0.005) {
          point("pointermove", x, y);
          if (!by("tip").hidden) seen.add(by("tip").textContent);
        }
        tell({ seen: [...seen] });
        """,
    )
    (text,) = told["seen"]
    number, micrograph = data.class_number[122], 122 % 5
    assert text.startswith(f"Particle 123class {number}, merit 0.")
    assert text.endswith(f"m{micrograph}.mrc")


def test_every_axis_and_colour_can_be_chosen(make_report, play):
    told = play(
        make_report(d=3),
        """
        const legends = {};
        for (const id of ["across", "up", "colour"]) for (const option of [...by(id).options]) {
          by(id).value = option.value;
          by(id).dispatchEvent(new Event("change"));
          if (id === "colour") legends[option.value] = by("legend").textContent;
        }
        tell({ legends });
        """,
    )
    assert set(told["legends"]) >= {"class", "z1", "z3", "merit", "defocus", "psi", "micrograph", "pc1"}
    assert told["legends"]["psi"] == "−180 °180 °"
    assert told["legends"]["micrograph"] == "m0.mrcm4.mrc"


def test_the_proposed_classes_are_ticked_by_a_button_and_by_nothing_else(make_report, play):
    report = make_report(k=3, n=600)
    merit = np.where(report.class_number == 2, 0.01, report.figure_of_merit)
    found = play(
        make_report(k=3, n=600, figure_of_merit=merit),
        """
        const ticked = () => [...document.querySelectorAll(".card :checked")].length;
        const before = ticked();
        by("propose").click();
        tell({ before, after: ticked(), code: by("keep").querySelector("code").textContent });
        """,
    )
    assert (found["before"], found["after"]) == (0, 2)
    assert found["code"] == "cryo-svae select job042 --classes 1,3"


def test_ticked_classes_give_the_command(make_report, play):
    told = play(
        make_report(k=6, job="Class2D/my job"),
        """
        const before = by("keep").hidden;
        for (const k of [1, 2, 3, 5]) document.querySelector(`[data-class="${k}"] input`).click();
        tell({ before, hidden: by("keep").hidden, code: by("keep").querySelector("code").textContent });
        """,
    )
    assert told["before"] is True
    assert told["hidden"] is False
    assert told["code"] == "cryo-svae select 'Class2D/my job' --classes 1-3,5"


def test_traversals_play_pause_and_slide(make_report, play):
    told = play(
        make_report(),
        """
        const figure = document.querySelector(".traversal"), slider = figure.querySelector("input");
        const pause = (ms) => new Promise((done) => setTimeout(done, ms));
        const canvas = figure.querySelector("canvas");
        const brightest = () => {
          const row = canvas.getContext("2d").getImageData(0, canvas.height / 2 - 2, canvas.width, 1).data;
          let best = 0;
          for (let x = 0; x < canvas.width; x++) if (row[4 * x] > row[4 * best]) best = x;
          return best;
        };
        await pause(500);
        const moved = +slider.value;
        slider.value = 10;
        slider.dispatchEvent(new Event("input"));
        const at10 = brightest(), text = figure.querySelector("output").textContent;
        await pause(500);
        const button = figure.querySelector("button").textContent;
        tell({ moved, at10, text, button, still: +slider.value });
        """,
    )
    assert told["moved"] > 0
    assert told["at10"] == pytest.approx(24 // 2 + 5, abs=1)  # where the last image's blob lies
    assert told["text"] == "= 2.00"
    assert told["still"] == 10
    assert told["button"] == "Play"


@pytest.mark.parametrize("d", [0, 1, 2])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_small_jobs_work_too(make_report, play, d, n):
    """Few latent dimensions, one class, few particles (or none usable): no fault, no NaN."""
    total = max(n, 1)
    data = make_report(
        n=total,
        k=1,
        z=np.random.default_rng(0).normal(size=(total, d)).astype(np.float32),
        z_std=np.full((total, d), 0.3, np.float32),
        usable=np.full(total, n > 0),
        class_number=np.ones(total, int),
        manifold=None,
        traversals=(),
    )
    told = play(
        data,
        """
        drag(rectangle(0, 1));
        const axes = [by("across").value, by("up").value];
        const text = [...document.querySelectorAll("section")].map((part) => part.innerText).join(" ");
        tell({ count: by("count").textContent, axes, text });
        """,
    )
    assert told["count"].startswith(f"{n} particle" if n else "No particle chosen")
    assert told["axes"] == [["merit", "defocus"], ["z1", "merit"], ["z1", "z2"]][d]
    assert not re.search(r"\b(nan|NaN|inf|undefined|null)\b", told["text"])


@pytest.mark.parametrize("width", [1280, 700])
def test_nothing_sticks_out_sideways(make_report, play, width):
    data = make_report(d=8, k=12, title="a_very_long_name_" * 12, particles_file="folder/" * 60)
    script = "const root = document.documentElement; tell({ room: root.clientWidth - root.scrollWidth });"
    assert play(data, script, f"--window-size={width},900")["room"] == 0


def test_light_dark_and_print(make_report, browse, tmp_path):
    path, picture = tmp_path / "page.html", tmp_path / "seen.png"
    path.write_text(page(make_report()), encoding="utf-8")
    corners = []
    for scheme in (1, 0):  # Blink's numbers for light and dark
        browse(
            path,
            "--window-size=1280,900",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={picture}",
        )
        image = matplotlib.image.imread(picture)
        corners.append(float(image[5, 5, :3].mean()))
        assert image[..., :3].std() > 0.05
    assert corners[0] > 0.9
    assert corners[1] < 0.2


@pytest.mark.skipif(shutil.which("pdftoppm") is None, reason="no pdftoppm (apt-get install poppler-utils)")
@pytest.mark.parametrize("scheme", [0, 1])
def test_the_scatter_is_on_paper(make_report, browse, tmp_path, scheme):
    """Points of both classes' colours, dark on white whatever the screen shows."""
    path, paper = tmp_path / "page.html", tmp_path / "page.pdf"
    path.write_text(page(make_report(k=2)), encoding="utf-8")
    browse(path, f"--blink-settings=preferredColorScheme={scheme}", f"--print-to-pdf={paper}")
    subprocess.run(["pdftoppm", "-r", "60", paper, tmp_path / "sheet"], check=True)
    sheets = [matplotlib.image.imread(sheet) for sheet in sorted(tmp_path.glob("sheet*.ppm"))]
    pixels = np.concatenate([sheet.reshape(-1, 3) for sheet in sheets]) / 255.0
    assert np.median(pixels) > 0.95
    for colour in class_colours(2):
        rgb = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        assert (np.abs(pixels - rgb).max(1) < 0.15).sum() > 150
