"""Families of caches at equal conditions, their forms paired with their plain ones.

    python -m experiments.quality --config=configs/quality.py --workdir=DIR

Appends a row per text, condition and cache to DIR/quality.jsonl and prints a table. Killed at any moment and started
again it goes on where it was. Differences are paired, of the same windows, with a 95 % interval by Student's t.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import config_dict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import program
from kvjax import hosts, records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Score, mean_and_interval
from kvjax.evaluate.sweep import Sweep, identity_of
from kvjax.evaluate.text import name_of, read_windows
from kvjax.models.config import ModelConfig
from kvjax.models.model import Model

Row = dict[str, Any]


class Case(NamedTuple):
    """A cache, and the plain one of its family at the same bits and conditions."""

    family: str
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
                plans = [CachePlan.parse(_named(plain, bits, exact, form), model) for form in ("", *forms)]
                found += [Case(family, condition, bits, plan, plans[0]) for plan in plans]
    return found


def _named(plain: str, bits: int, *fields: str) -> str:
    name, _, own = plain.replace("{b}", str(bits)).rstrip(")").partition("(")
    inside = ",".join(filter(None, (own, *fields)))
    return f"{name}({inside})" if inside else name


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
    rows = []
    for case in track(found, f"{Path(text).name}, {protocol}", console=Console(stderr=True)):
        point = {"experiment": "quality", **sweep.identity, **_described(case, contexts)}
        row = hosts.on_first(lambda point=point: records.find_row(workdir / "quality.jsonl", point))  # type: ignore[misc]
        if row is None:
            row = point | _figures(*map(scored, (case.plan, case.plain, dense))) | records.provenance()
            hosts.on_first(lambda row=row: records.append_row(workdir / "quality.jsonl", row))  # type: ignore[misc]
        rows.append(row)
    return rows


def _described(case: Case, contexts: list[int]) -> Row:
    plan = case.plan
    return {
        **{"family": case.family, "condition": case.condition, "bits": case.bits},
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


HEADER = ("cache", "with scales", "real", "KL", "× plain", "difference", "nll increase", "top-1")


def line(row: Row) -> list[str]:
    """A row's cells under HEADER, real bits at the smallest context."""
    real = min((key for key in row if key.startswith("bits_") and key[5:].isdigit()), key=lambda key: int(key[5:]))
    plain = row["cache"] == row["plain"]
    return [
        f"`{row['cache']}`",
        *(f"{row['bits_asymptotic']:.2f}", f"{row[real]:.2f}", f"{row['kld']:.4f}"),
        "" if plain else f"{row['kld_over_plain']:.2f}",
        "" if plain else f"{row['kld_less_plain']:+.4f} ± {row['kld_less_plain_ci95']:.4f}",
        *(f"{row['nll_increase']:+.4f} ± {row['nll_increase_ci95']:.4f}", f"{row['top1']:.3f}"),
    ]


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
