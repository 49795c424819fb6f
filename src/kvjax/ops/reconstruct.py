"""The reconstruction of a layer input from the layer below and a stored delta (XQuant-CL, section 3.2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.ops import store
from kvjax.ops.dispatch import dispatch
from kvjax.ops.shards import first_token
from pallas_kernels import remat_attention

_TILE_ELEMENTS = 2**16  # elements of one tile of the accumulator


def reconstruct(
    acc: Float[Array, "B S D"],
    stored: store.Stored,
    up: Float[Array, "r D"] | None,
    delta: bool,
    stop: Int[Array, "B"],
    gain: Float[Array, "D"] | None = None,
) -> Float[Array, "B S D"]:
    """Reconstructs X̂ of a layer from X̂ of the layer below, tile by tile in place.

    Args:
      acc: X̂ of the layer below.
      stored: z of this layer; with `delta`, its difference from the layer below.
      up: the way back from z: X̂ = z up. X̂ = z where None.
      delta: whether the stored part is added to `acc`; otherwise it replaces `acc`.
      stop: per sequence, the position below which tokens are reconstructed.
      gain: what `acc` is multiplied by before; nothing where None.

    Returns:
      X̂ of this layer below `stop`, `acc` elsewhere.
    """

    def kernel(name: str, interpret: bool, acc: Array, stored: Any, up: Any, stop: Array, gain: Any) -> Array:
        if not delta:
            raise NotImplementedError("a base layer; kernels reconstruct from deltas")
        if up is None:
            raise NotImplementedError("deltas of the layer input itself; kernels reconstruct from latents of deltas")
        if gain is not None:
            raise NotImplementedError("a gain on the layer below; kernels add deltas to it")
        if acc.dtype == jnp.float64:
            raise NotImplementedError("an accumulator in float64; kernels take float32 and bfloat16")
        packed = store.for_kernels(stored)
        here = _held(stop, stored)
        return remat_attention.reconstruct(
            acc, packed, up.astype(acc.dtype), here, implementation=name, interpret=interpret
        )

    def xla(acc: Array, stored: Any, up: Any, stop: Array, gain: Any) -> Array:
        return _rebuild_tiles(acc, stored, up, delta, _held(stop, stored), gain)

    by_token = PartitionSpec("batch", "tokens")
    axes = by_token, store.logical_axes(stored, None), PartitionSpec(), PartitionSpec("batch"), PartitionSpec()
    return dispatch("remat_attention", kernel, xla, (acc, stored, up, stop, gain), axes, by_token)


def _held(stop: Int[Array, "B"], stored: store.Stored) -> Int[Array, "B"]:
    """`stop` counted from the first token that this device holds."""
    return jnp.clip(stop - first_token(stored.tokens), 0, stored.tokens)


def _rebuild_tiles(acc, stored, up, delta, stop, gain):
    """`reconstruct` in XLA."""
    pack_size = store.capacity(1, stored.format)
    size = 1 << max((_TILE_ELEMENTS // acc.shape[2]).bit_length() - 1, 0)
    size = min(stored.tokens, -(-size // pack_size) * pack_size)

    def step(i, acc):
        # The last tile starts early where `size` does not divide S; the tokens it repeats are not changed again.
        start = jnp.minimum(i * size, stored.tokens - size)
        z = store.read_tile(stored, start, size, acc.dtype).dequantize()[:, 0]
        below = jax.lax.dynamic_slice_in_dim(acc, start, size, 1)
        predicted = below if gain is None else below * gain.astype(below.dtype)
        here = (z if up is None else z @ up.astype(z.dtype)) + (predicted if delta else 0)
        index = start + jnp.arange(size)
        new = (index >= i * size) & (index < stop[:, None])
        return jax.lax.dynamic_update_slice_in_dim(acc, jnp.where(new[..., None], here, below), start, 1)

    return jax.lax.fori_loop(0, -(-stop.max() // size), step, acc)
