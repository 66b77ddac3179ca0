"""What the jobs have in common: the program, the paper, and plots of a particle file."""

from __future__ import annotations

from pathlib import Path

from pipeliner.display_tools import create_results_display_object
from pipeliner.external_program_utils import ExternalProgram
from pipeliner.pipeliner_job import JobInfo, Ref
from pipeliner.results_display_objects import ResultsDisplayObject
from pipeliner.starfile_handler import StarFile

VERSION = "0.1.0"
MOST_POINTS = 5000  # of a plot; the results of a job are JSON that a browser loads


def describe(info: JobInfo, name: str, short: str, long: str) -> None:
    """Fills in a job's description."""
    info.display_name, info.short_desc, info.long_desc = name, short, long
    info.version, info.job_author = VERSION, "The cryo_svae developers"
    info.programs = [ExternalProgram("cryo-svae", name="cryo_svae", vers_com=["cryo-svae", "--version"])]
    info.references = [
        Ref(
            # One text: Pipeliner 1.6.1 prints no list of just five authors.
            authors="Bepler T, Zhong ED, Kelley K, Brignole E, Berger B",
            title="Explicitly disentangling image content from translation and rotation with spatial-VAE",
            journal="Advances in Neural Information Processing Systems",
            year="2019",
            volume="32",
        )
    ]


class Particles:
    """The particles of a file of ours, as far as plots need them."""

    def __init__(self, star: Path) -> None:
        self._file = StarFile(star)
        in_optics_style = "particles" in self._file.get_block_names()
        self._block = "particles" if in_optics_style else None  # else RELION 3.0's one block
        self.labels = self._file.column_headers(self._block or "")

    def __len__(self) -> int:
        return self._file.count_block(self._block)

    def thinned(self, label: str) -> list[float]:
        """A numeric column, evenly thinned to what a plot takes."""
        cells = self._file.column_as_list(self._block, label)
        return [float(cell) for cell in cells[:: -(-len(cells) // MOST_POINTS)]]


def particle_plots(star: Path) -> list[ResultsDisplayObject]:
    """Latent space, figure of merit and rotations of a particle file of ours."""
    particles = Particles(star)
    data = [str(star)]
    plots = []
    if "_svaeZ2" in particles.labels:
        classes = [str(int(number)) for number in particles.thinned("_rlnClassNumber")]
        points = {"z1": particles.thinned("_svaeZ1"), "z2": particles.thinned("_svaeZ2")}
        plots.append(
            create_results_display_object(
                "plotlyscatter",
                title="Latent space",
                data={**points, "class": classes},
                x="z1",
                y="z2",
                color="class",
                associated_data=data,
            )
        )
    kept = "_svaeAnglePsi" in particles.labels  # the input's own 3-D poses were left alone
    histograms = {
        "z1": "_svaeZ1",
        "Figure of merit": "_rlnParticleFigureOfMerit",
        "psi, degrees": "_svaeAnglePsi" if kept else "_rlnAnglePsi",
    }
    for title, label in histograms.items():
        plots.append(
            create_results_display_object(
                "histogram",
                title=title,
                data_to_bin=particles.thinned(label),
                xlabel=title,
                ylabel="Particles",
                associated_data=data,
            )
        )
    return plots
