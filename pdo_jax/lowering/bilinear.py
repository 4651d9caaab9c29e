"""Bilinear functions with adjoints of their own, differentiable forwards and backwards to any order.

A bilinear y(x, w) belongs to a trilinear form T(x, w, g) = ⟨g, y(x, w)⟩, whose gradients to its three arguments are

    input(w, g) = ∂T/∂x,      weight(x, g) = ∂T/∂w,      output(x, w) = ∂T/∂g = y.

Each is bilinear, and its transposes are the other two; so one primitive that knows all three, and computes any of them, is
closed under differentiation. A rule for vjp alone (``jax.custom_vjp``) would forbid jvp; what JAX derives by itself would be
slower than adjoints written by hand.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pdo_jax.lowering.compiler import compiled_alone

INPUT, WEIGHT, OUTPUT = range(3)


class Form(NamedTuple):
    """The three functions, compiled by ``jax.jit``; each takes the other two arguments in the order x, w, g.

    ``alone`` computes the output where nothing is differentiated."""

    input: Callable
    weight: Callable
    output: Callable
    alone: Callable


def apply(form: Form, a: jax.Array, b: jax.Array, slot: int = OUTPUT) -> jax.Array:
    """One of the functions of the other two arguments, by default y(x, w)."""
    axes = frozenset().union(*(_varying(v) for v in (a, b)))
    a, b = (jax.lax.pcast(v, tuple(axes - _varying(v)), to="varying") if axes - _varying(v) else v for v in (a, b))
    return _bilinear.bind(a, b, form=form, slot=slot, alone=slot == OUTPUT)


def _varying(x):
    """The manual axes of ``jax.shard_map`` over which x varies."""
    return jax.typeof(x).manual_axis_type.varying


def _compute(a, b, *, form, slot, alone):
    return (form.alone if alone else form[slot])(a, b)


def _abstract(a, b, **parameters):
    return jax.make_jaxpr(functools.partial(_compute, **parameters))(a, b).out_avals[0]


def _jvp(primals, tangents, *, form, slot, alone):
    call = functools.partial(_bilinear.bind, form=form, slot=slot, alone=False)
    y = call(*primals)
    terms = [call(*(t if i == k else p for i, p in enumerate(primals)))
             for k, t in enumerate(tangents) if type(t) is not ad.Zero]
    return y, functools.reduce(ad.add_tangents, terms)


def _transpose(cotangent, *operands, form, slot, alone):
    slots = [k for k in (INPUT, WEIGHT, OUTPUT) if k != slot]
    unknown = next(k for k, v in zip(slots, operands, strict=True) if ad.is_undefined_primal(v))
    known = dict(zip(slots, operands, strict=True)) | {slot: cotangent}
    result = _bilinear.bind(*(known[k] for k in sorted(known) if k != unknown), form=form, slot=unknown, alone=False)
    return [result if k == unknown else None for k in slots]


def _batch(operands, axes, *, form, slot, alone):
    """A form summed over a batch is the form of the batches; an argument without one is shared by all."""
    slots = [k for k in (INPUT, WEIGHT, OUTPUT) if k != slot]
    shared = tuple(k for k, axis in zip(slots, axes, strict=True) if axis is None)
    operands = [v if axis is None else jax.numpy.moveaxis(v, axis, 0) for v, axis in zip(operands, axes, strict=True)]
    return _bilinear.bind(*operands, form=_batched(form, shared), slot=slot, alone=alone), 0


@functools.lru_cache(maxsize=256)
def _batched(form, shared):
    def mapped(function, slot):
        axes = [None if k in shared else 0 for k in (INPUT, WEIGHT, OUTPUT) if k != slot]
        if slot in shared:
            return jax.jit(lambda a, b: jax.vmap(function, axes)(a, b).sum(0))
        return jax.jit(jax.vmap(function, axes))

    return Form(*(mapped(function, slot) for function, slot in zip(form, (INPUT, WEIGHT, OUTPUT, OUTPUT), strict=True)))


_bilinear = Primitive("pdo_bilinear")
_bilinear.def_impl(lambda a, b, *, form, slot, alone: compiled_alone(form.alone if alone else form[slot])(a, b))
_bilinear.def_abstract_eval(_abstract)
mlir.register_lowering(_bilinear, mlir.lower_fun(_compute, multiple_results=False))
ad.primitive_jvps[_bilinear] = _jvp
ad.primitive_transposes[_bilinear] = _transpose
batching.primitive_batchers[_bilinear] = _batch
