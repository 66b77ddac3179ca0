"""One GPU: what each stage does a second beside what the card could do, and a whole job timed.

    python -m benchmarks.gpu [PART ...] [--source FOLDER] [--particles 100000]

Parts: rates check training batches estimation job coordinate; by default all, in under eight minutes. The
floors of a stage are the bytes that its operations read and write, at the rate of a large copy, and their
multiplications at the rate of a large product of bfloat16 matrices, both measured first. ``check`` compares
the GPU with the CPU and recorded steps with plain ones. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import coordinate_gpu, trials
from benchmarks.gpu_sets import ViewSet, write_views
from benchmarks.measures import like_view_error_deg, neighbour_view_deg
from cryo_svae.imaging.ctf import CtfTable
from cryo_svae.learning import training
from cryo_svae.learning.checkpoint import Checkpoint, load_checkpoint
from cryo_svae.learning.cuda_graph import Recorded
from cryo_svae.learning.estimation import EstimateTable, estimate
from cryo_svae.learning.training_store import TrainingStore
from cryo_svae.models.steerable import SteerableConfig, SteerableEngine
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.preprocessing import Preparation, prepared_images
from cryo_svae.results.class_averages import class_averages
from cryo_svae.simulate import view_rotation

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
Z_DIM, SHIFT_PX = 8, 4.0
BATCHES = {64: (128, 1024, 2048), 128: (128, 512, 2048), 256: (128, 512)}
VIEWS = ("view", "expand", "slice", "select", "unsqueeze", "permute", "transpose", "t.", "detach", "alias")
VIEWS += ("as_strided", "unbind", "split", "real", "squeeze", "_conj", "empty", "new_empty", "prim.")
VIEWS += ("_unsafe_view", "unflatten", "view_as", "_reshape_alias", "lift")


class Traffic(TorchDispatchMode):
    """Counts the operations that move data, the bytes that they read and write, and multiplications."""

    def __init__(self) -> None:
        super().__init__()
        self.n_operations, self.n_bytes, self.n_flops = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not str(func).removeprefix("aten.").startswith(VIEWS):
            self.n_operations += 1
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
            self.n_bytes += sum(map(_bytes, tensors.values()))
        if count := flop_registry.get(func.overloadpacket):
            self.n_flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def _bytes(tensor: Tensor) -> int:
    """Of the elements that lie apart in memory."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return int(np.prod([n for n, stride in sizes if stride], initial=1)) * tensor.element_size()


