"""The sweep: perplexity, KL divergence and agreement of cache plans on the same windows of a text.

    python -m experiments.perplexity --config=configs/perplexity.py --config.caches=dense,k4v4 --workdir=DIR

Appends a row per plan to DIR/results.jsonl, prints a table and draws DIR/pareto.png. Killed at any moment and started
again it goes on where it was: finished windows are kept in DIR/partial.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments import pareto, program
from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.evaluate.perplexity import Score, Scorer, Timing, concatenate, cut_windows
from kvjax.evaluate.text import load_text
from kvjax.evaluate.vocabulary import DenseRun, TokenScores
from kvjax.models.model import Model

SAME_RUN = ("model", "model_sha256", "dtype", "text", "tokens_sha256", "protocol", "context", "windows", "offset")


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    names = split_list(config.caches)
    model = load(config.model, config.dtype)
    plans = list(dict.fromkeys(CachePlan.parse(name, model.config) for name in names))
    ids = model.tokenizer.encode(load_text(config.text))
    windows = cut_windows(ids, config.context, config.windows, config.offset)
    results = workdir / "results.jsonl"
    identity = identity_of(config, model, windows, config.protocol)
    rows = []
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} windows")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        sweep = Sweep(model, windows, config.protocol, identity, workdir / "partial")
        for plan in plans:
            sweep.describe(plan)  # refuses what does not fit the model before anything is scored
        for plan in plans:
            task = progress.add_task(str(plan), total=len(windows))
            row = records.find_row(results, {"experiment": "perplexity", **identity, "cache": str(plan)})
            if row is None:
                row = sweep.row(plan, lambda n, task=task: progress.advance(task, n))
                records.append_row(results, row)
            progress.update(task, completed=len(windows))
            rows.append(row)
    wide = Console()
    wide.width = max(wide.width, 130)  # a narrow terminal folds lines, not numbers
    wide.print(_table(rows))
    pareto.draw(rows, workdir / "pareto.png")
    print(f"rows: {results}\nplot: {workdir / 'pareto.png'}")


def identity_of(config: config_dict.ConfigDict, model: Model, windows: np.ndarray, protocol: str) -> dict[str, Any]:
    """What two runs must share for their windows to be the same."""
    tokens = hashlib.sha256(windows.astype(np.int32).tobytes()).hexdigest()
    values = {**config.to_dict(), "model_sha256": model.checksum, "tokens_sha256": tokens, "protocol": protocol}
    values |= {key: strip_paths(values[key]) for key in ("model", "text")}
    return {key: values[key] for key in SAME_RUN}


def strip_paths(names: str) -> str:
    """Names separated by commas, paths cut: where a file lies says nothing to others; its checksum does."""
    return ",".join(Path(name).name if Path(name).exists() else name for name in split_list(names))


class Sweep:
    """Scores plans one after the other; the dense run of each batch of windows is made once and kept on disk."""

    def __init__(self, model: Model, windows: np.ndarray, protocol: str, identity: dict[str, Any], folder: Path):
        self.model, self.windows, self.identity, self.folder = model, windows, identity, folder
        self.scorer = Scorer(model, windows.shape[1], len(windows), protocol)
        self.dense = CachePlan.parse("dense", model.config)

    def row(self, plan: CachePlan, advance) -> dict[str, Any]:
        """The result row of one plan; `advance(n)` hears of n more finished windows."""
        try:
            parts = []
            for start in range(0, len(self.windows), self.scorer.batch):
                parts.append(self._batch(plan, start))
                advance(len(self.windows[start : start + self.scorer.batch]))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return self.describe(plan) | {"error": "out of memory"} | records.provenance()
        finally:
            if plan != self.dense:
                self.scorer.forget(plan)
        score = Score.of(functools.reduce(concatenate, (scores for scores, _ in parts)))
        timing = sum((timing for _, timing in parts), Timing())
        return self.describe(plan) | dataclasses.asdict(score) | dataclasses.asdict(timing) | records.provenance()

    def describe(self, plan: CachePlan) -> dict[str, Any]:
        context = self.windows.shape[1]
        return {
            "experiment": "perplexity",
            **self.identity,
            "cache": str(plan),
            "bits_nominal": plan.bits_nominal,
            "bits_asymptotic": plan.bits_asymptotic,
            "bits_real": plan.bits_real(context),
            "bytes_per_token": plan.counted_bytes(context) / context,
            "compression": plan.compression(context),
            "simulated": plan.simulated,
        }

    def _batch(self, plan: CachePlan, start: int) -> tuple[TokenScores, Timing]:
        """Scores of the windows from `start`, from disk where they are there."""
        file = self._file(str(plan), start)
        if not file.exists():
            windows = self.windows[start : start + self.scorer.batch]
            dense = None if plan == self.dense else self._dense(start)
            scores, kept, timing = self.scorer.run(plan, windows, dense)
            arrays = vars(scores) | dataclasses.asdict(timing)
            if plan == self.dense:
                records.save_arrays(self._file("dense run", start), vars(kept))
            records.save_arrays(file, arrays)
        arrays = records.load_arrays(file)
        timing = Timing(float(arrays.pop("seconds")), float(arrays.pop("compile_seconds")))
        return TokenScores(**arrays), timing

    def _dense(self, start: int) -> DenseRun:
        """The dense run of the windows from `start`, made where it is not there yet."""
        self._batch(self.dense, start)
        return DenseRun(**records.load_arrays(self._file("dense run", start)))

    def _file(self, what: str, start: int) -> Path:
        key = json.dumps([self.identity, what], sort_keys=True)
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:16] / f"{start}.npz"


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = "{model} ({dtype}), {text}: {windows} windows of {context} tokens, {protocol}".format(**first)
    table = Table(title=title, title_justify="left")
    table.add_column("cache", overflow="fold")
    for name in ("bits", "with scales", "real", "x smaller", "nll", "ppl", "KL", "KL p99", "top-1", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        bits = [f"{row[key]:.2f}" for key in ("bits_nominal", "bits_asymptotic", "bits_real", "compression")]
        if "error" in row:
            table.add_row(row["cache"], *bits, row["error"])
            continue
        nll = f"{row['nll']:.4f} ± {row['nll_se']:.4f}"
        rest = f"{row['ppl']:.2f}", f"{row['kld']:.4f}", f"{row['kld_p99']:.3f}", f"{row['top1']:.3f}"
        table.add_row(row["cache"], *bits, nll, *rest, f"{row['seconds']:.1f}")
    return table


if __name__ == "__main__":
    program.run(main, "configs/perplexity.py")
