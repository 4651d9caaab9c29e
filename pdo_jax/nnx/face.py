"""A linen module and its variables as an nnx module: both APIs are faces of its ``apply``, a function of parameters."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.nnx.bridge.variables import to_linen_var, to_nnx_var
from flax.traverse_util import flatten_dict, unflatten_dict

from pdo_jax.fields import Representation, group_of
from pdo_jax.groups import Array, Group

FLAGS = ("use_running_average", "deterministic")


class Part(nnx.Module):
    """The variables of a part of a linen module, under its names."""

    def __init__(self, held: Mapping[str, Any]) -> None:
        for name, value in held.items():
            setattr(self, name, Part(value) if isinstance(value, dict) else value)


class Face(Part):
    """A linen module that holds its variables, with linen's names and shapes: ``net.conv1.kernel``.

    "params" are ``nnx.Param``, "batch_stats" are ``nnx.BatchStat``. Fields of the linen module are read from the face too, such
    as ``conv.features``, unless a variable has the name.

    Attributes:
      linen: the module.
      use_running_average: whether norms evaluate; where there are running averages.
      deterministic: whether dropout does nothing; where there may be dropout. ``.train()``, ``.eval()`` and ``nnx.view`` set
        both; a network has one ``train``, so that there they must agree.
      rngs: the stream of keys for dropout, where it is given; it moves on in training.
    """

    linen: nn.Module

    def __init_subclass__(cls, of: type[nn.Module] | None = None, **keywords: Any) -> None:
        """Signs a class with its own arguments and, for ``options``, the fields of the linen module that it is of."""
        super().__init_subclass__(**keywords)
        own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name not in ("self", "options")]
        fields = inspect.signature(of).parameters.values() if of else ()
        known = {"parent", "name", *(p.name for p in own)}
        cls.__signature__ = inspect.Signature(own + [p.replace(kind=p.KEYWORD_ONLY) for p in fields if p.name not in known])

    def __init__(self, module: nn.Module, variables: Mapping[str, Any], *, rngs: nnx.Rngs | None = None) -> None:
        averages, flags = "batch_stats" in variables, ()
        if _takes_train(module):
            flags = [name for name, there in zip(FLAGS, (averages, rngs is not None or not averages), strict=True) if there]
        elif averages:
            raise ValueError(f"{type(module).__name__} has batch statistics, but no argument train, by which .train() and "
                             ".eval() reach them: give its __call__ one, or put faces of its layers into nnx.Sequential")
        for name in flags:
            setattr(self, name, bool(getattr(module, name, False)))
        untold: dict[str, Any] = {name: None for name in flags if hasattr(module, name)}
        self.linen = module.clone(**untold)
        try:
            hash(self.linen)
        except TypeError as error:
            raise ValueError(f"{type(module).__name__} is static in nnx, so it needs fields with a hash: tuples for lists and "
                             "arrays") from error
        if rngs is not None:
            self.rngs = rngs["dropout"].fork()
        arrays = flatten_dict(jax.tree.map(jnp.asarray, variables))
        super().__init__(unflatten_dict({path[1:]: to_nnx_var(path[0], value) for path, value in arrays.items()}))

    def __call__(self, x: Array, **others: Any) -> jax.Array:
        """Others: what the linen module's call takes beside x, such as a ``mask``; ``train`` goes before the attributes."""
        flags = {name: vars(self)[name] for name in FLAGS if name in vars(self)}
        if flags and "train" not in others:
            others["train"] = False in flags.values()
            if len(set(flags.values())) == 2:
                raise ValueError(f"{type(self.linen).__name__} is told by one train whether it trains, got {flags}: set both "
                                 "alike")
        keys = {"dropout": self.rngs()} if others.get("train") and "rngs" in vars(self) else {}
        variables = self._variables()
        changing = [name for name in variables if name != "params"] if others.get("train", True) else []
        y, changed = self.linen.apply(variables, x, rngs=keys, mutable=changing, **others)
        for collection in changing:
            nnx.update(self, changed[collection])
        return y

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "linen" not in vars(self) or hasattr(nn.Module, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.linen, name)

    def set_view(self, deterministic: bool | None = None, use_running_average: bool | None = None) -> None:
        """What ``nnx.view`` sets.

        Args:
          deterministic: whether dropout does nothing.
          use_running_average: whether norms evaluate.
        """
        for name, value in (("deterministic", deterministic), ("use_running_average", use_running_average)):
            if value is not None and name in vars(self):
                setattr(self, name, value)

    def to_linen(self) -> tuple[nn.Module, dict[str, Any]]:
        """The linen module and its variables, as ``export``, ``equivariance`` and all else of the library take them."""
        return self.linen, self._variables()

    def _variables(self):
        held = nnx.to_flat_state(nnx.state(self, nnx.Not(nnx.RngState)))
        return unflatten_dict({(nnx.variable_name_from_type(type(v)), *path): to_linen_var(v) for path, v in held})


def from_linen(module: nn.Module, variables: Mapping[str, Any], *, rngs: nnx.Rngs | None = None) -> Face:
    """The face of a linen module of one input, with ``rngs`` for its dropout; ``face.to_linen()`` gives both back.

    Raises:
      ValueError: a module with batch statistics that does not take ``train``.

    >>> import pdo_jax as pdo, pdo_jax.nnx as pnn
    >>> face = pnn.from_linen(*pdo.networks.load_pretrained("mnist_rot_best"), rngs=nnx.Rngs(0))
    >>> face.eval()
    >>> face.inner.conv1.kernel.shape  # face(images) -> logits
    (6, 1, 1, 12)
    """
    return Face(module, variables, rngs=rngs)


def initial(module: nn.Module, rngs: nnx.Rngs, on: Group | Representation, *channels: int,
            points: int = 0) -> tuple[nn.Module, Mapping[str, Any]]:
    """A module and its variables for inputs [1, points, …, *channels], by default as a kernel's reach; nothing is run."""
    if any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in channels):
        raise ValueError(f"the features that go into {type(module).__name__} must be an int >= 1, got {channels[0]!r}")
    points = points or 1 + (np.max(getattr(module, "kernel_size", 1)) - 1) * np.max(getattr(module, "kernel_dilation", 1))
    x = jax.ShapeDtypeStruct((1, *[points] * group_of(on).dim, *channels), jnp.float32)
    told: dict[str, Any] = {"train": False} if _takes_train(module) else {}
    return module, module.lazy_init(rngs.params(), x, **told)


def _takes_train(module):
    return "train" in inspect.signature(module.__call__).parameters
