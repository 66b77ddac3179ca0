"""CryoSPARC files made by numpy alone, as CryoSPARC lays them out, for tests of our reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def save_cs(path: Path, fields: dict[str, np.ndarray]) -> Path:
    """A .cs file: a structured array in numpy's format, texts as bytes."""
    fields = {k: np.char.encode(v, "utf-8") if v.dtype.kind == "U" else v for k, v in fields.items()}
    n = len(fields["uid"])
    rows = np.zeros(n, dtype=[(name, v.dtype, v.shape[1:]) for name, v in fields.items()])
    for name, values in fields.items():
        rows[name] = values
    with path.open("wb") as file:
        np.save(file, rows)
    return path


def particle_fields(
    n: int = 5, box: int = 16, stack: str = "stack.mrcs", seed: int = 3
) -> dict[str, np.ndarray]:
    """Unequal values for every field of imported particles, in the types of real files."""
    rng = np.random.default_rng(seed)

    def reals(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape)).astype("<f4")

    return {
        "uid": rng.integers(2**60, 2**63, n).astype("<u8"),
        "blob/path": np.array([f">{stack}"] * n),
        "blob/idx": np.arange(n, dtype="<u4")[::-1].copy(),
        "blob/shape": np.full((n, 2), box, dtype="<u4"),
        "blob/psize_A": np.full(n, 2.5, dtype="<f4"),
        "blob/sign": np.full(n, -1, dtype="<f4"),
        "blob/import_sig": rng.integers(0, 2**63, n).astype("<u8"),
        "ctf/type": np.array(["imported"] * n),
        "ctf/exp_group_id": np.arange(n, dtype="<u4") % 2 + 7,
        "ctf/accel_kv": np.full(n, 300, dtype="<f4"),
        "ctf/cs_mm": np.full(n, 2.7, dtype="<f4"),
        "ctf/amp_contrast": np.full(n, 0.07, dtype="<f4"),
        "ctf/df1_A": reals(15000, 25000),
        "ctf/df2_A": reals(10000, 15000),
        "ctf/df_angle_rad": reals(-3, 3),
        "ctf/phase_shift_rad": reals(0, 1),
        "ctf/scale": reals(0.9, 1.1),
    }


def pose_2d(n: int = 5, seed: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "alignments2D/pose": rng.uniform(0, 2 * np.pi, n).astype("<f4"),
        "alignments2D/shift": rng.normal(0, 3, (n, 2)).astype("<f4"),
        "alignments2D/psize_A": np.full(n, 2.5, dtype="<f4"),
        "alignments2D/class": rng.integers(0, 9, n).astype("<u4"),
        "alignments2D/class_posterior": rng.uniform(0, 1, n).astype("<f4"),
    }


def pose_3d(n: int = 5, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "alignments3D/pose": rng.normal(0, 1, (n, 3)).astype("<f4"),
        "alignments3D/shift": rng.normal(0, 3, (n, 2)).astype("<f4"),
        "alignments3D/psize_A": np.full(n, 1.25, dtype="<f4"),
        "alignments3D/split": rng.integers(0, 2, n).astype("<u4"),
        "alignments3D/class": np.zeros(n, dtype="<u4"),
    }


def locations(n: int = 5, seed: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "location/micrograph_path": np.array([f">mics/{k % 2}.mrc" for k in range(n)]),
        "location/exp_group_id": np.arange(n, dtype="<u4") % 2 + 7,
        "location/micrograph_shape": np.tile(np.array([40, 60], dtype="<u4"), (n, 1)),
        "location/center_x_frac": rng.uniform(0, 1, n).astype("<f4"),
        "location/center_y_frac": rng.uniform(0, 1, n).astype("<f4"),
    }
