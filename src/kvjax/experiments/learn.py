"""Trains the encoders of a cache, adapters of a model for a cache, or a model, and judges them on other texts.

    kvjax learn --workdir=DIR
    kvjax learn --config=learn:lora --config.cache=k2v2@kivi --workdir=DIR
    kvjax learn --config=learn:model --config.model=smollm2-135m-mha --workdir=DIR

Appends a row a layer to DIR/learn.jsonl, and scores to DIR/results.jsonl; draws DIR/learn.png. Killed at any moment
and started again it goes on where it was. What was learned is kept in $KVJAX_CACHE: every program takes the cache
from then on, with --config.calibration as here. Adapters go to DIR/adapters.safetensors, which programs take as
--config.adapters, and their scores to DIR/adapters.jsonl. A model goes to the folder DIR/model-CHECKSUM, which
programs take as --config.model, its training to DIR/model.jsonl, and scores of caches with it to DIR/results.jsonl.
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
from kvjax.checkpoints import orbax
from kvjax.checkpoints.load import read_config
from kvjax.errors import KvjaxError
from kvjax.evaluate.learned import text_of
from kvjax.evaluate.perplexity import score_against
from kvjax.evaluate.text import check_disjoint, check_unseen, read_windows
from kvjax.experiments import bars, program, style
from kvjax.learning.pretrain import head_likeness
from kvjax.models.calibration import Calibration
from kvjax.tables import align_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
SETTINGS = ("steps", "rate", "polish", "polish_rate", "batch")
SIZES = ("protocol", "context", "windows", "offset")


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    programs = {"encoders": learn_encoders, "lora": learn_adapters, "model": learn_model}
    if config.what not in programs:
        raise KvjaxError(f"what={config.what!r}; expected one of {', '.join(programs)}")
    if not config.calibration:
        raise KvjaxError("calibration is empty; expected the text to learn from")
    for cache in split_list(config.cache) if config.what == "model" else [config.cache]:
        CachePlan.parse(cache, read_config(config.model))
    check_unseen(config.judged_on, config.calibration)
    programs[config.what](config, workdir)


def learn_encoders(config: config_dict.ConfigDict, workdir: Path) -> None:
    """Trains and judges the encoders of a cache."""
    model = program.load(config)
    plan = CachePlan.parse(config.cache, model.config)
    settings = {name: config[name] for name in SETTINGS}
    rows = kvjax.learn(model, plan, **settings, folder=workdir, progress=_tell)
    judged = _swept(config, model, [config.cache.replace("basis=learned", "basis=balanced"), config.cache], workdir)
    hosts.on_first(lambda: style.write(workdir / "learn.png", draw, rows))
    print(table(judged))


def _swept(config: config_dict.ConfigDict, model: Model, caches: list[str], workdir: Path) -> list[Row]:
    """Scores of the caches on every judged text."""
    sizes = {name: config[name] for name in SIZES}
    rows: list[Row] = []
    with bars.shown("windows") as tell:
        progress = lambda plan, done, total: tell(str(plan), done, total)  # noqa: E731
        for text in split_list(config.judged_on):
            rows += kvjax.sweep(model, text, caches, **sizes, folder=workdir, progress=progress)
    return rows


def learn_model(config: config_dict.ConfigDict, workdir: Path) -> None:
    """Trains a model, leaves it in a folder, and judges caches with it and with the one it begins as.

    KL divergence is from the same model with exact keys and values.
    """
    model = program.load_plain(config)
    windows = config.seen_windows or None
    seen, _ = _seen_and_judged(config, model, windows)
    options = {name: config[name] for name in ("batch", "steps", "rate")}
    with bars.shown("steps") as tell:
        progress = functools.partial(tell, model.name)
        sizes = {"context": config.seen_context, "windows": windows, "folder": workdir}
        trained, curve = kvjax.learn_model(model, config.calibration, **sizes, **options, progress=progress)
    costs = [cost for _, cost in curve]
    print(f"nll of windows that are not learned from: {costs[0]:.4f} at the start, {min(costs):.4f} at best")
    likeness = {
        f"{name}_likeness": [head_likeness(each.config, each.params, name) for each in (model, trained)]
        for name in ("k", "v")
    }
    known = {"experiment": "model", "model": model.name, "model_sha256": model.checksum, "dtype": str(model.dtype)}
    learned = {"learned_from": seen.identity, **options, "curve": curve, **likeness}
    hosts.on_first(lambda: records.write_rows(workdir / "model.jsonl", [known | learned | records.provenance()]))
    folder = workdir / f"model-{trained.checksum[:8]}"
    if not hosts.on_first(folder.exists):
        orbax.save(folder, trained)
    print(f"the trained model is {folder}; programs take it as --config.model")
    for each in (model, trained):
        print(f"\n{each.name}\n{table(_swept(config, each, split_list(config.cache), workdir))}")


def learn_adapters(config: config_dict.ConfigDict, workdir: Path) -> None:
    """Trains adapters for a cache, leaves them in DIR/adapters.safetensors, and judges the adapted model.

    KL divergence is from the model without adapters and with exact keys and values, with and without adapters.
    """
    model = program.load_plain(config)  # without statistics of the text, which adapters need not
    plan = CachePlan.parse(config.cache, model.config)
    _, judged = _seen_and_judged(config, model, config.seen_windows)
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


def _seen_and_judged(
    config: config_dict.ConfigDict, model: Model, windows: int | None
) -> tuple[Calibration, dict[str, Int[np.ndarray, "w c"]]]:
    """What is learned from, and the windows of every judged text.

    Raises:
      KvjaxError: a text that cannot be read or is too short, or the two share tokens.
    """
    seen = text_of(model, config.calibration, config.seen_context, windows)
    judged = {
        text: read_windows(text, model, config.context, config.windows, config.offset)
        for text in split_list(config.judged_on)
    }
    for each in judged.values():
        check_disjoint(each, seen.windows)
    return seen, judged


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
