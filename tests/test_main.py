"""The command line, and what it sets up for the process."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jaxlib
import numpy as np
import pytest
from PIL import Image
from test_train import ROOT, write_config

import pdo_jax as pdo
from experiments import main, saved


def test_the_command_line_trains_evaluates_and_predicts(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.chdir(tmp_path)
    write_config(Path("small.py"), "", epochs="1")
    assert main.main(["--config", "small.py", "--set", "seed=3"]) == 0
    output = capsys.readouterr().out
    workdir = "runs/small-seed=3"
    result = json.loads(Path(workdir, "result.json").read_text())
    assert f"test error: {result['test_error']:.2%} of 1000 images" in output and "curves.png" in output
    for path in (workdir, f"{workdir}/checkpoints", f"{workdir}/checkpoints/1"):
        assert main.main(["--evaluate", path]) == 0
        assert f"epoch 1: test error {result['test_error']:.2%} on mnist_rot/subset" in capsys.readouterr().out

    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save("digit.png")
    Image.fromarray(np.stack([pixels] * 3, -1)).resize((56, 56), Image.Resampling.NEAREST).save("colour.png")
    config, model, variables, _, _ = saved.load(workdir)
    expected = jax.nn.softmax(model.logits(variables, pixels[None, :, :, None] / np.float32(255), train=False))[0]
    for image in ("digit.png", "colour.png"):
        np.testing.assert_allclose(saved.predict(workdir, image), expected, rtol=1e-4)
        assert main.main(["--workdir", workdir, "--predict", image]) == 0
        assert f"class {expected.argmax()}: {expected.max():.4f}" in capsys.readouterr().out.splitlines()[0]

    assert main.main(["--export", workdir, "small.safetensors"]) == 0
    network, exported = pdo.export.load("small.safetensors")
    logits = network.apply(exported, pixels[None, :, :, None] / np.float32(255))
    np.testing.assert_allclose(jax.nn.softmax(logits)[0], expected, rtol=1e-4)

    Path("text.png").write_text("not an image")
    for arguments, message in [
        (["--predict", "digit.png"], "--predict needs a trained run"),
        (["--workdir", workdir, "--predict", "none.png"], "cannot read the image none.png: No such file"),
        (["--workdir", workdir, "--predict", "text.png"], "text.png is not an image file"),
        (["--workdir", workdir, "--predict", "."], "cannot read the image .: it is no file, but a folder"),
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


def test_process_settings_apply_on_a_cpu_and_leave_what_the_user_set(monkeypatch):
    monkeypatch.setattr(main, "CHECKED_JAXLIB", jaxlib.__version__)
    settings = main.process_settings({}, accelerators=[])
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    assert settings["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and settings["XLA_FLAGS"] == f"{flag}=individual_dot"
    assert settings["JAX_COMPILATION_CACHE_DIR"].endswith(".cache/pdo_jax/jax-cache")
    assert main.process_settings(settings, accelerators=[]) == {}, "once set, the process must not start again"
    given = {"GLIBC_TUNABLES": "", "XLA_FLAGS": f"{flag}=dot", "JAX_COMPILATION_CACHE_DIR": "/x"}
    assert main.process_settings(given, []) == {}
    more = main.process_settings({"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}, [])
    assert more["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=true {flag}=individual_dot"
    assert set(main.process_settings({}, ["/dev/nvidia0"])) == {"JAX_COMPILATION_CACHE_DIR"}
    assert set(main.process_settings({"JAX_PLATFORMS": "cuda,cpu"}, [])) == {"JAX_COMPILATION_CACHE_DIR"}
    assert "XLA_FLAGS" in main.process_settings({"JAX_PLATFORMS": "cpu"}, ["/dev/nvidia0"])
    monkeypatch.setattr(main, "CHECKED_JAXLIB", "0.9.")
    assert "XLA_FLAGS" not in main.process_settings({}, []), "an unknown flag would end the process"


@pytest.mark.skipif(not jaxlib.__version__.startswith(main.CHECKED_JAXLIB), reason="the flag may not exist in this jaxlib")
def test_process_settings_take_effect(tmp_path):
    """The program starts again with them, and XLA then leaves convolutions to its faster implementation."""
    (tmp_path / "c.py").write_text(
        "import os, jax, jax.numpy as jnp\n"
        "x, w = jnp.ones((32, 28, 28, 32)), jnp.ones((5, 5, 32, 32))\n"
        "layout = dict(dimension_numbers=('NHWC', 'HWIO', 'NHWC'))\n"
        "conv = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', **layout))\n"
        "text = conv.lower(x, w).compile().as_text()\n"
        'raise RuntimeError(f\'ynn={"ynn" in text} {os.environ.get("GLIBC_TUNABLES")}\')\n'
    )
    environment = {name: value for name, value in os.environ.items() if name not in main.LARGE_PAGES}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    theirs = f"{main.FAST_CONVOLUTIONS[0]}=individual_convolution"
    for flags, expected in (("", "ynn=False"), (theirs, "ynn=True")):
        command = [sys.executable, "-m", "experiments.main", "--config", str(tmp_path / "c.py")]
        ended = subprocess.run(
            command, cwd=ROOT, env=environment | {"XLA_FLAGS": flags}, capture_output=True, text=True
        )
        assert ended.returncode == 2 and f"{expected} glibc.malloc.hugetlb=1" in ended.stderr, ended.stderr


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
