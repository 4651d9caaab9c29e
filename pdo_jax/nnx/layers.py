"""The layers that have parameters, statistics or random streams; the options of each are the fields of its linen module."""

from typing import Any

from flax import nnx

from pdo_jax import conv, layers, nonlinearities
from pdo_jax.fields import Representation
from pdo_jax.groups import Group
from pdo_jax.nnx.face import Face, initial


class LiftingConv(Face, of=conv.LiftingConv):
    """:class:`pdo_jax.LiftingConv`: [batch, *space, in_features] -> [batch, *space, features, group.order].

    >>> import jax.numpy as jnp, pdo_jax as pdo, pdo_jax.nnx as pnn
    >>> layer = pnn.LiftingConv(1, 7, pdo.groups.cyclic(8), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones([2, 28, 28, 1])).shape, layer.kernel.shape
    ((2, 28, 28, 7, 8), (9, 1, 1, 7))
    """

    def __init__(self, in_features: int, features: int, group: Group, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(*initial(conv.LiftingConv(features, group, **options), rngs, group, in_features))


class GroupConv(Face, of=conv.GroupConv):
    """:class:`pdo_jax.GroupConv`: [batch, *space, in_features, group.order] -> [batch, *space, features, group.order]."""

    def __init__(self, in_features: int, features: int, group: Group, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(*initial(conv.GroupConv(features, group, **options), rngs, group, in_features, group.order))


class PDOConv(Face, of=conv.PDOConv):
    """:class:`pdo_jax.PDOConv`: [batch, *space, in_features, in_rep.dim] -> [batch, *space, features, out_rep.dim]."""

    def __init__(self, in_features: int, features: int, in_rep: Representation, out_rep: Representation, *, rngs: nnx.Rngs,
                 **options: Any) -> None:
        super().__init__(*initial(conv.PDOConv(features, in_rep, out_rep, **options), rngs, in_rep, in_features, in_rep.dim))


class GroupBatchNorm(Face, of=layers.GroupBatchNorm):
    """:class:`pdo_jax.GroupBatchNorm`, of ``features`` channels."""

    def __init__(self, features: int, group: Group | Representation, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(*initial(layers.GroupBatchNorm(group, **options), rngs, group, features))


class FieldBatchNorm(Face, of=nonlinearities.FieldBatchNorm):
    """:class:`pdo_jax.nonlinearities.FieldBatchNorm`, of ``features`` channels."""

    def __init__(self, features: int, rep: Representation, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(*initial(nonlinearities.FieldBatchNorm(rep, **options), rngs, rep, features, rep.dim))


class FieldNorm(Face, of=nonlinearities.FieldNorm):
    """:class:`pdo_jax.nonlinearities.FieldNorm`, of ``features`` channels."""

    def __init__(self, features: int, group: Group | Representation, *, rngs: nnx.Rngs, **options: Any) -> None:
        size = group.dim if isinstance(group, Representation) else group.order
        super().__init__(*initial(nonlinearities.FieldNorm(group, **options), rngs, group, features, size))


class GroupDropout(Face, of=layers.GroupDropout):
    """:class:`pdo_jax.GroupDropout`, with keys of the stream "dropout"."""

    def __init__(self, rate: float, group: Group | Representation, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(layers.GroupDropout(rate, group, **options), {}, rngs=rngs)


class NormNonlinearity(Face, of=nonlinearities.NormNonlinearity):
    """:class:`pdo_jax.nonlinearities.NormNonlinearity`, of ``features`` channels."""

    def __init__(self, features: int, rep: Representation, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(*initial(nonlinearities.NormNonlinearity(rep, **options), rngs, rep, features, rep.dim))


class GatedNonlinearity(Face, of=nonlinearities.GatedNonlinearity):
    """:class:`pdo_jax.nonlinearities.GatedNonlinearity`, without parameters."""

    def __init__(self, rep: Representation) -> None:
        super().__init__(nonlinearities.GatedNonlinearity(rep), {})
