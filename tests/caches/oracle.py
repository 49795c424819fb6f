"""Keys and values of one layer, and what its queries must see: an oracle written from docs/design.md."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import CacheShape, Chunk, KVWeights
from kvjax.caches.registry import parse_spec
from kvjax.models.config import ModelConfig
from kvjax.models.rope import make_rope
from kvjax.testing.layers import BATCH, HEADS, KV_HEADS, ROPE, TOKENS, both, same_trees, schedule


@dataclasses.dataclass(frozen=True)
class Meaning:
    """A spec, and what docs/design.md says that it means."""

    text: str
    bits: tuple[int, int]
    key_group: tuple[str, int]
    value_group: int
    residual: int
    sink: int = 0
    pre: bool = False
    head_dim: int = 16

    @property
    def shape(self) -> CacheShape:
        return CacheShape(BATCH, TOKENS, HEADS, KV_HEADS, self.head_dim, HEADS * self.head_dim, dtype=jnp.float64)


def model(layers: int) -> ModelConfig:
    """What plans are parsed for."""
    return ModelConfig("llama", 64, 512, 64, layers, 4, 2, 128, 4096)


# ---- feeding a layer


@functools.cache
def tokens(head_dim):
    """q, k, v of all tokens: [B, TOKENS, heads, head_dim], keys with outlier channels."""
    rng = np.random.default_rng(head_dim)
    q = 2 * rng.standard_normal((BATCH, TOKENS, HEADS, head_dim))
    k = rng.standard_normal((BATCH, TOKENS, KV_HEADS, head_dim)) + 4 * rng.standard_normal(head_dim)
    return q, k, rng.standard_normal(k.shape)


def make_chunk(head_dim, at, lengths, width, window=None, read="exact"):
    """The chunk of `lengths` tokens from position `at` of each sequence; what pads it would be noticed."""
    q, k, v = tokens(head_dim)
    positions = at[:, None] + np.arange(width)
    index = np.minimum(positions, TOKENS - 1)[:, :, None, None]
    pad = (np.arange(width) >= lengths[:, None])[:, :, None, None]
    q, k, v = (jnp.asarray(np.where(pad, 77.0, np.take_along_axis(a, index, 1))) for a in (q, k, v))
    nothing = jnp.zeros((BATCH, width, 1))
    return Chunk(
        h=nothing,
        x=nothing,
        norm=jnp.ones((1,)),
        q=q,
        k=k,
        v=v,
        positions=jnp.asarray(positions, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        weights=KVWeights(k=nothing[0], v=nothing[0]),
        bases=(),
        rope=make_rope(ROPE, head_dim),
        rotation=make_rope(ROPE, head_dim).table(jnp.asarray(positions), q.dtype),
        window=window,
        read=read,
    )


@functools.cache
def run(meaning: Meaning, width: int, window: int | None = None, read: str = "exact"):
    """(start, lengths, attend's output, the output over materialize) of every chunk, and the last cache."""
    with jax.enable_x64(True):
        cache, rows = parse_spec(meaning.text).init(meaning.shape), []
        for at, lengths in schedule(width):
            chunk = make_chunk(meaning.head_dim, at, lengths, width, window, read)
            output, plain, cache, plain_cache, *_ = both(cache, chunk, ())
            same_trees(cache, plain_cache)
            rows.append((at, lengths, np.asarray(output), np.asarray(plain)))
        return rows, cache


def by_position(rows):
    """Outputs [B, TOKENS, H, d] of a run."""
    out = np.full((BATCH, TOKENS, *rows[0][2].shape[2:]), np.nan)
    for at, lengths, output, _ in rows:
        for b in range(BATCH):
            out[b, at[b] : at[b] + lengths[b]] = output[b, : lengths[b]]
    return out


# ---- the oracle: one sequence, [n, K, d]


def rotated(x, positions):
    d = x.shape[-1]
    inv_freq = ROPE.theta ** (-np.arange(0, d, 2) / d)
    angle = (positions[:, None] * inv_freq)[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def round_trip(x, bits, enters):
    """x [group, ...] and back, over groups along the first axis; `enters` [group] min and max or not."""
    if bits == 16 or not enters.any():
        return x
    x = x.astype(np.float32)
    levels = np.float32(2**bits - 1)
    low, high = x[enters].min(0), x[enters].max(0)
    scale, zero = ((high - low) / levels).astype(np.float16), low.astype(np.float16)
    s, z = scale.astype(np.float32), zero.astype(np.float32)
    with np.errstate(all="ignore"):
        codes = np.where(s == 0, 0, np.clip(np.rint((x - z) / s), 0, levels))
    return codes.astype(float) * scale.astype(float) + zero.astype(float)


def as_stored(x, bits, per, group, positions, sink):
    """Tokens that are quantised together, read back."""
    out = np.empty(x.shape)
    if per == "channel":
        for i in range(0, len(x), group):
            rows = slice(i, i + group)
            out[rows] = round_trip(x[rows], bits, positions[rows] >= sink)
    else:
        for c in range(0, x.shape[-1], group):
            part = np.moveaxis(x[..., c : c + group], -1, 0)
            out[..., c : c + group] = np.moveaxis(round_trip(part, bits, np.ones(group, bool)), 0, -1)
    return out


@functools.cache
def block(meaning: Meaning, b, start, stop):
    """Keys and values of positions [start, stop) of one sequence, quantised together and read back."""
    _, k, v = (a[b, :stop] for a in tokens(meaning.head_dim))
    k = k if meaning.pre else rotated(k, np.arange(stop))
    positions, (k_bits, v_bits) = np.arange(start, stop), meaning.bits
    return (
        as_stored(k[start:], k_bits, *meaning.key_group, positions, meaning.sink),
        as_stored(v[start:], v_bits, "token", meaning.value_group, positions, meaning.sink),
    )


def seen(meaning: Meaning, b, before, length, read):
    """Keys (after RoPE) and values of positions 0 .. before + length - 1 as a chunk's queries see them."""
    end, r, sink = before + length, meaning.residual, meaning.sink
    positions = np.arange(end)
    _, k, v = (a[b, :end] for a in tokens(meaning.head_dim))
    k = k if meaning.pre else rotated(k, positions)
    if r == 0:
        blocks = [(i, i + 1) for i in range(end)]
    elif read == "exact":
        blocks = [(i, i + r) for i in range(0, before // r * r, r)]  # complete before the chunk came
    else:
        blocks = [(i, min(i + r, end)) for i in range(0, end, r)]  # the last on its own tokens
    k_seen, v_seen = k.copy(), v.copy()
    for start, stop in blocks:
        k_seen[start:stop], v_seen[start:stop] = block(meaning, b, start, stop)
    k_seen[:sink], v_seen[:sink] = k[:sink], v[:sink]
    return (rotated(k_seen, positions) if meaning.pre else k_seen), v_seen


def expected(meaning: Meaning, b, before, length, window, read):
    """Attention of one sequence's chunk: [length, H, d]."""
    q = tokens(meaning.head_dim)[0][b]
    k, v = seen(meaning, b, before, length, read)
    k, v = (np.repeat(a, HEADS // KV_HEADS, 1) for a in (k, v))
    at, index = np.arange(before, before + length)[:, None], np.arange(before + length)
    visible = (index <= at) & (index > at - (window or TOKENS))
    scores = np.einsum("thd,nhd->thn", q[before : before + length], k) / np.sqrt(meaning.head_dim)
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("thn,nhd->thd", weights / weights.sum(-1, keepdims=True), v)
