"""The paper's experiments on digits and galaxies: their images, their measures, and a small run of each."""

from __future__ import annotations

import gzip
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import digits, paper_clusters, paper_digits, paper_galaxies
from cryo_svae.imaging import geometry


@pytest.fixture
def mnist(shared_data):
    folder = shared_data / "mnist"
    if not folder.is_dir():
        pytest.skip("MNIST is not beside the repository (../shared/data/mnist)")
    return folder


@pytest.fixture
def galaxies(shared_data):
    folder = shared_data / "galaxies"
    if not folder.is_dir():
        pytest.skip("the galaxies are not beside the repository (../shared/data/galaxies)")
    return folder


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Where an experiment writes in this test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def command(name, source, results, *options):
    """Runs an experiment as a user would, in a process of its own: checked shapes would take minutes."""
    root = str(Path(digits.__file__).parents[1])
    words = ["-m", f"benchmarks.{name}", "--source", str(source), "--quick", "--device", "cpu", *options]
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *words], cwd=results.parent, check=True, capture_output=True, env=environment
    )


def table(path, header):
    """The rows below the header line of a results file, the line of commit and processor left off."""
    lines = path.read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(header))
    return lines[start + 1 : -1]


def test_idx_files_are_read_in_their_shape(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 3, 4) + values.tobytes()))
    assert np.array_equal(digits.read_idx(path), values)


def test_missing_digits_end_the_command_with_where_to_find_them(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        paper_digits.main(["--source", str(tmp_path), "--quick"])
    assert stopped.value.code == 2
    assert "train-images-idx3-ubyte.gz" in (said := capsys.readouterr().err)
    assert "To mend: download https://" in said


def test_posed_digits_come_back_when_aligned_by_their_truth():
    axis = torch.arange(28.0) - 14
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    bar = torch.exp(-((x - 3) ** 2) / 20 - y**2 / 4).expand(20, -1, -1)
    psi = torch.linspace(-3, 3, 20)
    generator = torch.Generator().manual_seed(1)
    made = digits.posed(bar, np.zeros(20), psi, 14.0, canvas_px=84, generator=generator)
    assert made.images.shape == (20, 84, 84)
    assert made.origin_px.abs().max() <= 28
    assert made.origin_px.std() > 8
    back = geometry.align_images(made.images, psi, made.origin_px)[:, 28:56, 28:56]
    assert (back - bar).abs().max() < 0.05
    generator.manual_seed(1)
    binned = digits.posed(bar, np.zeros(20), psi, 14.0, canvas_px=84, binned=2, generator=generator)
    assert torch.allclose(binned.origin_px * 2, made.origin_px)
    assert torch.allclose(binned.images.sum((1, 2)) * 4, made.images.sum((1, 2)), rtol=1e-4)


def test_clusters_are_right_whatever_their_numbers():
    label = np.repeat(np.arange(10), 20)
    assert paper_clusters.accuracy((label + 3) % 10, label) == 1.0
    halved = np.where(np.arange(200) % 2 == 0, label, (label + 1) % 10)
    assert paper_clusters.accuracy(halved, label) == pytest.approx(0.5)
    assert paper_clusters.accuracy(np.zeros(200, dtype=int), label) == pytest.approx(0.1)


def test_separate_clouds_are_found():
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(10), 30)
    z = 20.0 * np.eye(10)[label] + rng.normal(size=(300, 10))
    assert paper_clusters.accuracy(paper_clusters.by_k_means(z, 0), label) == 1.0
    if paper_clusters.GaussianMixture is not None:
        assert paper_clusters.accuracy(paper_clusters.by_mixture(z, 0), label) > 0.95


def test_galaxies_in_one_frame_are_those_laid_along_one_axis():
    x, y = geometry.pixel_grid(33).unbind(-1)
    galaxy = torch.exp(-(x**2) / 50 - y**2 / 10).expand(64, -1, -1)
    psi = torch.arange(64) * (math.pi / 64)
    turned = geometry.pose_references(galaxy, psi, torch.zeros(64, 2))
    assert paper_galaxies.in_one_frame(turned, torch.zeros(64), torch.zeros(64, 2)) < 0.05
    assert paper_galaxies.in_one_frame(turned, psi, torch.zeros(64, 2)) > 0.95


def test_tiles_keep_the_order_of_rows():
    images = torch.arange(4.0)[:, None, None].expand(-1, 2, 2)
    assert digits.tiles(images, 2)[[1, 1, 5, 5], [1, 5, 1, 5]].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(("one_cycle", "last"), [(True, 0.0), (False, 1e-3), (None, 1e-3)])
def test_the_learning_rate_falls_to_nothing_where_asked(one_cycle, last):
    images = torch.rand(400, 8, 8, generator=torch.Generator().manual_seed(0))
    trained = digits.train(
        "vanilla", images, 2, epochs=5, batch_size=20, learning_rate=1e-3, one_cycle=one_cycle, seed=0,
        device="cpu", pixels="bernoulli", hidden=8, encoder_hidden=8,
    )  # fmt: skip
    assert trained.checkpoint.optimizer["param_groups"][0]["lr"] == pytest.approx(last, abs=1e-6)


def test_digits_beat_a_model_without_latents(mnist, results):
    command("paper_digits", mnist, results, "--sets", "plain")
    rows = {line[22:34].strip(): line[34:].split() for line in table(results / "paper_digits.txt", "set  ")}
    assert list(rows) == ["vanilla VAE", "fixed pose", "spatial-VAE"]
    no_latent = float(rows["vanilla VAE"][2])
    bounds = {model: float(cells[0]) for model, cells in rows.items()}
    assert all(bound > no_latent for bound in bounds.values()), (bounds, no_latent)
    assert (results / "paper_digits_bounds.png").stat().st_size > 0
    assert (results / "paper_digits_manifolds.png").stat().st_size > 0


def test_the_steerable_engine_tells_turned_digits_apart(mnist, results):
    command("paper_clusters", mnist, results, "--epochs", "1")
    rows = {line.split()[0]: line.split() for line in table(results / "paper_clusters.txt", "engine ")}
    assert list(rows) == ["pixels", "steerable", "coordinate", "vanilla"]
    assert float(rows["steerable"][2]) > float(rows["pixels"][2])
    within_a_digit = 5 if paper_clusters.GaussianMixture is not None else 4
    assert float(rows["steerable"][within_a_digit]) > 0.2
    assert (results / "paper_clusters.png").stat().st_size > 0


def test_galaxies_beat_a_model_without_latents(galaxies, results):
    command("paper_galaxies", galaxies, results)
    rows = {
        line[:12].strip(): line[12:].split() for line in table(results / "paper_galaxies.txt", "model ")
    }
    assert list(rows) == ["vanilla VAE", "fixed pose", "spatial-VAE"]
    no_latent = float(rows["vanilla VAE"][3])
    assert float(rows["fixed pose"][1]) > no_latent
    assert float(rows["spatial-VAE"][1]) > no_latent
    assert (results / "paper_galaxies_z10.png").stat().st_size > 0
