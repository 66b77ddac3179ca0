"""The job that runs ``cryo-svae select``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeliner.display_tools import create_results_display_object
from pipeliner.job_options import (
    EXT_STARFILE,
    BooleanJobOption,
    FileDescription,
    InputNodeJobOption,
    JobOptionValidationResult,
    StringJobOption,
)
from pipeliner.nodes import NODE_IMAGE2DGROUPMETADATA, NODE_IMAGE2DSTACK, NODE_PARTICLEGROUPMETADATA
from pipeliner.pipeliner_job import PipelinerCommand, PipelinerJob
from pipeliner.results_display_objects import ResultsDisplayObject

from cryo_svae_pipeliner.shared import Particles, describe, particle_plots

CONDITIONS = ("classes", "where", "top", "min_distance")


class CryoSvaeSelect(PipelinerJob):
    """Takes a part of a job's particles, by class, by a condition, or the best of them."""

    PROCESS_NAME = "cryosvae.select.particles"
    OUT_DIR = "Select"
    CATEGORY_LABEL = "Subset Selection"

    def __init__(self) -> None:
        super().__init__()
        describe(
            self.jobinfo,
            "Particles by latent content, class or merit",
            "Select particles of a cryo_svae job",
            "Writes those particles that every condition given allows, every column kept to the letter.",
        )
        self.joboptions["fn_parts"] = InputNodeJobOption(
            label="Particles of a cryo_svae job:",
            node_type=NODE_PARTICLEGROUPMETADATA,
            node_kwds=["cryosvae"],
            pattern=FileDescription("particles.star of a cryo_svae job", EXT_STARFILE),
            help_text="particles.star of a cryo_svae run, or of an earlier selection.",
            is_required=True,
        )
        self.joboptions["classes"] = StringJobOption(label="Classes:", help_text="E.g. 1,4-7.")
        self.joboptions["auto"] = BooleanJobOption(
            label="Propose classes?",
            default_value=False,
            help_text="Takes the classes that size, figure of merit and resolution speak for, instead of "
            "those named above; run.out lists all, with the reasons for what is left out.",
        )
        self.joboptions["where"] = StringJobOption(
            label="Condition:",
            help_text="E.g. figure_of_merit > 0.4 and z1 > 0. Any numeric column by its label, or z1, z2, "
            "…, psi, psi_std (degrees), x, y (origin, Å), class_number, class_probability, "
            "figure_of_merit, log_likelihood, defocus (Å); with + - * / abs() and or not < <= == != >= >.",
        )
        self.joboptions["top"] = StringJobOption(
            label="Best of them:", help_text="By figure of merit, e.g. 50%; of what the others allow."
        )
        self.joboptions["min_distance"] = StringJobOption(
            label="Least distance of picks:",
            help_text="Of particles picked twice, nearer than this in one micrograph, only the best stays: "
            "in Å, e.g. 40, or in pixels of rlnCoordinateX, e.g. 40px.",
        )
        self.joboptions["invert"] = BooleanJobOption(
            label="Take all the others instead?", default_value=False, help_text="The complement."
        )
        self.joboptions["templates"] = BooleanJobOption(
            label="Write templates for picking?",
            default_value=False,
            help_text="The averages of the selected classes, centred, protein white, 20 Å or coarser: "
            "templates.star and templates.mrcs.",
        )
        self.get_runtab_options(addtl_args=True)

    def additional_joboption_validation(self) -> list[JobOptionValidationResult]:
        """At least one condition; a file of the name that cryo-svae looks for."""
        errors = []
        is_auto = self.joboptions["auto"].get_boolean()
        conditions = [self.joboptions[name].value for name in (*CONDITIONS, "other_args")]
        if not is_auto and not any(conditions):
            message = (
                "Give classes or have them proposed, a condition, a distance, or how many of the best."
            )
            raised_by = [self.joboptions[name] for name in CONDITIONS]
            errors.append(JobOptionValidationResult("error", raised_by, message))
        given = self.joboptions["fn_parts"]
        if given.value and Path(given.value).name != "particles.star":
            message = f"found {given.value}, expected the particles.star of a cryo_svae job"
            errors.append(JobOptionValidationResult("error", [given], message))
        return errors

    def create_output_nodes(self) -> None:
        """The particles selected, and the templates."""
        self.add_output_node("particles.star", NODE_PARTICLEGROUPMETADATA, ["relion", "cryosvae"])
        if self.joboptions["templates"].get_boolean():
            self.add_output_node("templates.star", NODE_IMAGE2DGROUPMETADATA, ["relion", "cryosvae"])
            self.add_output_node("templates.mrcs", NODE_IMAGE2DSTACK, ["cryosvae", "templates"])

    def get_commands(self) -> list[PipelinerCommand]:
        """One selection."""
        folder = Path(self.joboptions["fn_parts"].get_string()).parent
        out = Path(self.output_dir) / "particles.star"
        command = ["cryo-svae", "select", str(folder), "--out", str(out)]
        for name in CONDITIONS:
            if self.joboptions[name].value:
                command.append(f"--{name.replace('_', '-')}={self.joboptions[name].get_string()}")
        command += [f"--{name}" for name in ("auto", "invert") if self.joboptions[name].get_boolean()]
        if self.joboptions["templates"].get_boolean():
            command.append(f"--templates={out.with_name('templates.star')}")
        return [PipelinerCommand([*command, *self.parse_additional_args()])]

    def create_results_display(self) -> Sequence[ResultsDisplayObject]:
        """How many were taken, and plots of them."""
        selected = Path(self.output_dir) / "particles.star"
        source = self.joboptions["fn_parts"].get_string()
        kept, total = (len(Particles(Path(star))) for star in (selected, source))
        counts = create_results_display_object(
            "text",
            title="Selected",
            display_data=f"{kept:,} of {total:,} particles of {source}",
            associated_data=[str(selected)],
        )
        return [counts, *particle_plots(selected)]
