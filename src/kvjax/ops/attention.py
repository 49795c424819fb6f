"""Tiled attention over packed and exact keys and values, in parts that merge exactly.

Every op returns (output, log-sum-exp), so that packed history, residual, sinks and the chunk itself merge without
loss. A tile of keys and values is read, used and dropped: no op allocates an array of the history's size.
B batch, T queries, H heads, K kv heads, Q = T*H/K query rows per kv head, N keys, D head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax import mesh as meshes
from kvjax.errors import KvjaxError
from kvjax.mesh import RULES
from kvjax.ops import store
from kvjax.ops.dispatch import dispatch
from kvjax.ops.key_form import BEFORE_ROPE, KeyForm, Table
from kvjax.ops.shards import first_token, token_parts
from kvjax.ops.store import Tile
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.layout import MASKED
from pallas_kernels.packed_attention import packed_attention

QUERY_TILE = 256  # queries that share a pass over the keys
CHUNK = 128  # queries from which a chunk is worth a kernel of its own

BY_SEQUENCE = PartitionSpec("batch")
BY_HEAD = PartitionSpec("batch", None, "kv_heads")  # query heads lie where the kv head is that they read

_DECODE_ROWS = 16  # query rows per kv head up to which folding scales costs less than applying them
_LOWEST = -1e20  # the first maximum: far above MASKED, so that masked scores have exponentials of 0
# Elements of a sequence's tile of codes, and tokens of a tile that several queries read. On CPU 512 KiB of float32
# stay in a core's cache; on GPU every tile costs a dozen kernel launches. Counts are in docs/decisions.md.
_TILES = {"cpu": (2**17, 256), "tpu": (2**18, 256), "gpu": (2**20, 1024)}
_BFLOAT16 = ("gpu", "tpu")  # where products of bfloat16, summed in float32, are faster than products of float32


class Partial(NamedTuple):
    """Attention over some of the keys: the output and the log of the sum of exponentials."""

    output: Float[Array, "B T H D"]
    lse: Float[Array, "B T H"]


class Keys(NamedTuple):
    """Keys and values that are loaded tile by tile.

    Attributes:
      tiles: number of tiles.
      load: `load(i)` returns tile i as (keys, values, positions [B, n]); a position is -1 where there is no key.
      reach: `reach(first, last)` returns the tiles [lo, hi) that the chunk's queries with indices first to last see.
      width: channels of a value, where they differ from head_dim.
      trusted: whether a value that is not finite may spoil the output of queries that do not see it.
    """

    tiles: int
    load: Callable[[Array | int], tuple[Tile, Tile, Array]]
    reach: Callable[[Array, Array], tuple[Array, Array]]
    width: int | None = None
    trusted: bool = False


class Span(NamedTuple):
    """Which stored tokens the queries of a chunk see.

    They see the positions [first, stop) of their sequence. With a window, the query at position p sees only those
    above p - window.

    Attributes:
      positions: positions of the queries, consecutive in each sequence.
      first: the first stored position that is read.
      stop: per sequence, the position after the last that is read.
      window: sliding window in tokens; None where there is none.
      divided: whether the tokens are divided where a mesh divides tokens; otherwise every device holds all of them.
    """

    positions: Int[Array, "B T"]
    first: int
    stop: Int[Array, "B"]
    window: int | None
    divided: bool = True

    @property
    def axis(self) -> str | None:
        """The logical name of the axis of stored tokens."""
        return "tokens" if self.divided else None

    @property
    def ends(self) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """The arrays of the span."""
        return self.positions, self.stop

    def between(self, positions: Int[Array, "B T"], stop: Int[Array, "B"]) -> Span:
        """The same span of other `ends`: of a part of the sequences."""
        return self._replace(positions=positions, stop=stop)

    @property
    def arrays(self) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """`start` and `stop`, as attention kernels take them."""
        return self.positions[:, 0], self.stop

    @property
    def settings(self) -> dict[str, Any]:
        """The rest of the span, as attention kernels take it."""
        return {"first": self.first, "window": self.window}

    def tiles(
        self, tokens: int, size: int, read: Callable[[Array], tuple[Tile, Tile]], width: int | None = None
    ) -> Keys:
        """Cuts the stored tokens into tiles.

        Args:
          tokens: allocated tokens S.
          size: tokens of a tile.
          read: `read(start)` returns keys and values of the `size` tokens from `start` on.
          width: channels of a value, where they differ from head_dim.

        Returns:
          The tiles, with the span's mask in their positions.
        """

        def load(i):
            # The last tile starts early where `size` does not divide S; the tokens it repeats are masked.
            start = jnp.minimum(i * size, tokens - size)
            index = start + jnp.arange(size)
            there = (index >= jnp.maximum(self.first, i * size)) & (index < self.stop[:, None])
            return *read(start), jnp.where(there, index, -1)

        def reach(first_query, last_query):
            last = jnp.minimum(self.positions[:, last_query] + 1, self.stop).max()
            lo = 0 if self.window is None else (self.positions[:, first_query] - self.window + 1).min()
            return jnp.maximum(lo, self.first) // size, -(-last // size)

        return Keys(-(-tokens // size), load, reach, width)


def merge(parts: Sequence[Partial], learned_sinks: Float[Array, "H"] | None = None) -> Float[Array, "B T H D"]:
    """Merges attention over disjoint sets of keys into attention over their union.

    Args:
      parts: attention of the same queries over each set.
      learned_sinks: a score of each head that joins its softmax and adds no value; None where there is none.

    Returns:
      The output over all keys.
    """
    lse = [part.lse for part in parts]
    if learned_sinks is not None:
        lse.append(jnp.broadcast_to(learned_sinks.astype(lse[0].dtype), lse[0].shape))
    weight = jax.nn.softmax(jnp.stack(lse), axis=0)
    return sum(w[..., None] * part.output for w, part in zip(weight, parts, strict=False))


def join(a: Partial, b: Partial) -> Partial:
    """Attention over two disjoint sets of keys as over their union, its log-sum-exp included."""
    return Partial(merge([a, b]), jnp.logaddexp(a.lse, b.lse))


def attend_held(span: Span, tokens: int, attend: Callable[[Span], Partial]) -> Partial:
    """Attends to the stored tokens of all devices, each to those it holds.

    Args:
      span: which stored positions each query sees.
      tokens: tokens S that a device holds.
      attend: attends to them, with the span counted from the first.

    Returns:
      The output and its log-sum-exp; on one device, what `attend` gives for the span.
    """
    if token_parts() == 1 or not span.divided:
        return attend(span)
    first = first_token(tokens)
    here = span._replace(positions=span.positions - first, stop=jnp.clip(span.stop - first, 0, tokens))
    if span.first > tokens:
        raise KvjaxError(f"{span.first} sinks; expected at most the {tokens} tokens that a device holds")
    # `first` is static in kernels; it counts on the first device alone.
    later = lambda: attend(here._replace(first=0))  # noqa: E731
    part = jax.lax.cond(first == 0, lambda: attend(here), later) if span.first else later()
    axis = RULES["tokens"]
    top = jax.lax.pmax(part.lse, axis)
    weight = jnp.exp(part.lse - top)
    total = jax.lax.psum(weight, axis)
    return Partial(jax.lax.psum(part.output * (weight / total)[..., None], axis), top + jnp.log(total))


def attend_packed(
    q: Float[Array, "B T H D"],
    span: Span,
    keys: store.Stored,
    values: store.Stored,
    table: Table | None = None,
    form: KeyForm = BEFORE_ROPE,
) -> Partial:
    """Attends to the stored keys of a span.

    Args:
      q: queries after RoPE.
      span: which stored positions each query sees.
      keys: stored keys, of S tokens.
      values: stored values, of the same tokens.
      table: cos and sin of every stored token, [S, D] or [B, 1, S, D], for keys whose form needs them; None for keys
        that are scored as stored.
      form: how the keys are stored, where there is a table.

    Returns:
      The output and its log-sum-exp.
    """

    def kernel(
        name: str,
        interpret: bool,
        q: Array,
        keys: store.Stored,
        values: store.Stored,
        table: Any,
        _: KeyForm,
        *ends: Array,
    ) -> Partial:
        check_queries(q)
        if table is not None:
            raise NotImplementedError("keys that need their position; kernels read keys after RoPE, with their bias")
        packed = [store.for_kernels(each) for each in (keys, values)]

        def attend(span: Span) -> Partial:
            how: dict[str, Any] = {"implementation": name, "interpret": interpret, **span.settings}
            return Partial(*packed_attention(q, packed[0], packed[1], *span.arrays, **how))

        return attend_held(span.between(*ends), keys.tokens, attend)

    def xla(q: Array, keys: store.Stored, values: store.Stored, table: Any, form: KeyForm, *ends: Array) -> Partial:
        attend = lambda span: _attend_tiles(q, span, keys, values, table, form)  # noqa: E731
        return attend_held(span.between(*ends), keys.tokens, attend)

    stored = (store.logical_axes(each, "kv_heads", span.axis) for each in (keys, values))
    axes = (BY_HEAD, *stored, table_axes(table, span), form.logical_axes(), *(BY_SEQUENCE,) * 2)
    return dispatch("packed_attention", kernel, xla, (q, keys, values, table, form, *span.ends), axes, BY_HEAD)


def table_axes(table: Table | None, span: Span) -> PartitionSpec:
    """The logical axes of a table of the span's tokens."""
    shared = table is None or table[0].ndim == 2
    return PartitionSpec(span.axis) if shared else PartitionSpec("batch", None, span.axis)


