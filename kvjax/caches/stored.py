"""What packed methods share: packed blocks, the exact residual that waits to fill one, exact sinks, and attention.

A method says which tensors it keeps (keys and values, or latents), in which formats, and how keys and values come
back from them. When and where they are written, and what is read exactly, is decided here, once. B batch, T tokens
of the chunk, G heads and W width of a tensor, R residual length.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches import fields
from kvjax.caches.base import CacheShape, CacheSpec, Chunk, LayerCache, LayerShapes
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.rotate import rotate_heads
from kvjax.ops.shards import by_tokens, first_token
from kvjax.quant.affine import BITS, Fit

Tensors = Sequence[Float[Array, "B N G W"]]


class Encode(Protocol):
    """What is packed of tensors, a pytree of all arrays that it takes."""

    def __call__(self, tensors: Tensors, positions: Int[Array, "B N"]) -> Tensors: ...

    def logical_axes(self) -> Any:
        """The same tree, leaves PartitionSpecs of logical axis names."""


Packed = tuple[store.Stored, ...]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor to keep: its format, heads and width.

    `axis` names its heads for sharding, None where they are not the kv heads.
    """

    format: store.AnyFormat
    heads: int
    width: int
    axis: str | None = "kv_heads"


@struct.dataclass
class BlockStore:
    """Slot i of the residual holds position F + i, F the flushed tokens."""

    packed: tuple[store.Stored, ...]
    residual: tuple[Float[Array, "B R G W"], ...]
    sinks: tuple[Float[Array, "B s G W"], ...]
    residual_length: int = struct.field(pytree_node=False)  # R
    sink: int = struct.field(pytree_node=False)
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)  # of each tensor, the logical name of its heads

    @classmethod
    def init(cls, shape: CacheShape, tensors: Sequence[TensorSpec], residual_length: int, sink: int) -> BlockStore:
        """Empty."""
        formats = (t.format for t in tensors)
        tokens = store.capacity(shape.max_len, *formats, block=residual_length or 1, parts=shape.parts)
        packed = tuple(store.init(t.format, shape.batch, t.heads, tokens, t.width, shape.dtype) for t in tensors)

        def exact(tokens: int) -> tuple[Array, ...]:
            return tuple(jnp.zeros((shape.batch, tokens, t.heads, t.width), shape.dtype) for t in tensors)

        axes = tuple(t.axis for t in tensors)
        return cls(packed, exact(residual_length), exact(sink), residual_length, sink, axes)

    def logical_axes(self) -> BlockStore:
        """The same tree with a PartitionSpec of logical names at every leaf."""
        packed = tuple(store.logical_axes(*pair) for pair in zip(self.packed, self.axes, strict=True))
        exact: Any = tuple(PartitionSpec("batch", None, axis) for axis in self.axes)
        return dataclasses.replace(self, packed=packed, residual=exact, sinks=exact)

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        return self.packed[0].tokens

    def reads_stored(self, chunk: Chunk) -> bool:
        """Whether queries read their own chunk as it is stored (R = 0, or asked for)."""
        return self.residual_length == 0 or chunk.read == "stored"

    def packed_stop(self, chunk: Chunk) -> Int[Array, "B"]:
        """Positions below it are read as packed."""
        before = chunk.positions[:, 0]
        if self.reads_stored(chunk):
            return before + chunk.lengths
        return before // self.residual_length * self.residual_length

    def packed_positions(self, chunk: Chunk) -> Int[Array, "B S"]:
        """Which position each allocated token is read for, -1 where it is not."""
        index = jnp.arange(self.tokens)
        there = (index >= self.sink) & (index < self.packed_stop(chunk)[:, None])
        return jnp.where(there, index, -1)

    def kept(self, after: BlockStore, chunk: Chunk) -> tuple[tuple[Array, ...], Int[Array, "B N"]]:
        """Sinks and residual that the chunk's queries read beside the packed tokens; positions are -1 where absent.

        after: this store with the chunk in it.
        """
        before = chunk.positions[:, :1]
        slots = jnp.broadcast_to(jnp.arange(self.sink), (before.shape[0], self.sink))
        if self.reads_stored(chunk):
            return after.sinks, jnp.where(slots < before + chunk.lengths[:, None], slots, -1)
        positions = [jnp.where(slots < before, slots, -1)]
        slots = before // self.residual_length * self.residual_length + jnp.arange(self.residual_length)
        positions.append(jnp.where((slots >= self.sink) & (slots < before), slots, -1))
        both = tuple(jnp.concatenate(pair, 1) for pair in zip(self.sinks, self.residual, strict=True))
        return both, jnp.concatenate(positions, 1)

    def own_positions(self, chunk: Chunk) -> Int[Array, "B T"]:
        """The chunk's positions, -1 at padding."""
        end = chunk.positions[:, :1] + chunk.lengths[:, None]
        return jnp.where(chunk.positions < end, chunk.positions, -1)

    def append(self, new: Tensors, chunk: Chunk, encode: Encode | None = None) -> BlockStore:
        """Stores the chunk's tokens and flushes the blocks that are complete.

        encode: what is packed of tensors at positions [B, N]; the tensors themselves where None.
        """
        real = jnp.arange(new[0].shape[1]) < chunk.lengths[:, None]
        after = self._store_sinks(new, chunk.positions, real)
        if self.residual_length:
            return after._store_blocks(new, chunk, encode)

        def write(packed: Packed, new: Tensors, encode: Encode | None, positions: Array, lengths: Array) -> Packed:
            values = new if encode is None else encode(new, positions)
            start = positions[:, 0] - first_token(packed[0].tokens)
            return tuple(store.write_tokens(*pair, start, lengths) for pair in zip(packed, values, strict=True))

        return after._written(write, new, encode, chunk.positions, chunk.lengths)

    def _written(
        self, write: Callable[..., Packed], new: Tensors, encode: Encode | None, *by_sequence: Array
    ) -> BlockStore:
        """The store with `write(packed, new, encode, *by_sequence)` for what is packed: what each device holds."""
        axes = self.logical_axes().packed, tuple(PartitionSpec("batch", None, axis) for axis in self.axes)
        more = None if encode is None else encode.logical_axes(), *(PartitionSpec("batch"),) * len(by_sequence)
        packed = by_tokens(write, (self.packed, tuple(new), encode, *by_sequence), (*axes, *more), axes[0])
        return dataclasses.replace(self, packed=packed)

    def _store_sinks(self, new: Tensors, positions: Int[Array, "B T"], real: Bool[Array, "B T"]) -> BlockStore:
        if self.sink == 0:
            return self
        at = jnp.where(real & (positions < self.sink), positions, self.sink)
        put = jax.vmap(lambda old, x, at: old.at[at].set(x.astype(old.dtype), mode="drop"))  # batch: see ops/store.py
        sinks = tuple(put(old, x, at) for old, x in zip(self.sinks, new, strict=True))
        return dataclasses.replace(self, sinks=sinks)

    def _store_blocks(self, new: Tensors, chunk: Chunk, encode: Encode | None) -> BlockStore:
        """Appends to the residual and flushes complete blocks.

        Under "stored" the last, partial block is flushed as well, quantised on its own tokens, while the residual
        keeps them exact for its completion.
        """
        r, tokens = self.residual_length, new[0].shape[1]
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

        def flush(
            packed: Packed, new: Tensors, encode: Encode | None, at: Array, mask: Array, positions: Array
        ) -> Packed:
            values = new if encode is None else encode(new, positions.reshape(len(positions), -1))
            here = at - first_token(packed[0].tokens) // r

            def one(old: store.Stored, x: Array) -> store.Stored:
                return store.write_blocks(old, x.reshape(x.shape[0], blocks, r, *x.shape[2:]), mask, here)

            return tuple(map(one, packed, values))

        keep = ((end // r - before // r) * r)[:, None] + jnp.arange(r)
        residual = tuple(jnp.take_along_axis(x, keep[:, :, None, None], 1) for x in pending)
        after = dataclasses.replace(self, residual=residual)
        if not blocks:
            return after
        return after._written(flush, [x[:, : blocks * r] for x in pending], encode, at, mask, positions)


Width = Literal[1, 2, 3, 4, 5, 6, 8, 16]  # bits of a code; 16 is unquantised
ScaleWidth = Literal[8, 16]  # bits of a scale, and of a zero point
PairFit = Literal["minmax", "mse", "unbiased", "keys"]  # see `fits_of`


def fits_of(pair: PairFit) -> tuple[Fit, Fit]:
    """How scales of keys and of values are chosen."""
    if pair == "keys":
        return "mse", "minmax"
    return ("mse", "unbiased") if pair == "unbiased" else (pair, pair)


def largest_divisor(group: int, width: int) -> int:
    """The largest multiple of 8 up to `group` that divides `width`."""
    return next(g for g in range(group - group % 8, 0, -8) if width % g == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredSpec(CacheSpec):
    """A method that keeps its tensors in a `BlockStore`.

    residual: R, the tokens that stay exact until a block of R is complete; the method's `default_residual` where
      None.
    sink: the first tokens that stay exact for ever.

    Subclasses give `tensors`, and a `cache_type` where keys after RoPE and values are not what is kept.
    """

    residual: int | None = None
    sink: int = 0

    @property
    def cache_type(self) -> type[StoredCache]:
        """Reads and writes the tensors."""
        return StoredCache

    @abc.abstractmethod
    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        """What is kept. Raises KvjaxError where the settings do not fit the shape."""

    @property
    def default_residual(self) -> int:
        """R where none is named."""
        return 0

    @property
    def residual_length(self) -> int:
        return self.default_residual if self.residual is None else self.residual

    @property
    def largest_chunk(self) -> int | None:
        return self.residual_length or None

    @property
    def whole_windows(self) -> bool:
        return True

    def coded_tokens(self, length: int) -> int:
        flushed = length // self.residual_length * self.residual_length if self.residual_length else length
        return CacheSpec.coded_tokens(self, max(flushed - self.sink, 0))

    def resolve(self, model: LayerShapes) -> StoredSpec:
        spec = self if self.residual != self.default_residual else dataclasses.replace(self, residual=None)
        spec.tensors(model)
        return spec  # one spec, one name

    def bits_asymptotic(self, shape: LayerShapes) -> float:
        elements = 2 * shape.kv_heads * shape.head_dim
        return sum(t.format.bits_asymptotic * t.heads * t.width for t in self.tensors(shape)) / elements

    def init(self, shape: CacheShape) -> StoredCache:
        return self.cache_type(BlockStore.init(shape, self.tensors(shape), self.residual_length, self.sink), self)

    def logical_axes(self, shape: CacheShape) -> Any:
        cache = jax.eval_shape(lambda: self.init(shape))
        return dataclasses.replace(cache, store=cache.store.logical_axes())

    @property
    def program_form(self) -> StoredSpec:
        return self.with_widths(lambda bits: bits if bits == store.EXACT else BITS[-1])

    def with_widths(self, change: Callable[[int], int]) -> StoredSpec:
        """This spec with `change` applied to the fields that are widths of codes."""
        names = [name for name, kinds in fields.kinds(type(self)).items() if Width in kinds]
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in names})

    def format(self, bits: int, per: str, group: int, fit: Fit = "minmax", scale_bits: int = 16) -> store.Format:
        """How a tensor is packed in blocks of R tokens. Raises KvjaxError for groups that do not fit R."""
        r = self.residual_length
        if self.residual is None and r % 8 and getattr(self, "group", None) == r:
            raise KvjaxError(
                f"{self}: group={r}; expected a multiple of 8, or a residual that is one of 8 and of the group"
            )
        try:
            return store.Format(bits, per, group, self.residual_length, fit, scale_bits)
        except KvjaxError as error:
            raise KvjaxError(f"{self}: {error}") from None


@struct.dataclass
class StoredCache(LayerCache):
    """The tensors of a layer: keys after RoPE and values, unless a subclass keeps something else."""

    store: BlockStore
    spec: Any = struct.field(pytree_node=False)

    @property
    def keys_after_rope(self) -> bool:
        """Whether keys come back after RoPE, or before it and are rotated where they are read."""
        return True

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], StoredCache, Any]:
        # Stored first: a flush touches no position that the chunk reads as packed, and XLA copies a store that is
        # read before it is written.
        after, carry = self.append(chunk, carry)
        parts = [self.attend_packed(after, chunk, carry)]
        if self.store.sink or not self.store.reads_stored(chunk):
            k, v, positions = self._exact_kv(after, chunk)
            own = not self.store.reads_stored(chunk)
            parts.append(attention.attend_exact(chunk.q, chunk.positions, k, v, positions, chunk.window, own))
        output = attention.merge(parts, chunk.learned_sinks).astype(chunk.q.dtype)
        return output, dataclasses.replace(self, store=after), carry

    def materialize(self, chunk: Chunk, carry: Any):
        after, carry = self.append(chunk, carry)
        source = after if self.store.reads_stored(chunk) else self.store
        k, v = self.read_packed(source, chunk, carry)
        positions = source.packed_positions(chunk)
        positions = jnp.pad(positions, ((0, 0), (0, k.shape[1] - positions.shape[1])), constant_values=-1)
        packed = self._rotated(k, positions, chunk), v, positions
        exact = self._exact_kv(after, chunk)
        k, v, positions = (jnp.concatenate([a, b.astype(a.dtype)], 1) for a, b in zip(packed, exact, strict=True))
        return k, v, positions, dataclasses.replace(self, store=after), carry

    # ---- what a method says

    def new_tensors(self, chunk: Chunk) -> Tensors:
        """What is kept of the chunk's tokens."""
        return rotate_heads(chunk.k, chunk.rotation), chunk.v

    def rebuild_kv(self, tensors: Tensors, chunk: Chunk) -> tuple[Float[Array, "B N K d"], Float[Array, "B N K d"]]:
        """Keys and values of what is kept."""
        k, v = tensors
        return k, v

    def append(self, chunk: Chunk, carry: Any) -> tuple[BlockStore, Any]:
        """The store with the chunk in it, and the carry for the next layer."""
        return self.store.append(self.new_tensors(chunk), chunk), carry

    def attend_packed(self, after: BlockStore, chunk: Chunk, carry: Any) -> attention.Partial:
        """Attention over the packed tokens."""
        table = None if self.keys_after_rope else rope_table(chunk, after.tokens)
        keys, values = after.packed
        return attention.attend_packed(chunk.q, span(after, chunk), keys, values, table)

    def read_packed(
        self, source: BlockStore, chunk: Chunk, carry: Any
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        """Keys and values of all allocated tokens, dequantised, in float32 or wider."""
        tiles = (store.read_tile(packed, 0, source.tokens, read_dtype(chunk)) for packed in source.packed)
        return self.rebuild_kv([tile.dequantize().swapaxes(1, 2) for tile in tiles], chunk)

    # ---- what is read exactly

    def _exact_kv(self, after: BlockStore, chunk: Chunk) -> tuple[Array, Array, Int[Array, "B N"]]:
        """Keys after RoPE, values and positions (-1 where absent) of sinks, residual and the chunk itself."""
        tensors, positions = self.store.kept(after, chunk)
        k, v = self.rebuild_kv(tensors, chunk)
        k = self._rotated(k, positions, chunk)
        if self.store.reads_stored(chunk):
            return k, v, positions
        own = rotate_heads(chunk.k, chunk.rotation)
        positions = jnp.concatenate([positions, self.store.own_positions(chunk)], 1)
        k, v = (jnp.concatenate([a, b.astype(a.dtype)], 1) for a, b in ((k, own), (v, chunk.v)))
        return k, v, positions

    def _rotated(self, k: Float[Array, "B N K d"], positions: Int[Array, "B N"], chunk: Chunk) -> Array:
        return k if self.keys_after_rope else rotate_heads(k, chunk.rope.table(positions, chunk.q.dtype))


def span(after: BlockStore, chunk: Chunk) -> attention.Span:
    """Which packed tokens the chunk's queries see."""
    return attention.Span(chunk.positions, after.sink, after.packed_stop(chunk), chunk.window)


def rope_table(chunk: Chunk, tokens: int) -> tuple[Array, Array]:
    """cos and sin of every allocated position: the same in every layer, so built once."""
    return chunk.rope.table(jnp.arange(tokens), chunk.q.dtype)


def read_dtype(chunk: Chunk):
    """What stored values are read as: float32 or wider."""
    return jnp.promote_types(chunk.q.dtype, jnp.float32)
