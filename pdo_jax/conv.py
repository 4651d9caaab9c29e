"""PDO-eConvs as Flax modules: equivariant convolutions made of partial differential operators."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pdo_jax import kernels, lowering, stencils
from pdo_jax.fields import Representation, field_axes, group_of
from pdo_jax.groups import Array, Group
from pdo_jax.lowering.channels import along
from pdo_jax.lowering.layout import continued, is_portable, merge, split
from pdo_jax.mixing import SteerableCoefficients, coefficients_of

Padding = str | int | Sequence[int | tuple[int, int]]


class Frozen(nn.Module):
    """A module that keeps lists and arrays, such as a frame, as tuples, so that modules can be compared and hashed."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, np.ndarray | jax.Array | list):
                object.__setattr__(self, name, _tuples(value))
        super().__post_init__()


def _tuples(value):
    value = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


class _OrbitConv(Frozen):
    """What lifting and group convolution share: parameters, kernel, lowering."""

    features: int
    group: Group
    kernel_size: int | Sequence[int] = 5
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    basis: str | int = "paper"
    scheme: stencils.Scheme = stencils.central_difference
    frame: Any = 0.0
    lowering: str = "auto"
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] | None = None
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    spacing: Sequence[float] | None = None

    def _convolve(self, x, lifted):
        channels, features = _widths(self, x)
        coefficients, components = self.coefficients(), x.shape[-1]
        bank, fan_in = coefficients.bank, x.shape[-2] * components / _sharing(self, self.group.dim)
        init = self.kernel_init or nn.initializers.normal(bank.scale(fan_in, rectified=lifted))
        w = self._kernel(init, bank.turned.shape[1], channels, components, features)
        return _apply(self, x, w, coefficients, components, **symmetry(self.group, bank, lifted))

    def _kernel(self, init, *shape):
        return self.param("kernel", init, shape, self.param_dtype)

    @nn.nowrap
    def coefficients(self) -> kernels.Coefficients:
        """The function that makes the coefficients of the layer's operators of its parameters."""
        bank = kernels.bank(self.group, self.kernel_size, self.basis, self.scheme, self.frame, self.spacing)
        return kernels.Coefficients(bank, self.group if isinstance(self, GroupConv) else None)


class LiftingConv(_OrbitConv):
    """The first layer: turns every base operator by every group element, (Ψf)(x, A) = p(A^{-1}∇) f (x).

    An input transformed by R gives the output transformed by R, ``groups.act(y, group, r)``: exactly where R maps the grid to
    itself, to second order in the grid spacing for any other.

    Attributes:
      features: number of output channels.
      group: a finite group of the dimension of space.
      kernel_size: odd number of points, one for all axes or one each; 1 is pointwise. Where sizes differ, stencils are products
        of those along each axis, and elements that swap such axes are kept to second order only.
      strides: step between outputs, one for all axes or one each.
      padding: "SAME" (zeros on every side, as far as the kernel reaches), "VALID" (none), as SAME but continued "CIRCULAR"
        (periodic), "REFLECT" (mirrored at the outermost points) or "EDGE" (which repeats these); or a number of zeros, or one
        number or (before, after) for each axis.
      basis: "paper" (at most 2 derivatives along an axis and kernel_size - 1 in all: the nine operators on 5×5) or an int (all
        operators up to that order).
      scheme: ``stencils.central_difference``, ``gaussian_derivative`` or ``rbf_fd``, with options by functools.partial.
      frame: turns the base operators before the group does; an angle in radians, or an orthogonal matrix.
      lowering: how it is computed, see :mod:`pdo_jax.lowering`; all give the same numbers.
      use_bias: one bias for each output channel, shared over the group.
      dtype: of the computation, by default that of the input; param_dtype: of the parameters.
      kernel_init: by default normal, scaled to keep the variance of a white input (``kernels.Bank.scale``).
      kernel_dilation: distance between the points of the kernel, in which its derivatives are measured.
      feature_group_count: parts of the channels and of the features, each convolved by itself; all channels: depthwise.
      spacing: of the grid along each axis, in one unit, such as (1, 1, 2.5) for thick slices: derivatives are those of that
        space. Elements that swap axes of equal spacing alone, or mirror any, are kept exactly, others to second order.

    Shapes: [batch, *space, channels] -> [batch, *space, features, group.order].

    Raises:
      ValueError: an input of another dimension than the group, a basis too large for the kernel, a kernel larger than
        the input.

    Source: Shen, He, Lin, Ma, "PDO-eConvs", ICML 2020, Eq. 8.

    >>> import jax, pdo_jax as pdo
    >>> layer = pdo.LiftingConv(features=7, group=pdo.groups.cyclic(8))
    >>> variables = layer.init(jax.random.key(0), x := jax.numpy.ones([2, 28, 28, 1]))
    >>> layer.apply(variables, x).shape
    (2, 28, 28, 7, 8)
    """

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        group = group_of(self.group)
        if x.ndim != group.dim + 2:
            field = x.ndim == group.dim + 3 and x.shape[-1] == group.order
            raise ValueError(f"LiftingConv of {group!r} takes [batch, *space, channels] with {group.dim} axes of space, got "
                             f"shape {x.shape}{': a regular field goes into GroupConv' if field else ''}")
        return self._convolve(x[..., None], lifted=False)