def check_queries(q: Float[Array, "B T H D"]) -> None:
    """Raises NotImplementedError for queries of a type that no kernel serves."""
    if q.dtype == jnp.float64:
        raise NotImplementedError("queries in float64; kernels take float32 and bfloat16")


def _attend_tiles(
    q: Float[Array, "B T H D"],
    span: Span,
    keys: store.Stored,
    values: store.Stored,
    table: Table | None,
    form: KeyForm,
) -> Partial:
    """`attend_packed` in XLA."""
    kv_heads, head_dim = keys.heads, q.shape[-1]
    dtype = tile_dtype(q.dtype)
    wide = dtype if table is None else jnp.promote_types(q.dtype, jnp.float32)  # of keys that are turned when read

    def attend(size: int, trusted: bool = False) -> Partial:
        size = min(keys.tokens, store.capacity(size, keys.format, values.format))

        def load(start):
            k, v = store.read_tile(keys, start, size, wide), store.read_tile(values, start, size, dtype)
            if table is not None:
                cos, sin = (jax.lax.dynamic_slice_in_dim(a, start, size, a.ndim - 2) for a in table)
                k = Tile(form.after_rope(k.dequantize(), (cos, sin)).astype(dtype))
            return k, v

        tiles = span.tiles(keys.tokens, size, load)._replace(trusted=trusted)
        return attend_keys(q, span.positions, kv_heads, tiles, span.window)

    def in_tiles() -> Partial:
        return attend(tile_size(keys.tokens, kv_heads * head_dim, q.shape[1]))

    exact = keys.format.bits == values.format.bits == store.EXACT
    if not exact or q.shape[1] > 1 or meshes.current() is not None:
        return in_tiles()
    # One query over exact keys needs no tiles: its scores are small, and slices would be copies, as would values
    # without those that are not seen. So these are left out only where the output shows that they must be.
    found = attend(keys.tokens, trusted=True)
    return jax.lax.cond(jnp.isfinite(found.output).all(), lambda: found, in_tiles)


