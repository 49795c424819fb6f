"""The vocabulary pass against full logits in float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.evaluate import vocabulary


def full(hidden: np.ndarray, head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and logits."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)), logits


@pytest.mark.parametrize("vocab,count", [(300, 7), (2048, 5), (5000, 1030)])
def test_equals_full_logits(vocab: int, count: int) -> None:
    rng = np.random.default_rng(vocab)
    head = rng.standard_normal((vocab, 24)).astype(np.float32)
    hidden = rng.standard_normal((count, 24)).astype(np.float32)
    moved = (hidden + 0.05 * rng.standard_normal(hidden.shape)).astype(np.float32)
    targets = rng.integers(0, vocab, count)
    targets[:2] = 0, vocab - 1
    own, dense = jax.jit(vocabulary.dense_run)(hidden, head, jnp.asarray(targets, jnp.int32))
    other = jax.jit(vocabulary.compare)(moved, head, jnp.asarray(targets, jnp.int32), dense)

    log_p, logits = full(hidden, head)
    log_q, moved_logits = full(moved, head)
    rows = np.arange(count)
    np.testing.assert_allclose(own.nll, -log_p[rows, targets], atol=2e-5)
    np.testing.assert_allclose(other.nll, -log_q[rows, targets], atol=2e-5)
    np.testing.assert_allclose(other.kld, (np.exp(log_p) * (log_p - log_q)).sum(-1), atol=2e-5)
    np.testing.assert_array_equal(dense.top, logits.argmax(-1))
    np.testing.assert_array_equal(np.asarray(other.agree) > 0, moved_logits.argmax(-1) == logits.argmax(-1))
    assert 0 < np.asarray(other.agree).mean() < 1 or count < 10


def test_small_divergences_survive_float32() -> None:
    """KL of 1e-5 is the size of an 8-bit cache's; the difference of two large log-sum-exps must not drown it."""
    rng = np.random.default_rng(0)
    head = rng.standard_normal((4000, 64)).astype(np.float32)
    hidden = 2 * rng.standard_normal((256, 64)).astype(np.float32)
    moved = (hidden + 1e-3 * rng.standard_normal(hidden.shape)).astype(np.float32)
    targets = jnp.zeros(256, jnp.int32)
    _, dense = vocabulary.dense_run(hidden, head, targets)
    log_p, log_q = full(hidden, head)[0], full(moved, head)[0]
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert 1e-6 < expected < 1e-4
    np.testing.assert_allclose(vocabulary.compare(moved, head, targets, dense).kld.mean(), expected, rtol=0.05)
    same = vocabulary.compare(hidden, head, targets, dense)
    assert float(jnp.abs(same.kld).max()) < 1e-5 and float(same.agree.min()) == 1


def test_memory_does_not_hold_the_logits() -> None:
    count, vocab = 2048, 16384
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((count, 32), "float32"), ((vocab, 32), "float32"), ((count,), "int32"))
    ]
    temp = jax.jit(vocabulary.dense_run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temp < count * vocab * 4 / 4
