"""Layers between the convolutions: normalisation and dropout of fields.

Each is told what it acts on: a :class:`~pdo_jax.groups.Group`, for its regular fields [batch, *space, channels, order], or a
:class:`~pdo_jax.fields.Representation`, for fields [batch, *space, channels, dim]. Scalars [batch, *space, channels] are taken
too, any other shape is rejected.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pdo_jax.fields import Representation, as_field
from pdo_jax.groups import Array, Group
from pdo_jax.lowering.channels import inner, scale
from pdo_jax.lowering.layout import arranged, restore, view


class GroupBatchNorm(nn.Module):
    """Batch normalisation with one mean, variance, scale and bias per channel, shared over batch, space and group.

    y = scale · (x - mean) / sqrt(variance + epsilon) + bias; sharing over the group makes it equivariant. Under ``jax.jit`` on
    a sharded batch the statistics are those of the whole batch; under ``jax.pmap`` or ``jax.shard_map`` give ``axis_name``. The
    variance is taken about a value of the data, so that a mean far larger than the spread costs no accuracy.

    Attributes:
      group: what the field is of: a group, or a representation that permutes its values.
      momentum: of the running averages, kept in the collection "batch_stats".
      epsilon: added to the variance.
      axis_name: a mapped axis over which to average the statistics.
      dtype: of the result, by default that of the input (float32 for integers); parameters and running averages are float32.
      use_running_average: whether it evaluates; told here, as ``nn.Sequential`` needs it, or by ``train`` at every call.

    Shapes: [batch, *space, channels, group.order] or [batch, *space, channels] -> the same. The call takes a ``mask``, bool
    [batch, *space] or [*space], of the points that count, such as those of ragged images; the others become 0.

    Raises:
      ValueError: an input of another shape, a representation that mixes values (use ``FieldBatchNorm``), a layer that is not
        told, or told twice, whether it trains, or running averages that are missing, or fixed while it trains.

    >>> import jax, pdo_jax as pdo
    >>> norm = pdo.GroupBatchNorm(pdo.groups.cyclic(8))
    >>> x = 300 + jax.random.normal(jax.random.key(0), [2, 9, 9, 5, 8])
    >>> y, variables = norm.init_with_output(jax.random.key(1), x, train=True)
    >>> abs(y.mean()) < 1e-3, abs(y.std() - 1) < 1e-3
    (Array(True, dtype=bool), Array(True, dtype=bool))
    """

    group: Group | Representation
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool | None = None, mask: Array | None = None) -> jax.Array:
        train = trains(self, "use_running_average", train)
        x, back = as_field("GroupBatchNorm", x, self.group, permuted=True, remedy="use nonlinearities.FieldBatchNorm")
        x, mask = masked(floating(x), mask)
        shape = x.shape[-2:-1]
        factor = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running = averages(self, train, shape, mean=jnp.zeros, var=jnp.ones)
        wide, first, second = x.astype(jnp.promote_types(x.dtype, jnp.float32)), running["mean"].value, running["var"].value
        if train:
            wide, pivot, first, second = moments(wide, None if self.is_initializing() else self.axis_name, mask)
            update(self, running, {"mean": first + pivot, "var": second})
        factor = factor.astype(wide.dtype) * jax.lax.rsqrt(second.astype(wide.dtype) + self.epsilon)
        shift = bias.astype(wide.dtype) - first.astype(wide.dtype) * factor
        y = arranged((scale(wide, factor) + scale(jnp.ones_like(wide), shift)).astype(self.dtype or x.dtype))
        return back(masked(y, mask)[0])


def masked(x: jax.Array, mask: Array | None) -> tuple[jax.Array, Array | None]:
    """A field that is 0 where a mask [batch, *space] or [*space] is False, and the mask as [batch or 1, *space, 1, 1]."""
    if mask is None:
        return x, None
    space = x.shape[1:-2]
    if mask.shape[-len(space) - 2:] != (*space, 1, 1):
        if mask.shape[mask.ndim - len(space):] != space or mask.size not in (math.prod(space), math.prod(x.shape[:-2])):
            raise ValueError(f"a mask of a field of shape {x.shape} has shape {x.shape[:-2]} or {space}, got {mask.shape}")
        mask = mask.reshape(mask.size // max(math.prod(space), 1), *space, 1, 1)
    return jnp.where(mask, x, jnp.zeros_like(x)), mask


def moments(x: jax.Array, axis_name: str | None = None,
            mask: Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(x - pivot, pivot, mean of x - pivot, variance), each [channels] but the first; of what a mask keeps.

    The pivot is the mean over one row of one component: any value near the data makes the difference of squares
    E[(x - pivot)²] - E[x - pivot]² stable, and none changes its value, so that nothing is differentiated through it."""
    row = jax.lax.slice_in_dim(x[..., :1], x.shape[1] // 2, x.shape[1] // 2 + 1, axis=1)
    pivot = jax.lax.stop_gradient(mean(row, jnp.ones_like(row), axis_name))
    x = x - scale(jnp.ones_like(x), pivot)
    kept, _ = masked(x, mask)
    first = mean(kept, jnp.ones_like(x), axis_name, mask)
    return x, pivot, first, jnp.maximum(mean(kept, kept, axis_name, mask) - first * first, 0)


def mean(x: jax.Array, y: jax.Array, axis_name: str | None, mask: Array | None = None) -> jax.Array:
    """[channels]: the mean of x · y, of products that are 0 outside of a mask; 0 where there is nothing to average."""
    result = inner(x, y) / max(x.size // x.shape[-2], 1)
    result = result if axis_name is None else jax.lax.pmean(result, axis_name)
    if mask is None:
        return result
    part = mask.astype(x.dtype) * jnp.ones_like(x)
    share = mean(part, part, axis_name)
    return result / jnp.where(share > 0, share, jnp.ones_like(share))


def update(module: nn.Module, running: Mapping[str, nn.Variable[Any]], batch: Mapping[str, jax.Array]) -> None:
    """Moves running averages, by name, towards the values of a batch."""
    if not module.is_initializing():
        for name, variable in running.items():
            value = module.momentum * variable.value + (1 - module.momentum) * batch[name].astype(variable.value.dtype)
            variable.value = value


def trains(module: nn.Module, attribute: str, train: bool | None) -> bool:
    """Whether a layer trains, which its attribute denies, or its call says, never both."""
    if ((fixed := getattr(module, attribute)) is None) == (train is None):
        raise ValueError(f"{type(module).__name__} must be told once whether it trains: by train=True or False when it is "
                         f"called, or by {attribute}=False or True when it is made; got train={train} and {attribute}={fixed}")
    return not fixed if train is None else train


def averages(module: nn.Module, train: bool, shape: Sequence[int], **starts: Callable[..., Any]) -> dict[str, nn.Variable[Any]]:
    """Running averages by name; an error where they are missing, or cannot change while the module trains."""
    if not module.is_mutable_collection("batch_stats"):
        if train:
            raise ValueError(f"{named(module)} trains, and its running averages cannot change: give apply "
                             "mutable=['batch_stats'], which returns them too, or call it with train=False")
        if not all(module.has_variable("batch_stats", name) for name in starts):
            raise ValueError(f"{named(module)} has no running averages: give apply all that init returned, batch_stats too")
    return {name: module.variable("batch_stats", name, start, shape, jnp.float32) for name, start in starts.items()}


def named(module: nn.Module) -> str:
    """The kind of a module, and where it stands."""
    return f"{type(module).__name__} {'/'.join(module.path)}".rstrip()


def floating(x: Array) -> jax.Array:
    """Whole numbers, and truth values, become float32."""
    return jnp.asarray(x, None if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32)


class GroupDropout(nn.Module):
    """Dropout whose mask is shared over the group axis, and over space too if it drops whole ``channels``.

    Attributes:
      rate: the probability to drop, 0 <= rate < 1.
      group: what the field is of, a group or any representation.
      channels: drop whole channels, not single points.
      deterministic: whether it drops nothing; told here, as ``nn.Sequential`` needs it, or by ``train`` at every call.

    Shapes: [batch, *space, channels, group.order] or [batch, *space, channels] -> the same. Needs the random stream "dropout"
    when training.

    Raises:
      ValueError: a rate outside [0, 1), an input of another shape, a layer not told, or told twice, whether it trains, or
        training without the stream.

    >>> import jax, pdo_jax as pdo
    >>> layer = pdo.GroupDropout(0.5, pdo.groups.cyclic(4))
    >>> layer.apply({}, jax.numpy.ones([1, 1, 1, 2, 4]), train=True, rngs={"dropout": jax.random.key(0)})[0, 0, 0]
    Array([[0., 0., 0., 0.],
           [2., 2., 2., 2.]], dtype=float32)
    """

    rate: float
    group: Group | Representation
    channels: bool = False
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool | None = None) -> jax.Array:
        train = trains(self, "deterministic", train)
        if not 0 <= self.rate < 1:
            raise ValueError(f"the rate of GroupDropout must lie in [0, 1), got {self.rate}")
        x, back = as_field("GroupDropout", x, self.group)
        if not train or self.rate == 0:
            return back(x)
        if not self.has_rng("dropout"):
            raise ValueError(f"{named(self)} trains, and has no randomness: give apply rngs={{'dropout': key}}, or call it "
                             "with train=False")
        x = floating(x)
        batch, *space, channels, _ = x.shape
        space = [1] * len(space) if self.channels else space
        keep = min(max(round((1 - self.rate) * 2**16), 1), 2**16 - 1)  # to 16 bits
        mask = jax.random.bits(self.make_rng("dropout"), (1, channels, *space, batch), jnp.uint16) < np.uint16(keep)
        return back(restore(jnp.where(mask, view(x) * np.asarray(2**16 / keep, x.dtype), np.zeros((), x.dtype))))
