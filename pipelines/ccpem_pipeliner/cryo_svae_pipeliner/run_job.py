"""The job that runs ``cryo-svae run``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeliner.display_tools import (
    create_results_display_object,
    mini_montage_from_many_files,
    mini_montage_from_stack,
)
from pipeliner.job_options import (
    EXT_STARFILE,
    BooleanJobOption,
    FileDescription,
    FloatJobOption,
    InputNodeJobOption,
    IntJobOption,
    MultipleChoiceJobOption,
)
from pipeliner.nodes import (
    NODE_IMAGE2DGROUPMETADATA,
    NODE_IMAGE2DSTACK,
    NODE_LOGFILE,
    NODE_MLMODEL,
    NODE_OPTIMISERDATA,
    NODE_PARTICLEGROUPMETADATA,
)
from pipeliner.pipeliner_job import PipelinerCommand, PipelinerJob
from pipeliner.results_display_objects import ResultsDisplayObject
from pipeliner.starfile_handler import StarFile

from cryo_svae_pipeliner.shared import describe, particle_plots

FROM_DATA = "found from the data"
VALUES = (
    "z_dim",
    "mask_diameter",
    "lowest_resolution",
    "highest_resolution",
    "max_shift",
    "classes",
    "epochs",
    "box",
    "seed",
)
CTF = {FROM_DATA: [], "yes": ["--ctf"], "no": ["--no-ctf"]}
NO_RESOLUTION_ANGST = 999.0


class CryoSvaeRun(PipelinerJob):
    """Trains a model on particles, estimates every one of them, and averages classes."""

    PROCESS_NAME = "cryosvae.image_analysis.run"
    OUT_DIR = "Class2D"  # by which the Pipeliner's own class selection knows classes of images

    def __init__(self) -> None:
        super().__init__()
        describe(
            self.jobinfo,
            "Content, rotation and shift of particles by a spatial VAE",
            "Reference-free 2D analysis: latent content, in-plane pose, classes",
            "Trains a spatial variational autoencoder on particle images and writes the input particles "
            "with latent content z, in-plane rotation, origin, class and figure of merit added, "
            "CTF-corrected class averages, decoded images along each latent axis, and a report.",
        )
        self.can_continue = True
        self.joboptions["fn_parts"] = InputNodeJobOption(
            label="Input particles:",
            node_type=NODE_PARTICLEGROUPMETADATA,
            node_kwds=["relion"],
            pattern=FileDescription("Particles STAR file", EXT_STARFILE),
            help_text="RELION particle file (3.0 to 5).",
            is_required=True,
        )
        self.joboptions["z_dim"] = IntJobOption(
            label="Latent dimensions:",
            default_value=2,
            hard_min=1,
            suggested_max=16,
            help_text="Number of latent content dimensions.",
            is_required=True,
        )
        self.joboptions["mask_diameter"] = FloatJobOption(
            label="Particle diameter (Å):",
            suggested_min=50,
            suggested_max=500,
            step_value=10,
            help_text="Diameter of the circle that holds the particle. Empty: found from the images.",
        )
        self.joboptions["lowest_resolution"] = FloatJobOption(
            label="Lowest resolution (Å):",
            suggested_min=40,
            suggested_max=200,
            help_text="What is coarser is not compared: a micelle's bulk, for one. Empty: no bound.",
        )
        self.joboptions["highest_resolution"] = FloatJobOption(
            label="Highest resolution (Å):",
            suggested_min=5,
            suggested_max=30,
            help_text="What is finer is not compared: ice, for one. Empty: no bound.",
        )
        self.joboptions["invert"] = BooleanJobOption(
            label="Protein is dark?",
            default_value=False,
            help_text="Change the sign of the images. Leave it at No where the protein is white.",
        )
        self.joboptions["ctf"] = MultipleChoiceJobOption(
            label="Model the CTF?",
            choices=list(CTF),
            default_value=FROM_DATA,
            help_text="Found from the data: yes where the file holds CTF parameters.",
        )
        self.joboptions["max_shift"] = FloatJobOption(
            label="Largest shift (Å):",
            suggested_min=0,
            suggested_max=100,
            help_text="Largest shift of a particle from the middle of its box. Empty: 10 % of the box.",
        )
        self.joboptions["classes"] = IntJobOption(
            label="Number of classes:",
            hard_min=1,
            suggested_max=100,
            help_text="Classes of z. Empty: by the number of particles, at most 50.",
        )
        self.joboptions["epochs"] = IntJobOption(
            label="Epochs:",
            hard_min=1,
            suggested_max=200,
            help_text="Passes over the particles. Empty: by their number.",
        )
        self.joboptions["box"] = IntJobOption(
            label="Working box (px):",
            hard_min=8,
            suggested_max=256,
            step_value=2,
            help_text="Even; reached by Fourier cropping. Empty: the images' own, at most 64 or 128.",
        )
        self.joboptions["device"] = MultipleChoiceJobOption(
            label="Compute on:",
            choices=["auto", "cpu", "cuda"],
            default_value="auto",
            help_text="auto takes a GPU where there is one.",
            jobop_group="Running options",
        )
        self.joboptions["seed"] = IntJobOption(
            label="Random seed:",
            default_value=0,
            hard_min=0,
            help_text="Equal seeds make equal runs on a CPU.",
            jobop_group="Running options",
        )
        self.get_runtab_options(threads=True, addtl_args=True)

    def create_output_nodes(self) -> None:
        """Particles, class averages, what RELION's class selection reads, model, report."""
        self.add_output_node("particles.star", NODE_PARTICLEGROUPMETADATA, ["relion", "cryosvae"])
        self.add_output_node(
            "classes.star", NODE_IMAGE2DGROUPMETADATA, ["relion", "classaverages", "cryosvae"]
        )
        self.add_output_node(
            "Class2D/run_it025_optimiser.star", NODE_OPTIMISERDATA, ["relion", "class2d", "cryosvae"]
        )
        self.add_output_node("decoded.mrcs", NODE_IMAGE2DSTACK, ["cryosvae", "decoded"])
        self.add_output_node("model.pt", NODE_MLMODEL, ["torch", "cryosvae"])
        self.add_output_node("report.html", NODE_LOGFILE, ["cryosvae"])

    def get_commands(self) -> list[PipelinerCommand]:
        """One run; a continued job goes on from its last whole epoch."""
        options = self.joboptions
        threads = ["env", f"OMP_NUM_THREADS={self.get_nr_threads()}"]
        command = ["cryo-svae", "run", options["fn_parts"].get_string(), "--out", self.output_dir]
        for name in VALUES:
            if options[name].value is not None:
                command += ["--" + name.replace("_", "-"), options[name].get_string()]
        if options["invert"].get_boolean():
            command.append("--invert")
        command += CTF[options["ctf"].get_string()]
        command += ["--device", options["device"].get_string(), *self.parse_additional_args()]
        if self.is_continue:
            command.append("--resume")
        return [PipelinerCommand([*threads, *command])]

    def create_results_display(self) -> Sequence[ResultsDisplayObject]:
        """Class averages, traversals of the latent axes, plots of the particles, the report."""
        folder = Path(self.output_dir)
        stack, labels = str(folder / "classes.mrcs"), class_labels(folder / "classes.star")
        title = "Class averages: number, particles, resolution"
        shown: list[ResultsDisplayObject] = []
        if len(labels) == 1:  # the Pipeliner takes a stack of one image for no stack
            shown.append(mini_montage_from_many_files([stack], self.output_dir, title=title, labels=labels))
        else:
            shown.append(
                mini_montage_from_stack(stack, self.output_dir, title=title, labels=labels, nimg=-1)
            )
        for axis in sorted(folder.glob("traversal_z*.mrcs")):
            shown.append(
                mini_montage_from_stack(
                    str(axis),
                    self.output_dir,
                    ncols=11,
                    title=f"Decoded along {axis.stem.partition('_')[2]}, 2nd to 98th percentile",
                )
            )
        shown += particle_plots(folder / "particles.star")
        report = create_results_display_object(
            "html",
            title="Report",
            html_file=str(folder / "report.html"),
            associated_data=[str(folder / "report.html")],
            start_collapsed=True,
        )
        return [*shown, report]


def class_labels(star: Path) -> list[str]:
    """Number, particles and resolution of each class."""
    file = StarFile(star)
    size, resolution = (
        file.column_as_list("classes", label) for label in ("_svaeNrParticles", "_rlnEstimatedResolution")
    )
    return [
        f"{number}: {n}" + ("" if float(angst) == NO_RESOLUTION_ANGST else f", {float(angst):.1f} Å")
        for number, (n, angst) in enumerate(zip(size, resolution, strict=True), start=1)
    ]
