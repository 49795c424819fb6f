"""The sweep: perplexity, KL divergence and agreement of cache plans on the same windows of a text.

    kvjax sweep --config.caches=dense,k4v4 --workdir=DIR

Appends a row per plan to DIR/results.jsonl, prints a table and draws DIR/pareto.png. Killed at any moment and started
again it goes on where it was: finished windows are kept in DIR/partial.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

import kvjax
from kvjax import hosts
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.experiments import bars, dry_run, pareto, program, style
from kvjax.experiments.printed import print_table
from kvjax.tables import format_figure, format_with_error


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    names = split_list(config.caches)
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model_config = read_config(config.model)
    for name in names:
        CachePlan.parse(name, model_config)  # one that does not fit is refused before weights are loaded
    with hosts.alone() if config.over == "plans" else contextlib.nullcontext():
        model = program.load(config, config.text)
    sizes = {key: config[key] for key in ("protocol", "context", "windows", "offset", "over")}
    with bars.shown("windows") as tell:
        progress = lambda plan, done, total: tell(str(plan), done, total)  # noqa: E731
        rows = kvjax.sweep(model, config.text, names, **sizes, folder=workdir, progress=progress)
    _print(rows)
    print(f"rows: {workdir / 'results.jsonl'}")
    hosts.on_first(lambda: style.write(workdir / "pareto.png", pareto.draw, rows))


def _print(rows: list[dict[str, Any]]) -> None:
    title = "{model} ({dtype}), {text}: {windows} windows of {context} tokens, {protocol}".format(**rows[0])
    print_table(title, ("cache", "bits", "real", "smaller", "KL", "top-1", "nll", "ppl"), map(_cells, rows))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    bits = [format_figure(row, key, ".2f") for key in ("bits_nominal", "bits_real", "compression")]
    name = row["cache"] + " (simulated)" * row.get("simulated", False)
    if "error" in row:
        return name, *bits, row["error"]
    return (
        name,
        *bits,
        format_with_error(row, "kld", ".4f"),
        f"{row['top1']:.3f}",
        f"{row['nll']:.4f}",
        f"{row['ppl']:.2f}",
    )


def sizes(config: config_dict.ConfigDict) -> dry_run.Sizes:
    return dry_run.Sizes(split_list(config.caches), config.context)


if __name__ == "__main__":
    program.run(main, "configs/perplexity.py", sizes)
