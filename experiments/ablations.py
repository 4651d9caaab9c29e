"""What each choice of mnist_rot_small_p16.py is worth, and how many digits it takes: two tables and two figures.

    python -m experiments.ablations [choices] [digits] [--minutes M]

`choices` changes one thing of the recipe at a time, in a short run on 3 000 digits, and tells the error on the 9 000 others of
the train set; `digits` trains that recipe and the plain CNN, with and without rotations in training, on 100 to 10 000 digits,
and tells the error on the others. No test digit is read. A trial that stands in results/ablations.json is done; the tables of
experiments/README.md and the figures in docs/figures are made of that file.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

import pdo_jax as pdo
from experiments import baselines, boundary, check, config, programs, reproduce, workdir
from experiments.boundary import Refused
from experiments.config import Config
from experiments.configs import mnist_rot_small_p16
from experiments.datasets import augment
from experiments.main import program, spare

RESULTS = reproduce.RESULTS / "ablations.json"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
MARK = "<!-- from results/ablations.json, by python -m experiments.ablations {} -->\n"
ALL = 12_000  # digits of the train set
BEST = mnist_rot_small_p16.config
EPOCHS = 24


def network(**changes):
    return {"network": BEST["network"].clone(**changes)}


def gaussian(sigma):
    return functools.partial(pdo.stencils.gaussian_derivative, sigma=sigma)


def nine(scheme):
    return network(basis="paper", features=5, scheme=scheme)


CHOICES: Mapping[str, Mapping[str, Mapping]] = {
    "as it is": {"": {}},
    "group": {f"p{n}": network(group=pdo.groups.cyclic(n), features=features, head_features=head)
              for n, features, head in ((4, 13, 80), (8, 9, 72), (12, 7, 72), (24, 5, 64))},
    "stencils, operators": {
        "Gaussian 1.3, order 2": network(scheme=gaussian(1.3)),
        "central, order 2": network(scheme=pdo.stencils.central_difference),
        "Gaussian 1.0, the paper's nine": nine(gaussian(1.0)),
        "Gaussian 1.3, the paper's nine": nine(gaussian(1.3)),
        "central, the paper's nine": nine(pdo.stencils.central_difference),
    },
    "frame": {"11.25°": network(frame=math.pi / 16)},
    "head": {"the paper's, not invariant": network(head="paper", features=5)},
    "down-sampling": {"mean": network(pool=pdo.mean_pool), "blur": network(pool=pdo.blur_pool)},
    "recipe": {
        "no label smoothing": {"label_smoothing": 0.0},
        "no average of weights": {"ema": 0.0},
        "dropout 0.1": network(dropout=0.1),
        "dropout 0.3": network(dropout=0.3),
        "SiLU": network(activation=nn.silu),
        "ReLU": network(activation=nn.relu),
        "L2 1e-4": {"l2": 1e-4},
    },
}
"""A choice, and what is taken instead: of as many parameters where the number of channels would change it."""

ROTATED = {"augment": functools.partial(augment.rotate, finer=3)}
CNN = {"network": baselines.MnistRotCNN(features=22), "l2": 1e-4, "label_smoothing": 0.0}
NETWORKS = {"PDO-eConv, p16": {}, "plain CNN": CNN, "plain CNN, rotations in training": CNN | ROTATED}
EPOCHS_OF = {100: 300, 300: 200, 1_000: 80, 3_000: 40, 10_000: 24}
"""Epochs for each number of digits: some thousand updates."""


class Trial(NamedTuple):
    table: str
    row: tuple[str, str]
    config: Config


def trials() -> dict[str, Trial]:
    """Every trial by its name."""
    found = {}
    for choice, others in CHOICES.items():
        for other, changes in others.items():
            settings = config.make(BEST | {"epochs": EPOCHS, "validation": ALL - 3_000, **changes})
            found[": ".join(filter(None, (choice, other)))] = Trial("choices", (choice, other), settings)
    for digits, epochs in EPOCHS_OF.items():
        for name, changes in NETWORKS.items():
            rate = functools.partial(config.warmup_cosine, 1e-2, epochs / 12)
            short = {"epochs": epochs, "learning_rate": rate, "validation": ALL - digits, "batch_size": min(64, digits // 3)}
            found[f"{name}: {digits} digits"] = Trial("digits", (name, str(digits)), config.make(BEST | short | changes))
    return found


def run(settings: Config) -> dict:
    """Trains without checkpoints, and evaluates the digits that were not trained on once, at the end."""
    data = check.load(settings)
    model = programs.make_model(settings, *settings.moments(data.train.images))
    mesh = programs.all_devices()
    state = programs.place(mesh, programs.initial_state(settings, model, data.train.images.shape[1:]))
    train_epoch, _ = programs.epoch_program(settings, model, data.train, mesh, state)
    began, commit = time.monotonic(), workdir.surroundings()["commit"]
    for epoch in range(1, settings.epochs + 1):
        state, metrics = train_epoch(state, epoch)
    found, _ = programs.evaluation_program(settings, model, mesh)(state.variables, data.validation)
    return {
        "error": found["error"],
        "loss": found["loss"],
        "train_error": metrics["train_error"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "seconds": time.monotonic() - began,
        "commit": commit,
        "config": config.describe(settings),
    }


def work(options: argparse.Namespace):
    if unknown := set(options.tables) - set(TABLES):
        raise Refused(f"no table {min(unknown)!r}; the tables are {', '.join(TABLES)}")
    began, found = time.monotonic(), json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, trial in trials().items():
        same = found.get(name, {}).get("config") == config.describe(trial.config)
        if trial.table not in (options.tables or TABLES) or same:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            boundary.say("stopped before the time was over; the same command goes on")
            break
        found[name] = run(trial.config)
        boundary.say(f"{name}: {100 * found[name]['error']:.2f} %, {found[name]['seconds']:.0f} s")
        workdir.write_json(RESULTS, found)
        write(found)
    write(found)


def write(found: Mapping):
    """The tables and figures of what was found."""
    every = {name: trial for name, trial in trials().items() if name in found}
    of = {table: [(trial, found[name]) for name, trial in every.items() if trial.table == table] for table in TABLES}
    if of["choices"]:
        reproduce.put(reproduce.README, MARK.format("choices"), choices_table(of["choices"]))
        choices_figure(of["choices"]).savefig(FIGURES / "ablations.png", dpi=120)
    if of["digits"]:
        reproduce.put(reproduce.README, MARK.format("digits"), digits_table(of["digits"]))
        digits_figure(of["digits"]).savefig(FIGURES / "digits.png", dpi=120)


def choices_table(rows) -> str:
    lines = ["| choice | instead | parameters | error | loss | train error |\n", "|---|---|---|---|---|---|\n"]
    for trial, found in rows:
        errors = [f"{100 * found['error']:.2f} %", f"{found['loss']:.4f}", f"{100 * found['train_error']:.2f} %"]
        lines.append("| " + " | ".join([*trial.row, f"{found['parameters']:,}".replace(",", " "), *errors]) + " |\n")
    return "".join(lines)


def digits_table(rows) -> str:
    sizes = [str(size) for size in EPOCHS_OF]
    lines = ["| network | " + " | ".join(sizes) + " |\n", "|---" * (len(sizes) + 1) + "|\n"]
    cells = {trial.row: f"{100 * found['error']:.{1 if int(trial.row[1]) < 3000 else 2}f} %" for trial, found in rows}
    for name in NETWORKS:
        lines.append(f"| {name} | " + " | ".join(cells.get((name, size), "") for size in sizes) + " |\n")
    return "".join(lines)


def choices_figure(rows) -> Figure:
    """Bars: the error of each trial, those of one choice in one colour, beside a line for the recipe as it is."""
    figure = Figure(figsize=(7, 0.28 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(CHOICES)
    errors = np.array([100 * found["error"] for _, found in rows])
    noise = np.sqrt(errors * (100 - errors) / 9_000)
    colours = [f"C{names.index(trial.row[0])}" for trial, _ in rows]
    labels = [": ".join(filter(None, trial.row)) for trial, _ in rows]
    axes.barh(labels, errors, xerr=noise, color=colours, height=0.7, error_kw={"lw": 1})
    axes.axvline(errors[0], color="black", lw=0.8, ls=":")
    axes.invert_yaxis()
    axes.set(xlabel="error on 9 000 digits after training on 3 000, %", xlim=(0, min(max(errors) * 1.08, 3 * errors[0])))
    return figure


def digits_figure(rows) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in NETWORKS:
        points = sorted((int(trial.row[1]), 100 * found["error"]) for trial, found in rows if trial.row[0] == name)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="digits to train on", ylabel="error on the others, %")
    axes.set_xticks(sizes := list(EPOCHS_OF), labels=[str(size) for size in sizes])
    axes.set_yticks(errors := [1, 2, 5, 10, 20, 50], labels=[str(error) for error in errors])
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend()
    return figure


TABLES = ("choices", "digits")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.ablations", description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="default: all; " + ", ".join(TABLES))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no trial after so many minutes")
    return parser


def main() -> int:
    options = parser().parse_args()
    spare()
    return boundary.guarded(lambda: work(options))


if __name__ == "__main__":
    program(main, "the same command goes on after the last trial")
