"""Perplexity by position: how much worse than dense a cache reads the first tokens of a window, and the last.

    kvjax positions --config.context=4096 --workdir=DIR

A mean over a window hides an error that grows with depth. Appends a row per cache and part of the window to
DIR/positions.jsonl, goes on where it was (windows are kept in DIR/partial), prints a table and draws
DIR/positions.png.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import config_dict

from kvjax import hosts, records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.checks import check_whole
from kvjax.evaluate.perplexity import standard_error
from kvjax.evaluate.sweep import Sweep, identity_of
from kvjax.evaluate.text import name_of, read_windows
from kvjax.evaluate.vocabulary import TokenScores
from kvjax.experiments import bars, curves, program, style
from kvjax.tables import align_columns, format_with_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model_config = read_config(config.model)
    plans = [CachePlan.parse(name, model_config) for name in split_list(config.caches)]
    model = program.load(config, config.text)
    cut = read_windows(config.text, model, config.context, config.windows, config.offset)
    parts = check_whole("parts", config.parts, 1, config.context - 1)
    identity = identity_of(model, name_of(config.text), cut, config.protocol, offset=config.offset)
    sweep = Sweep(model, cut, identity, workdir)
    for plan in plans:
        sweep.scorer.check(plan)
    rows: list[Row] = []
    with bars.shown("windows") as tell:
        for plan in plans:
            point = {"experiment": "positions", **identity, "parts": parts, "cache": str(plan)}
            rows += _found_or_scored(sweep, plan, point, workdir / "positions.jsonl", tell)
    print(table(rows))
    print(f"rows: {workdir / 'positions.jsonl'}")
    hosts.on_first(lambda: style.write(workdir / "positions.png", draw, rows))


def _found_or_scored(sweep: Sweep, plan: CachePlan, point: Row, file: Path, tell: bars.Tell) -> list[Row]:
    """The rows of a plan, from the file where they are there, else appended to it, all together."""
    if found := hosts.on_first(lambda: records.find_rows(file, point)):
        return found
    total = len(sweep.windows)

    def scored(plan: CachePlan) -> TokenScores:
        return sweep.score(plan, lambda done: tell(str(plan), done, total))[0].per_token

    rows = [
        point | part | records.provenance() for part in by_part(scored(sweep.dense), scored(plan), point["parts"])
    ]
    hosts.on_first(lambda: records.append_rows(file, rows))
    return rows


def by_part(dense: TokenScores, scores: TokenScores, parts: int) -> list[Row]:
    """Figures of each part of the windows, whose scores are [w, t] a field.

    Returns:
      For each part its scored positions, from `first` up to `last`, and mean and standard error of the increase in
      nll over dense and of KL, in nats a token.
    """
    increase = np.asarray(scores.nll) - np.asarray(dense.nll)
    bounds = np.linspace(0, increase.shape[1], parts + 1).astype(int)
    rows = []
    for start, end in itertools.pairwise(bounds):
        columns = slice(int(start), int(end))
        rows.append(
            {
                "first": int(start) + 1,
                "last": int(end),
                **_mean("nll_dense", np.asarray(dense.nll)[:, columns]),
                **_mean("nll_increase", increase[:, columns]),
                **_mean("kld", np.asarray(scores.kld)[:, columns]),
            }
        )
    return rows


def _mean(name: str, values: Float[np.ndarray, "w t"]) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_se": standard_error(values)}


def table(rows: Sequence[Row]) -> str:
    """A line per part and cache."""
    lines = [["cache", "positions", "nll (dense)", "increase in nll", "KL"]]
    for row in rows:
        figures = (format_with_error(row, key, ".4f") for key in ("nll_dense", "nll_increase", "kld"))
        lines.append([row["cache"], f"{row['first']}-{row['last']}", *figures])
    return align_columns(lines, left=1)


def draw(rows: Sequence[Row]) -> Figure:
    """KL divergence by position, one line a cache."""
    own = {cache: [row for row in rows if row["cache"] == cache] for cache in dict.fromkeys(r["cache"] for r in rows)}
    middles = lambda rows: [(row["first"] + row["last"]) / 2 for row in rows]  # noqa: E731
    lines = {cache: (middles(rows), rows) for cache, rows in own.items()}
    return curves.draw(lines, "position in the window")


if __name__ == "__main__":
    program.run(main, "configs/positions.py")
