"""Compiles the kernels ahead of time for devices that are not there: what is legal, what memory it takes, and a
static cost, the number of instruction bundles.

    kvjax aot --config=aot:tpu --workdir=DIR

Appends a row per kernel, setting and target to DIR/aot.jsonl and prints a table. What is there already is not
compiled again.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.errors import KvjaxError
from kvjax.experiments import bars, program
from kvjax.experiments.aot_cases import SHAPE, Case, Kernels, cases
from kvjax.files import brief
from pallas_kernels.causal_attention import splash
from pallas_kernels.packed_attention import mosaic_tpu as packed_attention
from pallas_kernels.quantize_pack import mosaic_tpu as quantize_pack
from pallas_kernels.remat_attention import mosaic_tpu as remat_attention

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
SLOTS = (4, 3, 4, 2, 1, 3, 3, 1, 1, 2)  # of these units in a bundle
TWICE = 2 * packed_attention.CHUNK
KERNELS = Kernels(
    "mosaic_tpu",
    {"packed_attention": packed_attention.packed_attention},
    quantize_pack.quantize_pack,
    remat_attention.remat_attention,
    remat_attention.reconstruct,
    {"chunk": TWICE},
    splash.causal_attention,
)


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    compilers = {"tpu": tpu_compile}
    if config.platform not in compilers:
        raise KvjaxError(f"platform {config.platform!r}; expected one of {', '.join(compilers)}")
    results = workdir / "aot.jsonl"
    shape = {name: config[name] for name in SHAPE}
    todo = [
        (target, case, {"experiment": "aot", "target": target, **shape, **case.point})
        for target in split_list(config.targets)
        for case in cases(config, KERNELS)
    ]
    missing = [entry for entry in todo if records.find_row(results, entry[2]) is None]
    for target, case, point in bars.track(missing, "compile"):
        records.append_row(results, point | compilers[config.platform](target, case) | records.provenance())
    Console(width=140).print(_table([row for entry in todo if (row := records.find_row(results, entry[2]))]))


def tpu_compile(target: str, case: Case) -> dict[str, Any]:
    """Figures of a compile by libtpu for one device of a topology, like v5e:2x2."""
    dump = _tpu_dump()
    try:
        device = topologies.get_topology_desc(target, platform="tpu").devices[0]
    except Exception as error:  # of many kinds
        raise KvjaxError(
            f"target {target!r}: {brief(error)}; expected a TPU topology, and jax[tpu] installed"
        ) from None
    here = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), case.arguments)
    shutil.rmtree(dump, ignore_errors=True)  # of a compile that failed
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments))
    began = time.perf_counter()
    try:
        compiled: Any = jax.jit(case.function, donate_argnums=case.donated).lower(*arguments).compile()
    except Exception as error:  # libtpu raises many kinds
        return {"compiled": False, "error": brief(error), "expected_bytes": expected}
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    figures = {
        "compiled": True,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "expected_bytes": expected,
        "copied_bytes": _copied(compiled.as_text()),
        "compile_seconds": seconds,
    }
    if case.twice is not None:
        bundles, used = _bundles(dump, case.point["op"])
        shutil.rmtree(dump)
        jax.jit(case.twice).lower(*arguments).compile()
        twice, used_twice = _bundles(dump, case.point["op"])
        shares = [(b - a) / slots / (twice - bundles) for a, b, slots in zip(used, used_twice, SLOTS, strict=True)]
        unit = max(range(len(UNITS)), key=shares.__getitem__)
        tokens = TWICE - packed_attention.CHUNK
        figures |= {"bundles": bundles}
        figures |= {"token_bundles": (twice - bundles) / tokens, "busiest": UNITS[unit], "busy": shares[unit]}
    return figures


@functools.cache
def _tpu_dump() -> Path:
    """Where libtpu, which reads its flags once, writes its schedules."""
    dump = Path(tempfile.mkdtemp(prefix="aot-"))
    atexit.register(shutil.rmtree, dump, ignore_errors=True)
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    jax.config.update("jax_platforms", "cpu")
    return dump


def _copied(text: str) -> int:
    """Bytes that operations around the kernel write: what its arguments' layout in memory costs."""
    entry = text[text.index("\nENTRY") :] if "\nENTRY" in text else text
    found = re.findall(r"= ([a-z]+)(\d+)\[([\d,]+)\]\S* (?:copy|fusion|bitcast-convert|transpose)\(", entry)
    return sum(int(bits) // 8 * functools.reduce(int.__mul__, map(int, dims.split(","))) for _, bits, dims in found)


def _bundles(dump: Path, kernel: str) -> tuple[int, list[int]]:
    """Bundles of a kernel, each block of code counted once, and how many slots of each of UNITS they use."""
    schedule = next(dump.glob(f"*{kernel}*schedule-analysis_final_bundles.txt")).read_text()
    used = next(dump.glob(f"*{kernel}*final_hlo-static-per-bundle-utilization.txt")).read_text()
    rows = [list(map(int, line.split())) for line in used.split("UTILIZATION:")[1].splitlines() if line]
    bundles = int(re.search(r"total scheduled bundles:\s*(\d+)", schedule)[1])  # type: ignore[index]
    return bundles, [sum(column) for column in zip(*rows, strict=True)]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="compiled ahead of time, no device", title_justify="left")
    for name in ("target", "op", "bits", "mode"):
        table.add_column(name)
    for name in ("MB", "expected", "temporary", "copied", "bundles", "a token", "busiest unit", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        names = [row[name] for name in ("target", "op", "bits", "mode")]
        if not row["compiled"]:
            table.add_row(*names, row["error"][:60])
            continue
        kinds = ("argument_bytes", "expected_bytes", "temp_bytes", "copied_bytes")
        cost = (f"{row['token_bundles']:.3f}", f"{row['busiest']} {row['busy']:.0%}") if "busy" in row else ("", "")
        sizes = (f"{row[kind] / 1e6:.1f}" for kind in kinds)
        table.add_row(*names, *sizes, str(row.get("bundles", "")), *cost, f"{row['compile_seconds']:.1f}")
    return table


if __name__ == "__main__":
    program.run(main, "configs/aot.py")
