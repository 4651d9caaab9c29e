"""What is said of a trained network: its error, and how far its logits move when the group turns the images."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import pdo_jax as pdo


def error_rate(confusion: np.ndarray) -> float:
    return 1 - float(np.trace(confusion)) / int(confusion.sum())


def equivariance_error(model, variables, images) -> dict[str, float] | None:
    """For a network of a group: how far its logits move, relatively, when each group element turns the images."""
    group = getattr(model.network, "group", None)
    if not isinstance(group, pdo.groups.Group) or images.ndim != group.dim + 2:
        return None
    logits = jax.jit(lambda x: model.logits(variables, x, train=False))
    errors = pdo.equivariance.error(logits, jnp.asarray(images), group).tolist()
    return {element_name(k, matrix): error for k, (matrix, error) in enumerate(zip(group.elements, errors, strict=True))}


def element_name(index: int, matrix: np.ndarray) -> str:
    """In the plane "turn 45", in degrees, or "mirror 45" where axis 1 is mirrored first; elsewhere the element's index."""
    if matrix.shape != (2, 2):
        return f"element {index}"
    angle = round(math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))) % 360
    return f"{'turn' if np.linalg.det(matrix) > 0 else 'mirror'} {angle}"
