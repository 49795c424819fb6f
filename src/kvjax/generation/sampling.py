"""Sampling: how the next token is drawn from logits.

B sequences of a batch, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.checks import check_real, check_whole
from kvjax.errors import KvjaxError


@struct.dataclass
class Sampling:
    """How the next token is drawn: greedily, or from softmax(logits / temperature), cut to the likeliest tokens.

    A draw depends on the seed and the token's position only, so that batches and pauses change nothing.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # at most so many tokens
    top_p: Float[Array, ""]  # the fewest tokens that have this probability together
    seeds: Int[Array, "B"]
    greedy: bool = struct.field(pytree_node=False)
    cut: bool = struct.field(pytree_node=False)  # whether top_k or top_p say anything

    @classmethod
    def of(cls, temperature: Any, top_k: Any, top_p: Any, seed: Any, batch: int, vocab: int) -> Sampling:
        """Sequence i draws with seed + i. Raises KvjaxError for values that mean nothing."""
        expected = "0 (greedy) or a number from 1.2e-38 on"
        temperature = check_real("temperature", temperature, expected)
        # Below float32's smallest normal number a division would overflow, or be by zero.
        if not (temperature == 0 or float(np.finfo(np.float32).tiny) <= temperature < float("inf")):
            raise KvjaxError(f"temperature={temperature}; expected {expected}")
        top_k = vocab if top_k is None else min(check_whole("top_k", top_k, 1), vocab)
        expected = "more than 0 and at most 1"
        top_p = 1.0 if top_p is None else check_real("top_p", top_p, expected)
        if not 0 < top_p <= 1:
            raise KvjaxError(f"top_p={top_p}; expected {expected}")
        seeds = check_whole("seed", seed, 0, 2**31 - batch - 1) + np.arange(batch, dtype=np.int32)
        cut = top_k < vocab or top_p < 1.0
        temperature = min(temperature, float(np.finfo(np.float32).max))
        values = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
        return cls(*values, jnp.asarray(seeds, jnp.int32), temperature == 0, cut)


def sample(logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """The next token of each sequence, drawn for its position. Ties with the last kept token are kept."""
    if sampling.greedy:
        return logits.argmax(-1).astype(jnp.int32)
    # The largest becomes 0, so that a small temperature leaves it finite.
    logits = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    if sampling.cut:
        logits = jnp.where(logits >= min_kept_logit(logits, sampling), logits, -jnp.inf)

    def noise(seed: Array, position: Array) -> Float[Array, "V"]:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], logits.dtype)

    return (logits + jax.vmap(noise)(sampling.seeds, positions)).argmax(-1).astype(jnp.int32)


def min_kept_logit(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B 1"]:
    """The smallest logit that top_k, and then top_p among those, keep."""
    ordered = jnp.sort(logits, descending=True, axis=-1)
    ordered = jnp.where(jnp.arange(ordered.shape[-1]) < sampling.top_k, ordered, -jnp.inf)
    p = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(p, -1) - p
    first = jnp.arange(ordered.shape[-1]) == 0  # is kept however small top_p is: float32 may hold it as 0
    kept = first | ((before < sampling.top_p) & (ordered > -jnp.inf))
    return jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
