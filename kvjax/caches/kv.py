"""Quantised keys and values, K and V bits apart: per-token-asym (`@token`) and KIVI (`@kivi`).

`@token`: keys and values per token, one group per token and kv head, residual 0. `@kivi`: keys per channel in groups
of 32 tokens, values per token in groups of 32 channels, residual 32 (KVTuner, section 3.2 and appendix C; KIVI).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, Chunk, LayerCache, check_fields
from kvjax.caches.history import History, Stream
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.rotate import rotate_heads
from kvjax.quant.affine import BITS

WIDTHS = (*BITS, store.EXACT)
KIVI_GROUP = 32


@dataclasses.dataclass(frozen=True)
class KV(CacheSpec):
    """Keys of `key_bits` and values of `value_bits` (1, 2, 3, 4, 5, 6, 8; 16 is unquantised).

    group: elements that share a scale: tokens for `@kivi` keys, channels for the rest. None is the default:
      the whole head for `@token`, 32 for `@kivi` (shrunk to the largest multiple of 8 that divides the head).
    residual: R, the tokens that stay exact until a block of R is complete. None: 0 for `@token`, the token group
      for `@kivi`.
    sink: the first tokens that stay exact for ever.
    rope: whether keys are stored after RoPE ("post") or before it ("pre").
    """

    key_bits: int
    value_bits: int
    mode: str = "kivi"
    group: int | None = None
    residual: int | None = None
    sink: int = 0
    rope: str = "post"

    pattern: ClassVar[str] = r"k(\d{1,9})v(\d{1,9})"
    modes: ClassVar[tuple[str, ...]] = ("kivi", "token")

    def __post_init__(self) -> None:
        for bits in (self.key_bits, self.value_bits):
            if bits not in WIDTHS:
                raise KvjaxError(f"{self}: {bits} bits; expected one of {', '.join(map(str, WIDTHS))}")
        if self.mode not in self.modes:
            raise KvjaxError(f"{self}: mode {self.mode!r}; expected one of {', '.join(self.modes)}")
        if self.rope not in ("pre", "post"):
            raise KvjaxError(f"{self}: rope={self.rope}; expected pre or post")
        for field in ("group", "residual", "sink"):
            value = getattr(self, field)
            if value is not None and value < (field == "group"):
                raise KvjaxError(f"{self}: {field}={value} is too small")
        if self.residual == self._default_residual:
            object.__setattr__(self, "residual", None)  # one spec, one name
        if self.block % 8:
            raise KvjaxError(f"{self}: residual {self.block}; expected a multiple of 8")
        if self.mode == "kivi" and (self.block == 0 or self.block % self.token_group):
            raise KvjaxError(
                f"{self}: residual {self.block}; expected a positive multiple of the token group {self.token_group}"
            )

    @classmethod
    def parse(cls, name: str, mode: str | None, fields: dict[str, Any]) -> KV:
        match = re.fullmatch(cls.pattern, name)
        assert match
        check_fields(name, fields, {"group": int, "residual": int, "sink": int, "rope": str})
        return cls(int(match[1]), int(match[2]), mode or cls.modes[0], **fields)

    def __str__(self) -> str:
        fields = dataclasses.fields(self)[3:]
        stated = [f"{f.name}={getattr(self, f.name)}" for f in fields if getattr(self, f.name) != f.default]
        return f"k{self.key_bits}v{self.value_bits}@{self.mode}" + (f"({','.join(stated)})" if stated else "")

    @property
    def token_group(self) -> int:
        """Tokens that share a scale of `@kivi` keys."""
        return self.group or KIVI_GROUP

    @property
    def _default_residual(self) -> int:
        return self.token_group if self.mode == "kivi" else 0

    @property
    def block(self) -> int:
        return self._default_residual if self.residual is None else self.residual

    def _channel_group(self, head_dim: int) -> int:
        if self.group is None:
            if self.mode == "token":
                return head_dim
            return next(g for g in range(KIVI_GROUP, 0, -8) if head_dim % g == 0)
        if head_dim % self.group:
            raise KvjaxError(f"{self}: group {self.group} does not divide the head_dim of {head_dim}")
        return self.group

    def _formats(self, head_dim: int) -> tuple[store.Format, store.Format]:
        if head_dim % 8:
            raise KvjaxError(f"{self}: head_dim {head_dim}; expected a multiple of 8")
        channels = self._channel_group(head_dim)
        values = store.Format(self.value_bits, "token", channels, self.block)
        if self.mode == "token":
            return store.Format(self.key_bits, "token", channels, self.block), values
        return store.Format(self.key_bits, "channel", self.token_group, self.block), values

    @property
    def bits_nominal(self) -> float:
        return (self.key_bits + self.value_bits) / 2

    def bits_asymptotic(self, shape: CacheShape) -> float:
        return sum(format.bits_asymptotic for format in self._formats(shape.head_dim)) / 2

    def _streams(self, shape: CacheShape) -> list[Stream]:
        return [Stream(format, shape.kv_heads, shape.head_dim) for format in self._formats(shape.head_dim)]

    def init(self, shape: CacheShape) -> KVCache:
        return KVCache(History.init(shape, self._streams(shape), self.block, self.sink), self)

    def logical_axes(self, shape: CacheShape) -> Any:
        history = jax.eval_shape(lambda: self.init(shape)).history
        return KVCache(History.logical_axes(history, self._streams(shape)), self)


@struct.dataclass
class KVCache(LayerCache):
    """A history of keys and values."""

    history: History
    spec: KV = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], KVCache, Any]:
        # Stored first: a flush touches no position that the chunk reads from the history, and XLA copies a
        # history that is read before it is written.
        after = self._append(chunk)
        keys, values = after.packed
        stop = after.packed_stop(chunk)
        packed = attention.attend_packed(
            *(chunk.q, chunk.positions, keys, values, after.sink, stop, chunk.window, self._rope_table(chunk))
        )
        output = attention.merge([packed, *self._attend_exact(after, chunk)])
        return output.astype(chunk.q.dtype), KVCache(after, self.spec), carry

    def _attend_exact(self, after: History, chunk: Chunk) -> list[attention.Partial]:
        k, v, positions = self._exact(after, chunk)
        if k.shape[1] == 0:
            return []
        own = not self.history.reads_stored(chunk)
        return [attention.attend_exact(chunk.q, chunk.positions, k, v, positions, chunk.window, own)]

    def materialize(self, chunk: Chunk, carry: Any):
        after = self._append(chunk)
        dtype = jnp.promote_types(chunk.q.dtype, jnp.float32)
        source = after if self.history.reads_stored(chunk) else self.history
        k, v = (
            store.read_block(packed, 0, source.tokens, dtype).dequantize().swapaxes(1, 2) for packed in source.packed
        )
        positions = source.packed_positions(chunk)
        exact_k, exact_v, exact_positions = self._exact(after, chunk)
        k = jnp.concatenate([self._rotated(k, positions, chunk), exact_k.astype(dtype)], 1)
        v = jnp.concatenate([v, exact_v.astype(dtype)], 1)
        positions = jnp.concatenate([positions, exact_positions], 1)
        return k, v, positions, KVCache(after, self.spec), carry

    def _append(self, chunk: Chunk) -> History:
        return self.history.append((self._chunk_k(chunk), chunk.v), chunk)

    def _exact(self, after: History, chunk: Chunk) -> tuple[Array, Array, Int[Array, "B N"]]:
        """Keys after RoPE and values that are read unquantised, with positions, -1 where absent."""
        (k, v), positions = self.history.kept(after, chunk)
        k = self._rotated(k, positions, chunk)
        if self.history.reads_stored(chunk):
            return k, v, positions
        own = rotate_heads(chunk.k, chunk.rotation)
        positions = jnp.concatenate([positions, self.history.own_positions(chunk)], 1)
        k, v = (jnp.concatenate([a, b.astype(a.dtype)], 1) for a, b in ((k, own), (v, chunk.v)))
        return k, v, positions

    def _rope_table(self, chunk: Chunk) -> tuple[Array, Array] | None:
        if self.spec.rope == "post":
            return None
        return chunk.rope.table(jnp.arange(self.history.tokens), chunk.q.dtype)  # the same in every layer: built once

    def _rotated(self, k: Array, positions: Int[Array, "B N"], chunk: Chunk) -> Array:
        if self.spec.rope == "post":
            return k
        return rotate_heads(k, chunk.rope.table(positions, chunk.q.dtype))

    def _chunk_k(self, chunk: Chunk) -> Float[Array, "B T K d"]:
        """The chunk's keys in the form that is stored."""
        return chunk.k if self.spec.rope == "pre" else rotate_heads(chunk.k, chunk.rotation)
