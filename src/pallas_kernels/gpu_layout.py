"""Layout of packed tensors for GPU kernels: which bytes hold which tokens, and how bytes become floats.

Attention does not depend on the order of tokens, so codes are never interleaved. A program's block of tokens is split
into sub-tiles: runs of tokens that have a single shift in every plane that the program reads. In every plane, a
sub-tile is then a set of whole byte rows and one shift.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.layout import EXACT, PLANES, Packed

LOG2_E = math.log2(math.e)
LIFT = 1024.0  # float16 probabilities are multiplied by it, to stay away from subnormal numbers
CORES = 132  # multiprocessors, where there is no GPU: those of an H100
STARTUP = 2  # what a program takes besides its blocks, in blocks: its queries, the first block's latency, its output
CAPABILITY = 8.0  # of a GPU at least
SMALLEST = 16  # the smallest size of the summed axis on a tensor core
BYTES = 0x01010101  # a mask of one byte, times this, masks the four bytes of a register


def device() -> jax.Device:
    """Returns the device that kernels are planned for; programs that compile for another one put it here."""
    return jax.devices()[0]


def check_gpu() -> None:
    """Raises NotImplementedError unless the GPU is one for which Triton compiles these kernels."""
    found = getattr(device(), "compute_capability", "unknown")
    if not re.fullmatch(r"\d+\.\d+", found) or float(found) < CAPABILITY:
        raise NotImplementedError(
            f"a GPU of capability {found}; kernels are for NVIDIA's, of {CAPABILITY} (Ampere) and above"
        )


def cores() -> int:
    """Returns how many multiprocessors the GPU has."""
    return getattr(device(), "core_count", CORES)


def splits_of(programs: int, blocks: int, slots: int, least: int = 2) -> int:
    """Chooses into how many parts sequences are split, so that whole waves of programs fill the GPU.

    A wave takes as long as the blocks of its longest part. More parts make parts shorter, and more waves. Of equals,
    the fewest parts are best: they are merged afterwards.

    Args:
      programs: how many there are without splitting.
      blocks: of a sequence.
      slots: how many programs the GPU runs at once.
      least: blocks of a part at least.

    Returns:
      The number of parts.
    """

    def time(parts: int) -> int:
        waves = -(-programs * parts // slots)
        return waves * (-(-blocks // parts) + STARTUP)

    return min(range(1, max(1, -(-blocks // least)) + 1), key=time)


def span(start: Array, stop: Array, tokens: int, first: int, window: int | None) -> tuple[Array, Array]:
    """Returns the range [low, end) of positions that any of `tokens` queries, the first at `start`, sees."""
    low = jnp.full_like(start, first) if window is None else jnp.maximum(first, start + 1 - window)
    return low, jnp.minimum(stop, start + tokens)


def blocks_of(low: Array, end: Array, block: int) -> tuple[Array, Array]:
    """Returns the range of blocks that hold positions in [low, end); it may end before it begins."""
    return quotient(low, block), quotient(end + block - 1, block)


def power_of_two(x: int) -> bool:
    """Whether a positive number is a power of two."""
    return x & (x - 1) == 0


def quotient(x: Int32[Array, "*s"], y: int) -> Int32[Array, "*s"]:
    """x // y for x >= 0, without the instructions that `//` needs for negative numbers."""
    return jax.lax.div(x, jnp.full(x.shape, y, x.dtype))


def remainder(x: Int32[Array, "*s"], y: int) -> Int32[Array, "*s"]:
    """x % y for x >= 0."""
    return jax.lax.rem(x, jnp.full(x.shape, y, x.dtype))


