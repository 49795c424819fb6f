"""The least time of a decode step on devices that are not here, from bytes and operations: which cache wins where.

    kvjax roofline --config=roofline:gqa --workdir=DIR

Prints a table per device, appends a row per device and cache to DIR/roofline.jsonl, what is there already left out,
and draws DIR/roofline.png. `kvjax.evaluate.roofline` says what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from ml_collections import config_dict

import kvjax
from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.errors import KvjaxError
from kvjax.evaluate.roofline import DEVICES, Step
from kvjax.experiments import program
from kvjax.experiments.pareto import save_figure
from kvjax.experiments.tune_pictures import short_names

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
    draw(records.read_rows(file), workdir / "roofline.png")
    print(f"rows: {file}\nplot: {workdir / 'roofline.png'}")


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


def draw(rows: Sequence[Row], file: Path) -> None:
    """A panel per model and device: time over the dense cache's by context; dotted where it does not fit."""
    models, devices = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "on"))
    size = 1.7 + 2.4 * len(devices), 0.7 + 2.7 * len(models)
    shared: dict[str, Any] = {"sharex": True, "sharey": "row", "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(models), len(devices), figsize=size, **shared)
    for line, model in zip(axes, models, strict=True):
        for axis, device in zip(line, devices, strict=True):
            _draw_device(axis, [row for row in rows if (row["model"], row["on"]) == (model, device)])
            axis.set_title(f"{model.removeprefix('random:')}, {device}", fontsize=10)
        line[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.supxlabel(
        f"tokens of each of {rows[0]['batch']} sequences; dotted: the device's memory does not hold them"
    )
    figure.supylabel("least time of a step, over the dense cache's")
    save_figure(figure, file)


def _draw_device(axis: Axes, rows: Sequence[Row]) -> None:
    dense = next(row for row in rows if row["cache"] == "dense")["seconds"]
    names, _ = short_names([row["cache"] for row in rows])
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        ratios = [own / other for own, other in zip(row["seconds"], dense, strict=True)]
        fitting = [ratio if fits(row, n) else math.nan for ratio, n in zip(ratios, row["contexts"], strict=True)]
        axis.plot(row["contexts"], ratios, ":", lw=1, color=f"C{i}")
        axis.plot(row["contexts"], fitting, "-", lw=1.6, color=f"C{i}", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    program.run(main, "configs/roofline.py")
