"""What is said of a trained network: how far its outputs move, or fail to turn, when the group turns the images."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import pdo_jax as pdo


def equivariance_error(model, variables, images) -> dict[str, float] | None:
    """For a network of a group: how far its logits move, relatively, when each group element turns the images; or how far an
    output field is from the turned one."""
    group, *reps = (getattr(model.network, name, None) for name in ("group", "in_rep", "out"))
    in_rep, out_rep = (rep if isinstance(rep, pdo.fields.Representation) else None for rep in reps)
    if not isinstance(group, pdo.groups.Group) or images.ndim != group.dim + (3 if in_rep else 2):
        return None
    outputs = jax.jit(lambda x: model.outputs(variables, x, train=False))
    errors = pdo.equivariance.error(outputs, jnp.asarray(images), group, in_rep=in_rep, out_rep=out_rep).tolist()
    return {element_name(k, matrix): error for k, (matrix, error) in enumerate(zip(group.elements, errors, strict=True))}


def element_name(index: int, matrix: np.ndarray) -> str:
    """In the plane "turn 45", in degrees, or "mirror 45" where axis 1 is mirrored first; elsewhere the element's index."""
    if matrix.shape != (2, 2):
        return f"element {index}"
    angle = round(math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))) % 360
    return f"{'turn' if np.linalg.det(matrix) > 0 else 'mirror'} {angle}"
