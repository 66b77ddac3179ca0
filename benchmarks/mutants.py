"""Does a test fail where the program is made wrong? Mutants, each with the tests that ought to see it.

    python -m benchmarks.mutants [NAME ...] [--timeout 600]

Each mutant is a copy of the checkout in a temporary folder with one text replaced; the tests named are
run there until the first fails. The table says which test killed each, or that the mutant lived.
A text that is no longer found exactly once ends the run: the mutant then says nothing, and is to be
written anew. The tests must pass as they are; the first run, without any change, sees to that.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import trials

REPOSITORY = Path(__file__).resolve().parents[1]
COPIED = ("cryo_svae", "tests", "benchmarks", "pipelines", "example_data", "pyproject.toml", "README.md")
EVIDENCE, CALIBRATION = "tests/models/test_evidence.py", "tests/models/test_calibration.py"
OF_STEERABLE = "tests/models/test_steerable.py::"
BOUND = OF_STEERABLE + "test_the_bound_is_below_the_exact_evidence_and_infer_close_to_it"
BOTH_ENDS = EVIDENCE + "::test_the_steerable_engine_s_evidence_is_the_integral_over_z_psi_and_origins"


@dataclass(frozen=True)
class Mutant:
    """One wrong line: a file of the package, its text, what it becomes, and the tests that judge."""

    name: str
    file: str
    text: str
    becomes: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "rotation turned the other way",
        "imaging/geometry.py",
        "torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)",
        "torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)",
        ("tests/imaging/test_geometry.py",),
    ),
    Mutant(
        "sign of psi, in the table",
        "learning/estimation.py",
        '"psi_deg": geometry.degrees(posterior.psi_rad)',
        '"psi_deg": -geometry.degrees(posterior.psi_rad)',
        ("tests/learning/test_estimation.py",),
    ),
    Mutant(
        "sign of psi, on the steerable engine's grid",
        "models/pose_posterior.py",
        "return torch.cat([torch.cos(angle), torch.sin(angle)], 1)",
        "return torch.cat([torch.cos(angle), -torch.sin(angle)], 1)",
        ("tests/models/test_content_space.py", CALIBRATION),
    ),
    Mutant(
        "rotation before shift",
        "imaging/geometry.py",
        "return (points_px + origin_px[..., None, :]) @ rotation_matrix(psi_rad).mT",
        "return points_px @ rotation_matrix(psi_rad).mT + origin_px[..., None, :]",
        ("tests/imaging/test_geometry.py",),
    ),
    Mutant(
        "sign of the origin, in the polar frame",
        "imaging/polar.py",
        "torch.mul(here, cos, out=first).addcmul_(opposite, sin, value=-1.0)",
        "torch.mul(here, cos, out=first).addcmul_(opposite, sin)",
        ("tests/imaging/test_polar.py",),
    ),
    Mutant(
        "centre at (N-1)/2",
        "imaging/geometry.py",
        "axis = torch.arange(box_px, dtype=torch.float32, device=device) - box_px // 2",
        "axis = torch.arange(box_px, dtype=torch.float32, device=device) - (box_px - 1) / 2",
        ("tests/imaging/test_geometry.py",),
    ),
    Mutant(
        "optics joined by place and not by number",
        "particles/particle_set.py",
        "        rows = order[place]\n",
        "        rows = place\n",
        ("tests/particles/test_particle_set.py",),
    ),
    Mutant(
        "sign of the CTF",
        "imaging/ctf.py",
        "    ctf = torch.sin(phase)\n",
        "    ctf = -torch.sin(phase)\n",
        ("tests/imaging/test_ctf.py",),
    ),
    Mutant(
        "sign of the spherical aberration",
        "imaging/ctf.py",
        "        - 0.5 * math.pi * column(table.cs_mm)",
        "        + 0.5 * math.pi * column(table.cs_mm)",
        ("tests/imaging/test_ctf.py",),
    ),
    Mutant(
        "sign of the KL of theta",
        "models/coordinate.py",
        "pose = psi + origin.sum(-1)",
        "pose = origin.sum(-1) - psi",
        ("tests/models/test_coordinate.py",),
    ),
    Mutant(
        "KL of theta left out of the bound",
        "models/coordinate.py",
        "pose = psi + origin.sum(-1)",
        "pose = 0.0 * psi + origin.sum(-1)",
        (EVIDENCE,),
    ),
    Mutant(
        "KL of z without its mean, coordinate engine",
        "models/divergences.py",
        "0.5 * (variance_ratio + (mean / mean_std) ** 2 - 1.0)",
        "0.5 * (variance_ratio - 1.0)",
        ("tests/models/test_coordinate.py",),
    ),
    Mutant(
        "slope of tanh in the kernels for a GPU",
        "models/coordinate_kernels.py",
        "else 1.0 - y * y",
        "else 1.0 - y",
        ("tests/models/test_coordinate_gpu.py",),
    ),
    Mutant(
        "kernels for a GPU go past their part of an image",
        "models/coordinate_kernels.py",
        "(pixel < n_pixels) & (pixel < (program % parts + 1) * N_ROWS)",
        "pixel < n_pixels",
        ("tests/models/test_coordinate_gpu.py",),
    ),
    Mutant(
        "kernels for a GPU forget the bias of a hidden layer",
        "models/coordinate_kernels.py",
        "(tl.load(place, here, 0.0).to(tl.float32) + added, RELU)",
        "(tl.load(place, here, 0.0).to(tl.float32), RELU)",
        ("tests/models/test_coordinate_gpu.py",),
    ),
    Mutant(
        "sign of the KL of z, steerable engine",
        "models/steerable.py",
        "kl_z = 0.5 * (mean.square() + torch.exp(2.0 * log_std) - 1.0 - 2.0 * log_std).sum(-1)",
        "kl_z = -0.5 * (mean.square() + torch.exp(2.0 * log_std) - 1.0 - 2.0 * log_std).sum(-1)",
        (OF_STEERABLE + "test_divergences_are_not_negative", BOUND),
    ),
    Mutant(
        "KL of z halved, steerable engine",
        "models/steerable.py",
        "kl_z = 0.5 * (mean.square()",
        "kl_z = 0.25 * (mean.square()",
        (BOUND,),
    ),
    Mutant(
        "no prior of z in the importance weights",
        "models/posterior_search.py",
        "log_weight = -0.5 * at.square().sum(2) - log_proposal",
        "log_weight = 0.0 * at.square().sum(2) - log_proposal",
        (CALIBRATION, BOTH_ENDS),
    ),
    Mutant(
        "no prior of the origin",
        "models/steerable.py",
        "density = -0.5 * origins.square().sum(-1) / self.shift_variance",
        "density = -0.0 * origins.square().sum(-1) / self.shift_variance",
        (CALIBRATION, BOTH_ENDS),
    ),
    Mutant(
        "quadrature of rings without their radius",
        "imaging/polar.py",
        "return 2.0 * math.pi * radius",
        "return 2.0 * math.pi * torch.ones_like(radius)",
        ("tests/imaging/test_polar.py",),
    ),
    Mutant(
        "sign of the figure of merit",
        "models/posterior_search.py",
        "figure_of_merit=2.0\n",
        "figure_of_merit=-2.0\n",
        (OF_STEERABLE + "test_short_training_recovers_the_truth",),
    ),
    Mutant(
        "standard deviation of psi too large by the root of 2",
        "models/refinement.py",
        "    std = torch.where(narrow, step * bend.rsqrt(), variance.sqrt())",
        "    std = torch.where(narrow, step * bend.rsqrt(), (2.0 * variance).sqrt())",
        (CALIBRATION,),
    ),
    Mutant(
        "variance of the origin of both components together",
        "models/pose_posterior.py",
        "square().sum(-1)).sum(1) / 2.0",
        "square().sum(-1)).sum(1)",
        (CALIBRATION,),
    ),
    Mutant(
        "standard deviation of z by the variance",
        "models/posterior_search.py",
        "z_std=z_variance.sqrt(),",
        "z_std=z_variance,",
        (CALIBRATION,),
    ),
    Mutant(
        "pixels for Å in the table",
        "learning/estimation.py",
        '"origin_angst": posterior.origin_px * pixel_size_angst',
        '"origin_angst": posterior.origin_px',
        ("tests/learning/test_estimation.py",),
    ),
    Mutant(
        "Å for pixels in the averages",
        "results/class_averages.py",
        "table.origin_angst / preparation.pixel_size_angst",
        "table.origin_angst",
        ("tests/results/test_class_averages.py",),
    ),
    Mutant(
        "classes numbered from 0",
        "results/latent_classes.py",
        "class_number=rank[number] + 1",
        "class_number=rank[number]",
        ("tests/results/test_latent_classes.py",),
    ),
    Mutant(
        "classes: what is seen of z with its prior",
        "results/class_probability.py",
        "unexplained = 1.0 - std**2",
        "unexplained = 1.0 + 0.0 * std",
        ("tests/results/test_class_probability.py",),
    ),
    Mutant(
        "classes: the uncertainty of z left out",
        "results/class_probability.py",
        "width = mixture.spread[:, axis] + variance[:, axis, None]",
        "width = mixture.spread[:, axis] + 0.0 * variance[:, axis, None]",
        ("tests/results/test_class_probability.py",),
    ),
    Mutant(
        "classes: sizes left out",
        "results/class_probability.py",
        "np.tile(np.log(mixture.share), (len(z), 1))",
        "np.zeros((len(z), len(mixture.share)))",
        ("tests/results/test_class_probability.py",),
    ),
    Mutant(
        "picks: pixels for Å",
        "particles/close_picks.py",
        "place *= (particles.pixel_size_angst if size_angst is None else size_angst)[:, None]",
        "place *= 1.0",
        ("tests/particles/test_close_picks.py",),
    ),
    Mutant(
        "picks: every micrograph laid on the others",
        "particles/close_picks.py",
        "2.0 * distance * micrograph",
        "0.0 * micrograph",
        ("tests/particles/test_close_picks.py",),
    ),
    Mutant(
        "proposal: the blurred kept, the sharp left out",
        "results/auto_selection.py",
        "angst > RESOLUTION_FACTOR * median",
        "angst < median / RESOLUTION_FACTOR",
        ("tests/results/test_auto_selection.py",),
    ),
    Mutant(
        "templates: moved away from the middle",
        "results/picking_templates.py",
        "return moved(-middle)",
        "return moved(middle)",
        ("tests/results/test_picking_templates.py",),
    ),
    Mutant(
        "templates: dark protein",
        "results/picking_templates.py",
        "levelled: Tensor = (plain - level[:, None, None]) * circle",
        "levelled: Tensor = (level[:, None, None] - plain) * circle",
        ("tests/results/test_picking_templates.py",),
    ),
    Mutant(
        "bounds: rings beyond them seen",
        "models/steerable.py",
        "return self.full.forward(images) * self.compared[self.full.ring]",
        "return self.full.forward(images)",
        ("tests/models/test_band.py",),
    ),
    Mutant(
        "bounds: rings beyond them taken in",
        "models/steerable.py",
        "wanted = min(last + 1 + MARGIN, self.most_rings)",
        "wanted = min(last + 1 + MARGIN, self.full.n_rings)",
        ("tests/models/test_band.py",),
    ),
    Mutant(
        "bounds: every pixel counts",
        "models/coordinate.py",
        "return self.share * self.pixels.log_prob(",
        "return self.pixels.log_prob(",
        ("tests/models/test_band.py",),
    ),
    Mutant(
        "Wiener's filter without the CTF's sign",
        "results/class_averages.py",
        "(self.signal, spectrum * transfer)",
        "(self.signal, spectrum * transfer.abs())",
        ("tests/results/test_class_averages.py",),
    ),
    Mutant(
        "Wiener's constant subtracted",
        "results/class_averages.py",
        "wiener = power.sum(1) + ring_power.sum(1) * inverse_ssnr",
        "wiener = power.sum(1) - ring_power.sum(1) * inverse_ssnr",
        ("tests/results/test_class_averages.py",),
    ),
    Mutant(
        "astigmatism turned the wrong way",
        "particles/known_poses.py",
        "ctf.defocus_angle_rad + psi_rad",
        "ctf.defocus_angle_rad - psi_rad",
        ("tests/results/test_class_averages.py",),
    ),
    Mutant(
        "anisomag without the identity",
        "particles/star_and_cs.py",
        'one = float(label in ("rlnMagMat00", "rlnMagMat11"))',
        "one = 0.0",
        ("tests/test_cryosparc.py",),
    ),
    Mutant(
        "anisomag transposed",
        "particles/star_and_cs.py",
        "zip(MAG_MATRIX, anisomag.T, strict=True)",
        "zip(MAG_MATRIX, anisomag[:, [0, 2, 1, 3]].T, strict=True)",
        ("tests/test_cryosparc.py",),
    ),
    Mutant(
        "onto: boxes moved the other way",
        "results/onto.py",
        "origin = _origins_angst(block)[mine] + moved",
        "origin = _origins_angst(block)[mine] - moved",
        ("tests/results/test_onto.py",),
    ),
    Mutant(
        "onto: re-centred the other way",
        "results/onto.py",
        "mine - _origins_angst(ours.block)[rows]",
        "mine + _origins_angst(ours.block)[rows]",
        ("tests/results/test_onto.py",),
    ),
    Mutant(
        "known poses: origins turned the other way",
        "imaging/geometry.py",
        "(then_origin_px[:, None] @ rotation_matrix(psi_rad))[:, 0]",
        "(then_origin_px[:, None] @ rotation_matrix(-psi_rad))[:, 0]",
        ("tests/imaging/test_geometry.py",),
    ),
    Mutant(
        "known poses: quarter turns the other way",
        "imaging/geometry.py",
        "turned[quarters.long() % 4,",
        "turned[-quarters.long() % 4,",
        ("tests/imaging/test_geometry.py",),
    ),
    Mutant(
        "known poses: no prior of psi where z is refined",
        "models/content_space.py",
        "log_prior if isinstance(log_prior := look.log_prior_psi, float) else log_prior[angle]",
        "-math.log(look.n_psi)",
        ("tests/models/test_content_space.py",),
    ),
    Mutant(
        "known poses: the coarse search turns all the way",
        "models/pose_posterior.py",
        "content.turns[: content.reach + 1]",
        "content.turns[: len(content.turns) // 2 + 1]",
        ("tests/models/test_content_space.py",),
    ),
    Mutant(
        "both halves the same",
        "results/class_averages.py",
        "    half[order] = np.arange(len(order)) % 2\n",
        "    half[order] = 0\n",
        ("tests/results/test_class_averages.py",),
    ),
    Mutant(
        "halves split without regard to classes",
        "results/class_averages.py",
        "order = np.lexsort((drawn, class_number, ~usable))",
        "order = np.argsort(drawn)",
        ("tests/results/test_class_averages.py",),
    ),
    Mutant(
        "halves of the file taken as they are numbered",
        "results/class_averages.py",
        "return subset.astype(np.intp) - 1",
        "return 2 - subset.astype(np.intp)",
        ("tests/results/test_class_averages.py",),
    ),
    Mutant(
        "images divided by their variance",
        "particles/preprocessing.py",
        "torch.where(usable, sign / std, 0.0)",
        "torch.where(usable, sign / std**2, 0.0)",
        ("tests/particles/test_preprocessing.py",),
    ),
    Mutant(
        "inversion left out",
        "particles/preprocessing.py",
        "sign = -1.0 if preparation.invert else 1.0",
        "sign = 1.0",
        ("tests/particles/test_preprocessing.py",),
    ),
]


def mutated(mutant: Mutant | None, folder: Path) -> None:
    """A copy of the checkout in ``folder`` with the mutant's line; ends the program if it is not there."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    shared = REPOSITORY.parent / "shared"
    if shared.is_dir():
        (folder.parent / "shared").symlink_to(shared, target_is_directory=True)
    if mutant is not None:
        path = folder / "cryo_svae" / mutant.file
        path.write_text(path.read_text().replace(mutant.text, mutant.becomes))


