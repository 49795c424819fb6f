"""Trains the encoders of a cache on a text and judges them on others, beside the encoders they began with.

    kvjax learn --workdir=DIR

Appends a row a layer to DIR/learn.jsonl, and scores to DIR/results.jsonl; draws DIR/learn.png. Killed at any moment
and started again it goes on where it was. What was learned is kept in $KVJAX_CACHE: every program takes the cache
from then on, with --config.calibration as here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

import kvjax
from kvjax import hosts
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.errors import KvjaxError
from kvjax.experiments import bars, program, style
from kvjax.tables import align_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
SETTINGS = ("steps", "rate", "polish", "polish_rate", "batch")
SIZES = ("protocol", "context", "windows", "offset")


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if not config.calibration:
        raise KvjaxError("calibration is empty; expected the text to learn from")
    plan = CachePlan.parse(config.cache, read_config(config.model))
    model = program.load(config, config.judged_on)
    settings = {name: config[name] for name in SETTINGS}
    rows = kvjax.learn(model, plan, **settings, folder=workdir, progress=_tell)
    caches = [config.cache.replace("basis=learned", "basis=balanced"), config.cache]
    judged: list[Row] = []
    with bars.shown("windows") as tell:
        progress = lambda plan, done, total: tell(str(plan), done, total)  # noqa: E731
        for text in split_list(config.judged_on):
            sizes = {name: config[name] for name in SIZES}
            judged += kvjax.sweep(model, text, caches, **sizes, folder=workdir, progress=progress)
    hosts.on_first(lambda: style.write(workdir / "learn.png", draw, rows))
    print(table(judged))


def _tell(row: Row) -> None:
    print(f"layer {row['layer']}: {row['first']:.3g} to {row['least']:.3g} nats on the unseen window", flush=True)


def table(rows: list[Row]) -> str:
    """KL and nll of what was judged."""
    lines: list[tuple[str, ...]] = [("cache", "text", "KL", "nll")]
    lines += [(row["cache"], row["text"], f"{row['kld']:.4f}", f"{row['nll']:.4f}") for row in rows]
    return align_columns(lines, left=2)


def draw(rows: list[Row]) -> Figure:
    """What the encoders cost on the unseen window as they are trained, as parts of what they cost at the start."""
    figure, ((axis,),) = style.subplots()
    depth = style.scale(0, len(rows))
    for row in rows:
        steps, costs = zip(*row["curve"], strict=True)
        together = row["layer"] == "all"
        look: Row = {"color": "black", "lw": 2} if together else {"color": depth.to_rgba(row["layer"]), "lw": 1}
        label = "all layers, KL divergence" if together else None
        axis.plot(steps, [cost / row["first"] for cost in costs], label=label, **look)
    axis.axhline(1, color=style.GRAY, lw=0.8, ls=":")
    axis.set(xlabel="step", ylabel="cost on the unseen window, at the start 1")
    first, name = rows[0], style.short_name(rows[0]["cache"])
    style.title(figure, f"{style.describe(first)}, {name}: one line a layer, dark to light from the first")
    style.legend(figure, axis)
    return figure


if __name__ == "__main__":
    program.run(main, "configs/learn.py")
