"""Packed attention on CPU, in C++: native.cc."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from pallas_kernels import native
from pallas_kernels.layout import MOST_ROWS, Packed

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
    native.check(keys, values)
    target = native.register(SOURCE, "pallas_kernels_packed_attention")
    batch, tokens, heads, _ = q.shape
    if (rows := tokens * heads // keys.shape[1]) > MOST_ROWS:
        raise NotImplementedError(f"{rows} query rows per kv head; expected at most {MOST_ROWS}")
    shapes = [(batch, tokens, heads, values.shape[3]), (batch, tokens, heads)]
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    output, lse = call(
        *(q.astype(jnp.float32), start.astype(jnp.int32), stop.astype(jnp.int32)),
        *(*native.arrays(keys), *native.arrays(values)),
        keys=native.form(keys),
        values=native.form(values),
        kv_heads=np.int64(keys.shape[1]),
        first=np.int64(first),
        window=np.int64(window or 0),
        scale=np.float32(scale),
    )
    return output, lse
