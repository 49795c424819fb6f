"""Families of caches at equal conditions, their forms paired with their plain ones.

    kvjax quality --workdir=DIR
    kvjax quality --config=frontier --workdir=DIR

Appends a row per text, condition and cache to DIR/STUDY.jsonl, prints a table and draws DIR/STUDY.png; STUDY is the
config's `study`. Killed at any moment and started again it goes on where it was. Differences are paired, of the same
windows, with a 95 % interval by Student's t.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from kvjax import hosts, records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.configs.quality import named
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Score, mean_and_interval
from kvjax.evaluate.sweep import Sweep, identity_of
from kvjax.evaluate.text import name_of, read_windows
from kvjax.experiments import bars, program, style
from kvjax.models.config import ModelConfig
from kvjax.models.model import Model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


class Case(NamedTuple):
    """A cache, and the plain one of its family at the same bits and conditions."""

    family: str
    form: str  # the name or the fields that it has at any bits; "" the plain one
    condition: str
    bits: int
    plan: CachePlan
    plain: CachePlan


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    found = cases(config, read_config(config.model))  # refused before weights are loaded
    model = program.load(config, config.texts)
    rows = [
        row
        for text in split_list(config.texts)
        for condition, (protocol, _) in config.conditions.items()
        for row in _rows(config, model, text, protocol, [c for c in found if c.condition == condition], workdir)
    ]
    hosts.on_first(lambda: style.write(workdir / f"{config.study}.png", draw, rows))
    Console(width=160).print(_table(rows))


def cases(config: config_dict.ConfigDict, model: ModelConfig) -> list[Case]:
    """Every family's forms, at all bits, under all conditions.

    Raises:
      KvjaxError: a cache that the model cannot hold, or bits that are no numbers.
    """
    found = []
    for condition, (_, exact) in config.conditions.items():
        for family, (plain, forms) in config.families.items():
            for bits in map(_whole, config.bits.split(",")):
                plans = {form: CachePlan.parse(named(plain, form, bits, exact), model) for form in ("", *forms)}
                found += [Case(family, form, condition, bits, plan, plans[""]) for form, plan in plans.items()]
    return found


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise KvjaxError(f"{text!r}; expected whole numbers, separated by commas") from None


def _rows(
    config: config_dict.ConfigDict, model: Model, text: str, protocol: str, found: list[Case], workdir: Path
) -> list[Row]:
    """The rows of one text under one condition, from disk where they are there."""
    cut = read_windows(text, model, config.context, config.windows, config.offset)
    sweep = Sweep(model, cut, identity_of(model, name_of(text), cut, protocol, offset=config.offset), workdir)
    dense = CachePlan.parse("dense", model.config)
    contexts = list(map(_whole, config.contexts.split(",")))
    scored = lambda plan: sweep.score(plan, lambda done: None)[0]  # noqa: E731
    rows, file = [], workdir / f"{config.study}.jsonl"
    for case in bars.track(found, f"{Path(text).name}, {protocol}"):
        point = {"experiment": config.study, **sweep.identity, **_described(case, contexts)}
        row = hosts.on_first(lambda point=point: records.find_row(file, point))  # type: ignore[misc]
        if row is None:
            row = point | _figures(*map(scored, (case.plan, case.plain, dense))) | records.provenance()
            hosts.on_first(lambda row=row: records.append_row(file, row))  # type: ignore[misc]
        rows.append(row)
    return rows


def _described(case: Case, contexts: list[int]) -> Row:
    plan = case.plan
    return {
        **{"family": case.family, "form": case.form, "condition": case.condition, "bits": case.bits},
        **{"cache": str(plan), "plain": str(case.plain), "bits_asymptotic": plan.bits_asymptotic},
        **{f"bits_{context}": plan.bits_real(context) for context in contexts},
    }


def _figures(score: Score, plain: Score, dense: Score) -> Row:
    """A cache's figures, and its differences from the plain one and from the dense run."""
    kld, kld_ci95 = mean_and_interval(np.subtract(score.per_token.kld, plain.per_token.kld))
    nll, nll_ci95 = mean_and_interval(np.subtract(score.per_token.nll, dense.per_token.nll))
    paired = {
        "kld_less_plain": kld,
        "kld_less_plain_ci95": kld_ci95,
        "nll_increase": nll,
        "nll_increase_ci95": nll_ci95,
    }
    return {"kld": score.kld, "top1": score.top1, "kld_over_plain": score.kld / plain.kld, **paired}


