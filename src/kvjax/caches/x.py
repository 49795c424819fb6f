"""XQuant: the quantised layer input, or its latents, stored instead of keys and values (arXiv 2508.10395).

`@input` stores X itself, per token (section 3.1, MHA). `@latent` stores X U_k per channel in blocks of tokens and
X U_v per token, with W_k = U_k R_k and W_v = U_v R_v (section 3.3.1, GQA). `@head` has such a pair for each kv head:
as many bytes, R smaller by the number of kv heads, and it shards with the heads. X is the input after the norm.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from kvjax.caches.base import Chunk, KVWeights, LayerShapes
from kvjax.caches.latents import LatentCache, LatentSpec, remat_of, trained_key
from kvjax.caches.statistics import Statistics
from kvjax.caches.stored import BlockStore, PairFit, Tensors, TensorSpec, View, Width, fits_of
from kvjax.errors import KvjaxError
from kvjax.ops import attention, store
from kvjax.ops.remat import Latents, Remat
from kvjax.quant.basis import Basis, balance, svd_basis


@dataclasses.dataclass(frozen=True)
class X(LatentSpec):
    """X or its latents in `bits` bits (1, 2, 3, 4, 5, 6, 8; 16 is unquantised).

    mode: input, latent or head; None follows the model.
    group: tokens of a latent of keys, channels of the rest; one group per head for the values of `@head` where None.
    residual: 0 for `@input`, else the group where None.
    outlier: 1 keeps channel 0 of the latents of keys in 16 bits (table B.1).
    rotate: 1 turns the latents by a random rotation.
    fit: how scales are chosen: mse is the least squared error, keys that of the latents of keys alone, unbiased the
      same with latents of values as large as they were on average.
    scale: see `LatentSpec`.
    basis: svd (of the weights), or balanced between the spread of latents and what their errors cost
      (`quant.basis.balance`) on a calibration text, or learned: trained from there by `kvjax.learn`; `@latent` only.
    """

    bits: Width
    outlier: Literal[0, 1] = 0
    rotate: Literal[0, 1] = 0
    fit: PairFit = "minmax"
    basis: Basis = "svd"

    form: ClassVar[str] = "x{bits}"
    modes: ClassVar[tuple[str, ...]] = ("input", "latent", "head")
    examples: ClassVar[tuple[str, ...]] = (
        "x4@input",
        "x3@input(group=16,residual=8,sink=3,fit=mse)",
        "x2@latent(group=16,sink=5,outlier=1,fit=keys)",
        "x4@head(group=8,residual=16,rotate=1,scale=8)",
        "x3@latent(group=16,sink=4,rotate=1,basis=balanced)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "input" and (self.outlier or self.rotate):
            raise KvjaxError(f"{self}: outlier and rotate are for latents only")
        if self.mode == "input" and self.fit in ("keys", "unbiased"):
            raise KvjaxError(f"{self}: fit={self.fit}; expected mse, because X serves keys and values")
        if self.calibrated and self.mode not in (None, "latent"):
            raise KvjaxError(f"{self}: basis={self.basis}; expected @latent")

    @property
    def cache_type(self) -> type[XCache]:
        return XCache

    @property
    def default_residual(self) -> int:
        return 0 if self.mode == "input" else self.token_group

    def tensors(self, shape: LayerShapes) -> list[TensorSpec]:
        of_keys, of_values = fits_of(self.fit)
        if self.mode == "input":
            form = self.format(self.bits, "token", self.channel_group(shape.model_dim), of_keys, self.scale)
            return [TensorSpec(form, 1, shape.model_dim, None)]
        width, heads, axis = min(shape.model_dim, shape.kv_heads * shape.head_dim), 1, None
        if self.mode == "head":
            width, heads, axis = shape.head_dim, shape.kv_heads, "kv_heads"
        group = self.channel_group(width)
        if self.mode == "head" and self.group is None:
            group = width
        forms = (
            self.format(self.bits, "channel", self.token_group, of_keys, self.scale),
            self.format(self.bits, "token", group, of_values, self.scale),
        )
        kept = [TensorSpec(form, heads, width, axis) for form in forms]
        return kept + [TensorSpec(self.format(store.EXACT, "token", 1), heads, 1, axis)] * self.outlier

    @property
    def bits_nominal(self) -> float:
        """The width of the codes; one code of `@input` serves a key and a value: see the other figures."""
        return self.bits

    @property
    def bases_key(self) -> str:
        if self.trained:
            return trained_key(self)
        return (
            "" if self.mode == "input" else f"x-{self.mode}{'-balanced' * self.calibrated}{'-rotated' * self.rotate}"
        )

    @property
    def calibrated(self) -> bool:
        return self.basis != "svd"

    @property
    def trained(self) -> bool:
        return self.basis == "learned"

    def bases(self, weights: KVWeights, norm: Array, statistics: Statistics | None = None) -> Any:
        """[[down, up] of keys, [down, up] of values]: U [G, D, r] and R [G, r, m], or those of a balanced basis."""
        w_k, w_v = (np.asarray(w, np.float64).T for w in (weights.k, weights.v))  # [D, m]
        if statistics is not None:
            moment, size = statistics.scaled_unit(norm), w_k.shape[1]
            costs = statistics.gradient[:size, :size], statistics.gradient[size:, size:]
            pairs = [[self._balanced(w, moment, cost)] for w, cost in zip((w_k, w_v), costs, strict=True)]
        elif self.mode == "latent":
            pairs = [[svd_basis(w, bool(self.rotate))] for w in (w_k, w_v)]
        else:
            heads = w_k.shape[1] // weights.head_dim
            pairs = [[svd_basis(part, bool(self.rotate)) for part in np.split(w, heads, 1)] for w in (w_k, w_v)]
        return [[np.stack(each) for each in zip(*pair, strict=True)] for pair in pairs]

    def _balanced(self, w: np.ndarray, moment: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Down and up of a projection W: x W = (x down) up."""
        u, r = svd_basis(w)
        to, back = balance(u.T @ moment @ u, r @ cost @ r.T, bool(self.rotate))
        return u @ to, back @ r


