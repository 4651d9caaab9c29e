"""How equivariant a function is: relative errors under every element of a group, and the layer where a network goes wrong."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pdo_jax import fields, groups
from pdo_jax.conv import GroupConv, LiftingConv, PDOConv
from pdo_jax.fields import Representation, group_of
from pdo_jax.groups import Group
from pdo_jax.layers import GroupBatchNorm, GroupDropout
from pdo_jax.lowering import portable
from pdo_jax.nonlinearities import FieldBatchNorm, FieldNorm, GatedNonlinearity, NormNonlinearity
from pdo_jax.sampling import spherical_mask

Type = Group | Representation | None
"""What an array is: a field of a group or of a representation, or None, scalars."""


def error(fn: Callable[..., Any], x: Any, group: Group, *, in_rep: Type | Sequence[Type] = None,
          out_rep: Type | Sequence[Type] = None, radius: float | None = None) -> np.ndarray:
    """Relative equivariance error of a function of images or fields, under every group element.

    With y = fn(x) and the transformed input g·x the error of g is |fn(g·x) - g·y| / |y|, in the Euclidean norm; of several
    outputs the largest. How g acts is said by the representations. Without ``out_rep`` it follows from the shape of y:
    [batch, classes] is an invariant, [batch, *space, channels] an image, and [batch, *space, channels, order] a regular field.

    Elements that preserve the grid act exactly. The others act by cubic interpolation, on x and y alike, and only the
    points of y within ``radius`` of its centre count; the interpolation adds an error of its own, so compare on smooth,
    well-resolved x.

    Float32 is multiplied in full precision here. By default a GPU rounds its factors to TF32, which by itself makes errors of
    1e-4 in whatever fn is used for, and a TPU to bfloat16.

    Args:
      fn: maps x to an array, or a pytree of arrays.
      x: [batch, *space, channels], or [batch, *space, channels, d] of ``in_rep``; or a pytree of such arrays.
      group: the group; its dimension is that of space.
      in_rep, out_rep: what the arrays are fields of: a representation, or a group for its regular one, that holds ``group``;
        one for all, or a tuple of one for each array, where None means scalars or, in ``out_rep``, what the shape says. An
        output without space, [batch, d] or [batch, channels, d], is turned by its representation alone.
      radius: share of the half-width of y kept for elements that do not preserve the grid, by default 0.7.

    Returns:
      [order] float64, 0 for the identity.

    Raises:
      ValueError: an x or a y of another shape, a representation that does not hold the group, or a radius outside (0, 1].

    >>> import jax, pdo_jax as pdo
    >>> x = jax.random.normal(jax.random.key(0), [2, 9, 9, 1])
    >>> error(lambda x: x**2, x, pdo.groups.cyclic(4)).max()
    np.float64(0.0)
    >>> p4 = pdo.groups.cyclic(4)
    >>> slope = lambda x: jax.numpy.stack(jax.numpy.gradient(x[..., 0], axis=(1, 2)), -1).mean((1, 2))  # [batch, 2]
    >>> bool(error(slope, x, p4, out_rep=pdo.fields.standard(p4)).max() < 1e-5)  # a vector for each image
    True
    """
    radius = 0.7 if radius is None else radius
    if not 0 < radius <= 1:
        raise ValueError(f"radius must lie in (0, 1], got {radius}")
    with jax.default_matmul_precision("highest"):
        inputs, tree = jax.tree.flatten(x)
        kinds = [_kind(x, rep, group, "x") for x, rep in zip(inputs, _each(in_rep, inputs, "in_rep"), strict=True)]
        outputs = jax.tree.leaves(fn(x))
        if not outputs:
            raise ValueError("fn must return an array, or a pytree of arrays, got none")
        out_kinds = [_kind(y, rep, group, "y") for y, rep in zip(outputs, _each(out_rep, outputs, "out_rep"), strict=True)]
        result = []
        for element, exact in enumerate(group.preserves_grid):
            turned = fn(tree.unflatten([_act(x, kind, group, element) for x, kind in zip(inputs, kinds, strict=True)]))
            result.append(max(_difference(t, _act(y, kind, group, element), None if exact or not kind[0] else radius, group.dim)
                              for t, y, kind in zip(jax.tree.leaves(turned), outputs, out_kinds, strict=True)))
        return np.array(result)


def assert_equivariant(fn: Callable[..., Any], x: Any, group: Group, *, in_rep: Type | Sequence[Type] = None,
                       out_rep: Type | Sequence[Type] = None, atol: float = 1e-5, radius: float | None = None) -> None:
    """Raises AssertionError, naming the elements, unless fn is equivariant within ``atol`` under those that preserve the grid.

    If the fault shows in a layer of this library, the error names the first one (:func:`check_layers`). With a ``radius`` all
    elements are tested; arguments as in :func:`error`.
    """
    errors = error(fn, x, group, in_rep=in_rep, out_rep=out_rep, radius=radius)
    tested = np.ones(group.order, bool) if radius is not None else group.preserves_grid
    bad = np.flatnonzero(tested & ~(errors <= atol))
    if len(bad):
        worst = ", ".join(f"{i}: {errors[i]:.1e}" for i in bad)
        where = _first_fault(fn, x, group, in_rep, atol) if group.preserves_grid[bad].any() else None
        raise AssertionError(f"not equivariant under {group!r} within {atol:g}; relative errors by element {worst}"
                             + (f"; {where}" if where else ""))


def check_layers(network: nn.Module, variables: Any, x: Any, *, group: Group | None = None,
                 in_rep: Type | Sequence[Type] = None, atol: float = 1e-4, **options: Any) -> None:
    """Follows a network through its layers and names the first whose input or output does not transform as it should.

    Arrays carry no type: a field of p8 fits into a layer of p4m, which has as many elements, and only turning the input shows
    that the layer takes it for something else. Every convolution, norm, nonlinearity and dropout of this library that is called
    is compared, in order, for x and for x turned by the elements that preserve the grid.

    Args:
      network, variables: a Flax module and its variables.
      x, in_rep: its input, as in :func:`error`.
      group: whose elements turn the input; by default the group of the first layer that has one.
      atol: the relative error that is taken for rounding.
      options: of ``network.apply``, such as ``train=False``.

    Raises:
      AssertionError: naming the layer, what it is told, and the error.
      ValueError: the network calls no layer of this library.

    >>> import jax, pdo_jax as pdo
    >>> class Wrong(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return pdo.GroupConv(2, pdo.groups.dihedral(4), name="second")(pdo.LiftingConv(2, pdo.groups.cyclic(8))(x))
    >>> x = jax.random.normal(jax.random.key(0), [1, 9, 9, 1])
    >>> variables = Wrong().init(jax.random.key(1), x)
    >>> check_layers(Wrong(), variables, x)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: the input of GroupConv "second" is no field of Group(p4m, order=8, dim=2): turned by element 2 of ...
    """
    call = lambda x: network.apply(variables, x, **options)  # noqa: E731
    if group is None:
        layers = _record(call, x)
        if not layers:
            raise ValueError(f"{type(network).__name__} calls no layer of this library that could be checked")
        group = _group(layers[0][1])
    if fault := _first_fault(call, x, group, in_rep, atol):
        raise AssertionError(fault)


def _first_fault(fn, x, group, in_rep, atol):
    """What the first layer does whose input or output does not transform as its type says, or None."""
    inputs, tree = jax.tree.flatten(x)
    kinds = [_kind(x, rep, group, "x") for x, rep in zip(inputs, _each(in_rep, inputs, "in_rep"), strict=True)]
    plain, faults = _record(fn, x), []
    for element in np.flatnonzero(group.preserves_grid)[1:]:
        turned = _record(fn, tree.unflatten([_act(x, kind, group, element) for x, kind in zip(inputs, kinds, strict=True)]))
        for k, ((path, layer, *arrays), (_, _, *found)) in enumerate(zip(plain, turned, strict=True)):
            own = _group(layer)._index(group.elements[element]) if _group(layer).dim == group.dim else None
            if own is None:
                continue
            for side, (a, f, rep) in enumerate(zip(arrays, found, _types(layer, arrays[0]), strict=True)):
                wanted = _act(a, _kind(a, rep, _group(layer), "y"), _group(layer), own)
                if (size := _difference(f, wanted, None, group.dim)) > atol:
                    faults.append((2 * k + side, size, element, path, layer, rep))
    if not faults:
        return None
    place, size, element, path, layer, rep = min(faults, key=lambda f: f[0])
    told = "image or scalar field" if rep is None else f"field of {rep!r}"
    return (f'the {"output" if place % 2 else "input"} of {type(layer).__name__} "{path}" is no {told}: turned by element '
            f"{element} of {group!r} it is off by {size:.1e}")


def _record(fn, x):
    """(path, layer, input, output) of every layer of this library that fn calls, in order; one operation after another."""
    calls = []

    def watch(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, _LAYERS):
            calls.append(("/".join(context.module.path) or "network", context.module, args[0], y))
        return y

    with nn.intercept_methods(watch), jax.disable_jit(), portable(), jax.default_matmul_precision("highest"):
        fn(x)
    return calls


_LAYERS = (LiftingConv, GroupConv, PDOConv, GroupBatchNorm, GroupDropout, FieldBatchNorm, FieldNorm, NormNonlinearity,
           GatedNonlinearity)


def _types(layer, x):
    """What a layer takes its input and its output for."""
    if isinstance(layer, LiftingConv):
        return None, layer.group
    if isinstance(layer, PDOConv | GatedNonlinearity):
        return layer.in_rep, layer.out_rep if isinstance(layer, PDOConv) else layer.rep
    on = layer.group if hasattr(layer, "group") else layer.rep
    return (None, None) if x.ndim == group_of(on).dim + 2 else (on, on)


def _group(layer):
    return group_of(next(getattr(layer, name) for name in ("group", "rep", "in_rep") if hasattr(layer, name)))


def _each(reps, arrays, name):
    """A representation for each array."""
    if not isinstance(reps, tuple | list):
        return [reps] * len(arrays)
    if len(reps) != len(arrays):
        raise ValueError(f"{name} must be one for all, or one for each of {len(arrays)} arrays, got {len(reps)}")
    return list(reps)


def _kind(x, rep, group, what):
    """(Whether the array has axes of space, the representation of its last axis or None)."""
    dim, shape = group.dim, jnp.shape(x)
    if rep is None:
        if len(shape) == dim + 2 or what == "y" and len(shape) == 2:
            return len(shape) == dim + 2, None
        if what == "y" and len(shape) == dim + 3 and shape[-1] == group.order:
            return True, group
        if what == "x":
            raise ValueError(f"x must be [batch, *space, channels], got {shape}, with {dim} axes of space under {group!r}; for "
                             "another field give in_rep")
        raise ValueError("fn must return [batch, classes], [batch, *space, channels] or "
                         f"[batch, *space, channels, {group.order}], got {shape}; for another field of {group!r} give out_rep")
    size = rep.dim if isinstance(rep, Representation) else group_of(rep).order
    if group_of(rep) != group:
        rep = fields.restrict(rep if isinstance(rep, Representation) else fields.regular(rep), group)
    if shape[-1:] != (size,) or len(shape) != dim + 3 and (what == "x" or len(shape) not in (2, 3)):
        raise ValueError(f"a field of {rep!r} has shape [batch, *space, channels, {size}], {dim} axes of space, got {shape}")
    return len(shape) == dim + 3, rep


def _act(x, kind, group, element):
    space, rep = kind
    if rep is not None:
        return fields.act(x, rep, element, space=space)
    return groups.transform(x, group.elements[element]) if space else x


def _difference(found, expected, radius, dim):
    """The relative difference, within the radius of the centre of space if one is given."""
    mask = 1.0
    if radius is not None:
        mask = np.float32(spherical_mask(expected.shape[1:1 + dim], radius)).reshape(
            1, *expected.shape[1:1 + dim], *[1] * (expected.ndim - 1 - dim))
    if found.shape != expected.shape:
        raise ValueError(f"fn gives shape {found.shape} for a turned input where {expected.shape} is right: it is bound to one "
                         "orientation of a rectangular grid")
    found, expected = (np.asarray(a.astype(jnp.float32) * mask, np.float64) for a in map(jnp.asarray, (found, expected)))
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), np.finfo(np.float32).tiny)
