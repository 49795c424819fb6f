"""What every method stores: packed blocks, the exact residual that waits to fill one, and exact sinks.

A method says which tensors it keeps ("streams": keys and values, or latents) and how to read them; when and where
they are written is decided here, once. B batch, T tokens of the chunk, G heads and W width of a stream, R residual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches.base import CacheShape, Chunk
from kvjax.ops import store

Streams = Sequence[Float[Array, "B T G W"]]
Encode = Callable[[Float[Array, "B N G W"], Int[Array, "B N"]], Float[Array, "B N G V"]]


@dataclasses.dataclass(frozen=True)
class Stream:
    """One tensor to keep: its format, heads and width. `axis` names its heads for sharding, None where they are not
    the kv heads."""

    format: store.Format
    heads: int
    width: int
    axis: str | None = "kv_heads"


@struct.dataclass
class History:
    """Slot i of the residual holds position F + i, F the flushed tokens."""

    packed: tuple[store.Stored, ...]
    residual: tuple[Float[Array, "B R G W"], ...]
    sinks: tuple[Float[Array, "B s G W"], ...]
    block: int = struct.field(pytree_node=False)  # R
    sink: int = struct.field(pytree_node=False)

    @classmethod
    def init(cls, shape: CacheShape, streams: Sequence[Stream], block: int, sink: int) -> History:
        """An empty history."""
        tokens = store.capacity(shape.max_len, *(s.format for s in streams))
        packed = tuple(store.init(s.format, shape.batch, s.heads, tokens, s.width, shape.dtype) for s in streams)

        def exact(tokens: int) -> tuple[Array, ...]:
            return tuple(jnp.zeros((shape.batch, tokens, s.heads, s.width), shape.dtype) for s in streams)

        return cls(packed, exact(block), exact(sink), block, sink)

    @staticmethod
    def logical_axes(history: History, streams: Sequence[Stream]) -> Any:
        """The same tree with a PartitionSpec of logical names at every leaf."""
        packed = tuple(store.logical_axes(p, s.axis) for p, s in zip(history.packed, streams, strict=True))
        exact: Any = tuple(PartitionSpec("batch", None, s.axis, None) for s in streams)
        return dataclasses.replace(history, packed=packed, residual=exact, sinks=exact)

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        return self.packed[0].tokens

    def reads_stored(self, chunk: Chunk) -> bool:
        """Whether queries read their own chunk as it is stored (R = 0, or asked for)."""
        return self.block == 0 or chunk.read == "stored"

    def packed_stop(self, chunk: Chunk) -> Int[Array, "B"]:
        """Positions below it are read from the packed history."""
        before = chunk.positions[:, 0]
        if self.reads_stored(chunk):
            return before + chunk.lengths
        return before // self.block * self.block

    def packed_positions(self, chunk: Chunk) -> Int[Array, "B S"]:
        """Which position each allocated token is read for, -1 where it is not."""
        index = jnp.arange(self.tokens)
        there = (index >= self.sink) & (index < self.packed_stop(chunk)[:, None])
        return jnp.where(there, index, -1)

    def kept(self, after: History, chunk: Chunk) -> tuple[tuple[Array, ...], Int[Array, "B N"]]:
        """Sinks and residual that the chunk's queries read beside the packed history; positions are -1 where absent.

        after: this history with the chunk in it.
        """
        before = chunk.positions[:, :1]
        slots = jnp.broadcast_to(jnp.arange(self.sink), (before.shape[0], self.sink))
        if self.reads_stored(chunk):
            return after.sinks, jnp.where(slots < before + chunk.lengths[:, None], slots, -1)
        positions = [jnp.where(slots < before, slots, -1)]
        slots = before // self.block * self.block + jnp.arange(self.block)
        positions.append(jnp.where((slots >= self.sink) & (slots < before), slots, -1))
        both = tuple(jnp.concatenate(pair, 1) for pair in zip(self.sinks, self.residual, strict=True))
        return both, jnp.concatenate(positions, 1)

    def own_positions(self, chunk: Chunk) -> Int[Array, "B T"]:
        """The chunk's positions, -1 at padding."""
        end = chunk.positions[:, :1] + chunk.lengths[:, None]
        return jnp.where(chunk.positions < end, chunk.positions, -1)

    def append(self, new: Streams, chunk: Chunk, encode: Encode | None = None) -> History:
        """Stores the chunk's tokens and flushes the blocks that are complete.

        encode: what is packed of values [B, N, G, W] at positions [B, N]; the values themselves where None.
        """
        real = jnp.arange(new[0].shape[1]) < chunk.lengths[:, None]
        history = self._store_sinks(new, chunk.positions, real)
        if self.block:
            return history._store_blocks(new, chunk, encode)
        values = new if encode is None else [encode(x, chunk.positions) for x in new]
        start, lengths = chunk.positions[:, 0], chunk.lengths
        packed = tuple(store.write_tokens(old, x, start, lengths) for old, x in zip(self.packed, values, strict=True))
        return dataclasses.replace(history, packed=packed)

    def _store_sinks(self, new: Streams, positions: Int[Array, "B T"], real: Bool[Array, "B T"]) -> History:
        if self.sink == 0:
            return self
        batch = jnp.arange(positions.shape[0])[:, None]
        at = jnp.where(real & (positions < self.sink), positions, self.sink)
        sinks = tuple(
            old.at[batch, at].set(x.astype(old.dtype), mode="drop") for old, x in zip(self.sinks, new, strict=True)
        )
        return dataclasses.replace(self, sinks=sinks)

    def _store_blocks(self, new: Streams, chunk: Chunk, encode: Encode | None) -> History:
        """Appends to the residual and flushes complete blocks; under "stored" the last, partial one as well,
        quantised on its own tokens, while the residual keeps them exact for its completion."""
        r, tokens = self.block, new[0].shape[1]
        before = chunk.positions[:, 0]
        end = before + chunk.lengths
        partial = chunk.read == "stored"
        blocks = -(-(r - 1 + tokens) // r) if partial else (r - 1 + tokens) // r
        # `pending` is the residual followed by the chunk, per sequence: entry i has position before//r*r + i.
        offset = jnp.arange((blocks + 1) * r)
        source = jnp.where(offset < (before % r)[:, None], offset, r + offset - (before % r)[:, None])
        source = jnp.minimum(source, r + tokens - 1)[:, :, None, None]
        pending = [
            jnp.take_along_axis(jnp.concatenate([old, x.astype(old.dtype)], 1), source, 1)
            for old, x in zip(self.residual, new, strict=True)
        ]
        index = (before // r)[:, None] + jnp.arange(blocks)
        write = index * r < end[:, None] if partial else (index + 1) * r <= end[:, None]
        at = jnp.where(write, index, self.tokens // r)  # out of range: dropped
        positions = index[:, :, None] * r + jnp.arange(r)
        mask = (positions >= self.sink) & (positions < end[:, None, None])

        def flush(old: store.Stored, x: Array) -> store.Stored:
            x = x[:, : blocks * r]
            if encode is not None:
                x = encode(x, positions.reshape(x.shape[0], -1))
            return store.write_blocks(old, x.reshape(x.shape[0], blocks, r, *x.shape[2:]), mask, at)

        keep = ((end // r - before // r) * r)[:, None] + jnp.arange(r)
        residual = tuple(jnp.take_along_axis(x, keep[:, :, None, None], 1) for x in pending)
        packed = tuple(map(flush, self.packed, pending)) if blocks else self.packed
        return dataclasses.replace(self, packed=packed, residual=residual)
