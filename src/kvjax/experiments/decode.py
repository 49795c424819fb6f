"""What one decode step costs with each cache: the median of steps taken in turn, so that drift hits all alike.

    kvjax decode --workdir=DIR

A step that completes a block of tokens also packs it: what that takes more is apart.
Appends a row per cache to DIR/decode.jsonl and prints a table. What is there already is not timed again, but for the
first cache, which the others are compared with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

import kvjax
from kvjax import records
from kvjax.caches.base import CacheShape
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import Cache, CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate.text import load_text
from kvjax.experiments import bars, program
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.ops import remat
from kvjax.tables import format_figure

PREFILL = 512  # tokens a prefill chunk
WARM_UP = 3


@dataclasses.dataclass
class Contestant:
    """A cache under test: its compiled step, its state and the seconds its steps took."""

    compiled: Any
    compile_seconds: float
    bases: Any
    token: jax.Array
    cache: Cache
    seconds: list[float]

    def step(self, params: Any) -> None:
        start = time.perf_counter()
        self.token, self.cache = self.compiled(params, self.bases, self.token, self.cache)
        jax.block_until_ready(self.token)
        self.seconds.append(time.perf_counter() - start)


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    model = load(config.model, config.dtype)
    if config.steps < 1 or config.depth < 1 or config.depth + config.steps + WARM_UP > config.max_len:
        raise KvjaxError(f"expected depth + steps + {WARM_UP} to be at most max_len={config.max_len}, all positive")
    ids = model.tokenizer.encode(load_text(config.text))[: config.depth]
    if len(ids) < config.depth:
        raise KvjaxError(f"the text has {len(ids)} tokens; expected at least depth={config.depth}")
    results = workdir / "decode.jsonl"
    plans = dict.fromkeys(CachePlan.parse(name, model.config) for name in split_list(config.caches))
    entries = [(plan, config.dtype, False) for plan in plans]
    if config.dtype != "bfloat16":
        entries += [(CachePlan.parse("dense", model.config), "bfloat16", False)]
    rebuilt = split_list(config.rebuild) if config.rebuild else []
    entries += [(CachePlan.parse(name, model.config), config.dtype, True) for name in rebuilt]
    points = [_point(config, *entry) for entry in entries]
    missing = [i for i, point in enumerate(points) if records.find_row(results, point) is None]
    if missing:
        model = kvjax.calibrated(model, config.calibration) if config.calibration else model
        contestants = {
            i: _prepare(model, ids, *entries[i], config.max_len) for i in bars.track(sorted({0, *missing}), "prefill")
        }
        for _ in bars.track(range(WARM_UP + config.steps), "steps"):
            for contestant in contestants.values():
                contestant.step(model.params)
        figures = {i: _figures(contestants[i], contestants[0], config.depth) for i in missing}
        rows = [points[i] | figures[i] | records.provenance() for i in missing]
        records.append_rows(results, rows)
    Console(width=120).print(_table([row for point in points if (row := records.find_row(results, point))]))


def _point(config: config_dict.ConfigDict, plan: CachePlan, kv_dtype: str, rebuild: bool) -> dict[str, Any]:
    """What is measured."""
    return {
        "experiment": "decode",
        "model": config.model,
        "dtype": config.dtype,
        "depth": config.depth,
        "max_len": config.max_len,
        "cache": str(plan),
        "kv_dtype": kv_dtype,
        "values_rebuilt": rebuild,
        "steps": config.steps,
    }


def _prepare(
    model: Model, ids: np.ndarray, plan: CachePlan, kv_dtype: str, rebuild: bool, max_len: int
) -> Contestant:
    decoder, bases = Decoder(model.config), load_bases(model, plan)

    def feed(params, bases, tokens, cache, lengths):
        hidden, cache = decoder.apply({"params": params}, tokens, cache, lengths, bases=bases)
        logits = jnp.asarray(decoder.apply({"params": params}, hidden[:, -1:], method="logits"))
        return logits.argmax(-1).astype(jnp.int32), cache

    cache = plan.init(CacheShape.of(model.config, 1, max_len, jnp.dtype(kv_dtype)))
    prefill = jax.jit(feed, donate_argnums=3)
    token = jnp.zeros((1, 1), jnp.int32)
    for start in range(0, len(ids), PREFILL):
        piece = ids[start : start + PREFILL]
        padded = jnp.asarray(np.pad(piece, (0, PREFILL - len(piece))))[None]
        token, cache = prefill(model.params, bases, padded, cache, jnp.asarray([len(piece)], jnp.int32))
    one = jnp.ones((1,), jnp.int32)
    step = jax.jit(lambda params, bases, token, cache: feed(params, bases, token, cache, one), donate_argnums=3)
    # What values absorbed into the output save is measured against a step that rebuilds them.
    with mock.patch.object(remat, "is_decode_shape", lambda rows: False) if rebuild else contextlib.nullcontext():
        began = time.perf_counter()
        compiled = step.lower(model.params, bases, token, cache).compile()
    return Contestant(compiled, time.perf_counter() - began, bases, token, cache, [])


def _figures(contestant: Contestant, dense: Contestant, depth: int) -> dict[str, Any]:
    timed = [1e3 * s for s in contestant.seconds[WARM_UP:]]
    memory = contestant.compiled.memory_analysis()
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(contestant.cache.layers))
    dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(dense.cache.layers))
    return {
        "step_ms": statistics.median(timed),
        "step_ms_min": min(timed),
        "flush_ms": flush_ms(contestant.cache.plan, depth + WARM_UP, timed),
        "ratio": statistics.median(
            a / b for a, b in zip(contestant.seconds[WARM_UP:], dense.seconds[WARM_UP:], strict=True)
        ),
        "cache_bytes": nbytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "compile_seconds": contestant.compile_seconds,
        "temp_share": memory.temp_size_in_bytes / dense_bytes,
    }


def flush_ms(plan: CachePlan, depth: int, timed: Sequence[float]) -> float | None:
    """What steps that complete a block of every layer take more than the others, by their medians.

    Args:
      plan: whose steps were timed.
      depth: tokens held before the first of them.
      timed: milliseconds of each step.

    Returns:
      Milliseconds; None where no such step is among them, or no other.
    """
    block = math.lcm(*(spec.residual_length or 1 for spec in plan.specs))
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for length, ms in enumerate(timed, depth + 1):
        kinds[length % block == 0].append(ms)
    return statistics.median(kinds[True]) - statistics.median(kinds[False]) if all(kinds.values()) else None


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="{model}, {dtype} weights, one step at depth {depth}".format(**rows[0]), title_justify="left")
    for name in ("cache", "KV dtype", "ms", "x dense", "flush ms", "cache MB", "temporary MB", "% of dense"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        sizes = f"{row['cache_bytes'] / 1e6:.1f}", f"{row['temp_bytes'] / 1e6:.2f}", f"{100 * row['temp_share']:.2f}"
        flush = format_figure(row, "flush_ms", ".1f")
        table.add_row(row["cache"], row["kv_dtype"], f"{row['step_ms']:.1f}", f"{row['ratio']:.2f}", flush, *sizes)
    return table


if __name__ == "__main__":
    program.run(main, "configs/decode.py")
