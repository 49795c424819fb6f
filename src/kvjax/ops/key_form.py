"""The form in which keys are stored: before or after RoPE, their known bias taken out, turned by a Hadamard matrix.

K kv heads, n tokens, D head_dim. Tables are cos and sin of the tokens' positions, broadcast over kv heads.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kvjax.ops.rotate import rotate
from kvjax.quant.basis import hadamard

Table = tuple[Float[Array, "... n D"], Float[Array, "... n D"]]


def turn(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Multiplies vectors by a Hadamard matrix H, which spreads an outlier over many channels; `turn` undoes itself.

    H has as many rows as the largest power of two that divides D. Where that is not D itself, it turns blocks of the
    channels one by one (QuaRot, arXiv 2404.00456: keys after RoPE and values, per head).

    Args:
      x: vectors.

    Returns:
      The turned vectors, in float32 or wider.
    """
    dim = x.shape[-1]
    size = dim & -dim
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    blocks = wide.reshape(*x.shape[:-1], dim // size, size)
    return jnp.matmul(blocks, jnp.asarray(hadamard(size), wide.dtype), precision="highest").reshape(x.shape)


@struct.dataclass
class KeyForm:
    """How keys are stored. Every step is undone exactly: what is lost is lost in quantising.

    Attributes:
      bias: b, the part of a key before RoPE that is the same for all tokens; None where it stays in.
      before_rope: whether keys are stored before RoPE.
      turned: whether keys are stored turned by H.
    """

    bias: Float[Array, "K D"] | None = None
    before_rope: bool = struct.field(pytree_node=False, default=False)
    turned: bool = struct.field(pytree_node=False, default=False)

    @property
    def needs_positions(self) -> bool:
        """Whether keys come back only with the table of their positions. Else `turn` of a query gives its scores."""
        return self.before_rope or self.bias is not None

    def logical_axes(self) -> KeyForm:
        """The upper part of the same tree, leaves PartitionSpecs of logical axis names."""
        return KeyForm(PartitionSpec("kv_heads"), self.before_rope, self.turned)  # type: ignore[arg-type]

    def store(self, k: Float[Array, "B K n D"], table: Table) -> Float[Array, "B K n D"]:
        """Keys as they are stored: H (k - b), with R_n b for b where keys are after RoPE, R_n that of position n."""
        k = k if self.bias is None else k - self._bias_at(table)
        return turn(k) if self.turned else k

    def load(self, stored: Float[Array, "B K n D"], table: Table) -> Float[Array, "B K n D"]:
        """Keys as `store` took them."""
        k = turn(stored) if self.turned else stored
        return k if self.bias is None else k + self._bias_at(table)

    def after_rope(self, stored: Float[Array, "B K n D"], table: Table) -> Float[Array, "B K n D"]:
        """Keys after RoPE."""
        k = self.load(stored, table)
        return rotate(k, *table) if self.before_rope else k

    def _bias_at(self, table: Table) -> Float[Array, "... K n D"]:
        assert self.bias is not None
        bias = self.bias[:, None].astype(table[0].dtype)
        return bias if self.before_rope else rotate(bias, *table)


BEFORE_ROPE = KeyForm(before_rope=True)
