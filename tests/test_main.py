"""The command line, and what it sets up for the process."""

import csv
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from small_runs import ROOT, write_config

import pdo_jax as pdo
from experiments import main, saved


def test_the_command_line_trains_evaluates_and_predicts(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saved, "ANGLES", 50)
    write_config(Path("small.py"), "", epochs="1")
    assert main.main(["--config", "small.py", "--set", "seed=3"]) == 0
    output = capsys.readouterr().out
    workdir = "runs/small-seed=3"
    result = json.loads(Path(workdir, "result.json").read_text())
    assert f"test error: {result['test_error']:.2%} of 1000 images" in output and "curves.png" in output
    for path in (workdir, f"{workdir}/checkpoints", f"{workdir}/checkpoints/1"):
        assert main.main(["--evaluate", path]) == 0
        output = capsys.readouterr().out
        assert f"epoch 1: test error {result['test_error']:.2%} of 1000 images (" in output and "95 %) on mnist" in output
        assert "accuracy on the first 50 of them at 24 angles" in output
    confusion = np.array([line.split()[1:] for line in output.splitlines()[3:13]], int)
    assert confusion.sum() == 1000 and 1 - np.trace(confusion) / 1000 == pytest.approx(result["test_error"])

    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save("digit.png")
    Image.fromarray(np.stack([pixels] * 3, -1)).resize((56, 56), Image.Resampling.NEAREST).save("colour.png")
    config, model, variables, _, _ = saved.load(workdir)
    expected = jax.nn.softmax(model.outputs(variables, pixels[None, :, :, None] / np.float32(255), train=False))[0]
    for image in ("digit.png", "colour.png"):
        classes, predicted = saved.predict(workdir, [image])
        np.testing.assert_allclose(next(predicted)[1], expected, rtol=1e-4)
        assert classes == list("0123456789")
        assert main.main(["--workdir", workdir, "--predict", image]) == 0
        assert f"class {expected.argmax()}: {expected.max():.4f}" in capsys.readouterr().out.splitlines()[0]

    Path("many/deep").mkdir(parents=True)
    turned = [np.rot90(pixels, k) for k in range(3)]
    for k, image in enumerate(turned):
        Image.fromarray(image).save(f"many/deep/{k}.png")
    Path("many/9.png").write_text("not an image")
    monkeypatch.setattr("sys.stdin", io.StringIO("many/deep/0.png\nmany\n"))
    order = [0, 0, 1, 2]  # the first one, and the folder
    assert main.main(["--workdir", workdir, "--format", "csv", "--predict", "-"]) == 2
    output, errors = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(output)))
    assert [row["file"] for row in rows] == [f"many/deep/{k}.png" for k in order]
    assert "9.png is not an image" in errors and "1 of 5 files could not be read" in errors
    assert main.main(["--workdir", workdir, "--format", "jsonl", "--predict", "many/deep", "digit.png"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    logits = model.outputs(variables, np.stack([*turned, pixels])[..., None] / np.float32(255), train=False)
    for line, p in zip(lines, np.asarray(jax.nn.softmax(logits)), strict=True):
        np.testing.assert_allclose([line["probabilities"][str(k)] for k in range(10)], p, rtol=1e-3, atol=1e-5)
        assert line["class"] == str(p.argmax())
    assert [row["class"] for row in rows] == [lines[k]["class"] for k in order]

    assert main.main(["--export", workdir, "small.safetensors"]) == 0
    network, exported = pdo.export.load("small.safetensors")
    logits = network.apply(exported, pixels[None, :, :, None] / np.float32(255))
    np.testing.assert_allclose(jax.nn.softmax(logits)[0], expected, rtol=1e-4)

    Path("text.png").write_text("not an image")
    for arguments, message in [
        (["--predict", "digit.png"], "--predict needs a trained run"),
        (["--workdir", workdir, "--predict", "none.png"], "cannot read the image none.png: No such file"),
        (["--workdir", workdir, "--predict", "text.png"], "text.png is not an image file"),
        (["--workdir", workdir, "--predict", "/dev/null"], "cannot read the image /dev/null: it is no file, but"),
        (["--workdir", workdir, "--format", "csv"], "--format is for --predict"),
        (["--evaluate", "elsewhere"], "elsewhere is no folder of a run"),
        (["--evaluate", f"{workdir}/checkpoints/7"], "has no checkpoint 7; it has those of the epochs [1]"),
        (["--evaluate", workdir, "--config", "small.py"], "They differ in\n  seed: 3 there, 0 here"),
        (["--config", "none.py"], "no config file none.py"),
        (["--config", "small.py", "--set", "epoch=3"], "did you mean 'epochs'?"),
    ]:
        assert main.main(arguments) == 2
        assert message in capsys.readouterr().err
    Path("small.py").write_text("raise SystemExit('executed')")
    assert main.main(["--evaluate", workdir]) == 0, "the run is read as data, its config file is not executed"


def test_process_settings_apply_on_a_cpu_and_leave_what_the_user_set():
    settings = main.process_settings({}, accelerators=[])
    assert settings["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert settings["JAX_COMPILATION_CACHE_DIR"].endswith(".cache/pdo_jax/jax-cache")
    assert main.process_settings(settings, accelerators=[]) == {}, "once set, the process must not start again"
    assert main.process_settings({"GLIBC_TUNABLES": "", "JAX_COMPILATION_CACHE_DIR": "/x"}, []) == {}
    assert set(main.process_settings({}, ["/dev/nvidia0"])) == {"JAX_COMPILATION_CACHE_DIR"}
    assert set(main.process_settings({"JAX_PLATFORMS": "cuda,cpu"}, [])) == {"JAX_COMPILATION_CACHE_DIR"}
    assert "GLIBC_TUNABLES" in main.process_settings({"JAX_PLATFORMS": "cpu"}, ["/dev/nvidia0"])


def test_process_settings_take_effect(tmp_path):
    """The program starts again with them."""
    (tmp_path / "c.py").write_text('import os\nraise RuntimeError(os.environ.get("GLIBC_TUNABLES"))\n')
    environment = {name: value for name, value in os.environ.items() if name not in main.LARGE_PAGES} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.main", "--config", str(tmp_path / "c.py")]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "glibc.malloc.hugetlb=1" in ended.stderr, ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc_trim is there on Linux alone")
def test_memory_that_a_long_compilation_freed_is_given_back(monkeypatch):
    trims, listeners, events = [], [], []
    monkeypatch.setattr(main.ctypes, "CDLL", lambda name: types.SimpleNamespace(malloc_trim=trims.append))
    monkeypatch.setattr(main, "gc", mock.Mock())
    with monkeypatch.context() as patched:
        patched.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
        main.spare.__wrapped__()
    record = lambda event, seconds, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(record)
    jax.jit(lambda x: 3 * x).lower(1.0).compile()
    jax.monitoring.unregister_event_duration_listener(record)
    for seconds, expected in ((0.5, []), (9, [0])):
        for event in events:
            listeners[0](event, seconds, fun_name="step")
        assert trims == expected, events