def check(mutants: list[Mutant]) -> None:
    """Ends the program where a mutant's text is not in its file, or not once."""
    for mutant in mutants:
        found = (REPOSITORY / "cryo_svae" / mutant.file).read_text().count(mutant.text)
        if found != 1:
            sys.exit(
                f"{mutant.name}: cryo_svae/{mutant.file} holds its text {found} times, not once.\n"
                f"    {mutant.text.strip()}\n  To mend: write the mutant anew for the present code."
            )


def run_tests(mutant: Mutant | None, tests: tuple[str, ...], timeout_s: float) -> str | None:
    """The first test that fails on a mutated copy, None where all pass."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkout"
        folder.mkdir()
        mutated(mutant, folder)
        command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-rfE", "--tb=no", *tests]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no end within {timeout_s:.0f} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        sys.exit(f"pytest came to no verdict:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1]


def main() -> None:
    """Prints a row a mutant as it is judged; exits 1 if one lives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of mutants; all by default")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run of pytest")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if not arguments.names or any(n in m.name for n in arguments.names)]
    check(chosen)
    sound = run_tests(None, tuple(dict.fromkeys(t for m in chosen for t in m.tests)), 3 * arguments.timeout)
    if sound is not None:
        sys.exit(f"{sound} fails without any mutant")
    lines, n_alive = [], 0
    for mutant in chosen:
        began = time.monotonic()
        killer = run_tests(mutant, mutant.tests, arguments.timeout)
        n_alive += killer is None
        seconds = time.monotonic() - began
        lines.append(f"{mutant.name:56s} {seconds:4.0f} s  {'LIVES' if killer is None else killer}")
        print(lines[-1], flush=True)
    trials.report("mutants", [*lines, f"{len(chosen) - n_alive} of {len(chosen)} mutants are killed"])
    sys.exit(1 if n_alive else 0)


if __name__ == "__main__":
    main()
