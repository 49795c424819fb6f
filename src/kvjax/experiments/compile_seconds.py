"""Seconds of compiling the decode loop, by the number of layers. Nothing is run.

    kvjax compile_seconds --workdir=DIR

Appends a row per cache and number of layers to DIR/compile_seconds.jsonl and prints a table. What is there already is
not compiled again. Kept programs (experiments.compilation) are not used. The seconds that count are those of all
threads on the CPU: other programs on the machine make them no longer.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.experiments import bars, program
from kvjax.experiments.shapes import lower_decode_loop
from kvjax.models.config import ModelConfig

SIZES = ("vocab_size", "model_dim", "mlp_dim", "heads", "kv_heads")


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    results = workdir / "compile_seconds.jsonl"
    shared = {"experiment": "compile_seconds", **{key: config[key] for key in (*SIZES, "max_len", "dtype")}}
    models = [_model(config, text) for text in split_list(config.layers)]
    plans = [(CachePlan.parse(name, model), model) for name in split_list(config.caches) for model in models]
    points = [shared | {"cache": str(plan), "layers": model.layers} for plan, model in plans]
    jax.config.update("jax_enable_compilation_cache", False)
    for (plan, model), point in bars.track([*zip(plans, points, strict=True)], "compile"):
        if records.find_row(results, point) is None:
            figures = compile_loop(model, plan, config.max_len, jnp.dtype(config.dtype))
            records.append_row(results, point | figures | records.provenance())
    Console(width=120).print(_table([row for point in points if (row := records.find_row(results, point))]))


def _model(config: config_dict.ConfigDict, layers: str) -> ModelConfig:
    if not layers.isdecimal():
        raise KvjaxError(f"layers={config.layers}; expected whole numbers, separated by commas")
    sizes = {name: config[name] for name in SIZES}
    head_dim = config.model_dim // config.heads
    return ModelConfig("llama", layers=int(layers), head_dim=head_dim, max_positions=config.max_len, **sizes)


def compile_loop(model: ModelConfig, plan: CachePlan, max_len: int, dtype: Any) -> dict[str, Any]:
    """Seconds on the CPU of tracing and of compiling the decode loop of one sequence, and its lines before XLA."""
    begun, used = time.perf_counter(), _cpu_seconds()
    lowered = lower_decode_loop(model, plan, max_len, dtype)
    traced = _cpu_seconds()
    lowered.compile()
    return {
        "trace_cpu_seconds": traced - used,
        "compile_cpu_seconds": _cpu_seconds() - traced,
        "seconds": time.perf_counter() - begun,
        "lines": lowered.as_text().count("\n"),
    }


def _cpu_seconds() -> float:
    """Of all threads of this process, outside the kernel."""
    return os.times().user


def _table(rows: list[dict[str, Any]]) -> Table:
    title = "The decode loop: CPU seconds of compiling, model_dim {model_dim}, {dtype}".format(**rows[0])
    table = Table(title=title, title_justify="left")
    for name in ("cache", "layers", "trace", "compile", "seconds", "lines"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        seconds = (f"{row[key]:.1f}" for key in ("trace_cpu_seconds", "compile_cpu_seconds", "seconds"))
        table.add_row(row["cache"], str(row["layers"]), *seconds, str(row["lines"]))
    return table


if __name__ == "__main__":
    program.run(main, "configs/compile_seconds.py")
