"""What packed methods share: packed blocks, the exact residual that waits to fill one, exact sinks, and attention.

A method says which tensors it keeps (keys and values, or latents), in which formats, and how keys and values come
back from them. When and where they are written, and what is read exactly, is decided here, once. B batch, T tokens
of the chunk, G heads and W width of a tensor, R residual length.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches import fields
from kvjax.caches.base import CacheShape, CacheSpec, Chunk, LayerCache, LayerShapes
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.key_form import Table
from kvjax.ops.rotate import rotate_heads
from kvjax.ops.shards import by_tokens, first_token
from kvjax.quant.affine import BITS, Fit
from kvjax.quant.gains import Gain

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

    @property
    def bits_asymptotic(self) -> float:
        """Bits per element, counting everything that is kept beside codes."""
        gains = self.format.gain_bits(self.width) if isinstance(self.format, store.Format) else 0
        return self.format.bits_asymptotic + gains


class View(NamedTuple):
    """Packed tokens that are read as if slot i held position `origin` + i.

    Attributes:
      packed: what holds them.
      first: the first slot that is read.
      stop: per sequence, the slot after the last that is read.
      origin: per sequence; None where it is 0 and a mesh may divide the tokens.
    """

    packed: Packed
    first: int
    stop: Int[Array, "B"]
    origin: Int[Array, "B"] | None = None

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        return self.packed[0].tokens

    def span(self, chunk: Chunk) -> attention.Span:
        """Which of the tokens the chunk's queries see, positions counted from the origin."""
        if self.origin is None:
            return attention.Span(chunk.positions, self.first, self.stop, chunk.window)
        here = chunk.positions - self.origin[:, None]
        return attention.Span(here, self.first, self.stop, chunk.window, divided=False)

    def table(self, chunk: Chunk, tokens: int | None = None) -> Table:
        """cos and sin of every slot, the same in every layer of a kind, so built once; of `tokens` where given."""
        slots = jnp.arange(self.tokens if tokens is None else tokens)
        at = slots if self.origin is None else self.origin[:, None, None] + slots
        return chunk.rope.table(at, chunk.q.dtype)

    def positions(self, chunk: Chunk) -> Int[Array, "B S"]:
        """The position that each slot is read for, -1 where it is not."""
        slots = jnp.arange(self.tokens)
        there = (slots >= self.first) & (slots < self.stop[:, None])
        if self.origin is None:
            return jnp.where(there, slots, -1)
        at = self.origin[:, None] + slots
        if chunk.window is not None:  # the rest may be overwritten
            there &= at > chunk.positions[:, :1] - chunk.window
        return jnp.where(there, at, -1)


SLACK = 32  # tokens at least that a ring has room for beyond the window: streaming reads as many at once


