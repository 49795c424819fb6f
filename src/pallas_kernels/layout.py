"""The packed layout that every kernel reads and writes.

A tensor [B, K, S, D] (batch, heads, tokens, channels) is stored in packing blocks of `pack` tokens. A width is a
sum of power-of-two planes (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2), low bits first, so that b bits cost b bits. Within a
plane of w bits a packing block is planar along its tokens: byte row i of it holds tokens i, i + pack*w/8, i +
2*pack*w/8, ..., lowest bits first, so that unpacking is one shift and one mask of whole rows.

Values are x = code * scale + zero, with scale and zero point in float16 for each group: `group` channels of a token
(per "token"; the axis of tokens is stored last) or `group` tokens of a channel (per "channel").
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Int, UInt8

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
EXACT = 16  # the width that means unquantised
MOST_ROWS = 128  # query rows of a kv head that kernels serve; with more, XLA is faster on CPU
MASKED = -1e30  # score of a masked key; finite, so that a row that has seen no key does not become NaN

Attended = tuple[Float32[Array, "B T H V"], Float32[Array, "B T H"]]
"""Output and log-sum-exp of queries."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed tensor.

    Attributes:
      planes: one array [B, K, S*w/8, D] of bytes per plane; at 16 bits the values themselves, [B, K, S, D].
      scale: [B, K, D/group, S] per token, [B, K, S/group, D] per channel; None at 16 bits.
      zero: zero points, like `scale`.
      bits: code width, or 16 for exact values.
      per: "token" or "channel", see above.
      group: elements of a group.
      pack: tokens of a packing block.
    """

    planes: tuple[UInt8[Array, "B K _ D"], ...]
    scale: Float16[Array, "B K _ _"] | None
    zero: Float16[Array, "B K _ _"] | None
    bits: int = dataclasses.field(metadata={"static": True})
    per: str = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    pack: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, K, S, D of the values."""
        batch, heads, rows, channels = self.planes[0].shape
        width = 8 if self.bits == EXACT else PLANES[self.bits][0]
        return batch, heads, rows * 8 // width, channels


def dequantize(packed: Packed) -> Float[Array, "B K S D"]:
    """Dequantises a packed tensor, simply and slowly, for references and tests.

    Args:
      packed: the tensor.

    Returns:
      All values, in float32.
    """
    if packed.scale is None or packed.zero is None:
        return packed.planes[0].astype(jnp.float32)
    batch, heads, tokens, channels = packed.shape
    codes, low = jnp.zeros((batch, heads, tokens, channels), jnp.uint8), 0
    for width, plane in zip(PLANES[packed.bits], packed.planes, strict=True):
        blocks = plane.reshape(batch, heads, tokens // packed.pack, 1, -1, channels)
        shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None, None]
        part = (blocks >> shifts) & ((1 << width) - 1)
        codes, low = codes | (part.reshape(codes.shape) << low), low + width
    scale, zero = (a.astype(jnp.float32) for a in (packed.scale, packed.zero))
    if packed.per == "token":
        scale, zero = (jnp.repeat(a.swapaxes(2, 3), packed.group, 3) for a in (scale, zero))
    else:
        scale, zero = (jnp.repeat(a, packed.group, 2) for a in (scale, zero))
    return codes.astype(jnp.float32) * scale + zero


def by_kv_head(q: Float[Array, "B T H D"], kv_heads: int) -> Float[Array, "B K R D"]:
    """Groups queries by the kv head that they read.

    Args:
      q: queries.
      kv_heads: K.

    Returns:
      R = T * H/K rows per kv head, the heads of a token side by side.
    """
    batch, tokens, _, channels = q.shape
    rows = q.reshape(batch, tokens, kv_heads, -1, channels).swapaxes(1, 2)
    return rows.reshape(batch, kv_heads, -1, channels)


def by_query(rows: Float[Array, "B K R D"], tokens: int) -> Float[Array, "B T H D"]:
    """Reverses `by_kv_head`.

    Args:
      rows: rows per kv head.
      tokens: queries T of a sequence.

    Returns:
      Rows by query and head.
    """
    batch, kv_heads, _, channels = rows.shape
    q = rows.reshape(batch, kv_heads, tokens, -1, channels).swapaxes(1, 2)
    return q.reshape(batch, tokens, -1, channels)