class GroupConv(_OrbitConv):
    """Group convolution, (ΦF)(x, A) = Σ_C p_{A^{-1}C}(A^{-1}∇) F(·, C) (x), with one polynomial for every relative element.

    Attributes:
      features: number of output channels.
      group: a finite group of the dimension of space.
      kernel_size: odd number of points, one for all axes or one each; this and the following as for :class:`LiftingConv`.
      strides: step between outputs; kernel_dilation: distance of the kernel's points; both one for all axes or one each.
      padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "EDGE" or numbers of zeros.
      basis: the operators: "paper" (nine on 5×5), or an int, all up to that order.
      scheme: the discretisation, a function of :mod:`pdo_jax.stencils` or one like them; spacing: of the grid, for each axis.
      frame: turns the base operators before the group does; an angle in radians, or an orthogonal matrix.
      lowering: how it is computed; dtype: of the computation; param_dtype: of the parameters.
      use_bias: one bias for each output channel, shared over the group.
      kernel_init: by default normal, scaled to keep the variance behind a ReLU.
      feature_group_count: parts of channels and features that do not meet.
      transpose: the adjoint of the convolution that these options describe, from ``features`` channels to those of the input:
        strides · (n - 1) + 1 points for n (with SAME, or continued), by 2: 4 -> 7; ``upsample`` reaches 8.
      rank: of the kernels as matrices: w = Σ_r a_r b_r, of parameters "mix" a [channels, group.order, rank] and "kernel" b
        [operators, rank, features], as if a pointwise layer went before one that mixes no orientations (Knigge et al., ICML
        2022). Better reached from trained kernels, by :func:`pdo_jax.kernels.factored`, than trained from the start.

    Shapes: [batch, *space, channels, group.order] -> [batch, *space, features, group.order].

    Raises:
      ValueError: as :class:`LiftingConv`, which comes first: an image has no axis of the group yet; a rank above the full one.

    Source: Shen, He, Lin, Ma, "PDO-eConvs", ICML 2020, Eq. 12.

    >>> import jax, pdo_jax as pdo
    >>> layer = pdo.GroupConv(features=7, group=pdo.groups.dihedral(4), kernel_size=3)
    >>> variables = layer.init(jax.random.key(0), x := jax.numpy.ones([2, 9, 9, 5, 8]))
    >>> layer.apply(variables, x).shape
    (2, 9, 9, 7, 8)
    """

    transpose: bool = False
    rank: int | None = None

    def _kernel(self, init, operators, channels, components, features):
        rank = self.rank
        if rank is None:
            return super()._kernel(init, operators, channels, components, features)
        most = min(channels * components, operators * features) if self.feature_group_count == 1 else 0
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 0 < rank <= most:
            raise ValueError(f"rank must be None, or an int from 1 to {most} for these kernels of GroupConv, got {rank!r}"
                             if most else "rank does not go with feature_group_count; give one of them")
        normal = nn.initializers.normal(1 / math.sqrt(rank))
        mix = self.param("mix", normal, (channels, components, rank), self.param_dtype)
        return kernels.product(mix, super()._kernel(init, operators, rank, features))

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        field_axes("GroupConv", x, self.group, scalars=False, remedy="scalars and images go into LiftingConv first")
        return self._convolve(x, lifted=True)


