"""The benchmark on tiny shapes: what it runs, in which order, and how its tables come from the seconds."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

import pdo_jax as pdo
from experiments.benchmark import __main__ as command
from experiments.benchmark import cases, race, tables, timing
from experiments.benchmark.cases import QUICK, Task
from experiments.benchmark.race import Options
from experiments.benchmark.timing import Peer, PeerError, Program

SMALL = Task("cifar10_p8_wide", 2, (4, 4, 3), 2, {"widths": (1,), "blocks": 1, "kernel_size": 1})
SIZES = dataclasses.replace(QUICK, tasks={"MnistRotNet": QUICK.tasks["MnistRotNet"], "small": SMALL}, batches=(2,))
OPTIONS = Options(["small"], ["float32"], ["dense"], runs=2, sizes=SIZES)

FAKE = """
import json, sys
def answer(value):
    print(json.dumps(value), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    open(LOG, "a").write(f"{request.get('peer', 'peer')} {request['op']} {request.get('mode', '')}\\n")
    if request.get("peer") == "absent":
        answer({"error": "not installed"})
    elif request["op"] == "prepare":
        answer({"modes": ["forward", "other"], "layout": {"forward": "contiguous"}, "versions": {"peer": "1.2"}})
    elif request["mode"] == "forward":
        answer({"seconds": 0.25})
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A peer that speaks the protocol and writes down what it is asked; returns its log."""
    log = tmp_path / "log"
    (tmp_path / "fake.py").write_text(f"LOG = {str(log)!r}\n" + FAKE)
    monkeypatch.setattr(timing, "SERVER", tmp_path / "fake.py")
    return log


def programs(seconds: float, log=None) -> dict:
    def run():
        if log:
            with log.open("a") as file:
                file.write("ours\n")
        return seconds

    return {("auto", "forward"): Program(run, {"flops": 5.0})}


def measured(rows):
    """Every row is of a program that ran; returns (program, mode) of each."""
    for row in rows:
        assert row["min"] <= row["median"] <= row["max"] and len(row["seconds"]) == OPTIONS.runs and row["min"] > 0
        assert row["compile_seconds"] > 0 and row["memory_bytes"] > 0 and row["parameters"] > 0
    return [(row["program"], row["mode"]) for row in rows]


# Every part, once


def test_layers():
    """Each lowering and two plain convolutions, forward and training; the rate is that of the dense convolution's work."""
    (rows,) = race.layers(OPTIONS)
    names = ["auto", "dense", "Flax, equal channels", "Flax, equal parameters"]
    assert measured(rows) == [(name, mode) for name in names for mode in ("forward", "training")]
    auto, flax = rows[1], rows[5]
    assert auto["parameters"] == 9 * 8 and flax["parameters"] == 25 * 8**2 and rows[7]["parameters"] == 25 * 2**2
    assert auto["dense_flops_per_second"] == pytest.approx(3 * 2 * 25 * 8**2 * 2 * 6**2 / auto["median"])


def test_steps():
    """Steps of our network, alone and in a loop, and of plain CNNs of equal channels and parameters; memory is known."""
    (rows,) = race.steps(dataclasses.replace(OPTIONS, lowerings=[]))
    flax = ["Flax, equal channels", "Flax, equal parameters"]
    assert measured(rows) == [(name, "training") for name in [
        "auto", "auto, 2 steps in a loop", *[race.ALONE] * bool(pdo.compiler_options()), *flax]]
    assert rows[0]["peak_bytes"] > 5e7 and rows[0]["examples_per_second"] == 2 / rows[0]["median"]
    ours, equal = rows[0]["parameters"], rows[-1]["parameters"]
    assert ours == cases.count(cases.setting(SMALL, "float32").network, SMALL.shape) and 0.5 < equal / ours < 2
    assert cases.baselines(cases.setting(SMALL, "float32").network, SMALL.shape)["Flax, equal channels"].widths == (8,)


def test_inference():
    (rows,) = race.inference(OPTIONS)
    names = "folded", "plain convolutions", "not folded", "folded, 1 at a time", "not folded, 1 at a time"
    assert measured(rows) == [(name, "batch 2") for name in names]
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] == rows[1]["median"] / rows[0]["median"]


