"""A large STAR file read, checked, extended and written, beside other programs: seconds and memory.

python -m benchmarks.star_scale [--rows 1000000] [--folder FOLDER]

Ours reads the file as a job does (a cell for each label in every row, the numbers of CTF, optics and pose,
every stack opened, every slice there), appends the 12 columns of a job with two latent dimensions to the
text, and writes it. starfile reads, appends the same columns, and writes; relion_star_handler reads and
writes. Each runs in a process of its own, one after the other. The cells are then compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cryo_svae.formats.mrc import write_stack
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.results.export import write_particles
from cryo_svae.results.latent_classes import Classes

N_STACKS, BOX, Z_DIM = 2000, 32, 2
LABELS = (
    *(
        "rlnImageName",
        "rlnMicrographName",
        "rlnCoordinateX",
        "rlnCoordinateY",
        "rlnDefocusU",
        "rlnDefocusV",
    ),
    *("rlnDefocusAngle", "rlnPhaseShift", "rlnCtfBfactor", "rlnCtfScalefactor", "rlnCtfMaxResolution"),
    *(
        "rlnCtfFigureOfMerit",
        "rlnOpticsGroup",
        "rlnGroupNumber",
        "rlnAngleRot",
        "rlnAngleTilt",
        "rlnAnglePsi",
    ),
    *("rlnOriginXAngst", "rlnOriginYAngst", "rlnAutopickFigureOfMerit", "rlnLogLikeliContribution"),
    *("rlnMaxValueProbDistribution", "rlnNrOfSignificantSamples", "rlnRandomSubset", "rlnHelicalTubeID"),
)
ROW = (
    "%06d@Extract/job012/mics/stack_%04d.mrcs MotionCorr/job003/mics/mic_%04d.mrc %12.6f %12.6f %12.6f "
    "%12.6f %12.6f %12.6f %12.6f %12.6f %12.6f %12.6f %12d %12d %12.6f %12.6f %12.6f %12.6f %12.6f %12.6f "
    "%12.6e %12.6f %12d %12d %12d \n"
)
OPTICS = """
# version 30001

data_optics

loop_ 
_rlnOpticsGroupName #1 
_rlnOpticsGroup #2 
_rlnImagePixelSize #3 
_rlnImageSize #4 
_rlnImageDimensionality #5 
_rlnVoltage #6 
_rlnSphericalAberration #7 
_rlnAmplitudeContrast #8 
opticsGroup1 1 1.5 32 2 300.0 2.7 0.1 

# version 30001

data_particles

