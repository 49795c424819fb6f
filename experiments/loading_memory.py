"""What loading a checkpoint takes: anonymous memory at its peak, and bytes read from disk.

    python -m experiments.loading_memory --config=configs/loading_memory.py --workdir=DIR

Makes a checkpoint of random bfloat16 weights in DIR/checkpoint and loads it in fresh processes, on one device and on
a mesh. Appends a row for each to DIR/loading_memory.jsonl and prints a table. What is there already is not measured
again. Linux only: memory and reads are the kernel's own figures.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from ml_collections import config_dict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import save_file

from experiments import program
from experiments.load_once import anonymous_bytes
from kvjax import records
from kvjax.checkpoints.safetensors import INDEX, NAMES
from kvjax.errors import KvjaxError
from kvjax.files import read_json, write_json
from kvjax.models.config import ModelConfig
from kvjax.models.params import Shape, param_shapes

SIZES = ("vocab_size", "model_dim", "mlp_dim", "layers", "heads", "kv_heads", "head_dim")
EVERY = 0.005  # seconds between two looks at a process


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    model = ModelConfig("llama", max_positions=131072, tied=True, **{name: config[name] for name in SIZES})
    if config.files < 1 or config.devices < 1:
        raise KvjaxError(f"files={config.files}, devices={config.devices}; expected whole numbers from 1")
    folder, results = workdir / "checkpoint", workdir / "loading_memory.jsonl"
    shared = {"experiment": "loading_memory", **{key: config[key] for key in (*SIZES, "files", "dtype")}}
    points = [shared | {"mesh": mesh} for mesh in ("", config.mesh)]
    for point in track(points, "load", console=Console(stderr=True)):
        if records.find_row(results, point) is None:
            files = make_checkpoint(folder, model, config.files)
            forget(files)
            figures = watch(folder, config.dtype, point["mesh"], config.devices if point["mesh"] else 1)
            figures |= {"file_bytes": sum(file.stat().st_size for file in files)}
            records.append_row(results, point | figures | records.provenance())
    Console(width=120).print(_table([row for point in points if (row := records.find_row(results, point))]))


def make_checkpoint(folder: Path, model: ModelConfig, count: int) -> list[Path]:
    """Writes a checkpoint of random bfloat16 weights in HF's layout, unless it is there, and returns its files."""
    files = [folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    config = _hf_config(model)
    if (folder / "config.json").is_file() and read_json(folder / "config.json") == config and files[-1].is_file():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # it comes last, and says that all is there
    where: dict[str, str] = {}
    for file, shapes in zip(files, _share_out(model, count), strict=True):
        save_file(dict(_draw(shapes)), file)
        where |= dict.fromkeys(shapes, file.name)
    write_json(folder / INDEX, {"weight_map": where})
    words = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    return files


def _hf_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
    }


def _share_out(model: ModelConfig, count: int) -> list[dict[str, Shape]]:
    """The tensors of each file, by HF's names: in order, as HF cuts them, and about as many bytes in each."""
    shapes = {NAMES.of(path): shape for path, shape in param_shapes(model).items()}
    ends = list(itertools.accumulate(int(np.prod(shape)) for shape in shapes.values()))
    parts: list[dict[str, Shape]] = [{} for _ in range(count)]
    for (name, shape), end in zip(shapes.items(), ends, strict=True):
        parts[(end - 1) * count // ends[-1]][name] = shape
    return parts


def _draw(shapes: dict[str, Shape]) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = np.ones(shape) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)
        yield name, weight.astype(jnp.bfloat16)


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
    command = [sys.executable, "-m", "experiments.load_once", str(folder.absolute()), dtype, mesh]
    peak = 0
    with subprocess.Popen(command, env=env, cwd=program.ROOT, stdout=-1, stderr=-1, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(EVERY)
        told, errors = process.communicate()
    if process.returncode:
        raise KvjaxError(f"loading failed: {(errors.strip().splitlines() or ['no message'])[-1]}")
    row = json.loads(told)
    # What the process saw itself counts too: its last pages may come between two looks.
    return {**row, "anonymous_peak": max(peak, row["anonymous_before"], row["anonymous_after"])}


def over_held(row: dict[str, Any]) -> float:
    """Anonymous memory at the peak over that of the parameters, both without what was there before."""
    return (row["anonymous_peak"] - row["anonymous_before"]) / row["distinct_bytes"]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Loading {layers} layers, {dtype}".format(**rows[0]), title_justify="left")
    for name in ("mesh", "parameters MB", "held MB", "peak MB", "× held", "read / files", "seconds"):
        table.add_column(name, justify="left" if name == "mesh" else "right")
    for row in rows:
        sizes = (f"{row[key] / 1e6:.0f}" for key in ("parameter_bytes", "distinct_bytes", "anonymous_peak"))
        rest = f"{over_held(row):.3f}", f"{row['disk_bytes'] / row['file_bytes']:.3f}", f"{row['seconds']:.1f}"
        table.add_row(row["mesh"] or "one device", *sizes, *rest)
    return table


if __name__ == "__main__":
    program.run(main, "configs/loading_memory.py")
