"""A run folder is data: what it is a run of, what is damaged in it, and that no file of it is executed."""

import functools
import json
import operator
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import Net, final_state, make_config, make_data, shift

from experiments import record, saved, train, workdir
from experiments.config import load
from experiments.datasets import DataError, store
from experiments.workdir import TrainError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two epochs on arrays of its own."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.train(make_config(epochs=2), folder, make_data())
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def begun_again(folder: Path, **changes):
    return train.train(make_config(**{"epochs": 2} | changes), folder, make_data())


# What a run is


def changed_data(**splits):
    return make_data()._replace(**splits)


def make_rate(value):
    return lambda epoch, epochs: value


class Renamed(Net):
    """A network with the fields of Net."""


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"epochs": 9}, None, "epochs: 2 there, 9 here"),
        ({"network": Net(dropout=0.5)}, None, r"network.dropout: 0.0 there, 0.5 here"),
        ({"network": Renamed()}, None, "network.network: Net there, Renamed here"),
        ({"learning_rate": make_rate(0.1)}, None, "learning_rate: "),
        ({"augment": shift}, None, "augment: nothing there, small_runs.shift here"),
        ({}, changed_data(train=make_data().train._replace(labels=np.flip(make_data().train.labels))), "data.train: "),
        ({}, changed_data(test=make_data().validation), "data.test: "),
        ({}, changed_data(name="others"), "data.name: patterns there, others here"),
    ],
)
def test_a_run_of_something_else_is_refused_also_if_it_is_finished(run, changes, data, message):
    with pytest.raises(TrainError, match=f"another config(.|\n)*{message}"):
        train.train(make_config(**{"epochs": 2} | changes), run, data or make_data())


@pytest.mark.parametrize(("part", "key"), [("code", "small_runs"), ("devices", "count"), ("versions", "jax")])
def test_other_code_devices_and_versions_are_refused_unless_forced(run, part, key, capsys):
    """What is forced stands in the config and in the result."""
    (run / "result.json").unlink()
    about = json.loads((run / "config.json").read_text())
    about["record"][part][key] = "other"
    about["record"]["versions"]["python"] = "3.0"
    (run / "config.json").write_text(json.dumps(about))
    with pytest.raises(TrainError, match=f"{part}.{key}(:| has changed)"):
        begun_again(run)
    result = train.train(make_config(epochs=2), run, make_data(), force=True)
    assert any(line.startswith(f"{part}.{key}") for line in result["forced"])
    assert "versions.python: 3.0 there" in capsys.readouterr().err
    assert record.read_config(run)["forced"] == result["forced"]
    assert begun_again(run)["forced"] == result["forced"] and "note" not in capsys.readouterr().err


def test_the_code_of_a_config_is_its_file_and_what_that_names(tmp_path, monkeypatch):
    """An edited constant, lambda or base file counts; a comment or a docstring does not."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_base.py").write_text('"""Text."""\nimport my_deep\nRATE = 1\ndef rate(at, of):\n    return my_deep.X\n')
    (tmp_path / "my_deep.py").write_text("X = 0.1\n")
    file = tmp_path / "c.py"
    file.write_text("from my_base import rate\nfrom small_runs import Net\nconfig = dict(network=Net(), learning_rate=rate)\n")
    source = {"file": str(file), "overrides": []}
    try:
        config = load(file)
        before = record.code(config, source)
        ours = {"experiments.programs", "experiments.train", "the config file"}
        assert {"my_base", "my_deep", "small_runs"} | ours <= before.keys()
        assert not [name for name in before if name.partition(".")[0] in ("jax", "flax", "numpy", "json")]
        for edited, text, same in [
            ("my_base", '"""Other text."""\nimport my_deep\nRATE = 1  # note\ndef rate(at, of):\n    return my_deep.X\n', True),
            ("my_base", "import my_deep\nRATE = 2\ndef rate(at, of):\n    return my_deep.X\n", False),
            ("my_deep", "X = 0.2\n", False),
            (
                "c",
                "from my_base import rate\nfrom small_runs import Net\nconfig = dict(network=Net(), l2=1)\n",
                False,
            ),
        ]:
            (tmp_path / f"{edited}.py").write_text(text)
            assert (record.code(config, source) == before) is same, text
            before = record.code(config, source)
    finally:
        for name in ("my_base", "my_deep"):
            sys.modules.pop(name, None)


def test_a_function_that_keeps_a_value_is_described_with_it():
    rates = [record.config_of(make_config(learning_rate=make_rate(value)))["config"]["learning_rate"] for value in (0.1, 0.2)]
    assert rates[0] != rates[1]


# A run folder that someone sent


def test_no_file_that_a_run_names_is_executed(run, tmp_path, monkeypatch, capsys):
    """Evaluation rebuilds the network from data; a hostile config.json builds nothing, and no pickle is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(
        "open('executed', 'w')\nimport flax.linen as nn\nclass Net(nn.Module): pass\nconfig = {}\n"
    )
    about = json.loads((run / "config.json").read_text())
    expected = saved.evaluate(run, data=make_data())
    for network, source in [
        (about["record"]["network"], {"file": str(tmp_path / "evil.py"), "overrides": []}),
        ({"module": "evil.Net", "fields": {}}, None),
        ({"module": "os.system", "fields": {}}, None),
        ({"module": "small_runs.Net", "fields": {"dtype": {"function": "os.system"}}}, None),
        ("evil.Net", None),
        ({"module": "small_runs.Net", "fields": {"num_classes": 4}}, None),
        ({"module": "small_runs.Net", "fields": {"num_classes": "x"}}, None),
    ]:
        about["record"]["network"], about["source"] = network, source
        (run / "config.json").write_text(json.dumps(about))
        if source:
            assert saved.evaluate(run, data=make_data()) == expected
        else:
            with pytest.raises(TrainError):
                saved.evaluate(run, data=make_data())
    assert not (tmp_path / "executed").exists() and "evil" not in sys.modules


