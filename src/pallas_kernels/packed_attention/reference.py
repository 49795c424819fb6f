"""Packed attention in plain float32, all values dequantised and one softmax: the reference for the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.layout import MASKED, Packed, dequantize


def packed_attention(
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    start: Int[Array, "B"],
    stop: Int[Array, "B"],
    *,
    first: int,
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Float32[Array, "B T H V"], Float32[Array, "B T H"]]:
    """See `pallas_kernels.packed_attention`; `interpret` has no effect."""
    batch, tokens, heads, _ = q.shape
    k, v = dequantize(keys), dequantize(values)
    rows = q.astype(jnp.float32).reshape(batch, tokens, k.shape[1], -1, q.shape[3]) * scale
    scores = jnp.einsum("btkgd,bksd->btkgs", rows, k, precision="highest")
    seen = visible(start[:, None] + jnp.arange(tokens), jnp.arange(k.shape[2]), first, stop, window)
    scores = jnp.where(seen[:, :, None, None], scores, MASKED)
    lse = jax.nn.logsumexp(scores, -1)
    p = jnp.where(seen[:, :, None, None], jnp.exp(scores - lse[..., None]), 0.0)
    output = weighted(p, v)
    lse = jnp.where(seen.any(-1)[:, :, None, None], lse, MASKED)
    return output.reshape(batch, tokens, heads, -1), lse.reshape(batch, tokens, heads)


def weighted(p: Float[Array, "B T K G S"], v: Float[Array, "B K S D"]) -> Float[Array, "B T K G D"]:
    """Sums of values times probabilities; where the probability is 0 a value adds nothing, even if it is NaN.

    Args:
      p: probabilities.
      v: values.

    Returns:
      The sums; NaN where a value that is not finite has a probability.
    """
    finite = jnp.isfinite(v)
    lost = jnp.einsum("btkgs,bksd->btkgd", (p != 0).astype(v.dtype), (~finite).astype(v.dtype)) > 0
    sums = jnp.einsum("btkgs,bksd->btkgd", p, jnp.where(finite, v, 0.0), precision="highest")
    return jnp.where(lost, jnp.nan, sums)


def visible(
    at: Int[Array, "B T"], positions: Int[Array, "S"], first: int, stop: Int[Array, "B"], window: int | None
) -> Float[Array, "B T S"]:
    """Computes the mask of attention.

    Args:
      at: positions of the queries.
      positions: stored positions.
      first: the first stored position that is read.
      stop: the position after the last that is read, per sequence.
      window: sliding window in tokens; None where there is none.

    Returns:
      Which stored positions each query sees.
    """
    edge = jnp.minimum(at + 1, stop[:, None])
    seen = (positions >= first) & (positions < edge[:, :, None])
    return seen if window is None else seen & (positions > at[:, :, None] - window)
