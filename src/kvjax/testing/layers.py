"""A few layers fed directly with random chunks: weights and inputs of their own, ragged batches, float64.

Layer inputs are a random walk over the layers, like a residual stream. B sequences, T tokens of a chunk, D model_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheShape, Chunk, KVWeights, LayerCache, visible
from kvjax.caches.statistics import Statistics
from kvjax.calibrate.ranges import ranges_of
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.rope import make_rope

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM = 4, 64, 4, 2, 16
WIDTH = KV_HEADS * HEAD_DIM
BATCH, TOKENS = 4, 75
ENDS = np.array([75, 61, 40, 75])  # tokens of each sequence
ROPE = RopeConfig(theta=100.0)
OTHER_ROPE = RopeConfig(theta=100.0, channels=HEAD_DIM // 2, attention_factor=1.2)
CONFIG = ModelConfig("qwen3", 64, DIM, 64, LAYERS, HEADS, KV_HEADS, HEAD_DIM, 256, rope=ROPE, qk_norm=True)
SHAPE = CacheShape.of(CONFIG, BATCH, TOKENS + 5, jnp.float64)  # a few tokens more fit
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's inputs and weights, float64 numpy."""

    h: Float[np.ndarray, "B N D"]
    q: Float[np.ndarray, "B N H d"]
    norm: Any  # [D]
    w_k: Float[np.ndarray, "D Kd"]
    w_v: Float[np.ndarray, "D Kd"]
    k_bias: Float[np.ndarray, "Kd"]
    v_bias: Float[np.ndarray, "Kd"]
    k_norm: Float[np.ndarray, "n"]  # of a head's d channels, or of all
    pre_norm: bool = True
    rope: RopeConfig = ROPE
    learned_sinks: Any = None  # [H]

    def unit_of(self, h: np.ndarray) -> np.ndarray:
        """Inputs divided by their rms, where the layer has a norm before attention."""
        return normalize(h) if self.pre_norm else h

    @property
    def unit(self) -> Float[np.ndarray, "B N D"]:
        """`unit_of` all inputs."""
        return self.unit_of(self.h)

    @property
    def x(self) -> Float[np.ndarray, "B N D"]:
        """Inputs after the norm."""
        return self.unit * self.norm

    def kv(self, x: Float[np.ndarray, "n D"]) -> tuple[Float[np.ndarray, "n K d"], Float[np.ndarray, "n K d"]]:
        """Keys after bias and qk-norm, before RoPE, and values."""
        k, v = x @ self.w_k + self.k_bias, x @ self.w_v + self.v_bias
        k = normalize(k.reshape(len(x), -1, len(self.k_norm))) * self.k_norm
        k, v = (a.reshape(len(x), KV_HEADS, HEAD_DIM) for a in (k, v))
        return k, v

    @property
    def statistics(self) -> Statistics:
        """As if the layer had been calibrated on its inputs, with random gradients."""
        rng, unit = np.random.default_rng(2), self.unit.reshape(-1, DIM)
        k, v = self.kv(self.x.reshape(-1, DIM))
        q = self.q.reshape(-1, KV_HEADS, HEAD_DIM)
        of_k, of_v, of_q = (np.einsum("nkd,nke->kde", rows, rows) / len(rows) for rows in (k, v, q))
        g = rng.standard_normal((4 * DIM, 2 * KV_HEADS * HEAD_DIM)) * rng.uniform(0.1, 3, 2 * KV_HEADS * HEAD_DIM)
        step, moment, gain = rng.standard_normal(unit.shape), unit.T @ unit / len(unit), rng.uniform(0.5, 1.5, DIM)
        delta, fisher = step.T @ step / len(step), g.T @ g / len(g)
        means = unit.mean(0), k.mean(0), v.mean(0)
        return Statistics(
            unit_mean=means[0],
            unit=moment,
            gain=gain,
            delta=delta,
            gained_delta=delta / 2,
            query=of_q,
            key_mean=means[1],
            key=of_k,
            turned_mean=means[1],
            turned=of_k,
            value_mean=means[2],
            value=of_v,
            seen_value=of_v,
            gradient=fisher,
            turned_gradient=of_q,
            key_predictor=rng.standard_normal((3, WIDTH + 1, WIDTH)) / WIDTH,
            value_predictor=rng.standard_normal((3, 2 * WIDTH + 1, WIDTH)) / WIDTH,
            **ranges_of(k, v, *rng.exponential(size=(2, *k.shape))),
        )

    @property
    def weights(self) -> KVWeights:
        """As caches take them."""
        arrays: Any = (self.w_k.T, self.w_v.T, self.k_bias, self.v_bias, self.k_norm)
        k, v, k_bias, v_bias, k_norm = arrays
        return KVWeights(k, v, k_bias, v_bias, k_norm, EPS, HEAD_DIM, self.pre_norm)


