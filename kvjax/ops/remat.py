"""Rematerialising attention: attention over keys and values rebuilt from a stored layer input or its latents.

This is not jax.remat. Keys (and, for many queries, values) are rebuilt tile by tile inside the online softmax.

Few queries need no rebuilt values: with X̂ the stored rows and R_v the matrix that turns them into values,
softmax(..) (X̂ R_v) = (softmax(..) X̂) R_v. Keys must be rebuilt, because RoPE stands between (XQuant, sections 3.1
and 3.3).

B batch, T queries, H heads, K kv heads, D head_dim, S allocated tokens, G latent heads (1, or K: one per kv head),
r and s widths of a latent of keys and of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kvjax.ops import store
from kvjax.ops.attention import (
    BY_HEAD,
    BY_SEQUENCE,
    Partial,
    Span,
    attend_keys,
    check_queries,
    is_decode_shape,
    tile_size,
)
from kvjax.ops.dispatch import dispatch
from kvjax.ops.norm import normalize
from kvjax.ops.rotate import rotate
from kvjax.ops.store import Tile
from pallas_kernels.remat_attention import remat_attention
from pallas_kernels.remat_attention.weights import Rebuild

Table = tuple[Float[Array, "S D"], Float[Array, "S D"]]


class Remat(NamedTuple):
    """The weights that turn latents into keys (before RoPE) and values."""

    key: Float[Array, "G r m"]  # m: all kv heads' channels where G = 1, else one head's
    value: Float[Array, "G s m"]
    key_bias: Float[Array, "K D"] | None
    value_bias: Float[Array, "K D"] | None
    key_norm: Float[Array, "D"] | None = None  # the weight of qk-norm, where the model has it
    eps: float = 1e-6

    def astype(self, dtype) -> Remat:
        """Casts the weights, once for all tiles: XLA does not move the cast out of a loop."""
        return self._replace(key=self.key.astype(dtype), value=self.value.astype(dtype))

    def keys(self, latents: Float[Array, "B G n r"], kv_heads: int) -> Float[Array, "B K n D"]:
        k = _rebuild(latents, self.key, kv_heads)
        if self.key_bias is not None:
            k = k + self.key_bias[:, None].astype(k.dtype)
        return k if self.key_norm is None else normalize(k, self.eps) * self.key_norm

    def values(self, latents: Float[Array, "B G n s"], kv_heads: int) -> Float[Array, "B K n D"]:
        v = _rebuild(latents, self.value, kv_heads)
        return v if self.value_bias is None else v + self.value_bias[:, None].astype(v.dtype)

    def absorbed(self, output: Float[Array, "B T H s"], kv_heads: int) -> Float[Array, "B T H D"]:
        """Turns attention output over latents of values into attention output over values.

        Args:
          output: probabilities times latents.
          kv_heads: K.

        Returns:
          Probabilities times values.
        """
        batch, tokens, heads, _ = output.shape
        rows = output.reshape(batch, tokens, kv_heads, heads // kv_heads, -1)
        weight = self.value.reshape(self.value.shape[0], self.value.shape[1], -1, self._head_dim(kv_heads))
        weight = weight[0].swapaxes(0, 1) if weight.shape[0] == 1 else weight[:, :, 0]  # [K, s, D]
        out = jnp.einsum("btkqs,ksd->btkqd", rows, weight.astype(rows.dtype))
        if self.value_bias is not None:
            out = out + self.value_bias[:, None].astype(out.dtype)
        return out.reshape(batch, tokens, heads, -1)

    def _head_dim(self, kv_heads: int) -> int:
        return self.value.shape[2] * self.value.shape[0] // kv_heads


def _rebuild(
    latents: Float[Array, "B G n r"], weight: Float[Array, "G r m"], kv_heads: int
) -> Float[Array, "B K n D"]:
    out = jnp.einsum("bgnr,grm->bgnm", latents, weight.astype(latents.dtype))
    if weight.shape[0] == kv_heads:
        return out
    batch, _, count, width = out.shape
    return out.reshape(batch, count, kv_heads, width // kv_heads).swapaxes(1, 2)


class Latents(NamedTuple):
    """A source of latents.

    Attributes:
      load: `load(start, size)` returns latents of keys and of values for tokens [start, start + size); both numbers
        are multiples of `pack_size`.
      tokens: allocated tokens S.
      pack_size: tokens that are packed together.
    """

    load: Callable[[Array | int, int], tuple[Float[Array, "B G n r"], Float[Array, "B G n s"]]]
    tokens: int
    pack_size: int


def attend_latents(
    q: Float[Array, "B T H D"],
    span: Span,
    latents: Latents,
    remat: Remat,
    kv_heads: int,
    table: Table,
    packed: tuple[store.Stored, store.Stored] | None = None,
) -> Partial:
    """Attends to the stored latents of a span.

    Args:
      q: queries after RoPE.
      span: which stored positions each query sees.
      latents: the stored latents.
      remat: the weights that turn them into keys and values.
      kv_heads: K.
      table: cos and sin of every position.
      packed: the stores behind `latents`, of keys and of values (one object where they share it), where latents are
        read from them unchanged; kernels need these. None otherwise.

    Returns:
      The output and its log-sum-exp.
    """
    absorb = is_decode_shape(q.shape[1] * q.shape[2] // kv_heads)

    groups, rank, _ = remat.key.shape
    up = remat.key.reshape(groups, rank, kv_heads // groups, -1)
    stores = () if packed is None else packed[: 1 if packed[1] is packed[0] else 2]

    def kernel(name: str, interpret: bool, q: Array, stores: tuple, up: Array, bias: Any, *others: Any) -> Partial:
        check_queries(q, up.shape[0] * up.shape[2])
        if not stores:
            raise NotImplementedError("latents that are changed after they are read; kernels read them as they are")
        packed = [store.for_kernels(each) for each in stores]
        norm, (cos, sin), ends = others
        rebuild = Rebuild(up.reshape(*up.shape[:2], -1), cos, sin, bias, norm, remat.eps)
        how: dict[str, Any] = {"implementation": name, "interpret": interpret, **span.settings}
        return Partial(*remat_attention(q, packed[0], packed[-1], rebuild, *ends, **how))

    # Either every kv head has latents of its own, or its channels of the weights are all that tells it from others.
    own, shared = ("kv_heads", None) if groups == kv_heads else (None, "kv_heads")
    axes = (
        *(BY_HEAD, tuple(store.logical_axes(each, own) for each in stores), PartitionSpec(own, None, shared)),
        *(PartitionSpec("kv_heads"), PartitionSpec(), PartitionSpec(), BY_SEQUENCE),
    )
    operands = q, stores, up, remat.key_bias, remat.key_norm, table, span.arrays
    xla = lambda: _attend_rebuilt(q, span, latents, remat, kv_heads, table, absorb)  # noqa: E731
    part = dispatch("remat_attention", kernel, xla, operands, axes, BY_HEAD)
    return part._replace(output=remat.absorbed(part.output, kv_heads)) if absorb else part


def _attend_rebuilt(
    q: Float[Array, "B T H D"],
    span: Span,
    latents: Latents,
    remat: Remat,
    kv_heads: int,
    table: Table,
    absorb: bool,
) -> Partial:
    """`attend_latents` in XLA; with `absorb`, the output is a sum of latents of values, not yet of values."""
    dtype, tokens = jnp.promote_types(q.dtype, jnp.float32), latents.tokens
    remat = remat.astype(dtype)
    size = tile_size(tokens, max(remat.key.shape[1] * remat.key.shape[0], kv_heads * q.shape[3]), q.shape[1])
    size = min(tokens, -(-size // latents.pack_size) * latents.pack_size)

    def load(start):
        of_keys, of_values = (x.astype(dtype) for x in latents.load(start, size))
        cos, sin = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in table)
        k = rotate(remat.keys(of_keys, kv_heads), cos, sin)
        return Tile(k), Tile(of_values if absorb else remat.values(of_values, kv_heads))

    width = remat.value.shape[1] if absorb else q.shape[3]
    return attend_keys(q, span.positions, kv_heads, span.tiles(tokens, size, load, width), span.window)
