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
    _, tokens, heads, channels = q.shape
    pad = (0, 0), (0, -tokens % LANES), (0, 0), (0, -channels % LANES)
    scaled = (q.astype(jnp.float32) * channels**-0.5).astype(q.dtype)  # the factor itself is not rounded
    q, k, v = (jnp.pad(a, pad) for a in (scaled, k, v))
    kv_heads = k.shape[2]
    kernel = jax.vmap(_kernel(q.shape[1], heads // kv_heads, window, interpret))

    def attend(q: Array, k: Array, v: Array) -> Attended:
        rows = q.swapaxes(0, 1).reshape(kv_heads, -1, *q.shape[::2])
        output, (lse,) = kernel(rows, *(a.swapaxes(0, 1) for a in (k, v)))
        return output.reshape(heads, *q.shape[::2]).swapaxes(0, 1), lse.reshape(heads, -1).T

    # A sequence after the other: the kernel writes each log-sum-exp 128 times, as much as two outputs.
    output, lse = jax.lax.map(lambda each: attend(*each), (q, k, v))
    return output[:, :tokens, :, :channels].astype(jnp.float32), lse[:, :tokens]


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
