"""The results of `experiments.benchmark` as Markdown tables and a figure."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from experiments.measures import fitted_slope


def milliseconds(row: Mapping) -> str:
    """Median (least – most), or why there is none."""
    if "note" in row:
        return row["note"]
    return "{:.3g} ({:.3g} – {:.3g})".format(*(1e3 * row[name] for name in ("median", "min", "max")))


def number(key: str, form: str = ".3g", scale: float = 1) -> Callable[[Mapping], str]:
    return lambda row: format(row[key] * scale, form)


COMPILATION = ("trace", "lower", "compile")
PROGRAM = {"program": lambda row: row["program"], "mode": lambda row: row["mode"]}
COMPILED = {
    "parameters": number("parameters", ","),
    "trace + lower + compile, s": lambda row: " + ".join(f"{row[f'{step}_seconds']:.2f}" for step in COMPILATION),
    "GFLOP, estimate": number("flops", scale=1e-9),
    "GB moved, estimate": number("bytes", scale=1e-9),
    "program memory, MB": number("memory_bytes", ".0f", 1e-6),
}
TIME = {"ms: median (least – most)": milliseconds, "time / ours": number("ratio", ".2f")}
RATE = {"examples/s": number("examples_per_second", ",.0f")}
COLUMNS = {
    "layers": PROGRAM | COMPILED | TIME | {
        "dense-equivalent GFLOP/s": number("dense_flops_per_second", ".0f", 1e-9), "of the peak": number("of_peak", ".0%")},
    "steps": {"program": PROGRAM["program"]} | COMPILED | {"peak of the process, MB": number("peak_bytes", ".0f", 1e-6)}
    | TIME | RATE,
    "inference": PROGRAM | COMPILED | TIME | RATE,
    "construct": {
        "what": lambda row: row["case"], "dtype": lambda row: row["dtype"],
        "import, s": number("import_seconds", ".2f"), "without jax and flax": number("own_import_seconds", ".2f"),
        "construct + trace, s": lambda row: format(row["construct_seconds"] + row["trace_seconds"], ".2f"),
        "lower, s": number("lower_seconds", ".2f"), "compile, s": number("compile_seconds", ".2f"),
        "initialise, s": number("initialise_seconds", ".2f"),
        "first step, s": number("first_step_seconds", ".2f"), "peak of the process, MB": number("peak_bytes", ".0f", 1e-6)},
}
NOTES = {
    "layers": "5×5 layers between fields of p8, from and to the memory layout that the compiler chooses (torch: the faster of "
              "its two). \"training\" is forward and the gradients of input and weights. Dense-equivalent: counted as the "
              "dense convolution of equal channels; the peak is that of a square matrix product, measured in this run.",
    "steps": "Forward, backward and update, with dropout, without augmentation. The Flax CNNs and all U-Nets have 3×3 "
             "layers, the others 5×5. The peak is that of a process of its own while it trains.",
    "growth": "Forward and both gradients of one 5×5 layer, in ms, against the order N of the cyclic group; the slope is the "
              "exponent of N.",
    "inference": "MnistRotNet. Folded: batch norm merged, computed by the lowerings of the layers or as plain convolutions. "
                 "torch is the dense network of equal channels, its batch norm folded.",
    "construct": "In fresh processes without a compilation cache. \"Initialise\" compiles and runs that of the weights.",
}


def markdown(results: Mapping) -> str:
    """All of the results, a heading for each part."""
    about = results["surroundings"]
    lines = [
        f"Made by `{results['command']}`; medians of {results['runs']} runs, taken in turn, each behind an untimed one.", "",
        f"{results['processor']}, {about['host']}, load {results['load']:.1f} at the start; {about['devices']}; "
        f"commit {about['commit']}; "
        + ", ".join(f"{name} {version}" for name, version in {**about["versions"], **peer_versions(results)}.items()) + ".", "",
        "GFLOP and GB are estimates of XLA's compiler; program memory is arguments, results and temporaries as it plans them. "
        "\"time / ours\" is the median over that of `auto` (`folded` in inference): above 1 ours is faster, below 1 the "
        "other. Peak: " + ", ".join(f"{peak / 1e9:.0f} GFLOP/s {dtype}" for dtype, peak in results["peaks"].items()) + ".",
    ]
    if results["quick"]:
        lines[0] += " Tiny shapes (--quick): the numbers mean nothing."
    for part, rows in results["parts"].items():
        lines += ["", f"## {part}", "", NOTES[part], ""]
        if part in ("construct", "growth"):
            lines += [table(COLUMNS[part], rows) if part == "construct" else growth(rows)]
            continue
        for (case, dtype), group in groupby(rows, lambda row: (row["case"], row["dtype"])):
            lines += [f"**{case}, {dtype}**", "", table(COLUMNS[part], list(group)), ""]
    return "\n".join(lines).rstrip() + "\n"


def peer_versions(results: Mapping) -> dict[str, str]:
    found = (row.get("versions", {}) for rows in results["parts"].values() for row in rows)
    return {name: version for versions in found for name, version in versions.items()}


def table(columns: Mapping[str, Callable[[Mapping], str]], rows: Sequence[Mapping]) -> str:
    """A Markdown table; a cell whose row lacks what its column shows stays empty."""

    def cell(show, row):
        try:
            return show(row)
        except (KeyError, TypeError):  # not measured, or None: not known
            return ""

    lines = [list(columns), ["---"] * len(columns), *([cell(show, row) for show in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def growth(rows: Sequence[Mapping]) -> str:
    orders = list(dict.fromkeys(row["order"] for row in rows))
    columns = {"program": lambda row: row["program"], "dtype": lambda row: row["dtype"]}
    columns |= {f"N = {n}": lambda row, n=n: format(1e3 * row["seconds"][n], ".3g") for n in orders}
    return table(columns | {"slope": lambda row: row.get("note") or format(row["slope"], ".2f")}, slopes(rows))


def slopes(rows: Sequence[Mapping]) -> list[dict]:
    """For each dtype and program its median seconds by order, and the exponent of their growth or why there is none."""
    lines = {}
    for row in rows:
        key = row["dtype"], row["program"]
        line = lines.setdefault(key, {"dtype": key[0], "program": key[1], "seconds": {}})
        if "note" in row:
            line["note"] = row["note"]
        else:
            line["seconds"][row["order"]] = row["median"]
    for line in lines.values():
        if len(line["seconds"]) > 1:
            line["slope"] = fitted_slope(list(line["seconds"]), list(line["seconds"].values()))
    return list(lines.values())


def draw_growth(rows: Sequence[Mapping], path: Path):
    """Time against the order of the group, a panel for each dtype; nothing before there are two orders."""
    lines = [line for line in slopes(rows) if "slope" in line]
    panels = list(dict.fromkeys(line["dtype"] for line in lines))
    if not panels:
        return
    figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in lines:
            if line["dtype"] == dtype:
                orders, times = list(line["seconds"]), [1e3 * seconds for seconds in line["seconds"].values()]
                axes.loglog(orders, times, "-o", label=f"{line['program']}, slope {line['slope']:.2f}", markersize=4)
        axes.set(title=f"one layer, forward and backward, {dtype}", xlabel="order of the group", ylabel="milliseconds")
        axes.set_xticks(orders, map(str, orders), minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
