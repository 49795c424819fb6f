"""What a GPU kernel's machine code shows without a GPU: how far ahead its main loop loads, how wide, and its length.

The text is that of `nvdisasm -c`. The main loop is the longest one that loads from global memory. Distances are in
instructions of one warp along the loop, over as many turns of it as they take.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

REGISTERS = 65536  # of a multiprocessor
WARPS = 64  # that it holds at most
RESERVED = 1024  # bytes of shared memory that each block takes besides its own
TURNS = 8  # of a loop that are followed
NARROW = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes of a load; others have 4


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its name with modifiers, as in LDG.E.128, and its operands."""

    name: str
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """What a load or store moves for each thread."""
        return next((NARROW[part] for part in self.name.split(".")[1:] if part in NARROW), 4)

    def reads(self, wanted: set[int]) -> bool:
        """Whether it reads any of these registers."""
        stores = self.kind.startswith("ST") or self.kind in ("LDGSTS", "RED", "BRA")
        sources = self.operands if stores else self.operands[1:]
        widths = {0: 4, 1: 2, 2: 4} if self.kind == "HMMA" else {len(sources) - 1: self.bytes // 4} if stores else {}
        for place, operand in enumerate(sources):
            for first in map(int, re.findall(r"\bR(\d+)", operand)):
                if wanted & set(range(first, first + widths.get(place, 1))):
                    return True
        return False

    def writes(self) -> set[int]:
        """The registers that a load fills."""
        first = re.match(r"R(\d+)", self.operands[0]) if self.operands else None
        return set(range(int(first[1]), int(first[1]) + max(1, self.bytes // 4))) if first else set()


def resident(registers: int, shared: int, threads: int, shared_core: int) -> int:
    """How many blocks a multiprocessor holds at once.

    Registers are handed out to warps, 8 a thread at a time.

    Args:
      registers: of a thread.
      shared: bytes of shared memory of a block.
      threads: of a block.
      shared_core: bytes of shared memory of the multiprocessor.
    """
    warps = -(-threads // 32)
    by_registers = REGISTERS // (32 * (-(-registers // 8) * 8)) // warps
    return min(by_registers, WARPS // warps, shared_core // (shared + RESERVED))


def figures(text: str, threads: int, elements: int | None) -> dict[str, Any]:
    """Counts of a kernel's main loop.

    Args:
      text: the kernel's machine code, by nvdisasm.
      threads: of a block.
      elements: that a block handles in a turn of the loop; None where it is not known.

    Returns:
      Nothing where no loop loads anything. Otherwise instructions of the loop; load_bytes, how many loads move how
      many bytes a thread; copy_distance, the fewest instructions from an asynchronous copy into shared memory to the
      wait for it; load_distance, the fewest from a load into registers to its first use; waits, how many loads of a
      turn are each issued after the one before was waited for; per_element, instructions that threads execute for an
      element. Distances are None where nothing is loaded in that way.
    """
    loop = main_loop(text)
    if not loop:
        return {}
    copies, loads = list(_copies(loop)), list(_loads(loop))
    counts = Counter(i.bytes for i in loop if _is_load(i))
    return {
        "loop": len(loop),
        "load_bytes": {str(size): counts[size] for size in sorted(counts)},
        "copy_distance": min((end - begin for begin, end in copies), default=None),
        "load_distance": min((end - begin for begin, end in loads), default=None),
        "waits": _waits(loads, len(loop)),
        "per_element": None if elements is None else len(loop) * threads / elements,
    }


def main_loop(text: str) -> list[Instruction]:
    """The instructions of the longest loop that loads from global memory; none where there is no such loop."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    found: list[list[Instruction]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            instructions.append(Instruction(code[1], tuple(filter(None, re.split(r",\s*", code[2])))))
            target = re.search(r"\.L_x_\d+", code[2])
            if code[1].startswith("BRA") and target and labels.get(target[0], len(instructions)) < len(instructions):
                found.append(instructions[labels[target[0]] :])
    return max((loop for loop in found if any(map(_is_load, loop))), key=len, default=[])


def _is_load(instruction: Instruction) -> bool:
    return instruction.kind in ("LDG", "LDGSTS")


def _loads(loop: list[Instruction]) -> Iterator[tuple[int, int]]:
    """Where each load into registers is issued and where it is used first, which may be in a later turn."""
    for begin, load in enumerate(loop):
        if load.kind == "LDG":
            filled = load.writes()
            later = range(begin + 1, begin + 1 + len(loop))
            yield begin, next((at for at in later if loop[at % len(loop)].reads(filled)), later[-1])


def _copies(loop: list[Instruction]) -> Iterator[tuple[int, int]]:
    """Where each asynchronous copy is issued and where it is waited for.

    Copies are committed in groups (LDGDEPBAR); DEPBAR.LE SB0, n waits until all but the last n groups are there.
    """
    for begin, copy in enumerate(loop):
        committed = 0
        for at in range(begin, TURNS * len(loop)) if copy.kind == "LDGSTS" else ():
            now = loop[at % len(loop)]
            committed += now.kind == "LDGDEPBAR"
            if committed and now.name == "DEPBAR.LE" and committed > int(now.operands[1], 16):
                yield begin, at
                break


def _waits(loads: list[tuple[int, int]], turn: int) -> int:
    """The most loads of which each is issued after the one before is used; those of a later turn wait for nothing."""
    count, free = 0, 0
    for begin, end in sorted(loads, key=lambda load: load[1]):
        if begin >= free and end < turn:
            count, free = count + 1, end
    return count
