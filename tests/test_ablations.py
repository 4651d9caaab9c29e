"""The trials of the tables of choices: what they are trained on, of what size they are, and what becomes of their results."""

import importlib.util
import sys

import jax
import pytest

from experiments import ablations, config, programs, rival


def parameters(settings):
    model = programs.make_model(settings, [0.0], [1.0])
    state = jax.eval_shape(lambda: programs.new_state(settings, model, (28, 28, 1)))
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name", ablations.trials())
def test_a_trial_is_of_equal_size_and_leaves_digits_to_be_judged_by(name):
    """Choices within a sixth of the recipe's parameters; on 3 000 digits, or on as many as its name says."""
    trial = ablations.trials()[name]
    digits = 3_000 if trial.table == "choices" else int(trial.row[1])
    assert trial.config.validation == ablations.ALL - digits and trial.config.batch_size <= digits
    assert abs(parameters(trial.config) / parameters(config.make(ablations.BEST)) - 1) < 1 / 6


def test_the_tables_and_figures_of_what_was_found(tmp_path, monkeypatch):
    """Each result in its row and column, missing ones empty; what else stands in the page stays."""
    page = tmp_path / "README.md"
    page.write_text("before\n" + "".join(ablations.MARK.format(table) + "<!-- end -->\nafter\n" for table in ablations.TABLES))
    monkeypatch.setattr(ablations.reproduce, "README", page)
    monkeypatch.setattr(ablations, "FIGURES", tmp_path)
    found = {"error": 0.0223, "loss": 0.1, "train_error": 0.001, "parameters": 21142}
    ablations.write({"as it is": found, "frame: 11.25°": found | {"error": 0.03}, "plain CNN: 1000 digits": found})
    text = page.read_text()
    assert "| as it is |  | 21 142 | 2.23 % | 0.1000 | 0.10 % |\n| frame | 11.25° | 21 142 | 3.00 %" in text
    assert "| plain CNN |  |  | 2.2 % |  |  |\n" in text and text.count("after") == 2 and text.startswith("before")
    assert {file.name for file in tmp_path.glob("*.png")} == {"ablations.png", "digits.png"}


@pytest.mark.parametrize("command, line", [
    (["ablations", "choice"], "no table 'choice'; the tables are choices, digits"),
    (["rival", "--python", "absent"], "there is no Python at absent; give --python one that has torch and escnn"),
])
def test_a_command_that_cannot_be_run_is_one_line(command, line, monkeypatch, capsys):
    module = {"ablations": ablations, "rival": rival}[command[0]]
    monkeypatch.setattr(sys, "argv", command)
    assert module.main() == 2 and capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.skipif(importlib.util.find_spec("escnn") is not None, reason="this Python has escnn")
def test_another_python_without_escnn_is_one_line(monkeypatch, capsys):
    """What it said last is told; nothing is recorded."""
    monkeypatch.setattr(sys, "argv", ["rival", "--python", sys.executable, "--set", "dataset=mnist_rot/subset"])
    assert rival.main() == 2
    assert capsys.readouterr().err.endswith("has not trained escnn's network: ModuleNotFoundError: No module named 'escnn'\n")
