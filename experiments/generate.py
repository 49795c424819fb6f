"""Generates text, shown as it comes.

    python -m experiments.generate --config=configs/generate.py --config.cache=k4v4 --config.prompt="What is a cache?"

The text goes to standard output, figures to standard error, with --workdir=DIR also to DIR/generate.jsonl.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

import kvjax
from experiments import program
from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.evaluate.tasks import common_prefix


def main(config: config_dict.ConfigDict, workdir: Path | None) -> None:
    begun = time.perf_counter()
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if config.compare and (config.save or config.resume):
        raise kvjax.KvjaxError("compare makes caches of its own; expected no save or resume beside it")
    if config.save and Path(config.save).exists():
        raise kvjax.KvjaxError(f"{config.save} exists already; expected a new folder")
    names = split_list(config.compare) if config.compare else [config.cache]
    model_config = read_config(config.model)  # a plan that does not fit is refused before weights are loaded
    plans = [CachePlan.parse(name, model_config) for name in names]
    model = kvjax.load(config.model, config.dtype)
    rows = []
    for plan in plans:
        cache = kvjax.restore_state(config.resume, model) if config.resume else plan
        row, made = _generate(config, model, cache, begun, show=not config.compare)
        print(_figures(row), file=sys.stderr)
        rows.append((row, made))
        if workdir is not None:
            records.append_row(workdir / "generate.jsonl", row)
    if config.compare:
        Console().print(_side_by_side(rows))
    if config.save:
        kvjax.save_state(config.save, model, rows[0][1].state)
        print(f"saved: {config.save}", file=sys.stderr)


def _generate(
    config: config_dict.ConfigDict, model: kvjax.Model, cache: CachePlan | kvjax.State, begun: float, show: bool
) -> tuple[dict[str, Any], kvjax.Generation]:
    """Generates, and says what it took. Compile time is the process's so far: programs are shared by plans."""
    compiled = records.CompileSeconds()
    start, times = time.perf_counter(), []
    for text, so_far in _stream(config, model, cache):
        times.append(time.perf_counter())
        made = so_far
        if show:
            print(text, end="", flush=True)
    if show:
        print(flush=True)
    new, plan, room = len(made.tokens[0]), made.state.plan, made.state.max_len
    row = {
        "experiment": "generate",
        "model": model.name,
        "dtype": str(model.dtype),
        "cache": str(plan),
        "tokens": made.state.lengths[0],
        "new_tokens": new,
        "max_len": room,
        "load_seconds": start - begun,
        "first_token_seconds": times[0] - start,
        "compile_seconds": compiled.total(),
        "tokens_per_second": (new - 1) / (times[-1] - times[0]) if new > 1 else None,
        "bytes": plan.nbytes(room),
        "dense_bytes": CachePlan.parse("dense", model.config).nbytes(room),
        **records.provenance(),
    }
    return row, made


def _stream(
    config: config_dict.ConfigDict, model: kvjax.Model, cache: CachePlan | kvjax.State
) -> Iterator[tuple[str, kvjax.Generation]]:
    return kvjax.stream(
        model,
        config.prompt,
        cache,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        seed=config.seed,
        max_len=config.max_len or None,
        chat=config.chat,
    )


def _figures(row: dict[str, Any]) -> str:
    rate = f", {row['tokens_per_second']:.1f} tokens/s" if row["tokens_per_second"] else ""
    return (
        f"{row['cache']}: {row['new_tokens']} tokens{rate}; first token after {row['first_token_seconds']:.1f} s"
        f" and {row['load_seconds']:.1f} s of loading, {row['compile_seconds']:.1f} s of both compiling; cache of"
        f" {row['max_len']} tokens {row['bytes']:,} bytes, dense {row['dense_bytes']:,}"
        f" ({row['dense_bytes'] / row['bytes']:.2f} x)"
    )


def _side_by_side(rows: list[tuple[dict[str, Any], kvjax.Generation]]) -> Table:
    first = rows[0][1].tokens[0]
    table = Table(show_lines=True)
    for row, made in rows:
        tokens = made.tokens[0]
        same = common_prefix(first, tokens)
        agrees = "" if made is rows[0][1] else f"\nfirst {same} of {len(first)} tokens agree"
        table.add_column(f"{row['cache']}\n{row['dense_bytes'] / row['bytes']:.2f} x smaller{agrees}", ratio=1)
    table.add_row(*(made.text for _, made in rows))
    return table


if __name__ == "__main__":
    program.run_anywhere(main, "configs/generate.py")
