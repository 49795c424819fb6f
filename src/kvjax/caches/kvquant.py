"""KVQuant: static ranges of keys before RoPE, learned levels, and exact outliers (arXiv 2401.18079).

Keys are normalised by a range of each channel that a calibration text gives, values by the range of their token over
all heads. A code is the number of one of 2^b levels, learned of each layer's keys and of its values with the squared
gradients as weights. Of every token the outermost entries at either end are kept with their places, and the first
token is exact. B batch, N tokens, K kv heads, d head_dim, C = K d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheSpec, Chunk, KVWeights, LayerShapes
from kvjax.caches.statistics import Statistics
from kvjax.caches.stored import BlockStore, StoredCache, StoredSpec, Tensors, TensorSpec, View, read_dtype
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.rotate import rotate
from kvjax.ops.store import RowFormat, Tile
from kvjax.quant import codebook, packing

NORMED_BITS = 2  # width up to which levels are matched in mean and spread (Q-Norm)


@dataclasses.dataclass(frozen=True)
class CodeRows(RowFormat):
    """Codes of `width` bits, packed along the channels."""

    width: int

    @property
    def bits_asymptotic(self) -> float:
        return self.width

    def encode(self, x: Float[Array, "... D"]) -> tuple[Array, ...]:
        return tuple(plane[..., 0] for plane in packing.pack(x.astype(jnp.uint8)[..., None], self.width))

    def decode(self, kept: tuple[Array, ...], dtype: Any) -> Float[Array, "... D"]:
        return packing.unpack(tuple(plane[..., None] for plane in kept), self.width)[..., 0].astype(dtype)


@dataclasses.dataclass(frozen=True)
class HalfRows(RowFormat):
    """Numbers in float16, the last `places` of them places in 16 bits."""

    places: int = 0
    bits_asymptotic: ClassVar[float] = 16.0  # type: ignore[assignment]

    def encode(self, x: Float[Array, "... D"]) -> tuple[Array, ...]:
        at = x.shape[-1] - self.places
        return x[..., :at].astype(jnp.float16), x[..., at:].astype(jnp.uint16)

    def decode(self, kept: tuple[Array, ...], dtype: Any) -> Float[Array, "... D"]:
        return jnp.concatenate([each.astype(dtype) for each in kept], -1)


@dataclasses.dataclass(frozen=True)
class KVQuant(StoredSpec):
    """Keys and values as codes of `bits` bits of learned levels.

    sink: the first token is exact, as the authors have it.
    sparse: 1 keeps about 1 % of a token's keys and of its values as outliers; 0 keeps none, and ranges are of all.
    """

    bits: Literal[2, 3, 4, 5]
    sink: int = dataclasses.field(default=1, kw_only=True)
    sparse: Literal[0, 1] = 1

    form: ClassVar[str] = "kvquant{bits}"
    examples: ClassVar[tuple[str, ...]] = ("kvquant3", "kvquant2(residual=16,sink=3,sparse=0)")
    calibrated: ClassVar[bool] = True  # type: ignore[assignment]

    @property
    def cache_type(self) -> type[StoredCache]:
        return KVQuantCache

    @property
    def bits_nominal(self) -> float:
        return self.bits

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        """Codes of keys and of values, the ranges of values, and outliers of keys and of values."""
        if shape.head_dim % 8:
            raise KvjaxError(f"{self}: head_dim {shape.head_dim}; expected a multiple of 8")
        # Ranges and outliers are of all heads, so a mesh must not divide these.
        codes = TensorSpec(CodeRows(self.bits), shape.kv_heads, shape.head_dim, None)
        kept = 2 * self.sparse * codebook.outliers_of(shape.kv_heads * shape.head_dim)
        outliers = TensorSpec(HalfRows(places=kept), 1, 2 * kept, None)
        return [codes, codes, TensorSpec(HalfRows(), 1, 2, None), *[outliers] * (2 * self.sparse)]

    logical_axes = CacheSpec.logical_axes

    @property
    def bases_key(self) -> str:
        return f"kvquant{self.bits}{'-sparse' * self.sparse}"

    def bases(self, weights: KVWeights, norm: Array, statistics: Statistics | None = None) -> Any:
        """[ends, levels of keys, levels of values], see `Books`."""
        assert statistics is not None
        books = []
        for counts, costs in (statistics.key_bins[self.sparse], statistics.value_bins[self.sparse]):
            levels = codebook.fit(costs, self.bits)
            read = codebook.matched(levels, counts) if self.bits <= NORMED_BITS else levels
            books.append([levels, read])
        return [statistics.key_ends[self.sparse], *books]


@struct.dataclass
class Books:
    """What turns keys before RoPE and values into what is packed, and back.

    Attributes:
      ends: the least and the largest key of each channel.
      keys: the levels that codes of keys are the nearest of, and those that are read for them.
      values: likewise of values.
      outliers: how many are kept at either end of a token.
    """

    ends: Float[Array, "2 K d"]
    keys: Sequence[Float[Array, "n"]]
    values: Sequence[Float[Array, "n"]]
    outliers: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, spec: KVQuant, chunk: Chunk) -> Books:
        """Those of a layer."""
        ends, keys, values = jax.tree.map(lambda a: jnp.asarray(a, read_dtype(chunk)), list(chunk.bases))
        return cls(ends, keys, values, spec.sparse * codebook.outliers_of(ends[0].size))

    def logical_axes(self) -> Books:
        whole: Any = PartitionSpec()
        return Books(whole, whole, whole, self.outliers)

    @property
    def key_range(self) -> tuple[Float[Array, "K d"], Float[Array, "K d"]]:
        """Middle and half width."""
        return self.ends.mean(0), (self.ends[1] - self.ends[0]) / 2

    def __call__(self, tensors: Tensors, positions: Int[Array, "B N"]) -> Tensors:
        """Codes, ranges and outliers of keys and values."""
        k, v = (x.astype(self.ends.dtype) for x in tensors[:2])
        flat = lambda x: x.reshape(*x.shape[:2], -1)  # noqa: E731
        exact = codebook.inner_range(flat(v), self.outliers)
        ranges = [a.astype(jnp.float16).astype(a.dtype) for a in exact]
        normal = codebook.normalise(k, *self.key_range), codebook.normalise(v, *(a[..., None] for a in ranges))
        codes = [codebook.nearest(*pair) for pair in zip(normal, (self.keys[0], self.values[0]), strict=True)]
        found = [*codes, jnp.concatenate(ranges, -1)[:, :, None]]
        if self.outliers:
            found += [
                outermost(flat(x), flat(y), self.outliers)[:, :, None] for x, y in zip((k, v), normal, strict=True)
            ]
        return found

    def load(
        self, tiles: Sequence[Float[Array, "B G n W"]]
    ) -> tuple[Float[Array, "B K n d"], Float[Array, "B K n d"]]:
        """Keys before RoPE and values."""
        k, v, ranges, *outliers = tiles
        middle, half = (a[:, None] for a in self.key_range)
        k = self.keys[1][k.astype(jnp.int32)] * half + middle
        v = self.values[1][v.astype(jnp.int32)] * ranges[..., 1:] + ranges[..., :1]
        return (put(k, outliers[0]), put(v, outliers[1])) if outliers else (k, v)


def outermost(x: Float[Array, "B N C"], normal: Float[Array, "B N C"], count: int) -> Float[Array, "B N _"]:
    """The `count` entries of x that stand highest and lowest when normalised; then their places."""
    at = jnp.concatenate([jax.lax.top_k(y, count)[1] for y in (normal, -normal)], -1)
    return jnp.concatenate([jnp.take_along_axis(x, at, -1), at.astype(x.dtype)], -1)


def put(x: Float[Array, "B K n d"], outliers: Float[Array, "B 1 n _"]) -> Float[Array, "B K n d"]:
    """x with the entries of `outermost` in their places."""
    rows = x.swapaxes(1, 2)
    values, at = jnp.split(outliers[:, 0], 2, -1)
    flat = rows.reshape(*rows.shape[:2], -1)
    flat = jnp.put_along_axis(flat, at.astype(jnp.int32), values, -1, inplace=False)
    return flat.reshape(rows.shape).swapaxes(1, 2)


@struct.dataclass
class KVQuantCache(StoredCache):
    """Keys come back before RoPE."""

    @property
    def keys_after_rope(self) -> bool:
        return False

    def new_tensors(self, chunk: Chunk) -> Tensors:
        """Keys and values; what else is packed follows from them."""
        more = [jnp.zeros((*chunk.k.shape[:2], *x.shape[2:]), x.dtype) for x in self.store.sinks[2:]]
        return chunk.k, chunk.v, *more

    def rebuild_kv(self, tensors: Tensors, chunk: Chunk) -> tuple[Float[Array, "B N K d"], Float[Array, "B N K d"]]:
        return tensors[0], tensors[1]

    def append(self, chunk: Chunk, carry: Any) -> tuple[BlockStore, Any]:
        return self.store.append(self.new_tensors(chunk), chunk, Books.of(self.spec, chunk)), carry

    def attend_packed(self, view: View, chunk: Chunk, carry: Any) -> attention.Partial:
        span, table, books = view.span(chunk), view.table(chunk), Books.of(self.spec, chunk)
        kv_heads, head_dim = chunk.k.shape[2:]
        size = attention.tile_size(view.tokens, kv_heads * head_dim, chunk.q.shape[1])

        def load(start: Array) -> tuple[Tile, Tile]:
            k, v = books.load([store.read_tile(each, start, size, read_dtype(chunk)).codes for each in view.packed])
            cos, sin = (jax.lax.dynamic_slice_in_dim(a, start, size, a.ndim - 2) for a in table)
            return Tile(rotate(k, cos, sin)), Tile(v)

        tiles = span.tiles(view.tokens, size, load)
        return attention.attend_keys(chunk.q, span.positions, kv_heads, tiles, span.window)

    def read_packed(
        self, view: View, chunk: Chunk, carry: Any
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        tiles = [store.read_tile(each, 0, view.tokens, read_dtype(chunk)).codes for each in view.packed]
        k, v = Books.of(self.spec, chunk).load(tiles)
        return k.swapaxes(1, 2), v.swapaxes(1, 2)
