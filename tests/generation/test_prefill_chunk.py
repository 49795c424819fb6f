"""Prompts read in chunks: the same cache where no method keeps a residual, else what `streaming` sees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.caches.plan import CachePlan
from kvjax.evaluate.forward import hidden_states
from kvjax.models.model import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [list(range(1, 75)), list(range(40, 60))]  # one ends chunks before the other


@pytest.fixture
def wide(tiny: Model):
    """The model in float64, in which no order of sums flips a rounding."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tiny.params)
        yield dataclasses.replace(tiny, params=params, dtype=jnp.dtype("float64"))


def test_dense_is_what_one_step_reads(wide: Model) -> None:
    whole, chunked = (kvjax.prefill(wide, PROMPTS, "dense", prefill_chunk=n) for n in (None, 31))
    assert whole.lengths == chunked.lengths == [74, 20]
    np.testing.assert_allclose(chunked.held.hidden, whole.held.hidden, rtol=0, atol=1e-10)


def test_chunks_of_the_residual_are_streaming(wide: Model) -> None:
    plan = CachePlan.parse("k4v4@kivi", wide.config)
    whole, chunked = (kvjax.prefill(wide, PROMPTS[:1], plan, prefill_chunk=n) for n in (None, 32))
    streamed = hidden_states(wide, plan, np.array(PROMPTS[:1]), plan.stream_chunk)
    np.testing.assert_allclose(chunked.held.hidden, streamed[:, -1], rtol=0, atol=1e-10)
    assert np.abs(chunked.held.hidden - whole.held.hidden).max() > 1e-6


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_a_chunk_is_at_least_one_token(tiny: Model, value: object) -> None:
    with pytest.raises(kvjax.KvjaxError, match=r"^prefill_chunk=.*; expected at least 1$"):
        kvjax.prefill(tiny, PROMPTS, prefill_chunk=value)  # type: ignore[arg-type]
