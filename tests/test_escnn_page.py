"""The page for users of escnn: its code runs, and every row is equivariant as it says."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import normal

from pdo_jax import fields

PAGE = (Path(__file__).parent.parent / "docs" / "escnn.md").read_text()
SETUP = {}
exec(compile(re.search(r"```python\n(.*?)```", PAGE, re.S).group(1), "escnn.md", "exec"), SETUP)
ROWS = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) ?\|$", PAGE, re.M)
CODE = [(name, re.match(r"`(.*?)`(?:$|,)", code).group(1), gives) for name, code, gives in ROWS if gives]
MODULES = """FieldType GeometricTensor tensor_directsum EquivariantModule BranchingModule MergeModule MultipleModule Linear
    R2PointConv R3PointConv R3Conv R2Conv R2ConvTransposed R3ConvTransposed R3IcoConv R3IcoConvTransposed R2Upsampling
    R3Upsampling GatedNonLinearity1 GatedNonLinearity2 GatedNonLinearityUniform InducedGatedNonLinearity1 NormNonLinearity
    InducedNormNonLinearity PointwiseNonLinearity ConcatenatedNonLinearity VectorFieldNonLinearity ReLU ELU LeakyReLU
    FourierPointwise FourierELU QuotientFourierPointwise QuotientFourierELU TensorProductModule ReshuffleModule NormMaxPool
    PointwiseMaxPool2D PointwiseMaxPool PointwiseMaxPool3D PointwiseMaxPoolAntialiased2D PointwiseMaxPoolAntialiased
    PointwiseMaxPoolAntialiased3D PointwiseAvgPool2D PointwiseAvgPool PointwiseAvgPoolAntialiased2D PointwiseAvgPoolAntialiased
    PointwiseAvgPool3D PointwiseAvgPoolAntialiased3D PointwiseAdaptiveAvgPool2D PointwiseAdaptiveAvgPool
    PointwiseAdaptiveAvgPool3D PointwiseAdaptiveMaxPool2D PointwiseAdaptiveMaxPool PointwiseAdaptiveMaxPool3D GroupPooling
    MaxPoolChannels NormPool InducedNormPool InnerBatchNorm NormBatchNorm InducedNormBatchNorm GNormBatchNorm IIDBatchNorm1d
    IIDBatchNorm2d IIDBatchNorm3d RestrictionModule DisentangleModule FieldDropout PointwiseDropout SequentialModule
    IdentityModule MaskModule HarmonicPolynomialR3""".split()  # escnn.nn 1.0.11


def inputs(dim):
    """{name: (field, representation)} of the page."""
    if dim == 3:
        return {"w": (normal(1, 5, 5, 5, 2, 3), SETUP["solid"])}
    plane = {"x": "regular", "v": "vector", "m": "mixed", "e": "every", "b": "bundle"}
    result = {name: (normal(2, 9, 9, 4, SETUP[rep].dim, seed=k), SETUP[rep]) for k, (name, rep) in enumerate(plane.items())}
    return result | {"image": (normal(2, 9, 9, 4), None), "t": (normal(2, 4, 8), SETUP["regular"])}


def turned(x, rep, group, a):
    if rep is None:
        return fields.act(x[..., None], fields.trivial(group), a)[..., 0]
    return fields.act(x, rep, a, space=x.ndim == group.dim + 3)


def test_every_module_has_a_row():
    named = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
    assert set(MODULES) <= named and len(CODE) >= 40
    assert all("not built: " in code or code.startswith("as `") for _, code, gives in ROWS if not gives)


@pytest.mark.parametrize("name, code, gives", CODE, ids=[code for _, code, _ in CODE])
def test_a_row_runs_and_is_equivariant(name, code, gives):
    """Every input turned by an element that preserves the grid gives the output turned as a field of what the row says."""
    rep = eval(gives, SETUP)
    given = inputs(rep.group.dim)
    y = eval(code, SETUP | {name: x for name, (x, _) in given.items()})
    assert y.shape[-1] == rep.dim and jnp.abs(y).max() > 0
    for a in (1, rep.group.order - 1):
        members = {name: (x, r, SETUP["p4m"] if rep.group.dim == 2 else rep.group) for name, (x, r) in given.items()}
        found = eval(code, SETUP | {name: turned(x, r, group, group.index(rep.group.elements[a]))
                                    for name, (x, r, group) in members.items()})
        np.testing.assert_allclose(found, turned(y, rep, rep.group, a), atol=2e-4 * np.abs(y).max())
