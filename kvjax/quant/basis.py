"""Bases in which layer inputs are quantised: singular vectors of projections, rotations. numpy, float64."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def svd_basis(
    weight: Float[np.ndarray, "D m"], rotate: bool = False
) -> tuple[Float[np.ndarray, "D r"], Float[np.ndarray, "r m"]]:
    """U and R = U^T W, so that x W = (x U) R, r = min(D, m) (XQuant, section 3.3.1: R = Σ B^T).

    rotate: turns the columns of U among themselves at random, which spreads outliers over them.
    """
    weight = np.asarray(weight, np.float64)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    r = s[:, None] * vt
    if not rotate:
        return u, r
    turn = rotation(u.shape[1])
    return u @ turn, turn.T @ r


def rotation(size: int) -> Float[np.ndarray, "n n"]:
    """A random orthogonal matrix, the same every time."""
    q, r = np.linalg.qr(np.random.default_rng(size).standard_normal((size, size)))
    return q * np.sign(np.diag(r))
