"""One layer at a time: KL divergence with a single layer under a cache and all others dense.

    kvjax layers --config.caches=k4v4,k2v2 --workdir=DIR

One layer alone can ruin a model that looks fine on average. Appends the row of each plan, all layers together among
them, to DIR/results.jsonl as `experiments.perplexity` does, goes on where it was, prints a table and draws
DIR/layers.png.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import config_dict

import kvjax
from kvjax import hosts
from kvjax.caches.grammar import join_layers, split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.experiments import bars, curves, program, style
from kvjax.tables import align_columns, format_with_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    print(align_columns([["layer alone", *whole_rows(rows)], *lines(rows)], left=1))
    print(f"rows: {workdir / 'results.jsonl'}")
    hosts.on_first(lambda: style.write(workdir / "layers.png", draw, rows))


def alone(name: str, layers: int) -> list[str]:
    """The plans in which one layer has the cache and the others are dense, by layer."""
    others = lambda layer: [i for i in range(layers) if i != layer]  # noqa: E731
    return [join_layers({name: [i], "dense": others(i)} if layers > 1 else {name: [i]}) for i in range(layers)]


def whole_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """By the cache, the row in which all layers have it."""
    return {row["cache"]: row for row in rows if ":" not in row["cache"]}


def by_layer(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By the cache, the rows in which one layer has it, in the order of layers; of a model of one layer its row."""
    whole = whole_rows(rows)
    found: dict[str, dict[int, Row]] = {cache: {} for cache in whole}
    for row in rows:
        if match := re.search(r"(?<![^;])(\d+):(?!dense)([^;]+)", row["cache"]):
            found[match[2]][int(match[1])] = row
    return {cache: [own[layer] for layer in sorted(own)] or [whole[cache]] for cache, own in found.items()}


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """A line per layer, a column per cache, KL in nats a token; below them their sum, and all layers at once."""
    each = by_layer(rows)
    found = [
        [str(layer), *(format_with_error(row, "kld", ".5f") for row in own)]
        for layer, own in enumerate(zip(*each.values(), strict=True))
    ]
    found.append(["their sum", *(f"{sum(row['kld'] for row in own):.5f}" for own in each.values())])
    found.append(["all at once", *(format_with_error(row, "kld", ".5f") for row in whole_rows(rows).values())])
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """KL divergence by the layer that has the cache, one line a cache."""
    each = {cache: (range(len(own)), own) for cache, own in by_layer(rows).items()}
    return curves.draw(each, "the layer that has the cache")


if __name__ == "__main__":
    program.run(main, "configs/layers.py")
