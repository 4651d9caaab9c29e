"""Run by test_meshes.py on two CPU devices: every item of the table over meshes of one and two devices."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quick import jit
from table import CORE, has_statistics, items


def run(call):
    """Outputs of which each example has its own, and the gradients of a sum over all examples."""

    def loss(variables, x):
        y = jax.tree.leaves(call(variables, x))[0].astype(jnp.float32)
        return (jnp.sin(y) ** 2).sum(), y

    def values(variables, x):
        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)
        return y, gradients

    return values


def over(kind, devices, call, variables, x, sharded):
    """The same on a mesh whose axes are Auto, Explicit or manual, the batch sharded or on every device."""
    spec = P("data") if sharded else P()
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Explicit if kind == "Explicit" else AxisType.Auto,),
                         devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        variables = jax.device_put(variables, NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, spec))
        if kind != "manual":
            y, gradients = jit(run(call))(variables, x)
            if kind == "Explicit":
                assert jax.typeof(y).sharding.spec[0] == (spec[0] if sharded else None), jax.typeof(y)
            return y, gradients

        def local(variables, x):  # every device its part; gradients to what all share are sums by themselves
            y, (dvariables, dx) = run(call)(variables, x)
            return y, (dvariables, dx)

        return jit(jax.shard_map(local, in_specs=(P(), spec), out_specs=(spec, (P(), spec))))(variables, x)


def main():
    failures, count = [], 0
    for dim, name in CORE:
        call, variables, x = items(dim, batch=4)[name]()
        random = "Dropout" in name
        expected = jit(run(call))(variables, x)
        for kind in ("Auto", "Explicit", "manual"):
            for devices, sharded in ((1, True), (2, True), (2, False)):
                if kind == "manual" and (has_statistics(name) and sharded or random):
                    continue  # a part has statistics of its own; tested with axis_name elsewhere
                count += 1
                try:
                    found = over(kind, devices, call, variables, x, sharded)
                    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                        np.testing.assert_allclose(f, e, atol=1e-4 * max(1, np.abs(e).max()))
                except Exception as error:
                    failures.append(f"{dim}-D {name}, {kind}, {devices} devices, sharded={sharded}: "
                                    f"{type(error).__name__}: {str(error)[:400]}")
                    print(failures[-1], flush=True)
    print(f"{count} cases, {len(failures)} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
