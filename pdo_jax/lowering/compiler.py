"""What to tell XLA, so that a program of these layers runs as fast as it can."""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax

_CHECKED = ("0.10.", "0.11.", "0.12.")  # the versions of jaxlib in which the option was seen to exist


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """Options for ``jax.jit(step, compiler_options=…)`` of a program that holds these layers, or any convolution.

    On a CPU they hand each convolution and matrix product to a library kernel: a training step of the paper's network for
    rotated MNIST was then 1.5 times as fast, on two cores without AMX. Empty on other platforms, and for a jaxlib in which the
    option was not checked. Only the outermost ``jax.jit`` takes options; a layer called outside of any uses them by itself.

    Args:
      platform: what the program is compiled for, by default ``jax.default_backend()``.

    >>> compiler_options("tpu")
    {}
    >>> step = jax.jit(lambda x: 2 * x, compiler_options=compiler_options())
    """
    platform = jax.default_backend() if platform is None else platform
    if platform != "cpu" or not importlib.metadata.version("jaxlib").startswith(_CHECKED):
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


@functools.lru_cache(maxsize=512)
def compiled_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by itself, with these options."""
    return jax.jit(function, compiler_options=compiler_options())
