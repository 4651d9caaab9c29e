"""A network and its variables in one safetensors file, whose header says what the network is.

The header's metadata hold "format", "pdo_jax" (the version that wrote it), "network" (:mod:`pdo_jax.architecture`) and
"sha256", of the network's data and of all arrays. Reading builds modules of this library, of Flax, or of what the program has
imported itself; nothing is unpickled or executed.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from pdo_jax import architecture
from pdo_jax._version import __version__

FORMAT = "pdo_jax network, version 1"


def save(path: str | os.PathLike[str], network: nn.Module, variables: Mapping[str, Any]) -> None:
    """Writes a network and its variables, the whole file or nothing of it.

    Args:
      path: of the file, by custom "….safetensors".
      network: what :func:`pdo_jax.architecture.to_data` can describe.
      variables: its collections, {"params": …, "batch_stats": …}, of arrays.

    Raises:
      ValueError: a network that cannot be described, or variables without "params".

    >>> import jax, tempfile, pdo_jax as pdo
    >>> network = pdo.networks.MnistRotNet(num_classes=3)
    >>> variables = jax.jit(network.init)(jax.random.key(0), np.ones([1, 28, 28, 1]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/net.safetensors", network, variables)
    ...     again, read = load(f"{folder}/net.safetensors")
    >>> architecture.differences(again, network), (read["params"]["head"]["bias"] == variables["params"]["head"]["bias"]).all()
    ([], Array(True, dtype=bool))
    """
    if "params" not in variables:
        raise ValueError(f'variables must hold all collections, {{"params": …, "batch_stats": …}}, got {sorted(variables)}')
    flat = {name: np.ascontiguousarray(array) for name, array in flatten_dict(dict(variables), sep="/").items()}
    described = json.dumps(architecture.to_data(network))
    metadata = {"format": FORMAT, "pdo_jax": __version__, "network": described, "sha256": _checksum(described, flat)}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(to_bytes(flat, metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], network: nn.Module | None = None,
         trust: Collection[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """Reads what :func:`save` wrote.

    Args:
      path: of the file.
      network: what is expected; by default whatever the file describes.
      trust: packages of your own that the file may name, as for :func:`pdo_jax.architecture.from_data`.

    Returns:
      (network, variables), the variables as numpy arrays.

    Raises:
      ValueError: in one line, a file of another kind or version, a damaged one, or one of another network than ``network``,
        with the first field that differs.
      OSError: a file that cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {metadata.get('format')!r}; pdo_jax {__version__} reads {FORMAT!r}")
    if metadata.get("sha256") != _checksum(metadata.get("network", ""), flat):
        raise ValueError(f"{path} is damaged: its content does not have the checksum that it was written with")
    described = json.loads(metadata["network"])
    if network is not None and (differing := architecture.differences(described, architecture.to_data(network))):
        raise ValueError(f"{path} holds another network; the first field that differs is {differing[0]}")
    try:
        return network or architecture.from_data(described, trust), unflatten_dict(flat, sep="/")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checksum(described: str, flat: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256(described.encode())
    for name, array in sorted(flat.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()
