"""Balanced bases against what defines them."""

from __future__ import annotations

import numpy as np

from kvjax.quant.basis import balance

SIZE = 12


def second_moment(seed: int) -> np.ndarray:
    """Of rows whose channels differ much, and depend on one another."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((400, SIZE)) @ rng.standard_normal((SIZE, SIZE)) * np.geomspace(0.1, 10, SIZE)
    return rows.T @ rows / len(rows)


def test_both_matrices_are_the_same_in_a_balanced_basis() -> None:
    moment, fisher = second_moment(0), second_moment(1)
    for rotate in (False, True):
        to, back = balance(moment, fisher, rotate)
        np.testing.assert_allclose(to @ back, np.eye(SIZE), atol=1e-9)
        spread, cost = to.T @ moment @ to, back @ fisher @ back.T
        assert np.isclose(np.trace(spread), np.trace(moment), rtol=0.01)
        ratio = np.trace(cost) / np.trace(spread)
        np.testing.assert_allclose(cost / ratio, spread, atol=0.01 * np.abs(spread).max())


def test_no_other_basis_costs_less() -> None:
    """The product of the traces, of what is spread and of what errors cost, in bases near and far."""
    moment, fisher = second_moment(2), second_moment(3)[::-1, ::-1]  # what varies most costs least

    def loss(to: np.ndarray) -> float:
        back = np.linalg.inv(to)
        return float(np.trace(to.T @ moment @ to) * np.trace(back @ fisher @ back.T))

    best = loss(balance(moment, fisher)[0])
    assert best < 0.5 * loss(np.eye(SIZE))
    rng = np.random.default_rng(4)
    for size in (0.01, 0.1, 1.0):
        other = balance(moment, fisher)[0] @ (np.eye(SIZE) + size * rng.standard_normal((SIZE, SIZE)))
        assert best < 1.001 * loss(other)


def test_moments_of_few_tokens_can_be_balanced() -> None:
    """Channels that nothing was seen of keep a way back."""
    moment, fisher = second_moment(5), second_moment(6)
    moment[3:5], moment[:, 3:5], fisher[0], fisher[:, 0] = 0, 0, 0, 0
    to, back = balance(moment, fisher, rotate=True)
    np.testing.assert_allclose(to @ back, np.eye(SIZE), atol=1e-9)
    assert np.linalg.cond(to) < 1e4
