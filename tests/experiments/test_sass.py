"""What is read from machine code: loops written by hand, whose distances can be counted."""

from __future__ import annotations

import pytest

from kvjax.experiments import sass

HEAD = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R8, desc[UR6][R8.64] ;
"""


def kernel(*lines: str, head: str = HEAD) -> str:
    """A loop of these instructions and the branch back; an inner loop that loads nothing comes before it."""
    code = ["IADD3 R2, R2, 0x1, RZ", "@P1 BRA `(.L_x_7)"]
    body = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
    small = [f"        /*00{i}0*/                   {line} ;" for i, line in enumerate(code)]
    return "\n".join([head, ".L_x_7:", *small, ".L_x_1:", *body, "        /*0f00*/   @P0 BRA `(.L_x_1) ;", ".L_x_9:"])


def copying(outstanding: int, *, late: bool) -> str:
    """Two groups of copies a turn, at its end or its beginning, and a wait that leaves some outstanding."""
    copies = ["LDGSTS.E.BYPASS.128 [R4], desc[UR6][R6.64], !P1", "LDGDEPBAR"] * 2
    wait = [f"DEPBAR.LE SB0, {outstanding:#x}", *["FADD R1, R1, R2"] * 15]
    return kernel(*(wait + copies if late else copies + wait))


@pytest.mark.parametrize(
    ("text", "distance"),
    [
        (copying(0, late=True), 3),  # its commit, the branch, the wait
        (copying(2, late=True), 21 + 3),  # two groups may be outstanding: those of the turn before
        (copying(4, late=True), 42 + 3),
        (copying(0, late=False), 2),
        (copying(1, late=False), 4),  # the second copy is waited for in the next turn
    ],
)
def test_copies_are_followed_to_their_wait(text: str, distance: int) -> None:
    found = sass.figures(text, 128, 1024)
    assert found["loop"] == 21 and found["load_bytes"] == {"16": 2} and found["per_element"] == 21 * 128 / 1024
    assert found["copy_distance"] == distance and found["load_distance"] is None and found["waits"] == 0


def test_loads_are_followed_to_their_first_use() -> None:
    text = kernel(
        "LDG.E.U16 R10, desc[UR6][R34.64]",
        "FADD R1, R1, R2",
        "HADD2.F32 R11, -RZ, R10.H0_H0",  # waits for the first
        "@P0 LDG.E.64 R20, desc[UR6][R36.64]",
        "FADD R1, R1, R3",
        "FADD R1, R1, R3",
        "FADD R1, R1, R21",  # the second half of the second
        "FADD R1, R1, R12",
        "LDG.E R12, desc[UR6][R38.64]",  # used in the next turn
    )
    found = sass.figures(text, 128, None)
    assert found["load_bytes"] == {"2": 1, "4": 1, "8": 1}
    assert (found["load_distance"], found["waits"]) == (2, 2)
    assert found["per_element"] is None and found["copy_distance"] is None


def test_products_read_several_registers() -> None:
    load, product = "LDG.E.128 R40, desc[UR6][R34.64]", "HMMA.16816.F32.BF16 R4, {}, {}, R4"
    assert sass.figures(kernel(load, product.format("R38", "R60")), 128, None)["load_distance"] == 1
    assert (
        sass.figures(kernel(load, product.format("R36", "R60"), "STS.128 [R40], R8"), 128, None)["load_distance"] == 2
    )
    assert sass.figures(kernel(load, "STS.128 [R9], R37"), 128, None)["load_distance"] == 1


def test_no_loop_no_figures() -> None:
    assert sass.figures(HEAD, 128, None) == {}
    assert sass.figures(kernel("FADD R1, R1, R2"), 128, None) == {}


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [  # as in NVIDIA's table of occupancy, for 228 KiB a multiprocessor
        (96, 0, 128, 5),
        (97, 0, 128, 4),
        (128, 0, 128, 4),
        (168, 0, 128, 3),
        (255, 0, 128, 2),
        (255, 0, 256, 1),
        (32, 0, 128, 16),
        (96, 68_608, 128, 3),
    ],
)
def test_resident_blocks(registers: int, shared: int, threads: int, blocks: int) -> None:
    assert sass.resident(registers, shared, threads, 228 << 10) == blocks
