"""Rematerialising attention in plain float32, all keys rebuilt at once: the reference for the kernels."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.layout import EXACT, Packed, dequantize
from pallas_kernels.packed_attention.reference import packed_attention
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
    """See `pallas_kernels.remat_attention`; `interpret` has no effect."""
    k, v = rebuild.keys(dequantize(keys), q.shape[3]), dequantize(values)
    v = jnp.broadcast_to(v, (*k.shape[:3], v.shape[3]))
    rows = [Packed((a,), None, None, EXACT, "token", 1, 1) for a in (k, v)]
    return packed_attention(q, rows[0], rows[1], start, stop, first=first, window=window, scale=scale)


def reconstruct(
    below: Float[Array, "B S M"],
    delta: Packed,
    up: Float[Array, "r M"],
    until: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S M"]:
    """See `pallas_kernels.remat_attention.reconstruct`; `interpret` has no effect."""
    step = jnp.einsum("bsr,rm->bsm", dequantize(delta)[:, 0], up.astype(jnp.float32), precision="highest")
    new = (below[:, : step.shape[1]].astype(jnp.float32) + step).astype(below.dtype)
    flushed = jnp.arange(step.shape[1]) < until[:, None]
    return below.at[:, : step.shape[1]].set(jnp.where(flushed[..., None], new, below[:, : step.shape[1]]))