@struct.dataclass
class BlockStore:
    """Slot i of the residual holds position F + i, F the flushed tokens.

    Where queries see a window, packed tokens may lie in a ring of S slots: position p in slot p mod S, those of one
    run through all slots a lap. What a token overwrites is further back than any query sees.
    """

    packed: Packed
    residual: tuple[Float[Array, "B R G W"], ...]
    sinks: tuple[Float[Array, "B s G W"], ...]
    residual_length: int = struct.field(pytree_node=False)  # R
    sink: int = struct.field(pytree_node=False)
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)  # of each tensor, the logical name of its heads
    ring: bool = struct.field(pytree_node=False, default=False)
    origin: Int[Array, "B"] | None = None  # the position of slot 0 where it is not 0 (and there is no ring)

    @classmethod
    def init(cls, shape: CacheShape, tensors: Sequence[TensorSpec], residual_length: int, sink: int) -> BlockStore:
        """Empty; a ring where that is smaller."""
        formats = [t.format for t in tensors]

        def room(tokens: int, parts: int = 1) -> int:
            return store.capacity(tokens, *formats, block=residual_length or 1, parts=parts)

        tokens, ring = room(shape.max_len, shape.parts), False
        if shape.window is not None:
            slots = room(max(shape.window + max(residual_length, SLACK), sink))
            if slots < room(shape.max_len):
                tokens, ring = slots, True
        packed = tuple(store.init(t.format, shape.batch, t.heads, tokens, t.width, shape.dtype) for t in tensors)

        def exact(tokens: int) -> tuple[Array, ...]:
            return tuple(jnp.zeros((shape.batch, tokens, t.heads, t.width), shape.dtype) for t in tensors)

        axes = tuple(t.axis for t in tensors)
        return cls(packed, exact(residual_length), exact(sink), residual_length, sink, axes, ring)

    def logical_axes(self) -> BlockStore:
        """The same tree with a PartitionSpec of logical names at every leaf."""
        tokens = "tokens" if self.divided else None
        packed = tuple(store.logical_axes(*pair, tokens) for pair in zip(self.packed, self.axes, strict=True))
        exact: Any = tuple(PartitionSpec("batch", None, axis) for axis in self.axes)
        return dataclasses.replace(self, packed=packed, residual=exact, sinks=exact)

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        return self.packed[0].tokens

    @property
    def pack_size(self) -> int:
        """Tokens that are packed together, of all tensors."""
        return store.capacity(1, *(each.format for each in self.packed), block=self.residual_length or 1)

    @property
    def divided(self) -> bool:
        """Whether a mesh may divide the packed tokens: not those of a ring, which are few."""
        return not self.ring and self.origin is None

    def reads_stored(self, chunk: Chunk) -> bool:
        """Whether queries read their own chunk as it is stored (R = 0, or asked for)."""
        return self.residual_length == 0 or chunk.read == "stored"

    def packed_stop(self, chunk: Chunk) -> Int[Array, "B"]:
        """Positions below it are read as packed."""
        before = chunk.positions[:, 0]
        if self.reads_stored(chunk):
            return before + chunk.lengths
        return before // self.residual_length * self.residual_length

    def in_place(self, chunk: Chunk) -> bool:
        """Whether the chunk's queries find all that they read in the store with the chunk in it."""
        if not self.ring:
            return True
        assert chunk.window is not None
        last_block = self.residual_length if chunk.read == "stored" else 0
        return max(chunk.window, self.pack_size) + chunk.positions.shape[1] - 1 + last_block <= self.tokens

    def views(self, chunk: Chunk) -> list[View]:
        """What the chunk's queries read as packed, in views that share no token."""
        stop, size = self.packed_stop(chunk), self.tokens
        if self.divided:
            return [View(self.packed, self.sink, stop)]

        def view(origin: Int[Array, "B"], first: int, there: Bool[Array, "B"]) -> View:
            held = jnp.clip(stop - origin, 0, size)
            return View(self.packed, first, jnp.where(there, held, 0), origin)

        lap = jnp.maximum(stop - 1, 0) // size
        # Of a ring, the last lap and the one before it.
        origins = [lap * size, (lap - 1) * size] if self.origin is None else [self.origin]
        if not self.sink:
            return [view(origin, 0, origin >= 0) for origin in origins]
        # `first` is static in kernels, so what begins with the sinks takes a view of its own.
        begins = (jnp.stack(origins) == 0).any(0)
        return [view(origin, 0, origin > 0) for origin in origins] + [view(jnp.zeros_like(stop), self.sink, begins)]

    def kept(
        self, after: BlockStore, chunk: Chunk
    ) -> tuple[tuple[Array, ...], Int[Array, "B N"], Bool[Array, "B N"]]:
        """Sinks and residual beside the packed tokens, their positions, and which of them the chunk's queries read.

        A sink that the residual still holds is read once. after: this store with the chunk in it.
        """
        before = chunk.positions[:, :1]
        slots = jnp.broadcast_to(jnp.arange(self.sink), (before.shape[0], self.sink))
        if self.reads_stored(chunk):
            return after.sinks, slots, slots < before + chunk.lengths[:, None]
        recent = before // self.residual_length * self.residual_length + jnp.arange(self.residual_length)
        both = tuple(jnp.concatenate(pair, 1) for pair in zip(self.sinks, self.residual, strict=True))
        there = (slots < before, (recent >= self.sink) & (recent < before))
        return both, jnp.concatenate([slots, recent], 1), jnp.concatenate(there, 1)

    def recent(self, x: Float[Array, "B RT K d"], held: Int[Array, "B"]) -> Float[Array, "B RT K d"]:
        """Residual and chunk, one after the other, as one run of tokens: without the slots that hold nothing.

        held: tokens in the residual.
        """
        r = self.residual_length
        put = jax.vmap(lambda old, new, at: old.at[at].set(new))  # batch: see ops/store.py
        return put(x, x[:, r:], held[:, None] + jnp.arange(x.shape[1] - r))

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
            start = positions[:, 0] - self._first(packed)
            pairs = zip(packed, values, strict=True)
            return tuple(store.write_tokens(*pair, start, lengths, self.ring) for pair in pairs)

        return after._written(write, *self._last(new, chunk, encode))

    def _first(self, packed: Packed) -> Int[Array, "..."] | int:
        """The position of the first slot of `packed`, the part that a device holds; of the first lap in a ring."""
        if self.origin is not None:
            return self.origin
        return first_token(packed[0].tokens) if self.divided else 0

    def _last(
        self, new: Tensors, chunk: Chunk, encode: Encode | None
    ) -> tuple[Tensors, Encode | None, Int[Array, "B N"], Int[Array, "B"]]:
        """What is written of a chunk, its positions and lengths: in a ring, as much as fills every slot once."""
        most = self.tokens - self.pack_size + 1
        if not self.ring or chunk.positions.shape[1] <= most:
            return new, encode, chunk.positions, chunk.lengths
        begin = jnp.maximum(chunk.lengths - most, 0)
        at = begin[:, None] + jnp.arange(most)
        last = [jnp.take_along_axis(x, at[:, :, None, None], 1) for x in new]
        return last, encode, chunk.positions[:, :1] + at, chunk.lengths - begin

    def _written(
        self, write: Callable[..., Packed], new: Tensors, encode: Encode | None, *by_sequence: Array
    ) -> BlockStore:
        """The store with `write(packed, new, encode, *by_sequence)` for what is packed: what each device holds."""
        if not self.divided:
            return dataclasses.replace(self, packed=write(self.packed, new, encode, *by_sequence))
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
        stop = -(-end // r) if partial else end // r  # blocks below it are written
        blocks = -(-(r - 1 + tokens) // r) if partial else (r - 1 + tokens) // r
        blocks = min(blocks, self.tokens // r) if self.ring else blocks
        begin = jnp.maximum(before // r, stop - blocks)

        def pending(block: Int[Array, "B"], count: int) -> list[Array]:
            """Tokens from a block on: those of the residual, then the chunk's."""
            offset = ((block - before // r) * r)[:, None] + jnp.arange(count)
            source = jnp.where(offset < (before % r)[:, None], offset, r + offset - (before % r)[:, None])
            source = jnp.minimum(source, r + tokens - 1)[:, :, None, None]
            both = zip(self.residual, new, strict=True)
            return [jnp.take_along_axis(jnp.concatenate([old, x.astype(old.dtype)], 1), source, 1) for old, x in both]

        index = begin[:, None] + jnp.arange(blocks)
        at = jnp.where(index < stop[:, None], index, -1)  # dropped
        positions = index[:, :, None] * r + jnp.arange(r)
        mask = (positions >= self.sink) & (positions < end[:, None, None])

        def flush(
            packed: Packed, new: Tensors, encode: Encode | None, at: Array, mask: Array, positions: Array
        ) -> Packed:
            values = new
            if encode is not None:
                values = store.where_any(at >= 0, lambda: encode(new, positions.reshape(len(at), -1)))
            here = at - jnp.reshape(self._first(packed), (-1, 1)) // r
            here = jnp.where(at < 0, -1, here % (packed[0].tokens // r)) if self.ring else here

            def one(old: store.Stored, x: Array) -> store.Stored:
                return store.write_blocks(old, x.reshape(x.shape[0], blocks, r, *x.shape[2:]), mask, here)

            return tuple(map(one, packed, values))

        after = dataclasses.replace(self, residual=tuple(pending(end // r, r)))
        if not blocks:
            return after
        return after._written(flush, pending(begin, blocks * r), encode, at, mask, positions)


Width = Literal[1, 2, 3, 4, 5, 6, 8, 16]  # bits of a code; 16 is unquantised
ScaleWidth = Literal[8, 16]  # bits of a scale, and of a zero point
PairFit = Literal["minmax", "mse", "unbiased", "keys"]  # see `fits_of`


def fits_of(pair: PairFit | Literal["integer"]) -> tuple[Fit, Fit]:
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
    `forgets`: whether a layer with a sliding window keeps no more than its queries see.
    """

    residual: int | None = None
    sink: int = 0

    forgets: ClassVar[bool] = True

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
        return sum(t.bits_asymptotic * t.heads * t.width for t in self.tensors(shape)) / elements

    def init(self, shape: CacheShape) -> StoredCache:
        shape = shape if self.forgets else dataclasses.replace(shape, window=None)
        return self.cache_type(BlockStore.init(shape, self.tensors(shape), self.residual_length, self.sink), self)

    def logical_axes(self, shape: CacheShape) -> Any:
        cache = jax.eval_shape(lambda: self.init(shape))
        return dataclasses.replace(cache, store=cache.store.logical_axes())

    @property
    def program_form(self) -> StoredSpec:
        return self.with_widths(lambda bits: bits if bits == store.EXACT else BITS[-1])

    def with_widths(self, change: Callable[[int], int]) -> Self:
        """This spec with `change` applied to the fields that are widths of codes."""
        names = [name for name, kinds in fields.kinds(type(self)).items() if Width in kinds]
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in names})

    def format(
        self, bits: int, per: str, group: int, fit: Fit = "minmax", scale_bits: int = 16, gain: Gain = "none"
    ) -> store.Format:
        """How a tensor is packed in blocks of R tokens. Raises KvjaxError for groups that do not fit R."""
        r = self.residual_length
        if self.residual is None and r % 8 and getattr(self, "group", None) == r:
            raise KvjaxError(
                f"{self}: group={r}; expected a multiple of 8, or a residual that is one of 8 and of the group"
            )
        try:
            return store.Format(bits, per, group, self.residual_length, fit, scale_bits, gain)
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
        after, above = self.append(chunk, carry)
        views = self._views(after, chunk, carry)
        parts = [self.attend_packed(view, chunk, above) for view in views]
        if self.store.sink or not self.store.reads_stored(chunk):
            parts += self._attend_kept(after, chunk, above)
        output = attention.merge(parts, chunk.learned_sinks).astype(chunk.q.dtype)
        return output, dataclasses.replace(self, store=after), above

    def materialize(self, chunk: Chunk, carry: Any):
        after, above = self.append(chunk, carry)
        parts = []
        for view in self._views(after if self.store.reads_stored(chunk) else self.store, chunk, carry):
            k, v = self.read_packed(view, chunk, above)
            positions = view.positions(chunk)
            positions = jnp.pad(positions, ((0, 0), (0, k.shape[1] - positions.shape[1])), constant_values=-1)
            parts.append((self._rotated(k, positions, chunk), v, positions))
        parts.append(self._exact_kv(after, chunk))
        dtypes = [a.dtype for a in parts[0]]
        k, v, positions = (
            jnp.concatenate([a.astype(dtype) for a in each], 1)
            for dtype, each in zip(dtypes, zip(*parts, strict=True), strict=True)
        )
        return k, v, positions, dataclasses.replace(self, store=after), above

    def _attend_kept(self, after: BlockStore, chunk: Chunk, carry: Any) -> list[attention.Partial]:
        """Attention over what `_exact_kv` gives."""
        k, v, positions = self._exact_kv(after, chunk)
        if chunk.q.shape[1] >= attention.CHUNK:
            own = not self.store.reads_stored(chunk)
            return [attention.attend_exact(chunk.q, chunk.positions, k, v, positions, chunk.window, own)]
        views = self._kept_views((k, v), chunk)
        return [attention.attend_packed(chunk.q, view.span(chunk), view.packed[0], view.packed[1]) for view in views]

    def _kept_views(self, tensors: Tensors, chunk: Chunk) -> list[View]:
        """Sinks, residual and the chunk, which follow one another in `tensors`, as views that kernels can read.

        They are the sinks that the residual does not hold, and a run of the residual's tokens and the chunk's.
        """
        mine, base = self.store, self.store.packed_stop(chunk)

        def view(parts: list[Array], stop: Array, origin: Array) -> View:
            return View(tuple(store.exact(a.swapaxes(1, 2)) for a in parts), 0, stop, origin)

        views = []
        if mine.sink:
            views.append(
                view([a[:, : mine.sink] for a in tensors], jnp.minimum(base, mine.sink), jnp.zeros_like(base))
            )
        if not mine.reads_stored(chunk):
            held = chunk.positions[:, 0] - base
            run = [mine.recent(a[:, mine.sink :], held) for a in tensors]
            views.append(view(run, held + chunk.lengths, base))
        return views

    def _views(self, source: BlockStore, chunk: Chunk, carry: Any) -> list[View]:
        """What the chunk's queries read as packed. `source` has it all, unless the chunk is too long for a ring."""
        if self.store.in_place(chunk):
            return source.views(chunk)
        views = self.store.views(dataclasses.replace(chunk, lengths=jnp.zeros_like(chunk.lengths), read="exact"))
        if self.store.reads_stored(chunk):
            own, _ = dataclasses.replace(self, store=self._room_for(chunk)).append(chunk, carry)
            views += own.views(chunk)
        return views

    def _room_for(self, chunk: Chunk) -> BlockStore:
        """A store for the chunk's tokens alone, and those that wait to be packed with them."""
        mine, block = self.store, self.store.residual_length or 1
        (batch, tokens, heads, head_dim), dtype = chunk.q.shape, mine.residual[0].dtype
        origin = chunk.positions[:, 0] // block * block
        origin = jnp.where(origin < mine.sink, 0, origin)  # sinks are told by their slots
        shape = CacheShape(
            batch, tokens + block + mine.sink, heads, chunk.k.shape[2], head_dim, chunk.h.shape[2], dtype
        )
        empty = BlockStore.init(shape, self.spec.tensors(shape), mine.residual_length, mine.sink)
        return dataclasses.replace(empty, residual=mine.residual, sinks=mine.sinks, origin=origin)

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

    def attend_packed(self, view: View, chunk: Chunk, carry: Any) -> attention.Partial:
        """Attention over the packed tokens of a view."""
        table = None if self.keys_after_rope else view.table(chunk)
        keys, values = view.packed
        return attention.attend_packed(chunk.q, view.span(chunk), keys, values, table)

    def read_packed(
        self, view: View, chunk: Chunk, carry: Any
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        """Keys and values of all slots, dequantised, in float32 or wider."""
        tiles = (store.read_tile(packed, 0, view.tokens, read_dtype(chunk)) for packed in view.packed)
        return self.rebuild_kv([tile.dequantize().swapaxes(1, 2) for tile in tiles], chunk)

    # ---- what is read exactly

    def _exact_kv(self, after: BlockStore, chunk: Chunk) -> tuple[Array, Array, Int[Array, "B N"]]:
        """Keys after RoPE, values and positions (-1 where absent) of sinks, residual and the chunk itself."""
        tensors, positions, there = self.store.kept(after, chunk)
        k, v = self.rebuild_kv(tensors, chunk)
        k = self._rotated(k, positions, chunk)
        positions = jnp.where(there, positions, -1)
        if self.store.reads_stored(chunk):
            return k, v, positions
        own = rotate_heads(chunk.k, chunk.rotation)
        positions = jnp.concatenate([positions, self.store.own_positions(chunk)], 1)
        k, v = (jnp.concatenate([a, b.astype(a.dtype)], 1) for a, b in ((k, own), (v, chunk.v)))
        return k, v, positions

    def _rotated(self, k: Float[Array, "B N K d"], positions: Int[Array, "B N"], chunk: Chunk) -> Array:
        return k if self.keys_after_rope else rotate_heads(k, chunk.rope.table(positions, chunk.q.dtype))


def read_dtype(chunk: Chunk):
    """What stored values are read as: float32 or wider."""
    return jnp.promote_types(chunk.q.dtype, jnp.float32)
