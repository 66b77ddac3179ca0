"""Fixtures: shape checks switched on, the shared real data, RELION, and small data sets with truth."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

REPOSITORY = Path(__file__).resolve().parents[1]
# Kernels are in Triton's own language, which the checks would break.
MODELS = [path.stem for path in (REPOSITORY / "cryo_svae" / "models").glob("*.py")]
SHAPED = (
    "imaging",
    *(f"models.{name}" for name in MODELS if name not in ("__init__", "coordinate_kernels")),
    "learning.training",
    "learning.training_store",
    "particles.preprocessing",
    "results.class_averages",
    "results.latent_classes",
    "results.montage",
    "results.picking_templates",
)
install_import_hook([f"cryo_svae.{name}" for name in SHAPED], "beartype.beartype")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for a GPU run on numpy; read when Triton is imported

from cryo_svae.formats.mrc import write_stack  # noqa: E402
from cryo_svae.formats.star import write_tables  # noqa: E402
from cryo_svae.results.latent_classes import Classes  # noqa: E402

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data is not beside the repository (../shared/data)")
    return folder


class Relion:
    """RELION's programs; they exit 0 on failure, so callers look at what they wrote."""

    def __call__(self, program: str, *arguments: object, cwd: Path) -> str:
        done = subprocess.run(
            [program, *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def relion() -> Relion:
    if shutil.which("relion_refine") is None:
        pytest.skip("RELION is not installed (apt-get install relion)")
    return Relion()


def optics_columns(n_groups: int = 1, **changes: list[str]) -> dict[str, list[str]]:
    """The eight usual optics columns, with unequal values."""
    numbers = range(1, n_groups + 1)
    columns = {
        "rlnOpticsGroupName": [f"optics{k}" for k in numbers],
        "rlnOpticsGroup": [str(k) for k in numbers],
        "rlnImagePixelSize": ["2.5"] * n_groups,
        "rlnImageSize": ["16"] * n_groups,
        "rlnImageDimensionality": ["2"] * n_groups,
        "rlnVoltage": ["300.0"] * n_groups,
        "rlnSphericalAberration": ["2.7"] * n_groups,
        "rlnAmplitudeContrast": ["0.07"] * n_groups,
    }
    return {**columns, **changes}


def classes_of(number: np.ndarray) -> Classes:
    """Classes of z at 0, 1, … whose members are sure of theirs; ``number`` is 1-based."""
    counts = np.bincount(number)[1:]
    return Classes(np.arange(float(len(counts)))[:, None], number, np.ones(len(number)), counts)


def image_names(n: int, stack: str = "stack.mrcs") -> list[str]:
    return [f"{k + 1:06d}@{stack}" for k in range(n)]


@pytest.fixture
def make_dataset(tmp_path: Path):
    """Writes particles.star and stack.mrcs of n noisy blobs; cells and columns can be changed."""

    def make(
        n: int = 5,
        box: int = 16,
        *,
        optics: dict[str, list[str]] | None = None,
        particles: dict[str, list[str]] | None = None,
        images: np.ndarray | None = None,
        folder: Path | None = None,
    ) -> Path:
        folder = tmp_path if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        if images is None:
            rng = np.random.default_rng(7)
            y, x = np.mgrid[:box, :box] - box // 2
            blob = np.exp(-((x - 1.0) ** 2 + (y + 2.0) ** 2) / 8.0)
            images = (2 * blob + rng.standard_normal((n, box, box))).astype(np.float32)
        write_stack(folder / "stack.mrcs", images, pixel_size_angst=2.5)
        columns = {"rlnImageName": image_names(n), "rlnOpticsGroup": ["1"] * n}
        tables = {"optics": optics_columns() if optics is None else optics}
        tables["particles"] = {**columns, **(particles or {})}
        write_tables(folder / "particles.star", tables)
        return folder / "particles.star"

    return make


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(2)
    torch.manual_seed(0)
