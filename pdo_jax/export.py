"""Trained networks for inference: folded into plain convolutions, and as a StableHLO or ONNX program that runs by itself."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from pdo_jax import conv, kernels, lowering
from pdo_jax._version import __version__
from pdo_jax.conv import GroupConv, LiftingConv, PDOConv
from pdo_jax.fields import group_of
from pdo_jax.groups import Array
from pdo_jax.layers import GroupBatchNorm, trains
from pdo_jax.weights import load, save

__all__ = ["Plain", "about", "from_stablehlo", "load", "save", "to_onnx", "to_plain", "to_stablehlo"]
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_plain(network: nn.Module, variables: Mapping[str, Any], shape: Sequence[int | None], *,
             dtype: DTypeLike = jnp.float32) -> tuple["Plain", dict[str, Any]]:
    """Folds a trained network into plain convolutions and merges batch norms into them, for inference.

    ``plain.apply(plain_variables, x)`` equals ``network.apply(variables, x, train=False)``; a network whose ``__call__`` has no
    ``train`` is called without. In "params", under the path of every LiftingConv, GroupConv and PDOConv, stand an expanded
    kernel [k, …, k, channels · components, features · out components] and a bias. A GroupBatchNorm becomes a scale and a bias;
    where a convolution's output goes nowhere but into it, at every call of both, it is merged into the convolution and has no
    variables. All else stays, also layers that are transposed or in parts, and a subclass with a ``__call__`` of its own.

    Args:
      network: a Flax module of one input, or a :class:`Plain`, which is returned as it is.
      variables: its "params", "batch_stats" and whatever else it has.
      shape: of any input that it takes, [batch, *space, channels]. The modules inside exist only in a call, so one is traced,
        none is run; the result is good for other sizes as far as the network is.
      dtype: of that input.

    Returns:
      (plain, plain_variables): a :class:`Plain` and a new dict.

    Raises:
      ValueError: variables without "params"; a batch norm that takes the statistics of its batch at inference; a convolution
        under ``nn.scan`` or ``nn.vmap``.

    >>> import pdo_jax as pdo
    >>> network = pdo.networks.PAPER["mnist_rot"]()
    >>> variables = jax.jit(network.init)(jax.random.key(0), jnp.ones([1, 28, 28, 1]))
    >>> plain, folded = to_plain(network, variables, (1, 28, 28, 1))
    >>> folded["params"]["conv2"]["kernel"].shape, folded["params"]["conv2"]["bias"].shape
    ((5, 5, 56, 56), (56,))
    >>> "norm2" in folded["params"]
    False
    """
    if isinstance(network, Plain):
        return network, variables
    if "params" not in variables:
        raise ValueError(f'variables must hold all collections, {{"params": …, "batch_stats": …}}, got {sorted(variables)}')
    layers, merged = _layers(network, variables, jax.ShapeDtypeStruct((1, *shape[1:]), dtype))
    flat = flatten_dict({name: dict(collection) for name, collection in variables.items()})
    norms = {}
    for path, layer in layers.items():
        if isinstance(layer, GroupBatchNorm):
            scale, bias = (flat.pop(("params", *path, name)) for name in ("scale", "bias"))
            mean, var = (flat.pop(("batch_stats", *path, name)) for name in ("mean", "var"))
            factor = scale * jax.lax.rsqrt(var + layer.epsilon)
            norms[path] = factor, bias - mean * factor
    for path, layer in layers.items():
        if not isinstance(layer, GroupBatchNorm):
            mix, kernel = flat.pop(("params", *path, "mix"), None), flat["params", *path, "kernel"]
            kernel = _kernel(layer, kernel if mix is None else kernels.product(mix, kernel))
            bias = flat["params", *path, "bias"] if layer.use_bias else jnp.zeros(layer.features, kernel.dtype)
            components = kernel.shape[-1] // layer.features
            if path in merged:
                factor, shift = norms[merged[path]]
                kernel, bias = kernel * jnp.repeat(factor, components), bias * factor + shift
            flat["params", *path, "kernel"], flat["params", *path, "bias"] = kernel, jnp.repeat(bias, components)
    for path in norms.keys() - set(merged.values()):
        flat["params", *path, "scale"], flat["params", *path, "bias"] = norms[path]
    return Plain(network), unflatten_dict(flat)


class Plain(nn.Module):
    """A network at inference with plain convolutions, for the variables that :func:`to_plain` gives. Shapes: the network's.

    Attributes:
      network: the network.
      lowering: "dense", for programs of standard operations alone (:func:`pdo_jax.lowering.portable`), or another of
        :mod:`pdo_jax.lowering`: then a kernel is taken apart into the operators of its layer again. "auto",
        ``plain.clone(lowering="auto")``, is faster on a CPU and the same elsewhere. Only for kernels as :func:`to_plain` made
        them: from any other, all that is not of the layer's form would be lost.
    """

    network: nn.Module
    lowering: str = "dense"

    def setup(self) -> None:
        nn.share_scope(self, self.network)

    def __call__(self, x: Array) -> jax.Array:
        standard = lowering.portable() if self.lowering == "dense" else contextlib.nullcontext()
        with standard, nn.intercept_methods(functools.partial(_run, self.lowering)):
            return self.network(x, **_inference(self.network))


# To a file


def to_stablehlo(network: nn.Module, variables: Mapping[str, Any], shape: Sequence[int | None], *,
                 dtype: DTypeLike = jnp.float32, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """A network at inference as the bytes of one file: a program of a batch of inputs, its variables baked in as constants.

    The bytes are those of ``jax.export``, which ``jax.export.deserialize`` reads too, and behind them a line of JSON with
    versions (:func:`about`) and a checksum. Needs the package ``flatbuffers`` (the extra ``export``), as ``jax.export`` does.

    Args:
      network, variables: folded by :func:`to_plain`, before, or now: then with ``lowering="auto"``, the fastest.
      shape: of the input, [batch, *space, channels]; batch None: any, if the network never uses it as an int (``len(x)``).
      dtype: of the input.
      platforms: what it shall run on, some of :data:`PLATFORMS`.

    Raises:
      ImportError: flatbuffers is not installed.
      ValueError: as :func:`to_plain`; an unknown platform; batch None for a network that needs a number.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError(f'to_stablehlo needs flatbuffers ({error}): pip install "pdo_jax[export]"') from error
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"platforms must be some of {PLATFORMS}, got {platforms!r}")
    plain, variables = to_plain(network, variables, shape, dtype=dtype)
    if plain is not network:
        plain = plain.clone(lowering="auto")  # the kernels in the file stay as they are
    batch = export.symbolic_shape("batch")[0] if shape[0] is None else shape[0]
    x = jax.ShapeDtypeStruct((batch, *shape[1:]), dtype)
    try:
        held = export.DisabledSafetyCheck.custom_call("LayoutConstraint")  # in layers that stay as they are, on a CPU
        program = export.export(jax.jit(lambda x: plain.apply(variables, x)), platforms=platforms, disabled_checks=[held])(x)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        if shape[0] is not None:
            raise
        raise ValueError(f"{type(plain.network).__name__} needs its batch as a number ({error}): give one in shape, or write "
                         "x.shape[0] for len(x) in the network") from error
    line = {"pdo_jax": __version__, "jax": jax.__version__, "calling_convention": program.calling_convention_version,
            "platforms": list(platforms), "shape": [n and int(n) for n in shape], "dtype": x.dtype.name}
    data = bytes(program.serialize()) + _MARK + json.dumps(line).encode()
    return data + _checksum(data)


