"""The least time of a decode step on devices that are not here, from bytes and operations: which cache wins where.

    kvjax roofline --config=roofline:gqa --workdir=DIR

Prints a table per device, appends a row per device and cache to DIR/roofline.jsonl, what is there already left out,
and draws DIR/roofline.png. `kvjax.evaluate.roofline` says what is counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

import kvjax
from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.errors import KvjaxError
from kvjax.evaluate.roofline import DEVICES, Step
from kvjax.experiments import program, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
TABLE_CONTEXTS = (1024, 8192, 32768, 131072)  # what the docs' table shows of a row's contexts


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    file, contexts = workdir / "roofline.jsonl", _contexts(config.contexts)
    names = split_list(config.caches)
    for name in split_list(config.devices):
        steps = kvjax.roofline(config.model, name, names, contexts=contexts, batch=config.batch)
        device = DEVICES[name]
        print(f"{config.model} on {name}, {device.ridge:.0f} operations per byte, batch {config.batch}: ms a step")
        print(f"{steps.table()}\n")
        for cache in dict.fromkeys(step.cache for step in steps):
            own = [step for step in steps if step.cache == cache]
            row = {"experiment": "roofline", "model": config.model, "on": name, **_figures(own)}
            if records.find_row(file, row) is None:
                records.append_row(file, row | records.provenance())
    print(f"rows: {file}")
    style.write(workdir / "roofline.png", draw, records.read_rows(file))


def _contexts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise KvjaxError(f"contexts={text}: expected whole numbers separated by commas") from None


def _figures(steps: Sequence[Step]) -> Row:
    """What the steps of one cache say, by context."""
    last = steps[-1]
    each = ("context", "seconds", "computing", "cache_bytes", "flops", "held_bytes")
    lists = {f"{name}s" if name == "context" else name: [getattr(step, name) for step in steps] for name in each}
    alone = {name: getattr(last, name) for name in ("weight_bytes", "ridge_tokens", "room")}
    return {"cache": str(last.cache), "batch": last.batch, "ridge": last.device.ridge, **alone, **lists}


def fastest(rows: Sequence[Row], context: int) -> str:
    """The cache of these rows of one device whose step is fastest at a context, of those that fit; "" where none."""
    fitting = [(seconds(row, context), row["cache"]) for row in rows if fits(row, context)]
    return min(fitting)[1] if fitting else ""


def seconds(row: Row, context: int) -> float:
    """A step's least time at a context."""
    return row["seconds"][row["contexts"].index(context)]


def fits(row: Row, context: int) -> bool:
    """Whether the device's memory holds the cache at a context."""
    return row["held_bytes"][row["contexts"].index(context)] <= DEVICES[row["on"]].memory


def draw(rows: Sequence[Row]) -> Figure:
    """A panel per model and device: time over the dense cache's by context; dotted where it does not fit."""
    models, devices = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "on"))
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    looks = dict(zip(caches, itertools.cycle(zip(style.COLORS, style.MARKS, strict=True)), strict=False))
    size = 1.0 + 2.4 * len(devices), 1.3 + 2.6 * len(models)
    figure, axes = style.subplots(len(models), len(devices), size, sharex=True, sharey="row")
    for line, model in zip(axes, models, strict=True):
        for axis, device in zip(line, devices, strict=True):
            _draw_device(axis, [row for row in rows if (row["model"], row["on"]) == (model, device)], looks)
            axis.set(xlabel="tokens of each sequence" if model == models[-1] else "")
            axis.set_title(f"{model.removeprefix('random:')}, {device}", fontsize=style.TITLE)
    for name, (color, mark) in zip(style.short_names(caches)[0], looks.values(), strict=True):
        axes[0, 0].plot([], [], f"{mark}-", ms=4, color=color, label=name)
    figure.supylabel("least time of a decode step, over the dense cache's", fontsize=style.PLAIN)
    said = "Computed, not measured: {batch} sequences; dotted: the device's memory does not hold them"
    style.title(figure, said.format(**rows[0]))
    style.legend(figure, axes[0, 0])
    return figure


def _draw_device(axis: Axes, rows: Sequence[Row], looks: Mapping[str, tuple[str, str]]) -> None:
    dense = next(row for row in rows if row["cache"] == "dense")["seconds"]
    for i, row in enumerate(rows):
        color, mark = looks[row["cache"]]
        ratios = [own / other for own, other in zip(row["seconds"], dense, strict=True)]
        fitting = [ratio if fits(row, n) else math.nan for ratio, n in zip(ratios, row["contexts"], strict=True)]
        axis.plot(row["contexts"], ratios, ":", lw=1, color=color)
        width = 3.0 - 0.35 * i  # of lines that coincide, those below show
        axis.plot(row["contexts"], fitting, f"{mark}-", lw=width, ms=4, markevery=(i % 2, 2), color=color)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks([2**11, 2**13, 2**15, 2**17])
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K")
    axis.yaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    program.run(main, "configs/roofline.py")
