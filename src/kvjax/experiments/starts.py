"""Cold and warm starts of experiments.generate: what the programs that it keeps save the next time.

    kvjax starts --workdir=DIR

Starts it twice for each cache, in fresh processes: with an empty $KVJAX_CACHE, which is a temporary folder with
nothing but the model, and with what the first start left there. Appends a row per cache to DIR/starts.jsonl and
prints a table. What is there already is not measured again. The seconds that count are those of all threads on the
CPU.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.downloads import fetch
from kvjax.errors import KvjaxError
from kvjax.experiments import bars, program
from kvjax.models.zoo import FILES


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    model = read_config(config.model)
    results = workdir / "starts.jsonl"
    shared = {"experiment": "starts", "model": config.model, "max_new_tokens": config.max_new_tokens}
    points = [shared | {"cache": str(CachePlan.parse(name, model))} for name in split_list(config.caches)]
    for point in bars.track(points, "start"):
        if records.find_row(results, point) is None:
            records.append_row(results, point | measure(point) | records.provenance())
    Console(width=120).print(_table([row for point in points if (row := records.find_row(results, point))]))


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a cold and of a warm start, on the CPU and by the clock."""
    flags = [f"--config.{name}={point[name]}" for name in ("model", "cache", "max_new_tokens")]
    with tempfile.TemporaryDirectory() as folder:
        if point["model"] in FILES:
            file = fetch(FILES[point["model"]])
            (Path(folder) / file.name).symlink_to(file)
        starts = {name: _start(flags, folder) for name in ("cold", "warm")}
    return {f"{name}_{what}": seconds for name, each in starts.items() for what, seconds in each.items()}


def _start(flags: list[str], cache_folder: str) -> dict[str, float]:
    """Raises KvjaxError where it failed; says its last line."""
    command = [sys.executable, "-m", "kvjax.experiments.generate", *flags]
    env = {**os.environ, "KVJAX_CACHE": cache_folder}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would win over our folder
    used, begun = _cpu_seconds(), time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KvjaxError(f"the start failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return {"cpu_seconds": _cpu_seconds() - used, "seconds": time.perf_counter() - begun}


def _cpu_seconds() -> float:
    """Of all processes that this one started and that have ended, outside the kernel."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Starts of experiments.generate, {model}: CPU seconds".format(**rows[0]), title_justify="left"
    )
    for name in ("cache", "cold", "warm", "warm / cold"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        cold, warm = row["cold_cpu_seconds"], row["warm_cpu_seconds"]
        table.add_row(row["cache"], f"{cold:.1f}", f"{warm:.1f}", f"{warm / cold:.2f}")
    return table


if __name__ == "__main__":
    program.run(main, "configs/starts.py")
