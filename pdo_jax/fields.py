"""Representations: how the values of a field mix when a group acts on it.

A field of type ρ is an array [batch, *space, channels, d] on which the group acts by [A·F](x) = ρ(A) F(A^{-1}x): the array
is turned and the last axis multiplied by ρ(A), a d×d matrix with ρ(AB) = ρ(A) ρ(B). A grey image is a field of the trivial
representation, a velocity one of the standard representation, and the features of a group convolution are fields of the
regular one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pdo_jax.groups import Array, Group, transform
from pdo_jax.operators import action, multi_indices

_Field = TypeVar("_Field", bound=Array)
_CLOSE = 1e-6  # how far a representation may be from a homomorphism, entry by entry, relative to its largest entry


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Representation:
    """A real representation of a finite group, checked to be one: ρ(1) = 1 and ρ(AB) = ρ(A) ρ(B).

    Attributes:
      name: a label for messages; two representations are equal if their groups and matrices are.
      group: the group.
      matrices: [order, d, d] float64, ρ(A) in the order of ``group.elements``.

    Raises:
      ValueError: matrices of another shape, complex, not finite, or that do not multiply like the group's elements.

    >>> from pdo_jax import groups
    >>> Representation("sign", groups.cyclic(4), [[[1]], [[-1]], [[1]], [[-1]]])
    Representation(sign of Group(p4, order=4, dim=2), dim=1)
    """

    name: str
    group: Group
    matrices: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", _checked(self.name, self.group, self.matrices))
        self.matrices.setflags(write=False)

    @property
    def dim(self) -> int:
        return self.matrices.shape[1]

    @functools.cached_property
    def is_permutation(self) -> bool:
        """Whether every ρ(A) permutes the axis; only then does a nonlinearity on single values commute with the group."""
        return permutes(self.matrices)

    @functools.cached_property
    def is_orthogonal(self) -> bool:
        """Whether every ρ(A) keeps lengths."""
        return bool(np.allclose(self.matrices @ np.swapaxes(self.matrices, 1, 2), np.eye(self.dim), atol=_CLOSE))

    @functools.cached_property
    def blocks(self) -> tuple[np.ndarray, ...]:
        """The finest split of the axis, as index arrays, such that ρ mixes nothing between them: the parts of a direct sum."""
        linked = (np.abs(self.matrices) > _CLOSE).any(0)
        linked |= linked.T
        for _ in range(self.dim.bit_length()):  # paths of length 2, 4, 8, …
            linked = linked.astype(float) @ linked > 0
        first = linked.argmax(1)
        return tuple(np.flatnonzero(first == k) for k in np.unique(first))

    @functools.cached_property
    def parts(self) -> tuple["Representation", ...]:
        """The representation of each block."""
        return tuple(Representation(f"block {k} of {self.name}", self.group, self.matrices[:, block][:, :, block])
                     for k, block in enumerate(self.blocks))

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Representation) and self.group == other.group
                and self.matrices.shape == other.matrices.shape
                and bool(np.allclose(self.matrices, other.matrices, atol=1e-9)))

    def __hash__(self) -> int:
        return hash((self.group, self.dim))

    def __repr__(self) -> str:
        return f"Representation({self.name} of {self.group!r}, dim={self.dim})"


def trivial(group: Group) -> Representation:
    """Values that do not change: ρ(A) = 1."""
    return Representation("trivial", group, np.ones((group.order, 1, 1)))


def determinant(group: Group) -> Representation:
    """Pseudoscalars, which change sign under reflections: ρ(A) = det A."""
    return Representation("determinant", group, np.sign(np.linalg.det(group.elements))[:, None, None])


def standard(group: Group) -> Representation:
    """Vectors: ρ(A) = A."""
    return Representation("standard", group, group.elements)


def regular(group: Group) -> Representation:
    """Functions on the group, (ρ(R) F)(A) = F(R^{-1}A): the action of :func:`pdo_jax.groups.act`."""
    return dataclasses.replace(quotient(group, [0]), name="regular")


def cosets(group: Group, subgroup: Group | ArrayLike) -> np.ndarray:
    """[cosets, |H|]: the indices of the elements of every coset AH of a subgroup, in the order of :func:`quotient`.

    Raises ValueError as :func:`quotient`."""
    members = _members(group, subgroup)
    if not members.size or not np.isin(group.table[np.ix_(members, members)], members).all():
        raise ValueError(f"quotient needs a subgroup of {group!r}, got elements that are not closed under its "
                         f"multiplication: {members.tolist()}")
    return group.table[np.unique(group.table[:, members].min(1))][:, members]


def quotient(group: Group, subgroup: Group | ArrayLike) -> Representation:
    """Functions on the cosets AH of a subgroup H, (ρ(R) F)(AH) = F(R^{-1}AH).

    Args:
      subgroup: a :class:`Group` whose elements are in ``group``, or the indices of H in ``group.elements``.

    Raises:
      ValueError: the elements are not in the group, or are not closed under its multiplication.

    >>> from pdo_jax import groups
    >>> quotient(groups.octahedral(), groups.tetrahedral()).dim
    2
    """
    parts = cosets(group, subgroup)
    coset = np.argsort(parts.reshape(-1)) // parts.shape[1]  # of each element
    matrices = np.swapaxes(np.eye(len(parts))[coset[group.table[:, parts[:, 0]]]], 1, 2)  # [R, AH] -> RAH
    return Representation(f"quotient by {parts.shape[1]} elements", group, matrices)


def direct_sum(representations: Iterable[Representation]) -> Representation:
    """Several fields side by side: ρ = ρ_1 ⊕ ρ_2 ⊕ …, block diagonal. Raises ValueError if their groups differ."""
    representations = list(representations)
    if not representations:
        raise ValueError("direct_sum needs at least one representation, got none")
    group = representations[0].group
    for other in representations:
        if other.group != group:
            raise ValueError(f"direct_sum needs representations of one group, got {representations[0]!r} and {other!r}")
    ends = np.cumsum([r.dim for r in representations])
    matrices = np.zeros((group.order, ends[-1], ends[-1]))
    for end, r in zip(ends, representations, strict=True):
        matrices[:, end - r.dim:end, end - r.dim:end] = r.matrices
    return Representation(" + ".join(r.name for r in representations), group, matrices)


@functools.lru_cache(maxsize=64)
def irreps(group: Group) -> tuple[Representation, ...]:
    """All irreducible real representations, orthogonal, each once, by dimension, the trivial one first.

    The matrices that commute with the regular representation are c(A^{-1}B); a random symmetric one has irreducible
    eigenspaces, and every irreducible representation is among them. It is checked that each is irreducible
    (mean χ(A)² + mean χ(A²) = 2; Serre, Linear Representations of Finite Groups, §13.2) and that none is missing
    (Σ d² / mean χ² = order, where mean χ² is 1, 2 or 4 for the real, complex and quaternionic type).

    >>> from pdo_jax import groups
    >>> [r.dim for r in irreps(groups.icosahedral())]
    [1, 3, 3, 4, 5]
    >>> [r.dim for r in irreps(groups.cyclic(4))]
    [1, 1, 2]
    """
    relative = group.table[group.inverse]  # A^{-1} B
    coefficients = np.random.default_rng(0).normal(size=group.order)
    values, vectors = np.linalg.eigh((coefficients + coefficients[group.inverse])[relative])
    found = {}
    for space in np.split(vectors, np.flatnonzero(np.diff(values) > 1e-8 * np.abs(values).max()) + 1, axis=1):
        projector = space @ space.T
        character = projector[np.arange(group.order), relative].sum(1)
        found.setdefault((space.shape[1], *(-np.round(character, 6))), (character, projector))
    total, result = 0.0, []
    for _, (character, projector) in sorted(found.items()):
        commutant = np.mean(character ** 2)
        if abs(commutant + np.mean(character[group.table.diagonal()]) - 2) > 1e-6:
            raise ArithmeticError(f"the decomposition of {group!r} has a reducible part of dimension {character[0]:.0f}")
        total += character[0] ** 2 / commutant
        basis = orthonormal_range(projector, round(character[0]))
        matrices = _cleaned(np.einsum("ad,gae->gde", basis, basis[relative], optimize=True))
        result.append(Representation(f"irrep {len(result)}", group, matrices))
    if abs(total - group.order) > 1e-6:
        raise ArithmeticError(f"the irreducible representations of {group!r} add up to {total}, not to its order")
    return tuple(result)


def decompose(rep: Representation) -> tuple[tuple[Representation, ...], np.ndarray]:
    """Irreducible parts of a representation, and the change of basis to them: Q^{-1} ρ(A) Q = direct_sum(parts)(A).

    Random matrices averaged to ρ(A) X σ(A)^{-1} = X, each made orthogonal to those before, are the columns of Q. A field x of ρ
    is ``x @ Q`` in the basis of its parts, if ρ is orthogonal, as then is Q.

    Returns:
      (parts, Q): some of :func:`irreps`, in their order and as often as they occur; Q [dim, dim] float64.

    >>> from pdo_jax import groups
    >>> parts, q = decompose(regular(groups.tetrahedral()))
    >>> [part.dim for part in parts], np.allclose(q.T @ q, np.eye(12))
    ([1, 2, 3, 3, 3], True)
    """
    root = np.eye(rep.dim) if rep.is_orthogonal else np.linalg.cholesky(
        np.einsum("gji,gjk->ik", rep.matrices, rep.matrices) / rep.group.order).T
    matrices, parts, q = root @ rep.matrices @ np.linalg.inv(root), [], np.zeros((rep.dim, 0))
    random, character = np.random.default_rng(0), np.trace(rep.matrices, axis1=1, axis2=2)
    for irrep in irreps(rep.group):
        chi = np.trace(irrep.matrices, axis1=1, axis2=2)
        for _ in range(round((character * chi).sum() / (chi * chi).sum())):
            x = random.normal(size=(rep.dim, irrep.dim))
            x = (matrices @ x @ np.swapaxes(irrep.matrices, 1, 2)).mean(0)
            x = x - q @ (q.T @ x)
            x = x - q @ (q.T @ x)
            parts.append(irrep)
            q = np.concatenate([q, x / np.linalg.norm(x[:, 0])], 1)
    return tuple(parts), np.linalg.solve(root, q)


def tensor_product(first: Representation, second: Representation) -> Representation:
    """Products of the values of two fields, ``(x[..., :, None] * y[..., None, :]).reshape(*x.shape[:-1], -1)``: ρ = ρ_1 ⊗ ρ_2.

    Raises ValueError if their groups differ."""
    if first.group != second.group:
        raise ValueError(f"tensor_product needs representations of one group, got {first!r} and {second!r}")
    return Representation(f"({first.name}) x ({second.name})", first.group,
                          [np.kron(a, b) for a, b in zip(first.matrices, second.matrices, strict=True)])


def band_limited(group: Group, frequency: int, order: int = 4) -> Representation:
    """Fields of the continuous groups SO(n) and O(n) of the plane and of space: their irreducible representations up to a
    frequency, once each.

    That of degree k acts on harmonic polynomials of degree k: in the plane it turns by k times the angle, in space it mixes the
    2k + 1 spherical harmonics; for a group with reflections each also comes times the determinant, where that is another one.

    An operator of order K between two such fields turns with a degree of at most J = 2 · frequency + K. If the group leaves no
    harmonic polynomial of degrees 1 … J unchanged, times the determinant or not, then what commutes with it commutes with all
    of SO(n) or O(n): the operators found are those of the continuous group, at every angle, exactly. In the plane cyclic(n) and
    dihedral(n) do for n > J, in space the tetrahedral, octahedral and icosahedral groups for J <= 2, 3 and 5.

    Args:
      group: a group of the plane or of space.
      frequency: the band limit.
      order: the highest order of operators that will act on the field.

    Raises:
      ValueError: a group of another dimension, or one that is too small.

    >>> from pdo_jax import groups
    >>> band_limited(groups.icosahedral(), 2, order=1).dim
    9
    """
    if group.dim not in (2, 3):
        raise ValueError(f"band_limited needs a group of the plane or of space, got {group!r}")
    if frequency < 0 or order < 0:
        raise ValueError(f"band_limited needs frequency >= 0 and order >= 0, got frequency={frequency}, order={order}")
    sign, most = np.linalg.det(group.elements), 2 * frequency + order
    for k in range(1, most + 1):
        character = np.trace(harmonics(group.elements, k), axis1=1, axis2=2)
        if max(abs(character.mean()), abs((sign * character).mean())) > 1e-6:
            raise ValueError(f"fields up to frequency {frequency} and operators up to order {order} need a group without "
                             f"invariants of degrees 1 to {most}, {group!r} has one of degree {k}: take a larger group (in the "
                             f"plane more than {most} rotations), or lower frequency or order")
    parts = []
    for k in range(frequency + 1):
        parts.append(Representation(f"frequency {k}", group, harmonics(group.elements, k)))
        if (sign < 0).any() and (k == 0 or group.dim == 3):
            parts.append(tensor_product(determinant(group), parts[-1]))
    return direct_sum(parts)


def harmonics(matrices: ArrayLike, degree: int) -> np.ndarray:
    """How orthogonal matrices A act on the harmonic polynomials of a degree, p -> p ∘ A^{-1}, in an orthonormal basis.

    In the plane degree k > 0 turns by k times the angle; in space these are the 2k + 1 spherical harmonics of degree k.

    Args:
      matrices: [count, dim, dim].

    Returns:
      [count, d, d] float64, orthogonal.
    """
    matrices = np.asarray(matrices, np.float64)
    indices = [a for a in multi_indices(matrices.shape[-1], degree) if sum(a) == degree]
    lower = multi_indices(matrices.shape[-1], max(degree - 2, 0))
    norms = np.sqrt([math.prod(map(math.factorial, a)) for a in indices])  # of x^α, such that turning keeps lengths
    laplacian = np.zeros((len(lower), len(indices)))
    for column, a in enumerate(indices):
        for axis, power in enumerate(a):
            if power >= 2:
                row = lower.index((*a[:axis], power - 2, *a[axis + 1:]))
                laplacian[row, column] += power * (power - 1) / norms[column]
    count = len(indices) - np.linalg.matrix_rank(laplacian)
    basis = orthonormal_range(np.eye(len(indices)) - np.linalg.pinv(laplacian) @ laplacian, count)
    turn = action(matrices, degree)[:, -len(indices):, -len(indices):] / norms[:, None] * norms
    return basis.T @ np.swapaxes(turn, 1, 2) @ basis


def act(x: Array, rep: Group | Representation, element: int, *, space: bool = True) -> jax.Array:
    """The action on a field, [A·F](x) = ρ(A) F(A^{-1}x): turn the array and multiply its last axis.

    Args:
      x: [batch, *space, channels, d]; without ``space`` any array whose last axis is the representation's.
      rep: the representation, or a group for its regular one.
      element: index of A.

    Raises:
      ValueError: the last axis is not the representation's.

    >>> from pdo_jax import groups
    >>> act(np.array([[1.0, 0.0]]), standard(groups.cyclic(4)), 1, space=False)  # a quarter turn of a vector
    Array([[0., 1.]], dtype=float32)
    """
    group, size = group_of(rep), rep.dim if isinstance(rep, Representation) else rep.order
    if x.shape[-1] != size:
        raise ValueError(f"the last axis of a field of {rep!r} has size {size}, got shape {x.shape}")
    x = transform(x, group.elements[element]) if space else jnp.asarray(x)
    if isinstance(rep, Group):
        return x[..., group.table[group.inverse[element]]]
    if rep.is_permutation:
        return x[..., rep.matrices[element].argmax(1)]
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    return jnp.einsum("ij,...j->...i", jnp.asarray(rep.matrices[element], x.dtype), x, precision="highest")


def restrict(representation: Representation, subgroup: Group) -> Representation:
    """The representation of a subgroup on the same values; a network may go on with fewer symmetries from here.

    Raises:
      ValueError: an element of ``subgroup`` is not in the representation's group.
    """
    members = _members(representation.group, subgroup)
    return Representation(f"{representation.name} of {representation.group.name}", subgroup, representation.matrices[members])


def restrict_regular(x: _Field, group: Group, subgroup: Group) -> _Field:
    """A regular field of a group as regular fields of a subgroup H: F_k(h) = F(h a_k) on the cosets H a_k.

    Args:
      x: [..., channels, order].

    Returns:
      [..., channels · order / |H|, |H|].

    Raises:
      ValueError: ``subgroup`` is not inside ``group``, or the last axis is not its order.
    """
    if x.ndim < 2 or x.shape[-1] != group.order:
        raise ValueError(f"restrict_regular takes a field [..., channels, {group.order}] of {group!r}, got shape {x.shape}")
    members = _members(group, subgroup)
    cosets = group.table[members]  # [h, a] -> h a
    order = cosets[:, np.unique(cosets.min(0))].T
    return x[..., order].reshape(*x.shape[:-2], -1, len(members))


def group_of(on: Group | Representation) -> Group:
    """The group itself, or that of a representation. Raises ValueError for anything else."""
    if isinstance(on, Representation):
        return on.group
    if isinstance(on, Group):
        return on
    raise ValueError(f"expected a Group, such as pdo_jax.groups.cyclic(8), or a Representation, got {on!r}")


def field_axes(what: str, x: Array, on: Group | Representation, *, scalars: bool = True, permuted: bool = False,
               orthogonal: bool = False, remedy: str = "") -> bool:
    """Whether x is a field [batch, *space, channels, d], and not one of scalars [batch, *space, channels].

    A group stands for its regular representation. Fields may have more than one axis before space, scalars have one.

    Args:
      what: the name of the layer or function, for messages.
      x: an array.
      on: what the field is of.
      scalars: whether scalars are taken too.
      permuted: whether the group must permute the values; orthogonal: whether it must keep lengths.
      remedy: what to do where it does not, or where scalars are given and not taken.

    Raises:
      ValueError: an x of any other shape, or another representation.
    """
    group, size = group_of(on), on.dim if isinstance(on, Representation) else on.order
    if permuted and isinstance(on, Representation) and not on.is_permutation:
        raise ValueError(f"{what} acts on single values, which {on!r} mixes: it commutes only with a group that permutes them "
                         f"(trivial, regular, quotient){remedy and ': ' + remedy}")
    if orthogonal and isinstance(on, Representation) and not on.is_orthogonal:
        raise ValueError(f"{what} measures lengths, which {on!r} does not keep: change its basis to make it orthogonal")
    if x.ndim >= group.dim + 3 and x.shape[-1] == size:
        return True
    if scalars and x.ndim == group.dim + 2:
        return False
    also = " or scalars [batch, *space, channels]" if scalars else ""
    hint = f": {remedy}" if remedy and not permuted and x.ndim == group.dim + 2 else ""
    raise ValueError(f"{what} of {on!r} takes a field [batch, *space, channels, {size}]{also}, with {group.dim} axes of space, "
                     f"got shape {x.shape}{hint}")


def as_field(what: str, x: Array, on: Group | Representation,
             **options: Any) -> tuple[Array, Callable[[jax.Array], jax.Array]]:
    """x as a field of one batch axis, d = 1 for scalars, and what gives a result its form; checked by :func:`field_axes`."""
    scalars = not field_axes(what, x, on, **options)
    lead = x.shape[:x.ndim - group_of(on).dim - (1 if scalars else 2)]
    x = x[..., None] if scalars else x
    if len(lead) == 1:
        return x, lambda y: y[..., 0] if scalars else y
    return x.reshape(math.prod(lead), *x.shape[len(lead):]), lambda y: y.reshape(*lead, *y.shape[1:])


def orthonormal_range(vectors: np.ndarray, rank: int) -> np.ndarray:
    """An orthonormal basis [m, rank] of the span of columns [m, n], by Gram-Schmidt on the first ones that are not small.

    Given a projector, the basis lies near the first axes, and to rounding it is the same on every machine.
    """
    basis = np.zeros((len(vectors), rank))
    rest = (vectors ** 2).sum(0)  # squared norms of what the basis leaves of each column
    for k in range(rank):
        pivot = int((rest > 0.137 * rest.max()).argmax())  # a ratio that symmetry does not bring about
        column = vectors[:, pivot]
        for _ in range(2):
            column = column - basis @ (basis.T @ column)
        basis[:, k] = column / np.linalg.norm(column)
        rest -= (basis[:, k] @ vectors) ** 2
    return basis


def permutes(matrices: np.ndarray) -> bool:
    """Whether the matrices of a representation, [order, d, d], or of one block of it, only permute their axis."""
    return bool((np.minimum(np.abs(matrices), np.abs(matrices - 1)) < _CLOSE).all())


def _members(group, subgroup):
    """Indices in ``group`` of a subgroup's elements."""
    if isinstance(subgroup, Group):
        if subgroup.dim != group.dim:
            raise ValueError(f"{subgroup!r} is no subgroup of {group!r}: the dimensions differ")
        try:
            return np.array([group.index(a) for a in subgroup.elements])
        except ValueError as error:
            raise ValueError(f"{subgroup!r} is no subgroup of {group!r}: {error}") from error
    members = np.unique(np.asarray(subgroup))
    if members.ndim != 1 or (members.size and (members.dtype.kind not in "iu" or members[0] < 0 or members[-1] >= group.order)):
        raise ValueError(f"expected a Group or indices from 0 to {group.order - 1} of elements of {group!r}, got {subgroup!r}")
    return members


