"""Rematerialising attention on CPU, in C++: native.cc."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import native
from pallas_kernels.layout import Packed
from pallas_kernels.remat_attention.weights import Rebuild

SOURCE = Path(__file__).with_name("native.cc")
LANES = 16  # floats of the widest vectors


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
    """See `pallas_kernels.remat_attention`."""
    if interpret:
        raise NotImplementedError("native code is not interpreted")
    native.check(keys, values)
    target = native.register(SOURCE, "pallas_kernels_remat_attention")
    batch, tokens, heads, head_dim = q.shape
    shapes = [(batch, tokens, heads, values.shape[3]), (batch, tokens, heads)]
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    kv_heads = rebuild.kv_heads(head_dim)
    bias = jnp.zeros((kv_heads, head_dim)) if rebuild.bias is None else rebuild.bias
    norm = jnp.zeros(0) if rebuild.norm is None else rebuild.norm
    weights = (a.astype(jnp.float32) for a in (rebuild.up, rebuild.cos, rebuild.sin, bias, norm))
    tensors = [keys] if values is keys else [keys, values]
    output, lse = call(
        *(q.astype(jnp.float32), start.astype(jnp.int32), stop.astype(jnp.int32), *weights),
        *(a for each in tensors for a in native.arrays(each)),
        keys=native.form(keys),
        values=native.form(values),
        shared=np.int64(values is keys),
        kv_heads=np.int64(kv_heads),
        first=np.int64(first),
        window=np.int64(window or 0),
        scale=np.float32(scale),
        eps=np.float32(rebuild.eps),
    )
    return output, lse


def reconstruct(
    below: Float[Array, "B S M"],
    delta: Packed,
    up: Float[Array, "r M"],
    until: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S M"]:
    """See `pallas_kernels.remat_attention.reconstruct`."""
    if interpret:
        raise NotImplementedError("native code is not interpreted")
    if below.dtype != jnp.float32 or below.shape[2] % LANES:
        raise NotImplementedError(
            f"an accumulator of {below.shape[2]} channels in {below.dtype}; expected a multiple of {LANES} in float32"
        )
    native.check(delta, delta)
    target = native.register(SOURCE, "pallas_kernels_reconstruct")
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(below.shape, below.dtype), input_output_aliases={0: 0})
    arrays = below, up.astype(jnp.float32), until.astype(jnp.int32), *native.arrays(delta)
    return call(*arrays, delta=native.form(delta))
