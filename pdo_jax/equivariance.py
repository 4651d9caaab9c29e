"""How equivariant a function is: relative errors under every element of a group."""

import jax
import jax.numpy as jnp
import numpy as np

from pdo_jax import groups


def error(fn, x, group: groups.Group, *, radius: float | None = None) -> np.ndarray:
    """Relative equivariance error of a function of images, under every group element.

    With y = fn(x) and the transformed input g·x the error of g is |fn(g·x) - g·y| / |y|, in the Euclidean norm. What
    g·y means follows from the shape of y: [batch, classes] is an invariant, [batch, *space, channels] an image, and
    [batch, *space, channels, order] a regular field.

    Elements that preserve the grid act exactly. The others act by cubic interpolation, on x and y alike, and only the
    points of y within ``radius`` of its centre count; the interpolation adds an error of its own, so compare on smooth,
    well-resolved x.

    Float32 is multiplied in full precision here. By default a GPU rounds its factors to TF32, which by itself makes errors of
    1e-4 in whatever fn is used for, and a TPU to bfloat16.

    Args:
      fn: maps [batch, *space, channels] to one of the above.
      x: [batch, *space, channels].
      group: the group; its dimension is that of space.
      radius: share of the half-width of y kept for elements that do not preserve the grid, by default 0.7.

    Returns:
      [order] float64, 0 for the identity.

    Raises:
      ValueError: an x or a y of another shape, or a radius outside (0, 1].

    >>> import jax, pdo_jax as pdo
    >>> x = jax.random.normal(jax.random.key(0), [2, 9, 9, 1])
    >>> error(lambda x: x**2, x, pdo.groups.cyclic(4)).max()
    np.float64(0.0)
    """
    radius = 0.7 if radius is None else radius
    if not 0 < radius <= 1:
        raise ValueError(f"radius must lie in (0, 1], got {radius}")
    if x.ndim != group.dim + 2:
        raise ValueError(f"error under {group!r} takes x of shape [batch, *space, channels], got {x.shape}")
    with jax.default_matmul_precision("highest"):
        return _errors(fn, x, group, radius)


def _errors(fn, x, group, radius):
    y = fn(x)
    fields = {2: "invariant", group.dim + 2: "image", group.dim + 3: "field"}
    kind = fields.get(y.ndim)
    if kind is None or (kind == "field" and y.shape[-1] != group.order):
        raise ValueError("fn must return [batch, classes], [batch, *space, channels] or "
                         f"[batch, *space, channels, {group.order}], got {y.shape}")
    result = []
    for element, exact in enumerate(group.preserves_grid):
        matrix = group.elements[element]
        turned = fn(groups.transform(x, matrix))
        expected = {"invariant": lambda y, _: y, "image": lambda y, i: groups.transform(y, group.elements[i]),
                    "field": lambda y, i: groups.act(y, group, i)}[kind](y, element)
        mask = 1.0 if exact or kind == "invariant" else _disc(y.shape[1:1 + group.dim], radius, y.ndim)
        difference = np.asarray((turned.astype(jnp.float32) - expected.astype(jnp.float32)) * mask, np.float64)
        size = np.linalg.norm(np.asarray(expected.astype(jnp.float32) * mask, np.float64))
        result.append(np.linalg.norm(difference) / max(size, np.finfo(np.float32).tiny))
    return np.array(result)


def assert_equivariant(fn, x, group: groups.Group, *, atol: float = 1e-5, radius: float | None = None) -> None:
    """Raises AssertionError, naming the elements, unless fn is equivariant within ``atol`` under those that preserve the grid.

    With a ``radius`` all elements are tested, as in :func:`error`.
    """
    errors = error(fn, x, group, radius=radius)
    tested = np.ones(group.order, bool) if radius is not None else group.preserves_grid
    bad = np.flatnonzero(tested & ~(errors <= atol))
    if len(bad):
        worst = ", ".join(f"{i}: {errors[i]:.1e}" for i in bad)
        raise AssertionError(f"not equivariant under {group!r} within {atol:g}; relative errors by element {worst}")


def _disc(space, radius, ndim):
    axes = [(np.arange(s) - (s - 1) / 2) / (s / 2) for s in space]
    distance = sum(a**2 for a in np.meshgrid(*axes, indexing="ij"))
    return jnp.asarray((distance <= radius**2).astype(np.float32).reshape(1, *space, *[1] * (ndim - 1 - len(space))))
