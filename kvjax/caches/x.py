"""XQuant: the quantised layer input, or its latents, stored instead of keys and values (arXiv 2508.10395).

`@input` stores X itself, per token (section 3.1, MHA). `@latent` stores X U_k per channel in blocks of tokens and
X U_v per token, with W_k = U_k R_k and W_v = U_v R_v (section 3.3.1, GQA). `@head` has such a pair for each kv head:
as many bytes, R smaller by the number of kv heads, and it shards with the heads. X is the input after the norm.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, Chunk, KVWeights, LayerCache, LayerShapes, check_fields
from kvjax.caches.history import History, Stream
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.remat import Remat, attend_latents
from kvjax.ops.rotate import rotate_heads
from kvjax.quant.affine import BITS
from kvjax.quant.basis import svd_basis

WIDTHS = (*BITS, store.EXACT)


def default_group(model_dim: int) -> int:
    """One group for a whole model: 128 where it divides the model's width, else 64."""
    return 128 if model_dim % 128 == 0 else 64


def shrunk(group: int, width: int) -> int:
    """The largest multiple of 8 up to `group` that divides `width`."""
    return next(g for g in range(group - group % 8, 0, -8) if width % g == 0)


def check_numbers(spec: Any, least: dict[str, int]) -> None:
    for field, low in least.items():
        value = getattr(spec, field)
        if value is not None and value < low:
            raise KvjaxError(f"{spec}: {field}={value}; expected at least {low}")


def stated(spec: Any, skip: tuple[str, ...]) -> str:
    """(field=value,...) where they differ from the defaults, "" where none does."""
    fields = (f for f in dataclasses.fields(spec) if f.name not in skip)
    items = [f"{f.name}={getattr(spec, f.name)}" for f in fields if getattr(spec, f.name) != f.default]
    return f"({','.join(items)})" if items else ""


