"""XQuant-CL: cross-layer deltas of the layer input, closed loop (arXiv 2508.10395, sections 3.2 and 3.3.2).

The layers of a run up to its base layer store X in `base_bits`; those above store X_i - X̂_{i-1}, the difference from
the reconstruction of the layer below, so that errors do not add up. The reconstruction of all cached tokens, the
accumulator, is rebuilt through the layers at every step: it runs across them as the carry. `@input` stores
X or its delta; `@latent` projects it on U of the layer's [W_k W_v] = U Σ B^T first and maps it back by U^T.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, Chunk, KVWeights, LayerShapes
from kvjax.caches.cross_layer import CrossLayerSpec
from kvjax.caches.fields import derived
from kvjax.caches.latents import LatentCache, LatentSpec, remat_of, trained_key
from kvjax.caches.statistics import Statistics
from kvjax.caches.stored import BlockStore, StoredSpec, Tensors, TensorSpec, View, Width, read_dtype
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.reconstruct import reconstruct
from kvjax.ops.remat import Latents, Remat
from kvjax.ops.shards import first_token
from kvjax.quant.basis import Basis, balance, rotation, svd_basis

ALIGN = 32  # tokens that the accumulator is a multiple of


@dataclasses.dataclass(frozen=True)
class XCL(LatentSpec, CrossLayerSpec):
    """Deltas of X in `bits` bits (1, 2, 3, 4, 5, 6, 8; 16 is unquantised).

    `xcl{b}` is the paper's form. `xclr{b}` is a better one: latent, 4 sinks, per channel, folded, rotated, fitted.

    mode: input or latent; None follows the model.
    group: channels of a token or (per=channel) tokens of a channel.
    residual: 0, or the group where per=channel, where None.
    base: the run's layer, counted from 0, whose X̂ the first delta is taken from; it and those below store X.
    base_bits: of the layers up to the base.
    per: token or channel: what shares a scale (section 3.2 does not say for deltas; token is the default).
    norm: post stores X after the norm, pre before it (`@input` only; the norm is applied to the reconstruction).
    fold: 1 takes the norm's weight out of X and into W_k and W_v.
    rotate: 1 turns what is quantised by a random rotation.
    fit: how scales are chosen: mse is the least squared error.
    basis: svd (of the weights), or balanced between the spread of what is quantised and what its errors cost
      (`quant.basis.balance`) on a calibration text, or learned, which `kvjax.learn` trains from there, in plans where
      all layers have this spec; `@latent` with fold=1 only.
    gain: 1 takes a delta from the layer below times a gain of each channel, learned as the basis is.
    """

    bits: Width
    base: int = 2
    base_bits: Width = 4
    per: Literal["token", "channel"] = "token"
    norm: Literal["post", "pre"] = "post"
    fold: Literal[0, 1] = 0
    rotate: Literal[0, 1] = 0
    fit: Literal["minmax", "mse"] = "minmax"
    basis: Basis = "svd"
    gain: Literal[0, 1] = 0
    index: int = derived(0)  # in the run, counted up to base + 1

    form: ClassVar[str] = "xcl{bits}"
    modes: ClassVar[tuple[str, ...]] = ("input", "latent")
    # What was found to be better than the paper's form has a name of its own (docs/decisions.md).
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "xclr{bits}": {"mode": "latent", "sink": 4, "per": "channel", "fold": 1, "rotate": 1, "fit": "mse"}
    }
    examples: ClassVar[tuple[str, ...]] = (
        "xcl2@input(group=16,sink=3,base=1,base_bits=8,rotate=1)",
        "xcl3@input(norm=pre,base=0)",
        "xcl3@latent(base=1)",
        "xclr2(group=16,base=0,scale=8)",
        "xcl2@latent(group=16,sink=4,base=0,per=channel,fold=1,rotate=1,basis=balanced,gain=1)",
    )
    forgets: ClassVar[bool] = False  # layers above it may see more than its window

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "pre" and (self.fold or self.mode == "latent"):
            raise KvjaxError(f"{self}: norm=pre stores X before the norm; expected @input and no fold")
        if self.calibrated and (self.mode == "input" or not self.fold):
            raise KvjaxError(f"{self}: what is learned are folded latents; expected @latent and fold=1")

    # ---- its place among the layers

    def with_index(self, below: CacheSpec | None) -> XCL:
        if isinstance(below, XCL) and dataclasses.replace(below, bits=self.bits, index=self.index) == self:
            return dataclasses.replace(
                self, index=min(below.index, self.base) + 1
            )  # one run: all but bits is the same
        return dataclasses.replace(self, index=0)

    def validate_above(self, above: CacheSpec | None) -> None:
        if self.index < self.base and not (isinstance(above, XCL) and above.index == self.index + 1):
            raise KvjaxError(
                f"{self}: a run of {self.index + 1} layers has no base layer {self.base};"
                f" expected at least {self.base + 1} layers of it in a row, or a lower base"
            )

    @property
    def canonical(self) -> XCL:
        if self.delta:
            return dataclasses.replace(self, base=0, base_bits=XCL.base_bits, index=1)
        return dataclasses.replace(self, base=0, bits=self.base_bits, index=0)

    @property
    def label(self) -> str:
        return f"{self.canonical} {'above' if self.delta else 'up to'} its base"

    @property
    def run_key(self) -> XCL:
        return self if self.delta else dataclasses.replace(self, bits=16)

    @property
    def program_form(self) -> StoredSpec:
        return super(XCL, self.canonical).program_form  # layers of runs with other bases share a program

    @property
    def delta(self) -> bool:
        """Whether the layer stores a delta, and not X."""
        return self.index > self.base

    def init_carry(self, shape: CacheShape) -> dict[str, Any]:
        tokens = store.capacity(
            shape.max_len, *(t.format for t in self.tensors(shape)), block=ALIGN, parts=shape.parts
        )
        return {"acc": jnp.zeros((shape.batch, tokens, shape.model_dim), shape.dtype)}

    # ---- what it stores

    @property
    def cache_type(self) -> type[XCLCache]:
        return XCLCache

    @property
    def default_residual(self) -> int:
        return self.token_group if self.per == "channel" else 0

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        width = shape.model_dim
        if self.mode == "latent":
            width = min(width, 2 * shape.kv_heads * shape.head_dim)
        group = self.token_group if self.per == "channel" and not width % 8 else self.channel_group(width)
        form = self.format(int(self.bits_nominal), self.per, group, self.fit, self.scale)
        return [TensorSpec(form, 1, width, None)]

    @property
    def bits_nominal(self) -> float:
        """The width of this layer's codes."""
        return self.bits if self.delta else self.base_bits

    @property
    def bases_key(self) -> str:
        if self.mode == "input":
            return "xcl-rotation" if self.rotate else ""
        if self.trained:
            return trained_key(self)
        learned = f"-{self.basis}{'-gained' * self.gain}{'-delta' * self.delta}" * self.calibrated
        return f"xcl-basis{learned}{'-folded' * self.fold}{'-rotated' * self.rotate}"

    @property
    def calibrated(self) -> bool:
        return self.basis != "svd" or self.gain == 1

    @property
    def trained(self) -> bool:
        return self.basis == "learned"

    def bases(self, weights: KVWeights, norm: Array, statistics: Statistics | None = None) -> Any:
        """[U], [D, r], orthonormal columns; what is learned has [down, up], [D, r] and [r, D], and the gain [D]."""
        if self.mode == "input":
            return [rotation(weights.k.shape[1])]
        w = np.concatenate([np.asarray(w, np.float64).T for w in (weights.k, weights.v)], 1)
        if self.fold:
            w = np.asarray(norm, np.float64)[:, None] * w
        if statistics is None:
            return [svd_basis(w, bool(self.rotate))[0]]
        gain = [statistics.gain] * self.gain
        if self.basis == "svd":
            u = svd_basis(w, bool(self.rotate))[0]
            return [u, u.T, *gain]
        u, r = svd_basis(w)
        delta = statistics.gained_delta if self.gain else statistics.delta
        moment = delta if self.delta else statistics.unit
        to, back = balance(u.T @ moment @ u, r @ statistics.gradient @ r.T, bool(self.rotate))
        return [u @ to, back @ u.T, *gain]


