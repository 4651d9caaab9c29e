"""The theorem of PDO-eConvs, measured: `python -m experiments.equivariance [--out DIR] [--quick]`.

Writes figures (PNG) and `table.md`. Errors of layers involve no interpolation: an input is an analytic function, a random
sum of plane waves of wave numbers up to 2 (shortest wavelength π), sampled at turned coordinates, and an output is read at
the centre of rotation, which every turn leaves in place: (R·F)(0, A) = F(0, R^{-1}A).

As the spacing h of the grid goes to 0 the differential operators p_B(∇) = Σ_α c_α ∂^α of the layers stay the same: their
discrete coefficients are c_α h^{-|α|}. (A layer with fixed weights on the grid would be another operator at every h.)
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pdo_jax as pdo
from experiments import boundary, check, config, datasets, main, saved, train, workdir
from experiments.baselines import MnistRotCNN
from experiments.measures import fitted_slope, full_turn, logits_at_angles, relative
from pdo_jax import fields, groups, kernels, operators, steerable, stencils

EPOCHS = 4
FEATURES = 4
SECOND, FOURTH = (partial(stencils.central_difference, accuracy=accuracy) for accuracy in (2, 4))
TURN = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
P8 = partial(pdo.networks.PAPER["mnist_rot"], head="invariant", head_features=64)
NETWORKS = {
    "PDO-eConv p8, central differences": P8(scheme=stencils.central_difference),
    "PDO-eConv p8, Gaussian derivatives": P8(scheme=stencils.gaussian_derivative),
    "PDO-eConv p8, RBF-FD": P8(scheme=stencils.rbf_fd),
    "plain CNN": MnistRotCNN(),
}


def run(out: Path, quick: bool = False) -> str:
    """Measures everything, writes the figures and the table into `out`, and returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        "Made by `python -m experiments.equivariance" + (" --quick" if quick else "") + "`.", "",
        "Relative error of lifting, tanh and group convolution against the spacing h (order 2; root mean square over all group "
        "elements, orientations, features and inputs; float64):", "",
    ]
    spacings = [0.1, 0.05, 0.025] if quick else [0.1, 0.05, 0.025, 0.0125]
    lines += convergence(out / "theorem.png", spacings, quick)
    lines += ["", "Change of an invariant of one layer when the input turns (float64), the largest over the angles:", ""]
    lines += one_layer(out / "angle_layer.png", 16 if quick else 80)
    lines += ["", "Relative error of a stack of untrained layers against its depth (p8, 5×5, h = 0.2), over all turns:", ""]
    lines += depth(out / "depth.png", 3 if quick else 8)
    if not quick:
        lines += ["", f"Networks trained for {EPOCHS} epochs on mnist_rot/subset (1 seed), asked for 500 of its test digits "
                  "after further turns by multiples of 15° (cubic interpolation):", ""]
        lines += trained(out / "angle_networks.png", out / "runs")
    operators_turned(out / "operators.png")
    fields_turned(out / "fields.png")
    table = "\n".join(lines) + "\n"
    (out / "table.md").write_text(table)
    return table


# Layers on analytic inputs


def waves(dim: int, count: int, random: np.random.Generator) -> Callable:
    """`count` functions of points [..., dim], each the mean of 8 plane waves; they give [count, ...]."""
    directions = random.normal(size=(count, 8, dim))
    k = directions / np.linalg.norm(directions, axis=-1, keepdims=True) * random.uniform(0.5, 2, (count, 8, 1))
    phase = random.uniform(0, 2 * np.pi, (count, 8))
    return lambda points: np.cos(np.tensordot(k, points, ((2,), (points.ndim - 1,)))
                                 + phase.reshape(count, 8, *[1] * (points.ndim - 1))).mean(1)