def from_stablehlo(data: bytes) -> Callable[[Array], jax.Array]:
    """The function of a batch of inputs in a file of :func:`to_stablehlo`. Trust it first: it can call whatever jax can.

    Raises:
      ValueError: another file, a damaged one, or one of a version of ``jax.export`` that this jax does not read.
    """
    line = about(data)
    low, high = export.minimum_supported_calling_convention_version, export.maximum_supported_calling_convention_version
    if not low <= (version := line["calling_convention"]) <= high:
        raise ValueError(f"the file is of jax {line['jax']}, calling convention {version}; jax {jax.__version__} reads {low} "
                         f"to {high}: write it again, or read it with a jax nearer to {line['jax']}")
    return jax.jit(export.deserialize(bytearray(data)).call)


def about(data: bytes) -> dict[str, Any]:
    """What a file of :func:`to_stablehlo` says of itself: versions of pdo_jax and jax, platforms, shape and dtype of the input.

    Raises:
      ValueError: another file, or a damaged one.
    """
    written, checksum = bytes(data[:-64]), bytes(data[-64:])
    _, mark, line = written.rpartition(_MARK)
    if not mark:
        raise ValueError("expected a file of pdo_jax.export.to_stablehlo, with a line of versions and a checksum at its end, "
                         f"got {len(data)} bytes without: another file, or one that was cut short")
    if _checksum(written) != checksum:
        raise ValueError(f"the file of {len(data)} bytes is damaged: its checksum is not {checksum!r}: write it anew")
    return json.loads(line)


