"""Configs: every key and value is checked, equal configs have equal descriptions, and the bundled files load."""

import json
import re
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

from experiments import config as configs
from experiments.baselines import MnistRotCNN, ResNetCNN
from experiments.config import Config, ConfigError, describe, load, make, piecewise, warmup_cosine

BUNDLED = sorted((Path(configs.__file__).parent / "configs").glob("[!_]*.py"))
PLAIN = "from experiments.baselines import MnistRotCNN\nconfig = dict(network=MnistRotCNN(), epochs=2)\n"


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_configs_load_and_say_how_to_run_them(path):
    assert isinstance(load(path), Config)
    assert f"python -m experiments.main --config experiments/configs/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown config key 'epoch'; did you mean 'epochs'"),
        ({"zzz": 3}, "unknown config key 'zzz'; the keys are network, dataset"),
        ({"epochs": "3"}, "epochs is '3' of type str; it must be int"),
        ({"epochs": 2.0}, "epochs is 2.0 of type float; it must be int"),
        ({"epochs": True}, "epochs is True of type bool; it must be int"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"batch_size": -128}, "batch_size is -128; it must be at least 1"),
        ({"l2": -1}, "l2 is -1.0; it must be at least 0.0"),
        ({"ema": 1}, "ema is 1.0; it must be below 1.0"),
        ({"ema": -0.1}, "ema is -0.1; it must be at least 0.0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must be below 1.0"),
        ({"l2": True}, "l2 is True of type bool; it must be float"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a finite number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast' of type str; it must be float or Callable"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of 'float32', 'bfloat16'"),
        ({"parallel": None}, "parallel is None; it must be one of 'jit', 'pmap'"),
        ({"scan": 1}, "scan is 1; it must be one of 'auto', True, False"),
        ({"scan": "false"}, "scan is 'false'; it must be one of 'auto', True, False"),
        ({"augment": "rotate"}, "augment is 'rotate' of type str; it must be Callable or None"),
        ({"network": "MnistRotNet"}, "network is 'MnistRotNet' of type str; it must be Module"),
        ({"network": MnistRotCNN}, "it must be Module"),
    ],
)
def test_wrong_keys_and_values_are_named(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make({"network": MnistRotCNN()} | values)


def test_a_config_without_network_is_refused():
    with pytest.raises(ConfigError, match="has no network"):
        make({"epochs": 3})


def test_overrides_are_literals_or_text(tmp_path):
    (tmp_path / "c.py").write_text(PLAIN)
    config = load(tmp_path / "c.py", ["scan=False", "l2=1", "dataset=cifar10", "data_dir=None", "learning_rate=2e-3"])
    assert (config.scan, config.l2, config.dataset, config.data_dir) == (False, 1.0, "cifar10", None)
    assert config.learning_rate == 2e-3 and config.epochs == 2
    assert load(tmp_path / "c.py", ["data_dir=/data/x=y"]).data_dir == "/data/x=y"
    assert load(tmp_path / "c.py", ["network.num_classes=3"]).network == config.network.clone(num_classes=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "--set takes key=value, got 'epochs'"),
        ("epoch=3", "did you mean 'epochs'"),
        ("scan=false", "scan is 'false'; it must be one of"),
        ("epochs=ten", "epochs is 'ten' of type str"),
        ("optimizer=adam", "--set cannot give optimizer"),
        ("augment=rotate", "--set cannot give augment"),
        ("network=MnistRotCNN()", "--set cannot give network"),
        ("network.classes=3", "has no option 'classes'; it has .*num_classes"),
    ],
)
def test_wrong_overrides_are_named(tmp_path, override, message):
    (tmp_path / "c.py").write_text(PLAIN)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "c.py", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config file .*/c.py; give the path of a Python file, such as"),
        ("", "must define `config = dict"),
        ("config = 3", "must define `config = dict"),
        ("config = dict(", "does not run: SyntaxError"),
        ("import no_such_module", "does not run: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from experiments.baselines import MnistRotCNN\nconfig = dict(network=MnistRotCNN(width=3))", "TypeError"),
    ],
)
def test_files_that_are_no_config_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "c.py")


def test_descriptions_are_json_equal_for_equal_configs_and_different_for_different_ones(tmp_path):
    (tmp_path / "c.py").write_text(PLAIN)
    first, second = describe(load(tmp_path / "c.py")), describe(load(tmp_path / "c.py"))
    assert first == second == json.loads(json.dumps(first))
    base = dict(
        network=ResNetCNN(1), optimizer=partial(optax.sgd, momentum=0.9), learning_rate=partial(piecewise, {0: 1})
    )
    variants = [
        base,
        base | dict(network=ResNetCNN(2)),
        base | dict(network=ResNetCNN(1, widths=(1, 2))),
        base | dict(optimizer=partial(optax.sgd, momentum=0.8)),
        base | dict(learning_rate=partial(piecewise, {0: 2})),
        base | dict(seed=1),
    ]
    assert len({json.dumps(describe(make(values))) for values in variants}) == len(variants)


def test_piecewise_changes_at_the_start_of_an_epoch():
    rates = {0: 1e-4, 6: 1e-3, 100: 1e-4}
    epochs = jnp.array([0, 5.99, 6, 99.99, 100, 1000])
    expected = jnp.array([1e-4, 1e-4, 1e-3, 1e-3, 1e-4, 1e-4])
    assert jnp.allclose(piecewise(rates, epochs, 200), expected, rtol=1e-6)


def test_warmup_cosine_rises_linearly_and_falls_to_zero():
    """Over as many epochs as the run has; a short run warms up for half of them."""
    at = partial(warmup_cosine, 2.0, 4)
    assert jnp.allclose(at(jnp.array([0.0, 1, 4, 12, 20]), 20), jnp.array([0, 0.5, 2, 1, 0]), atol=1e-6)
    assert jnp.allclose(at(jnp.array([0.0, 1, 2, 3, 4]), 4), jnp.array([0, 1, 2, 1, 0]), atol=1e-6)