def turned_patches(f: Callable, matrices, size: int, h: float) -> np.ndarray:
    """f(A^{-1}x) for each matrix, on `size` points of spacing h about 0: [matrices, functions, *space]."""
    dim = len(matrices[0])
    points = h * (np.stack(np.meshgrid(*[np.arange(size) - size // 2] * dim, indexing="ij"), -1))
    return np.stack([f(points @ a) for a in matrices])


def pair(group, scheme, size: int, order: int, h: float, random) -> Callable:
    """Lifting, tanh and group convolution by fixed random operators: x [batch, *space] -> [batch, features, group] at 0.

    In float64, and without ever expanding the kernels; a test compares it with the modules.
    """
    bank = kernels.bank(group, size, order, scheme)
    # The parameters weigh the operators ∂^α themselves; the modules' weigh combinations of them with orthonormal kernels.
    bank = dataclasses.replace(bank, turned=operators.action(group.elements, order))
    count, axes = len(bank.indices), range(1, group.dim + 1)
    grids = np.stack([w * h ** -sum(a) for a, w in zip(bank.indices, bank.stencils, strict=True)])
    with jax.enable_x64(True):
        first = np.array(kernels.Coefficients(bank)(jnp.asarray(random.normal(size=(count, 1, 1, FEATURES)))))[:, 0, 0]
        weights = jnp.asarray(random.normal(size=(count, FEATURES, group.order, FEATURES)))
        second = np.array(kernels.Coefficients(bank, group)(weights))

    def layers(x):
        windows = np.lib.stride_tricks.sliding_window_view(x, (size,) * group.dim, axis=tuple(axes))
        derivatives = np.tensordot(windows, grids, ([-k for k in axes], [-k for k in axes]))  # [batch, *size, operators]
        y = np.tanh(np.tensordot(derivatives, first, 1))
        return np.tensordot(np.tensordot(grids, y, (axes, axes)), second, ((0, 2, 3), (0, 1, 2)))

    return layers


def layer_error(group, scheme, size: int, h: float, order: int = 2) -> float:
    """The relative error of `pair` over all elements of the group; the same operators and inputs for every h."""
    random = np.random.default_rng(0)
    x = turned_patches(waves(group.dim, 4, random), group.elements, 2 * size - 1, h)
    layers = pair(group, scheme, size, order, h, random)
    y = np.stack([layers(part) for part in x])  # [R, functions, features, A]
    expected = np.stack([y[0][..., group.table[inverse]] for inverse in group.inverse])
    return relative(y, expected)


def convergence(path: Path, spacings: Sequence[float], quick: bool) -> list[str]:
    central = SECOND
    turned = groups.from_generators(TURN @ groups.octahedral().elements @ TURN.T, name="turned octahedral")
    panels = {
        "central differences of accuracy 2": {
            "p4": (groups.cyclic(4), central, 5), "p6": (groups.cyclic(6), central, 5), "p8": (groups.cyclic(8), central, 5),
            "p12": (groups.cyclic(12), central, 5), "octahedral": (groups.octahedral(), central, 3),
            "octahedral, its axes turned": (turned, central, 3), "icosahedral": (groups.icosahedral(), central, 3),
        },
        "other discretisations": {
            "p8, central differences, accuracy 4": (groups.cyclic(8), FOURTH, 5),
            "p8, Gaussian derivatives": (groups.cyclic(8), stencils.gaussian_derivative, 5),
            "p8, RBF-FD": (groups.cyclic(8), stencils.rbf_fd, 5),
            "icosahedral, accuracy 4": (groups.icosahedral(), FOURTH, 5),
        },
    }
    if quick:
        panels = {title: dict(list(cases.items())[:3]) for title, cases in panels.items()}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    rows = ["| layer pair | " + " | ".join(f"h = {h:g}" for h in spacings) + " | slope |", "|---" * (len(spacings) + 2) + "|"]
    for axes, (title, cases) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (label, case), marker in zip(cases.items(), "osD^vPX", strict=False):
            errors = [layer_error(*case, h) for h in spacings]
            exact = max(errors) < 1e-8  # rounding, which h^-4 amplifies
            slope = "exact" if exact else f"{fitted_slope(spacings, errors):.2f}"
            axes.loglog(spacings, errors, marker=marker, label=f"{label}: {'exact' if exact else 'slope ' + slope}", alpha=0.8)
            rows.append(f"| {label}{', accuracy 2' if 'accuracy 2' in title else ''} | "
                        + " | ".join(f"{error:.1e}" for error in errors) + f" | {slope} |")
        axes.set(title=title, xlabel="grid spacing h (shortest wavelength: π)", ylabel="relative equivariance error")
        axes.set_xticks(spacings, [f"{h:g}" for h in spacings])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=100)
    return rows


def one_layer(path: Path, turns: int) -> list[str]:
    """The change of invariants of one layer against the angle, on two grids."""
    angles = np.linspace(0, 360, turns + 1)
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots()
    rows = ["| layer | h | multiples of 2π/n | any angle |", "|---|---|---|---|"]
    for number, (label, n) in enumerate({"p4": 4, "p8": 8, "p16": 16, "SO(2), frequencies up to 2": None}.items()):
        for h, style in ((0.4, "-"), (0.1, "--")):
            y = invariants(n, full_turn(turns), h)
            change = np.array([relative(turned, y[0]) for turned in y])
            axes.semilogy(angles, np.maximum(change, 1e-16), style, color=f"C{number}", label=f"{label}, h = {h}")
            among = f"{change[:: turns // n].max():.1e}" if n else "all angles"
            rows.append(f"| {label} | {h} | {among} | {change.max():.1e} |")
    axes.set(xlabel="angle of the input, degrees", ylabel="relative change of an invariant", xticks=range(0, 361, 45),
             ylim=(1e-5, 1), title="one layer, order 2, central differences of accuracy 2")
    axes.grid(True, alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=100)
    return rows


def invariants(n: int | None, turns, h: float, size: int = 5) -> np.ndarray:
    """[turns, …]: the mean over p-n of the ReLU of lifted fields at 0; without n, the lengths of fields of SO(2)."""
    random, group = np.random.default_rng(0), groups.cyclic(n or 16)
    x = turned_patches(waves(2, 16, random), turns, size, h)
    if n:
        c = np.einsum("pf,apn->nfa", random.normal(size=(6, 32)), operators.action(group.elements, 2))
    else:
        field = fields.band_limited(group, 2, order=2)
        basis = steerable.basis(fields.trivial(group), field, 2)[..., 0]
        c = np.einsum("kf,kno->nfo", random.normal(size=(len(basis), 32)), basis)
    indices = operators.multi_indices(2, 2)
    scale = h ** -np.array([sum(a) for a in indices], float)
    y = np.einsum("tbij,nij,n,nfa->tbfa", x, stencils.bank(indices, size, SECOND), scale, c, optimize=True)
    return np.maximum(y, 0).mean(-1) if n else np.stack([np.linalg.norm(y[..., k], axis=-1) for k in field.blocks], -1)


def depth(path: Path, layers: int, h: float = 0.2, size: int = 5) -> list[str]:
    """The error at the centre behind each layer of an untrained stack of 5×5 layers without padding."""
    group, random = groups.cyclic(8), np.random.default_rng(0)
    x = turned_patches(waves(2, 4, random), group.elements, layers * (size - 1) + 1, h)
    x = x.reshape(-1, *x.shape[2:], 1).astype(np.float32)
    schemes = {"central differences, accuracy 2": SECOND, "central differences, accuracy 4": FOURTH,
               "Gaussian derivatives": stencils.gaussian_derivative, "RBF-FD": stencils.rbf_fd}
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = ["| discretisation, activation; layers: | " + " | ".join(map(str, range(1, layers + 1))) + " |",
            "|---" * (layers + 1) + "|"]
    activations = {"ReLU": jax.nn.relu, "SiLU": jax.nn.silu}
    for number, ((name, activation), (label, scheme)) in enumerate(itertools.product(activations.items(), schemes.items())):
        y, errors = jnp.asarray(x), []
        for layer in range(layers):
            kind = pdo.GroupConv if layer else pdo.LiftingConv
            conv = kind(8, group, kernel_size=size, padding="VALID", basis=2, scheme=scheme, lowering="dense")
            y = activation(conv.init_with_output(jax.random.key(layer), y)[0])
            centre = np.asarray(y[:, y.shape[1] // 2, y.shape[2] // 2]).reshape(group.order, -1, *y.shape[-2:])
            errors.append(relative(centre, np.stack([centre[0][..., group.table[inverse]] for inverse in group.inverse])))
        axes.semilogy(range(1, layers + 1), errors, "-o" if name == "ReLU" else "--s", color=f"C{number % len(schemes)}",
                      label=f"{label}, {name}", markersize=4)
        rows.append(f"| {label}, {name} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    axes.set(xlabel="layers", ylabel="relative equivariance error", xticks=range(1, layers + 1),
             title=f"untrained p8 layers, order 2, 5×5, h = {h}")
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=100)
    return rows


# Trained networks


def trained(path: Path, runs: Path, images: int = 500) -> list[str]:
    """Accuracy and change of the logits of briefly trained networks; finished runs in the folder are used again."""
    test = datasets.load("mnist_rot/subset").test
    test, networks = datasets.Split(test.images[:images], test.labels[:images]), {}
    for number, (label, network) in enumerate(NETWORKS.items()):
        schedule = partial(config.warmup_cosine, 1e-2, 1)
        setting = config.Config(network, validation=3200, epochs=EPOCHS, batch_size=64, learning_rate=schedule, l2=1e-4,
                                scan=False, eval_batch_size=200)
        result = train.train(setting, runs / str(number))
        _, model, variables, _, _ = saved.load(runs / str(number), setting)
        networks[label] = result["parameters"], 100 - 100 * result["test_error"], model, variables
    return against_angle(path, networks, test, "test")


def of_runs(path: Path, runs: Sequence[Path]) -> list[str]:
    """The same of trained runs, on their validation digits."""
    networks = {}
    for run in runs:
        setting, model, variables, _, _ = saved.load(run)
        split = check.load(setting).validation
        if not len(split.labels):
            raise workdir.TrainError(f"{run} has no validation digits; train with --set validation=2000")
        size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        error = workdir.read_json(run / "result.json", train.RESULT)["validation_error"]
        networks[run.name] = size, 100 - 100 * error, model, variables
    return against_angle(path, networks, split, "validation")


def against_angle(path: Path, networks: Mapping, split: datasets.Split, name: str, turns: int = 24) -> list[str]:
    """Rows for networks, label: (parameters, accuracy, model, variables), asked for the digits of a split at all angles."""
    angles, (images, labels) = np.linspace(0, 360, turns + 1), split
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [f"| network | parameters | {name} accuracy | over all angles | lowest | highest less lowest "
            "| change of logits: 90° | 45° | mean |", "|---" * 9 + "|"]
    for label, (parameters, at_rest, model, variables) in networks.items():
        y = logits_at_angles(model, variables, images, turns)
        change = np.array([relative(at_angle, y[0]) for at_angle in y])
        accuracy = 100 * (y.argmax(-1) == labels).mean(1)
        left.plot(angles, accuracy, label=label, marker=".")
        right.semilogy(angles, np.maximum(change, 1e-7), label=label, marker=".")
        rows.append(f"| {label} | {parameters} | {at_rest:.1f} % | {accuracy.mean():.2f} % | {accuracy.min():.2f} % "
                    f"| {np.ptp(accuracy):.2f} | {change[turns // 4]:.1e} | {change[turns // 8]:.3f} | {change.mean():.3f} |")
    left.set(ylabel="correct, %", title="accuracy")
    right.set(ylabel="relative change of the logits (floor: 1e-7)", title="change of the output")
    for axes in (left, right):
        axes.set(xlabel=f"further turn of the {name} digits, degrees", xticks=range(0, 361, 45))
        axes.grid(True, alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), ncols=4, fontsize=9, loc="outside lower center")
    figure.savefig(path, dpi=100)
    return rows


# Pictures


def operators_turned(path: Path):
    """The paper's nine operators on 5×5 points, turned through p8."""
    group, order = groups.cyclic(8), 4
    indices, base = operators.multi_indices(2, order), operators.paper_basis(2, 5)
    turned = operators.action(group.elements, order)[:, [indices.index(a) for a in base]]
    pictures = np.tensordot(turned, stencils.bank(indices, 5, stencils.central_difference), 1)
    figure = Figure(figsize=(8, 7.2), layout="constrained")
    for (a, p), axes in np.ndenumerate(figure.subplots(group.order, len(base))):
        limit = np.abs(pictures[:, p]).max()
        axes.imshow(pictures[a, p], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(xticks=[], yticks=[])
        if a == 0:
            factors = [rf"\partial_{i}" + (f"^{d}" if d > 1 else "") for i, d in enumerate(base[p]) if d]
            axes.set_title(f"${''.join(factors) or 1}$", fontsize=11)
        if p == 0:
            axes.set_ylabel(f"{45 * a}°", rotation=0, ha="right", va="center")
    figure.suptitle("stencils of $p(A^{-1}\\nabla)$: rows the element A of p8, columns the operator p", fontsize=10)
    figure.savefig(path, dpi=80)


def fields_turned(path: Path):
    """A digit turned by multiples of 45°, one orientation of its lifted field, the field turned back, and its error."""
    group = groups.cyclic(8)
    images = datasets.load("mnist_rot/subset").test.images[:1]
    x = jnp.pad(jnp.asarray(images), ((0, 0), (6, 6), (6, 6), (0, 0)))
    layer = pdo.LiftingConv(1, group, scheme=stencils.gaussian_derivative, basis=2)
    variables = layer.init(jax.random.key(3), x)
    inputs = [groups.transform(x, a) for a in group.elements[:5]]
    outputs = [layer.apply(variables, image) for image in inputs]
    back = [groups.act(y, group, int(group.inverse[i])) for i, y in enumerate(outputs)]
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    limit = float(jnp.abs(outputs[0]).max())
    rows = {
        "input": [(image[0, ..., 0], "gray", 0, 1) for image in inputs],
        "field F(·, 1)": [(y[0, ..., 0, 0], "RdBu_r", -limit, limit) for y in outputs],
        "turned back\n(space, group)": [(y[0, ..., 0, 0], "RdBu_r", -limit, limit) for y in back],
        "less the first": [((y - back[0])[0, ..., 0, 0], "RdBu_r", -limit, limit) for y in back],
    }
    for row, (axes_row, (label, pictures)) in enumerate(zip(figure.subplots(len(rows), 5), rows.items(), strict=True)):
        for column, (axes, (picture, colours, low, high)) in enumerate(zip(axes_row, pictures, strict=True)):
            axes.imshow(picture, cmap=colours, vmin=low, vmax=high)
            axes.set(xticks=[], yticks=[], title=f"{45 * column}°" if row == 0 else None)
        axes_row[0].set_ylabel(label)
    figure.savefig(path, dpi=80)


def command(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser("python -m experiments.equivariance", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/equivariance"), help="the folder of figures, table and runs")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="only trained runs, on their validation digits")
    parser.add_argument("--quick", action="store_true", help="fewer grids and groups, and no trained networks: seconds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    print("\n".join(of_runs(options.out / "runs.png", options.runs)) if options.runs else run(options.out, options.quick))


if __name__ == "__main__":
    main.program(lambda: boundary.guarded(command), "what is finished stays")
