"""Packed attention on CPU, in C++: native.cc."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from pallas_kernels import native
from pallas_kernels.layout import EXACT, PLANES, Packed

SOURCE = Path(__file__).with_name("native.cc")


def packed_attention(
    q: Float32[Array, "B T H D"],
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
    """See `pallas_kernels.packed_attention`."""
    if interpret:
        raise NotImplementedError("native code is not interpreted")
    packs = [1 if each.bits == EXACT else each.pack for each in (keys, values)]
    if max(packs) % min(packs):
        raise NotImplementedError(f"packing blocks of {packs[0]} and {packs[1]} tokens; expected multiples")
    if any(each.bits == EXACT and each.planes[0].dtype not in (jnp.float32, jnp.bfloat16) for each in (keys, values)):
        raise NotImplementedError("exact values other than float32 or bfloat16")
    target = native.register(SOURCE, "pallas_kernels_packed_attention")
    batch, tokens, heads, _ = q.shape
    shapes = [(batch, tokens, heads, values.shape[3]), (batch, tokens, heads)]
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    arrays = [a for each in (keys, values) for a in (*each.planes, each.scale, each.zero) if a is not None]
    output, lse = call(
        *(q.astype(jnp.float32), start.astype(jnp.int32), stop.astype(jnp.int32), *arrays),
        keys=_form(keys),
        values=_form(values),
        kv_heads=np.int64(keys.shape[1]),
        first=np.int64(first),
        window=np.int64(window or 0),
        scale=np.float32(scale),
    )
    return output, lse


def _form(packed: Packed) -> np.ndarray:
    """Describes a tensor for the C++: bits, whether per channel, group, packing block, width of each plane."""
    if packed.bits == EXACT:
        return np.asarray([EXACT, 0, 1, 1, 8], np.int64)
    return np.asarray(
        [packed.bits, packed.per == "channel", packed.group, packed.pack, *PLANES[packed.bits]], np.int64
    )