def draw(rows: list[Row]) -> Figure:
    """KL divergence by bits held at the middle context: a panel for each text and condition, a line a form."""
    panels = list(dict.fromkeys((row["text"], row["condition"]) for row in rows))
    forms = list(dict.fromkeys((row["family"], row["form"]) for row in rows))
    contexts = _contexts(rows[0])
    bits = contexts[len(contexts) // 2]
    figure, axes = style.subplots(len(panels), 1, (9, 1.4 + 4.4 * len(panels)), sharex=True)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for i, form in enumerate(forms):
            own = [r for r in rows if (r["text"], r["condition"]) == panel and (r["family"], r["form"]) == form]
            own.sort(key=lambda row: row[bits])
            again, which = divmod(i, len(style.COLORS))
            look = style.MARKS[(which + again) % len(style.MARKS)] + ("-", "--", ":")[again % 3]
            xs, ys = [row[bits] for row in own], [row["kld"] for row in own]
            axis.plot(xs, ys, look, color=style.COLORS[which], ms=4, lw=1, label=_label(own[0]) if own else None)
        axis.set(ylabel=style.KL, yscale="log")
        axis.set_title("{}, {}".format(*panel), fontsize=style.TITLE)
    axes[-1, 0].set_xlabel(f"bits per element of keys and values at {bits[5:]} tokens, everything counted")
    alone: Row = {key: rows[0][key] for key in ("model", "windows", "context") if key in rows[0]}
    style.title(figure, f"{style.describe(alone)}; lower left is better")
    style.legend(figure, axes[0, 0])
    return figure


def _label(row: Row) -> str:
    """The short name of a cache of any bits, without the exact tokens that its panel's condition gives to all."""
    name = re.sub(r"\b(residual|sink)=\d+,?", "", style.short_name(row["cache"])).replace(",)", ")").replace("()", "")
    head, bracket, more = name.partition("(")
    return re.sub(r"(?<=[a-z])\d", "*", head) + bracket + more


HEADER = ("cache", "with scales", "real", "KL", "× plain", "difference", "nll increase", "top-1")


def line(row: Row) -> list[str]:
    """A row's cells under HEADER, real bits at the smallest context."""
    real = _smallest(row)
    plain = row["cache"] == row["plain"]
    return [
        f"`{row['cache']}`",
        *(f"{row['bits_asymptotic']:.2f}", f"{row[real]:.2f}", f"{row['kld']:.4f}"),
        "" if plain else f"{row['kld_over_plain']:.2f}",
        "" if plain else f"{row['kld_less_plain']:+.4f} ± {row['kld_less_plain_ci95']:.4f}",
        *(f"{row['nll_increase']:+.4f} ± {row['nll_increase_ci95']:.4f}", f"{row['top1']:.3f}"),
    ]


def _smallest(row: Row) -> str:
    """The key of bits at the smallest context."""
    return _contexts(row)[0]


def _contexts(row: Row) -> list[str]:
    """The keys of bits at a context, from the smallest on."""
    return sorted((key for key in row if key.startswith("bits_") and key[5:].isdigit()), key=lambda key: int(key[5:]))


def _table(rows: list[Row]) -> Table:
    first = rows[0]
    title = "{model} ({dtype}), {windows} windows of {context} tokens".format(**first)
    table = Table(title=title, title_justify="left")
    for name in ("text", "condition", *HEADER):
        table.add_column(name, justify="left" if name in ("text", "condition", "cache") else "right", overflow="fold")
    for row in rows:
        table.add_row(row["text"], row["condition"], *line(row))
    return table


if __name__ == "__main__":
    program.run(main, "configs/quality.py")