@dataclasses.dataclass(frozen=True)
class GpuTensor:
    """The static part of a packed tensor, known when a kernel is traced; fields as in `layout.Packed`."""

    bits: int
    per: str
    group: int
    pack: int
    tokens: int
    channels: int

    @classmethod
    def of(cls, packed: Packed) -> GpuTensor:
        return cls(packed.bits, packed.per, packed.group, packed.pack, packed.shape[2], packed.shape[3])

    @property
    def exact(self) -> bool:
        return self.bits == EXACT

    @property
    def widths(self) -> tuple[int, ...]:
        return (8,) if self.exact else PLANES[self.bits]

    @property
    def groups(self) -> int:
        """How many groups of channels of a token have different scales."""
        return 1 if self.exact or self.per == "channel" else self.channels // self.group

    def place(self, plane: int, first: int) -> tuple[int, int]:
        """Locates the sub-tile that begins at token `first` of a span.

        Args:
          plane: index of the plane.
          first: the first token of the sub-tile within the span.

        Returns:
          Its first byte row in the plane, and the shift.
        """
        if self.exact:
            return first, 0
        width = self.widths[plane]
        run = self.pack * width // 8
        return first // self.pack * run + first % self.pack % run, first % self.pack // run * width

    def shared_tokens(self, run: int) -> int:
        """How many neighbouring tokens of a run always share scales per channel."""
        return math.gcd(self.group, run)

    def assembly(self, first: int, scaled: bool) -> str:
        """Writes PTX that turns the bytes of each plane into floats, four elements at a time.

        Args:
          first: the first token of the sub-tile within the span.
          scaled: gives codes * scale + zero in float16; otherwise codes in bfloat16, plus 128 (minus 128 at 8 bits).

        Returns:
          The instructions.
        """
        planes = range(len(self.widths))
        code = _unpack(self.widths, [self.place(plane, first)[1] for plane in planes], 2)
        return f"{{ {code} {_float16(2 + len(planes)) if scaled else _bfloat16(self.bits)} }}"

    def operands(self, scaled: bool) -> str:
        """Writes the operand constraints of `assembly`.

        They are two results, a register per plane and, with `scaled`, two registers each for scale and zero point. A
        result shares no register with an argument, because arguments are read after the first result is written.
        """
        return ",".join(["=&r", "=&r", *["r"] * (len(self.widths) + 4 * scaled)])

    def offset(self, light: bool) -> int:
        """The number by which codes in bfloat16 are too large.

        A code replaces the last digits of a float. That float is left in, because subtracting it from sums is cheaper
        than from every code. With `light` False, codes are in float32 and exact.
        """
        return 0 if not light else -128 if self.bits == 8 else 128


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a block of tokens is split into sub-tiles.

    A block is `repeats` spans of `span` tokens. A span is split into runs of `run` tokens, and run m of every span
    belongs to sub-tile m.
    """

    span: int
    run: int
    repeats: int

    @property
    def block(self) -> int:
        return self.span * self.repeats

    @property
    def rows(self) -> int:
        """Tokens of a sub-tile."""
        return self.run * self.repeats

    @property
    def tiles(self) -> int:
        return self.span // self.run

    def spans(self, block: Array) -> Int32[Array, "rows"]:
        """The index of the span of each token of a sub-tile."""
        return block * self.repeats + quotient(jnp.arange(self.rows), self.run)

    def positions(self, block: Array, tile: int) -> Int32[Array, "rows"]:
        return self.spans(block) * self.span + tile * self.run + remainder(jnp.arange(self.rows), self.run)


def cut(streams: list[GpuTensor], rows: int, block: int | None = None) -> Cut:
    """Splits blocks of tensors that are read side by side.

    Args:
      streams: the tensors.
      rows: tokens that a sub-tile should have at least, where `block` is None.
      block: tokens of a block; None for the smallest block that `rows` allows.

    Returns:
      The split.

    Raises:
      NotImplementedError: packing blocks or `block` do not fit powers of two.
    """
    packed = [s for s in streams if not s.exact]
    if any(not power_of_two(s.pack) for s in packed):
        raise NotImplementedError(f"packs of {', '.join(str(s.pack) for s in packed)}; expected powers of two")
    span = max([s.pack for s in packed], default=SMALLEST)
    run = min([s.pack * min(s.widths) // 8 for s in packed], default=span)
    smallest = span * max(1, SMALLEST // run)
    if block is not None and (block % smallest or not power_of_two(block // smallest)):
        raise NotImplementedError(f"blocks of {block} tokens; expected {smallest} times a power of two")
    return Cut(span, run, block // span if block is not None else max(1, rows // run, smallest // span))


def _unpack(widths: tuple[int, ...], shifts: list[int], first: int) -> str:
    """PTX that fills register t with four codes, from the bytes of the planes in the operands from `first` on."""
    lines, low = [".reg .b32 t, u, a, b, c, d, m; mov.b32 t, 0;"], 0
    for plane, (width, shift) in enumerate(zip(widths, shifts, strict=True)):
        move = (
            f"shr.b32 u, ${first + plane}, {shift - low};"
            if shift >= low
            else f"shl.b32 u, ${first + plane}, {low - shift};"
        )
        lines.append(f"{move} and.b32 u, u, {((1 << width) - 1 << low) * BYTES:#x}; or.b32 t, t, u;")
        low += width
    return " ".join(lines)


def _bfloat16(bits: int) -> str:
    """PTX that turns codes in t into bfloat16 by writing them into the mantissa of 128, which has 7 bits.

    For codes of 8 bits, the low 7 bits are written, and 128 or 256 is subtracted, depending on the high bit: the
    result is the code minus 128.
    """
    spread = "mov.b32 m, 0x43434343; prmt.b32 {0}, {2}, m, 0x4140; prmt.b32 {1}, {2}, m, 0x4342;"
    if bits < 8:
        return spread.format("$0", "$1", "t")
    high = "not.b32 u, t; and.b32 u, u, 0x80808080; and.b32 t, t, 0x7f7f7f7f;"
    minus = "mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, c, m, a; fma.rn.bf16x2 $1, d, m, b;"
    return f"{high} {spread.format('a', 'b', 't')} {spread.format('c', 'd', 'u')} {minus}"


def _float16(first: int) -> str:
    """PTX that turns codes in t into float16 by the mantissa of 1024, then multiplies by scale and adds zero.

    Scale and zero point are in the operands from `first` on.
    """
    spread = "mov.b32 m, 0x64646464; prmt.b32 a, t, m, 0x4140; prmt.b32 b, t, m, 0x4342;"
    minus = "mov.b32 m, 0x64006400; sub.rn.f16x2 a, a, m; sub.rn.f16x2 b, b, m;"
    scaled = f"fma.rn.f16x2 $0, a, ${first}, ${first + 2}; fma.rn.f16x2 $1, b, ${first + 1}, ${first + 3};"
    return f"{spread} {minus} {scaled}"