@struct.dataclass
class XCLCache(LatentCache):
    """X, or its delta, on the layer's basis: z = X U is packed as z - X̂ U."""

    def append(self, chunk: Chunk, carry: Any) -> tuple[BlockStore, Any]:
        (down, up), acc = down_and_up(chunk.bases), carry["acc"]
        gain = chunk.bases[2] if self.spec.gain and self.spec.delta else None
        after = self.store.append(self.new_tensors(chunk), chunk, Delta(acc, down, gain) if self.spec.delta else None)
        end, r = chunk.positions[:, 0] + chunk.lengths, self.spec.residual_length
        stop = end if self.store.reads_stored(chunk) else end // r * r
        return after, carry | {"acc": reconstruct(acc, after.packed[0], up, self.spec.delta, stop, gain)}

    def new_tensors(self, chunk: Chunk) -> Tensors:
        x = chunk.x
        if self.spec.norm == "pre":
            x = chunk.h
        elif self.spec.fold:
            x = chunk.weights.normalize(chunk.h)
        return (project(x, down_and_up(chunk.bases)[0])[:, :, None],)

    def remat(self, chunk: Chunk) -> Remat:
        in_weights = self.spec.fold or self.spec.norm == "pre"  # the norm's weight
        w_k, w_v = (chunk.norm[:, None] * w.T if in_weights else w.T for w in (chunk.weights.k, chunk.weights.v))
        return remat_of(chunk, w_k[None], w_v[None])

    def rebuild_kv(self, tensors: Tensors, chunk: Chunk) -> tuple[Array, Array]:
        """Of exact z: the way back has all of X that W_k and W_v see."""
        x = project(tensors[0], down_and_up(chunk.bases)[1])
        return self.keys_and_values((self._normed(x, chunk),) * 2, chunk)

    def attend_packed(self, view: View, chunk: Chunk, carry: Any) -> attention.Partial:
        normed = lambda tiles: (self._normed(tiles[0], chunk),) * 2  # noqa: E731
        latents = Latents((store.exact(carry["acc"][:, None]),), normed if self.spec.norm == "pre" else None)
        return self.attend_latents(view, chunk, latents)

    def read_packed(self, view: View, chunk: Chunk, carry: Any) -> tuple[Array, Array]:
        x = self._normed(carry["acc"], chunk).astype(read_dtype(chunk))[:, :, None]
        return self.keys_and_values((x, x), chunk)

    def _normed(self, x: Float[Array, "... D"], chunk: Chunk) -> Float[Array, "... D"]:
        """The rows that `remat` is for, of reconstructed ones."""
        return chunk.weights.normalize(x) if self.spec.norm == "pre" else x