def test_a_run_on_own_arrays_is_evaluated_on_them_or_not_at_all(run):
    with pytest.raises(TrainError, match="trained on arrays that were handed over.*name the config file"):
        saved.evaluate(run)
    with pytest.raises(TrainError, match="the test set of patterns here is not that of the run"):
        saved.evaluate(run, data=changed_data(test=make_data().validation))
    assert saved.evaluate(run, data=make_data())["test_error"] == json.loads((run / "result.json").read_text())["test_error"]


def test_a_prepared_data_set_that_names_a_class_imports_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    folder = tmp_path / "cifar10" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"name": "cifar10", "version": "1.0.0", "fileFormat": "array_record"}')
    for features in (
        {"pythonClassName": "evil.Feature"},
        {"type": "evil.Feature", "content": {}},
        {"a": [{"pythonClassName": "evil.F"}]},
    ):
        (folder / "features.json").write_text(json.dumps(features))
        for name, advice in (("cifar10", "; delete that folder"), ("tfds:cifar10", "")):
            with pytest.raises(DataError, match=f"features.json names 'evil.F.*is no feature of tensorflow-datasets.*{advice}"):
                store.load(name, data_dir=tmp_path)


# Damaged folders


DAMAGE = {
    "config.json": [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"record": 3}', b"[" * 100_000,
                    b'{"record": {}, "input": {}, "forced": []}'],
    "result.json": [b"", b"[]", b"{}", b'{"test_error": "x"}', b"\xff"],
    "metrics.jsonl": [b"\n\n", b"{}\n{}\n", b"[]\n[]\n", b"\xff\n", b'{"epoch": 2}\n' * 2, b"[" * 100_000 + b"\n\n"],
}  # fmt: skip
CHANGED = [  # one value of a whole file, by its path
    ("config.json", "input/shape/0", -1),
    ("config.json", "input/shape/0", True),
    ("config.json", "input/shape", ["4", 4, 1]),
    ("config.json", "input/deviation/0", float("nan")),
    ("config.json", "record/network", None),
    ("config.json", "record/data", "x"),
    ("config.json", "forced", [3]),
    ("result.json", "test_error", "x"),
    ("result.json", "images", {}),
    ("result.json", "figures", [3]),
    ("result.json", "parameters", 1.5),
    ("result.json", "equivariance_error", {"turn 90": "x"}),
]


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name in DAMAGE for content in DAMAGE[name]], ids=lambda value: str(value)[:20]
)
def test_damaged_files_are_named(run, name, content):
    damaged(run, name, content)


@pytest.mark.parametrize(("name", "place", "value"), CHANGED, ids=str)
def test_wrong_values_are_named(run, name, place, value):
    content = json.loads((run / name).read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in place.split("/")]
    functools.reduce(operator.getitem, parents, content)[last] = value
    damaged(run, name, json.dumps(content).encode())


