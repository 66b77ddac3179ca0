"""Report data with planted content."""

from __future__ import annotations

import numpy as np
import pytest

from cryo_svae.report.data import (
    ClassAverages,
    Examples,
    LearningCurve,
    Manifold,
    ReportData,
    Traversal,
)

BOX = 24


def blobs(k: int, box: int = BOX) -> np.ndarray:
    """k images of a blob that moves to the right from one to the next."""
    y, x = np.mgrid[:box, :box] - box // 2
    return np.stack([np.exp(-((x - step) ** 2 + (y + 2.0) ** 2) / 9.0) for step in np.linspace(-5, 5, k)])


@pytest.fixture
def make_report():
    """Two clumps, at z1 = -2 (class 1) and +2 (class 2), and a healthy job otherwise."""

    def make(n: int = 600, d: int = 2, k: int = 2, box: int = BOX, **changes: object) -> ReportData:
        rng = np.random.default_rng(3)
        z = rng.normal(0, 0.3, (n, d))
        number = rng.integers(1, k + 1, n)
        z[:, 0] += np.where(number == 1, -2.0, 2.0)
        frequency = np.linspace(0, 0.2, box // 2 + 1)
        fields: dict[str, object] = {
            "title": "job042",
            "particles_file": "particles.star",
            "job": "job042",
            "program": "cryo_svae",
            "engine": "steerable",
            "box_px": box,
            "pixel_size_angst": 2.5,
            "z": z.astype(np.float32),
            "z_std": np.full((n, d), 0.3, np.float32),
            "psi_deg": rng.uniform(-180, 180, n),
            "origin_angst": rng.normal(0, 4.0, (n, 2)),
            "figure_of_merit": rng.normal(0.6, 0.1, n),
            "class_number": number,
            "usable": np.ones(n, dtype=bool),
            "defocus_angst": rng.uniform(8e3, 25e3, n),
            "micrograph_number": np.arange(n) % 5,
            "micrograph_names": tuple(f"micrographs/m{i}.mrc" for i in range(5)),
            "decoded": blobs(k, box),
            "averages": ClassAverages(
                image=blobs(k, box) + rng.normal(0, 0.1, (k, box, box)),
                frequency_per_angst=frequency,
                frc=np.tile(np.exp(-((frequency / 0.1) ** 2)), (k, 1)),
                resolution_angst=np.full(k, 7.0),
                resolution_05_angst=np.full(k, 12.0),
            ),
            "traversals": tuple(
                Traversal(label=f"z{a + 1}", values=np.linspace(-2, 2, 11), image=blobs(11, box))
                for a in range(d)
            ),
            "manifold": Manifold(
                image=np.stack([blobs(7, box) * row for row in (1, 2, 3)]),
                across=np.linspace(-2, 2, 7),
                up=np.array([-1.0, 0.0, 1.0]),
                names=("z1", "z2"),
            ),
            "examples": Examples(
                number=np.array([1, n]), image=rng.normal(size=(2, box, box)), reconstruction=blobs(2, box)
            ),
            "learning": LearningCurve(
                epoch=np.arange(1.0, 6.0),
                elbo=np.linspace(-900, -880, 5),
                held_out_elbo=np.linspace(-901, -885, 5),
                kl_z=np.linspace(0, 2, 5),
                kl_pose=np.linspace(3, 5, 5),
            ),
            "contrast_score": 12.0,
            "ctf_used": True,
            "shift_prior_angst": 4.0,
            "max_shift_angst": 20.0,
            "files": ("particles.star", "Class2D", "traversal_z1.mrcs"),
        }
        return ReportData(**{**fields, **changes})  # type: ignore[arg-type]

    return make
