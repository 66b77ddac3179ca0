"""The coordinate engine against the machine's matrix rate: images/s in training, one thread.

    python -m benchmarks.coordinate_speed [--batch 20] [--rounds 3] [--seeds 0 --source FOLDER]

Seconds are the process's own on the processor, each the least of the rounds; the variants take turns.
The floor counts the multiplications and additions of the generator's hidden layers and of the
encoder, forwards and backwards, at the rate of a multiplication of the same size. ``formula`` is the
generator as the paper has it, all pixels at once. The errors are of the mean bound, same draws, beside
float64.

With --seeds N, whether bfloat16 holds the bound once trained: N trainings of the hinge (Hsp90 of
FOLDER) in each precision, both judged in float32 on the same held-out images.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import paper_hinge, trials
from benchmarks.paper_models import Effort
from cryo_svae.learning import training
from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.coordinate_generator import CoordinateGenerator
from cryo_svae.models.engine import Batch
from cryo_svae.models.pixels import PixelKind

SIZES: list[tuple[int, int, PixelKind]] = [
    (28, 500, "bernoulli"),
    (40, 500, "gaussian"),
    (48, 1000, "gaussian"),
]
EPOCHS = 24  # of each training


class Formula(CoordinateGenerator):
    """Every pixel of every image at once."""

    def forward(self, coordinates: Tensor, z: Tensor) -> Tensor:
        """Outputs at coordinates."""
        units = torch.tanh(self.of_coordinates(coordinates) + self.of_z(z)[:, None, :])
        for layer in self.rest:
            units = layer(units) if isinstance(layer, nn.Linear) else torch.tanh(units)
        return units


def seconds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least processor seconds of each."""
    least = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            began = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - began)
    return least


def step(engine: CoordinateEngine, optimizer: torch.optim.Optimizer, batch: Batch, half: bool) -> None:
    """One step of training."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        bound = engine.elbo(batch).elbo
    (-bound.mean()).backward()
    optimizer.step()


def mean_bound(engine: CoordinateEngine, batch: Batch, half: bool) -> float:
    """With a seed's draws, no turn of the encoder's input."""
    engine.eval()
    torch.manual_seed(1)
    # the same draws in every precision: float32's, whatever the model's
    draw = Batch.draw
    Batch.draw = lambda self, sample, like: draw(self, sample, like.float()).to(like.dtype)  # type: ignore
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return float(engine.elbo(batch).elbo.double().mean())
    finally:
        Batch.draw = draw  # type: ignore[method-assign]


def at_size(box: int, hidden: int, pixels: PixelKind, n: int, rounds: int) -> list[str]:
    """Lines of a size."""
    torch.manual_seed(0)
    radius = box / 2 if pixels == "gaussian" else float("inf")
    config = CoordinateConfig(hidden=hidden, pixels=pixels, mask_radius_px=radius)
    engine = CoordinateEngine(box, 2, config)
    formula = copy.deepcopy(engine)
    formula.generator.__class__ = Formula
    p = len(engine.inside)
    batch = Batch(torch.arange(n), torch.rand(n, 1, box, box), None)

    a, w = torch.randn(p, hidden), torch.randn(hidden, hidden)
    a16, w16 = a.bfloat16(), w.bfloat16()
    works: dict[str, Callable[[], object]] = {"float32": lambda: a @ w, "bfloat16": lambda: a16 @ w16}
    rates = {k: 2.0 * p * hidden**2 / s for k, s in seconds(works, 10).items()}
    matrices = [m for m in engine.encoder.parameters() if m.ndim == 2]
    rest = [m for m in engine.generator.rest.parameters() if m.ndim == 2]
    operations = 6.0 * (sum(m.numel() for m in matrices) + p * sum(m.numel() for m in rest))

    def training(engine: CoordinateEngine, half: bool) -> Callable[[], None]:
        engine.train()
        return partial(step, engine, torch.optim.Adam(engine.parameters(), fused=True), batch, half)

    exact = copy.deepcopy(engine).double()
    wanted = mean_bound(exact, Batch(batch.index, batch.image.double(), None), False)
    errors = {
        "float32": mean_bound(engine, batch, False) / wanted - 1.0,
        "bfloat16": mean_bound(engine, batch, True) / wanted - 1.0,
    }
    steps = {
        "formula, float32": training(formula, False),
        "pieces, float32": training(engine, False),
        "pieces, bfloat16": training(engine, True),
    }
    lines = [
        f"{box} px, {p} pixels, {hidden} units, {pixels}: {operations / 1e9:.2f} Gflop an image; "
        + ", ".join(f"{k} {r / 1e9:.0f} Gflop/s" for k, r in rates.items())
    ]
    for name, least in seconds(steps, rounds).items():
        kind = name.split(", ")[1]
        floor = rates[kind] / operations
        lines.append(
            f"  {name:18s} {n / least:6.1f} images/s, floor {floor:6.1f}, {n / least / floor:4.0%} of it; "
            f"bound off by {errors[kind]:.1e}"
        )
    return lines


def trained(seed: int, source: Path | None) -> list[str]:
    """The hinge learned in each precision: bound and scores of held-out images."""
    size = dataclasses.replace(
        paper_hinge.SIZES["small"], spatial=Effort(EPOCHS, batch_size=25, learning_rate=1e-3)
    )
    arguments = argparse.Namespace(minutes=None, seed=seed, device="cpu")
    simulated, _ = paper_hinge.simulated_and_molecule(size, source, seed)
    able = training.trains_in_bfloat16
    lines = []
    for name, rule in {"float32": lambda *_: False, "bfloat16": lambda *_: True}.items():
        training.trains_in_bfloat16 = rule
        try:
            began = time.process_time()
            found = paper_hinge.train_model("spatial-VAE", simulated, size, arguments)
            took = time.process_time() - began
        finally:
            training.trains_in_bfloat16 = able
        row = paper_hinge.Row(name, found.posterior.z_mean, found.posterior.psi_rad, "")
        conformation, rotation = row.scores(paper_hinge.rows_of(simulated, found.held))
        bounds = [row["held_out_elbo"] for row in found.checkpoint.history]
        half = EPOCHS // 2
        lines.append(
            f"  seed {seed}, {name}: held-out bound after {half} epochs {bounds[half - 1]:.2f}, after "
            f"{EPOCHS} {bounds[-1]:.2f}; conformation {conformation:.3f}, rotation {rotation:.3f}; "
            f"{took:.0f} s"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--source", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    for size in SIZES:
        lines += at_size(*size, arguments.batch, arguments.rounds)
        print(f"{size[0]} px measured", flush=True)
    for seed in range(arguments.seeds):
        lines += trained(seed, arguments.source)
    trials.report("coordinate_speed", lines)


if __name__ == "__main__":
    main()