def attend_exact(
    q: Float[Array, "B T H D"],
    q_positions: Int[Array, "B T"],
    k: Float[Array, "B N K D"],
    v: Float[Array, "B N K D"],
    k_positions: Int[Array, "B N"],
    window: int | None,
    own: bool = True,
    edges: Int[Array, "B T"] | None = None,
) -> Partial:
    """Attends to exact keys.

    Args:
      q: queries after RoPE.
      q_positions: positions of the queries.
      k: keys after RoPE.
      v: values.
      k_positions: positions of the keys; -1 where there is no key.
      window: sliding window in tokens; None where there is none.
      own: whether the last T keys are those of the queries' own tokens, so that early queries skip late keys.
      edges: each query sees only positions below its edge; None lets it see up to its own position.

    Returns:
      The output and its log-sum-exp.
    """
    before = k.shape[1] - q.shape[1]
    if not own or edges is not None or q.shape[1] < CHUNK:
        return _attend_tiles_of_exact(q, q_positions, k, v, k_positions, window, own, edges)

    def kernel(
        name: str, interpret: bool, q: Array, q_positions: Array, k: Array, v: Array, k_positions: Array
    ) -> Partial:
        last = causal_attention(
            q, k[:, before:], v[:, before:], window=window, implementation=name, interpret=interpret
        )
        if not before:
            return Partial(*last)
        early = k[:, :before], v[:, :before], k_positions[:, :before]
        return join(Partial(*last), _attend_tiles_of_exact(q, q_positions, *early, window, own=False))

    def xla(q: Array, q_positions: Array, k: Array, v: Array, k_positions: Array) -> Partial:
        return _attend_tiles_of_exact(q, q_positions, k, v, k_positions, window)

    axes = BY_HEAD, BY_SEQUENCE, BY_HEAD, BY_HEAD, BY_SEQUENCE
    return dispatch("causal_attention", kernel, xla, (q, q_positions, k, v, k_positions), axes, BY_HEAD)


