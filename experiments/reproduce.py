"""Runs the rows of the ledger, in order, several seeds each, and writes the table of experiments/README.md.

    python -m experiments.reproduce [ROW …] [--minutes M] [--out DIR]

What has a result in DIR (default: experiments/results) is done; what was begun, in the folder runs here or in DIR/runs, goes
on; the rest is trained. With --minutes it stops at the end of an epoch before the time is over; the same command goes on later.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import boundary
from experiments.boundary import Refused
from experiments.main import program, spare

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
BEGIN, END = "<!-- from results/*.json, by python -m experiments.reproduce -->\n", "<!-- end -->\n"
HEAD = """| row | data | parameters | n | test error | wall time | device | commit |
|---|---|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    """A config file by its name, what `--set` changes in it, the number of seeds, from 0 on, and a few words.

    Without a config it is trained by a program of its own, which the words name."""

    config: str | None
    overrides: tuple[str, ...]
    seeds: int
    text: str


BFLOAT16 = ("dtype=bfloat16",)
ROWS = {
    "mnist_rot_best": Row("mnist_rot_best", (), 5, "`mnist_rot_wide`, its kernels factored, 12 epochs more"),
    "mnist_rot_small": Row("mnist_rot_small", (), 5, "p12, order 2, Gaussian derivatives, SiLU, 40 epochs, bfloat16"),
    "mnist_rot_small_relu": Row("mnist_rot_small_relu", (), 1, "the same with ReLU, wider Gaussians, a weaker L2"),
    "mnist_rot_large": Row("mnist_rot_large", (), 3, "the same with 20 channels"),
    "mnist_rot_wide": Row("mnist_rot_wide", (), 5, "12 channels, hard SiLU, half the rate, a weaker L2"),
    "mnist_rot_tapered": Row("mnist_rot_tapered", (), 3, "the same with 10 channels at first and 40 at last"),
    "mnist_rot_tapered_wide": Row("mnist_rot_tapered_wide", (), 2, "the same with 12 at first and 64 at last, dropout 0.3"),
    "mnist_rot_augmented": Row("mnist_rot_augmented", (), 3, "20 channels, rotations in training, 60 epochs"),
    "mnist_rot_augmented_small": Row("mnist_rot_augmented_small", (), 3, "the same with 12 channels"),
    "mnist_rot_deformed": Row("mnist_rot_deformed", (), 3, "p16 of six channels, rotations and small deformations in training"),
    "mnist_rot_deformed_wide": Row("mnist_rot_deformed_wide", (), 3, "the same with 12 channels of p12"),
    "mnist_rot_deformed_long": Row("mnist_rot_deformed_long", (), 3, "that in 60 epochs, half the rate, a weaker L2"),
    "mnist_rot_tapered_deformed": Row("mnist_rot_tapered_deformed", (), 3,
                                      "that with the widths of `mnist_rot_tapered`, dropout 0.1"),
    "mnist_rot_small_p16": Row("mnist_rot_small_p16", (), 5, "p16 and hard SiLU in the recipe of `mnist_rot_small`"),
    "mnist_rot_small_p16_low": Row("mnist_rot_small_p16_low", (), 1, "the same with half the rate, a weaker L2"),
    "mnist_rot_small_p4": Row("mnist_rot_small_p4", (), 3, "p4 in the recipe of `mnist_rot_small`"),
    "mnist_rot_small_cnn": Row("mnist_rot_small_cnn", (), 3, "plain CNN in the recipe of `mnist_rot_small`"),
    "mnist_rot_small_escnn": Row(None, (), 3, "escnn's C8 in that recipe, in float32, by `python -m experiments.rival`"),
    "cifar10_p6_60": Row("cifar10_p6_60", (), 1, "p6 ResNet-26, 60 epochs, bfloat16"),
    "cifar10_cnn_60": Row("cifar10_cnn_60", (), 1, "plain ResNet-26, the same recipe"),
    "cifar10_p6m_60": Row("cifar10_p6m_60", (), 1, "p6m ResNet-26, the same recipe"),
    "mnist_rot_h100_float32": Row("mnist_rot", (), 3, "p8, the paper's 200 epochs"),
    "mnist_rot_h100_bfloat16": Row("mnist_rot", BFLOAT16, 3, "the same in bfloat16"),
    "mnist_rot_bfloat16": Row("mnist_rot", BFLOAT16, 2, "the same on a CPU"),
    "mnist_rot_60": Row("mnist_rot_60", (), 1, "p8, 60 epochs, bfloat16"),
    "mnist_rot_20_float32": Row("mnist_rot_20", (), 3, "p8, 20 epochs"),
    "mnist_rot_20_bfloat16": Row("mnist_rot_20", BFLOAT16, 3, "the same in bfloat16"),
    "mnist_rot_cnn": Row("mnist_rot_cnn", (), 3, "plain CNN, 200 epochs"),
    "mnist_rot_cnn_60": Row("mnist_rot_cnn_60", (), 1, "plain CNN, 60 epochs"),
    "shapes3d_octahedral": Row("shapes3d_octahedral", (), 1, "the 24 rotations of the cube, volumes"),
    "shapes3d_icosahedral": Row("shapes3d_icosahedral", (), 1, "the 60 rotations of the icosahedron, volumes"),
    "shapes3d_cnn": Row("shapes3d_cnn", (), 1, "plain 3-D CNN"),
    "shapes3d_cnn_turned": Row("shapes3d_cnn", ("dataset=shapes3d/turned",), 1, "the same, trained on all rotations"),
    "flow_p4m": Row("flow_p4m", (), 1, "one step of turbulence, U-Net of p4m, 16 trajectories"),
    "flow_cnn": Row("flow_cnn", (), 1, "the same by a plain U-Net"),
    "flow_cnn_augmented": Row("flow_cnn_augmented", (), 1, "the same, turned at random in training"),
    "flow_cnn_wide": Row("flow_cnn_wide", (), 1, "plain U-Net of as many channels as p4m has orientations of them"),
    "flow_p4m_4": Row("flow_p4m_4", (), 1, "U-Net of p4m, 4 trajectories"),
    "flow_cnn_4": Row("flow_cnn_4", (), 1, "plain U-Net, 4 trajectories"),
    "flow_cnn_augmented_4": Row("flow_cnn_augmented_4", (), 1, "plain U-Net, turned at random, 4 trajectories"),
    "flow_p4m_64": Row("flow_p4m_64", (), 1, "U-Net of p4m, 64 trajectories"),
    "flow_cnn_64": Row("flow_cnn_64", (), 1, "plain U-Net, 64 trajectories"),
    "flow_cnn_augmented_64": Row("flow_cnn_augmented_64", (), 1, "plain U-Net, turned at random, 64 trajectories"),
    "flow_p8m": Row("flow_p8m", (), 1, "the same by a U-Net of p8m"),
    "flow_residual_p4m": Row("flow_residual_p4m", (), 1, "residual network of p4m, 16 trajectories"),
    "flow_residual_p8m": Row("flow_residual_p8m", (), 1, "residual network of p8m"),
    "flow_residual_cnn": Row("flow_residual_cnn", (), 1, "plain residual network"),
}
"""The ledger, first things first. The results of a row are the files ROW_seed0.json, ROW_seed1.json, …"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    spare()
    return boundary.guarded(lambda: work(options))


def work(options: argparse.Namespace):
    if unknown := [row for row in options.rows if row not in ROWS]:
        raise Refused(f"no row {unknown[0]!r}; the rows are {', '.join(ROWS)}")
    if foreign := [row for row in options.rows if not ROWS[row].config]:
        raise Refused(f"{foreign[0]} is not trained here: {ROWS[foreign[0]].text}")
    began, failed, out = time.monotonic(), [], options.out or RESULTS
    runs = out / "runs" if options.out else Path("runs")
    out.mkdir(parents=True, exist_ok=True)
    for name, seed in missing(out, options.rows or [name for name, row in ROWS.items() if row.config]):
        minutes = options.minutes - (time.monotonic() - began) / 60
        boundary.say(f"{name}, seed {seed}")
        try:
            done = run(name, seed, out, runs, minutes)
        except Refused as error:
            boundary.say(f"error: {name}, seed {seed}: {error}")
            failed.append(f"{name}, seed {seed}")
            continue
        write_table(out)
        if not done:
            boundary.say("stopped before the time was over; the same command goes on")
            break
    write_table(out)
    if failed:
        raise Refused(f"not run, for the reasons above: {'; '.join(failed)}")


def missing(out: Path, rows: Sequence[str]) -> list[tuple[str, int]]:
    """The rows and seeds without a result, in order."""
    return [(row, seed) for row in rows for seed in range(ROWS[row].seeds) if not _file(out, row, seed).exists()]


def run(name: str, seed: int, out: Path, runs: Path, minutes: float) -> bool:
    """Trains a row's seed to its end and writes its result; False if the time was over before."""
    from experiments import config, train, workdir

    file, overrides = HERE / "configs" / f"{ROWS[name].config}.py", [*ROWS[name].overrides, f"seed={seed}"]
    source = {"file": str(file), "overrides": overrides}
    result = train.train(config.load(file, overrides), runs / f"{name}-seed{seed}", source=source, minutes=minutes)
    if result is None:
        return False
    result["figures"] = [f"figures/{Path(figure).name}" for figure in result.get("figures", ())]
    workdir.write_json(_file(out, name, seed), result)
    return True