class PDOConv(Frozen):
    """A learned equivariant operator between fields of any two representations of a group.

    y = Σ_k w_k H_k(∇) x, where the H_k are all solutions of ρ_out(A) H(A^{-1}∇) ρ_in(A)^{-1} = H up to an order
    (:func:`pdo_jax.steerable.basis`; Jenner & Weiler, ICLR 2022). Lifting is trivial → regular, group convolution
    regular → regular, both with all operators up to ``order``.

    Attributes:
      features: number of output fields.
      in_rep: the representation of the input.
      out_rep: that of the output, of the same group.
      order: highest order of the operators, by default kernel_size - 1, at most 2.
      use_bias: one bias for each output field, for an out_rep that permutes (trivial, regular, quotient).
      transpose: as for :class:`GroupConv`, of an operator from ``out_rep`` to ``in_rep``, which must be orthogonal.

    The others as for :class:`LiftingConv`.

    Shapes: [batch, *space, channels, in_rep.dim] -> [batch, *space, features, out_rep.dim].

    Raises:
      ValueError: representations of different groups, a field of another shape, a bias where the group mixes components, or
        no equivariant operator at all up to that order.
    """

    features: int
    in_rep: Representation
    out_rep: Representation
    order: int | None = None
    kernel_size: int | Sequence[int] = 5
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    scheme: stencils.Scheme = stencils.central_difference
    lowering: str = "auto"
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] | None = None
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    spacing: Sequence[float] | None = None
    transpose: bool = False

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        channels, features = _widths(self, x)
        for name, rep in (("in_rep", self.in_rep), ("out_rep", self.out_rep)):
            if not isinstance(rep, Representation):
                raise ValueError(f"{name} of PDOConv must be a Representation, such as fields.regular(group), got {rep!r}")
            if self.transpose and not rep.is_orthogonal:
                raise ValueError(f"a transposed PDOConv is equivariant only for orthogonal representations, got {name}={rep!r}")
        field_axes("PDOConv", x, self.in_rep, scalars=False, remedy="scalars are [..., channels, 1] of fields.trivial(group)")
        if self.use_bias and not self.out_rep.is_permutation:
            raise ValueError(f"a bias is equivariant only where the group permutes components, got out_rep={self.out_rep!r}")
        coefficients = self.coefficients()
        count = coefficients.count
        fan_in = x.shape[-2] * count / self.out_rep.dim / _sharing(self, self.in_rep.group.dim)  # the kernels have norm 1
        w = self.param("kernel", self.kernel_init or nn.initializers.normal(1 / math.sqrt(fan_in)),
                       (count, channels, features), self.param_dtype)
        return _apply(self, x, w, coefficients, self.out_rep.dim)

    @nn.nowrap
    def coefficients(self) -> SteerableCoefficients:
        """The function that makes the coefficients of the layer's operators of its parameters."""
        sizes = stencils.axes_of("kernel_size", self.kernel_size, self.in_rep.group.dim)
        order = min(min(sizes) - 1, 2) if self.order is None else self.order
        reps = (self.out_rep, self.in_rep) if self.transpose else (self.in_rep, self.out_rep)
        return coefficients_of(*reps, order, sizes, stencils.same(self.scheme), self.spacing)


def _apply(module, x, w, coefficients, components, **symmetry):
    """Convolves and adds the bias of a layer."""
    with lowering.portable() if module.is_initializing() else contextlib.nullcontext():  # a shape is wanted, soon
        y = convolve(module, x, w, coefficients, module.lowering, components, **symmetry)
    if module.use_bias:
        bias = module.param("bias", nn.initializers.zeros, (module.features,), module.param_dtype)
        y = y + along(bias.astype(y.dtype), y)
    return y


def convolve(module: nn.Module, x: Array, w: jax.Array, coefficients: Any, way: str, components: int = 0,
             **symmetry: Any) -> jax.Array:
    """The convolution of a layer without its bias, [batch, *space, channels, components] -> [batch, *space', features, …].

    Args:
      module: whose options count; x: its input, w: parameters for the coefficients; way: the lowering.
      components: those of the output, for a transposed layer.
    """
    sizes, lead = coefficients.stencils.shape[1:], x.shape[:-2 - (dim := coefficients.stencils.ndim - 1)]
    x = x if len(lead) == 1 else x.reshape(math.prod(lead), *x.shape[len(lead):])
    space = x.shape[1:-2]
    strides, dilation = (_per_axis(name, getattr(module, name), dim) for name in ("strides", "kernel_dilation"))
    reach = [(k - 1) * d for k, d in zip(sizes, dilation, strict=True)]
    padding, mode = _padding(module.padding, dim, reach)
    dtype = jnp.dtype(module.dtype or (x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"a convolution is computed in a floating type, got {dtype}")
    lowering.check_lowering(way, symmetry.get("turn"))

    zeros, groups = ((0, 0),) * dim if mode else padding, module.feature_group_count
    each = functools.partial(lowering.convolve, stencils=coefficients.stencils, indices=coefficients.indices, strides=strides,
                             padding=zeros, dilation=dilation, coefficients=coefficients, lowering=way, **symmetry)

    def forward(x):
        if mode:
            if any(n < low + (mode == "reflect") for n, (low, _) in zip(x.shape[1:], padding, strict=False)):
                raise ValueError(f"{module.padding} padding by {padding} needs a larger input, got {x.shape[1:1 + dim]}")
            x = continued(x, padding, mode)
        if groups == 1:
            return each(x, w)
        portable = is_portable() and not module.is_initializing()
        if portable or any(jax.typeof(x).sharding.spec):  # of parts, converters know no convolution, explicit meshes no vmap
            parts = zip(jnp.split(x, groups, dim + 1), jnp.split(w, groups, w.ndim - 1), strict=True)
            return jnp.concatenate([each(*part) for part in parts], dim + 1)
        parts = split(x, dim + 1, groups), split(w, w.ndim - 1, groups)
        return merge(jax.vmap(each, (dim + 1, w.ndim - 1), dim + 1)(*parts), dim + 1)

    x, back = x.astype(dtype), lambda y: y if len(lead) == 1 else y.reshape(*lead, *y.shape[1:])
    if not getattr(module, "transpose", False):
        return back(forward(x))
    space = [(n - 1) * s + 1 + r - sum(p) for n, s, r, p in zip(space, strides, reach, padding, strict=True)]
    if min(space) < 1:
        raise ValueError(f"{module.padding} padding leaves {space} points of a transposed convolution of {x.shape[1:1 + dim]}")
    return back(jax.linear_transpose(forward, _like(x, (x.shape[0], *space, module.features, components)))(x)[0])


def _like(x, shape):
    """What stands for an array of another shape, sharded over its batch as x is."""
    kind = jax.typeof(x)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=kind.sharding, manual_axis_type=kind.manual_axis_type)