@dataclasses.dataclass(frozen=True)
class X(CacheSpec):
    """X or its latents in `bits` bits (1, 2, 3, 4, 5, 6, 8; 16 is unquantised).

    mode: input, latent or head; None follows the model: input where each query head has its own kv head, else latent.
    group: elements that share a scale, tokens of a latent of keys, channels of the rest. None: 128 where it divides
      model_dim, else 64, shrunk to divide narrow latents; one group per head for the values of `@head`.
    residual: R, the tokens that stay exact until a block of R is complete. None: 0 for `@input`, else the group.
    sink: the first tokens that stay exact for ever.
    outlier: 1 keeps channel 0 of the latents of keys in 16 bits (table B.1).
    rotate: 1 turns the latents by a random rotation.
    """

    bits: int
    mode: str | None = None
    group: int | None = None
    residual: int | None = None
    sink: int = 0
    outlier: int = 0
    rotate: int = 0
    model_group: int = 128  # the default group of the model, filled in by `settle`

    pattern: ClassVar[str] = r"x(\d{1,9})"
    modes: ClassVar[tuple[str, ...]] = ("input", "latent", "head")

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise KvjaxError(f"{self}: {self.bits} bits; expected one of {', '.join(map(str, WIDTHS))}")
        if self.mode not in (None, *self.modes):
            raise KvjaxError(f"{self}: mode {self.mode!r}; expected one of {', '.join(self.modes)}")
        check_numbers(self, {"group": 8, "residual": 0, "sink": 0, "outlier": 0, "rotate": 0})
        if max(self.outlier, self.rotate) > 1 or (self.mode == "input" and self.outlier + self.rotate):
            raise KvjaxError(f"{self}: outlier and rotate are 0 or 1, and for latents only")

    @classmethod
    def parse(cls, name: str, mode: str | None, fields: dict[str, Any]) -> X:
        match = re.fullmatch(cls.pattern, name)
        assert match
        check_fields(name, fields, dict.fromkeys(("group", "residual", "sink", "outlier", "rotate"), int))
        return cls(int(match[1]), mode, **fields)

    def __str__(self) -> str:
        mode = f"@{self.mode}" if self.mode else ""
        return f"x{self.bits}{mode}{stated(self, ('bits', 'mode', 'model_group'))}"

    def settle(self, model: LayerShapes) -> X:
        mode = self.mode or ("input" if model.heads == model.kv_heads else "latent")
        spec = dataclasses.replace(self, mode=mode, model_group=default_group(model.model_dim))
        if spec.residual == spec._default_residual:
            spec = dataclasses.replace(spec, residual=None)  # one spec, one name
        spec._streams(CacheShape.of(model, 1, 8, jnp.float32))
        return spec

    @property
    def _group(self) -> int:
        return self.group or self.model_group

    @property
    def _default_residual(self) -> int:
        return 0 if self.mode == "input" else self._group

    @property
    def block(self) -> int:
        return self._default_residual if self.residual is None else self.residual

    def _channels(self, width: int) -> int:
        if self.group is None:
            return shrunk(self.model_group, width)
        if width % self.group:
            raise KvjaxError(f"{self}: group {self.group} does not divide the {width} channels")
        return self.group

    def _streams(self, shape: CacheShape) -> list[Stream]:
        for name, size in (("model_dim", shape.model_dim), ("head_dim", shape.head_dim)):
            if size % 8:
                raise KvjaxError(f"{self}: {name} {size}; expected a multiple of 8")
        if self.mode == "input":
            form = store.Format(self.bits, "token", self._channels(shape.model_dim), self.block)
            return [Stream(form, 1, shape.model_dim, None)]
        kv_dim = shape.kv_heads * shape.head_dim
        width = shape.head_dim if self.mode == "head" else min(shape.model_dim, kv_dim)
        heads, axis = (shape.kv_heads, "kv_heads") if self.mode == "head" else (1, None)
        whole = self.mode == "head" and self.group is None
        try:
            keys = store.Format(self.bits, "channel", self._group, self.block)
        except KvjaxError as error:
            raise KvjaxError(f"{self}: {error}") from None
        values = store.Format(self.bits, "token", width if whole else self._channels(width), self.block)
        streams = [Stream(keys, heads, width, axis), Stream(values, heads, width, axis)]
        if self.outlier:
            streams.append(Stream(store.Format(store.EXACT, "token", 1, self.block), heads, 1, axis))
        return streams

    @property
    def bits_nominal(self) -> float:
        """The width of the codes; one code of `@input` serves a key and a value: see the other figures."""
        return self.bits

    def bits_asymptotic(self, shape: CacheShape) -> float:
        streams = self._streams(shape)
        return sum(s.format.bits_asymptotic * s.heads * s.width for s in streams) / shape.elements_per_token

    @property
    def factors_key(self) -> str:
        return "" if self.mode == "input" else f"x-{self.mode}{'-rotated' * self.rotate}"

    def factors(self, weights: KVWeights, norm: Array) -> Any:
        """[[down, up] of keys, [down, up] of values]: U [G, D, r] and R [G, r, m]."""
        w_k, w_v = (np.asarray(w, np.float64).T for w in (weights.k, weights.v))  # [D, m]
        if self.mode == "latent":
            pairs = [[svd_basis(w, bool(self.rotate))] for w in (w_k, w_v)]
        else:
            heads = w_k.shape[1] // weights.head_dim
            pairs = [[svd_basis(part, bool(self.rotate)) for part in np.split(w, heads, 1)] for w in (w_k, w_v)]
        return [[np.stack(each) for each in zip(*pair, strict=True)] for pair in pairs]

    def init(self, shape: CacheShape) -> XCache:
        spec = self if self.mode else self.settle(shape)
        return XCache(History.init(shape, spec._streams(shape), spec.block, spec.sink), spec)

    def logical_axes(self, shape: CacheShape) -> Any:
        history = jax.eval_shape(lambda: self.init(shape)).history
        return XCache(History.logical_axes(history, self._streams(shape)), self)