def test_the_command_keeps_whole_files_and_draws_growth(tmp_path, capsys, monkeypatch):
    """Tables, figure and JSON with versions, machine and command, written after each case; imports and first steps timed."""
    monkeypatch.setattr(command, "QUICK", dataclasses.replace(SIZES, tasks={"small": SMALL}))
    before = jax.config.jax_enable_compilation_cache
    arguments = ["--quick", "--parts", "growth,construct", "--dtypes", "float32", "--lowerings", "dense", "--runs", "1"]
    try:
        assert command.command([*arguments, "--out", str(tmp_path / "new")]) == 0
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    results = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    text = (tmp_path / "new" / "benchmark.md").read_text()
    assert text in capsys.readouterr().out and text == tables.markdown(results)
    assert results["command"].startswith("python -m experiments.benchmark --quick") and results["runs"] == 1
    assert {"devices", "host", "commit", "versions"} <= set(results["surroundings"]) and results["peaks"]["float32"] > 0
    assert (tmp_path / "new" / "growth.png").stat().st_size > 1000
    growth, (imports, first) = results["parts"]["growth"], results["parts"]["construct"]
    assert [(row["program"], row["order"]) for row in growth] == [(name, n) for n in (4, 6) for name in ("auto", "dense")]
    assert {line["program"] for line in results["slopes"] if "slope" in line} == {"auto", "dense"}
    assert imports["import_seconds"] > imports["own_import_seconds"] > 0
    assert all(first[f"{name}_seconds"] > 0 for name in ("construct", "trace", "compile", "initialise", "first_step"))
    assert first["peak_bytes"] > 5e7 and f" {first['compile_seconds']:.2f} | {first['initialise_seconds']:.2f} |" in text


def test_the_sizes_are_those_of_the_paper():
    """By default the widths are 56 to 640, and the networks those of the paper."""
    assert [8 * channels for channels, *_ in cases.FULL.layers] == [56, 184, 360, 640]
    assert list(cases.FULL.tasks) == ["MnistRotNet", "p6", "p6m", "p8", "p8_wide", "UNet"]
    tasks = (cases.FULL.tasks[name] for name in ("MnistRotNet", "p8_wide"))
    assert [cases.count(cases.setting(task, "float32").network, task.shape) for task in tasks] == [26747, 4591630]
    assert {name: task.batch for name, task in cases.LARGE.tasks.items()} == dict.fromkeys(cases.FULL.tasks, 128)


# Races


def test_programs_and_peers_run_in_turn(server):
    """Ours and each peer in every round, each once to warm up and once timed; only the modes that ours has are run."""
    rows = timing.race({"case": "c"}, programs(0.5, server), [{"peer": "torch"}], sys.executable, 3, "auto")
    prepare, *asked = server.read_text().splitlines()
    assert prepare == "torch prepare " and len(asked) == 3 * 2 * 2
    assert all(asked[k] == asked[k + 1] for k in range(0, 12, 2)), "two runs in a row"
    assert all({"ours", "peer run forward"} == set(asked[k : k + 4]) for k in range(0, 12, 4))
    ours, peer = rows
    assert peer["program"] == "torch" and peer["layout"] == "contiguous" and peer["versions"] == {"peer": "1.2"}
    assert ours["seconds"] == [0.5] * 3 and ours["flops"] == 5 and ours["ratio"] == 1
    assert peer["seconds"] == [0.25] * 3 and peer["ratio"] == 0.5, "where a peer wins, the ratio is below 1"


@pytest.mark.parametrize("backend, device", [("cpu", "cpu"), ("gpu", "cuda")])
def test_peers_run_on_the_kind_of_device_that_ours_run_on(monkeypatch, backend, device):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(timing, "race", lambda case, programs, requests, *rest: requests)
    options, torch = dataclasses.replace(OPTIONS, python="python"), {"peer": "torch"}
    assert options.race({}, {}, [torch]) == [torch | {"device": device}]
    assert OPTIONS.race({}, {}, [torch]) == [], "without a Python that has them, none"