def symmetry(group: Group, bank: kernels.Bank, lifted: bool) -> dict[str, Any]:
    """What the lowerings may use of an orbit layer."""
    return {"fold": fold(group, lifted), "turn": turn(group, lifted), "span": bank.turned}


def fold(group: Group, lifted: bool) -> lowering.Fold | None:
    """The pairs of components that the point reflection swaps, where the group holds it."""
    if group.point_reflection is None:
        return None
    partner = group.table[group.point_reflection]
    first = np.flatnonzero(np.arange(group.order) < partner)
    pairs = tuple(first.tolist()), tuple(partner[first].tolist())
    return lowering.Fold(pairs if lifted else None, pairs)


@functools.lru_cache(maxsize=128)
def turn(group: Group, lifted: bool) -> lowering.Turn | None:
    """The orbits of the components under the smallest rotation of a group of the plane."""
    if group.dim != 2:
        return None
    rotations = np.flatnonzero(np.linalg.det(group.elements) > 0)
    angle = 2 * math.pi / len(rotations)
    r = next(a for a in rotations if np.allclose(group.elements[a] @ [1, 0], [math.cos(angle), math.sin(angle)]))
    starts = [0] if len(rotations) == group.order else [0, next(a for a in range(group.order) if a not in rotations)]
    orbits = []
    for c in starts:
        orbit = [c]
        while len(orbit) < len(rotations):
            orbit.append(int(group.table[r, orbit[-1]]))
        orbits.append(tuple(orbit))
    return lowering.Turn(tuple(orbits) if lifted else None, tuple(orbits))


_CONTINUED = {"CIRCULAR": "wrap", "REFLECT": "reflect", "EDGE": "edge"}


def _padding(padding, dim, reach):
    """((before, after), …), and by which values of the input; None for zeros."""
    if isinstance(padding, str):
        name = padding.upper()
        if name not in ("SAME", "VALID", *_CONTINUED):
            raise ValueError(f'padding must be "SAME", "VALID", {", ".join(map(repr, _CONTINUED))} or numbers, got {padding!r}')
        return tuple((0, 0) if name == "VALID" else (r // 2, r // 2) for r in reach), _CONTINUED.get(name)
    pads = _per_axis("padding", padding, dim, least=0, pairs=True)
    return tuple(p if isinstance(p, tuple) else (p, p) for p in pads), None


def _per_axis(what, value, dim, least=1, pairs=False):
    values = tuple(tuple(v) if pairs and isinstance(v, list | tuple) else v for v in value) if isinstance(
        value, list | tuple) else (value,) * dim
    flat = [n for v in values for n in (v if isinstance(v, tuple) else (v,))]
    if len(values) != dim or any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < least for n in flat) or any(
            isinstance(v, tuple) and len(v) != 2 for v in values):
        raise ValueError(f"{what} must be an int >= {least}, or one for each of {dim} axes, got {value!r}")
    return values


def _widths(module, x):
    """The numbers of channels and features that the kernel has."""
    for name in ("features", "feature_group_count"):
        value = getattr(module, name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} of {type(module).__name__} must be an int >= 1, got {value!r}")
    channels, groups = x.shape[-2], module.feature_group_count
    if channels % groups or module.features % groups:
        raise ValueError(f"feature_group_count={groups} of {type(module).__name__} must divide its {channels} channels and "
                         f"{module.features} features")
    if getattr(module, "transpose", False):
        return module.features // groups, channels
    return channels // groups, module.features


def _sharing(module, dim):
    """By what factor fewer values of the input meet in one of the output than all channels at each point of a kernel."""
    strides = math.prod(_per_axis("strides", module.strides, dim)) if getattr(module, "transpose", False) else 1
    return module.feature_group_count * strides
