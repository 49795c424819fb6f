"""Tasks that a model is asked with each cache: hidden numbers, chains of variables, GSM8K, lm-evaluation-harness.

    kvjax evaluate --config.tasks=needle,arc_easy --workdir=DIR

Appends a row per figure of each task and cache to DIR/evaluate.jsonl and prints a table. Killed at any moment and
started again it goes on where it was: answers are kept in DIR/answers, apart for each cache.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.evaluate import suite
from kvjax.experiments import bars, dry_run, program
from kvjax.experiments.printed import print_table


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    names, tasks = split_list(config.caches), suite.parse_tasks(config.tasks)
    model_config = read_config(config.model)
    for name in names:
        CachePlan.parse(name, model_config)  # one that does not fit is refused before weights are loaded
    model = program.load(config)
    options = {"batch": config.batch, "chat": config.chat, "prefill_chunk": config.prefill_chunk or None}
    with bars.shown() as tell:
        progress = lambda task, plan, done, total: tell(f"{task} with {plan}", done, total)  # noqa: E731
        rows = suite.evaluate(model, tasks, names, folder=workdir, progress=progress, **options)
    title = "{model} ({dtype})".format(**rows[0])
    print_table(title, ("task", "figure", "cache", "samples", "value"), map(_cells, rows), left=3)
    print(f"rows: {workdir / 'evaluate.jsonl'}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = "" if math.isnan(row["stderr"]) else f" ± {row['stderr']:.4f}"
    return row["part"], row["metric"], row["cache"], str(row["samples"]), f"{row['value']:.4f}{error}"


def sizes(config: config_dict.ConfigDict) -> dry_run.Sizes:
    """The longest context that a task names; tasks of the harness name none."""
    contexts = [getattr(task, "context", 1024) for task in suite.parse_tasks(config.tasks)]
    return dry_run.Sizes(split_list(config.caches), max(contexts))


if __name__ == "__main__":
    program.run(main, "configs/evaluate.py", sizes)