def to_onnx(network: nn.Module, variables: Mapping[str, Any], shape: Sequence[int | None]) -> bytes:
    """A network at inference as an ONNX model with its variables inside, of one input "x" in float32.

    Needs the package ``jax2onnx`` (the extra ``onnx``), which converts convolutions along one axis or two.

    Args:
      network, variables: as for :func:`to_plain`, or what it returned.
      shape: of the input, [batch, *space, channels]; batch None: any.

    Raises:
      ImportError: jax2onnx is not installed.
      ValueError: as :func:`to_plain`; what jax2onnx cannot convert, such as convolutions in space (:func:`to_stablehlo` can),
        or what computes in another type than float32, which few ONNX runtimes do.
    """
    try:
        import jax2onnx
        import onnx_ir
    except ImportError as error:
        raise ImportError(f'to_onnx needs jax2onnx ({error}): pip install "pdo_jax[onnx]"') from error
    plain, variables = to_plain(network, variables, shape)
    name, x = type(plain.network).__name__, jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)
    program = jax.make_jaxpr(functools.partial(plain.apply, variables))(x)
    if halves := {v.aval.dtype.name for v in jax.tree.leaves([eqn.outvars for eqn in program.eqns])} & {"bfloat16", "float16"}:
        raise ValueError(f"{name} computes in {halves.pop()}; give it in float32: network.clone(dtype=jnp.float32)")
    try:
        model = jax2onnx.to_onnx(functools.partial(plain.apply, variables), [("batch" if shape[0] is None else shape[0],
                                 *shape[1:])], model_name=name, input_names=["x"], return_mode="ir")
    except (NotImplementedError, TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        raise ValueError(f"jax2onnx cannot convert {name} for inputs {tuple(shape)}: {error}; to_stablehlo takes any network, "
                         "and a batch given as a number more of them") from error
    for value in (value for node in model.graph for value in node.outputs if value.type is None):
        value.shape = None  # which the file could not hold without a type, as a warning would say of each
    return onnx_ir.to_proto(model).SerializeToString()


_MARK = b"\npdo_jax.export "


def _checksum(data):
    return hashlib.sha256(data).hexdigest().encode()


# What is folded


def _inference(network):
    """The argument that asks a network for inference, if it takes one."""
    return {"train": False} if "train" in inspect.signature(network.__call__).parameters else {}


def _folds(context):
    layer = context.module
    return context.method_name == "__call__" and type(layer).__call__ in (
        LiftingConv.__call__, GroupConv.__call__, PDOConv.__call__, GroupBatchNorm.__call__) and not (
        getattr(layer, "transpose", False) or getattr(layer, "feature_group_count", 1) > 1)


def _norm_input(layer, x, train=None, mask=None):
    if mask is not None:
        raise ValueError(f"{_name(layer)} is given a mask, which a folded norm does not take: export the network as it is")
    if trains(layer, "use_running_average", train):
        raise ValueError(f"{_name(layer)} takes the statistics of its batch at inference too: call it with the network's "
                         "train, or make it with use_running_average=True")
    return x


def _name(layer):
    return "/".join(layer.path) or type(layer).__name__


def _layers(network, variables, x):
    """{path: layer to fold} and {path of a convolution: path of the batch norm to merge into it}, from a trace."""
    layers, outputs, sources = {}, [], {}

    def record(call, args, kwargs, context):
        if not _folds(context):
            return call(*args, **kwargs)
        layer, path = context.module, context.module.path
        layers[path] = layer
        if not isinstance(layer, GroupBatchNorm):
            y = checkpoint_name(call(*args, **kwargs), f"{__name__} {len(outputs)}")
            outputs.append((path, y, set()))
            return y
        x = _norm_input(layer, *args, **kwargs)
        told = () if layer.use_running_average else (False,)
        before, _, takers = next((output for output in outputs if output[1] is x), (None, None, None))
        sources.setdefault(path, set()).add(before)
        if before is None:
            return call(x, *told)
        takers.add(path)
        return call(jnp.zeros_like(x), *told)  # what then still takes the convolution's output is something else

    def run(variables, x):
        with nn.intercept_methods(record):
            return network.apply(variables, x, **_inference(network))

    used = set(_used(jax.make_jaxpr(run)(variables, x).jaxpr))
    followers = {}  # of each convolution, over all its calls: the paths of batch norms, None for anything else
    for k, (path, _, takers) in enumerate(outputs):
        followers.setdefault(path, set()).update({None} if f"{__name__} {k}" in used or not takers else takers)
    whole = {norm for norm, before in sources.items() if all(followers.get(path) == {norm} for path in before)}
    return layers, {path: norm for path, (norm, *_) in followers.items() if norm in whole}


def _used(jaxpr):
    """The names, given by checkpoint_name, of values that something takes."""
    from jax.extend.core import Var, jaxprs_in_params  # here, since it brings in Pallas

    taken = {v for vs in (jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns)) for v in vs if isinstance(v, Var)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and eqn.outvars[0] in taken:
            yield eqn.params["name"]
        for inner in jaxprs_in_params(eqn.params):
            yield from _used(inner)


def _kernel(layer, w):
    """The plain kernel of a layer, at least in float32."""
    if w.ndim != (3 if isinstance(layer, PDOConv) else 4):
        raise ValueError(f"{_name(layer)} has a kernel of shape {w.shape}, as under nn.scan or nn.vmap, where it cannot be "
                         "folded: call the layers in a Python loop")
    return _expand(jnp.asarray(w, jnp.promote_types(w.dtype, jnp.float32)), layer.coefficients())


@functools.partial(jax.jit, static_argnums=1)
def _expand(w, coefficients):
    return lowering.expand(coefficients(w), coefficients.stencils)


# How it runs


def _run(way, call, args, kwargs, context):
    if not _folds(context):
        return call(*args, **kwargs)
    layer = context.module
    if not isinstance(layer, GroupBatchNorm):
        return _convolution(way, layer, *args, **kwargs)
    x = _norm_input(layer, *args, **kwargs)
    dtype = layer.dtype or x.dtype
    if layer.has_variable("params", "scale"):  # not merged
        scale, bias = (layer.get_variable("params", name) for name in ("scale", "bias"))
        if x.ndim > group_of(layer.group).dim + 2:
            scale, bias = scale[:, None], bias[:, None]
        x = x.astype(jnp.float32) * scale + bias
    return x.astype(dtype)


def _convolution(way, layer, x):
    coefficients, group = layer.coefficients(), layer.in_rep.group if isinstance(layer, PDOConv) else layer.group
    lifted = x.ndim > group.dim + 2
    x = x if lifted else x[..., None]
    kernel, bias = (layer.get_variable("params", name) for name in ("kernel", "bias"))
    shape = coefficients.stencils.shape[1:] + (x.shape[-2] * x.shape[-1],)
    if kernel is None or kernel.shape[:-1] != shape:
        raise ValueError(f"{_name(layer)} takes a plain kernel, of shape {shape} before its last axis, got "
                         f"{kernel if kernel is None else kernel.shape}: give the variables that to_plain returned")
    symmetry = {} if isinstance(layer, PDOConv) else conv.symmetry(group, coefficients.bank, lifted)
    kernel = kernel.reshape(*kernel.shape[:-2], *x.shape[-2:], layer.features, -1)
    y = conv.convolve(layer, x, kernel, _Parts(coefficients), way, **symmetry)
    return y + bias.reshape(layer.features, -1).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class _Parts(lowering.Given):
    """The coefficients of the operators in a plain kernel [k, …, k, channels, components, features, out components]."""

    layer: Any

    @property
    def stencils(self):
        return self.layer.stencils

    @property
    def indices(self):
        return self.layer.indices

    def __call__(self, kernel, wanted=None):
        inverse = self._inverse(kernel.dtype)
        c = jnp.tensordot(inverse, kernel.reshape(inverse.shape[1], *kernel.shape[-4:]), 1)
        return super().__call__(c, wanted)

    def transpose(self, c, shape, wanted=None):
        inverse = self._inverse(c.dtype)
        c = super().transpose(c, (len(inverse), *shape[-4:]), wanted)
        return jnp.tensordot(inverse.T, c, 1).reshape(shape)

    def _inverse(self, dtype):
        flat = self.stencils.reshape(len(self.stencils), -1)
        return jnp.asarray(np.linalg.pinv(flat).T, dtype)  # of stencils that are independent

    def kernel(self, kernel):
        return kernel.reshape(*kernel.shape[:-4], kernel.shape[-4] * kernel.shape[-3], -1)

    def kernel_transpose(self, kernel, shape):
        return kernel.reshape(shape)
