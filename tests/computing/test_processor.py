"""Threads are as many as a job may have, and sleep where they wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from cryo_svae.cli import main
from cryo_svae.computing import processor
from tests.test_cli import QUICK


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_a_control_groups_quota_is_read(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processor._quota(tmp_path) == cores


def test_no_more_threads_than_any_limit_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert processor.allowed() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert processor.allowed() == 6
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert processor.allowed() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert processor.allowed() == 1


def test_a_job_uses_the_threads_asked_for_and_says_so(make_dataset, tmp_path, capsys):
    job = tmp_path / "job"
    assert main(["train", str(make_dataset(12)), "--out", str(job), *QUICK, "--threads", "1"]) == 0
    assert torch.get_num_threads() == 1
    assert json.loads((job / "run.json").read_text())["threads"] == 1
    assert "threads             1" in (job / "run.log").read_text()
    assert main(["train", str(make_dataset(12)), "--out", str(job), *QUICK, "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err


def test_a_job_may_go_on_with_other_threads(make_dataset, tmp_path):
    star, job = str(make_dataset(12)), str(tmp_path / "job")
    assert main(["train", star, "--out", job, *QUICK, "--threads", "2"]) == 0
    assert main(["train", star, "--out", job, *QUICK, "--threads", "1", "--resume"]) == 0


@pytest.mark.parametrize("module", ["cryo_svae.cli", "cryo_svae.relion_job"])
def test_openmp_is_told_before_it_is_loaded(module):
    """Its library reads the environment once, when torch brings it."""
    code = (
        f"import os, sys, {module} as program\n"
        "assert 'torch' not in sys.modules\n"
        "program.main = lambda: (print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules), 0)[1]\n"
        "program.entry_point()\n"
    )
    without = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for given, spins in (
        ({}, processor.SPINS),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], env=without | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [spins, "False"]
