"""Hostile input of every kind ends in one line, before compute, and changes nothing; no file of a run is executed."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from test_train import Net, final_state, make_config, make_data, shift

from experiments import boundary, check, main, record, saved, together, train, workdir
from experiments.boundary import Refused
from experiments.config import ConfigError, load, make, piecewise, warmup_cosine
from experiments.datasets import SPLITS, DataError, Split, pictures, store
from experiments.workdir import TrainError

ROOT = Path(__file__).parents[1]


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
    return lambda epoch: value


class Renamed(Net):
    """A network with the fields of Net."""


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"l2": 0.5}, None, "l2: 0.01 there, 0.5 here"),
        ({"network": Net(dropout=0.5)}, None, r"network.dropout: 0.0 there, 0.5 here"),
        ({"network": Renamed()}, None, "network.network: Net there, Renamed here"),
        ({"learning_rate": make_rate(0.1)}, None, "learning_rate: "),
        ({"augment": shift}, None, "augment: nothing there, test_train.shift here"),
        ({}, changed_data(train=make_data().train._replace(labels=np.flip(make_data().train.labels))), "data.train: "),
        ({}, changed_data(test=make_data().validation), "data.test: "),
        ({}, changed_data(name="others"), "data.name: patterns there, others here"),
    ],
)
def test_a_run_of_something_else_is_refused_also_if_it_is_finished(run, changes, data, message):
    with pytest.raises(TrainError, match=f"another config(.|\n)*{message}"):
        train.train(make_config(**{"epochs": 2} | changes), run, data or make_data())


@pytest.mark.parametrize(("part", "key"), [("code", "test_train"), ("devices", "count"), ("versions", "jax")])
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
    (tmp_path / "my_base.py").write_text('"""Text."""\nimport my_deep\nRATE = 1\ndef rate(epoch):\n    return my_deep.X\n')
    (tmp_path / "my_deep.py").write_text("X = 0.1\n")
    file = tmp_path / "c.py"
    file.write_text("from my_base import rate\nfrom test_train import Net\nconfig = dict(network=Net(), learning_rate=rate)\n")
    source = {"file": str(file), "overrides": []}
    try:
        config = load(file)
        before = record.code(config, source)
        ours = {"experiments.programs", "experiments.train", "the config file"}
        assert {"my_base", "my_deep", "test_train"} | ours <= before.keys()
        assert not [name for name in before if name.partition(".")[0] in ("jax", "flax", "numpy", "json")]
        for edited, text, same in [
            ("my_base", '"""Other text."""\nimport my_deep\nRATE = 1  # note\ndef rate(epoch):\n    return my_deep.X\n', True),
            ("my_base", "import my_deep\nRATE = 2\ndef rate(epoch):\n    return my_deep.X\n", False),
            ("my_deep", "X = 0.2\n", False),
            (
                "c",
                "from my_base import rate\nfrom test_train import Net\nconfig = dict(network=Net(), l2=1)\n",
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
        ({"module": "test_train.Net", "fields": {"dtype": {"function": "os.system"}}}, None),
        ("evil.Net", None),
        ({"module": "test_train.Net", "fields": {"num_classes": 4}}, None),
        ({"module": "test_train.Net", "fields": {"num_classes": "x"}}, None),
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


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_prepared_data_set_that_names_a_class_imports_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    folder = tmp_path / "cifar10" / "1.0.0"
    folder.mkdir(parents=True)
    for features in (
        {"pythonClassName": "evil.Feature"},
        {"type": "evil.Feature", "content": {}},
        {"a": [{"pythonClassName": "evil.F"}]},
    ):
        (folder / "features.json").write_text(json.dumps(features))
        with pytest.raises(DataError, match="is damaged .features.json names evil.F.*delete that folder"):
            store.load("cifar10", data_dir=tmp_path)


# Damaged folders


DAMAGE = {
    "config.json": [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"record": 3}', b"[" * 100_000,
                    b'{"record": {}, "input": {}, "forced": []}'],
    "result.json": [b"", b"[]", b"{}", b'{"test_error": "x"}', b"\xff"],
    "metrics.jsonl": [b"\n\n", b"{}\n{}\n", b"[]\n[]\n", b"\xff\n", b'{"epoch": 2}\n' * 2],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name in DAMAGE for content in DAMAGE[name]], ids=lambda value: str(value)[:20]
)
def test_damaged_files_are_named(run, name, content):
    if name != "result.json":
        (run / "result.json").unlink()
    (run / name).write_bytes(content)
    with pytest.raises(TrainError, match=re.escape(str(run / name))) as caught:
        begun_again(run)
    assert len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 700
    if name == "config.json":
        with pytest.raises(TrainError, match=re.escape(str(run / name))):
            saved.load(run)


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
    about["record"]["network"] = {"module": "test_train.Net", "fields": {"num_classes": 5}}
    (run / "config.json").write_text(json.dumps(about))
    with pytest.raises(TrainError, match=r"of another shape \(params/Dense_1/bias \[3\] there, \[5\] here, ") as caught:
        saved.load(run)
    assert len(str(caught.value)) < 400


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


# Before compute


class Raises(Net):
    def __call__(self, x, train):
        raise ZeroDivisionError("on purpose")


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


class Volume(Net):
    def __call__(self, x, train):
        return super().__call__(x.sum(4), train)


class Image2(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x)


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        self.variable("cache", "x", jnp.zeros, ())
        return nn.Dense(3)(x.reshape(len(x), -1))


class Text(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        nn.Dense(3)(x.reshape(len(x), -1))
        return "text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": Raises()}, r"the network Raises on images \[16, 4, 4, 1\] fails: ZeroDivisionError: on purpose"),
        ({"network": NoTrain()}, "the network NoTrain on images .* fails: TypeError: .*train"),
        ({"network": Volume()}, "the network Volume on images .* fails: "),
        ({"network": Image2()}, r"gives float32\[16, 4, 4, 3\] for images .*; expected float logits \[16, 3\]"),
        ({"network": Text()}, "the network Text on images .* fails: TypeError"),
        ({"network": Stateful()}, "has variables 'cache'; only params and batch_stats are kept"),
        ({"network": Net(num_classes=4)}, "the network has 4 classes, patterns has 3"),
        ({"augment": lambda key, x: x[:, 1:]}, r"augment gives float32\[16, 3, 4, 1\] for images float32\[16, 4, 4, 1\]"),
        ({"augment": lambda key, x: "text"}, "augment on images .* fails: TypeError: .* returned a value of type .*str"),
        ({"augment": lambda x: x}, "augment on images .* fails: TypeError"),
        ({"augment": lambda key, x: np.asarray(x)}, "augment on images .* fails: TracerArrayConversionError"),
        ({"optimizer": lambda rate: rate}, "optimizer gives .*; expected an optax transformation"),
        ({"optimizer": optax.adam(0.1).update}, "optimizer fails: TypeError"),
        ({"learning_rate": lambda epoch: "fast"}, "learning_rate fails: TypeError"),
        ({"learning_rate": lambda epoch: jnp.ones(2)}, r"learning_rate gives float32\[2\]; expected one number"),
        ({"learning_rate": lambda epoch: 1 / 0}, "learning_rate fails: ZeroDivisionError"),
        ({"learning_rate": lambda epoch: 1.0 - epoch}, "learning_rate is -.* at epoch 1.*; it must be finite and at least 0"),
        ({"learning_rate": lambda epoch: 0.0 * epoch}, "learning_rate is 0 over all of the run"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0 at epoch 0"),
        (
            {"learning_rate": partial(piecewise, {1: 0.1})},
            "piecewise takes .* rising epochs, the first of them 0, got {1: 0.1}",
        ),
        ({"learning_rate": partial(piecewise, {0: 1, 9: 2, 5: 3})}, "piecewise takes .* rising epochs"),
        ({"learning_rate": partial(piecewise, {})}, "piecewise takes"),
        ({"learning_rate": partial(warmup_cosine, 0.1, 5, 3)}, "a warm-up of more than 0 epochs and less than all, got 5 of 3"),
        ({"batch_size": 71}, "batch_size is 71; the train set has 70 images only"),
    ],
)
def test_what_would_fail_later_fails_before_compute_and_leaves_no_run(tmp_path, changes, message):
    with pytest.raises((TrainError, ConfigError), match=message) as caught:
        train.train(make_config(**changes), tmp_path / "run", make_data())
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def split(images, labels):
    return Split(np.asarray(images), np.asarray(labels))


GOOD = make_data().train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": split(GOOD.images, GOOD.labels + 1)}, "labels from 1 to 3; with 3 classes they must lie in 0 … 2"),
        ({"test": split(GOOD.images, GOOD.labels - 1)}, "the test set of patterns has labels from -1"),
        ({"train": split(GOOD.images, GOOD.labels.astype(float))}, "labels of type float64; give whole numbers from 0 to 2"),
        ({"train": split(GOOD.images, GOOD.labels[:-1])}, r"images \(70, 4, 4, 1\) and labels \(69,\)"),
        ({"train": split(GOOD.images.astype(int), GOOD.labels)}, "images of type int64; give bytes .* or floats in"),
        ({"train": split(GOOD.images * np.nan, GOOD.labels)}, "numbers that are not finite"),
        ({"test": split(GOOD.images[:0], GOOD.labels[:0])}, "the test set of patterns is empty"),
        ({"test": split(GOOD.images[:, 1:], GOOD.labels)}, "several shapes"),
        ({"train": split([["x"]], [0])}, "expected .n, .space, channels"),
        ({"num_classes": 0}, "num_classes 0; expected a whole number of at least 1"),
    ],
)
def test_data_that_cannot_be_trained_on_are_named(tmp_path, changes, message):
    with pytest.raises(TrainError, match=message):
        train.train(make_config(), tmp_path / "run", changed_data(**changes))


def test_bytes_are_trained_on_and_predicted_in_one_range(tmp_path):
    """uint8 images count as value / 255, as a picture that is asked for does; other ranges are not asked for pictures."""
    data = make_data()
    as_bytes = {
        name: split(np.round(getattr(data, name).images * 255).astype(np.uint8), getattr(data, name).labels)
        for name in SPLITS
    }
    checked = check.data(data._replace(**as_bytes))
    assert checked.train.images.dtype == np.float32 and checked.train.images.max() <= 1
    np.testing.assert_array_equal(checked.test.images, as_bytes["test"].images / np.float32(255))
    wide = {name: split(3 * getattr(data, name).images - 1, getattr(data, name).labels) for name in SPLITS}
    train.train(make_config(epochs=1), tmp_path / "run", data._replace(**wide))
    with pytest.raises(TrainError, match="trained on numbers from -.*, and a picture has 0 to 1"):
        saved.predict(tmp_path / "run", ["any.png"])


@pytest.mark.parametrize("values", [{"seed": 2**32}, {"eval_batch_size": 2**40}, {"epochs": 10**12}, {"batch_size": 2**33}])
def test_sizes_and_seeds_are_bounded(values):
    with pytest.raises(ConfigError, match="it must be at most 4294967295"):
        make({"network": Net()} | values)


def test_a_huge_evaluation_batch_takes_no_more_than_the_split(tmp_path):
    config = make_config(epochs=1, eval_batch_size=10**9)
    assert train.train(config, tmp_path / "run", make_data())["images"]["test"] == 33


# Pictures


def picture(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_pictures_are_scaled_by_their_depth(tmp_path):
    """8 and 16 bits, floats and opaque alpha give the same numbers in [0, 1]."""
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    expected = grey[..., None] / np.float32(255)
    opaque = np.full_like(grey, 255)
    for path in (
        picture(tmp_path / "8.png", grey),
        picture(tmp_path / "16.png", grey.astype(np.uint16) * 257),
        picture(tmp_path / "f.tiff", (grey / 255).astype(np.float32)),
        picture(tmp_path / "a.png", np.stack([grey, grey, grey, opaque], -1)),
        picture(tmp_path / "la.png", np.stack([grey, opaque], -1)),
    ):
        np.testing.assert_allclose(pictures.read(path, (8, 8, 1)), expected, atol=1e-6, err_msg=path.name)
        assert pictures.read(path, (4, 2, 3)).shape == (4, 2, 3)


def bomb(path):
    """A PNG of 60 000 × 60 000 pixels in 100 bytes."""
    import struct
    import zlib

    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    return path


def test_pictures_without_one_meaning_are_refused_before_they_are_read(tmp_path):
    grey = np.full((8, 8), 9, np.uint8)
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "p.png").write_bytes(pickle.dumps(Evil()))
    os.mkfifo(tmp_path / "pipe")
    whole = picture(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.fromarray(grey), Image.fromarray(grey + 1)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((8, 8, 4), np.uint8), "CMYK").save(tmp_path / "c.tiff")
    for path, message in [
        (picture(tmp_path / "t.png", np.stack([grey, grey, grey, grey], -1)), "transparent in parts"),
        (picture(tmp_path / "big.tiff", np.full((8, 8), 7.0, np.float32)), "numbers outside 0 … 1"),
        (picture(tmp_path / "nan.tiff", np.full((8, 8), np.nan, np.float32)), "numbers outside 0 … 1"),
        (tmp_path / "c.tiff", "a picture in CMYK; save it in RGB"),
        (tmp_path / "two.gif", "holds 2 pictures"),
        (tmp_path / "cut.png", "cannot read the image"),
        (tmp_path / "x.eps", "is not an image file that can be read"),
        (tmp_path / "p.png", "is not an image file that can be read"),
        (tmp_path / "pipe", "it is no file, but a folder, a pipe or a device"),
        (Path("/dev/zero"), "it is no file"),
        (tmp_path, "it is no file"),
        (tmp_path / "none.png", "No such file"),
        (bomb(tmp_path / "bomb.png"), "has more than 50,000,000 pixels"),
    ]:
        with pytest.raises(DataError, match=message):
            pictures.read(path, (8, 8, 1))


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--evaluate r --predict x.png", "--evaluate and --predict do not go together"),
        ("--evaluate r --workdir r", "--workdir does not go with --evaluate"),
        ("--predict x.png", "--predict needs a trained run"),
        ("--evaluate r --minutes 3", "--minutes is for training"),
        ("--evaluate r --force-resume", "--force-resume is for training"),
        ("--evaluate r --set seed=1", "--set changes a config; with --evaluate name its file too"),
        ("--pack r f --config c.py", "--config does not go with --pack"),
        ("--minutes 0", "--minutes is 0.0; it must be a number above 0"),
        ("--minutes nan", "--minutes is nan"),
        ("--coordinator a:1", "--coordinator is for --distributed"),
        ("--timeout 3", "--timeout is for --distributed"),
        ("--distributed --coordinator a:1", "needs all of .*; there is no --num-processes"),
        ("--distributed --coordinator a --num-processes 2 --process-id 0", "it must be HOST:PORT"),
        ("--distributed --coordinator a:0 --num-processes 2 --process-id 0", "it must be HOST:PORT"),
        ("--distributed --coordinator a:1 --num-processes 2 --process-id 2", "--process-id is 2; with 2 processes"),
        ("--distributed --coordinator a:1 --num-processes 0 --process-id 0", "--num-processes is 0"),
        ("--distributed --coordinator a:1 --num-processes 2 --process-id 0 --timeout -1", "--timeout is -1.0"),
        ("--config none", "no config file none"),
        ("--config exits.py", "does not run: SystemExit: 3"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exits.py").write_text("import sys; sys.exit(3)")
    assert main.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and "Traceback" not in error


def test_a_config_file_needs_no_ending(tmp_path):
    (tmp_path / "c").write_text("from test_train import Net\nconfig = dict(network=Net())\n")
    assert load(tmp_path / "c").epochs == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TrainError("what to do"), 2, "error: what to do"),
        (OSError(28, "No space left on device", "x"), 2, "error: No space left on device: x"),
        (RuntimeError("Unable to initialize backend 'cuda': no"), 2, "error: JAX has no such devices here"),
        (MemoryError(), 2, "error: the memory does not suffice"),
        (KeyError("x"), 2, "error: KeyError: 'x' (where: "),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ],
)
def test_every_error_becomes_one_line_and_a_code(error, code, line, capsys):
    def fail():
        raise error

    assert boundary.guarded(fail) == code
    assert capsys.readouterr().err.startswith(line)


STARTS = [
    ({"JAX_PLATFORMS": "cuda"}, "", 2, "error: JAX has no such devices here"),
    ({"JAX_ENABLE_X64": "maybe"}, "", 2, "error: ValueError: invalid truth value 'maybe'"),
    ({"XLA_FLAGS": "--no_such_flag=1"}, "", 2, "error: XLA does not take XLA_FLAGS='--no_such_flag=1'"),
    ({}, "--workdir " + 300 * "x", 2, "File name too long"),
    ({}, "--config \udcff\udcfe", 2, "no config file"),
    ({}, "--help | true", None, ""),
    ({}, "--evaluate none >&-", 2, "error: "),
]


@pytest.mark.parametrize(("environment", "arguments", "code", "line"), STARTS, ids=range(len(STARTS)))
def test_a_bad_environment_is_told_in_one_line(tmp_path, environment, arguments, code, line):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    command = os.fsencode(f"{sys.executable} -m experiments.main {arguments}")
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    error = ended.stderr.decode(errors="replace")
    assert ended.returncode == code or code is None
    assert line in error and "Traceback" not in error and len(error.splitlines()) <= 1


# Processes that train together


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_processes_that_do_not_come_are_waited_for_no_longer_than_asked():
    address = ("127.0.0.1", free_port())
    for index, reason in ((0, "process 1 did not come"), (1, "refused")):
        with pytest.raises(Refused, match=f"process {index} cannot meet the others at .* within 0.5 s .*{reason}"):
            together.meet(address, 2, index, 0.5)


def test_a_stranger_at_the_port_is_sent_away_and_twins_are_told(monkeypatch):
    """Another program that connects changes nothing; a second process of one number ends both."""
    import threading
    import time

    address, errors = ("127.0.0.1", free_port()), {}

    def come(name, index, count):
        try:
            end = time.monotonic() + 5
            errors[name] = together._gather(address, 3, end) if index == 0 else together._connect(address, count, index, end)
        except (OSError, ValueError) as error:
            errors[name] = str(error)

    threads = [
        threading.Thread(target=come, args=arguments) for arguments in (("first", 0, 3), ("second", 1, 3), ("twin", 1, 3))
    ]
    threads[0].start()
    time.sleep(0.2)
    with socket.create_connection(address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(errors.values()) == {"process 1 is there twice"}
