"""Loads a model in a fresh process, for experiments.loading_memory, and prints what that took as JSON.

python -m kvjax.experiments.load_once FOLDER DTYPE MESH
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import jax

import kvjax


def anonymous_bytes(process: int | str = "self") -> int:
    """Memory of a process that maps no file: Linux' RssAnon; 0 where the process has ended."""
    return 1024 * _number(Path(f"/proc/{process}/status"), "RssAnon")


def disk_bytes() -> int:
    """What this process has had read from disk so far, pages of mapped files included."""
    return _number(Path("/proc/self/io"), "read_bytes")


def _number(file: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", file.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def main(folder: str, dtype: str, mesh: str) -> None:
    jax.block_until_ready(jax.numpy.zeros(1))  # what JAX itself takes is there before
    before, read, begun = anonymous_bytes(), disk_bytes(), time.perf_counter()
    model = kvjax.load(folder, dtype, mesh=mesh)
    jax.block_until_ready(model.params)
    parts = [part.data for leaf in jax.tree.leaves(model.params) for part in leaf.addressable_shards]
    figures = {
        "seconds": time.perf_counter() - begun,
        "anonymous_before": before,
        "anonymous_after": anonymous_bytes(),
        "disk_bytes": disk_bytes() - read,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "largest_bytes": max(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "held_bytes": sum(part.nbytes for part in parts),
        "distinct_bytes": sum({part.unsafe_buffer_pointer(): part.nbytes for part in parts}.values()),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
