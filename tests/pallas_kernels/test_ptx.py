"""The inline PTX of the Triton kernels, which no interpreter runs: its few instructions emulated over all codes."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import gpu_layout
from pallas_kernels.layout import PLANES

FLOATS = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}


def emulate(code: str, registers: dict[str, int]) -> dict[str, int]:
    """Registers, 32 bits each, after the code."""
    registers = dict(registers)
    for line in filter(None, map(str.strip, code.split(";"))):
        if line.startswith(".reg"):
            continue
        operation, rest = line.split(None, 1)
        target, *operands = (operand.strip() for operand in rest.split(","))
        given = [registers[x] if x in registers else int(x, 0) & 0xFFFFFFFF for x in operands]
        registers[target] = execute(operation, given) & 0xFFFFFFFF
    return registers


def execute(operation: str, given: list[int]) -> int:
    match operation.split("."):
        case ["mov", _]:
            return given[0]
        case ["shr", _]:
            return given[0] >> given[1]
        case ["shl", _]:
            return given[0] << given[1]
        case ["and", _]:
            return given[0] & given[1]
        case ["or", _]:
            return given[0] | given[1]
        case ["not", _]:
            return ~given[0]
        case ["prmt", _]:
            both = [x >> 8 * i & 255 for x in given[:2] for i in range(4)]
            return sum(both[given[2] >> 4 * i & 7] << 8 * i for i in range(4))
        case [name, "rn", kind]:
            values = [np.array([x], np.uint32).view(FLOATS[kind]).astype(np.float64) for x in given]
            exact = values[0] - values[1] if name == "sub" else values[0] * values[1] + values[2]
            assert name in ("sub", "fma")
            return int(exact.astype(FLOATS[kind]).view(np.uint32)[0])
    raise AssertionError(f"{operation} is not emulated")


def word(values) -> int:
    return int(np.asarray(values).astype(np.uint8).view(np.uint32)[0])


def floats(registers: dict[str, int], kind: str):
    return np.array([registers["$0"], registers["$1"]], np.uint32).view(FLOATS[kind]).astype(np.float64)


def cases(bits: int):
    """Bytes of every plane, their shifts and the codes in them: all bytes of one plane, random pairs of two."""
    widths, rng = PLANES[bits], np.random.default_rng(bits)
    for shifts in itertools.product(*(range(0, 8, width) for width in widths)):
        groups = np.arange(256).reshape(64, 1, 4) if len(widths) == 1 else rng.integers(0, 256, (64, 2, 4))
        for planes in groups:
            codes, low = np.zeros(4, int), 0
            for plane, shift, width in zip(planes, shifts, widths, strict=True):
                codes += ((plane >> shift) & ((1 << width) - 1)) << low
                low += width
            yield planes, list(shifts), codes


@pytest.mark.parametrize("bits", PLANES)
def test_codes_in_bfloat16(bits: int) -> None:
    for planes, shifts, codes in cases(bits):
        code = gpu_layout._unpack(PLANES[bits], shifts, 2) + gpu_layout._bfloat16(bits)
        registers = emulate(code, {f"${2 + i}": word(plane) for i, plane in enumerate(planes)})
        np.testing.assert_array_equal(floats(registers, "bf16x2"), codes + (-128 if bits == 8 else 128))


@pytest.mark.parametrize("bits", PLANES)
def test_values_in_float16(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for planes, shifts, codes in cases(bits):
        scale, zero = rng.random(4).astype(np.float16), rng.standard_normal(4).astype(np.float16)
        first = 2 + len(planes)
        code = gpu_layout._unpack(PLANES[bits], shifts, 2) + gpu_layout._float16(first)
        words = [*map(word, planes), *map(int, scale.view(np.uint32)), *map(int, zero.view(np.uint32))]
        registers = emulate(code, {f"${2 + i}": each for i, each in enumerate(words)})
        wanted = (codes * scale.astype(np.float64) + zero).astype(np.float16)
        np.testing.assert_array_equal(floats(registers, "f16x2"), wanted)
