"""Bases in which tensors are quantised: singular vectors of projections, and rotations.

Computed in numpy, in float64.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def svd_basis(
    weight: Float[np.ndarray, "D m"], rotate: bool = False
) -> tuple[Float[np.ndarray, "D r"], Float[np.ndarray, "r m"]]:
    """Factors a projection W by its singular vectors, so that x W = (x U) R (XQuant, section 3.3.1: R = Σ B^T).

    Args:
      weight: W.
      rotate: multiplies U by a random rotation of its columns, which spreads outliers over them.

    Returns:
      U and R = U^T W, with r = min(D, m).
    """
    weight = np.asarray(weight, np.float64)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    r = s[:, None] * vt
    if not rotate:
        return u, r
    turn = rotation(u.shape[1])
    return u @ turn, turn.T @ r


def rotation(size: int) -> Float[np.ndarray, "n n"]:
    """Draws a random orthogonal matrix, the same at every call.

    Args:
      size: rows and columns n; it seeds the draw.
    """
    q, r = np.linalg.qr(np.random.default_rng(size).standard_normal((size, size)))
    return q * np.sign(np.diag(r))


def hadamard(size: int) -> Float[np.ndarray, "n n"]:
    """Builds Sylvester's Hadamard matrix, scaled to be orthogonal; it is symmetric, so its own inverse.

    Args:
      size: rows and columns n, a power of two.
    """
    index = np.arange(size)
    odd = np.bitwise_count(index[:, None] & index) % 2
    return (1.0 - 2.0 * odd) / np.sqrt(size)