def in_launches(
    launch: Callable[..., Attended],
    q: Float[Array, "B T H D"],
    start: Int[Array, "B"],
    kv_heads: int,
    *,
    rows: int,
    most: int,
) -> Attended:
    """Attention by as many launches as the queries need, one after the other.

    A launch holds the running sums of its queries in registers or VMEM, which limits their number; every launch
    reads all keys.

    Args:
      launch: `launch(q, start)` attends for some consecutive queries of each sequence.
      q: queries.
      start: position of the first query, per sequence.
      kv_heads: K.
      rows: query rows of a kv head that a launch takes, where that is a query at least.
      most: rows that a launch takes at most, for queries of many heads.

    Returns:
      Output and log-sum-exp of all queries.

    Raises:
      NotImplementedError: there are more than `MOST_ROWS` rows, or a query has more heads than a launch takes.
    """
    batch, tokens, heads, channels = q.shape
    ratio = heads // kv_heads
    if tokens * ratio > MOST_ROWS or ratio > most:
        limit = most if ratio > most else MOST_ROWS
        raise NotImplementedError(f"{tokens * ratio} query rows per kv head; expected at most {limit}")
    count = -(-tokens // max(1, rows // ratio))
    if count == 1:
        return launch(q, start)
    size = -(-tokens // count)
    q = jnp.pad(q, ((0, 0), (0, count * size - tokens), (0, 0), (0, 0)))
    parts = q.reshape(batch, count, size, heads, channels).swapaxes(0, 1)
    starts = start + size * jnp.arange(count, dtype=start.dtype)[:, None]
    output, lse = jax.lax.map(lambda part: launch(*part), (parts, starts))
    output, lse = (a.swapaxes(0, 1).reshape(batch, count * size, *a.shape[3:])[:, :tokens] for a in (output, lse))
    return output, lse


def check(name: str, packed: Packed) -> None:
    """Checks that the arrays of a packed tensor fit together.

    Args:
      name: name of the argument, for messages.
      packed: the tensor.

    Raises:
      ValueError: they do not.
    """
    if packed.bits != EXACT and packed.bits not in PLANES:
        raise ValueError(f"{name}: {packed.bits} bits; expected one of {', '.join(map(str, PLANES))} or {EXACT}")
    if packed.per not in ("token", "channel"):
        raise ValueError(f"{name}: per {packed.per!r}; expected token or channel")
    widths = (8,) if packed.bits == EXACT else PLANES[packed.bits]
    if len(packed.planes) != len(widths) or any(plane.ndim != 4 for plane in packed.planes):
        raise ValueError(f"{name}: expected {len(widths)} planes [B, K, rows, D]")
    batch, heads, tokens, channels = packed.shape
    for plane, width in zip(packed.planes, widths, strict=True):
        if plane.shape != (batch, heads, tokens * width // 8, channels):
            raise ValueError(
                f"{name}: a plane of {plane.shape}; expected {(batch, heads, tokens * width // 8, channels)}"
            )
        if packed.bits != EXACT and plane.dtype != jnp.uint8:
            raise ValueError(f"{name}: a plane of {plane.dtype}; expected uint8")
    if packed.bits == EXACT:
        return
    if packed.pack % 8 or packed.pack < 8 or tokens % packed.pack:
        raise ValueError(f"{name}: pack {packed.pack}; expected a multiple of 8 that divides the {tokens} tokens")
    size, what = (channels, "channels") if packed.per == "token" else (tokens, "tokens")
    if packed.group < 1 or size % packed.group:
        raise ValueError(f"{name}: group {packed.group} does not divide the {size} {what}")
    groups = (channels // packed.group, tokens) if packed.per == "token" else (tokens // packed.group, channels)
    for part, array in (("scale", packed.scale), ("zero", packed.zero)):
        if array is None or array.shape != (batch, heads, *groups) or array.dtype != jnp.float16:
            found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"{name}.{part}: {found}; expected float16{[batch, heads, *groups]}")


def within(lengths: Int[Array, "B"], tokens: int) -> Int[Array, "B"]:
    """Clips lengths to a buffer: under jit, `check_bound` does not see their values, and kernels would read on.

    Args:
      lengths: a length per sequence.
      tokens: allocated tokens of the buffer.

    Returns:
      The lengths, in int32.
    """
    return jnp.clip(lengths.astype(jnp.int32), 0, tokens)


def check_bound(name: str, lengths: Int[Array, "B"], tokens: int) -> None:
    """Checks that lengths lie within a buffer, where their values are known before the launch.

    Args:
      name: name of the argument, for messages.
      lengths: a length per sequence.
      tokens: allocated tokens of the buffer.

    Raises:
      ValueError: a length is beyond the buffer.
    """
    if not isinstance(lengths, jax.core.Tracer) and bool((lengths > tokens).any()):
        raise ValueError(f"{name}: {int(lengths.max())} is beyond the buffer of {tokens} tokens")


def check_span(
    start: Int[Array, "B"], stop: Int[Array, "B"], first: int, window: int | None, batch: int, tokens: int
) -> None:
    """Checks the span of stored positions that queries read.

    Args:
      start: position of the first query, per sequence.
      stop: the position after the last that is read, per sequence.
      first: the first position that is read.
      window: sliding window in tokens; None where there is none.
      batch: sequences.
      tokens: allocated tokens of the buffer.

    Raises:
      ValueError: an argument has the wrong type or shape, or lies outside the buffer.
    """
    for name, array in (("start", start), ("stop", stop)):
        if array.shape != (batch,) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name}: {array.dtype}{list(array.shape)}; expected integers [{batch}]")
    if not 0 <= first <= tokens:
        raise ValueError(f"first: {first}; expected 0 to the {tokens} tokens of the buffer")
    if window is not None and window < 1:
        raise ValueError(f"window: {window}; expected at least 1")
    check_bound("stop", stop, tokens)


def implementation_of(op: str, name: str, names: Sequence[str], function: str | None = None) -> Callable:
    """Imports an implementation of an op.

    Args:
      op: full name of the op's package.
      name: name of the implementation, a module of that package.
      names: the implementations that the op has.
      function: name of the function; that of the op where None.

    Returns:
      The function.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: a package that it needs is not installed.
    """
    if name not in names:
        raise ValueError(f"implementation {name!r}; expected one of {', '.join(names)}")
    try:
        module = importlib.import_module(f"{op}.{name}")
    except ImportError as error:
        raise NotImplementedError(f"{name}: {error}") from None
    return getattr(module, function or op.rpartition(".")[2])
