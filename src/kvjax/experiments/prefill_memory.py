"""What one prefill step holds beside the model and its cache, as the compiler counts it. Nothing is run.

    kvjax prefill_memory --workdir=DIR

Appends a row per cache and length to DIR/prefill_memory.jsonl and prints a table. What is there already is not
compiled again.
"""

from __future__ import annotations

import dataclasses
import functools
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
from kvjax.experiments.shapes import arguments
from kvjax.generation.decode import feed
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.zoo import RANDOM


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.model not in RANDOM:
        raise KvjaxError(f"model {config.model!r}; expected one of {', '.join(RANDOM)}")
    model = dataclasses.replace(RANDOM[config.model], layers=config.layers)
    plans = [CachePlan.parse(name, model) for name in split_list(config.caches)]
    results = workdir / "prefill_memory.jsonl"
    shared = {"experiment": "prefill_memory", **{key: config[key] for key in ("model", "layers", "dtype")}}
    todo = [(plan, tokens) for plan in plans for tokens in _lengths(config.tokens, model)]
    points = [shared | {"cache": str(plan), "tokens": tokens} for plan, tokens in todo]
    for (plan, tokens), point in bars.track([*zip(todo, points, strict=True)], "compile"):
        if records.find_row(results, point) is None:
            figures = _figures(model, plan, tokens, jnp.dtype(config.dtype))
            records.append_row(results, point | figures | records.provenance())
    Console(width=120).print(_table([row for point in points if (row := records.find_row(results, point))]))


def _lengths(text: str, model: ModelConfig) -> list[int]:
    most = model.max_positions
    lengths = [int(part) if part.isdecimal() else 0 for part in split_list(text)]
    if not all(1 <= tokens <= most for tokens in lengths):
        raise KvjaxError(f"tokens={text}; expected whole numbers from 1 to {most}, separated by commas")
    return lengths


def _figures(model: ModelConfig, plan: CachePlan, tokens: int, dtype: Any) -> dict[str, Any]:
    """Bytes and seconds of compiling the step that reads a prompt of `tokens` tokens."""
    params, bases, held = arguments(model, plan, tokens, dtype)
    shaped = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    begun = time.perf_counter()
    lowered = feed.lower(Decoder(model), params, bases, held, shaped((1, tokens)), shaped((1,)))
    memory: Any = lowered.compile().memory_analysis()
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held.cache.layers)),
        "compile_seconds": time.perf_counter() - begun,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    title = "One prefill step, {layers} layers of {model}, {dtype}".format(**rows[0])
    table = Table(title=title, title_justify="left")
    for name in ("cache", "tokens", "temporary MB", "KiB a token", "cache MB"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        each = row["temp_bytes"] / row["tokens"] / 1024
        sizes = f"{row['temp_bytes'] / 1e6:.0f}", f"{each:.1f}", f"{row['cache_bytes'] / 1e6:.1f}"
        table.add_row(row["cache"], str(row["tokens"]), *sizes)
    return table


if __name__ == "__main__":
    program.run(main, "configs/prefill_memory.py")
