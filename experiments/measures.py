"""What is said of a trained network: its error, and how its outputs change when the images turn."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import pdo_jax as pdo


def interval(wrong: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: what error the network may have on all images of which n were drawn.

    >>> [round(x, 4) for x in interval(5, 100)]
    [0.0215, 0.1118]
    """
    z, share = 1.959964, wrong / n
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def logits_at_angles(model, variables, images, turns: int = 24) -> np.ndarray:
    """[turns + 1, n, classes]: for images [n, height, width, channels] turned by 0, 360 / turns, … 360 degrees, cubically."""
    logits = jax.jit(lambda x: model.outputs(variables, x, train=False))
    parts = [jnp.asarray(images[start : start + 500]) for start in range(0, len(images), 500)]
    return np.stack([np.concatenate([logits(pdo.groups.transform(part, matrix)) for part in parts])
                     for matrix in full_turn(turns)])


def full_turn(turns: int) -> list[np.ndarray]:
    """The rotations by 0, 360 / turns, … 360 degrees."""
    return [*pdo.groups.cyclic(turns).elements, np.eye(2)]


def relative(y: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(y - expected) / np.sqrt(np.sum(np.square(expected)) + 1e-300))


def fitted_slope(x, y) -> float:
    """The exponent p of y ~ x^p, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


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
