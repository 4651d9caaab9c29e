"""The networks of :mod:`pdo_jax.networks`; the options of each are the fields of its linen module."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from pdo_jax import networks
from pdo_jax.fields import Representation
from pdo_jax.groups import Group
from pdo_jax.nnx.face import Face, from_linen, initial


class MnistRotNet(Face, of=networks.MnistRotNet):
    """:class:`pdo_jax.networks.MnistRotNet`: [batch, 28, 28, in_features] -> [batch, num_classes]."""

    def __init__(self, in_features: int = 1, *, rngs: nnx.Rngs, **options: Any) -> None:
        module = networks.MnistRotNet(**options)
        super().__init__(*initial(module, rngs, module.group, in_features, points=28), rngs=rngs)


class ResNet(Face, of=networks.ResNet):
    """:class:`pdo_jax.networks.ResNet`: [batch, *space, in_features] -> [batch, num_classes]."""

    def __init__(self, in_features: int = 3, *, rngs: nnx.Rngs, **options: Any) -> None:
        module = networks.ResNet(**options)
        super().__init__(*initial(module, rngs, module.group, in_features, points=8))


class UNet(Face, of=networks.UNet):
    """:class:`pdo_jax.networks.UNet`: [batch, *space, in_features (, in_rep.dim)] -> [batch, *space, out or (1, out.dim)]."""

    def __init__(self, in_features: int, group: Group, widths: Sequence[int], out: int | Representation, *, rngs: nnx.Rngs,
                 **options: Any) -> None:
        module = networks.UNet(group, widths, out, **options)
        channels = (in_features, module.in_rep.dim) if module.in_rep else (in_features,)
        super().__init__(*initial(module, rngs, group, *channels, points=module.kernel_size * 2 ** (len(widths) - 1)))


def load_pretrained(name: str, *, rngs: nnx.Rngs | None = None) -> Face:
    """A network of :func:`pdo_jax.networks.load_pretrained`, set to evaluate; to train it further give ``rngs`` for dropout."""
    face = from_linen(*networks.load_pretrained(name), rngs=rngs)
    face.eval()
    return face
