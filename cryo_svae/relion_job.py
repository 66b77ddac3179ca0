"""A run as RELION's External job (3.1, 4 and 5): its arguments, its marker files, its output nodes.

In the project's folder RELION runs

    EXECUTABLE --o External/jobNNN/ --in_parts FILE [--LABEL VALUE]... --j THREADS [OTHERS]

with up to ten free parameters, of which an empty value leaves a bare flag. It reads no exit code: a job
is over when RELION_JOB_EXIT_SUCCESS, _FAILURE or _ABORTED stands in its folder, and one that leaves none
runs for ever. The wish to abort is a file too. "Continue" runs the same command in the same folder.
Sources: RELION's documentation of the External job type; pipeline_jobs.cpp and pipeliner.cpp of 3.1.3.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryo_svae import cli, config
from cryo_svae.computing import processor
from cryo_svae.errors import CryoSvaeError, InputError

SUCCESS, FAILURE, ABORTED = (f"RELION_JOB_EXIT_{how}" for how in ("SUCCESS", "FAILURE", "ABORTED"))
ABORT_NOW = "RELION_JOB_ABORT_NOW"
OTHER_INPUTS = ("in_movies", "in_mics", "in_coords", "in_3dref", "in_mask")
YES_NO = {"yes": "--", "no": "--no-"}

PARTICLES, CLASSES, OPTIMISER, LOGFILE = "particles", "classes", "optimiser", "logfile"
LABELS = {  # of nodes in RELION 4, and in 5
    PARTICLES: ("ParticlesData.star.relion", "ParticleGroupMetadata.star.relion"),
    CLASSES: (
        "ImagesData.star.relion.classaverages",
        "Image2DGroupMetadata.star.relion.classaverages",
    ),
    OPTIMISER: ("ProcessData.star.relion.optimiser.class2d", "OptimiserData.star.relion.class2d"),
    LOGFILE: ("LogFile.pdf.relion", "LogFile.pdf.relion"),
}


def relion_version(folder: Path) -> int:
    """3, 4 or 5: the RELION that wrote the folder's job.star; 5 where there is none."""
    job_star = folder / "job.star"
    if not job_star.exists():
        return 5
    text = job_star.read_text(errors="replace")
    if "_rlnJobTypeLabel" not in text:
        return 3
    version = re.search(r"^# version (\d+)", text, re.MULTILINE)
    return 5 if version and int(version[1]) >= 50000 else 4


def output_nodes(version: int) -> dict[str, tuple[str, str]]:
    """Output files of a job with their node types (numbers, of 3.1) and labels (of 4 or 5).

    The class selection of 3.1 takes the model; that of 4 and 5 the optimiser, which names the model.
    """
    model = ("model", "8") if version == 3 else ("optimiser", "9")
    nodes = {
        "particles.star": ("3", PARTICLES),
        "classes.star": ("5", CLASSES),
        f"Class2D/run_it025_{model[0]}.star": (model[1], OPTIMISER),
        "logfile.pdf": ("13", LOGFILE),
    }
    return {name: (kind, LABELS[what][version >= 5]) for name, (kind, what) in nodes.items()}


def write_output_nodes(job: str, nodes: Mapping[str, tuple[str, str]]) -> None:
    """RELION_OUTPUT_NODES.star of a job, named as RELION names it (External/job001/)."""
    from cryo_svae.formats.star import write_tables

    columns = {
        "rlnPipeLineNodeName": [f"{job.rstrip('/')}/{name}" for name in nodes],
        "rlnPipeLineNodeType": [kind for kind, _ in nodes.values()],
        "rlnPipeLineNodeTypeLabel": [label for _, label in nodes.values()],
    }
    write_tables(Path(job) / "RELION_OUTPUT_NODES.star", {"output_nodes": columns})