def write_table(out: Path):
    """Writes the table of all results in `out` into its README."""
    put(README if out == RESULTS else out / "README.md", BEGIN, table(out))


def put(readme: Path, begin: str, table: str):
    """Writes a table into a page, between the mark `begin` and the end's."""
    from experiments import workdir

    text = readme.read_text() if readme.exists() else "# Recorded runs\n\n" + begin + END
    before, _, rest = text.partition(begin)
    workdir.write_text(readme, before + begin + table + END + rest.partition(END)[2])


def table(out: Path) -> str:
    lines = []
    for name, row in ROWS.items():
        files = [file for seed in range(row.seeds) if (file := _file(out, name, seed)).exists()]
        if files:
            lines.append(_line(name, row, [json.loads(file.read_text()) for file in files]))
    return HEAD + "".join(lines)


def _line(name: str, row: Row, results: Sequence[dict]) -> str:
    def all_of(values):
        return ", ".join(dict.fromkeys(values))

    classes = "test_error" in results[0]
    errors = [100 * result["test_error"] if classes else result["test_loss"] for result in results]
    seconds = [round(max(result["wall_seconds"], result["train_seconds"])) for result in results]  # of all calls, or of one
    digits = (2 if results[0]["images"]["test"] > 2000 else 1) if classes else 3
    spread = f" ± {statistics.stdev(errors):.{digits}f}" if len(errors) > 1 else ""
    even = max(seconds) < 1.05 * min(seconds)
    cells = [
        f"`{name}`: {row.text}",
        all_of(result["dataset"] for result in results),
        all_of(f"{result['parameters']:,}".replace(",", " ") for result in results),
        str(len(results)),
        f"{statistics.mean(errors):.{digits}f}{spread} {'%' if classes else 'relative L2'}",
        f"{round(statistics.mean(seconds))} s" if even else f"{min(seconds)} – {max(seconds)} s",
        all_of(_device(result) for result in results),
        all_of((result["commit"] or "?")[:7] for result in results),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _device(result: dict) -> str:
    """ "2 CPU cores", from devices "1 x cpu, …" and host "2 cores, …"; "H100" from devices "1 x NVIDIA H100 80GB HBM3, …"."""
    kind = result["devices"].partition(" x ")[2].partition(",")[0]
    return f"{result['host'].partition(' ')[0]} CPU cores" if kind == "cpu" else kind.removeprefix("NVIDIA ").partition(" ")[0]


def _file(out: Path, row: str, seed: int) -> Path:
    return out / f"{row}_seed{seed}.json"


def parser() -> argparse.ArgumentParser:
    description = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser("python -m experiments.reproduce", description=description, allow_abbrev=False)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all; " + ", ".join(ROWS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop before so many minutes are over")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; default: experiments/results")
    return parser


if __name__ == "__main__":
    program(main, "the same command goes on from the last checkpoint")