@struct.dataclass
class XCache(LatentCache):
    """X, or the latents of keys and values (and channel 0 of keys)."""

    def new_tensors(self, chunk: Chunk) -> Tensors:
        if self.spec.mode == "input":
            return (chunk.x[:, :, None],)
        (down_k, _), (down_v, _) = chunk.bases
        keys, values = (_on_bases(chunk.x, down.astype(chunk.x.dtype)) for down in (down_k, down_v))
        return (keys, values, keys[..., :1]) if self.spec.outlier else (keys, values)

    def remat(self, chunk: Chunk) -> Remat:
        if self.spec.mode == "input":
            return remat_of(chunk, chunk.weights.k.T[None], chunk.weights.v.T[None])
        (_, up_k), (_, up_v) = chunk.bases
        return remat_of(chunk, up_k, up_v)

    def rebuild_kv(self, tensors: Tensors, chunk: Chunk) -> tuple[Array, Array]:
        return self.keys_and_values(self._latents(tensors), chunk)

    def attend_packed(self, view: View, chunk: Chunk, carry: Any) -> attention.Partial:
        return self.attend_latents(view, chunk, Latents(view.packed, self._latents if self.spec.outlier else None))

    def _attend_kept(self, after: BlockStore, chunk: Chunk, carry: Any) -> list[attention.Partial]:
        """Few queries attend to exact latents as to packed ones: less is rebuilt."""
        if not attention.is_decode_shape(chunk.q.shape[1] * chunk.q.shape[2] // chunk.k.shape[2]):
            return super()._attend_kept(after, chunk, carry)
        tensors, *_ = self.store.kept(after, chunk)
        if not self.store.reads_stored(chunk):
            own = zip(tensors, self.new_tensors(chunk), strict=True)
            tensors = tuple(jnp.concatenate([old, new.astype(old.dtype)], 1) for old, new in own)
        return [self.attend_packed(view, chunk, carry) for view in self._kept_views(tensors, chunk)]

    def _latents(self, tensors: Tensors) -> tuple[Array, Array]:
        """Latents of keys and of values; X serves both."""
        if not self.spec.outlier:
            return tensors[0], tensors[-1]
        keys, values, first = tensors
        return jnp.concatenate([first, keys[..., 1:]], -1), values


def _on_bases(x: Float[Array, "B T D"], down: Float[Array, "G D r"]) -> Float[Array, "B T G r"]:
    """Rows on the basis of every kv head, or of all."""
    few = attention.is_decode_shape(x.shape[0] * x.shape[1])
    if few and len(down) > 1:  # else XLA turns all bases at every step: that costs more
        return jnp.einsum("gbtd,gdr->btgr", jnp.broadcast_to(x, (len(down), *x.shape)), down)
    return jnp.einsum("btd,gdr->btgr", x, down)
