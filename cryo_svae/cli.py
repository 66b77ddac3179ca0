"""The command line: arguments to settings to a stage to an exit code."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryo_svae import __version__, config
from cryo_svae.computing import processor
from cryo_svae.config import (
    ComputeConfig,
    ModelConfig,
    OutputConfig,
    PoseConfig,
    PreparationConfig,
    SourceConfig,
    TrainingConfig,
)
from cryo_svae.errors import CryoSvaeError, InputError

log = logging.getLogger(__name__)

INTERRUPTED = 130


class _Command(argparse.ArgumentParser):
    """A command; options whose modules import torch are added only when it is the one given."""

    late_options: Callable[[], tuple[type, ...]] | None = None

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        """What argparse's does."""
        if self.late_options is not None:
            config.add_options(self, *self.late_options())
            self.late_options = None
        return super().parse_known_args(*given, **named)


def _engine_options() -> tuple[type, ...]:
    from cryo_svae.models import CONFIG_CLASSES

    return CONFIG_CLASSES


def _selection_options() -> tuple[type, ...]:
    from cryo_svae.results.selection import SelectionConfig

    return (SelectionConfig,)


def _simulation_options() -> tuple[type, ...]:
    from cryo_svae.simulate import SimulateConfig

    return (SimulateConfig,)


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    top = argparse.ArgumentParser(
        prog="cryo-svae",
        description="Content, in-plane rotation and shift of cryo-EM particles by spatial variational "
        "autoencoders: RELION STAR or CryoSPARC .cs and MRC in, the same out.",
    )
    top.add_argument("--version", action="version", version=f"cryo_svae {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)

    def add(name: str, summary: str) -> _Command:
        return commands.add_parser(name, help=summary, description=summary)

    run = add("run", "train a model, estimate every particle, decode class averages")
    train = add("train", "train a model only")
    for command in (run, train):
        _add_job_options(command)
        _add_particles(command, optional=True)
        config.add_options(command, SourceConfig, PreparationConfig, ModelConfig, TrainingConfig)
        config.add_options(command, PoseConfig, ComputeConfig, *([OutputConfig] if command is run else []))
        command.late_options = _engine_options
    estimate = add("estimate", "estimate particles, perhaps others, with a trained model")
    _add_job_options(estimate)
    _add_particles(estimate, optional=True)
    estimate.add_argument(
        "--model", type=Path, default=argparse.SUPPRESS, metavar="MODEL.pt", help="model.pt of a job"
    )
    config.add_options(estimate, SourceConfig, PoseConfig, ComputeConfig, OutputConfig)
    inspect = add("inspect", "say what is understood of a particle file, and draw some of its images")
    _add_particles(inspect, optional=False)
    inspect.add_argument(
        "--out", type=Path, default=Path("inspect.png"), metavar="PNG", help="the montage [inspect.png]"
    )
    config.add_options(inspect, SourceConfig, PreparationConfig)
    select = add("select", "a part of a job's particles, as a STAR or .cs file for the next job")
    select.add_argument("job", type=Path, metavar="JOB", help="job folder")
    select.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    select.late_options = _selection_options
    convert = add("convert", "a STAR file as a CryoSPARC .cs file, or a .cs file as a STAR file")
    convert.add_argument("source", type=Path, metavar="IN", help="particles, .star or .cs")
    convert.add_argument("out", type=Path, metavar="OUT", help="the file to write, .cs or .star")
    convert.add_argument(
        "--dark", action="store_true", help="the protein is dark: blob/sign -1 in the .cs file, not 1"
    )
    config.add_options(convert, SourceConfig)
    average = add("average", "decode at a point or along an axis of z, and average the particles there")
    average.add_argument("job", type=Path, metavar="JOB", help="job folder, which takes the stacks")
    average.add_argument("--z", metavar="Z", help="a point, e.g. --z=0.5,-1")
    average.add_argument(
        "--along", metavar="AXIS", help="an axis of z, e.g. z1, or a principal axis, e.g. pc1"
    )
    report = add("report", "draw a job's report.html again")
    report.add_argument("job", type=Path, metavar="JOB", help="job folder")
    simulate = add("simulate", "make particles of a molecule in motion, with their truth")
    simulate.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    simulate.add_argument("--overwrite", action="store_true", help="write over an earlier simulation")
    simulate.late_options = _simulation_options
    return top


def _add_particles(parser: argparse.ArgumentParser, optional: bool) -> None:
    parser.add_argument(
        "particles",
        type=Path,
        nargs="?" if optional else None,
        metavar="PARTICLES",
        help="particle file: RELION .star (3.0 to 5), or CryoSPARC .cs",
    )


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="JOB", help="job folder")
    parser.add_argument("--config", type=Path, metavar="YAML", help="settings, as in a job's config.yaml")
    parser.add_argument("--resume", action="store_true", help="go on with the job in this folder")
    parser.add_argument("--overwrite", action="store_true", help="remove the job's results first")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads [the cores it may use]")


