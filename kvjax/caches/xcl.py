"""XQuant-CL: cross-layer deltas of the layer input, closed loop (arXiv 2508.10395, sections 3.2 and 3.3.2).

The layers of a run up to its base layer store X in `base_bits`; those above store X_i - X̂_{i-1}, the difference from
the reconstruction of the layer below, so that errors do not add up. The reconstruction of all cached tokens, the
accumulator, is rebuilt through the layers at every step: it runs across them as the carry. `@input` stores
X or its delta; `@latent` projects it on U of the layer's [W_k W_v] = U Σ B^T first and maps it back by U^T.
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
from kvjax.caches.x import (
    WIDTHS,
    attend_kept,
    check_numbers,
    default_group,
    kept_and_own,
    rebuilt,
    remat_of,
    rope_table,
    shrunk,
    stated,
)
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.dispatch import dispatch
from kvjax.ops.remat import Remat, attend_latents
from kvjax.ops.rotate import rotate_heads
from kvjax.quant.basis import rotation, svd_basis
from pallas_kernels.remat_attention import reconstruct

_BLOCK_ELEMENTS = 2**16  # of one block of the accumulator while it is rebuilt
ALIGN = 32  # tokens that the accumulator is a multiple of


@dataclasses.dataclass(frozen=True)
class XCL(CacheSpec):
    """Deltas of X in `bits` bits (1, 2, 3, 4, 5, 6, 8; 16 is unquantised).

    `xcl{b}` is the paper's form. `xclr{b}` is a better one: latent, 4 sinks, per channel, folded, rotated.

    mode: input or latent; None follows the model: input where every query head has its own kv head, else latent.
    group: elements that share a scale, channels of a token or (per=channel) tokens of a channel. None: 128 where it
      divides model_dim, else 64, shrunk to divide narrow latents.
    residual: R, the tokens that stay exact until a block of R is complete. None: 0, or the group where per=channel.
    sink: the first tokens that stay exact for ever.
    base: the run's layer, counted from 0, whose X̂ the first delta is taken from; it and those below store X.
    base_bits: of the layers up to the base.
    per: token or channel: what shares a scale (section 3.2 does not say for deltas; token is the default).
    norm: post stores X after the norm, pre before it (`@input` only; the norm is applied to the reconstruction).
    fold: 1 takes the norm's weight out of X and into W_k and W_v.
    rotate: 1 turns what is quantised by a random rotation.
    """

    bits: int
    mode: str | None = None
    group: int | None = None
    residual: int | None = None
    sink: int = 0
    base: int = 2
    base_bits: int = 4
    per: str = "token"
    norm: str = "post"
    fold: int = 0
    rotate: int = 0
    model_group: int = 128  # the default group of the model, filled in by `settle`
    index: int = 0  # in the run, counted up to base + 1; filled in by `placed`

    pattern: ClassVar[str] = r"xcl(r?)(\d{1,9})"
    modes: ClassVar[tuple[str, ...]] = ("input", "latent")

    def __post_init__(self) -> None:
        for bits in (self.bits, self.base_bits):
            if bits not in WIDTHS:
                raise KvjaxError(f"{self}: {bits} bits; expected one of {', '.join(map(str, WIDTHS))}")
        if self.mode not in (None, *self.modes):
            raise KvjaxError(f"{self}: mode {self.mode!r}; expected one of {', '.join(self.modes)}")
        check_numbers(self, {"group": 8, "residual": 0, "sink": 0, "base": 0})
        choices = {"per": ("token", "channel"), "norm": ("post", "pre"), "fold": (0, 1), "rotate": (0, 1)}
        for field, values in choices.items():
            if getattr(self, field) not in values:
                raise KvjaxError(f"{self}: {field}={getattr(self, field)}; expected {values[0]} or {values[1]}")
        if self.norm == "pre" and (self.fold or self.mode == "latent"):
            raise KvjaxError(f"{self}: norm=pre stores X before the norm; expected @input and no fold")

    @classmethod
    def parse(cls, name: str, mode: str | None, fields: dict[str, Any]) -> XCL:
        match = re.fullmatch(cls.pattern, name)
        assert match
        numbers = ("group", "residual", "sink", "base", "base_bits", "fold", "rotate")
        check_fields(name, fields, dict.fromkeys(numbers, int) | {"per": str, "norm": str})
        # What was found to be better than the paper's form has a name of its own (docs/decisions.md).
        better: dict[str, Any] = {"sink": 4, "per": "channel", "fold": 1, "rotate": 1} if match[1] else {}
        return cls(int(match[2]), mode or ("latent" if match[1] else None), **better | fields)

    def __str__(self) -> str:
        mode = f"@{self.mode}" if self.mode else ""
        return f"xcl{self.bits}{mode}{stated(self, ('bits', 'mode', 'model_group', 'index'))}"

    def settle(self, model: LayerShapes) -> XCL:
        mode = self.mode or ("input" if model.heads == model.kv_heads else "latent")
        spec = dataclasses.replace(self, mode=mode, model_group=default_group(model.model_dim))
        if spec.residual == spec._default_residual:
            spec = dataclasses.replace(spec, residual=None)  # one spec, one name
        spec._stream(CacheShape.of(model, 1, 8, jnp.float32))
        return spec

    def placed(self, below: CacheSpec | None) -> XCL:
        if isinstance(below, XCL) and self._is_run_of(below):
            return dataclasses.replace(self, index=min(below.index, self.base) + 1)
        return dataclasses.replace(self, index=0)

    def _is_run_of(self, other: XCL) -> bool:
        """Whether two neighbours are of one run: all but their bits is the same."""
        return dataclasses.replace(other, bits=self.bits, index=self.index) == self

    @property
    def alone(self) -> XCL:
        if self.delta:
            return dataclasses.replace(self, index=self.base + 1)
        return dataclasses.replace(self, index=0, bits=self.base_bits)

    @property
    def place(self) -> XCL:
        return dataclasses.replace(self, bits=store.EXACT)

    def check_below(self, above: CacheSpec | None) -> None:
        if self.index < self.base and not (isinstance(above, XCL) and above.index == self.index + 1):
            raise KvjaxError(
                f"{self}: a run of {self.index + 1} layers has no base layer {self.base};"
                f" expected at least {self.base + 1} layers of it in a row, or a lower base"
            )

    @property
    def delta(self) -> bool:
        """Whether the layer stores a delta, and not X."""
        return self.index > self.base

    @property
    def _group(self) -> int:
        return self.group or self.model_group

    @property
    def _default_residual(self) -> int:
        return self._group if self.per == "channel" else 0

    @property
    def block(self) -> int:
        return self._default_residual if self.residual is None else self.residual

    def _stream(self, shape: CacheShape) -> Stream:
        width = shape.model_dim
        if self.mode == "latent":
            width = min(width, 2 * shape.kv_heads * shape.head_dim)
        if width % 8:
            raise KvjaxError(f"{self}: {width} channels; expected a multiple of 8")
        group = self._group
        if self.per == "token":
            if self.group is not None and width % self.group:
                raise KvjaxError(f"{self}: group {self.group} does not divide the {width} channels")
            group = self.group or shrunk(self.model_group, width)
        try:
            form = store.Format(self.bits if self.delta else self.base_bits, self.per, group, self.block)
        except KvjaxError as error:
            raise KvjaxError(f"{self}: {error}") from None
        return Stream(form, 1, width, None)

    @property
    def bits_nominal(self) -> float:
        """The width of this layer's codes."""
        return self.bits if self.delta else self.base_bits

    def bits_asymptotic(self, shape: CacheShape) -> float:
        stream = self._stream(shape)
        return stream.format.bits_asymptotic * stream.width / shape.elements_per_token

    @property
    def factors_key(self) -> str:
        if self.mode == "input":
            return "xcl-rotation" if self.rotate else ""
        return f"xcl-basis{'-folded' * self.fold}{'-rotated' * self.rotate}"

    def factors(self, weights: KVWeights, norm: Array) -> Any:
        """[U], [D, r], orthonormal columns."""
        if self.mode == "input":
            return [rotation(weights.k.shape[1])]
        w = np.concatenate([np.asarray(w, np.float64).T for w in (weights.k, weights.v)], 1)
        if self.fold:
            w = np.asarray(norm, np.float64)[:, None] * w
        return [svd_basis(w, bool(self.rotate))[0]]

    def init_carry(self, shape: CacheShape) -> Any:
        tokens = -(-shape.max_len // ALIGN) * ALIGN
        tokens = max(tokens, store.capacity(shape.max_len, self._stream(shape).format))
        return {"acc": jnp.zeros((shape.batch, tokens, shape.model_dim), shape.dtype)}

    def init(self, shape: CacheShape) -> XCLCache:
        spec = self if self.mode else self.settle(shape)
        return XCLCache(History.init(shape, [spec._stream(shape)], spec.block, spec.sink), spec)

    def logical_axes(self, shape: CacheShape) -> Any:
        history = jax.eval_shape(lambda: self.init(shape)).history
        return XCLCache(History.logical_axes(history, [self._stream(shape)]), self)


@struct.dataclass
class XCLCache(LayerCache):
    """A history of X, or of its delta, on the layer's basis."""

    history: History
    spec: XCL = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], XCLCache, Any]:
        after = self._append(chunk, carry["acc"])
        acc = self._reconstruct(after, carry["acc"], chunk)
        remat, kv_heads = self._remat(chunk), chunk.k.shape[2]

        def latents(start, size):
            x = self._normed(jax.lax.dynamic_slice_in_dim(acc, start, size, 1), chunk)[:, None]
            return x, x

        part = attend_latents(
            chunk.q,
            chunk.positions,
            latents,
            acc.shape[1],
            1,
            remat,
            kv_heads,
            rope_table(chunk, acc.shape[1]),
            after.sink,
            after.packed_stop(chunk),
            chunk.window,
            None if self.spec.norm == "pre" else (store.exact(acc[:, None]),) * 2,
        )
        exact = attend_kept(self.history, after, chunk, lambda streams: self._exact(streams, remat, chunk))
        output = attention.merge([part, *exact]).astype(chunk.q.dtype)
        return output, XCLCache(after, self.spec), {"acc": acc}

    def materialize(self, chunk: Chunk, carry: Any):
        after = self._append(chunk, carry["acc"])
        acc = self._reconstruct(after, carry["acc"], chunk)
        remat, kv_heads = self._remat(chunk), chunk.k.shape[2]
        x = self._normed(acc, chunk).astype(jnp.promote_types(chunk.q.dtype, jnp.float32))[:, None]
        source = after if self.history.reads_stored(chunk) else self.history
        positions = source.packed_positions(chunk)
        positions = jnp.pad(positions, ((0, 0), (0, acc.shape[1] - positions.shape[1])), constant_values=-1)
        k, v = remat.keys(x, kv_heads).swapaxes(1, 2), remat.values(x, kv_heads).swapaxes(1, 2)
        k = rotate_heads(k, chunk.rope.table(positions, chunk.q.dtype))
        own = kept_and_own(self.history, after, chunk, lambda streams: self._exact(streams, remat, chunk))
        k, v, positions = (
            jnp.concatenate([a, b.astype(a.dtype)], 1) for a, b in zip((k, v, positions), own, strict=True)
        )
        return k, v, positions, XCLCache(after, self.spec), {"acc": acc}

    # ---- what is stored: z = X U, packed as z - X̂ U

    def _append(self, chunk: Chunk, acc: Float[Array, "B S D"]) -> History:
        def delta(z: Float[Array, "B N 1 r"], positions: Int[Array, "B N"]) -> Float[Array, "B N 1 r"]:
            below = jnp.take_along_axis(acc, jnp.minimum(positions, acc.shape[1] - 1)[:, :, None], 1)
            return z - self._down(below, chunk)[:, :, None]

        z = self._down(self._input(chunk), chunk)[:, :, None]
        return self.history.append((z,), chunk, delta if self.spec.delta else None)

    def _input(self, chunk: Chunk) -> Float[Array, "B T D"]:
        if self.spec.norm == "pre":
            return chunk.h
        return chunk.weights.normalize(chunk.h) if self.spec.fold else chunk.x

    def _normed(self, x: Float[Array, "... D"], chunk: Chunk) -> Float[Array, "... D"]:
        """The rows that W_k and W_v are for, of reconstructed ones."""
        return chunk.weights.normalize(x) * chunk.norm if self.spec.norm == "pre" else x

    def _down(self, x: Float[Array, "... D"], chunk: Chunk) -> Float[Array, "... r"]:
        return x @ chunk.factors[0].astype(x.dtype) if chunk.factors else x

    def _up(self, z: Float[Array, "... r"], chunk: Chunk) -> Float[Array, "... D"]:
        return z @ chunk.factors[0].T.astype(z.dtype) if chunk.factors else z

    def _remat(self, chunk: Chunk) -> Remat:
        w_k, w_v = (chunk.norm[:, None] * w.T if self.spec.fold else w.T for w in (chunk.weights.k, chunk.weights.v))
        return remat_of(chunk, w_k[None], w_v[None])

    def _exact(self, streams: tuple[Array, ...], remat: Remat, chunk: Chunk) -> tuple[Array, Array]:
        """Keys before RoPE and values of exact z: z U^T has all of X that W_k and W_v see."""
        return rebuilt((self._normed(self._up(streams[0], chunk), chunk),), remat, chunk.k.shape[2])

    def _reconstruct(self, after: History, acc: Float[Array, "B S D"], chunk: Chunk) -> Float[Array, "B S D"]:
        """X̂ of this layer from that of the layer below, for every flushed token, block by block in place."""
        packed, block = after.packed[0], self.spec.block
        end = chunk.positions[:, 0] + chunk.lengths
        stop = end if self.history.reads_stored(chunk) else end // block * block

        def kernel(name: str, interpret: bool) -> Array:
            if not self.spec.delta or not chunk.factors or acc.dtype == jnp.float64:
                raise NotImplementedError("base layers, whole deltas and float64 are XLA's")
            up = chunk.factors[0].T.astype(acc.dtype)
            delta = store.for_kernels(packed)
            return reconstruct(acc, delta, up, stop, implementation=name, interpret=interpret)

        return dispatch("remat_attention", kernel, lambda: self._rebuild_blocks(packed, acc, chunk, stop))

    def _rebuild_blocks(
        self, packed: store.Stored, acc: Float[Array, "B S D"], chunk: Chunk, stop: Int[Array, "B"]
    ) -> Float[Array, "B S D"]:
        """`_reconstruct` in XLA."""
        pack = store.capacity(1, packed.format)
        size = 1 << max((_BLOCK_ELEMENTS // acc.shape[2]).bit_length() - 1, 0)
        size = min(packed.tokens, -(-size // pack) * pack)

        def step(i, acc):
            # The last block starts early where `size` does not divide S; what it repeats stays.
            start = jnp.minimum(i * size, packed.tokens - size)
            z = store.read_block(packed, start, size, acc.dtype).dequantize()[:, 0]
            below = jax.lax.dynamic_slice_in_dim(acc, start, size, 1)
            here = self._up(z, chunk) + (below if self.spec.delta else 0)
            new = (start + jnp.arange(size) >= i * size)[:, None]
            return jax.lax.dynamic_update_slice_in_dim(acc, jnp.where(new, here, below), start, 1)

        return jax.lax.fori_loop(0, -(-stop.max() // size), step, acc)