def _checked(name, group, matrices):
    """A float64 copy of the matrices of a homomorphism; ValueError for anything else."""
    try:
        if np.iscomplexobj(matrices):
            raise TypeError("complex")
        m = np.array(matrices, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"representation {name!r} of {group!r} needs real matrices [{group.order}, d, d], got "
                         f"{matrices!r}") from error
    if m.ndim != 3 or m.shape[0] != group.order or m.shape[1] != m.shape[2] or m.shape[1] < 1:
        raise ValueError(f"representation {name!r} of {group!r} needs matrices [{group.order}, d, d], got shape {m.shape}")
    if not np.isfinite(m).all():
        raise ValueError(f"representation {name!r} of {group!r} has matrices that are not finite")
    vectors = np.random.default_rng(0).normal(size=(m.shape[1], 2))  # ρ(A) (ρ(B) v) = ρ(AB) v for random v, all A and B
    once = m @ vectors
    error = np.empty((group.order, group.order))
    for a in range(group.order):
        error[a] = np.abs(m[a] @ once - once[group.table[a]]).max((1, 2))
    allowed = _CLOSE * max(1.0, np.abs(m).max()) * m.shape[1]
    if np.abs(m[0] - np.eye(m.shape[1])).max() > allowed:
        raise ValueError(f"representation {name!r} of {group!r} gives the identity the matrix {m[0].tolist()}, expected the "
                         f"identity matrix")
    if error.max() > allowed:
        a, b = np.unravel_index(error.argmax(), error.shape)
        ab = group.table[a, b]
        raise ValueError(f"representation {name!r} of {group!r} is no homomorphism: matrices[{a}] @ matrices[{b}] differs from "
                         f"matrices[{ab}], though element {a} times element {b} is element {ab}, by {error.max():.1e}")
    return m


def _cleaned(m):
    """Entries within rounding of a whole number become whole."""
    return np.where(np.abs(m - np.round(m)) < 1e-12, np.round(m), m) + 0.0
