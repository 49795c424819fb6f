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
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, Chunk, LayerCache, check_fields
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

    def init(self, shape: CacheShape) -> KVCache:
        formats = self._formats(shape.head_dim)
        tokens = store.capacity(shape.max_len, *formats)
        keys, values = (
            store.init(f, shape.batch, shape.kv_heads, tokens, shape.head_dim, shape.dtype) for f in formats
        )

        def exact(tokens: int) -> Array:
            return jnp.zeros((shape.batch, tokens, shape.kv_heads, shape.head_dim), shape.dtype)

        r, sink = self.block, self.sink
        return KVCache(keys, values, exact(r), exact(r), exact(sink), exact(sink), self)

    def logical_axes(self, shape: CacheShape) -> Any:
        cache = jax.eval_shape(lambda: self.init(shape))
        exact: Any = PartitionSpec("batch", None, "kv_heads", None)
        keys, values = store.logical_axes(cache.keys), store.logical_axes(cache.values)
        return KVCache(keys, values, exact, exact, exact, exact, self)


@struct.dataclass
class KVCache(LayerCache):
    """Packed history, the residual (slot i holds position F + i, F the flushed tokens) and the sinks."""

    keys: store.Packed
    values: store.Packed
    residual_k: Float[Array, "B R K d"]
    residual_v: Float[Array, "B R K d"]
    sink_k: Float[Array, "B s K d"]
    sink_v: Float[Array, "B s K d"]
    spec: KV = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], KVCache, Any]:
        # Stored first: a flush touches no position that the chunk reads from the history, and XLA copies a
        # history that is read before it is written.
        cache = self._store(chunk)
        parts = [
            attention.attend_packed(
                chunk.q,
                chunk.positions,
                cache.keys,
                cache.values,
                self.spec.sink,
                self._packed_stop(chunk),
                chunk.window,
                self._rope_table(chunk),
            )
        ]
        stored = self._reads_stored(chunk)
        k, v, positions = (cache if stored else self)._exact(chunk)
        if k.shape[1]:
            k = self._rotated(k, positions, chunk)
            parts.append(
                attention.attend_exact(chunk.q, chunk.positions, k, v, positions, chunk.window, own=not stored)
            )
        return attention.merge(parts).astype(chunk.q.dtype), cache, carry

    def materialize(self, chunk: Chunk, carry: Any):
        cache = self._store(chunk)
        source = cache if self._reads_stored(chunk) else self
        tokens = source.keys.tokens
        dtype = jnp.promote_types(chunk.q.dtype, jnp.float32)
        k, v = (
            store.read_block(packed, 0, tokens, dtype).dequantize().swapaxes(1, 2)
            for packed in (source.keys, source.values)
        )
        index = jnp.arange(tokens)
        there = (index >= self.spec.sink) & (index < self._packed_stop(chunk)[:, None])
        positions = jnp.where(there, index, -1)
        exact_k, exact_v, exact_positions = source._exact(chunk)
        positions = jnp.concatenate([positions, exact_positions], 1)
        k = jnp.concatenate([k, exact_k.astype(dtype)], 1)
        v = jnp.concatenate([v, exact_v.astype(dtype)], 1)
        at, seen = chunk.positions[:, :, None], positions[:, None, :]
        mask = (seen >= 0) & (seen <= at)
        if chunk.window is not None:
            mask &= seen > at - chunk.window
        return self._rotated(k, positions, chunk), v, mask, cache, carry

    def _reads_stored(self, chunk: Chunk) -> bool:
        """Whether queries read their own chunk as it is stored (R = 0, or asked for)."""
        return self.spec.block == 0 or chunk.read == "stored"

    def _packed_stop(self, chunk: Chunk) -> Int[Array, "B"]:
        """Positions below it are read from the packed history."""
        before = chunk.positions[:, 0]
        if self._reads_stored(chunk):
            return before + chunk.lengths
        return before // self.spec.block * self.spec.block

    def _rope_table(self, chunk: Chunk) -> tuple[Array, Array] | None:
        if self.spec.rope == "post":
            return None
        return chunk.rope.table(jnp.arange(self.keys.tokens), chunk.q.dtype)  # the same in every layer: built once

    def _rotated(self, k: Array, positions: Int[Array, "B N"], chunk: Chunk) -> Array:
        if self.spec.rope == "post":
            return k
        return rotate_heads(k, chunk.rope.table(positions, chunk.q.dtype))

    def _chunk_k(self, chunk: Chunk) -> Float[Array, "B T K d"]:
        """The chunk's keys in the form that is stored."""
        return chunk.k if self.spec.rope == "pre" else rotate_heads(chunk.k, chunk.rotation)

    def _exact(self, chunk: Chunk) -> tuple[Array, Array, Int[Array, "B N"]]:
        """Keys (as stored) and values that are read unquantised, with positions, -1 where absent."""
        before, sink = chunk.positions[:, :1], self.spec.sink
        stored = self._reads_stored(chunk)
        end = before + chunk.lengths[:, None]
        slots = jnp.broadcast_to(jnp.arange(sink), (before.shape[0], sink))
        ks, vs = [self.sink_k], [self.sink_v]
        positions = [jnp.where(slots < (end if stored else before), slots, -1)]
        if not stored:
            r = self.spec.block
            slots = before // r * r + jnp.arange(r)
            ks += [self.residual_k, self._chunk_k(chunk).astype(self.residual_k.dtype)]
            vs += [self.residual_v, chunk.v.astype(self.residual_v.dtype)]
            positions.append(jnp.where((slots >= sink) & (slots < before), slots, -1))
            positions.append(jnp.where(chunk.positions < end, chunk.positions, -1))
        return jnp.concatenate(ks, 1), jnp.concatenate(vs, 1), jnp.concatenate(positions, 1)

    def _store(self, chunk: Chunk) -> KVCache:
        k, v = self._chunk_k(chunk), chunk.v
        real = jnp.arange(k.shape[1]) < chunk.lengths[:, None]
        cache = self._store_sinks(k, v, chunk.positions, real)
        if self.spec.block == 0:
            start, lengths = chunk.positions[:, 0], chunk.lengths
            return dataclasses.replace(
                cache,
                keys=store.write_tokens(self.keys, k, start, lengths),
                values=store.write_tokens(self.values, v, start, lengths),
            )
        return cache._store_blocks(k, v, chunk)

    def _store_sinks(self, k: Array, v: Array, positions: Int[Array, "B T"], real: Bool[Array, "B T"]) -> KVCache:
        sink = self.spec.sink
        if sink == 0:
            return self
        batch = jnp.arange(k.shape[0])[:, None]
        at = jnp.where(real & (positions < sink), positions, sink)
        put = [
            old.at[batch, at].set(new.astype(old.dtype), mode="drop")
            for old, new in ((self.sink_k, k), (self.sink_v, v))
        ]
        return dataclasses.replace(self, sink_k=put[0], sink_v=put[1])

    def _store_blocks(self, k: Array, v: Array, chunk: Chunk) -> KVCache:
        """Appends to the residual and flushes complete blocks; under "stored" the last, partial one as well,
        quantised on its own tokens, while the residual keeps them exact for its completion."""
        r, tokens = self.spec.block, k.shape[1]
        before = chunk.positions[:, 0]
        end = before + chunk.lengths
        partial = chunk.read == "stored"
        blocks = -(-(r - 1 + tokens) // r) if partial else (r - 1 + tokens) // r
        # `pending` is the residual followed by the chunk, per sequence: entry i has position before//r*r + i.
        offset = jnp.arange((blocks + 1) * r)
        source = jnp.where(offset < (before % r)[:, None], offset, r + offset - (before % r)[:, None])
        source = jnp.minimum(source, r + tokens - 1)[:, :, None, None]

        def pending(old: Array, new: Array) -> Array:
            both = jnp.concatenate([old, new.astype(old.dtype)], 1)
            return jnp.take_along_axis(both, source, 1)

        pending_k, pending_v = pending(self.residual_k, k), pending(self.residual_v, v)
        index = (before // r)[:, None] + jnp.arange(blocks)
        write = index * r < end[:, None] if partial else (index + 1) * r <= end[:, None]
        at = jnp.where(write, index, self.keys.tokens // r)  # out of range: dropped
        positions = index[:, :, None] * r + jnp.arange(r)
        mask = (positions >= self.spec.sink) & (positions < end[:, None, None])

        def flush(old: store.Packed, new: Array) -> store.Packed:
            new = new[:, : blocks * r].reshape(new.shape[0], blocks, r, *new.shape[2:])
            return store.write_blocks(old, new, mask, at) if blocks else old

        keep = ((end // r - before // r) * r)[:, None] + jnp.arange(r)
        residual_k, residual_v = (jnp.take_along_axis(a, keep[:, :, None, None], 1) for a in (pending_k, pending_v))
        return dataclasses.replace(
            self,
            keys=flush(self.keys, pending_k),
            values=flush(self.values, pending_v),
            residual_k=residual_k,
            residual_v=residual_v,
        )
