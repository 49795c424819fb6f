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


dense_run, compare = jax.jit(vocabulary.dense_run), jax.jit(vocabulary.compare)


def divergence(hidden: np.ndarray, moved: np.ndarray, head: np.ndarray) -> np.ndarray:
    targets = jnp.zeros(len(hidden), jnp.int32)
    _, dense = dense_run(hidden, head, targets)
    return np.asarray(compare(moved, head, targets, dense).kld, np.float64)


@pytest.mark.parametrize("size", [1e4, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("by", [0.0, 1e-6, 1e-2, 1.0])
def test_no_divergence_is_negative(size: float, by: float) -> None:
    """Of logits whose rounding alone is far above 1, ties among the words included."""
    rng = np.random.default_rng(0)
    head = rng.standard_normal((3000, 24)).astype(np.float32)
    head[1500:] = head[:1500]  # each word has a twin
    hidden = (np.float32(size) * rng.standard_normal((64, 24))).astype(np.float32)
    moved = hidden * (1 + by * rng.standard_normal(hidden.shape)).astype(np.float32)
    (log_p, logits), (log_q, _) = full(hidden, head), full(moved, head)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    found = divergence(hidden, moved, head)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 + 1e-6 * np.abs(logits).max() * (by > 0))


def test_usual_divergences_are_those_of_whole_log_sum_exps() -> None:
    """(h - h')·m - lse + lse', where that loses nothing: in float64. What float32 loses is a few units in 1e-7."""
    rng = np.random.default_rng(1)
    shapes = (900, 16), (200, 16), (200, 16)
    head, hidden, noise = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    moved = hidden + np.float32(0.01) * noise
    log_p, logits = full(hidden, head)
    log_q, other = full(moved, head)
    lse, moved_lse = (logits - log_p)[:, 0], (other - log_q)[:, 0]
    expected = ((hidden - moved).astype(np.float64) * (np.exp(log_p) @ head)).sum(-1) - lse + moved_lse
    found = divergence(hidden, moved, head)
    assert expected.mean() > 1e-4
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(found.mean(), expected.mean(), atol=2e-7)


def test_memory_does_not_hold_the_logits() -> None:
    count, vocab = 2048, 16384
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((count, 32), "float32"), ((vocab, 32), "float32"), ((count,), "int32"))
    ]
    temp = jax.jit(vocabulary.dense_run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temp < count * vocab * 4 / 4