def our_options(parameters: Sequence[str]) -> list[str]:
    """RELION's free parameters as options of ours: _ or - in names, Yes and No for flags."""
    options: list[str] = []
    for word in parameters:
        flag = bool(options) and options[-1].startswith("--") and "=" not in options[-1]
        if flag and word.lower() in YES_NO:
            options[-1] = YES_NO[word.lower()] + options[-1].removeprefix("--")
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            options.append(name.replace("_", "-") + equals + value)
        else:
            options.append(word)
    return options


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="cryo-svae-relion",
        description="cryo-svae run as RELION's External job. All options of 'cryo-svae run' may follow, "
        "with _ or - in their names.",
        allow_abbrev=False,
    )
    parser.add_argument("--o", required=True, metavar="FOLDER", help="job folder, e.g. External/job001/")
    parser.add_argument("--in_parts", metavar="STAR", help="input particles")
    parser.add_argument("--j", type=int, metavar="THREADS", help="number of threads")
    parser.add_argument("--pipeline_control", metavar="FOLDER", help="the job folder again; not needed")
    for name in OTHER_INPUTS:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def _run(given: argparse.Namespace, parameters: Sequence[str]) -> None:
    """The run, begun or (where the folder holds a checkpoint) gone on with."""
    from cryo_svae.jobs.folder import CHECKPOINT
    from cryo_svae.report.logfile import write_logfile

    folder = Path(given.o)
    config.check(given.j is None or given.j >= 1, "j", given.j, "1 thread or more")
    for name in OTHER_INPUTS:
        if getattr(given, name) is not None:
            raise InputError(
                f"--{name}",
                found=f"'{getattr(given, name)}'",
                expected="input particles alone",
                remedy="in the External job, leave every input but 'Input particles' empty.",
            )
    if given.in_parts is None:
        raise InputError(
            "--in_parts",
            found="no input",
            expected="a particle STAR file",
            remedy="in the External job, give 'Input particles'.",
        )
    options = our_options(parameters)
    words = ["run", given.in_parts, *options, "--out", given.o]
    if "--overwrite" not in options:
        # Without a checkpoint there is only what a failed start left behind.
        words.append("--resume" if (folder / CHECKPOINT).exists() else "--overwrite")
    if given.j is not None and "--threads" not in options:
        words += ["--threads", str(given.j)]
    arguments = vars(cli.parser().parse_args(words))
    del arguments["command"]

    def abort_if_asked() -> None:
        if (folder / ABORT_NOW).exists():
            raise KeyboardInterrupt

    cli.run_job(arguments, "run", abort_if_asked)
    write_logfile(folder)
    write_output_nodes(given.o, output_nodes(relion_version(folder)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; however it ends, its folder says so. SIGKILL alone leaves no time for that.

    Success; aborted, when RELION asked for it; failure in every other ending: bad input, a crash, a
    signal. After the last two, continuing the job goes on from the last whole epoch.
    """
    given, parameters = _arguments(argv)
    folder = Path(given.o)
    folder.mkdir(parents=True, exist_ok=True)
    ending = FAILURE
    try:
        for stale in (SUCCESS, FAILURE, ABORTED):
            (folder / stale).unlink(missing_ok=True)
        _run(given, parameters)
        ending = SUCCESS
    except KeyboardInterrupt:
        asked = (folder / ABORT_NOW).exists()
        ending = ABORTED if asked else FAILURE
        word = "aborted" if asked else "interrupted"
        print(f"cryo-svae-relion: {word}; continuing the job goes on from there", file=sys.stderr)
    except (CryoSvaeError, OSError) as error:
        print(f"cryo-svae-relion: {cli.message(error)}", file=sys.stderr)
    except SystemExit:
        pass  # the parser of options has said what it refuses
    except Exception:
        traceback.print_exc()
    finally:
        (folder / ending).touch()
        (folder / ABORT_NOW).unlink(missing_ok=True)
    return 0 if ending == SUCCESS else CryoSvaeError.exit_code


def _interrupt(number: int, _: object) -> None:
    """Ends the job once; a signal that comes while it ends changes nothing."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def entry_point() -> None:
    """Console script: being told to end (by a queue, or with the terminal) is an interruption."""
    processor.let_waiting_threads_sleep()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    sys.exit(main())
