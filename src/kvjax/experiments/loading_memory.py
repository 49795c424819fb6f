"""What loading a checkpoint takes: anonymous memory at its peak, and bytes read from disk.

    kvjax loading_memory --workdir=DIR

Makes a checkpoint of random weights in DIR/checkpoint-MODEL and loads it in fresh processes, on one device and, where
one is given, on a mesh. Appends a row for each to DIR/loading_memory.jsonl and prints a table. What is there already
is not measured again. Linux only: memory and reads are the kernel's own figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from kvjax import records
from kvjax.errors import KvjaxError
from kvjax.experiments import bars, program
from kvjax.experiments.load_once import anonymous_bytes
from kvjax.experiments.synthetic import make_checkpoint
from kvjax.models.hf_config import from_hf

EVERY = 0.005  # seconds between two looks at a process


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.files < 1 or config.devices < 1:
        raise KvjaxError(f"files={config.files}, devices={config.devices}; expected whole numbers from 1")
    layers = from_hf(config.checkpoint.to_dict()).layers
    folder, results = workdir / f"checkpoint-{config.model}", workdir / "loading_memory.jsonl"
    shared = {
        "experiment": "loading_memory",
        "layers": layers,
        **{key: config[key] for key in ("model", "files", "dtype")},
    }
    points = [shared | {"mesh": mesh} for mesh in dict.fromkeys(("", config.mesh))]
    for point in bars.track(points, "load"):
        if records.find_row(results, point) is None:
            files = make_checkpoint(folder, config.checkpoint.to_dict(), config.files)
            forget(files)
            figures = watch(folder, config.dtype, point["mesh"], config.devices if point["mesh"] else 1)
            figures |= {"file_bytes": sum(file.stat().st_size for file in files)}
            records.append_row(results, point | figures | records.provenance())
    Console(width=120).print(_table([row for point in points if (row := records.find_row(results, point))]))


def forget(files: list[Path]) -> None:
    """Has the kernel drop what it holds of files in memory, so that reads of them are reads of the disk."""
    for file in files:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(folder: Path, dtype: str, mesh: str, devices: int) -> dict[str, Any]:
    """Loads in a fresh process and looks at its memory from outside all the while.

    Raises:
      KvjaxError: it failed; says its last line.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "kvjax.experiments.load_once", str(folder.absolute()), dtype, mesh]
    peak = 0
    with subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(EVERY)
        told, errors = process.communicate()
    if process.returncode:
        raise KvjaxError(f"loading failed: {(errors.strip().splitlines() or ['no message'])[-1]}")
    row = json.loads(told)
    # What the process saw itself counts too: its last pages may come between two looks.
    return {**row, "anonymous_peak": max(peak, row["anonymous_before"], row["anonymous_after"])}


HEADER = ("mesh", "parameters MB", "held MB", "peak MB", "× held", "above, tensors", "read / files", "seconds")


def line(row: dict[str, Any]) -> list[str]:
    """A row's cells under HEADER."""
    sizes = (f"{row[key] / 1e6:.0f}" for key in ("parameter_bytes", "distinct_bytes", "anonymous_peak"))
    read = f"{row['disk_bytes'] / row['file_bytes']:.3f}"
    return [
        row["mesh"] or "one device",
        *(*sizes, f"{over_held(row):.3f}", f"{beyond(row):.2f}", read, f"{row['seconds']:.1f}"),
    ]


def over_held(row: dict[str, Any]) -> float:
    """Anonymous memory at the peak over that of the parameters, both without what was there before."""
    return (row["anonymous_peak"] - row["anonymous_before"]) / row["distinct_bytes"]


def beyond(row: dict[str, Any]) -> float:
    """What the peak is above the parameters, in the largest tensor's size."""
    return (row["anonymous_peak"] - row["anonymous_before"] - row["distinct_bytes"]) / row["largest_bytes"]


def _table(rows: list[dict[str, Any]]) -> Table:
    title = "Loading {layers} layers of {model}, {dtype}".format(**rows[0])
    table = Table(title=title, title_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name == "mesh" else "right")
    for row in rows:
        table.add_row(*line(row))
    return table


if __name__ == "__main__":
    program.run(main, "configs/loading_memory.py")
