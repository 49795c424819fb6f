"""The weights that turn stored rows into keys."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rebuild:
    """The weights and tables of keys = rope(norm(rows @ up + bias)).

    Attributes:
      up: [G, r, m]; G = 1 with m = K*D (all kv heads read the same rows), or G = K with m = D.
      cos: cosines of the angles of every position, once for each half of D (HF's half-split convention).
      sin: sines, likewise.
      bias: added before the norm; None where there is none.
      norm: weight of an RMS norm over the head_dim of each key; None where there is none.
      eps: epsilon of that norm.
    """

    up: Float[Array, "G r m"]
    cos: Float[Array, "S D"]
    sin: Float[Array, "S D"]
    bias: Float[Array, "K D"] | None = None
    norm: Float[Array, "D"] | None = None
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})

    def kv_heads(self, head_dim: int) -> int:
        return self.up.shape[0] * self.up.shape[2] // head_dim

    def keys(self, rows: Float[Array, "B G S r"], head_dim: int) -> Float[Array, "B K S D"]:
        """Rebuilds all keys (after RoPE) in float32, simply and slowly, for the reference."""
        k = jnp.einsum("bgsr,grm->bsgm", rows, self.up.astype(jnp.float32), precision="highest")
        k = k.reshape(*k.shape[:2], -1, head_dim).swapaxes(1, 2)
        if self.bias is not None:
            k = k + self.bias[:, None].astype(jnp.float32)
        if self.norm is not None:
            k = k * jax.lax.rsqrt(jnp.mean(k * k, -1, keepdims=True) + self.eps) * self.norm.astype(jnp.float32)
        cos, sin = (a[: k.shape[2]].astype(jnp.float32) for a in (self.cos, self.sin))
        turned = jnp.concatenate([-k[..., head_dim // 2 :], k[..., : head_dim // 2]], -1)
        return k * cos + turned * sin