def damaged(run, name, content):
    if name != "result.json":
        (run / "result.json").unlink()
    (run / name).write_bytes(content)
    with pytest.raises(TrainError, match=re.escape(str(run / name))) as caught:
        begun_again(run)
    assert len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 700
    if name == "config.json":
        with pytest.raises(TrainError, match=re.escape(str(run / name))):
            saved.load(run)


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl", "checkpoints/2/about/metadata"])
def test_pipes_are_not_waited_for(run, name):
    if name != "result.json":
        (run / "result.json").unlink()
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(TrainError, match=f"{re.escape(str(run / name))} is a pipe or device"):
        begun_again(run)
    if name in ("config.json", "checkpoints/2/about/metadata"):
        with pytest.raises(TrainError, match="is a pipe or device"):
            saved.load(run)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.json", "checkpoints"])
def test_nothing_is_written_through_a_link(run, name, tmp_path):
    (run / "result.json").unlink()
    (target := tmp_path / "target").write_text("mine")
    there = run / name
    there.rename(tmp_path / "aside")
    there.symlink_to(target)
    with pytest.raises(TrainError, match=f"{re.escape(str(there))} is a link; put the file itself in its place"):
        begun_again(run)
    assert target.read_text() == "mine"


def flip(path: Path, place: float = 0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore")  # of files that storage layers leave open behind an error
def test_flipped_bits_and_lying_names_of_checkpoints_are_refused(run):
    """In the files of numbers, and in the checksums; tests/chaos.py flips all of them."""
    (run / "result.json").unlink()
    config, checkpoint = make_config(epochs=2), run / "checkpoints" / "2"
    files = sorted((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for file in [*files[-2:], checkpoint / "about" / "metadata"]:
        good = file.read_bytes()
        flip(file)
        with pytest.raises(TrainError, match=re.escape(str(checkpoint))) as caught:
            final_state(run, config)
        assert len(str(caught.value)) < 800
        file.write_bytes(good)
    shutil.rmtree(checkpoint)
    (run / "checkpoints" / "1").rename(checkpoint)
    with pytest.raises(TrainError, match="is that of epoch 1; give the folder its own name again"):
        begun_again(run)


def test_a_checkpoint_of_another_network_says_what_is_missing_and_extra(run):
    about = json.loads((run / "config.json").read_text())
    about["record"]["network"] = {"module": "small_runs.Net", "fields": {"num_classes": 5}}
    (run / "config.json").write_text(json.dumps(about))
    with pytest.raises(TrainError, match=r"of another shape \(params/Dense_1/bias \[3\] there, \[5\] here, ") as caught:
        saved.load(run)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["²", "٣", "007", "9" * 50, "-1", "9.orbax-checkpoint-tmp-0"])
def test_other_folders_among_checkpoints_are_none(run, name):
    (run / "checkpoints" / name).mkdir()
    assert workdir.saved_epochs(run) == [1, 2]
    assert saved.load(run).epoch == 2
    with pytest.raises(TrainError, match=f"has no checkpoint {re.escape(name)}; it has those of the epochs .1, 2.$"):
        saved.load(run / "checkpoints" / name)


@pytest.mark.parametrize(
    "network",
    [
        {"module": "small_runs.Net", "fields": "x"},
        {"module": "small_runs.Net", "fields": {"dropout": {"module": "small_runs.Net", "fields": 3}}},
        {"module": "small_runs.Net", "fields": {"dropout": {"partial": {"function": "os.system"}, "arguments": ["id"],
                                                            "keywords": {"dict": []}}}},
        {"module": ["small_runs.Net"], "fields": {}},
        {"group": 3, "elements": "x"},
    ],
    ids=str,
)
def test_a_network_that_is_none_is_told_from_the_one_that_is_given(run, network):
    (run / "result.json").unlink()
    about = json.loads((run / "config.json").read_text())
    about["record"]["network"] = network
    (run / "config.json").write_text(json.dumps(about))
    for refused in (lambda: begun_again(run), lambda: saved.load(run, make_config(epochs=2)), lambda: saved.load(run)):
        with pytest.raises(TrainError, match="network|built|Net|fields"):
            refused()


def test_lost_checkpoints_do_not_erase_history(run):
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainError, match="tells of 2 epochs, but there is no checkpoint: put the checkpoints back"):
        begun_again(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_two_trainers_do_not_share_a_folder(run):
    with workdir.opened(run):
        with pytest.raises(TrainError, match=f"process {os.getpid()} on .* trains in .*; wait for it"):
            begun_again(run)
        assert saved.evaluate(run, data=make_data())
    assert begun_again(run)
