"""Rematerialising attention in plain float32: everything dequantised and rebuilt. What the kernels are held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.layout import MASKED, Packed, dequantize
from pallas_kernels.packed_attention.reference import visible
from pallas_kernels.remat_attention.weights import Rebuild


def remat_attention(
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    rebuild: Rebuild,
    start: Int[Array, "B"],
    stop: Int[Array, "B"],
    *,
    first: int,
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Float32[Array, "B T H s"], Float32[Array, "B T H"]]:
    batch, tokens, heads, head_dim = q.shape
    kv_heads = rebuild.kv_heads(head_dim)
    k, v = rebuild.keys(dequantize(keys), head_dim), dequantize(values)
    rows = q.astype(jnp.float32).reshape(batch, tokens, kv_heads, -1, head_dim) * scale
    scores = jnp.einsum("btkgd,bksd->btkgs", rows, k, precision="highest")
    seen = visible(start[:, None] + jnp.arange(tokens), jnp.arange(k.shape[2]), first, stop, window)
    scores = jnp.where(seen[:, :, None, None], scores, MASKED)
    lse = jax.nn.logsumexp(scores, -1)
    p = jnp.where(seen[:, :, None, None], jnp.exp(scores - lse[..., None]), 0.0)
    v = jnp.broadcast_to(v, (batch, kv_heads, *v.shape[2:]))
    output = jnp.einsum("btkgs,bksr->btkgr", p, v, precision="highest")
    lse = jnp.where(seen.any(-1)[:, :, None, None], lse, MASKED)
    return output.reshape(batch, tokens, heads, -1), lse.reshape(batch, tokens, heads)


def reconstruct(
    below: Float[Array, "B S M"],
    delta: Packed,
    up: Float[Array, "r M"],
    until: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S M"]:
    """The accumulator of a layer of deltas from that of the layer below, for positions under `until`."""
    step = jnp.einsum("bsr,rm->bsm", dequantize(delta)[:, 0], up.astype(jnp.float32), precision="highest")
    new = (below[:, : step.shape[1]].astype(jnp.float32) + step).astype(below.dtype)
    flushed = jnp.arange(step.shape[1]) < until[:, None]
    return below.at[:, : step.shape[1]].set(jnp.where(flushed[..., None], new, below[:, : step.shape[1]]))
