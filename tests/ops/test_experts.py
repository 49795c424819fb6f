"""Routed experts against numpy, in both forms, with ties and with experts that nobody chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.ops.experts import Experts, by_sorting, dense, route

TOKENS, DIM, EXPERTS, WIDTH, K = 11, 8, 5, 6, 2


def gated(gate, up):
    return gate * up


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("form", [dense, by_sorting])
@pytest.mark.parametrize("biases", [False, True])
def test_both_forms_are_the_weighted_sum(form, biases):
    rng = np.random.default_rng(0)
    shapes = [(EXPERTS, WIDTH, DIM)] * 2 + [(EXPERTS, DIM, WIDTH)]
    weights = [rng.standard_normal(shape) for shape in shapes]
    offsets = [rng.standard_normal(shape[:2]) if biases else np.zeros(shape[:2]) for shape in shapes]
    x = rng.standard_normal((TOKENS, DIM))
    chosen = rng.permuted(np.tile([0, 1, 3], (TOKENS, 1)), axis=1)[:, :K]  # nobody chooses 2 and 4
    share = rng.random((TOKENS, K))
    expected = np.zeros((TOKENS, DIM))
    for t in range(TOKENS):
        for e, s in zip(chosen[t], share[t], strict=True):
            gate, up = (weights[i][e] @ x[t] + offsets[i][e] for i in (0, 1))
            expected[t] += s * (weights[2][e] @ gated(gate, up) + offsets[2][e])
    with jax.enable_x64(True):
        experts = Experts(*map(jnp.asarray, weights), *(map(jnp.asarray, offsets) if biases else ()))
        found = jax.jit(form, static_argnums=4)(jnp.asarray(x), experts, chosen, jnp.asarray(share), gated)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_largest_scores_are_chosen_and_of_equal_ones_the_first(normalized):
    scores = np.array([[1.0, 3.0, 2.0, 3.0, 0.0], [0.5, 0.5, 0.5, 0.5, 0.5], [-1.0, -2.0, 4.0, -1.0, -3.0]])
    chosen, weights = route(jnp.asarray(scores, jnp.float32), K, normalized)
    np.testing.assert_array_equal(chosen, [[1, 3], [0, 1], [2, 0]])
    all_of_them = np.take_along_axis(softmax(scores), np.asarray(chosen), 1)
    expected = all_of_them / all_of_them.sum(1, keepdims=True) if normalized else all_of_them
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