def test_a_peer_that_is_not_there_does_not_end_the_run(server):
    rows = timing.race({}, programs(0.5), [{"peer": "absent"}, {"peer": "torch"}], sys.executable, 2, "auto")
    assert [row.get("note") for row in rows] == [None, "not installed", None] and rows[2]["ratio"] == 0.5
    assert tables.milliseconds(rows[1]) == "not installed"


def test_this_python_has_no_torch():
    """The server of the peers itself, in a Python without them."""
    request = cases.layer_case("torch", pdo.groups.cyclic(4), 1, 1, 5, "float32")
    try:
        import torch  # noqa: F401
    except ImportError:
        with pytest.raises(PeerError, match="not installed"):
            Peer(sys.executable, **request)
    else:
        pytest.skip("torch is installed here")


def test_a_peer_that_fails_says_so(server):
    """On the way: its row holds the message, and the others go on."""
    peer = Peer(sys.executable, peer="torch")
    peer.process.kill()
    with pytest.raises(PeerError, match="ended with code -9"):
        peer.run("forward")
    peer.close()
    calls = iter([1.0])

    def fails():
        for seconds in calls:
            return seconds
        raise PeerError("failed: out of memory")

    assert timing.in_turn([fails, lambda: 2.0, None], 2) == ["failed: out of memory", [2.0, 2.0], None]


def test_a_program_carries_its_state_and_counts_its_steps():
    """Donated arguments are not those of the caller; facts come from the compiler."""
    x = jnp.ones((64, 64))
    made = timing.program(jax.jit(lambda x, y: (x + y, x.sum()), donate_argnums=0), x, x, carry=True, steps=4)
    assert all(made.run() > 0 for _ in range(3)) and x.sum() == 64**2
    assert made.facts["flops"] >= 64**2 and made.facts["memory_bytes"] >= 2 * 64**2 * 4


def test_a_profile_is_written_for_each_program(tmp_path):
    timing.race({"case": "56 channels, 2 × 6"}, programs(0.5), [], sys.executable, 1, "auto", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "56_channels_2_6-auto-forward" and list(folder.rglob("*.xplane.pb"))


# Arithmetic


def test_medians_ratios_and_slopes():
    assert timing.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "seconds": [3.0, 1.0, 2.0]}
    rows = [{"program": name, "mode": mode, "median": m}
            for name, mode, m in [("auto", "a", 2.0), ("auto", "b", 4.0), ("other", "a", 3.0), ("other", "b", 1.0)]]
    assert [row["ratio"] for row in timing.with_ratios(rows, "auto")] == [1, 1, 1.5, 0.25]
    assert [timing.known(cost) for cost in (5.0, -1.0, None)] == [5.0, None, None], "-1: XLA does not know"
    assert tables.fitted_slope([4, 6, 8, 24], [5 * n**1.7 for n in (4, 6, 8, 24)]) == pytest.approx(1.7)
    growth = [{"dtype": "float32", "program": "auto", "order": n, "median": 1e-3 * n**2} for n in (4, 8)]
    growth.append({"dtype": "float32", "program": "torch", "order": 4, "note": "not installed"})
    auto, torch = tables.slopes(growth)
    assert auto["slope"] == pytest.approx(2) and auto["seconds"] == {4: 0.016, 8: 0.064} and "slope" not in torch
    text = tables.growth(growth)
    assert "| auto | float32 | 16 | 64 | 2.00 |" in text and "| torch | float32 |  |  | not installed |" in text


@pytest.mark.parametrize("target, width", [(1, 1), (13, 4), (12, 3), (20, 4)])
def test_the_matching_width_is_the_nearest(target, width):
    assert cases.matching_width(lambda width: width**2, target) == width


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts", "layer"], "unknown layer; choose from layers,steps,growth,inference,construct"),
        (["--dtypes", "float64"], "unknown float64; choose from float32,bfloat16"),
        (["--runs", "0"], "give at least 1"),
        (["--peers", "--peer-python", "/no/python"], "there is no Python at /no/python; give --peer-python"),
        (["--quick", "--networks", "p6"], "--quick has no p6; its networks are MnistRotNet,p8_wide"),
    ],
)
def test_errors_come_before_any_computation(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.command(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
