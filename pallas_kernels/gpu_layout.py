"""Which bytes hold which tokens, for kernels of GPUs, and how bytes become floats.

Attention does not care about the order of tokens, so codes are never interleaved. A program's block of tokens falls
into sub-tiles, at the finest granularity of all planes it reads: runs of tokens that lie at one shift of every plane.
A sub-tile is then, in every plane, a set of whole byte rows and one shift.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.layout import EXACT, PLANES, Packed

LOG2_E = math.log2(math.e)
LIFT = 1024.0  # float16 probabilities are stored this much larger, away from its smallest numbers
PROGRAMS = 2 * 132  # enough to fill a large GPU
SMALLEST = 16  # what a tensor core multiplies at least along the summed axis
BYTES = 0x01010101  # a mask of one byte, times this, masks the four bytes of a register


def power_of_two(x: int) -> bool:
    return x & (x - 1) == 0


def quotient(x: Int32[Array, "*s"], y: int) -> Int32[Array, "*s"]:
    """x // y of what is not negative, without the instructions by which `//` minds the sign."""
    return jax.lax.div(x, jnp.full(x.shape, y, x.dtype))


def remainder(x: Int32[Array, "*s"], y: int) -> Int32[Array, "*s"]:
    """x % y of what is not negative."""
    return jax.lax.rem(x, jnp.full(x.shape, y, x.dtype))


@dataclasses.dataclass(frozen=True)
class Stored:
    """The static half of a packed tensor: what a kernel knows when it is traced."""

    bits: int
    per: str
    group: int
    pack: int
    tokens: int
    channels: int

    @classmethod
    def of(cls, packed: Packed) -> Stored:
        return cls(packed.bits, packed.per, packed.group, packed.pack, packed.shape[2], packed.shape[3])

    @property
    def exact(self) -> bool:
        return self.bits == EXACT

    @property
    def widths(self) -> tuple[int, ...]:
        return (8,) if self.exact else PLANES[self.bits]

    @property
    def groups(self) -> int:
        """Groups a token's channels fall into, as far as scales differ between them."""
        return 1 if self.exact or self.per == "channel" else self.channels // self.group

    def place(self, plane: int, first: int) -> tuple[int, int]:
        """Where the sub-tile from token `first` of a span on stands: its byte row in a plane, and the shift."""
        if self.exact:
            return first, 0
        width = self.widths[plane]
        run = self.pack * width // 8
        return first // self.pack * run + first % self.pack % run, first % self.pack // run * width

    def shared_tokens(self, run: int) -> int:
        """Tokens of a run that share scales per channel for sure."""
        return math.gcd(self.group, run)

    def assembly(self, first: int, scaled: bool) -> str:
        """PTX from the bytes of each plane, four elements at a time: codes as bfloat16 (plus 128, or minus 128 at 8
        bits), or (`scaled`) with scale and zero point as float16.
        """
        planes = range(len(self.widths))
        code = _unpack(self.widths, [self.place(plane, first)[1] for plane in planes], 2)
        return f"{{ {code} {_float16(2 + len(planes)) if scaled else _bfloat16(self.bits)} }}"

    def operands(self, scaled: bool) -> str:
        """Of `assembly`: two results, which share no register with an argument, since those are read after the first
        is written, a register a plane, and two each for scale and zero point.
        """
        return ",".join(["=&r", "=&r", *["r"] * (len(self.widths) + 4 * scaled)])

    def offset(self, light: bool) -> int:
        """What codes as bfloat16 have too much: the float whose last digits a code replaces, left in, since it can be
        subtracted from sums more cheaply than from every code.
        """
        return 0 if not light else -128 if self.bits == 8 else 128


@dataclasses.dataclass(frozen=True)
class Cut:
    """Blocks of `repeats` spans; a span falls into runs of `run` tokens, and run m of every span forms sub-tile m."""

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
        """The span of each token of a sub-tile."""
        return block * self.repeats + quotient(jnp.arange(self.rows), self.run)

    def positions(self, block: Array, tile: int) -> Int32[Array, "rows"]:
        return self.spans(block) * self.span + tile * self.run + remainder(jnp.arange(self.rows), self.run)


def cut(streams: list[Stored], rows: int, block: int | None = None) -> Cut:
    """Blocks over tensors read side by side: of `block` tokens, or of the fewest whose sub-tiles have `rows`."""
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
    """PTX: register t is the codes of four bytes, from the planes' bytes in operands `first` and on."""
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
    """PTX: codes in t as bfloat16 by writing them into the mantissa of 128, where they fill 7 bits at most.

    Codes of 8 bits: the low 7 that way, minus 128 or 256 as the high bit says, is the code minus 128.
    """
    spread = "mov.b32 m, 0x43434343; prmt.b32 {0}, {2}, m, 0x4140; prmt.b32 {1}, {2}, m, 0x4342;"
    if bits < 8:
        return spread.format("$0", "$1", "t")
    high = "not.b32 u, t; and.b32 u, u, 0x80808080; and.b32 t, t, 0x7f7f7f7f;"
    minus = "mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, c, m, a; fma.rn.bf16x2 $1, d, m, b;"
    return f"{high} {spread.format('a', 'b', 't')} {spread.format('c', 'd', 'u')} {minus}"


def _float16(first: int) -> str:
    """PTX: codes in t as float16 through the mantissa of 1024, times scale plus zero from operands `first` and on."""
    spread = "mov.b32 m, 0x64646464; prmt.b32 a, t, m, 0x4140; prmt.b32 b, t, m, 0x4342;"
    minus = "mov.b32 m, 0x64006400; sub.rn.f16x2 a, a, m; sub.rn.f16x2 b, b, m;"
    scaled = f"fma.rn.f16x2 $0, a, ${first}, ${first + 2}; fma.rn.f16x2 $1, b, ${first + 1}, ${first + 3};"
    return f"{spread} {minus} {scaled}"
