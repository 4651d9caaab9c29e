"""The ledger: rows are trained, resumed and stopped; its table is made of the recorded results and of nothing else."""

import json
from pathlib import Path

import pytest
from small_runs import write_config

from experiments import config, reproduce, train
from experiments.reproduce import RESULTS, ROWS, Row, main


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two rows, of small networks: "two" of two seeds, and "gone", whose data cannot be had."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    (tmp_path / "configs").mkdir()
    write_config(tmp_path / "configs" / "small.py", "", epochs="2")
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    rows = {"gone": Row("small", ("dataset=nowhere",), 1, "never"), "two": Row("small", ("l2=0.5",), 2, "a small one")}
    monkeypatch.setattr(reproduce, "ROWS", rows)


def test_rows_are_trained_stopped_resumed_and_written_down(rows, tmp_path, monkeypatch, capsys):
    """A row that fails does not keep the next from running; what is recorded is not trained again."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(train, "time_for_more", lambda began, minutes, history, compiles: len(history) < 1)
        assert main(["two", "--minutes", "9", "--out", str(out)]) == 0
    assert "stopped before the time was over" in capsys.readouterr().err and not list(out.glob("*.json"))
    assert main(["--out", str(out)]) == 2
    assert "error: gone, seed 0: unknown data set 'nowhere'" in capsys.readouterr().err
    results = [json.loads((out / f"two_seed{seed}.json").read_text()) for seed in (0, 1)]
    assert [result["config"]["seed"] for result in results] == [0, 1] and results[0]["config"]["l2"] == 0.5
    assert str(tmp_path) not in json.dumps(results) and "figures/curves.png" in results[0]["figures"]
    lines = (out / "runs" / "two-seed0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    line = (out / "README.md").read_text().splitlines()[-2]
    mean = 50 * sum(result["test_error"] for result in results)
    assert line.startswith("| `two`: a small one | mnist_rot/subset | ") and f"| 2 | {mean:.1f} ± " in line
    with monkeypatch.context() as patched:
        patched.setattr(train, "train", lambda *args, **kwargs: pytest.fail("trained again"))
        assert main(["two", "--out", str(out)]) == 0


def test_no_time_means_no_training(rows, tmp_path):
    assert main(["two", "--minutes", "0", "--out", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("*.json"))


def test_an_unknown_row_is_named(capsys):
    assert main(["mnist"]) == 2
    assert "no row 'mnist'; the rows are " in capsys.readouterr().err
    assert main(["mnist_rot_small_escnn"]) == 2
    assert "mnist_rot_small_escnn is not trained here: escnn's C8" in capsys.readouterr().err


def test_the_ledger_is_made_of_the_results():
    """experiments/README.md holds the table that the files give, and every recorded run stands in a row."""
    text = reproduce.README.read_text()
    assert text.count(reproduce.BEGIN + reproduce.table(RESULTS) + reproduce.END) == 1
    files = {f"{row}_seed{seed}.json" for row in ROWS for seed in range(ROWS[row].seeds)}
    assert {path.name for path in RESULTS.glob("*_seed*.json")} <= files
    for row in filter(lambda row: row.config, ROWS.values()):
        config.load(reproduce.HERE / "configs" / f"{row.config}.py", row.overrides)
