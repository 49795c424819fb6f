"""Generates text, shown as it comes.

    kvjax generate --config.cache=k4v4 --config.prompt="What is a cache?"

The text goes to standard output, figures to standard error, with --workdir=DIR also to DIR/generate.jsonl.
"""

from __future__ import annotations

import itertools
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
from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.evaluate.tasks import common_prefix
from kvjax.experiments import compilation, dry_run, program
from kvjax.tables import format_ratio

DEFAULT = "k4v4"


def main(config: config_dict.ConfigDict, workdir: Path | None) -> None:
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if config.compare and (config.save or config.resume):
        raise kvjax.KvjaxError("compare makes caches of its own; expected no save or resume beside it")
    if config.save and Path(config.save).exists():
        raise kvjax.KvjaxError(f"{config.save} exists already; expected a new folder")
    model_config = read_config(config.model)  # a plan that does not fit is refused before weights are loaded
    plans = [CachePlan.parse(name, model_config) for name in _names(config)]
    begun = time.perf_counter()
    model = program.load(config)
    load_seconds = time.perf_counter() - begun
    rows = []
    for plan in plans:
        cache = kvjax.restore_state(config.resume, model, config.cache or None) if config.resume else plan
        row, made = _generate(config, model, cache, show=not config.compare)
        row |= {"load_seconds": load_seconds} | records.provenance()
        print(_figures(row), file=sys.stderr)
        rows.append((row, made))
        if workdir is not None:
            records.append_row(workdir / "generate.jsonl", row)
    if config.compare:
        Console().print(_side_by_side(rows))
    if config.save:
        kvjax.save_state(config.save, model, rows[0][1].state)
        print(f"saved: {config.save}", file=sys.stderr)


def _names(config: config_dict.ConfigDict) -> list[str]:
    return split_list(config.compare) if config.compare else [config.cache or DEFAULT]


def _generate(
    config: config_dict.ConfigDict, model: kvjax.Model, cache: CachePlan | kvjax.State, show: bool
) -> tuple[dict[str, Any], kvjax.Generation]:
    """Generates, and says what it took: seconds without those of compiling, which have a figure of their own."""
    compiled = records.CompileSeconds()
    clock = lambda: time.perf_counter() - compiled.total()  # noqa: E731
    start, times = clock(), []
    pieces = _stream(config, model, cache)
    with compilation.shown():
        first = next(pieces)
    for text, so_far in itertools.chain([first], pieces):
        times.append(clock())
        made = so_far
        if show:
            print(text, end="", flush=True)
    if show:
        print(flush=True)
    new, state, seconds = len(made.tokens[0]), made.state, times[-1] - times[0]
    row = {
        "experiment": "generate",
        "model": model.name,
        "dtype": str(model.dtype),
        "cache": str(state.plan),
        "tokens": state.lengths[0],
        "new_tokens": new,
        "max_len": state.max_len,
        "prefill_chunk": config.prefill_chunk or None,
        "first_token_seconds": times[0] - start,
        "compile_seconds": compiled.total(),
        "tokens_per_second": (new - 1) / seconds if seconds > 0 else None,
        "from_codes": state.plan.coded_share(state.lengths[0]),
        "bytes": state.plan.nbytes(state.max_len),
        "dense_bytes": CachePlan.parse("dense", model.config).nbytes(state.max_len),
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
        stop_strings=config.stop or (),
        max_len=config.max_len or None,
        chat=config.chat,
        prefill_chunk=config.prefill_chunk or None,
    )


def _figures(row: dict[str, Any]) -> str:
    rate = f", {row['tokens_per_second']:.1f} tokens/s" if row["tokens_per_second"] else ""
    return (
        f"{row['cache']}: {row['new_tokens']} tokens{rate}; first token after {row['first_token_seconds']:.1f} s,"
        f" {row['compile_seconds']:.1f} s of compiling and {row['load_seconds']:.1f} s of loading not counted;"
        f" {_from_codes(row)}; cache of {row['max_len']} tokens {row['bytes']:,} bytes, dense"
        f" {row['dense_bytes']:,} ({format_ratio(row['dense_bytes'], row['bytes'])})"
    )


def _from_codes(row: dict[str, Any]) -> str:
    """What agreement with a dense cache rests on: tokens that are held exactly cost no quality."""
    if not row["from_codes"]:
        return f"none of {row['tokens']} tokens was read from codes"
    return f"{row['from_codes']:.0%} of {row['tokens']} tokens can be read from codes"


def _side_by_side(rows: list[tuple[dict[str, Any], kvjax.Generation]]) -> Table:
    first = rows[0][1].tokens[0]
    table = Table(show_lines=True)
    for row, made in rows:
        tokens = made.tokens[0]
        heading = [row["cache"], format_ratio(row["dense_bytes"], row["bytes"]), _from_codes(row)]
        if made is not rows[0][1]:
            heading.append(f"first {common_prefix(first, tokens)} of {len(first)} tokens agree")
        table.add_column("\n".join(heading), ratio=1)
    table.add_row(*(made.text for _, made in rows))
    return table


def sizes(config: config_dict.ConfigDict) -> dry_run.Sizes:
    """The prompt at a token a byte, which it rarely reaches."""
    room = config.max_len or len(config.prompt.encode()) + config.max_new_tokens
    return dry_run.Sizes(_names(config), room)


if __name__ == "__main__":
    program.run_anywhere(main, "configs/generate.py", sizes)
