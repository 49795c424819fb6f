"""TurboQuant as vLLM ships it: turned keys on the levels of a normal density, plain values (arXiv 2504.19874).

A key after RoPE is turned by a Hadamard matrix (the paper: by a random rotation), so that its channels are nearly
normal numbers. Each goes to the nearest of the levels that are best for these. The scale of a token and head makes
what is read as long as the key was, a correction that costs nothing where keys are read. Values are not turned: they
are quantised per token from minimum and maximum.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Shaped

from kvjax.caches.base import Chunk, LayerShapes
from kvjax.caches.kv import Form, KVCache
from kvjax.caches.stored import StoredSpec, TensorSpec, Width
from kvjax.errors import KvjaxError
from kvjax.ops.key_form import KeyForm
from kvjax.ops.store import RowFormat
from kvjax.quant import packing
from kvjax.quant.normal import lloyd_max


@dataclasses.dataclass(frozen=True)
class LevelRows(RowFormat):
    """Rows of `width` channels as codes of `code_bits` bits into the levels of `lloyd_max`, and a float16 scale."""

    code_bits: int
    width: int

    @property
    def bits_asymptotic(self) -> float:
        return self.code_bits + 16 / self.width

    def encode(self, x: Float[Array, "... D"]) -> tuple[Array, ...]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        levels = lloyd_max(self.code_bits)
        length = jnp.linalg.norm(x, axis=-1, keepdims=True)
        unit = x / jnp.where(length == 0, 1, length) * np.sqrt(self.width)
        codes = (unit[..., None] > (levels[1:] + levels[:-1]) / 2).sum(-1).astype(jnp.uint8)
        scale = length / jnp.linalg.norm(self._levels_of(codes, x.dtype), axis=-1, keepdims=True)
        planes = packing.pack(codes[..., None], self.code_bits)
        return *(plane[..., 0] for plane in planes), scale.astype(jnp.float16)

    def decode(self, kept: tuple[Array, ...], dtype: Any) -> Float[Array, "... D"]:
        *planes, scale = kept
        codes = packing.unpack(tuple(plane[..., None] for plane in planes), self.code_bits)[..., 0]
        return self._levels_of(codes, dtype) * scale.astype(dtype)

    def _levels_of(self, codes: Shaped[Array, "... D"], dtype: Any) -> Float[Array, "... D"]:
        """The levels of codes, by a tree of selections: gathers are slow."""
        branches = [jnp.asarray(level, dtype) for level in lloyd_max(self.code_bits)]
        for bit in range(self.code_bits):
            high = (codes >> bit & 1).astype(bool)
            branches = [jnp.where(high, b, a) for a, b in zip(branches[::2], branches[1::2], strict=True)]
        return branches[0]


@dataclasses.dataclass(frozen=True)
class TurboQuant(StoredSpec):
    """Keys of `key_bits` (1 to 4) turned and on the levels of a normal density, values of `value_bits` per token.

    levels: lloyd are Lloyd's and Max's, read by XLA; uniform are evenly spaced, so that keys have the packed layout,
      which kernels read, with a zero point for each token of 16 bits more.
    """

    key_bits: Literal[1, 2, 3, 4]
    value_bits: Width
    levels: Literal["lloyd", "uniform"] = "lloyd"

    form: ClassVar[str] = "tq{key_bits}v{value_bits}"
    examples: ClassVar[tuple[str, ...]] = (
        "tq4v4",
        "tq3v2(residual=8,sink=3)",
        "tq3v4(levels=uniform)",
        "tq2v3(residual=16,sink=5,levels=uniform)",
    )

    @property
    def cache_type(self) -> type[TurboQuantCache]:
        return TurboQuantCache

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        width = shape.head_dim
        if width % 8:
            raise KvjaxError(f"{self}: head_dim {width}; expected a multiple of 8")
        levels = LevelRows(self.key_bits, width)
        keys = levels if self.levels == "lloyd" else self.format(self.key_bits, "token", width, "normal")
        values = self.format(self.value_bits, "token", width)
        return [TensorSpec(each, shape.kv_heads, width) for each in (keys, values)]

    @property
    def bits_nominal(self) -> float:
        return (self.key_bits + self.value_bits) / 2


@struct.dataclass
class TurboQuantCache(KVCache):
    """Keys after RoPE, turned, and values."""

    @property
    def keys_after_rope(self) -> bool:
        return True

    def stored_form(self, chunk: Chunk) -> Form:
        return Form(KeyForm(turned=True), None, chunk.rope)
