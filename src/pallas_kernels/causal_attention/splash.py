"""Causal attention on TPU: JAX's own splash attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float

from pallas_kernels.layout import Attended
from pallas_kernels.mosaic_tpu_common import LANES

BLOCKS = (512, 256, 128)  # tokens of a block, the largest that divides the chunk


def causal_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Attended:
    """See `pallas_kernels.causal_attention`."""
    for name, array in (("queries", q), ("keys", k), ("values", v)):
        if array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"{name} in {array.dtype}; splash attention multiplies in bfloat16")
    batch, tokens, heads, channels = q.shape
    pad = (0, 0), (0, -tokens % LANES), (0, 0), (0, -channels % LANES)
    q, k, v = (jnp.pad(a, pad) for a in (q * jnp.asarray(channels**-0.5, q.dtype), k, v))
    size, kv_heads = q.shape[1], k.shape[2]
    ratio = heads // kv_heads
    rows = q.swapaxes(1, 2).reshape(batch * kv_heads, ratio, size, -1)
    output, (lse,) = jax.vmap(_kernel(size, ratio, window, interpret))(
        rows, *(a.swapaxes(1, 2).reshape(batch * kv_heads, size, -1) for a in (k, v))
    )
    output = output.reshape(batch, heads, size, -1).swapaxes(1, 2)[:, :tokens, :, :channels]
    return output.astype(jnp.float32), lse.reshape(batch, heads, size).swapaxes(1, 2)[:, :tokens]


def _kernel(size: int, ratio: int, window: int | None, interpret: bool):
    """Of the query heads that share a kv head."""
    causal = splash_attention.CausalMask((size, size))
    mask = causal if window is None else splash_attention.LocalMask((size, size), (window - 1, 0), 0)
    block = next(block for block in BLOCKS if size % block == 0)
    return splash_attention.make_splash_mqa_single_device(
        splash_attention.splash_attention_mask.MultiHeadMask([mask] * ratio),
        block_sizes=splash_attention.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        save_residuals=True,
        interpret=interpret,
    )