def run_job(
    arguments: dict[str, Any], stage_name: str, before_batch: Callable[[], None] = lambda: None
) -> None:
    """Runs a stage on parsed arguments; what ``before_batch`` raises between batches ends it."""
    from cryo_svae.computing import distributed
    from cryo_svae.jobs import stages
    from cryo_svae.jobs.folder import Job, open_job, settings_to_resume
    from cryo_svae.models import CONFIG_CLASSES

    out, source = arguments.pop("out"), "the command line"
    overwrite, resume = arguments.pop("overwrite"), arguments.pop("resume")
    config_path, threads = arguments.pop("config"), arguments.pop("threads")
    config.check(threads is None or threads >= 1, "threads", threads, "1 or more")
    threads = processor.use(threads)
    if arguments["particles"] is None:  # it may be in --config, or in the job to resume
        del arguments["particles"]
    if config_path is not None:
        source = str(config_path)
        arguments = {**config.read_yaml(config_path), **arguments}
    for name in ("particles", "model") if stage_name == "estimate_only" else ("particles",):
        if name not in arguments and not resume:
            raise InputError(
                "the command line",
                found=f"no {name}",
                expected="a RELION STAR or CryoSPARC .cs file"
                if name == "particles"
                else "--model MODEL.pt",
                remedy="see cryo-svae --help.",
            )
    of_model = (PreparationConfig, ModelConfig, PoseConfig, TrainingConfig)
    classes = (SourceConfig, *of_model, ComputeConfig, OutputConfig)
    with distributed.processes(), contextlib.ExitStack() as held:
        if distributed.restarted():  # with the same arguments, but not to start anew
            overwrite, resume = False, True
        with distributed.first_goes_first():  # the others find the folder as it left it
            if distributed.rank() == 0:
                job = held.enter_context(open_job(out, overwrite=overwrite, resume=resume))
            else:
                job = Job(out)
            job.before_batch = before_batch
            if resume:
                arguments = settings_to_resume(job, arguments)
        plain = {name: value for name, value in arguments.items() if name not in ("particles", "model")}
        config.refuse_unknown(plain, (*classes, *CONFIG_CLASSES), source)
        with job.logging():
            log.info("%-19s %d", "threads", threads)
            getattr(stages, stage_name)(job, arguments, source)


def _inspect(arguments: dict[str, Any]) -> None:
    from cryo_svae.jobs.inspection import inspect

    source = config.build(SourceConfig, arguments, "the command line")
    settings = config.build(PreparationConfig, arguments, "the command line")
    for line in inspect(arguments["particles"], source, settings, arguments["out"]):
        print(line)


def _select(arguments: dict[str, Any]) -> None:
    from cryo_svae.results.selection import SelectionConfig, select, settle

    job, out = arguments["job"], arguments["out"]
    settings, said = settle(job, config.build(SelectionConfig, arguments, "the command line"))
    for line in said:
        print(line)
    if settings.onto is not None:
        from cryo_svae.results.onto import select_onto

        for line in select_onto(job, out, settings, settings.onto):
            print(line)
    else:
        kept, total = select(job, out, settings)
        print(f"{kept:,} of {total:,} particles in {out}")
    if settings.templates is not None:
        from cryo_svae.results.picking_templates import write_templates

        for line in write_templates(job, settings, settings.templates):
            print(line)


def _convert(arguments: dict[str, Any]) -> None:
    from cryo_svae.particles.conversion import convert

    source = config.build(SourceConfig, arguments, "the command line")
    for line in convert(arguments["source"], arguments["out"], source, is_dark=arguments["dark"]):
        print(line)


def _average(arguments: dict[str, Any]) -> None:
    from cryo_svae.jobs.finished import average_at

    for path in average_at(arguments["job"], arguments["z"], arguments["along"]):
        print(path)


def _report(arguments: dict[str, Any]) -> None:
    from cryo_svae.jobs.finished import redraw_report

    print(redraw_report(arguments["job"]))


def _simulate(arguments: dict[str, Any]) -> None:
    from cryo_svae.errors import OutputError
    from cryo_svae.simulate import SimulateConfig, simulate, write_simulated

    out = arguments["out"]
    if (out / "particles.star").exists() and not arguments["overwrite"]:
        raise OutputError(
            f"{out}: holds particles.star.\n  To mend: name another folder, or add --overwrite."
        )
    settings = config.build(SimulateConfig, arguments, "the command line")
    write_simulated(out, simulate(settings), settings)
    print(f"{settings.n_particles:,} particles in {out}/particles.star, their truth in {out}/truth.star")


# torch has no exception of its own for memory of the processor
TORCH_ALLOCATORS = ("DefaultCPUAllocator", "CUDA out of memory")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


COMMANDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "run": lambda arguments: run_job(arguments, "run"),
    "train": lambda arguments: run_job(arguments, "train_only"),
    "estimate": lambda arguments: run_job(arguments, "estimate_only"),
    "average": _average,
    "select": _select,
    "convert": _convert,
    "report": _report,
    "simulate": _simulate,
    "inspect": _inspect,
}


def message(error: CryoSvaeError | OSError) -> str:
    """What the user reads of an error."""
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = vars(parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        COMMANDS[command](arguments)
    except (CryoSvaeError, OSError) as error:
        print(f"cryo-svae: {message(error)}", file=sys.stderr)
        return CryoSvaeError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(name in str(error) for name in TORCH_ALLOCATORS)):
            raise
        wanted = str(error).splitlines()[0] if str(error) else "no more to be had"
        print(
            f"cryo-svae: the memory does not suffice ({wanted}).\n"
            "  To mend: use a smaller --batch-size or --box, or more memory; --resume goes on.",
            file=sys.stderr,
        )
        return CryoSvaeError.exit_code
    except KeyboardInterrupt:
        print("cryo-svae: interrupted; the same command with --resume goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


def entry_point() -> None:
    """Console script: SIGTERM is taken as Ctrl-C."""
    processor.let_waiting_threads_sleep()
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
