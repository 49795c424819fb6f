"""Trains the encoders of a cache, or adapters of a model for a cache, on a text, and judges them on others.

    kvjax learn --workdir=DIR
    kvjax learn --config=learn:lora --config.cache=k2v2@kivi --workdir=DIR

Appends a row a layer to DIR/learn.jsonl, and scores to DIR/results.jsonl; draws DIR/learn.png. Killed at any moment
and started again it goes on where it was. What was learned is kept in $KVJAX_CACHE: every program takes the cache
from then on, with --config.calibration as here. Adapters go to DIR/adapters.safetensors, which programs take as
--config.adapters, and their scores to DIR/adapters.jsonl.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from ml_collections import config_dict

import kvjax
from kvjax import Adapters, Model, hosts, records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.errors import KvjaxError
from kvjax.evaluate.calibrated import calibration
from kvjax.evaluate.perplexity import score_against
from kvjax.evaluate.text import check_disjoint, check_unseen, read_windows
from kvjax.experiments import bars, program, style
from kvjax.tables import align_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
SETTINGS = ("steps", "rate", "polish", "polish_rate", "batch")
SIZES = ("protocol", "context", "windows", "offset")


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    programs = {"encoders": learn_encoders, "lora": learn_adapters}
    if config.what not in programs:
        raise KvjaxError(f"what={config.what!r}; expected one of {', '.join(programs)}")
    if not config.calibration:
        raise KvjaxError("calibration is empty; expected the text to learn from")
    plan = CachePlan.parse(config.cache, read_config(config.model))
    check_unseen(config.judged_on, config.calibration)
    programs[config.what](config, plan, workdir)


def learn_encoders(config: config_dict.ConfigDict, plan: CachePlan, workdir: Path) -> None:
    """Trains and judges the encoders of a cache."""
    model = program.load(config)
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


def learn_adapters(config: config_dict.ConfigDict, plan: CachePlan, workdir: Path) -> None:
    """Trains adapters for a cache, leaves them in DIR/adapters.safetensors, and judges the adapted model.

    KL divergence is from the model without adapters and with exact keys and values, with and without adapters.
    """
    model = program.load_plain(config)  # without statistics of the text, which adapters need not
    seen = calibration(model, config.calibration, config.seen_context, config.seen_windows, 0)
    judged = {
        text: read_windows(text, model, config.context, config.windows, config.offset)
        for text in split_list(config.judged_on)
    }
    for windows in judged.values():
        check_disjoint(windows, seen)
    sizes = {"context": config.seen_context, "windows": config.seen_windows, "folder": workdir}
    options = {name: config[name] for name in ("rank", "steps", "rate")}
    with bars.shown("steps") as tell:
        progress = functools.partial(tell, str(plan))
        adapters = kvjax.learn_adapters(model, plan, config.calibration, **sizes, **options, progress=progress)
    hosts.on_first(lambda: adapters.save(workdir / "adapters.safetensors"))
    costs = [cost for _, cost in adapters.card["curve"]]
    print(f"KL on the window that is not learned from: {costs[0]:.4f} at the start, {min(costs):.4f} at best")
    known = {"experiment": "adapters", **adapters.card, **records.provenance()}
    rows = [
        {**known, "text": Path(text).name, **row}
        for text, windows in judged.items()
        for row in _judged(config, model, adapters, plan, windows)
    ]
    hosts.on_first(lambda: records.write_rows(workdir / "adapters.jsonl", rows))
    print(table(rows))


def _judged(
    config: config_dict.ConfigDict, model: Model, adapters: Adapters, plan: CachePlan, windows: Int[np.ndarray, "w c"]
) -> Iterator[Row]:
    """Rows of the plan without adapters, and of the exact cache and the plan with them."""
    sizes = {name: config[name] for name in SIZES}
    dense, other = CachePlan.parse("dense", model.config), kvjax.adapted(model, adapters)
    scored = functools.partial(score_against, model, windows=windows, protocol=config.protocol)
    plain = scored(model, plan)
    for cache, score in ((plan, plain), (dense, scored(other, dense)), (plan, scored(other, plan))):
        less = score.compare(plain)
        paired = {"kld_less_plain": less.kld, "kld_less_plain_ci95": less.kld_interval}
        yield {"cache": str(cache), "adapters": score is not plain, **sizes, **score.figures, **paired}


def _tell(row: Row) -> None:
    print(f"layer {row['layer']}: {row['first']:.3g} to {row['least']:.3g} nats on the unseen window", flush=True)


def table(rows: list[Row]) -> str:
    """KL and nll of what was judged."""
    lines: list[tuple[str, ...]] = [("cache", "text", "KL", "nll")]
    for row in rows:
        name = row["cache"] + " with adapters" * row.get("adapters", False)
        lines.append((name, row["text"], f"{row['kld']:.4f}", f"{row['nll']:.4f}"))
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