@struct.dataclass
class Delta:
    """Packs the difference from the accumulator, the reconstruction of the layer below, times its gain."""

    acc: Float[Array, "B S D"]
    basis: Float[Array, "D r"] | None
    gain: Float[Array, "D"] | None

    def __call__(self, tensors: Tensors, positions: Int[Array, "B N"]) -> Tensors:
        at = positions - first_token(self.acc.shape[1])
        below = jnp.take_along_axis(self.acc, jnp.clip(at, 0, self.acc.shape[1] - 1)[:, :, None], 1)
        predicted = below if self.gain is None else below * self.gain.astype(below.dtype)
        return (tensors[0] - project(predicted, self.basis)[:, :, None],)

    def logical_axes(self) -> Delta:
        return Delta(PartitionSpec("batch", "tokens"), PartitionSpec(), PartitionSpec())  # type: ignore[arg-type]


def down_and_up(bases: Any) -> tuple[Float[Array, "D r"] | None, Float[Array, "r D"] | None]:
    """What projects X, and the way back; None twice where X itself is stored."""
    if not bases:
        return None, None
    return bases[0], bases[1] if len(bases) > 1 else bases[0].T


def project(x: Float[Array, "... D"], basis: Float[Array, "D r"] | None) -> Float[Array, "... r"]:
    """Rows on a basis; themselves where there is none."""
    return x if basis is None else x @ basis.astype(x.dtype)
