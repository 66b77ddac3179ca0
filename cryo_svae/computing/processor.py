"""Threads of the processor: how many a job may have, and that those that wait soon give their core away."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
SPINS = "1000"  # of a waiting thread; benchmarks.threads


def let_waiting_threads_sleep() -> None:
    """Has OpenMP's threads sleep soon where they wait for one another; call it before torch is imported.

    By default they spin for a millisecond or so, on cores that other programs could use. Where such a
    program holds the core of one of them, the others spin for it at every barrier, and the job takes four
    times as long or more. Asleep at once (OMP_WAIT_POLICY=PASSIVE) they would lose half their speed on an
    idle machine. This is GNU's OpenMP, which torch brings on Linux; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def use(n_threads: int | None) -> int:
    """Has torch use so many threads, or as many as this process may; returns how many."""
    import torch

    if n_threads is None:
        n_threads = min(torch.get_num_threads(), allowed())  # torch's own heeds OMP_NUM_THREADS
    torch.set_num_threads(n_threads)
    return n_threads


def allowed() -> int:
    """Cores that this process may use: by its affinity, its control group's quota, and Slurm."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    limits = [float(len(affinity(0)) if affinity else os.cpu_count() or 1)]
    limits += [limit for limit in (_quota(CGROUP), _of_slurm()) if limit is not None]
    return max(1, math.ceil(min(limits)))


def _of_slurm() -> float | None:
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return float(asked) if asked.isdigit() and int(asked) > 0 else None


def _quota(folder: Path) -> float | None:
    """Cores' worth of time that a control group grants (version 2, then 1); None where it sets no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / "cpu" / name).read_text().strip() for name in names)
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdigit() and int(quota) > 0 else None
