"""One HTML file of one or several trained runs, side by side: `python -m experiments.report RUN … [--out FILE]`.

Curves, confusion, the worst mistakes as pictures, accuracy and logits over 360°, stencils, config and environment. The file
needs nothing else: pictures are inside, no script, no address. Runs are data and may come from someone else: their words are
escaped, nothing of them is executed.
"""

import argparse
import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import boundary, config, figures, measures, saved, train
from experiments.main import program
from experiments.workdir import TrainError, read_history, read_json, write_text

WORST = 12  # mistakes that are shown
TURNED = 200  # test images that are turned
CLOSED = "http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
section { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(22rem, 1fr); gap: 1.5rem; overflow-x: auto }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; border-bottom: 1px solid #ccc; margin-top: 2rem } h3 { font-size: 1rem }
img { max-width: 100%; height: auto } pre { font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: .6rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top }
"""


class Seen(NamedTuple):
    """What is shown of a run."""

    name: str
    result: dict[str, Any]
    history: list[dict]
    classes: list[str]
    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray  # [n, classes]
    angles: np.ndarray | None  # logits [turns + 1, TURNED, classes], of pictures
    kernels: np.ndarray | None
    about: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m experiments.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default: report.html")
    parser.add_argument("--config", type=Path, help="config file of a run whose network or data set stands in it alone")
    options = parser.parse_args(arguments)

    def run():
        given = config.load(options.config) if options.config else None
        write_text(options.out, page([look(path, given) for path in options.runs]))
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")

    return boundary.guarded(run)


def look(path: Path, given: config.Config | None = None, data=None) -> Seen:
    """Asks a run for its test set; `data` stands in for one that was handed over."""
    run = saved.load(path, given)
    result = read_json(path / "result.json", train.RESULT)
    data = saved.data_of(run, path, data)
    images, labels = data.test
    if "test_error" not in result or labels.ndim > 1:
        raise TrainError(f"{path} is not about classes of images; its numbers are in {path / 'result.json'}")
    probabilities = run.probabilities()
    size = min(run.config.eval_batch_size, len(labels))
    batches = (np.asarray(images[start : start + size]) for start in range(0, len(labels), size))
    parts = [np.asarray(probabilities(np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)]))) for x in batches]
    turned = measures.logits_at_angles(run.model, run.variables, images[:TURNED]) if images.ndim == 4 else None
    classes = [name.replace("$", r"\$") for name in saved.names(data.classes, parts[0][0])]  # no formulas in figures
    return Seen(path.name, result, read_history(path, run.epoch, writes=False), classes, images, labels,
                np.concatenate(parts)[: len(labels)], turned,
                figures.lifting_kernels(run.model.network, run.variables, run.shape), run.about)


def page(runs: Sequence[Seen]) -> str:
    """The whole file."""
    title = f"Report of {len(runs)} run{'s' * (len(runs) > 1)}"
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>", f"<meta {CLOSED}>",
             f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style><h1>{title}</h1>", _summary(runs)]
    if turned := [run for run in runs if run.angles is not None]:
        parts += ["<h2>Accuracy over 360°</h2>", _picture(over_angles(turned), "accuracy against the angle")]
    for title, draw in {
        "Curves": lambda run: figures.curves(run.history),
        "Confusion": lambda run: figures.confusion_matrix(_confusion(run), run.classes),
        "Worst mistakes": mistakes,
        "Logits of one image over 360°": one_turned,
        "Stencils of the first layer": lambda run: None if run.kernels is None else figures.stencils(run.kernels),
    }.items():
        parts.append(_beside(title, runs, [_picture(draw(run), title) for run in runs]))
    records = [run.about["record"] for run in runs]
    parts.append(_beside("Config", runs, [_data(record["config"] | {"network": record["network"]}) for record in records]))
    surroundings = ("devices", "host", "commit", "versions", "environment")
    parts.append(_beside("Environment", runs, [_data({key: run.result.get(key) for key in surroundings}) for run in runs]))
    return "\n".join(parts) + "</html>\n"


def _beside(title, runs, contents):
    cells = "".join(f"<div><h3>{_text(run.name)}</h3>{content}</div>" for run, content in zip(runs, contents, strict=True))
    return f"<h2>{title}</h2><section>{cells}</section>"


def _summary(runs):
    rows = {"": lambda run: run.name, "test error": lambda run: f"{run.result['test_error']:.2%}",
            "95 % interval": lambda run: "{:.2%} to {:.2%}".format(*measures.interval(_wrong(run), len(run.labels))),
            "test images": lambda run: len(run.labels), "data": lambda run: f"{run.result['dataset']}",
            "provenance": lambda run: run.result["dataset_note"], "parameters": lambda run: run.result["parameters"],
            "epochs": lambda run: len(run.history),
            "training": lambda run: f"{sum(line['seconds'] for line in run.history):.0f} s",
            "devices": lambda run: run.result.get("devices"), "commit": lambda run: run.result.get("commit")}
    return "<table>" + "".join(f"<tr><th>{name}</th>" + "".join(f"<td>{_text(value(run))}</td>" for run in runs) + "</tr>"
                               for name, value in rows.items()) + "</table>"


def over_angles(runs: Sequence[Seen]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        right = (run.angles.argmax(-1) == run.labels[: run.angles.shape[1]]).mean(1)
        axes.plot(np.linspace(0, 360, len(right)), 100 * right, marker=".", label=run.name)
    return _angles(axes, f"correct of at most {TURNED} test images, %")


def one_turned(run: Seen) -> Figure | None:
    """The logits of the first test image that is recognised, for each class."""
    if run.angles is None:
        return None
    first = int((run.angles[0].argmax(-1) == run.labels[: run.angles.shape[1]]).argmax())
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for k in np.argsort(-run.angles[0, first])[:10]:  # the likeliest classes
        axes.plot(np.linspace(0, 360, len(run.angles)), run.angles[:, first, k], label=run.classes[k],
                  linewidth=2.5 if k == run.labels[first] else 1)
    return _angles(axes, f"logit; the class is {run.classes[run.labels[first]]}")


def _angles(axes, words):
    axes.set(xlabel="turn of the image, degrees", ylabel=words, xticks=range(0, 361, 45))
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    return axes.figure


def mistakes(run: Seen) -> Figure | None:
    """The test images whose class has the smallest probability."""
    given = run.probabilities[np.arange(len(run.labels)), run.labels]
    wrong = [k for k in np.argsort(given)[:WORST] if run.probabilities[k].argmax() != run.labels[k]]
    if run.images.ndim != 4 or run.images.shape[-1] not in (1, 3) or not wrong:
        return None
    figure = Figure(figsize=(7, 2.2 * -(-len(wrong) // 4)), layout="constrained")
    for axes, k in zip(np.ravel(figure.subplots(-(-len(wrong) // 4), 4, squeeze=False)), [*wrong, *[None] * (-len(wrong) % 4)],
                       strict=True):
        axes.axis("off")
        if k is not None:
            axes.imshow(np.clip(run.images[k].squeeze(-1) if run.images.shape[-1] == 1 else run.images[k], 0, 1), cmap="gray")
            answer = run.probabilities[k].argmax()
            axes.set_title(f"{run.classes[run.labels[k]]} ({given[k]:.0%})\ntaken for {run.classes[answer]} "
                           f"({run.probabilities[k, answer]:.0%})", fontsize=8)
    return figure


def _confusion(run):
    counts = np.zeros((len(run.classes), len(run.classes)), int)
    np.add.at(counts, (run.labels, run.probabilities.argmax(-1)), 1)
    return counts


def _wrong(run):
    return int((run.probabilities.argmax(-1) != run.labels).sum())


def _picture(figure: Figure | None, words: str) -> str:
    if figure is None:
        return "<p>none</p>"
    figure.savefig(file := io.BytesIO(), format="png", dpi=110)
    return f"<img alt='{_text(words)}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def _data(value) -> str:
    lines = json.dumps(value, indent=1, ensure_ascii=False)
    matrix = r"\[(?:[^][{}\"]|\[[^][{}\"]*\])*\]"  # numbers, or lists of them: in one line
    return f"<pre>{_text(re.sub(matrix, lambda numbers: ' '.join(numbers[0].split()), lines))}</pre>"


def _text(value) -> str:
    return html.escape("–" if value is None else str(value))


if __name__ == "__main__":
    program(main, "nothing was written")
