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
from rich.console import Console
from rich.table import Table

import kvjax
from kvjax import hosts
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.evaluate.sweep import COLUMNS
from kvjax.experiments import bars, pareto, program, style
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
    wide = Console()
    wide.width = max(wide.width, 150)  # a narrow terminal folds lines, not numbers
    wide.print(_table(rows))
    print(f"rows: {workdir / 'results.jsonl'}")
    hosts.on_first(lambda: style.write(workdir / "pareto.png", pareto.draw, rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = "{model} ({dtype}), {text}: {windows} windows of {context} tokens, {protocol}".format(**first)
    table = Table(title=title, title_justify="left")
    table.add_column("cache", overflow="fold")
    for name in (*COLUMNS, "KL", "KL p99", "top-1", "nll", "ppl", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        name = row["cache"] + " (simulated)" * row.get("simulated", False)
        bits = [format_figure(row, key, ".2f") for key in COLUMNS.values()]
        if "error" in row:
            table.add_row(name, *bits, row["error"])
            continue
        kld, nll = (format_with_error(row, key, ".4f") for key in ("kld", "nll"))
        rest = f"{row['ppl']:.2f}", f"{row['seconds']:.1f}"
        table.add_row(name, *bits, kld, f"{row['kld_p99']:.3f}", f"{row['top1']:.3f}", nll, *rest)
    return table


if __name__ == "__main__":
    program.run(main, "configs/perplexity.py")
