"""One layer at a time: KL divergence with a single layer under a cache and all others dense.

    kvjax layers --config.caches=k4v4,k2v2 --workdir=DIR

One layer alone can ruin a model that looks fine on average. Appends the row of each plan, all layers together among
them, to DIR/results.jsonl as `experiments.perplexity` does, goes on where it was, prints a table and draws
DIR/layers.png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

import kvjax
from kvjax import hosts
from kvjax.caches.grammar import join_layers, split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.experiments import bars, curves, program, style
from kvjax.tables import align_columns, format_with_error

Row = dict[str, Any]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model_config = read_config(config.model)
    plans = {name: alone(name, model_config.layers) for name in split_list(config.caches)}
    for name in (each for texts in plans.values() for each in texts):
        CachePlan.parse(name, model_config)  # one that does not fit is refused before weights are loaded
    model = program.load(config, config.text)
    names = [each for name, texts in plans.items() for each in (name, *texts)]
    sizes = {key: config[key] for key in ("protocol", "context", "windows", "offset")}
    with bars.shown("windows") as tell:
        progress = lambda plan, done, total: tell(str(plan), done, total)  # noqa: E731
        rows = kvjax.sweep(model, config.text, names, **sizes, folder=workdir, progress=progress)
    found = {row["cache"]: row for row in rows}
    row_of = lambda name: found[str(kvjax.plan(model, name))]  # noqa: E731
    each = {name: [row_of(text) for text in texts] for name, texts in plans.items()}
    print(table(each, {name: row_of(name) for name in plans}))
    lines = {name: (range(len(rows)), rows) for name, rows in each.items()}
    print(f"rows: {workdir / 'results.jsonl'}")
    hosts.on_first(lambda: style.write(workdir / "layers.png", curves.draw, lines, "the layer that has the cache"))


def alone(name: str, layers: int) -> list[str]:
    """The plans in which one layer has the cache and the others are dense, by layer."""
    others = lambda layer: [i for i in range(layers) if i != layer]  # noqa: E731
    return [join_layers({name: [i], "dense": others(i)} if layers > 1 else {name: [i]}) for i in range(layers)]


def table(each: Mapping[str, Sequence[Row]], whole: Mapping[str, Row]) -> str:
    """A line per layer, a column per cache, KL in nats a token; below them their sum, and all layers at once."""
    lines = [["layer alone", *each]]
    lines += [
        [str(layer), *(format_with_error(row, "kld", ".5f") for row in rows)]
        for layer, rows in enumerate(zip(*each.values(), strict=True))
    ]
    lines.append(["their sum", *(f"{sum(row['kld'] for row in rows):.5f}" for rows in each.values())])
    lines.append(["all at once", *(format_with_error(whole[name], "kld", ".5f") for name in each)])
    return align_columns(lines, left=1)


if __name__ == "__main__":
    program.run(main, "configs/layers.py")
