"""The figures of a run, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import pdo_jax as pdo


def draw(folder: Path, history: Sequence[dict], confusion: np.ndarray | None, network, variables, shape) -> list[str]:
    """Draws all the figures that the network has into `folder`; returns their paths. `shape` is that of an image."""
    folder.mkdir(exist_ok=True)
    drawn = {"curves": curves(history)}
    if confusion is not None:
        drawn["confusion"] = confusion_matrix(confusion)
    kernels = lifting_kernels(network, variables, shape)
    if kernels is not None:
        drawn["stencils"] = stencils(kernels)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [str(folder / f"{name}.png") for name in drawn]


def curves(history: Sequence[dict]) -> Figure:
    """Loss, metrics and learning rate against the epoch, from the lines of metrics.jsonl."""
    panels = {name.removeprefix("train_"): [] for name in history[-1] if name.startswith("train_")} | {"learning_rate": []}
    for name in history[-1]:
        if (kind := name.removeprefix("train_").removeprefix("validation_")) in panels:
            panels[kind].append(name)
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    epochs = [line["epoch"] for line in history]
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            axes.plot(epochs, [line[name] for line in history], label=name.replace("_", " "), marker=".")
        axes.set(title=title.replace("_", " "), xlabel="epoch", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    return figure


def confusion_matrix(counts: np.ndarray, classes: Sequence[str] | None = None) -> Figure:
    """Counts [class, predicted class] of the test set; the colour shows the share of the class, mistakes only."""
    figure = Figure(figsize=(6, 5.6), layout="constrained")
    axes = figure.subplots()
    mistakes = counts * (1 - np.eye(len(counts))) / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(100 * mistakes, cmap="Reds")
    figure.colorbar(picture, label="of the class, %", shrink=0.8)
    if len(counts) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            dark = 2 * mistakes[row, column] > mistakes.max()
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color="white" if dark else "black")
        names = classes or [str(k) for k in range(len(counts))]
        axes.set_xticks(range(len(counts)), names, rotation=90 * (max(map(len, names)) > 3))
        axes.set_yticks(range(len(counts)), names)
    wrong = counts.sum() - np.trace(counts)
    axes.set(xlabel="predicted class", ylabel="class", title=f"{wrong} of {counts.sum()} test images wrong")
    return figure


def lifting_kernels(network, variables, shape) -> np.ndarray | None:
    """The kernels [k, k, features, group] of a plane network's first PDO-eConv on channel 0; None if there is none.

    They are read off as the layer's answer to a single bright point, so that no parametrisation has to be known.
    """
    if len(shape) != 3:
        return None
    image = np.zeros((1, *shape), np.float32)
    image[0, shape[0] // 2, shape[1] // 2, 0] = 1
    first = {"capture_intermediates": lambda module, _: isinstance(module, pdo.LiftingConv)}
    _, captured = network.apply(variables, image, train=False, mutable=["intermediates"], **first)
    answers = jax.tree.leaves(captured)
    if not answers:
        return None
    answer = np.asarray(answers[0][0], np.float32)  # [H, W, features, group], the kernels turned by a half turn
    rows, columns = (np.flatnonzero(np.abs(answer).sum(axes)) for axes in ((1, 2, 3), (0, 2, 3)))
    if not (rows.size and columns.size):  # all weights are 0
        return None
    return answer[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][::-1, ::-1]


def stencils(kernels: np.ndarray) -> Figure:
    """One row a feature, one column a group element: the same operator, turned."""
    features, order = kernels.shape[2:]
    figure = Figure(figsize=(0.8 * order + 0.6, 0.8 * features + 0.6), layout="constrained")
    grid = figure.subplots(features, order, squeeze=False)
    for (feature, element), axes in np.ndenumerate(grid):
        limit = np.abs(kernels[:, :, feature]).max()
        axes.imshow(kernels[:, :, feature, element], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(xticks=[], yticks=[])
    figure.suptitle("first layer: each row one operator, turned by the group", fontsize=9)
    return figure
