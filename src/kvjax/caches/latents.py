"""What caches of the layer input share: the form that follows the model, its groups, and the way back to K and V."""

from __future__ import annotations

import abc
import dataclasses
import hashlib

from flax import struct
from jaxtyping import Array, Float

from kvjax.caches.base import CacheShape, Chunk, LayerShapes
from kvjax.caches.fields import derived
from kvjax.caches.stored import ScaleWidth, StoredCache, StoredSpec, Tensors, View, largest_divisor
from kvjax.errors import KvjaxError
from kvjax.ops import attention
from kvjax.ops.remat import Latents, Remat, attend_latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpec(StoredSpec):
    """A method that keeps the layer input or its latents.

    mode: None follows the model: input where every query head has its own kv head, else latent.
    group: elements that share a scale. None: 128 where it divides model_dim, else 64; less for narrow latents.
    scale: bits of a scale, and of a zero point, 16 or 8.
    """

    mode: str | None = None
    group: int | None = None
    scale: ScaleWidth = 16
    model_group: int = derived(128)  # the default group of the model

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and self.group < 8:
            raise KvjaxError(f"{self}: group={self.group}; expected at least 8")

    def resolve(self, model: LayerShapes) -> LatentSpec:
        mode = self.mode or ("input" if model.heads == model.kv_heads else "latent")
        group = 128 if model.model_dim % 128 == 0 else 64
        return StoredSpec.resolve(dataclasses.replace(self, mode=mode, model_group=group), model)  # type: ignore[return-value]

    def init(self, shape: CacheShape) -> StoredCache:
        return StoredSpec.init(self if self.mode else self.resolve(shape), shape)

    @property
    def token_group(self) -> int:
        """Tokens that share a scale of what is quantised per channel."""
        return self.group or self.model_group

    def channel_group(self, width: int) -> int:
        """Channels that share a scale of what is quantised per token."""
        if width % 8:
            raise KvjaxError(f"{self}: {width} channels; expected a multiple of 8")
        if self.group and width % self.group:
            raise KvjaxError(f"{self}: group {self.group} does not divide the {width} channels")
        return self.group or largest_divisor(self.model_group, width)


@struct.dataclass
class LatentCache(StoredCache):
    """Keys come back before RoPE, by `remat`."""

    @property
    def keys_after_rope(self) -> bool:
        return False

    @abc.abstractmethod
    def remat(self, chunk: Chunk) -> Remat:
        """What turns latents into keys and values."""

    def attend_latents(self, view: View, chunk: Chunk, latents: Latents) -> attention.Partial:
        """Attention over latents of packed tokens."""
        table = view.table(chunk, latents.tokens)
        return attend_latents(chunk.q, view.span(chunk), latents, self.remat(chunk), table)

    def keys_and_values(self, latents: Tensors, chunk: Chunk) -> tuple[Array, Array]:
        """Keys before RoPE and values [B, N, K, d] of latents [B, N, G, W] of keys and of values."""
        remat = self.remat(chunk)
        of_keys, of_values = (x.swapaxes(1, 2) for x in latents)
        return remat.keys(of_keys).swapaxes(1, 2), remat.values(of_values).swapaxes(1, 2)


def trained_key(spec: LatentSpec) -> str:
    """The `bases_key` of a trained spec: its own, the same in all layers of a plan with this spec alone."""
    return f"learned-{hashlib.sha256(str(spec).encode()).hexdigest()[:16]}"


def remat_of(chunk: Chunk, key: Float[Array, "G r m"], value: Float[Array, "G s m"]) -> Remat:
    """What rebuilds the layer's keys and values, with its biases and its qk-norm."""
    weights, kv_heads = chunk.weights, chunk.k.shape[2]
    k_bias, v_bias = (b if b is None else b.reshape(kv_heads, -1) for b in (weights.k_bias, weights.v_bias))
    key, value = (w.reshape(*w.shape[:2], kv_heads // w.shape[0], -1) for w in (key, value))
    k_norm, head_dim = weights.k_norm, key.shape[-1]
    if k_norm is not None and k_norm.shape[0] > head_dim:
        k_norm = k_norm.reshape(-1, head_dim)
    return Remat(key, value, k_bias, v_bias, k_norm, weights.norm_eps)
