"""Compiled programs of this process.

Each takes memory maps, and Linux allows a process 65,530 of them (vm.max_map_count). Beyond that the compiler
crashes, so a process that compiles for many caches must let programs go.
"""

from __future__ import annotations

from pathlib import Path

import jax

MOST = Path("/proc/sys/vm/max_map_count")
OWN = Path("/proc/self/maps")


def make_room() -> None:
    """Frees all compiled programs where the process has more than half of the memory maps that it may have."""
    try:
        most, own = int(MOST.read_text()), OWN.read_bytes().count(b"\n")
    except OSError:  # another system, with limits of its own
        return
    if own > most // 2:
        jax.clear_caches()
