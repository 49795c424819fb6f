"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones, everything between them forgotten.

Keys keep the positions that they had. What a query reads depends on what was forgotten before it came, so that this
method promises nothing: it is scored token by token, and a search refuses it.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

import kvjax
from kvjax.caches.base import CacheSpec, LayerCache
from kvjax.ops.attention import attend_exact, merge
from kvjax.ops.rotate import rotate_heads


@kvjax.register
@dataclasses.dataclass(frozen=True)
class StreamingLLM(CacheSpec):
    length: int  # most recent tokens that are kept
    sink: int = 4

    form: ClassVar[str] = "window{length}"
    examples: ClassVar[tuple[str, ...]] = ("window16", "window8(sink=2)")
    bits_nominal: ClassVar[float] = 16.0

    def bits_asymptotic(self, shape) -> float:
        return 0.0  # it does not grow with the context

    def init(self, shape):
        tokens = self.sink + self.length
        k, v = jnp.zeros((2, shape.batch, tokens, shape.kv_heads, shape.head_dim), shape.dtype)
        return RecentCache(k, v, jnp.full((shape.batch, tokens), -1, jnp.int32), self)


@struct.dataclass
class RecentCache(LayerCache):
    k: Float[Array, "B n K d"]  # after RoPE
    v: Float[Array, "B n K d"]
    positions: Int[Array, "B n"]  # -1 where there is no token
    spec: StreamingLLM = struct.field(pytree_node=False)

    def attend(self, chunk, carry):
        k, v, positions, after, carry = self.materialize(chunk, carry)
        part = attend_exact(chunk.q, chunk.positions, k, v, positions, chunk.window, own=False)
        return merge([part], chunk.learned_sinks).astype(chunk.q.dtype), after, carry

    def materialize(self, chunk, carry):
        end = chunk.positions[:, :1] + chunk.lengths[:, None]
        new = jnp.where(chunk.positions < end, chunk.positions, -1)
        k = jnp.concatenate([self.k, rotate_heads(chunk.k, chunk.rotation).astype(self.k.dtype)], 1)
        v = jnp.concatenate([self.v, chunk.v.astype(self.v.dtype)], 1)
        positions = jnp.concatenate([self.positions, new], 1)
        recent = (positions < self.spec.sink) | (positions >= end - self.spec.length)
        order = jnp.where((positions >= 0) & recent, positions, jnp.iinfo(jnp.int32).max)
        kept = jnp.argsort(order, axis=1)[:, : self.positions.shape[1]]
        order = jnp.take_along_axis(order, kept, 1)
        k_kept, v_kept = (jnp.take_along_axis(a, kept[:, :, None, None], 1) for a in (k, v))
        at = jnp.where(order == jnp.iinfo(jnp.int32).max, -1, order)
        return k, v, positions, RecentCache(k_kept, v_kept, at, self.spec), carry