@struct.dataclass
class XCache(LayerCache):
    """A history of X, or of the latents of keys and values (and of their channel 0)."""

    history: History
    spec: X = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], XCache, Any]:
        after = self.history.append(self._streams(chunk), chunk)
        remat, kv_heads = self._remat(chunk), chunk.k.shape[2]
        dtype = jnp.promote_types(chunk.q.dtype, jnp.float32)
        part = attend_latents(
            chunk.q,
            chunk.positions,
            lambda start, size: self._latents(after, start, size, dtype),
            after.tokens,
            store.capacity(1, *(p.format for p in after.packed)),
            remat,
            kv_heads,
            rope_table(chunk, after.tokens),
            after.sink,
            after.packed_stop(chunk),
            chunk.window,
            None if self.spec.outlier else (after.packed[0], after.packed[-1]),
        )
        exact = attend_kept(self.history, after, chunk, lambda streams: rebuilt(streams, remat, kv_heads))
        return attention.merge([part, *exact]).astype(chunk.q.dtype), XCache(after, self.spec), carry

    def materialize(self, chunk: Chunk, carry: Any):
        after = self.history.append(self._streams(chunk), chunk)
        source = after if self.history.reads_stored(chunk) else self.history
        remat, kv_heads = self._remat(chunk), chunk.k.shape[2]
        dtype = jnp.promote_types(chunk.q.dtype, jnp.float32)
        x_k, x_v = self._latents(source, 0, source.tokens, dtype)
        k, v = remat.keys(x_k, kv_heads).swapaxes(1, 2), remat.values(x_v, kv_heads).swapaxes(1, 2)
        positions = source.packed_positions(chunk)
        k = rotate_heads(k, chunk.rope.table(positions, chunk.q.dtype))
        own = kept_and_own(self.history, after, chunk, lambda streams: rebuilt(streams, remat, kv_heads))
        k, v, positions = (
            jnp.concatenate([a, b.astype(a.dtype)], 1) for a, b in zip((k, v, positions), own, strict=True)
        )
        return k, v, positions, XCache(after, self.spec), carry

    def _streams(self, chunk: Chunk) -> tuple[Float[Array, "B T G W"], ...]:
        if self.spec.mode == "input":
            return (chunk.x[:, :, None],)
        (down_k, _), (down_v, _) = chunk.factors
        keys, values = (jnp.einsum("btd,gdr->btgr", chunk.x, down.astype(chunk.x.dtype)) for down in (down_k, down_v))
        return (keys, values, keys[..., :1]) if self.spec.outlier else (keys, values)

    def _remat(self, chunk: Chunk) -> Remat:
        if self.spec.mode == "input":
            return remat_of(chunk, chunk.weights.k.T[None], chunk.weights.v.T[None])
        (_, up_k), (_, up_v) = chunk.factors
        return remat_of(chunk, up_k, up_v)

    def _latents(self, history: History, start: Int[Array, ""] | int, size: int, dtype) -> tuple[Array, Array]:
        """Tokens [start, start + size) as they are stored."""
        streams = [store.read_block(packed, start, size, dtype).dequantize() for packed in history.packed]
        if self.spec.mode == "input":
            return streams[0], streams[0]
        if self.spec.outlier:
            streams[0] = jnp.concatenate([streams[2], streams[0][..., 1:]], -1)
        return streams[0], streams[1]


def rebuilt(streams: tuple[Array, ...], remat: Remat, kv_heads: int) -> tuple[Array, Array]:
    """Keys (before RoPE) and values [B, N, K, d] of exact latents [B, N, G, W]; one stream serves both."""
    x_k, x_v = streams[0].swapaxes(1, 2), streams[min(1, len(streams) - 1)].swapaxes(1, 2)
    return remat.keys(x_k, kv_heads).swapaxes(1, 2), remat.values(x_v, kv_heads).swapaxes(1, 2)


def remat_of(chunk: Chunk, key: Float[Array, "G r m"], value: Float[Array, "G s m"]) -> Remat:
    """What rebuilds the layer's keys and values, with its biases and its qk-norm."""
    weights, kv_heads = chunk.weights, chunk.k.shape[2]
    k_bias, v_bias = (b if b is None else b.reshape(kv_heads, -1) for b in (weights.k_bias, weights.v_bias))
    return Remat(key, value, k_bias, v_bias, weights.k_norm, weights.norm_eps)


def rope_table(chunk: Chunk, tokens: int) -> tuple[Array, Array]:
    """cos and sin of every allocated position: the same in every layer, so built once."""
    return chunk.rope.table(jnp.arange(tokens), chunk.q.dtype)


def kept_and_own(history: History, after: History, chunk: Chunk, rebuild) -> tuple[Array, Array, Int[Array, "B N"]]:
    """Keys after RoPE, values and positions (-1 where absent) that are read exactly: sinks, residual, the chunk.

    rebuild: keys before RoPE and values [B, N, K, d] of kept streams.
    """
    streams, positions = history.kept(after, chunk)
    k, v = rebuild(streams)
    k = rotate_heads(k, chunk.rope.table(positions, chunk.q.dtype))
    if history.reads_stored(chunk):
        return k, v, positions
    own = rotate_heads(chunk.k, chunk.rotation)
    positions = jnp.concatenate([positions, history.own_positions(chunk)], 1)
    k, v = (jnp.concatenate([a, b.astype(a.dtype)], 1) for a, b in ((k, own), (v, chunk.v)))
    return k, v, positions


def attend_kept(history: History, after: History, chunk: Chunk, rebuild) -> list[attention.Partial]:
    """Attention over what is read exactly; nothing where there is none."""
    if not history.sink and history.reads_stored(chunk):
        return []
    k, v, positions = kept_and_own(history, after, chunk, rebuild)
    own = not history.reads_stored(chunk)
    return [attention.attend_exact(chunk.q, chunk.positions, k, v, positions, chunk.window, own)]
