"""Rematerialising attention: attention over keys and values rebuilt from a stored layer input or its latents.

This is not jax.remat. Keys (and, for many queries, values) are rebuilt tile by tile inside the online softmax.

Few queries need no rebuilt values: with X̂ the stored rows and R_v the matrix that turns them into values,
softmax(..) (X̂ R_v) = (softmax(..) X̂) R_v. Keys must be rebuilt, because RoPE stands between (XQuant, sections 3.1
and 3.3).

B batch, T queries, H heads, K kv heads, D head_dim, S allocated tokens, G latent heads (1, or K: one per kv head),
r and s widths of a latent of keys and of values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kvjax.ops import store
from kvjax.ops.attention import (
    BY_HEAD,
    BY_SEQUENCE,
    Partial,
    Span,
    attend_held,
    attend_keys,
    check_queries,
    is_decode_shape,
    table_axes,
    tile_size,
)
from kvjax.ops.dispatch import dispatch
from kvjax.ops.key_form import Table
from kvjax.ops.norm import normalize_heads
from kvjax.ops.rotate import rotate
from kvjax.ops.store import Tile
from pallas_kernels.remat_attention import remat_attention
from pallas_kernels.remat_attention.weights import Rebuild


@struct.dataclass
class Remat:
    """The weights that turn latents into keys (before RoPE) and values, of K = G * k kv heads.

    Either all kv heads read the same latents (G = 1), or each its own (k = 1).
    """

    key: Float[Array, "G r k D"]
    value: Float[Array, "G s k D"]
    key_bias: Float[Array, "K D"] | None
    value_bias: Float[Array, "K D"] | None
    key_norm: Float[Array, "D"] | Float[Array, "K D"] | None = None  # the weight of qk-norm, of a head or over all
    eps: float = struct.field(pytree_node=False, default=1e-6)

    @property
    def kv_heads(self) -> int:
        return self.key.shape[0] * self.key.shape[2]

    @property
    def latents_axis(self) -> str | None:
        """The logical name of the axis G."""
        return "kv_heads" if self.key.shape[2] == 1 else None

    def logical_axes(self) -> Remat:
        """The upper part of the same tree, leaves PartitionSpecs of logical names."""
        weight = PartitionSpec("kv_heads") if self.latents_axis else PartitionSpec(None, None, "kv_heads")
        bias = PartitionSpec("kv_heads")
        whole = self.key_norm is not None and self.key_norm.ndim == 2
        return Remat(weight, weight, bias, bias, bias if whole else PartitionSpec(), self.eps)  # type: ignore[arg-type]

    def astype(self, dtype) -> Remat:
        """Casts the weights, once for all tiles: XLA does not move the cast out of a loop."""
        return dataclasses.replace(self, key=self.key.astype(dtype), value=self.value.astype(dtype))

    def keys(self, latents: Float[Array, "B G n r"]) -> Float[Array, "B K n D"]:
        k = _rebuild(latents, self.key)
        if self.key_bias is not None:
            k = k + self.key_bias[:, None].astype(k.dtype)
        return k if self.key_norm is None else normalize_heads(k, self.key_norm, self.eps)

    def values(self, latents: Float[Array, "B G n s"]) -> Float[Array, "B K n D"]:
        v = _rebuild(latents, self.value)
        return v if self.value_bias is None else v + self.value_bias[:, None].astype(v.dtype)

    def absorbed(self, output: Float[Array, "B T H s"]) -> Float[Array, "B T H D"]:
        """Turns attention output over latents of values into attention output over values.

        Args:
          output: probabilities times latents.

        Returns:
          Probabilities times values.
        """
        batch, tokens, heads, _ = output.shape
        rows = output.reshape(batch, tokens, self.kv_heads, heads // self.kv_heads, -1)
        weight = self.value[:, :, 0] if self.latents_axis else self.value[0].swapaxes(0, 1)  # [K, s, D]
        out = jnp.einsum("btkqs,ksd->btkqd", rows, weight.astype(rows.dtype))
        if self.value_bias is not None:
            out = out + self.value_bias[:, None].astype(out.dtype)
        return out.reshape(batch, tokens, heads, -1)


def _rebuild(latents: Float[Array, "B G n r"], weight: Float[Array, "G r k D"]) -> Float[Array, "B K n D"]:
    groups, rank, heads, head_dim = weight.shape
    out = jnp.einsum("bgnr,grm->bgnm", latents, weight.reshape(groups, rank, -1).astype(latents.dtype))
    if heads == 1:
        return out
    batch, _, count, _ = out.shape
    return out.reshape(batch, count, heads, head_dim).swapaxes(1, 2)


Tiles = Sequence[Float[Array, "B G n _"]]


class Latents(NamedTuple):
    """Stored latents.

    Attributes:
      stores: what holds them: keys' first, values' last, one store where the two share it.
      change: turns tiles of all stores into latents of keys and of values; None where the first and the last are
        these as they are, which kernels need.
    """

    stores: tuple[store.Stored, ...]
    change: Callable[[Tiles], tuple[Float[Array, "B G n r"], Float[Array, "B G n s"]]] | None = None

    @property
    def tokens(self) -> int:
        """Allocated tokens S."""
        return self.stores[0].tokens

    @property
    def pack_size(self) -> int:
        """Tokens that are packed together, of all stores."""
        return store.capacity(1, *(each.format for each in self.stores))

    def read(self, start: Array | int, size: int, dtype: Any) -> Tiles:
        """Latents of keys and of values of tokens [start, start + size), multiples of `pack_size`."""
        tiles = [_read(each, start, size, dtype) for each in self.stores]
        return self.change(tiles) if self.change else (tiles[0], tiles[-1])


def _read(stored: store.Stored, start: Array | int, size: int, dtype: Any) -> Float[Array, "B G n _"]:
    if isinstance(stored, store.PackedStore) and stored.format.bits == store.EXACT and stored.heads == 1:
        rows = jax.lax.dynamic_slice_in_dim(stored.planes[0][:, 0], start, size, 1)
        return rows.astype(dtype)[:, None]  # with an axis of size 1 XLA would copy the accumulator to turn it
    return store.read_tile(stored, start, size, dtype).dequantize()


def attend_latents(q: Float[Array, "B T H D"], span: Span, latents: Latents, remat: Remat, table: Table) -> Partial:
    """Attends to the stored latents of a span.

    Args:
      q: queries after RoPE.
      span: which stored positions each query sees.
      latents: the stored latents.
      remat: the weights that turn them into keys and values.
      table: cos and sin of every stored token, [S, D] or [B, 1, S, D].

    Returns:
      The output and its log-sum-exp.
    """
    absorb = is_decode_shape(q.shape[1] * q.shape[2] // remat.kv_heads)

    def kernel(
        name: str, interpret: bool, q: Array, stores: tuple, remat: Remat, table: Table, *ends: Array
    ) -> Partial:
        check_queries(q)
        if not absorb:
            raise NotImplementedError("values that are rebuilt; kernels weigh their latents")
        if latents.change:
            raise NotImplementedError("latents that are changed after they are read; kernels read them as they are")
        if remat.key_norm is not None and remat.key_norm.ndim == 2:
            raise NotImplementedError("a norm over the keys of all heads; kernels normalise each head alone")
        if table[0].ndim > 2 and len(q) > 1:
            raise NotImplementedError("positions that differ by sequence; kernels have one table")
        packed = [store.for_kernels(each) for each in stores]
        up = remat.key.reshape(*remat.key.shape[:2], -1)
        cos, sin = (a.reshape(a.shape[-2:]) for a in table)
        rebuild = Rebuild(up, cos, sin, remat.key_bias, remat.key_norm, remat.eps)

        def attend(span: Span) -> Partial:
            how: dict[str, Any] = {"implementation": name, "interpret": interpret, **span.settings}
            return Partial(*remat_attention(q, packed[0], packed[-1], rebuild, *span.arrays, **how))

        return attend_held(span.between(*ends), stores[0].tokens, attend)

    def xla(q: Array, stores: tuple, remat: Remat, table: Table, *ends: Array) -> Partial:
        held = latents._replace(stores=stores)
        attend = lambda span: _attend_rebuilt(q, span, held, remat, table, absorb)  # noqa: E731
        return attend_held(span.between(*ends), held.tokens, attend)

    stored = tuple(store.logical_axes(each, remat.latents_axis, span.axis) for each in latents.stores)
    axes = BY_HEAD, stored, remat.logical_axes(), table_axes(table, span), *(BY_SEQUENCE,) * 2
    operands = q, latents.stores, remat, table, *span.ends
    part = dispatch("remat_attention", kernel, xla, operands, axes, BY_HEAD)
    return part._replace(output=remat.absorbed(part.output)) if absorb else part


def _attend_rebuilt(
    q: Float[Array, "B T H D"], span: Span, latents: Latents, remat: Remat, table: Table, absorb: bool
) -> Partial:
    """`attend_latents` in XLA; with `absorb`, the output is a sum of latents of values, not yet of values."""
    dtype, tokens, kv_heads = jnp.promote_types(q.dtype, jnp.float32), latents.tokens, remat.kv_heads
    remat = remat.astype(dtype)
    size = tile_size(tokens, max(remat.key.shape[1] * remat.key.shape[0], kv_heads * q.shape[3]), q.shape[1])
    size = min(tokens, -(-size // latents.pack_size) * latents.pack_size)

    def load(start):
        of_keys, of_values = latents.read(start, size, dtype)
        cos, sin = (jax.lax.dynamic_slice_in_dim(a, start, size, a.ndim - 2) for a in table)
        k = rotate(remat.keys(of_keys), cos, sin)
        return Tile(k), Tile(of_values if absorb else remat.values(of_values))

    width = remat.value.shape[1] if absorb else q.shape[3]
    return attend_keys(q, span.positions, kv_heads, span.tiles(tokens, size, load, width), span.window)
