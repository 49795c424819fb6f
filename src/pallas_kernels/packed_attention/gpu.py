"""Code that the GPU kernels of packed attention share: plan and settings of a launch, and the merge of parts."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.gpu_layout import STARTUP, Cut, GpuTensor, blocks_of, cores, cut, span, splits_of
from pallas_kernels.layout import Packed, by_query

LOWEST = -1e20  # the initial running maximum: far above MASKED, so that masked scores have probability 0
LAUNCH_ROWS = 8  # query rows of a kv head: what a tensor core takes; with 16, codes with scales per channel spill
MOST_ROWS = 16  # for queries of many heads: with 32 some widths spill kilobytes, and some do not fit B200
SHARED = 80 << 10  # bytes that fetched blocks may take, of the 99 KiB that a program of the least GPU has
RESIDENT = 2  # programs of four warps on a multiprocessor, whatever their registers
RAGGED = 4  # times as many parts as sequences of one length have, at most, of the longest of several


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """The static settings of a kernel, known when it is traced."""

    keys: GpuTensor
    values: GpuTensor
    cut: Cut
    tokens: int  # queries of a sequence
    ratio: int  # query heads of a kv head
    parts: int  # of a sequence at most
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
        """`distinct`, or at least what a tensor core takes; columns beyond the rows repeat rows."""
        return max(8, self.distinct)

    @property
    def light(self) -> bool:
        """Whether queries have 16 bits."""
        return self.dtype != jnp.float32


P = TypeVar("P", bound=AttentionPlan)


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
    """Makes the plan of a launch.

    Args:
      kind: class of the plan.
      q: queries.
      keys: packed keys.
      values: packed values.
      first: the first stored position that is read.
      window: sliding window in tokens; None where there is none.
      scale: factor of the scores.
      interpret: whether the kernel is interpreted.
      settings: block, splits, num_warps and num_stages.

    Returns:
      The plan, and the warps and stages of the launch.

    Raises:
      NotImplementedError: the packing does not suit the kernels.
    """
    batch, tokens, ratio = q.shape[0], q.shape[1], q.shape[2] // keys.shape[1]
    parts = settings["splits"] * (RAGGED if batch > 1 else 1)
    stored = GpuTensor.of(keys), GpuTensor.of(values)
    own = cut(list(stored), 0, settings["block"])
    dtype = jnp.dtype(q.dtype)
    plan = kind(*stored, own, tokens, ratio, parts, first, window, scale, dtype, interpret)
    return plan, {name: settings[name] for name in ("num_warps", "num_stages")}


def share_of(plan: AttentionPlan, splits: int, start: Int[Array, "B"], stop: Int[Array, "B"]) -> Int32[Array, "1"]:
    """Chooses how many blocks a part has, so that the parts of sequences of any lengths end together.

    Sequences of one length have `splits` parts, which fill the GPU: a wave. A longer one among shorter ones has more,
    `plan.parts` at most, and they have fewer. A wave takes as long as a part, and what a program takes besides
    (`gpu_layout.splits_of` chooses likewise where nothing is known of lengths).

    Args:
      plan: the plan.
      splits: parts of sequences of one length.
      start: position of the first query.
      stop: the position after the last that is read.

    Returns:
      Blocks of a part, at least 1.
    """
    start, stop = start.astype(jnp.int32), stop.astype(jnp.int32)
    begin, end = blocks_of(*span(start, stop, plan.tokens, plan.first, plan.window), plan.cut.block)
    blocks = jnp.maximum(end - begin, 0)
    if len(blocks) == 1:
        return jnp.maximum(-(-blocks // splits), 1)
    each = jnp.maximum(-(-blocks.max() // jnp.arange(1, plan.parts + 1)), 1)
    parts = (-(-blocks[:, None] // each)).sum(0)
    time = -(-parts // (splits * len(blocks))) * (each + STARTUP)
    return each[jnp.argmin(time)].astype(jnp.int32)[None]


def settings_of(
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    rows: int,
    *,
    buffers: int,
    resident: int = RESIDENT,
) -> dict[str, int]:
    """Chooses block, splits, warps and stages.

    Args:
      q: queries of a launch.
      keys: packed keys.
      values: packed values.
      rows: tokens that a sub-tile should have; the packing may need more.
      buffers: blocks that shared memory holds with 3 stages.
      resident: programs of four warps that a multiprocessor holds at least. Of eight warps it holds one.

    Returns:
      The settings by name.
    """
    batch, kv_heads = q.shape[0], keys.shape[1]
    block = cut([GpuTensor.of(keys), GpuTensor.of(values)], rows).block
    light = q.dtype == jnp.bfloat16
    slots = cores() * (resident if light else 1)
    splits = splits_of(batch * kv_heads, -(-keys.shape[2] // block), slots)
    # With 2 stages a block is awaited right after its copy is issued; with 3 it is fetched a block ahead.
    fits = buffers * block * (_token_bytes(keys) + _token_bytes(values)) <= SHARED
    return {"block": block, "splits": splits, "num_warps": 4 if light else 8, "num_stages": 3 if fits else 2}


def _token_bytes(packed: Packed) -> float:
    """Bytes of a token's codes, or exact values, of one head."""
    return sum(plane.size * plane.dtype.itemsize for plane in packed.planes) / math.prod(packed.shape[:3])


def result(
    output: Float32[Array, "B K N R V"], lse: Float32[Array, "B K N R"], queries: int
) -> tuple[Float32[Array, "B T H V"], Float32[Array, "B T H"]]:
    """Merges the parts of every kv head and orders rows by query.

    Args:
      output: output of each of N parts.
      lse: log-sum-exp of each part.
      queries: T.

    Returns:
      The output and its log-sum-exp.
    """
    merged, total = merge(output, lse)
    return by_query(merged, queries), by_query(total[..., None], queries)[..., 0]


def merge(
    output: Float32[Array, "B K N R V"], lse: Float32[Array, "B K N R"]
) -> tuple[Float32[Array, "B K R V"], Float32[Array, "B K R"]]:
    """Merges attention over N parts of the keys.

    Args:
      output: output of each part.
      lse: log-sum-exp of each part.

    Returns:
      The output over all keys and its log-sum-exp.
    """
    if lse.shape[2] == 1:
        return output[:, :, 0], lse[:, :, 0]
    highest = lse.max(2, keepdims=True)
    weights = jnp.exp(lse - highest)
    total = weights.sum(2)
    merged = (output * weights[..., None]).sum(2) / total[..., None]
    return merged, highest[:, :, 0] + jnp.log(total)
