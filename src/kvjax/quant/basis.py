"""Bases in which tensors are quantised: singular vectors of projections, and rotations.

Computed in numpy, in float64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

Basis = Literal["svd", "balanced", "learned"]
RIDGE = 1e-3  # of the mean eigenvalue, added to second moments of few tokens


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


def balance(
    moment: Float[np.ndarray, "r r"], fisher: Float[np.ndarray, "r r"], rotate: bool = False
) -> tuple[Float[np.ndarray, "r r"], Float[np.ndarray, "r r"]]:
    """Finds a basis A in which rounding rows z A costs least: A A^T = Σ^-1 # H, the geometric mean.

    Rounding to a fixed number of levels has errors in proportion to the spread of what is rounded, and an error e of
    z costs ½ e H e^T. In this basis both, A^T Σ A and A^-1 H A^-T, are the same matrix (up to a factor); the product
    of their traces is then the least there is. A rotation keeps it, and spreads it over the channels.

    Args:
      moment: Σ, the second moment of z.
      fisher: H, that of the gradient of the log-likelihood with respect to z.
      rotate: multiplies A by a random rotation.

    Returns:
      A, scaled to keep the mean square of z, and its inverse.
    """
    moment, fisher = _regular(moment), _regular(fisher)
    root, inverse = _powers(moment)
    mean = inverse @ _powers(root @ fisher @ root)[0] @ inverse
    mean *= np.trace(moment) / np.trace(mean @ moment)
    t, back = _powers(mean)
    turn = rotation(len(t)) if rotate else np.eye(len(t))
    return t @ turn, turn.T @ back


def _regular(matrix: Float[np.ndarray, "r r"]) -> Float[np.ndarray, "r r"]:
    """A symmetric matrix with a part of its mean eigenvalue added to each."""
    return (matrix + matrix.T) / 2 + RIDGE * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def _powers(matrix: Float[np.ndarray, "r r"]) -> tuple[Float[np.ndarray, "r r"], Float[np.ndarray, "r r"]]:
    """The square root of a positive definite matrix, and its inverse."""
    values, vectors = np.linalg.eigh(matrix)
    root = np.sqrt(np.maximum(values, np.finfo(np.float64).tiny))
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


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


def block_hadamard(size: int) -> Float[np.ndarray, "n n"]:
    """Builds Hadamard matrices along the diagonal, as large as the largest power of two that divides the size.

    Args:
      size: rows and columns n.
    """
    block = size & -size
    return np.kron(np.eye(size // block), hadamard(block))