def _attend_tiles_of_exact(
    q: Float[Array, "B T H D"],
    q_positions: Int[Array, "B T"],
    k: Float[Array, "B N K D"],
    v: Float[Array, "B N K D"],
    k_positions: Int[Array, "B N"],
    window: int | None,
    own: bool = True,
    edges: Int[Array, "B T"] | None = None,
) -> Partial:
    """`attend_exact` in XLA."""
    count, tokens, kv_heads, head_dim = k.shape[1], q.shape[1], k.shape[2], k.shape[3]
    size = count if tokens == 1 else tile_size(count, kv_heads * head_dim, tokens)
    pad = -count % size
    dtype = tile_dtype(q.dtype)
    k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2).astype(dtype) for a in (k, v))
    k_positions = jnp.pad(k_positions, ((0, 0), (0, pad)), constant_values=-1)

    def load(i):
        k_block, v_block = (Tile(jax.lax.dynamic_slice_in_dim(a, i * size, size, 2)) for a in (k, v))
        return k_block, v_block, jax.lax.dynamic_slice_in_dim(k_positions, i * size, size, 1)

    def reach(first_query, last_query):
        if not own:
            return 0, k.shape[2] // size
        before = count - tokens  # keys before the chunk are older than all of it
        lo = 0 if window is None else first_query - window + 1
        lo = jnp.where(jnp.asarray(lo) > 0, before + lo, 0)
        return lo // size, -(-(before + last_query + 1) // size)

    return attend_keys(q, q_positions, kv_heads, Keys(k.shape[2] // size, load, reach), window, edges)


def attend_streamed(
    q: Float[Array, "B T H D"],
    stored: tuple[Float[Array, "B N K D"], Float[Array, "B N K D"], Int[Array, "B N"]],
    own: tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]],
    residual_length: int,
    window: int | None,
    learned_sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H D"]:
    """Attends as decoding would, for all tokens of a sequence at once.

    With residual length R, the query at position p reads positions below floor(p / R) * R as stored and the rest
    exactly. With R = 0 it reads every position as stored.

    Args:
      q: queries of tokens 0 to T - 1, after RoPE.
      stored: keys (after RoPE), values and positions (-1 where there is no key) as they are read from a cache: tokens
        0 to T - 1 first, in order, then any others.
      own: exact keys (after RoPE) and values of tokens 0 to T - 1.
      residual_length: R, in tokens.
      window: sliding window in tokens; None where there is none.
      learned_sinks: as in `merge`.

    Returns:
      The output, in the dtype of q.
    """
    batch, tokens = q.shape[:2]
    at = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    r = residual_length
    edges = at // r * r if r else None
    k, v, positions = stored
    parts = [attend_exact(q, at, k[:, :tokens], v[:, :tokens], positions[:, :tokens], window, edges=edges)]
    if k.shape[1] > tokens:
        more = k[:, tokens:], v[:, tokens:], positions[:, tokens:]
        parts.append(attend_exact(q, at, *more, window, own=False, edges=edges))
    if r:

        def blocks(a: Array) -> Array:
            a = jnp.pad(a, ((0, 0), (0, -tokens % r), (0, 0), (0, 0)))
            return a.reshape(-1, r, *a.shape[2:])

        inside = blocks(at[:, :, None, None] + 1)[..., 0, 0] - 1  # -1 at padding
        late = attend_exact(blocks(q), inside, blocks(own[0]), blocks(own[1]), inside, window)
        output, lse = (a.reshape(batch, -1, *a.shape[2:])[:, :tokens] for a in late)
        parts.append(Partial(output, lse))
    return merge(parts, learned_sinks).astype(q.dtype)


def tile_dtype(dtype: Any) -> Any:
    """The dtype of tiles for queries of a dtype: what is multiplied; sums are in float32 or float64.

    bfloat16 where the platform multiplies it faster: codes up to 8 bits are exact in it.
    """
    narrow = dtype == jnp.bfloat16 and jax.default_backend() in _BFLOAT16
    return dtype if narrow else jnp.promote_types(dtype, jnp.float32)


def tile_size(tokens: int, channels: int, queries: int) -> int:
    """Returns the number of keys per tile on this platform.

    Args:
      tokens: keys in all, the upper bound.
      channels: elements of one key over all kv heads.
      queries: queries of the chunk.
    """
    elements, most = _TILES.get(jax.default_backend(), _TILES["cpu"])
    size = 1 << ((elements // channels).bit_length() - 1)
    return min(tokens, size if queries == 1 else min(size, most))


def is_decode_shape(rows: int) -> bool:
    """Says whether a chunk has as few queries as decoding has.

    Then it is cheaper to fold scales, and the weights that rebuild values, into queries, scores and outputs.

    Args:
      rows: query rows per kv head.
    """
    return rows <= _DECODE_ROWS


def attend_keys(
    q: Float[Array, "B T H D"],
    q_positions: Int[Array, "B T"],
    kv_heads: int,
    keys: Keys,
    window: int | None,
    edges: Int[Array, "B T"] | None = None,
) -> Partial:
    """Attends to keys that are loaded tile by tile.

    Args:
      q: queries after RoPE.
      q_positions: positions of the queries.
      kv_heads: K.
      keys: the tiles.
      window: sliding window in tokens; None where there is none.
      edges: each query sees only positions below its edge; None lets it see up to its own position.

    Returns:
      The output and its log-sum-exp.
    """
    edges = q_positions + 1 if edges is None else edges
    batch, tokens, heads, head_dim = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q.astype(dtype) * head_dim**-0.5
    tile = min(tokens, QUERY_TILE)
    count = -(-tokens // tile)
    pad = count * tile - tokens
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q_positions, edges = (jnp.pad(a, ((0, 0), (0, pad))) for a in (q_positions, edges))

    def one_tile(index, q):
        first = index * tile
        q_tile = jax.lax.dynamic_slice_in_dim(q, first, tile, 1)
        ends = (jax.lax.dynamic_slice_in_dim(a, first, tile, 1) for a in (q_positions, edges))
        lo, hi = keys.reach(first, jnp.minimum(first + tile, tokens) - 1)
        rows = q_tile.reshape(batch, tile, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        rows = rows.reshape(batch, kv_heads, -1, head_dim)
        row_positions, row_edges = (jnp.tile(a, (1, heads // kv_heads)) for a in ends)
        out, lse = _online_softmax(rows, row_positions, row_edges, keys, lo, hi, window, tokens == 1)
        out = out.reshape(batch, heads, tile, -1).transpose(0, 2, 1, 3)
        return out, lse.reshape(batch, heads, tile).transpose(0, 2, 1)

    if count == 1:
        return Partial(*one_tile(0, q))

    def step(index, state):
        parts = zip(state, one_tile(index, state[0]), strict=True)
        return tuple(jax.lax.dynamic_update_slice_in_dim(old, new, index * tile, 1) for old, new in parts)

    # Outputs take the place of their queries: XLA would allocate empty arrays of all layers before the first.
    out, lse = jax.lax.fori_loop(0, count, step, (q, q[..., 0]))
    return Partial(out[:, :tokens], lse[:, :tokens])


def _online_softmax(
    q: Float[Array, "B K Q D"],
    q_positions: Int[Array, "B Q"],
    edges: Int[Array, "B Q"],
    keys: Keys,
    lo,
    hi,
    window: int | None,
    alone: bool,
) -> tuple[Float[Array, "B K Q D"], Float[Array, "B K Q"]]:
    """Attention of rows of queries; `alone` where all rows of a sequence are one token's, and see the same.

    0 times NaN is NaN. So values that no row may see are replaced by zeros; where rows see different tokens, values
    that are not finite are, and the scores of those that see them are NaN.
    """

    def step(i, state):
        m, l, acc = state
        k, v, positions = keys.load(i)
        positions = positions[:, None, :]
        visible = (positions >= 0) & (positions < edges[:, :, None])
        if window is not None:
            visible &= positions > q_positions[:, :, None] - window
        scores = _scores(q, k)
        if not keys.trusted and alone:
            v = _only(v, _by_number(v, visible[:, 0]))
        elif not keys.trusted:
            finite = _finite(v)
            v, scores = _only(v, finite), jnp.where(_by_token(v, finite)[:, :, None], scores, jnp.nan)
        scores = jnp.where(visible[:, None], scores, MASKED)
        new_m = jnp.maximum(m, scores.max(-1))
        p, shrink = jnp.exp(scores - new_m[..., None]), jnp.exp(m - new_m)
        acc = acc * shrink[..., None] + _weighted(p, v)
        return new_m, l * shrink + p.sum(-1), acc

    shape = q.shape[:3]
    acc = jnp.zeros((*shape, keys.width or q.shape[3]), q.dtype)
    start = (jnp.full(shape, _LOWEST, q.dtype), jnp.zeros(shape, q.dtype), acc)
    # One tile needs no loop, and XLA would copy the whole history into a loop.
    m, l, acc = step(0, start) if keys.tiles == 1 else jax.lax.fori_loop(lo, hi, step, start)
    # A row that saw no key has no weight in a merge with any other part.
    nothing, l = l == 0, jnp.maximum(l, jnp.finfo(q.dtype).tiny)
    return acc / l[..., None], jnp.where(nothing, MASKED, m + jnp.log(l))


def _product(dims: str, x: Float[Array, "..."], tile: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum with a tile: both factors in the tile's dtype, the sums in that of x."""
    return jnp.einsum(dims, x.astype(tile.dtype), tile, preferred_element_type=x.dtype)


def _scores(q: Float[Array, "B K Q D"], k: Tile) -> Float[Array, "B K Q n"]:
    if not is_decode_shape(q.shape[2]):
        # Transposed first: XLA's CPU matmul is three times slower with both operands contracted along rows.
        columns = jax.lax.optimization_barrier(k.dequantize().swapaxes(2, 3))
        return _product("bkqd,bkdn->bkqn", q, columns)
    if k.scale_per_token:
        scale, zero = (a.astype(q.dtype) for a in (k.scale, k.zero))
        return _few_scores(q, k.codes) * scale + q.sum(-1, keepdims=True) * zero
    if k.scale is None:
        return _product("bkqd,bknd->bkqn", q, k.codes)
    return _few_scores(q, k.dequantize())


def _few_scores(q: Float[Array, "B K Q D"], k: Float[Array, "B K n D"]) -> Float[Array, "B K Q n"]:
    """Scores of few queries, padded to the four columns that a CPU matmul kernel takes at once."""
    rows = q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -rows % 4), (0, 0)))
    columns = jnp.einsum("bknd,bkqd->bknq", k, q.astype(k.dtype), preferred_element_type=q.dtype)
    return columns.swapaxes(2, 3)[:, :, :rows]


def _finite(v: Tile) -> Bool[Array, "..."]:
    """Which scales and zero points, or exact values, are finite."""
    return jnp.isfinite(v.codes) if v.scale is None else jnp.isfinite(v.scale) & jnp.isfinite(v.zero)


def _only(v: Tile, kept: Bool[Array, "..."]) -> Tile:
    """The tile with zeros for scales and zero points, or exact values, that are not kept."""
    if v.scale is None:
        return dataclasses.replace(v, codes=jnp.where(kept, v.codes, 0))
    return dataclasses.replace(v, scale=jnp.where(kept, v.scale, 0), zero=jnp.where(kept, v.zero, 0))


def _by_number(v: Tile, tokens: Bool[Array, "B n"]) -> Bool[Array, "..."]:
    """What is true of tokens, for every scale or exact value of a tile: of a group where it is true of a token."""
    if v.scale is None:
        return tokens[:, None, :, None]
    if v.axis == -1:
        return tokens[:, None, None]
    return tokens.reshape(len(tokens), 1, -1, v.group).any(-1, keepdims=True)


def _by_token(v: Tile, numbers: Bool[Array, "..."]) -> Bool[Array, "B K n"]:
    """Whether it is true of all scales or exact values of a token."""
    if v.scale is None:
        return numbers.all(-1)
    return numbers.all(2) if v.axis == -1 else jnp.repeat(numbers.all(-1), v.group, 2)


def _weighted(p: Float[Array, "B K Q n"], v: Tile) -> Float[Array, "B K Q D"]:
    if is_decode_shape(p.shape[2]) and v.scale_per_token:
        scale, zero = (a.astype(p.dtype) for a in (v.scale, v.zero))
        return _product("bkqn,bknd->bkqd", p * scale, v.codes) + (p * zero).sum(-1, keepdims=True)
    x = v.dequantize()
    if x.shape[1] < p.shape[1]:  # all heads share the values
        return _product("bkqn,bknd->bkqd", p.reshape(p.shape[0], 1, -1, p.shape[3]), x).reshape(*p.shape[:3], -1)
    return _product("bkqn,bknd->bkqd", p, x)