def normalize(x: np.ndarray) -> np.ndarray:
    """x / rms(x)."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


@functools.cache
def stack() -> tuple[Layer, ...]:
    """The layers."""
    rng = np.random.default_rng(0)
    h = 2 * rng.standard_normal((BATCH, TOKENS, DIM)) + rng.standard_normal(DIM)
    layers = []
    for _ in range(LAYERS):
        norm = 1 + 0.3 * rng.standard_normal(DIM)
        w_k, w_v = rng.standard_normal((2, DIM, KV_HEADS * HEAD_DIM)) / 8
        biases = rng.standard_normal((2, KV_HEADS * HEAD_DIM))
        q = 2 * rng.standard_normal((BATCH, TOKENS, HEADS, HEAD_DIM))
        make: Any = Layer
        layers.append(make(h, q, norm, w_k, w_v, *biases, 1 + 0.2 * rng.standard_normal(HEAD_DIM)))
        h = h + rng.standard_normal(h.shape)
    return tuple(layers)


@functools.cache
def other_stack() -> tuple[Layer, ...]:
    """Layers of another kind: no norm before attention, one over all keys, a part of a head turned, learned sinks."""
    rng = np.random.default_rng(1)

    def other(layer: Layer) -> Layer:
        return dataclasses.replace(
            layer,
            norm=np.ones(DIM),
            k_norm=1 + 0.2 * rng.standard_normal(KV_HEADS * HEAD_DIM),
            pre_norm=False,
            rope=OTHER_ROPE,
            learned_sinks=rng.standard_normal(HEADS),
        )

    return tuple(map(other, stack()))


def make_chunk(
    layer: Layer,
    bases: Any,
    at: Int[np.ndarray, "B"],
    lengths: Int[np.ndarray, "B"],
    width: int,
    window: int | None = None,
    read: str = "exact",
    dtype: Any = jnp.float64,
) -> Chunk:
    """The chunk of `lengths` tokens from position `at` of each sequence; what pads it would be noticed."""
    positions = at[:, None] + np.arange(width)
    rows = np.arange(BATCH)[:, None], np.minimum(positions, layer.h.shape[1] - 1)
    pad = (np.arange(width) >= lengths[:, None])[..., None]
    h, q = np.where(pad, 77.0, layer.h[rows]), np.where(pad[..., None], 77.0, layer.q[rows])
    x = layer.unit_of(h) * layer.norm
    k, v = (a.reshape(BATCH, width, KV_HEADS, HEAD_DIM) for a in layer.kv(x.reshape(-1, DIM)))
    rope = make_rope(layer.rope, HEAD_DIM)
    cast: Any = functools.partial(jax.tree.map, lambda a: np.asarray(a, dtype))
    make: Any = Chunk
    inv_freq, factor = (np.tile(a, 2) for a in (rope.inv_freq, rope.factor))
    angle = positions[..., None] * inv_freq
    return make(
        *cast((h, x, layer.norm, q, k, v)),
        positions=positions.astype(np.int32),
        lengths=lengths.astype(np.int32),
        weights=cast(layer.weights),
        bases=cast(bases),
        rope=rope,
        rotation=cast((np.cos(angle) * factor, np.sin(angle) * factor)),
        window=window,
        read=read,
        learned_sinks=cast(layer.learned_sinks),
    )


def schedule(width: int) -> Iterator[tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]]]:
    """(start, lengths) of every chunk until ENDS: sequences pause and take part of a chunk at random."""
    rng, at = np.random.default_rng(width), np.zeros(BATCH, int)
    while (at < ENDS).any():
        lengths = np.minimum(width, ENDS - at)
        if width < TOKENS:
            some = rng.integers(0, width + 1, BATCH)
            lengths = np.where((rng.random(BATCH) < 0.3) & (at > at.min()), np.minimum(some, lengths), lengths)
            lengths[rng.integers(BATCH)] *= rng.random() < 0.9
        yield at.copy(), lengths
        at += lengths


def aligned(width: int) -> Iterator[tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]]]:
    """(start, lengths) of every chunk until ENDS, all full and from multiples of `width`."""
    for start in range(0, TOKENS, width):
        at = np.minimum(start, ENDS)
        yield at, np.minimum(width, ENDS - at)


QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}  # as exact, and compiles far sooner
if jaxlib.version.__version_info__ < (0, 12, 0, 1):  # later ones have no such option
    QUICK["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def attend_both_ways(cache: LayerCache, chunk: Chunk, carry: Any) -> tuple[Array, Array, Any, Any, Any, Any]:
    """`attend`, and softmax attention over `materialize`: outputs, caches, carries."""
    output, after, above = cache.attend(chunk, carry)
    k, v, positions, plain, plain_carry = cache.materialize(chunk, carry)
    mask = visible(chunk, positions)
    k, v = (jnp.repeat(a, chunk.q.shape[2] // a.shape[2], 2) for a in (k, v))
    scores = jnp.einsum("bthd,bnhd->bhtn", chunk.q, k) / np.sqrt(chunk.q.shape[-1])
    scores, mask = jnp.where(mask[:, None], scores, -jnp.inf), mask[:, None]
    if chunk.learned_sinks is not None:  # one key more, without a value
        sinks = jnp.broadcast_to(chunk.learned_sinks[:, None, None], (*scores.shape[:3], 1))
        scores, mask = jnp.concatenate([scores, sinks], -1), jnp.concatenate([mask, mask[..., :1] | True], -1)
        v = jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
    weights = jax.nn.softmax(scores, where=mask)
    return output, jnp.einsum("bhtn,bnhd->bthd", weights, v), after, plain, above, plain_carry


both = quick_jit(attend_both_ways)


@quick_jit
def attend(cache: LayerCache, chunk: Chunk, carry: Any) -> tuple[Array, Any, Any]:
    """`attend` alone."""
    return cache.attend(chunk, carry)


def same_trees(a: Any, b: Any, atol: float = 0.0) -> None:
    """Equal trees; `atol` for what is exact, in float64: another program may fuse a rotation otherwise."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=atol if x.dtype == np.float64 else 0)
