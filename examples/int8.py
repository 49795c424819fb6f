"""Symmetric 8-bit integers per token and head, one float16 scale each: a packed method with its own quantiser."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

import kvjax
from kvjax.caches.stored import StoredSpec, TensorSpec
from kvjax.ops.store import RowFormat


@dataclasses.dataclass(frozen=True)
class SymmetricRows(RowFormat):
    """x = codes * scale, codes from -127 to 127."""

    width: int

    @property
    def bits_asymptotic(self) -> float:
        return 8 + 16 / self.width

    def encode(self, x):
        x = x.astype(jnp.float32)
        scale = (jnp.abs(x).max(-1, keepdims=True) / 127).astype(jnp.float16)
        step = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
        return jnp.clip(jnp.round(x / step), -127, 127).astype(jnp.int8), scale

    def decode(self, kept, dtype):
        codes, scale = (a.astype(dtype) for a in kept)
        return codes * scale


@kvjax.register
@dataclasses.dataclass(frozen=True)
class Int8(StoredSpec):
    form: ClassVar[str] = "int8"
    examples: ClassVar[tuple[str, ...]] = ("int8", "int8(residual=16,sink=4)")
    bits_nominal: ClassVar[float] = 8.0

    def tensors(self, shape) -> list[TensorSpec]:
        return [TensorSpec(SymmetricRows(shape.head_dim), shape.kv_heads, shape.head_dim)] * 2
