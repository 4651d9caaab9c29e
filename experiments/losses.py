"""Losses and metrics as functions of a network's outputs and the targets: of images, of every pixel, and of fields.

A loss is a function of (outputs, targets) that gives a number for each example; the loop trains their mean. A `Metric` adds up
what it needs over batches and devices, and makes its number of the total. Targets are classes, [n] for logits [n, classes] and
[n, *space] for logits [n, *space, classes], or numbers in the shape of the outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Metric(NamedTuple):
    tally: Callable
    """A function of (outputs, targets, counted [n], bool): arrays whose sum over the examples that count says it all."""
    value: Callable
    """A function from that sum, of numpy arrays, to a number."""


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """[n]: -Σ_k p_k log softmax(outputs)_k, the mean over the pixels; targets may be probabilities p [n, …, classes] too."""
    return _over_space(optax.softmax_cross_entropy(outputs, _probabilities(targets, outputs)))


def dice(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """[n]: 1 - (2 Σ p q + 1) / (Σ p + Σ q + 1), sums over the pixels, the mean over the classes; q = softmax(outputs)."""
    axes = tuple(range(1, outputs.ndim - 1))
    p, q = _probabilities(targets, outputs), jax.nn.softmax(outputs)
    return 1 - ((2 * (p * q).sum(axes) + 1) / (p.sum(axes) + q.sum(axes) + 1)).mean(-1)


def segmentation(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """[n]: `cross_entropy` and `dice` added."""
    return cross_entropy(outputs, targets) + dice(outputs, targets)


def relative_l2(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """[n]: |outputs - targets| / |targets|, the norms over all that an example has."""
    squares = [_over_space(jnp.square(a).reshape(len(a), -1)) for a in (outputs - targets, targets)]
    return jnp.sqrt(squares[0] / jnp.maximum(squares[1], jnp.finfo(jnp.float32).tiny))


def confusion(outputs: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
    """Counts [class, predicted class] of images or pixels."""
    counted = jnp.broadcast_to(counted.reshape(-1, *[1] * (targets.ndim - 1)), targets.shape)
    return jnp.zeros((outputs.shape[-1],) * 2, jnp.int32).at[targets, outputs.argmax(-1)].add(counted)


def error_rate(counts: np.ndarray) -> float:
    """The share that is predicted wrong."""
    return 1 - float(np.trace(counts)) / int(counts.sum())


def mean_iou(counts: np.ndarray) -> float:
    """The mean of intersection / union over the classes that are there or predicted."""
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((counts.diagonal()[union > 0] / union[union > 0]).mean())


def averaged(function: Callable) -> Metric:
    """The mean over all examples of a loss."""
    return Metric(partial(_sums, function), _mean)


def _sums(function, outputs, targets, counted) -> tuple[Any, Any]:
    return jnp.sum(function(outputs, targets), where=counted), counted.sum()


def _mean(sums) -> float:
    return float(sums[0]) / int(sums[1])


def _probabilities(targets, outputs):
    return jax.nn.one_hot(targets, outputs.shape[-1]) if jnp.issubdtype(targets.dtype, jnp.integer) else targets


def _over_space(values):
    return values.mean(tuple(range(1, values.ndim)))


ERROR = Metric(confusion, error_rate)
MEAN_IOU = Metric(confusion, mean_iou)