def seconds(work: Callable[[], object], repeats: int, warm_ups: int = 3) -> float:
    """Median seconds of a call; the GPU is waited for."""
    times = []
    for k in range(warm_ups + repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if k >= warm_ups:
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def kernels(work: Callable[[], object], longest: int = 0) -> tuple[int, float]:
    """Kernels of a call, and the milliseconds that they run; prints the ``longest`` of them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spent: Counter[str] = Counter()
    for event in events:
        spent[event.name[:110]] += event.self_device_time_total / 1e3
    for name, ms in spent.most_common(longest):
        print(f"    {ms:8.2f} ms  {name}", flush=True)
    return len(events), sum(spent.values())


class Card:
    """The card's rates, measured: bytes/s of a copy, and operations/s of a product of bfloat16 matrices."""

    def __init__(self) -> None:
        self.bytes_a_s = coordinate_gpu.copy_rate(GPU)
        self.operations_a_s = coordinate_gpu.product_rate(GPU)

    def floors(self, work: Callable[[], object]) -> dict[str, float]:
        """Operations of a call, and the milliseconds that their bytes and multiplications take at least."""
        with Traffic() as traffic:
            work()
        return {
            "operations": traffic.n_operations,
            "floor_bytes_ms": 1e3 * traffic.n_bytes / self.bytes_a_s,
            "floor_operations_ms": 1e3 * traffic.n_flops / self.operations_a_s,
        }


def show(name: str, **values: object) -> None:
    """One row: its name and its figures."""
    texts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
    print(f"{name:28s} " + "  ".join(texts), flush=True)


# -- engines on made-up images: their speed does not depend on what the images show ----------------


def random_ctf(n: int, pixel_size_angst: float) -> CtfTable:
    """CTF of 1 to 2.5 µm, 2 % astigmatic."""
    one, defocus = torch.ones(n, device=GPU), 10_000 + 15_000 * torch.rand(n, device=GPU)
    return CtfTable(
        pixel_size_angst=one * pixel_size_angst, voltage_kv=300 * one, cs_mm=2.7 * one,
        amplitude_contrast=0.1 * one, defocus_u_angst=1.01 * defocus, defocus_v_angst=0.99 * defocus,
        defocus_angle_rad=3.1 * torch.rand(n, device=GPU), phase_shift_rad=0 * one,
    )  # fmt: skip


def engine_and_store(box_px: int, n: int) -> tuple[SteerableEngine, TrainingStore]:
    """An untrained engine that looks at all rings, and n images of noise on the card."""
    torch.manual_seed(0)
    config = SteerableConfig(max_shift_px=SHIFT_PX, mask_radius_px=box_px / 2 - 1)
    engine = SteerableEngine(box_px, Z_DIM, config).to(GPU)
    images = [
        engine.represent(torch.randn(512, box_px, box_px, device=GPU)).half() for _ in range(n // 512)
    ]
    # 2 % at this pixel size turns the phase by more than what counts as round
    store = TrainingStore(torch.cat(images), random_ctf(n, 280.0 / box_px), np.arange(n))
    engine.start(store.batches(torch.arange(n), 512, GPU), n)
    engine.begin_epoch(10, 20)
    engine._look_as_far_as(engine.full.n_rings)
    return engine.train(), store


def steps_of(engine: SteerableEngine, store: TrainingStore, recorded: bool) -> training._Steps:
    """Steps of training as ``training.fit`` takes them."""
    optimizer = training._adam(engine, None, GPU)
    training._set_learning_rate(optimizer, 1e-4)
    steps = training._Steps(engine, store, optimizer, GPU)
    if not recorded:
        steps._recorded = Recorded(steps._recorded._work, GPU, False)
    return steps


def training_rows(card: Card) -> None:
    """Steps of training by box and batch."""
    for box_px, batches in BATCHES.items():
        for batch in batches:
            engine, store = engine_and_store(box_px, max(2048, batch))
            torch.cuda.reset_peak_memory_stats()
            rows = [torch.randperm(len(store))[:batch] for _ in range(4)]
            plain, recorded = (steps_of(engine, store, each) for each in (False, True))
            plain_s = seconds(lambda plain=plain, rows=rows: plain.train(rows[0]), 5)
            n_kernels, busy_ms = kernels(lambda plain=plain, rows=rows: plain.train(rows[0]))
            floors = card.floors(lambda plain=plain, rows=rows: plain.train(rows[0]))
            step_s = seconds(lambda recorded=recorded, rows=rows: recorded.train(rows[1]), 15)
            show(
                f"training {box_px} px, batch {batch}",
                images_s=round(batch / step_s), step_ms=1e3 * step_s, plain_ms=1e3 * plain_s,
                kernels=n_kernels, busy_ms=busy_ms, **floors, gb=torch.cuda.max_memory_allocated() / 2**30,
            )  # fmt: skip
            del engine, store, plain, recorded
            torch.cuda.empty_cache()


def estimation_rows(card: Card) -> None:
    """Posteriors of particles by box."""
    for box_px, n in {64: 16384, 128: 8192, 256: 2048}.items():
        engine, store = engine_and_store(box_px, n)
        batch = store.batch(torch.arange(n), GPU)
        torch.cuda.reset_peak_memory_stats()
        took = seconds(lambda engine=engine, batch=batch: engine.infer(batch), 2, 1)
        n_kernels, busy_ms = kernels(lambda engine=engine, batch=batch: engine.infer(batch), 14)
        few = store.batch(torch.arange(512), GPU)
        floors = card.floors(lambda engine=engine, few=few: engine.infer(few))
        a_thousand = {k: v * 1000 / 512 for k, v in floors.items() if k != "operations"}
        show(
            f"estimation {box_px} px",
            images_s=round(n / took), us_each=1e6 * took / n, kernels=n_kernels,
            busy_us_each=1e3 * busy_ms / n,
            **{k.replace("_ms", "_us_each"): v for k, v in a_thousand.items()},
            gb=torch.cuda.max_memory_allocated() / 2**30,
        )  # fmt: skip
        del engine, store, batch, few
        torch.cuda.empty_cache()


# -- training on views: right, and right for every batch -------------------------------------------


def view_store(engine: SteerableEngine, views: ViewSet, n: int) -> tuple[TrainingStore, dict[str, Tensor]]:
    """n views represented on the card, and their truth."""
    torch.manual_seed(1)
    parts = [views.draw(1000) for _ in range(n // 1000)]
    image = torch.cat([engine.represent(part.images).half() for part in parts])
    names = parts[0].ctf.columns()
    ctf = CtfTable(**{name: torch.cat([getattr(part.ctf, name) for part in parts]) for name in names})
    truth = {name: torch.cat([getattr(part, name) for part in parts]).double().cpu()
             for name in ("view_rad", "psi_rad", "origin_px")}  # fmt: skip
    return TrainingStore(image, ctf, np.arange(n)), truth


def batch_rows(source: Path | None) -> None:
    """As many images in batches of several sizes: bounds, and what is learned, beside seconds."""
    box_px, n, epochs = 64, 100_000, 10
    views = ViewSet(box_px, 0.1, source, GPU)
    preparation = Preparation(
        box_px=box_px, pixel_size_angst=views.pixel_size_angst, invert=False,
        mask_diameter_angst=(box_px - 2) * views.pixel_size_angst,
    )  # fmt: skip
    defaults = SteerableEngine.training_defaults
    store = None
    for batch, rate in ((128, None), (512, None), (512, defaults.learning_rate), (2048, None)):
        checkpoint = trials.untrained(
            "steerable", Z_DIM, preparation, True, 0, max_shift_px=SHIFT_PX, mask_radius_px=box_px / 2 - 1
        )
        engine = checkpoint.engine.to(GPU)
        if store is None:
            store, truth = view_store(engine, views, n)
        schedule = training.Schedule(
            epochs=epochs, batch_size=batch, one_cycle=True, held_out=0.1, patience=None, seed=0,
            learning_rate=defaults.learning_rate_for(batch) if rate is None else rate,
        )  # fmt: skip
        began = time.perf_counter()
        training.fit(checkpoint, store, schedule, GPU, lambda _: None)
        took = time.perf_counter() - began
        last = checkpoint.history[-1]
        found = trials.infer(checkpoint, store, torch.arange(4000))
        show(
            f"{n} views, batch {batch}",
            rate=schedule.learning_rate, seconds=took, images_s=round(0.9 * n * epochs / took),
            bound=round(last["elbo"], 2), held_out=round(last["held_out_elbo"], 2),
            **view_scores(found.z_mean.double().numpy(), found.z_std.double().numpy(),
                          found.psi_rad.double().numpy(), {k: v[:4000].numpy() for k, v in truth.items()}),
        )  # fmt: skip


def view_scores(
    z: np.ndarray, z_std: np.ndarray, psi_rad: np.ndarray, truth: dict[str, np.ndarray]
) -> dict[str, float]:
    """In-plane error of like views, and angle between the views of neighbours in z, degrees."""
    direction = view_rotation(torch.from_numpy(truth["view_rad"]))[:, 2].numpy()
    return {
        "like_views_deg": like_view_error_deg(psi_rad, truth["psi_rad"], truth["view_rad"]),
        "neighbours_deg": neighbour_view_deg(z / np.maximum(z_std.mean(0), 1e-3), direction),
    }


# -- the GPU beside the CPU --------------------------------------------------------------------------


def check(source: Path | None) -> None:
    """Recorded steps beside plain ones, and each stage beside the CPU's, on the same small set."""
    sums, weights = [], []
    for recorded in (False, True):
        engine, store = engine_and_store(64, 1024)
        steps = steps_of(engine, store, recorded)
        training.seed_everything(0, 3)
        rows = torch.arange(1024).split(256)
        sums.append(torch.stack([steps.train(rows[k % 4]).clone() for k in range(12)]))
        weights.append(torch.cat([p.detach().flatten() for p in engine.parameters()]))
    show("recorded steps", same_bounds=torch.equal(*sums), same_weights=torch.equal(*weights))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_views(folder / "set", ViewSet(64, 0.1, source, GPU), 2000)
        star = folder / "set" / "particles.star"
        run_job(star, folder / "job", "--epochs", "6")
        for engine_name in ("coordinate", "vanilla"):
            small = ("--engine", engine_name, "--epochs", "3", "--hidden", "64", "--encoder-hidden", "64")
            run_job(star, folder / engine_name, *small)
        resumed = folder / "resumed"
        run_job(star, resumed, "--epochs", "6")
        compare(
            "a job repeated on the GPU",
            *(load_checkpoint(folder / j / "model.pt") for j in ("job", "resumed")),
        )
        particles = read_particles(star)
        checkpoint = load_checkpoint(folder / "job" / "model.pt")
        few = ImageSource(particles)
        tables = [estimate(checkpoint, few, device) for device in (CPU, GPU)]
        show("estimation, GPU to CPU", **table_differences(*tables))
        number = 1 + (np.argsort(np.argsort(tables[0].z[:, 0])) * 10 // len(particles)).astype(np.intp)
        means = [
            class_averages(
                few, tables[0], number, 10, checkpoint.preparation, use_ctf=True, seed=0, device=d
            )
            for d in (CPU, GPU)
        ]
        difference = np.abs(means[0].image - means[1].image).max() / means[0].image.std()
        show("averages, GPU to CPU", worst_over_sd=float(difference))


def compare(name: str, one: Checkpoint, other: Checkpoint) -> None:
    """Whether two trainings ended alike."""
    pairs = zip(one.engine.parameters(), other.engine.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    show(name, same_weights=same, bounds=[round(c.history[-1]["elbo"], 3) for c in (one, other)])


def table_differences(one: EstimateTable, other: EstimateTable) -> dict[str, float]:
    """99th percentile and worst of the differences, z in units of its spread."""
    turn = (one.psi_deg - other.psi_deg + 180.0) % 360.0 - 180.0
    differences = {
        "z_std": np.abs(one.z - other.z) / np.maximum(one.z_std, 1e-6),
        "psi_deg": np.abs(turn),
        "origin_angst": np.abs(one.origin_angst - other.origin_angst),
        "evidence": np.abs(one.log_likelihood - other.log_likelihood),
    }
    worst = {f"{k}_worst": float(v.max()) for k, v in differences.items()}
    return {f"{k}_99": float(np.percentile(v, 99)) for k, v in differences.items()} | worst


# -- whole jobs --------------------------------------------------------------------------------------


def run_job(star: Path, job: Path, *options: str) -> float:
    """Seconds of ``cryo-svae run`` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "cryo_svae",
        "run",
        str(star),
        "--out",
        str(job),
        "--z-dim",
        str(Z_DIM),
    ]
    began = time.perf_counter()
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - began


def job_rows(source: Path | None, n_particles: int) -> None:
    """A whole job of 128 px by its stages, and the rates of preparation and averages by themselves."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        views = ViewSet(128, 0.05, source, GPU)
        torch.manual_seed(2)
        truth = write_views(folder / "set", views, n_particles)
        show("set made", particles=n_particles, seconds=time.perf_counter() - began)
        del views
        torch.cuda.empty_cache()
        star, job = folder / "set" / "particles.star", folder / "job"
        total = run_job(star, job)
        record = json.loads((job / "run.json").read_text())
        show(f"job, {n_particles} x 128 px", seconds=total, **record["seconds"])
        print((job / "epochs.tsv").read_text(), flush=True)
        settings = yaml.safe_load((job / "config.yaml").read_text())
        show(
            "job, settings",
            **{k: settings[k] for k in ("epochs", "batch_size", "learning_rate", "classes")},
        )
        with h5py.File(job / "latents.h5") as file:
            rows = slice(0, None, max(1, n_particles // 8000))
            z, z_std, psi = (file[k][rows] for k in ("z", "z_std", "psi_deg"))
        few = {k: v[rows] for k, v in truth.items()}
        show("job, scores", **view_scores(z, z_std, np.radians(psi), few))
        particles = read_particles(star)
        checkpoint = load_checkpoint(job / "model.pt")
        engine = checkpoint.engine.to(GPU).eval()
        some = np.arange(min(n_particles, 40_000))
        began = time.perf_counter()
        with torch.no_grad():
            for _, images, _ in prepared_images(
                ImageSource(particles), some, checkpoint.preparation, device=GPU
            ):
                engine.represent(images)
        torch.cuda.synchronize()
        show("preparation 128 px", images_s=round(len(some) / (time.perf_counter() - began)))
        per_million = (total - record["seconds"].get("start", 0.0)) * 1e6 / n_particles / 60
        show("extrapolated to 1,000,000", minutes=per_million)


def main() -> None:
    """Prints the rows of the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--source", type=Path, help="folder of the two Hsp90 chains, for the views")
    parser.add_argument("--particles", type=int, default=100_000)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {trials.where()}", flush=True)
    card = Card()
    show("card", copy_tb_s=card.bytes_a_s / 1e12, bfloat16_tflops=card.operations_a_s / 1e12)
    parts: dict[str, Callable[[], None]] = {
        "check": lambda: check(arguments.source),
        "training": lambda: training_rows(card),
        "estimation": lambda: estimation_rows(card),
        "coordinate": lambda: coordinate_gpu.show([*coordinate_gpu.check(GPU), *coordinate_gpu.rows()]),
        "job": lambda: job_rows(arguments.source, arguments.particles),
        "batches": lambda: batch_rows(arguments.source),
    }
    for name, part in parts.items():
        if arguments.parts and name not in arguments.parts:
            continue
        began = time.perf_counter()
        try:
            part()
        except Exception:  # the other rows are worth having
            traceback.print_exc(limit=-8)
        torch.cuda.empty_cache()
        print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
