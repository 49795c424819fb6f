"""What the GPU kernels of packed attention share: the plan of a launch, its settings, and the merge of its parts."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.gpu_layout import PROGRAMS, Cut, Stored, cut
from pallas_kernels.layout import Packed, by_query

LOWEST = -1e20  # the first running maximum: far above MASKED, so that masked scores have probability 0
MOST_ROWS = 64  # query rows of a kv head


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a kernel knows when it is traced."""

    keys: Stored
    values: Stored
    cut: Cut
    tokens: int  # queries of a sequence
    ratio: int  # query heads of a kv head
    splits: int
    first: int
    window: int | None
    scale: float
    dtype: jnp.dtype  # of q
    interpret: bool

    @property
    def rows(self) -> int:
        return self.tokens * self.ratio

    @property
    def distinct(self) -> int:
        """Rows padded to a power of two."""
        return 1 << (self.rows - 1).bit_length()

    @property
    def columns(self) -> int:
        """`distinct`, or what a tensor core takes at least; those beyond the rows are rows again."""
        return max(8, self.distinct)

    @property
    def light(self) -> bool:
        """Whether queries are of 16 bits."""
        return self.dtype != jnp.float32


P = TypeVar("P", bound=Plan)


def plan_of(
    kind: type[P],
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    first: int,
    window: int | None,
    scale: float,
    interpret: bool,
    settings: dict[str, int],
) -> tuple[P, dict[str, int]]:
    """The plan, and warps and stages of the launch.

    Raises NotImplementedError: more query rows, or other packing, than the kernels have room for.
    """
    tokens, ratio = q.shape[1], q.shape[2] // keys.shape[1]
    if tokens * ratio > MOST_ROWS:
        raise NotImplementedError(f"{tokens} queries of {ratio} heads; at most {MOST_ROWS} rows a kv head")
    stored = Stored.of(keys), Stored.of(values)
    own = cut(list(stored), 0, settings["block"])
    dtype = jnp.dtype(q.dtype)
    plan = kind(*stored, own, tokens, ratio, settings["splits"], first, window, scale, dtype, interpret)
    return plan, {name: settings[name] for name in ("num_warps", "num_stages")}


def settings_of(q: Float[Array, "B T H D"], keys: Packed, values: Packed, rows: int) -> dict[str, int]:
    """Block, splits, warps and stages where sub-tiles have `rows` tokens, or the next number that packing allows."""
    (batch, tokens, heads, _), kv_heads = q.shape, keys.shape[1]
    chosen = cut([Stored.of(keys), Stored.of(values)], rows)
    splits = min(math.ceil(PROGRAMS / (batch * kv_heads)), math.ceil(keys.shape[2] / (2 * chosen.block)))
    few = tokens * heads // kv_heads <= 32 and q.dtype == jnp.bfloat16
    return {"block": chosen.block, "splits": max(1, splits), "num_warps": 4 if few else 8, "num_stages": 2}


def result(
    output: Float32[Array, "B K N R V"], lse: Float32[Array, "B K N R"], queries: int
) -> tuple[Float32[Array, "B T H V"], Float32[Array, "B T H"]]:
    """The parts of every kv head merged, by query."""
    merged, total = merge(output, lse)
    return by_query(merged, queries), by_query(total[..., None], queries)[..., 0]


def merge(
    output: Float32[Array, "B K N R V"], lse: Float32[Array, "B K N R"]
) -> tuple[Float32[Array, "B K R V"], Float32[Array, "B K R"]]:
    """Attention over all parts from that over each of N."""
    if lse.shape[2] == 1:
        return output[:, :, 0], lse[:, :, 0]
    highest = lse.max(2, keepdims=True)
    weights = jnp.exp(lse - highest)
    total = weights.sum(2)
    merged = (output * weights[..., None]).sum(2) / total[..., None]
    return merged, highest[:, :, 0] + jnp.log(total)
