"""Test bounds of digits, the paper's Figure 2, and manifolds of a two-dimensional z, its Figure 3.

    python -m benchmarks.paper_digits --source FOLDER [--size SIZE]

Plain digits, digits turned by N(0, (pi/4)²) and shifted by N(0, 1.4² px), and digits turned and shifted
by N(0, 14² px) on a canvas of 84 px that holds them. Three models on each: the spatial-VAE, the same
with its pose fixed at 0, and a vanilla VAE. Bernoulli pixels, 2 layers of tanh, Adam;
priors of the pose are the distributions that it was drawn from (those of the turned digits for plain
ones, as in the paper). ``paper``, the default, is its size and wants a GPU. The table and the
figures are written anew after each model: results/paper_digits.txt, …_bounds.png, …_manifolds.png.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from benchmarks import digits, paper_models, trials
from benchmarks.digits import MODELS, Posed, Trained
from benchmarks.measures import circular_correlation, shift_rms_px

ROTATION_STD_DEG = 45.0
MANIFOLD_SIDE = 12


@dataclass(frozen=True)
class Size:
    """How much is computed.

    binned, binned_canvas: a pixel is the mean of a square of so many, on 28 and on 84 px.
    one_cycle: the learning rate, of every model, rises to the one given and falls to 0.
    encoder_hidden: units of a layer of the encoder; None: of the generator's width, as in the paper.
    """

    n_train: int
    n_test: int
    binned: int
    binned_canvas: int
    hidden: int
    epochs: int
    batch_size: int
    learning_rate: float
    z_dims: tuple[int, ...]
    one_cycle: bool = False
    encoder_hidden: int | None = None


SIZES = {
    "paper": Size(60_000, 10_000, 1, 1, 500, 100, 100, 1e-4, (2, 5, 10, 20, 50, 100)),
    "cpu": Size(12_000, 1_000, 2, 3, 128, 5, 20, 1e-3, (2, 10, 50)),
    "small": Size(12_000, 1_000, 2, 4, 64, 5, 20, 2e-3, (2,)),
    "long": Size(60_000, 10_000, 2, 4, 128, 20, 20, 5e-3, (2,), one_cycle=True),
    "unbinned": Size(60_000, 10_000, 1, 2, 128, 20, 20, 5e-3, (2,), one_cycle=True),
    "wide": Size(60_000, 10_000, 1, 2, 128, 20, 20, 2e-3, (2,), one_cycle=True, encoder_hidden=500),
    "units": Size(60_000, 10_000, 1, 2, 500, 10, 20, 1e-3, (2,), one_cycle=True),
    "quick": Size(2_000, 500, 2, 4, 32, 10, 10, 5e-3, (2,)),
}


@dataclass(frozen=True)
class DigitSet:
    """How digits are posed, in pixels of the unbinned images."""

    turned: bool
    shift_std_px: float
    prior_shift_px: float
    canvas_px: int

    def binned(self, size: Size) -> int:
        """Side of the square of pixels that becomes one."""
        return size.binned if self.canvas_px == digits.DIGIT_PX else size.binned_canvas


SETS = {
    "turned, 1.4 px": DigitSet(True, 1.4, 1.4, 28),
    "turned, 14 px": DigitSet(True, 14.0, 14.0, 84),
    "plain": DigitSet(False, 0.0, 1.4, 28),
}


@dataclass(frozen=True)
class Row:
    """What a model scored on a set; bounds (n,) of the test images, nats."""

    set_name: str
    z_dim: int
    model: str
    trained: Trained
    bound: torch.Tensor
    text: str


def make_set(source, name: str, size: Size, part: str, seed: int) -> Posed:
    """The images of a set; ``part`` is train or t10k."""
    chosen = SETS[name]
    n = size.n_train if part == "train" else size.n_test
    images, label = digits.read_mnist(source, part, n)
    generator = torch.Generator().manual_seed(2 * seed + (part == "train"))
    psi = math.radians(ROTATION_STD_DEG) * torch.randn(n, generator=generator) * chosen.turned
    return digits.posed(
        images,
        label,
        psi,
        chosen.shift_std_px,
        canvas_px=chosen.canvas_px,
        binned=chosen.binned(size),
        generator=generator,
    )


def train_model(name: str, train: Posed, chosen: DigitSet, size: Size, z_dim: int, arguments) -> Trained:
    """A model on a set."""
    engine, poses = MODELS[name]
    return digits.train(
        engine,
        train.images,
        z_dim,
        epochs=size.epochs,
        batch_size=size.batch_size,
        learning_rate=size.learning_rate,
        one_cycle=size.one_cycle,
        seed=arguments.seed,
        device=arguments.device,
        pixels="bernoulli",
        hidden=size.hidden,
        encoder_hidden=size.encoder_hidden or size.hidden,
        rotation_prior="normal",
        rotation_std_deg=ROTATION_STD_DEG,
        shift_std_px=chosen.prior_shift_px / chosen.binned(size),
        z_delay=0,
        augment_rotation=False,
        **poses,
    )


def pose_scores(name: str, model: str, trained: Trained, test: Posed, binned: int) -> str:
    """Rotation's circular correlation and the shift's rms error in unbinned pixels."""
    if model != "spatial-VAE" or not SETS[name].turned:
        return f"{'–':>9s} {'–':>9s}"
    found = digits.infer(trained, test.images)
    psi, true_psi = found.psi_rad.double().numpy(), test.psi_rad.double().numpy()
    shift = shift_rms_px(found.origin_px.double().numpy(), test.origin_px.double().numpy(), psi)
    return f"{circular_correlation(psi, true_psi):9.3f} {binned * shift:9.2f}"


def rows_of(name: str, train: Posed, test: Posed, size: Size, z_dim: int, arguments) -> list[Row]:
    """The models on a set; gains are over the vanilla VAE, where it is among them."""
    rows: list[Row] = []
    floor = digits.mean_image_bound(train.images, test.images)
    for model in arguments.models:
        trained = train_model(model, train, SETS[name], size, z_dim, arguments)
        terms = digits.held_out_bound(trained, test.images)
        others = [row.bound for row in rows if row.model == "vanilla VAE"]
        text = (
            f"{name:15s} {z_dim:5d} {model:12s} {terms.elbo.mean():9.2f} "
            f"{digits.gain(terms.elbo, others[0]) if others else '':>15s} "
            f"{trained.checkpoint.history[-1]['elbo']:9.2f} {floor:9.2f} {terms.kl_z.mean():7.2f} "
            f"{pose_scores(name, model, trained, test, SETS[name].binned(size))} "
            f"{trained.seconds:7.0f} {trained.images_per_second:7.0f}"
        )
        print(text, flush=True)
        rows.append(Row(name, z_dim, model, trained, terms.elbo, text))
    return rows


def draw_bounds(rows: list[Row]) -> None:
    """Test bound against the dimensions of z, a panel a set."""
    names = list(dict.fromkeys(row.set_name for row in rows))
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for model, marker in zip(MODELS, "^so", strict=True):
            mine = [row for row in rows if row.set_name == name and row.model == model]
            z_dims, bounds = [row.z_dim for row in mine], [float(row.bound.mean()) for row in mine]
            axis.plot(z_dims, bounds, marker=marker, label=model)
        z_dims = sorted({row.z_dim for row in rows})
        axis.set(title=name, xlabel="dimensions of z", ylabel="test bound (nats)", xscale="log")
        axis.set_xticks(z_dims, [str(z_dim) for z_dim in z_dims])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
    paper_models.save_figure(figure, "paper_digits_bounds")


def draw_manifolds(rows: list[Row]) -> None:
    """Decoded images over the plane of z, a row a set and a column a model."""
    plane = [row for row in rows if row.z_dim == 2]
    if not plane:
        return
    names = list(dict.fromkeys(row.set_name for row in plane))
    models = list(dict.fromkeys(row.model for row in plane))
    figure = Figure(figsize=(3.5 * len(models), 3.7 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(models), squeeze=False)
    for row in plane:
        axis = axes[names.index(row.set_name), models.index(row.model)]
        images = paper_models.decode(row.trained.checkpoint, digits.z_grid(MANIFOLD_SIDE)).clamp(0.0, 1.0)
        axis.imshow(digits.tiles(images, MANIFOLD_SIDE, gap=0.25), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{row.set_name}: {row.model}", fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    paper_models.save_figure(figure, "paper_digits_manifolds")


def main(arguments_given: list[str] | None = None) -> None:
    """Prints a row a model as it is done, and writes table and figures."""
    parser = digits.parser_of(__doc__, SIZES)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments = parser.parse_args(arguments_given)
    size = digits.size_of(arguments, SIZES)
    lines = [
        f"size {arguments.size}: {digits.described(size)}; seed {arguments.seed}; bounds in nats an image,",
        "3 posterior samples each; gain over the vanilla VAE ± standard error over the test images",
        f"{'set':15s} {'z-dim':>5s} {'model':12s} {'test':>9s} {'gain':>15s} {'train':>9s} "
        f"{'no latent':>9s} {'KL z':>7s} {'rotation':>9s} {'shift/px':>9s} {'s':>7s} {'img/s':>7s}",
    ]
    print("\n".join(lines))
    rows: list[Row] = []
    with digits.refusals():
        for z_dim in size.z_dims:
            for name in arguments.sets:
                train = make_set(arguments.source, name, size, "train", arguments.seed)
                test = make_set(arguments.source, name, size, "t10k", arguments.seed)
                rows += rows_of(name, train, test, size, z_dim, arguments)
                draw_bounds(rows)
                draw_manifolds(rows)
                trials.write("paper_digits", [*lines, *(row.text for row in rows)])


if __name__ == "__main__":
    main()
