"""AQUA-KV: what the layer below does not predict of keys and values is quantised (arXiv 2501.19392).

Keys before RoPE are predicted from the keys that are read in the layer below, values from the layer's own keys that
are read and from the values of the layer below, by linear maps that a calibration text gives. What is left of them is
turned by a Hadamard matrix and packed per token. The first layer is quantised in 4 bits as it is. The keys and values
that are read are rebuilt through the layers at every step and run across them as the carry, as in XQuant-CL.
B batch, N or S tokens, K kv heads, d head_dim, C = K d.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, Chunk, KVWeights, LayerShapes
from kvjax.caches.cross_layer import CrossLayerSpec
from kvjax.caches.fields import derived
from kvjax.caches.statistics import PREDICTED_BITS, Statistics
from kvjax.caches.stored import BlockStore, StoredCache, StoredSpec, Tensors, TensorSpec, View, read_dtype
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.key_form import turn
from kvjax.ops.rotate import rotate
from kvjax.ops.shards import by_tokens, first_token, per_shard
from kvjax.ops.store import Tile
from kvjax.quant import affine

FIRST_BITS: Literal[4] = 4  # of the first layer
FIT: affine.Fit = "mse"
ALIGN = 32  # tokens that the carry is a multiple of


@dataclasses.dataclass(frozen=True)
class Aqua(StoredSpec, CrossLayerSpec):
    """What is left of keys and of values in `bits` bits, one scale a token each.

    sink: the first tokens, exact; 4 as the authors have it.
    residual: tokens that are exact until so many are quantised together; 128 as the authors have it.
    """

    bits: Literal[2, 3, 4]
    sink: int = dataclasses.field(default=4, kw_only=True)
    delta: bool = derived(False)  # whether a layer of the method lies below

    form: ClassVar[str] = "aqua{bits}"
    examples: ClassVar[tuple[str, ...]] = ("aqua2(residual=16,sink=3)", "aqua3(residual=0)")
    forgets: ClassVar[bool] = False  # layers above it may see more than its window

    # ---- its place among the layers

    def with_index(self, below: CacheSpec | None) -> Aqua:
        under = isinstance(below, Aqua) and dataclasses.replace(below, bits=self.bits, delta=self.delta) == self
        return dataclasses.replace(self, delta=under)

    def validate_above(self, above: CacheSpec | None) -> None:
        """It may end anywhere."""

    @property
    def canonical(self) -> Aqua:
        return self if self.delta else dataclasses.replace(self, bits=FIRST_BITS)

    @property
    def label(self) -> str:
        return f"{self.canonical} {'above' if self.delta else 'as'} the first"

    @property
    def run_key(self) -> Aqua:
        return self.canonical

    @property
    def program_form(self) -> Aqua:
        return self.canonical  # the width is needed twice: for what is packed and for what predicts values

    def init_carry(self, shape: CacheShape) -> dict[str, Any]:
        formats = (t.format for t in self.tensors(shape))
        tokens = store.capacity(shape.max_len, *formats, block=ALIGN, parts=shape.parts)
        rows = jnp.zeros((shape.batch, tokens, shape.kv_heads * shape.head_dim), shape.dtype)
        return {"keys": rows, "values": rows}

    # ---- what it stores

    @property
    def cache_type(self) -> type[StoredCache]:
        return AquaCache

    @property
    def default_residual(self) -> int:
        return 128

    @property
    def bits_nominal(self) -> float:
        return self.bits if self.delta else FIRST_BITS

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        width = shape.kv_heads * shape.head_dim
        if width % 8:
            raise KvjaxError(f"{self}: {width} channels of keys; expected a multiple of 8")
        form = self.format(int(self.bits_nominal), "token", width, FIT)
        return [TensorSpec(form, 1, width, None)] * 2  # predictors take all heads, so a mesh must not divide these

    logical_axes = CacheSpec.logical_axes

    @property
    def calibrated(self) -> bool:
        return self.delta

    @property
    def bases_key(self) -> str:
        return f"aqua{self.bits}" if self.delta else ""

    def bases(self, weights: KVWeights, norm: Array, statistics: Statistics | None = None) -> Any:
        """[W_k, W_v], [C + 1, C] and [2C + 1, C], the last row of each added; nothing in the first layer."""
        if statistics is None:
            return []
        at = PREDICTED_BITS.index(self.bits)
        return [statistics.key_predictor[at], statistics.value_predictor[at]]


def read_back(turned: Float[Array, "... C"], bits: int) -> Float[Array, "... C"]:
    """What is read of turned rows that are packed."""
    width = turned.shape[-1]
    q = affine.quantize(turned, bits, -1, width, None, FIT)
    return turn(affine.dequantize(q, -1, width, turned.dtype))


def predict(weight: Float[Array, "n+1 C"] | None, *inputs: Float[Array, "... _"]) -> Float[Array, "... C"] | float:
    """Rows from what is read of others; 0 where there is no predictor."""
    if weight is None:
        return 0.0
    x = jnp.concatenate(inputs, -1)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    weight = weight.astype(x.dtype)
    return x @ weight[:-1] + weight[-1]


def predictors(chunk: Chunk) -> tuple[Any, Any]:
    """Those of keys and of values; None twice in the first layer."""
    return tuple(chunk.bases) if len(chunk.bases) else (None, None)  # type: ignore[return-value]


@struct.dataclass
class Left:
    """Packs what is not predicted, turned."""

    keys: Float[Array, "B S C"]  # that are read in the layer below
    values: Float[Array, "B S C"]
    weights: tuple[Any, Any]
    bits: int = struct.field(pytree_node=False)

    def __call__(self, tensors: Tensors, positions: Int[Array, "B N"]) -> Tensors:
        at = jnp.clip(positions - first_token(self.keys.shape[1]), 0, self.keys.shape[1] - 1)[:, :, None]
        keys, values = (jnp.take_along_axis(a, at, 1) for a in (self.keys, self.values))
        k, v = (x[:, :, 0].astype(jnp.promote_types(x.dtype, jnp.float32)) for x in tensors)
        of_keys, of_values = self.weights
        predicted = predict(of_keys, keys)
        left = turn(k - predicted)
        read = read_back(left, self.bits) + predicted
        return [left[:, :, None], turn(v - predict(of_values, read.astype(keys.dtype), values))[:, :, None]]

    def logical_axes(self) -> Left:
        rows: Any = PartitionSpec("batch", "tokens")
        return Left(rows, rows, (PartitionSpec(), PartitionSpec()), self.bits)


ROWS = PartitionSpec("batch", "tokens")
HEADS = PartitionSpec("batch", "tokens", "kv_heads")


@struct.dataclass
class AquaCache(StoredCache):
    """What is not predicted of keys before RoPE and of values."""

    @property
    def keys_after_rope(self) -> bool:
        return False

    def new_tensors(self, chunk: Chunk) -> Tensors:
        return [x.reshape(*x.shape[:2], 1, -1) for x in (chunk.k, chunk.v)]

    def rebuild_kv(self, tensors: Tensors, chunk: Chunk) -> tuple[Array, Array]:
        k, v = (x.reshape(*x.shape[:2], *chunk.k.shape[2:]) for x in tensors)
        return k, v

    def append(self, chunk: Chunk, carry: Any) -> tuple[BlockStore, Any]:
        weights = predictors(chunk)
        left = Left(carry["keys"], carry["values"], weights, int(self.spec.bits_nominal))
        after = self.store.append(self.new_tensors(chunk), chunk, left)
        end, r = chunk.positions[:, 0] + chunk.lengths, self.spec.residual_length
        stop = end if self.store.reads_stored(chunk) else end // r * r
        below = {name: carry[name] for name in ("keys", "values")}
        packed = tuple(store.logical_axes(each, None) for each in after.packed)
        axes = packed, ROWS, PartitionSpec(), PartitionSpec("batch")
        return after, carry | by_tokens(rebuild, (after.packed, below, weights, stop), axes, ROWS)

    def attend_packed(self, view: View, chunk: Chunk, carry: Any) -> attention.Partial:
        span, table = view.span(chunk), view.table(chunk, carry["keys"].shape[1])
        heads, dtype = chunk.k.shape[2], read_dtype(chunk)

        def attend(q: Array, k: Array, v: Array, table: Any, *ends: Array) -> attention.Partial:
            def held(span: attention.Span) -> attention.Partial:
                tokens, own = k.shape[1:3]
                size = attention.tile_size(tokens, own * k.shape[3], q.shape[1])

                def load(start: Array) -> tuple[Tile, Tile]:
                    rows = (jax.lax.dynamic_slice_in_dim(a, start, size, 1) for a in (k, v))
                    tile_k, tile_v = (a.swapaxes(1, 2).astype(dtype) for a in rows)
                    cos, sin = (jax.lax.dynamic_slice_in_dim(a, start, size, a.ndim - 2) for a in table)
                    return Tile(rotate(tile_k, cos, sin)), Tile(tile_v)

                tiles = span.tiles(tokens, size, load)
                return attention.attend_keys(q, span.positions, own, tiles, span.window)

            return attention.attend_held(span.between(*ends), k.shape[1], held)

        k, v = (carry[name].reshape(*carry[name].shape[:2], heads, -1) for name in ("keys", "values"))
        axes = attention.BY_HEAD, HEADS, HEADS, attention.table_axes(table, span), *(attention.BY_SEQUENCE,) * 2
        return per_shard(attend, (chunk.q, k, v, table, *span.ends), axes, attention.BY_HEAD)

    def read_packed(self, view: View, chunk: Chunk, carry: Any) -> tuple[Array, Array]:
        return self.rebuild_kv([carry[name].astype(read_dtype(chunk)) for name in ("keys", "values")], chunk)


def rebuild(packed: tuple[store.Stored, ...], below: Any, weights: tuple[Any, Any], stop: Int[Array, "B"]) -> Any:
    """The keys and values that are read below `stop`, of those in the layer below; elsewhere these.

    In tiles of one size, whatever the number of tokens, so that a larger cache holds the same numbers.
    """
    tokens, size = packed[0].tokens, packed[0].format.pack_size
    stop = jnp.clip(stop - first_token(tokens), 0, tokens)

    def step(i: Array, rows: Any) -> Any:
        old = {name: jax.lax.dynamic_slice_in_dim(a, i * size, size, 1) for name, a in rows.items()}
        dtype = old["keys"].dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        left = [turn(store.read_tile(each, i * size, size, wide).dequantize()[:, 0]) for each in packed]
        keys = (left[0] + predict(weights[0], old["keys"])).astype(dtype)
        values = (left[1] + predict(weights[1], keys, old["values"])).astype(dtype)
        here = (i * size + jnp.arange(size) < stop[:, None])[..., None]
        new = {"keys": jnp.where(here, keys, old["keys"]), "values": jnp.where(here, values, old["values"])}
        return {name: jax.lax.dynamic_update_slice_in_dim(rows[name], new[name], i * size, 1) for name in rows}

    return jax.lax.fori_loop(0, -(-stop.max() // size), step, below)
