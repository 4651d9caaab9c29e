"""Trained networks: their sizes, their files, what their cards say, and that they recognise digits as they are."""

from pathlib import Path

import jax
import numpy as np
import pytest

import pdo_jax as pdo
from experiments import datasets, main, saved
from pdo_jax.networks import PRETRAINED, load_pretrained

CARDS = (Path(__file__).parent.parent / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_trained_network_is_what_its_card_says(name):
    """The golden number of parameters, a file below 1 MiB, and a card with the size, the error and the data."""
    said = PRETRAINED[name]
    _, variables = load_pretrained(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == said.parameters
    assert (Path(pdo.__file__).parent / "pretrained" / f"{name}.safetensors").stat().st_size < 2**20
    card = CARDS.partition(f"## {name}\n")[2].partition("\n## ")[0]
    for part in (f"{said.parameters:,}".replace(",", " "), f"{100 * said.test_error:.2f} %", said.data, said.licence):
        assert part in card


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_trained_network_takes_digits_as_they_are_and_stands_still_under_quarter_turns(name):
    """On embedded test digits, as floats in [0, 1]: few mistakes, the same logits for turned ones if its head is invariant, and
    from the network folded into plain convolutions."""
    network, variables = load_pretrained(name)
    images, labels = (array[:100] for array in datasets.load("mnist_rot/subset").test)
    logits = jax.jit(lambda x: network.apply(variables, x))
    y = np.asarray(logits(images))
    assert np.mean(y.argmax(-1) != labels) < 5 * PRETRAINED[name].test_error
    if network.inner.head == "invariant":
        np.testing.assert_allclose(logits(np.rot90(images, axes=(1, 2))), y, atol=1e-4 * np.abs(y).max())
    plain, folded = pdo.export.to_plain(network, variables, images.shape)
    np.testing.assert_allclose(jax.jit(plain.apply)(folded, images[:4]), y[:4], atol=1e-4 * np.abs(y).max())


def test_the_command_line_evaluates_a_trained_network_by_name(monkeypatch, capsys):
    monkeypatch.setitem(PRETRAINED, "mnist_rot_best", PRETRAINED["mnist_rot_best"]._replace(data="mnist_rot/subset"))
    monkeypatch.setattr(saved, "ANGLES", 10)
    assert main.main(["--evaluate", "mnist_rot_best"]) == 0
    assert capsys.readouterr().out.startswith("test error ")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no trained network 'mnist_rot_bets'; did you mean 'mnist_rot_best'?"):
        load_pretrained("mnist_rot_bets")
    assert PRETRAINED["mnist_rot_best"].parameters <= 26_747