loop_ 
"""  # noqa: W291


def make(folder: Path, n_rows: int) -> Path:
    """A STAR file of so many rows and 25 columns, and its stacks as files with holes."""
    stacks = folder / "Extract" / "job012" / "mics"
    stacks.mkdir(parents=True)
    each = -(-n_rows // N_STACKS)
    for k in range(N_STACKS):
        path = stacks / f"stack_{k:04d}.mrcs"
        write_stack(path, np.zeros((1, BOX, BOX), np.float32), pixel_size_angst=1.5)
        with path.open("r+b") as file:
            file.seek(8)
            file.write(each.to_bytes(4, "little"))
            file.truncate(1024 + 4 * each * BOX * BOX)
    rng = np.random.default_rng(0)
    star = folder / "particles.star"
    with star.open("w") as file:
        file.write(OPTICS)
        file.writelines(f"_{label} #{k + 1} \n" for k, label in enumerate(LABELS))
        for start in range(0, n_rows, 10_000):
            for row, v in enumerate(
                rng.uniform(1, 9000, (min(10_000, n_rows - start), 17)).tolist(), start
            ):
                stack, image = divmod(row, each)
                names = (image + 1, stack, stack)
                ctf = (*v[:4], v[4] % 180, 0, 0, 1, v[5] / 1e3, v[6] / 1e4)
                pose = (1, stack + 1, 0, 0, v[7] % 360, v[8] / 1e3, v[9] / 1e3)
                file.write(
                    ROW % (*names, *ctf, *pose, v[10] / 1e4, v[11], v[12] / 9e3, row % 99, row % 2 + 1, 1)
                )
    return star


def table(n_rows: int) -> EstimateTable:
    """Estimates of any value."""
    rng = np.random.default_rng(1)
    z, z_std, origin = rng.standard_normal((3, n_rows, 2))
    psi, psi_std, origin_std, merit, bound, second = rng.uniform(-180, 180, (6, n_rows))
    usable = np.ones(n_rows, dtype=bool)
    return EstimateTable(z, z_std, psi, psi_std, origin, origin_std, merit, bound, second, usable)


def fifty_classes(n_rows: int) -> Classes:
    """Classes in turn, of any probability."""
    probability = np.random.default_rng(2).uniform(0.02, 1.0, n_rows)
    return Classes(np.zeros((50, 2)), np.arange(n_rows) % 50 + 1, probability, np.full(50, n_rows // 50))


def ours(star: Path, out: Path) -> Iterator[str]:
    """The steps of a job."""
    particles = read_particles(star)
    yield "read and checked"
    estimates, classes = table(len(particles)), fifty_classes(len(particles))
    yield "(made-up estimates)"
    write_particles(out, particles, estimates, classes, overwrite_pose=False)
    yield "extended and written"


def theirs(star: Path, out: Path) -> Iterator[str]:
    """The same by starfile."""
    import starfile

    blocks = starfile.read(star, always_dict=True)
    yield "read"
    particles = blocks["particles"]
    estimates = table(len(particles))
    yield "(made-up estimates)"
    particles["rlnAnglePsi"] = estimates.psi_deg
    particles["rlnOriginXAngst"], particles["rlnOriginYAngst"] = estimates.origin_angst.T
    particles["rlnClassNumber"] = np.arange(len(particles)) % 50 + 1
    particles["rlnParticleFigureOfMerit"] = estimates.figure_of_merit
    for k in range(Z_DIM):
        particles[f"svaeZ{k + 1}"], particles[f"svaeZ{k + 1}Std"] = estimates.z[:, k], estimates.z_std[:, k]
    particles["svaePsiStd"], particles["svaeOriginStdAngst"] = (
        estimates.psi_std_deg,
        estimates.origin_std_angst,
    )
    particles["svaeLogLikelihood"] = estimates.log_likelihood
    starfile.write(blocks, out)
    yield "extended and written"


def relion(star: Path, out: Path) -> Iterator[str]:
    """RELION reads and writes."""
    subprocess.run(
        ["relion_star_handler", "--i", str(star), "--o", str(out)], check=True, stdout=subprocess.DEVNULL
    )
    yield "read and written"


PROGRAMS = {"cryo_svae": ours, "starfile": theirs, "relion_star_handler": relion}


def measure(program: str, star: Path, out: Path) -> None:
    """Prints the seconds of each step of one program."""
    began = time.monotonic()
    for step in PROGRAMS[program](star, out):
        print(f"{program:20s} {step:22s} {time.monotonic() - began:6.1f} s", flush=True)
        began = time.monotonic()


def differing(star: Path, out: Path) -> int:
    """Rows of which a cell that is not ours differs, read as plain text."""
    replaced = {LABELS.index(label) for label in ("rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst")}
    kept = [k for k in range(len(LABELS)) if k not in replaced]

    def rows(path: Path) -> Iterator[list[str]]:
        with path.open() as file:
            words = (line.split() for line in file)
            yield from ([row[k] for k in kept] for row in words if len(row) >= len(LABELS))

    return sum(before != after for before, after in zip(rows(star), rows(out), strict=True))


def benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write; kept for another run")
    parser.add_argument("--program", choices=PROGRAMS, help="this one alone, in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if options.folder is None else options.folder
        star = folder / "particles.star"
        if options.program:
            measure(options.program, star, folder / f"{options.program}.star")
            return
        if not star.exists():
            make(folder, options.rows)
        print(f"{options.rows} rows of {len(LABELS)} columns, {star.stat().st_size / 1e6:.0f} MB")
        for program in PROGRAMS:
            if program == "relion_star_handler" and shutil.which(program) is None:
                continue
            command = [sys.executable, "-m", "benchmarks.star_scale", "--folder", str(folder)]
            began = time.monotonic()
            process = subprocess.Popen([*command, "--program", program])
            _, _, usage = os.wait4(process.pid, 0)
            process.returncode = 0
            seconds, gigabytes = time.monotonic() - began, usage.ru_maxrss / 1e6
            print(f"{program:20s} {'in all':22s} {seconds:6.1f} s, {gigabytes:.2f} GB at most", flush=True)
        print(f"{differing(star, folder / 'cryo_svae.star')} rows with a cell that cryo_svae changed")


if __name__ == "__main__":
    benchmark()
