"""A job's classes as RELION's 2-D classification writes them, for its class selection to read.

RELION 3.1's Select job takes ``run_it025_model.star``, 4's and 5's ``run_it025_optimiser.star``; both
find the particles in ``run_it025_data.star`` beside it. The folder must be called Class2D: Select
keeps the class averages only of paths that hold that name (RELION 3.1.3, pipeline_jobs.cpp). The
model is complete: ``relion_refine --continue`` of 3.1.3 reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae.formats.mrc import write_stack
from cryo_svae.formats.star import StarBlock, StarFile, write_star, write_tables
from cryo_svae.imaging import geometry
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.results.class_averages import ClassAverages
from cryo_svae.results.class_table import NO_RESOLUTION_ANGST

ROOT = "run_it025"
NOT_ESTIMATED = "999.000000"  # an accuracy, in RELION's words
GROUP_LABELS = ("rlnGroupName", "rlnMicrographName")  # RELION's noise groups, by the first there is
ONLY_GROUP = "all"


def project_path(path: Path) -> str:
    """A path as RELION wants it: relative to the current (project) folder if inside it, else absolute."""
    here = Path.cwd()
    for candidate in (path.absolute(), path.resolve()):
        if candidate.is_relative_to(here) and ".." not in candidate.parts:
            return str(candidate.relative_to(here))
    return str(path.resolve())


def classes_table(
    stack: Path,
    averages: ClassAverages,
    centre: NDArray[np.float64],
    montage_psi_rad: Float[Tensor, "k"],
    montage_origin_px: Float[Tensor, "k 2"],
) -> Mapping[str, list[str]]:
    """Columns of classes.star, label to cells: a row for each image of ``stack``, the averages' file.

    centre: (k, d) of the classes in z. Resolutions are 999 Å where there is none. The montage's psi and
    origin bring the images into one frame, applied to them as those of particles are.
    """
    n_classes = len(averages.n_particles)
    columns = {
        **_references(stack, averages),
        "rlnClassNumber": [str(number) for number in range(1, n_classes + 1)],
        "rlnEstimatedResolution": _cells(_resolution(averages.resolution_0143_angst)),
        "svaeResolution05Angst": _cells(_resolution(averages.resolution_05_angst)),
        "svaeNrParticles": [str(count) for count in averages.n_particles.tolist()],
        "svaeMeanFigureOfMerit": _cells(averages.mean_figure_of_merit),
    }
    columns["svaeMontageAnglePsi"] = _cells(geometry.degrees(montage_psi_rad.double()).numpy())
    origin_angst = montage_origin_px.double().numpy() * averages.pixel_size_angst
    columns["svaeMontageOriginXAngst"], columns["svaeMontageOriginYAngst"] = map(_cells, origin_angst.T)
    for axis in range(centre.shape[1]):
        columns[f"svaeZ{axis + 1}"] = [f"{value:.8g}" for value in centre[:, axis].tolist()]
    return columns


def write_class2d(
    folder: Path,
    star: StarFile,
    block: StarBlock,
    table: EstimateTable,
    averages: ClassAverages,
    *,
    particle_diameter_angst: float,
    use_ctf: bool,
) -> None:
    """Writes run_it025_{data,model,optimiser}.star and run_it025_classes.mrcs into JOB/Class2D.

    star, block: the job's particles.star and its particles, which have rlnClassNumber; every column
                 goes through to the letter.
    """
    folder.mkdir(exist_ok=True)
    group_label, group_number, group_names = noise_groups(block)
    columns = {"rlnGroupNumber": [str(number) for number in group_number.tolist()]}
    if group_label is None:
        columns[GROUP_LABELS[0]] = [ONLY_GROUP] * block.n_rows
    write_star(folder / f"{ROOT}_data.star", star, block=block.name, columns=columns)
    stack = folder / f"{ROOT}_classes.mrcs"
    write_stack(stack, averages.image, pixel_size_angst=averages.pixel_size_angst)
    sizes = np.bincount(group_number - 1, minlength=len(group_names))
    _write_model(folder / f"{ROOT}_model.star", stack, table, averages, group_names, sizes)
    _write_optimiser(folder, particle_diameter_angst, use_ctf)


def noise_groups(block: StarBlock) -> tuple[str | None, NDArray[np.intp], list[str]]:
    """RELION's noise groups: the column that names them, each particle's (n,) from 1, and their names.

    Without rlnGroupName they are the micrographs; without these, one (and no column).
    """
    for label in GROUP_LABELS:
        if block.has(label):
            order: dict[str, int] = {}
            number = [order.setdefault(name, len(order) + 1) for name in block.text(label)]
            return label, np.array(number, dtype=np.intp), list(order)
    return None, np.ones(block.n_rows, dtype=np.intp), [ONLY_GROUP]


def _write_model(
    path: Path,
    stack: Path,
    table: EstimateTable,
    averages: ClassAverages,
    group_names: list[str],
    group_sizes: NDArray[np.intp],
) -> None:
    n_classes, box_px = averages.image.shape[:2]
    resolution = _resolution(averages.resolution_0143_angst)
    origin = table.origin_angst[table.usable]
    shift = math.sqrt(float((origin**2).mean())) if len(origin) else 0.0
    general = {
        "rlnReferenceDimensionality": "2",
        "rlnDataDimensionality": "2",
        "rlnOriginalImageSize": str(box_px),
        "rlnCurrentResolution": f"{resolution.min():.6f}",
        "rlnCurrentImageSize": str(box_px),
        "rlnPaddingFactor": "2.000000",
        "rlnIsHelix": "0",
        "rlnFourierSpaceInterpolator": "1",
        "rlnMinRadiusNnInterpolation": "10",
        "rlnPixelSize": f"{averages.pixel_size_angst:.6f}",
        "rlnNrClasses": str(n_classes),
        "rlnNrBodies": "1",
        "rlnNrGroups": str(len(group_names)),
        "rlnTau2FudgeFactor": "1.000000",
        "rlnNormCorrectionAverage": "1.000000",
        "rlnSigmaOffsetsAngst": f"{max(shift, averages.pixel_size_angst):.6f}",  # RELION divides by it
        "rlnOrientationalPriorMode": "0",
        "rlnSigmaPriorRotAngle": "0.000000",
        "rlnSigmaPriorTiltAngle": "0.000000",
        "rlnSigmaPriorPsiAngle": "0.000000",
        "rlnLogLikelihood": f"{float(table.log_likelihood.sum()):.6e}",
        "rlnAveragePmax": "0.000000",  # RELION's own figure, which we do not have
    }
    zeros = ["0.000000"] * n_classes
    tables = {
        "model_classes": {
            **_references(stack, averages),
            "rlnAccuracyRotations": [NOT_ESTIMATED] * n_classes,
            "rlnAccuracyTranslationsAngst": [NOT_ESTIMATED] * n_classes,
            "rlnEstimatedResolution": _cells(resolution),
            "rlnOverallFourierCompleteness": ["1.000000"] * n_classes,
            "rlnClassPriorOffsetX": zeros,
            "rlnClassPriorOffsetY": zeros,
        }
    }
    rings = _ring_columns(box_px, averages.pixel_size_angst)
    for k in range(n_classes):
        tables[f"model_class_{k + 1}"] = {**rings, **_spectra(averages, k)}
    tables["model_groups"] = {
        "rlnGroupNumber": [str(number) for number in range(1, len(group_names) + 1)],
        "rlnGroupName": group_names,
        "rlnGroupNrParticles": [str(size) for size in group_sizes.tolist()],
        "rlnGroupScaleCorrection": ["1.000000"] * len(group_names),
    }
    # White noise of variance 1: RELION's transform is divided by N², and it counts one component.
    noise = [f"{0.5 / box_px**2:.6e}"] * (box_px // 2 + 1)
    plain = {label: rings[label] for label in ("rlnSpectralIndex", "rlnResolution")}
    for number in range(1, len(group_names) + 1):
        tables[f"model_group_{number}"] = {**plain, "rlnSigma2Noise": noise}
    write_tables(path, tables, lists={"model_general": general})


def _references(stack: Path, averages: ClassAverages) -> dict[str, list[str]]:
    """The images of the classes, and their shares of the particles."""
    name = project_path(stack)
    share = averages.n_particles / max(1, int(averages.n_particles.sum()))
    return {
        "rlnReferenceImage": [f"{number:06d}@{name}" for number in range(1, len(share) + 1)],
        "rlnClassDistribution": _cells(share),
    }


def _ring_columns(box_px: int, pixel_size_angst: float) -> dict[str, list[str]]:
    ring = np.arange(box_px // 2 + 1)
    frequency = ring / (box_px * pixel_size_angst)
    wavelength = np.concatenate([[NO_RESOLUTION_ANGST], 1.0 / frequency[1:]])
    return {
        "rlnSpectralIndex": [str(number) for number in ring.tolist()],
        "rlnResolution": _cells(frequency),
        "rlnAngstromResolution": _cells(wavelength),
    }


def _spectra(averages: ClassAverages, k: int) -> dict[str, list[str]]:
    """Of one class: power and noise of its average in RELION's units, and its half-set FRC."""
    image = averages.image[k].astype(np.float64)
    box_px = len(image)
    frc = np.append(averages.frc[k], 0.0)
    clipped = np.clip(frc, 0.0, 0.999)
    ssnr = 2.0 * clipped / (1.0 - clipped)  # of both halves together
    power = _ring_power(image)[: box_px // 2 + 1] / (2.0 * box_px**4)
    noise = np.divide(power, ssnr, out=np.zeros_like(power), where=ssnr > 0)
    return {
        "rlnSsnrMap": _cells(ssnr),
        "rlnGoldStandardFsc": _cells(frc),
        "rlnFourierCompleteness": ["1.000000"] * len(frc),
        "rlnReferenceSigma2": [f"{value:.6e}" for value in noise.tolist()],
        "rlnReferenceTau2": [f"{value:.6e}" for value in power.tolist()],
    }


def _ring_power(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean squared Fourier amplitude of each ring."""
    axis = np.fft.fftfreq(len(image)) * len(image)
    ring = np.rint(np.hypot(axis[:, None], axis)).astype(np.intp).ravel()
    power = np.bincount(ring, weights=np.abs(np.fft.fft2(image).ravel()) ** 2)
    return np.asarray(power / np.bincount(ring), dtype=np.float64)


def _write_optimiser(folder: Path, particle_diameter_angst: float, use_ctf: bool) -> None:
    name = project_path(folder / ROOT)
    general = {
        "rlnOutputRootName": project_path(folder / "run"),
        "rlnModelStarFile": f"{name}_model.star",
        "rlnExperimentalDataStarFile": f"{name}_data.star",
        "rlnCurrentIteration": "25",
        "rlnNumberOfIterations": "25",
        "rlnParticleDiameter": f"{particle_diameter_angst:.6f}",
        "rlnDoCorrectCtf": str(int(use_ctf)),
        "rlnDoIgnoreCtfUntilFirstPeak": "0",
        "rlnCtfDataArePhaseFlipped": "0",
        "rlnDoOnlyFlipCtfPhases": "0",
        "rlnRefsAreCtfCorrected": str(int(use_ctf)),
    }
    write_tables(folder / f"{ROOT}_optimiser.star", {}, lists={"optimiser_general": general})


def _resolution(angst: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isnan(angst), NO_RESOLUTION_ANGST, angst)


def _cells(values: NDArray[np.float64]) -> list[str]:
    return [f"{value:.6f}" for value in values.tolist()]
