"""Writes the tables of docs/ from the committed results: make pages.

Each table stands between `<!-- NAME -->` and `<!-- end -->`; the pictures in docs/ are drawn from the same rows, and
docs/bad_inputs.md is written whole. What has rows of uncommitted changes stays as it is.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from scipy.stats import spearmanr

from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.evaluate.sweep import COLUMNS
from kvjax.experiments import (
    checkpoint_keys,
    closed_loop,
    device_bytes,
    head_errors,
    layers,
    loading_memory,
    pareto,
    plans,
    quality,
    similarity,
    style,
    tune_pictures,
)
from kvjax.experiments import roofline as roofline_program
from kvjax.experiments import searches as search_courses
from kvjax.experiments.sources import check_clean, describe_source
from kvjax.files import write_atomically
from kvjax.models.hf_config import KEYS, ROPE_KEYS
from kvjax.models.zoo import RANDOM
from kvjax.records import read_rows
from kvjax.tables import format_figure, format_with_error

ROOT = Path(__file__).resolve().parents[3]  # also by the link in the root
Row = dict[str, Any]
T = TypeVar("T")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table, all but the first column to the right where they hold numbers."""
    lines = [header, ["---"] + ["---:" if numbers else "---"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def sweep(rows: list[Row]) -> str:
    header = ("cache", "bits", "with scales", "real", "peak", "× smaller", "KL", "KL p99", "top-1", "nll", "ppl")
    return f"{describe_source(rows)}\n\n" + table(
        header,
        [
            [
                f"`{row['cache']}`",
                *(format_figure(row, key, ".2f") for key in COLUMNS.values()),
                *(format_with_error(row, "kld", ".4f"), f"{row['kld_p99']:.3f}", f"{row['top1']:.3f}"),
                *(format_with_error(row, "nll", ".4f"), f"{row['ppl']:.2f}"),
            ]
            for row in rows
        ],
    )


def reference(rows: list[Row]) -> str:
    single, double = ([row for row in rows if row["dtype"] == dtype] for dtype in ("float32", "float64"))
    in_float64 = {row["cache"]: row for row in double}
    header = ("cache", "KL float64", "nll float64", "KL float32", "nll float32", "top-1 float32")
    lines = []
    for row in single:
        wide = in_float64[row["cache"]]
        figures = [f"{each['kld']:.5f} {each['nll']:.4f}".split() for each in (wide, row)]
        lines.append([f"`{row['cache']}`", *figures[0], *figures[1], f"{row['top1']:.3f}"])
    return f"{describe_source(rows)}\n\n" + table(header, lines)


def decode(rows: list[Row]) -> str:
    """A step with each cache; where it was measured also what a step that completes a block takes more."""
    apart = any(row.get("flush_ms") is not None for row in rows)
    lines = [
        [
            f"`{row['cache']}`",
            row["kv_dtype"],
            *(f"{row['step_ms']:.1f}", f"{row['ratio']:.2f}"),
            *([format_figure(row, "flush_ms", ".1f")] if apart else []),
            *(f"{row['cache_bytes'] / 1e6:.1f}", f"{row['temp_bytes'] / 1e6:.2f}"),
        ]
        for row in rows
    ]
    block = ["more at a full block, ms"] if apart else []
    header = ("cache", "KV dtype", "ms a step", "× dense", *block, "cache MB", "temporary MB")
    return f"{describe_source(rows)}\n\n{table(header, lines)}"


def forward(rows: list[Row]) -> str:
    header = ("what", "protocol", "tokens/s", "× HF")
    lines = [
        [f"`{row['cache']}`", row["protocol"], f"{row['tokens_per_second']:.0f}", f"{row['x_hf']:.2f}"]
        for row in rows
    ]
    return f"{describe_source(rows)}\n\n" + table(header, lines)


def xquant(rows: list[Row]) -> str:
    header = ("cache", *BITS, "KL", "top-1", "nll", "KL, essays", "nll, essays")
    first, other = ([row for row in rows if (row["text"] == "demo") == demo] for demo in (False, True))
    lines = []
    for row, its in zip(first, other, strict=True):
        assert row["cache"] == its["cache"]
        figures = (
            *(f"{row['kld']:.4f}", f"{row['top1']:.3f}", f"{row['nll']:.4f}"),
            *(f"{its['kld']:.4f}", f"{its['nll']:.4f}"),
        )
        lines.append([f"`{row['cache']}`", *_bits(row), *figures])
    return f"{describe_source(rows)}\n\n" + table(header, lines)


BITS = {"bits with scales": "bits_asymptotic", "real": "bits_real", "peak": "bits_peak"}


def _bits(row: Row) -> list[str]:
    return [format_figure(row, key, ".2f") for key in BITS.values()]


def beside(rows: list[Row], by: str = "model") -> str:
    """Several models, or what else rows differ by, under the same caches."""
    columns: dict[str, dict[str, Row]] = {}
    for row in rows:
        columns.setdefault(row[by], {})[row["cache"]] = row
    figures = ("with scales", "KL", "top-1", "nll")
    lines = []
    for cache in dict.fromkeys(row["cache"] for row in rows):
        cells = [f"`{cache}`"]
        for own in columns.values():
            cells += _figures(own[cache]) if cache in own else [""] * len(figures)
        lines.append(cells)
    header = ("cache", *(f"{name}: {figure}" for name in columns for figure in figures))
    return f"{describe_source(rows)}\n\n" + table(header, lines)


def _figures(row: Row) -> list[str]:
    return [f"{row['bits_asymptotic']:.2f}", f"{row['kld']:.4f}", f"{row['top1']:.3f}", f"{row['nll']:.4f}"]


def beyond(rows: list[Row]) -> str:
    lines = [[f"`{r['cache']}`", *_bits(r), f"{r['kld']:.4f}", f"{r['nll']:.4f}"] for r in rows]
    return f"{describe_source(rows)}\n\n" + table(("cache", *BITS, "KL", "nll"), lines)


def brief(rows: list[Row]) -> str:
    """Caches on WikiText-2 alone."""
    lines = [[f"`{row['cache']}`", *_figures(row)] for row in rows if row["text"] != "demo"]
    return f"{describe_source(rows)}\n\n" + table(("cache", "with scales", "KL", "top-1", "nll"), lines)


def trained(rows: list[Row]) -> str:
    """How models were trained, a line a look at the windows that choose."""
    parts = [describe_source(rows)]
    for row in rows:
        text = "{text}, {tokens} tokens in windows of {context}".format(**row["learned_from"])
        alike = "; ".join(f"{name} {row[f'{name}_likeness'][-1]:.2f}" for name in ("k", "v"))
        parts.append(f"{row['model']}: {text}, {row['batch']} a step. Heads' likeness (1: copies): {alike}.")
        parts.append(table(("step", "nll, nats a token"), [[str(step), f"{nll:.3f}"] for step, nll in row["curve"]]))
    return "\n\n".join(parts)


def only(render: Callable[[list[Row]], T], *patterns: str, **fields: str) -> Callable[[list[Row]], T]:
    """A table, or a figure, of the rows which have these fields, and whose caches have one of the patterns if any."""

    def rendered(rows: list[Row]) -> T:
        own = [row for row in rows if all(row[key] == value for key, value in fields.items())]
        fits = lambda row: any(fnmatch.fnmatchcase(row["cache"], each) for each in patterns)  # noqa: E731
        return render([row for row in own if not patterns or fits(row)])

    return rendered


def at_equal_conditions(rows: list[Row]) -> str:
    """Families of caches under the same conditions: a table a text, a line a form, its KL at each width."""
    parts = [describe_source(rows)]
    for text in dict.fromkeys(row["text"] for row in rows):
        own = [row for row in rows if row["text"] == text]
        columns = list(dict.fromkeys((row["condition"], row["protocol"], row["bits"]) for row in own))
        cells = {(row["family"], row["form"], row["condition"], row["bits"]): _beside_plain(row) for row in own}
        forms = dict.fromkeys((row["family"], row["form"]) for row in own)
        lines = [
            [f"{family}: `{form}`" if form else family, *(cells.get((family, form, c, b), "") for c, _, b in columns)]
            for family, form in forms
        ]
        header = ("family and form", *(f"{condition}, {bits} bits" for condition, _, bits in columns))
        protocols = ", ".join(dict.fromkeys(f"{condition} {protocol}" for condition, protocol, _ in columns))
        title = f"KL on {text}, {own[0]['windows']} windows of {own[0]['context']} tokens ({protocols}):"
        parts += [title, table(header, lines)]
    return "\n\n".join(parts)


def _beside_plain(row: Row) -> str:
    """KL, and how many times that of the plain form; a star where the interval of their difference leaves out 0."""
    if row["cache"] == row["plain"]:
        return f"{row['kld']:.4f}"
    told = "*" if abs(row["kld_less_plain"]) > row["kld_less_plain_ci95"] else ""
    return f"{row['kld']:.4f} (× {row['kld_over_plain']:.2f}{told})"


CONTEXTS = ("1024", "8192", "131072")


def frontier(rows: list[Row]) -> str:
    """Methods beside the control of the same width; bits at three contexts."""
    header = ("cache", *(f"{int(each) // 1024}K" for each in CONTEXTS), *quality.HEADER[3:])

    def line(row: Row) -> list[str]:
        name, _, _, *figures = quality.line(row)
        return [name, *(f"{row[f'bits_{each}']:.2f}" for each in CONTEXTS), *figures]

    parts = [describe_source(rows)]
    title = "{model}, {text}, {condition} ({protocol}), {windows} windows of {context} tokens:"
    for heading in dict.fromkeys(title.format(**row) for row in rows):
        own = [row for row in rows if title.format(**row) == heading]
        parts += [heading, table(header, list(map(line, own)))]
    return "\n\n".join(parts)


def adapters(rows: list[Row]) -> str:
    """A plan without adapters, and the exact cache and the plan with them; KL from the model without."""
    lines = []
    for row in rows:
        less = "" if not row["kld_less_plain"] else f"{row['kld_less_plain']:+.4f} ± {row['kld_less_plain_ci95']:.4f}"
        figures = f"{row['kld']:.4f}", less, f"{row['nll']:.4f}", f"{row['top1']:.3f}"
        lines.append([row["text"], f"`{row['cache']}`", "yes" if row["adapters"] else "", *figures])
    header = ("text", "cache", "adapters", "KL", "difference", "nll", "top-1")
    return f"{describe_source(rows)}\n\n{table(header, lines)}"


PAPER = {  # the KV column of XQuant's tables 1 and 4
    "random:llama-2-7b": {"x8": 0.26, "x4": 0.13, "x3": 0.10, "xcl4": 0.13, "xcl3": 0.10, "xcl2": 0.08},
    "random:llama-3.1-8b": {"x4": 0.27, "x3": 0.20, "x2": 0.14, "xcl4": 0.27, "xcl3": 0.21, "xcl2": 0.15},
}


def accounting() -> str:
    """Computed, not measured: cache size over a 16-bit KV cache at long context."""
    lines = []
    for name, column in PAPER.items():
        for cache, share in column.items():
            config = RANDOM[name]
            own = CachePlan.parse(cache, config).bits_asymptotic / 16
            figures = f"{share:.2f}", f"{own:.4f}", f"{1 / share:.1f}", f"{1 / own:.2f}"
            lines.append([f"{name.removeprefix('random:')} `{cache}`", *figures])
    return table(("model and cache", "paper", "ours", "paper's ratio", "true ratio"), lines)


def latents(rows: list[Row]) -> str:
    header = ("cache", "values", "ms a step", "× dense", "cache MB", "temporary MB")
    lines = [
        [
            f"`{row['cache']}`" + (" (bfloat16)" if row["kv_dtype"] == "bfloat16" else ""),
            "rebuilt" if row["values_rebuilt"] else "absorbed" if row["cache"].startswith("x") else "",
            *(f"{row['step_ms']:.1f}", f"{row['ratio']:.2f}"),
            *(f"{row['cache_bytes'] / 1e6:.1f}", f"{row['temp_bytes'] / 1e6:.2f}"),
        ]
        for row in rows
    ]
    return f"{describe_source(rows)}\n\n" + table(header, lines)


def agreement(rows: list[Row]) -> str:
    header = ("cache", "texts that are the same", "share of tokens before the first difference")
    lines = [[f"`{r['cache']}`", f"{r['whole']} of {r['prompts']}", f"{r['share']:.0%}"] for r in rows]
    return f"{describe_source(rows)} Up to {rows[0]['max_new_tokens']} tokens.\n\n" + table(header, lines)


def fuzz(rows: list[Row]) -> str:
    lines = [[row["kind"], *(f"{row[key]}" for key in ("tried", "loaded", "refused", "other"))] for row in rows]
    header = ("what", "tried", "accepted", "refused in one line", "anything else")
    return f"{describe_source(rows)}\n\n" + table(header, lines)


def bad_inputs(rows: list[Row], fuzzed: list[Row]) -> str:
    """A page of its own."""
    header = ("input", "given", "exit", "what it said")
    lines = [[row["input"], f"`{row['given']}`", str(row["exit"]), f"`{row['said']}`"] for row in rows]
    text = (
        "Bad input, given to the programs by `python -m tests.robustness.bad_input`: one line each, no traceback, and"
        " nothing half-written. Folders are relative to the case's own; `tiny` and `text.txt` there are a small model"
        " and a text, which the case has made bad where its arguments do not say more."
    )
    by = "`python -m tests.robustness.fuzz`"
    damaged = (
        f"## Damaged files and odd input\n\nDrawn at random by {by}: files of each kind, cut and altered; and what"
        " people type: prompts, ids, arguments of the library, chat templates, plans, config values, command lines."
    )
    cases = f"{describe_source(rows)}\n\n{table(header, lines, numbers=False)}"
    return f"# Bad inputs\n\n{text}\n\n{cases}\n\n{damaged}\n\n{fuzz(fuzzed)}\n"


# ---- docs/tasks.md


def tasks(rows: list[Row]) -> str:
    """What models answer with each cache: a table a model, a column a figure of each task."""
    parts = [describe_source(rows)]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {(row["cache"], row["part"], row["metric"]): row for row in rows if row["model"] == model}
        figures = dict.fromkeys(key[1:] for key in own)
        bits = {row["cache"]: format_figure(row, "bits_asymptotic", ".2f") for row in own.values()}
        lines = [
            [f"`{cache}`", width, *(_task_cell(own.get((cache, *figure))) for figure in figures)]
            for cache, width in bits.items()
        ]
        samples = {part: row["samples"] for (_, part, _), row in own.items()}
        short = {part: part.partition("(")[0] for part in samples}
        names = short if len({*short.values()}) == len(short) else {part: part for part in samples}
        asked = ", ".join(f"{count} of `{part}`" for part, count in samples.items())
        header = ("cache", "with scales", *(f"{names[part]}: {metric}" for part, metric in figures))
        parts += [f"{model}, ± one standard error; samples: {asked}.", table(header, lines)]
    return "\n\n".join(parts)


def _task_cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['value']:.2f}" + ("" if math.isnan(row["stderr"]) else f" ± {row['stderr']:.2f}")


def by_position(rows: list[Row]) -> str:
    """KL and the increase in nll of each cache, a column a part of the window."""
    spans = list(dict.fromkeys((row["first"], row["last"]) for row in rows))
    at = {(row["cache"], row["first"]): row for row in rows}
    header = ("cache", "figure", *(f"{first} to {last}" for first, last in spans))
    lines = [
        [f"`{cache}`", name, *(format_with_error(at[cache, first], key, ".4f") for first, _ in spans)]
        for cache in dict.fromkeys(row["cache"] for row in rows)
        for name, key in (("KL", "kld"), ("nll, more", "nll_increase"))
    ]
    return f"{describe_source(rows)} {_size(rows[0])}\n\n{table(header, lines)}"


def by_layer(rows: list[Row]) -> str:
    """KL with one layer under each cache and the others dense."""
    header = ("layer alone", *(f"`{cache}`" for cache in layers.whole_rows(rows)))
    return f"{describe_source(rows)} {_size(rows[0])}\n\n{table(header, layers.lines(rows))}"


def _size(row: Row) -> str:
    return f"{row['model']}, {row['windows']} × {row['context']} tokens of {row['text']}, ± one standard error."


# ---- docs/tuning.md


def predictors(rows: list[Row]) -> str:
    """How well each error ranks the layers: Spearman's correlation with the measured KL, candidate by candidate."""
    names = ("e_k", "e_v", "e_a", "e_o", "predicted")
    lines = []
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == cache]
        kld = [row["kld"] for row in own]
        ranks = (spearmanr([row[name] for row in own], kld).statistic for name in names)
        ratio = sum(row["predicted"] for row in own) / sum(kld)
        shown = ("" if math.isnan(rank) else f"{rank:.2f}" for rank in ranks)
        lines.append([f"`{cache}`", *shown, f"{sum(kld):.5f}", f"{ratio:.2f}"])
    header = ("candidate", *names, "KL, summed over layers", "predicted / measured")
    return f"{describe_source(rows)} {_calibration(rows)}\n\n" + table(header, lines)


def judged(rows: list[Row]) -> str:
    """Searched plans beside the best uniform cache of their budget."""
    lines = []
    for row in rows:
        if row["kind"] == "searched":
            other = plans.best_uniform(rows, row)
            assert other
            bits = (
                f"{row['budget']:g}",
                *(format_figure(row, f"bits_{kind}", ".2f") for kind in ("asymptotic", "real")),
            )
            than = f"`{other['cache']}`", f"{other['kld']:.5f}", plans.difference(other)
            nll = f"{100 * row['nll_increase'] / row['nll_dense']:.2f} %"
            lines.append([row["text"], row["search"], *bits, f"{row['kld']:.5f}", nll, f"{row['top1']:.3f}", *than])
    figures = ("budget", "with scales", "real", "KL", "nll", "top-1")
    header = ("judged on", "search", *figures, "best uniform", "its KL", "better by")
    return f"{describe_source(rows)} {_calibration(rows)}\n\n{table(header, lines)}"


def searched(rows: list[Row]) -> str:
    least = "Nearly lossless, KL ≤ .01 and nll + 1 % at most, on every judged text: the fewest bits of these budgets."
    return f"{judged(rows)}\n\n{least}\n\n{lossless(rows)}"


def lossless(rows: list[Row]) -> str:
    """The fewest bits at which a searched plan is nearly lossless on every text."""
    lines = []
    for name in dict.fromkeys(row["search"] for row in rows):
        own = [row for row in rows if row["search"] == name and row["kind"] == "searched"]
        fits = [budget for budget in {row["budget"] for row in own} if all(map(_lossless, _at(own, budget)))]
        found = _at(own, min(fits))[0] if fits else None
        figures = (f"{found['bits_nominal']:.2f}", f"{found['bits_asymptotic']:.2f}") if found else ("none", "none")
        lines.append([name, *figures])
    return table(("search", "nominal bits", "with scales"), lines)


def by_head(rows: list[Row]) -> str:
    """KL of plans with a pair for each layer, and with one for each kv head, and of the best uniform pair."""
    found = {(row["text"], row["budget"], row["search"]): row for row in rows if row["kind"] == "searched"}
    lines = []
    for text, budget in dict.fromkeys(key[:2] for key in found):
        layer, head = (found[text, budget, f"by {what}"] for what in ("layer", "head"))
        uniform = plans.best_uniform(rows, layer)
        figures = [f"{row['kld']:.4f}" for row in (layer, head)]
        gain = f"{-layer['gain']:.4f} ± {layer['gain_ci95']:.4f}"  # by head is the first search: names are in order
        lines.append([text, f"{budget:g}", f"{uniform['kld']:.4f}" if uniform else "", *figures, gain])
    header = ("judged on", "bits", "KL, best uniform", "KL, by layer", "KL, by head", "less by")
    return f"{describe_source(rows)} {_calibration(rows)} Less by: 95 % intervals, paired.\n\n{table(header, lines)}"


def ops(rows: list[Row]) -> str:
    """Attention alone: every way to do it, at every length."""
    rows = [row for row in rows if row["part"] == "op"]
    points = list(dict.fromkeys((row["batch"], row["tokens"]) for row in rows))
    at = {(row["name"], row["batch"], row["tokens"]): row for row in rows}
    header = ["attention over", *(f"{b} × {n}: ms" for b, n in points)]
    header += [f"{b} × {n}: {what}" for what in ("GB/s", "× best bf16") for b, n in points]
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        each = [at.get((name, *point)) for point in points]
        figures = [[f"{row[key]:.{digits}f}" if row else "" for row in each] for key, digits in OP_FIGURES]
        lines.append([name, *(cell for column in figures for cell in column)])
    copy = ", ".join(f"{at[lines[0][0], *point]['copy_gb_per_s']:.1f} at {point[0]} × {point[1]}" for point in points)
    return f"{describe_source(rows)} A copy runs at, in GB/s: {copy}.\n\n" + table(header, lines)


OP_FIGURES = (("ms", 2), ("gb_per_s", 1), ("times_bf16", 2))


def compiled(rows: list[Row]) -> str:
    """How many settings of an op compile for each target, and what memory they take beside arguments and results."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for op, mode in dict.fromkeys((row["op"], _mode(row)) for row in rows):
        own = [row for row in rows if (row["op"], _mode(row)) == (op, mode)]
        widths = list(dict.fromkeys(row["bits"] for row in own if row["bits"]))
        cells = []
        for target in targets:
            tried = [row for row in own if row["target"] == target]
            good = [row for row in tried if row["compiled"]]
            most = max((row["temp_bytes"] for row in good), default=0)
            size = f", {most / 1e6:.0f} MB" if most >= 1e6 else ""
            cells.append(f"{len(good)} of {len(tried)}{size}" if tried else "not tried")
        lines.append([op, mode, ", ".join(widths), *cells])
    return f"{describe_source(rows)}\n\n" + table(("op", "mode", "bits", *targets), lines, numbers=False)


def _mode(row: Row) -> str:
    if row["op"] != "decode_step":
        return row["mode"]
    return f"`{row['mode']}`, {row['model'].removeprefix('random:')}, batch {row['batch']}"


def bundles(rows: list[Row]) -> str:
    """Instruction bundles per token and kv head, and the busiest unit."""
    rows = [row for row in rows if "token_bundles" in row]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    at = {(row["mode"], row["bits"], row["target"]): row for row in rows}
    lines = []
    for mode, bits in dict.fromkeys((row["mode"], row["bits"]) for row in rows):
        each = [at.get((mode, bits, target)) for target in targets]
        lines.append([bits, mode, *(_bundles(row) if row else "not tried" for row in each)])
    return f"{describe_source(rows)}\n\n" + table(("bits of K/V", "mode", *targets), lines, numbers=False)


def _bundles(row: Row) -> str:
    """Nothing where the longer block was compiled to other code, so that the difference means nothing."""
    if row["token_bundles"] <= 0 or row["busy"] > 1:
        return "–"
    return f"{row['token_bundles']:.3f} {row['busiest']} {row['busy']:.0%}"


def registers(rows: list[Row]) -> str:
    """Registers a thread of every kernel of ours, and spilled bytes where there are any."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    xla = "decode_step", "causal_attention"
    at = {(row["op"], row["mode"], row["bits"], row["target"]): row for row in rows if row["op"] not in xla}
    lines = []
    for op, mode, bits in dict.fromkeys(key[:3] for key in at):
        each = [at.get((op, mode, bits, target)) for target in targets]
        lines.append([op, mode, bits, *("" if row is None else _registers(row) for row in each)])
    return f"{describe_source(rows)}\n\n" + table(("op", "mode", "bits", *targets), lines, numbers=False)


def _registers(row: Row) -> str:
    if not row["compiled"]:
        return row["error"][:40]
    cells = []
    for kernel in sorted(row["kernels"], key=lambda kernel: kernel["name"]):
        if kernel["name"].endswith("_kernel"):  # the others are XLA's own
            spilled = kernel["spill_stores"] + kernel["spill_loads"]
            cells.append(f"{kernel['registers']}" + (f" (spills {spilled} B)" if spilled else ""))
    return ", ".join(cells)


def loops(rows: list[Row]) -> str:
    """The main loop of every kernel of ours: instructions an element, registers, programs that fit, spilled bytes."""
    header = ("target", "mode", "bits", "instructions an element", "registers", "resident", "spills, bytes")
    lines = []
    for row in rows:
        for kernel in row["kernels"]:
            if "per_element" in kernel:
                spilled = kernel["spill_stores"] + kernel["spill_loads"]
                counts = f"{kernel['per_element']:.2f}", kernel["registers"], kernel["resident"], spilled
                lines.append([row["target"], row["mode"], row["bits"], *map(str, counts)])
    return f"{describe_source(rows)}\n\n" + table(header, lines)


def _at(rows: list[Row], budget: float) -> list[Row]:
    return [row for row in rows if row["budget"] == budget]


def _lossless(row: Row) -> bool:
    return row["kld"] <= 0.01 and row["nll_increase"] <= 0.01 * row["nll_dense"]


def searches(rows: list[Row]) -> str:
    header, lines = search_courses.summary(rows)
    judged = "Judged on {judged_windows} × {context} tokens of {judged_on}.".format(**rows[0])
    return f"{describe_source(rows)} {_calibration(rows)} {judged}\n\n" + table(header, lines)


def search_speed(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        figures = f"{row['evaluations_per_minute']:.1f}", f"{row['x_hf']:.2f}", f"{100 * row['kld_difference']:.1f} %"
        lines.append([row["plans"], row["what"], *figures])
    return f"{describe_source(rows)}\n\n" + table(
        ("plans", "what", "evaluations a minute", "× HF", "KL differs by"), lines
    )


def mixed(rows: list[Row]) -> str:
    """A searched plan's step beside the mean, by layers, of the uniform steps that it is made of."""
    uniform = {row["cache"]: row for row in rows if ";" not in row["cache"] and row["kv_dtype"] != "bfloat16"}
    lines = []
    for row in [*uniform.values(), *(row for row in rows if ";" in row["cache"])]:
        name = row["cache"] if ";" not in row["cache"] else "the searched plan"
        lines.append([f"`{name}`", f"{row['step_ms']:.1f}", f"{row['compile_seconds']:.1f}"])
        if name != row["cache"]:
            shares = [spec.rpartition(":")[2] for spec in row["cache"].split(";")]
            counts = [style.count_layers(spec) for spec in row["cache"].split(";")]
            parts = [uniform[share] for share in shares]
            mean = sum(n * part["step_ms"] for n, part in zip(counts, parts, strict=True)) / sum(counts)
            slowest = max(part["compile_seconds"] for part in parts)
            lines.append(["its parts, weighted by layers", f"{mean:.1f}", f"at most {slowest:.1f}"])
            lines.append(["ratio", f"{row['step_ms'] / mean:.2f}", f"{row['compile_seconds'] / slowest:.2f}"])
    depth = f"Depth {rows[0]['depth']}, medians of {rows[0]['steps']} interleaved steps."
    return f"{describe_source(rows)} {depth}\n\n" + table(("cache", "ms a step", "seconds to compile"), lines)


def _calibration(rows: list[Row]) -> str:
    row = rows[0]
    size = f"{row['windows']} × {row['context']} tokens"
    if "calibrated_on" in row:
        return f"Calibrated on {row['calibrated_on']}, judged on {size} of each text."
    return f"Calibrated on {size} of {row['text']}."


def pairs(rows: list[Row]) -> str:
    lines = [[f"`{cache}`", *figures] for cache, *figures in head_errors.pair_lines(rows)]
    return f"{describe_source(rows)} {_calibration(rows)}\n\n" + table(head_errors.HEADER, lines)


def keys_alone(rows: list[Row]) -> str:
    return table(head_errors.KEYS_HEADER, head_errors.key_lines(rows))


# ---- docs/scaling.md


def loading(rows: list[Row]) -> str:
    """What loading holds at its peak and reads from disk."""
    lines = [[row["model"], str(row["layers"]), *loading_memory.line(row)] for row in rows]
    return f"{describe_source(rows)}\n\n" + table(("shapes of", "layers", *loading_memory.HEADER), lines)


def compile_seconds(rows: list[Row]) -> str:
    """CPU seconds of tracing and compiling the decode loop."""
    lines = [
        [
            f"`{row['cache']}`",
            *(str(row["layers"]), f"{row['lines']}"),
            *(f"{row[key]:.1f}" for key in ("trace_cpu_seconds", "compile_cpu_seconds")),
        ]
        for row in rows
    ]
    return f"{describe_source(rows)}\n\n" + table(("cache", "layers", "lines", "trace, s", "compile, s"), lines)


def prefill_memory(rows: list[Row]) -> str:
    """Megabytes of temporaries of one prefill step, a column per number of tokens."""
    tokens = sorted({row["tokens"] for row in rows})
    by_plan: dict[str, dict[int, int]] = {}
    for row in rows:
        by_plan.setdefault(row["cache"], {})[row["tokens"]] = row["temp_bytes"]
    lines = [[f"`{plan}`", *(f"{found[n] / 1e6:,.0f}" for n in tokens)] for plan, found in by_plan.items()]
    return f"{describe_source(rows)}\n\n" + table(("cache", *(f"{n // 1024}K" for n in tokens)), lines)


def starts(rows: list[Row]) -> str:
    """CPU seconds of cold and warm starts."""
    lines = []
    for row in rows:
        cold, warm = row["cold_cpu_seconds"], row["warm_cpu_seconds"]
        lines.append([f"`{row['cache']}`", f"{cold:.1f}", f"{warm:.1f}", f"{warm / cold:.2f}"])
    return f"{describe_source(rows)}\n\n" + table(("cache", "cold, s", "warm, s", "warm / cold"), lines)


# ---- docs/roofline.md


def roofline(rows: list[Row]) -> str:
    """Milliseconds of a step on each device, the fastest that fits in bold, what does not fit in brackets."""
    contexts = roofline_program.TABLE_CONTEXTS
    lines = []
    for row in rows:
        rivals = [each for each in rows if (each["model"], each["on"]) == (row["model"], row["on"])]
        cells = []
        for n in contexts:
            time = f"{1e3 * roofline_program.seconds(row, n):.2f}"
            best = roofline_program.fastest(rivals, n) == row["cache"]
            cells.append(f"**{time}**" if best else time if roofline_program.fits(row, n) else f"({time})")
        above = "never" if math.isinf(row["ridge_tokens"]) else f"{row['ridge_tokens']:,.0f}"
        where = f"{row['model'].removeprefix('random:')}, {row['on']}"
        lines.append([where, f"`{row['cache']}`", *cells, above, f"{row['room']:,.0f}"])
    header = ("model, device", "cache", *(f"{n // 1024}K: ms" for n in contexts), "computes above", "room")
    return f"Computed, not measured. {rows[0]['batch']} sequences.\n\n" + table(header, lines)


Tables = dict[
    str, tuple[str | None, Callable[[list[Row]], str]]
]  # by name: the result file, if any, and what renders it


def _key_table(keys: Mapping[str, str]) -> Callable[[list[Row]], str]:
    return lambda _: table(("key", "what"), checkpoint_keys.noted_lines(keys), numbers=False)


def _rival(*patterns: str) -> tuple[str, Callable[[list[Row]], str]]:
    """A method of others at equal conditions, beside the control."""
    return "frontier.jsonl", only(frontier, "k?v?@token(*rotate=hadamard*", *patterns)


TABLES: dict[str, Tables] = {
    "docs/results.md": {
        "sweep": ("demo-streaming.jsonl", sweep),
        "reference": ("wikitext2-parallel.jsonl", reference),
        "decode": ("decode.jsonl", decode),
        "decode-avx2": ("decode-avx2.jsonl", decode),
        "forward": ("forward.jsonl", forward),
        "agreement": ("agreement.jsonl", agreement),
        "xquant-gqa": ("xquant-gqa.jsonl", xquant),
        "xquant-mha": ("xquant-mha.jsonl", xquant),
        "xquant-equal": ("xquant-equal.jsonl", xquant),
        "xquant-equal-mha": ("xquant-equal-mha.jsonl", xquant),
        "latents": ("latents.jsonl", latents),
        "latents-avx2": ("latents-avx2.jsonl", latents),
    },
    "docs/tuning.md": {
        "predictors": ("sensitivity.jsonl", predictors),
        "plans": ("plans-pairs.jsonl", searched),
        "heads": ("plans-heads.jsonl", by_head),
        "families": ("plans-families.jsonl", searched),
        "more-windows": ("plans-windows.jsonl", judged),
        "searches": ("searches.jsonl", searches),
        "search-speed": ("search_speed.jsonl", search_speed),
        "mixed": ("mixed.jsonl", mixed),
    },
    "docs/reproduce-kvtuner.md": {
        "pairs": ("head_errors.jsonl", pairs),
        "keys-alone": ("head_errors.jsonl", keys_alone),
        "kvtuner": ("plans-pairs.jsonl", only(judged, text="wiki.test.raw", search="kivi")),
    },
    "docs/reproduce-xquant.md": {
        "gqa": ("xquant-gqa.jsonl", brief),
        "mha": ("xquant-mha.jsonl", brief),
    },
    "docs/methods/kv.md": {"kv": ("wikitext2-parallel.jsonl", only(brief, "dense", "k*", dtype="float32"))},
    "docs/methods/xquant.md": {"x": ("xquant-gqa.jsonl", only(brief, "dense", "k*", "x?@*"))},
    "docs/methods/xquant-cl.md": {"xcl": ("xquant-gqa.jsonl", only(brief, "dense", "k*", "xcl*"))},
    "docs/frontier.md": {
        "frontier": ("frontier.jsonl", frontier),
        "authors": ("frontier-authors.jsonl", frontier),
        "rivals": ("decode-rivals.jsonl", decode),
        "needles": ("tasks-frontier.jsonl", tasks),
    },
    "docs/methods/adapters.md": {"adapters": ("adapters.jsonl", adapters)},
    "docs/methods/turboquant.md": {"turboquant": _rival("tq*")},
    "docs/methods/oscar.md": {"oscar": _rival("oscar*")},
    "docs/methods/kvarn.md": {"kvarn": _rival("kvarn*")},
    "docs/methods/gear.md": {"gear": _rival("gear*")},
    "docs/methods/kvquant.md": {"kvquant": _rival("kvquant*")},
    "docs/methods/aqua.md": {"aqua": _rival("aqua*")},
    "docs/kernels.md": {
        "ops": ("throughput-cpu.jsonl", ops),
        "ops-avx2": ("throughput-avx2.jsonl", ops),
        "aot-tpu": ("aot.jsonl", compiled),
        "bundles": ("aot.jsonl", bundles),
        "aot-cuda": ("aot-cuda.jsonl", compiled),
        "registers": ("aot-cuda.jsonl", registers),
    },
    "docs/checkpoints.md": {
        "stems": (None, lambda _: checkpoint_keys.stems()),
        "config-keys": (None, lambda _: table(("key", *KEYS), checkpoint_keys.config_lines(), numbers=False)),
        "harmless-keys": (None, lambda _: checkpoint_keys.harmless()),
        "rope-keys": (None, lambda _: table(("key", *ROPE_KEYS), checkpoint_keys.rope_lines(), numbers=False)),
        "forms": (None, lambda _: table(("part of a name", "what"), checkpoint_keys.form_lines(), numbers=False)),
        "gguf-keys": (
            None,
            lambda _: table(("key", *checkpoint_keys.GGUF), checkpoint_keys.gguf_lines(), numbers=False),
        ),
        **{name: (None, _key_table(keys)) for name, keys in checkpoint_keys.TOKENIZERS.items()},
    },
    "docs/scaling.md": {
        "axes": (None, lambda _: table(device_bytes.AXES_HEADER, device_bytes.axes(), numbers=False)),
        "parameters": (None, lambda _: table(device_bytes.header("model"), device_bytes.parameters())),
        "caches": (None, lambda _: table(device_bytes.header("cache"), device_bytes.caches())),
        "sequences": (
            None,
            lambda _: table(device_bytes.header("cache", device_bytes.ONE), device_bytes.sequences()),
        ),
        "windows": (None, lambda _: table(device_bytes.WINDOWS_HEADER, device_bytes.windows())),
        "prefill-memory": ("prefill_memory.jsonl", prefill_memory),
        "loading": ("loading_memory.jsonl", loading),
        "compile-seconds": ("compile_seconds.jsonl", compile_seconds),
        "starts": ("starts.jsonl", starts),
    },
    "docs/roofline.md": {"roofline": ("roofline.jsonl", roofline)},
    "docs/models.md": {
        "models": ("models.jsonl", beside),
        "models-plans": ("models-plans.jsonl", searched),
        "training": ("trained-mha-training.jsonl", trained),
        "trained": ("trained-mha.jsonl", brief),
    },
    "docs/tasks.md": {
        "tasks": ("tasks.jsonl", tasks),
        "positions": ("positions.jsonl", by_position),
        "layers": ("layers.jsonl", by_layer),
    },
    "docs/decisions.md": {
        "xquant-beyond": ("xquant-beyond.jsonl", beyond),
        "quality": ("quality.jsonl", at_equal_conditions),
        "token-forms": ("token-forms.jsonl", functools.partial(beside, by="text")),
        "mha-forms": ("mha-forms.jsonl", functools.partial(beside, by="text")),
        "forms": ("decode-forms.jsonl", decode),
        "rows": ("aot-cuda-rows.jsonl", registers),
        "launches-of-16": ("aot-cuda-launch16.jsonl", registers),
        "launches-of-8": ("aot-cuda-launch8.jsonl", registers),
        "parts": ("aot-cuda-parts.jsonl", only(loops, op="packed_attention", target="h100")),
        "words": ("aot-cuda-words.jsonl", loops),
        "words-of-32-tokens": ("aot-cuda-words32.jsonl", loops),
        "bytes-of-128-tokens": ("aot-cuda-blocks256.jsonl", loops),
        "accounting": (None, lambda _: accounting()),
    },
}


PICTURES: dict[str, tuple[str, Callable[[list[Row]], Any]]] = {  # by name: the result file, and what draws its figure
    "pareto": ("demo-streaming.jsonl", pareto.draw),
    "xquant-gqa": ("xquant-gqa.jsonl", lambda rows: pareto.draw([row for row in rows if row["text"] != "demo"])),
    "closed_loop": ("closed_loop.jsonl", closed_loop.draw),
    "frontier": ("frontier.jsonl", only(quality.draw, model="smollm2-135m", text="wiki.test.raw")),
    "frontier-essays": ("frontier.jsonl", only(quality.draw, model="smollm2-135m", text="demo")),
    "frontier-gemma": ("frontier.jsonl", only(quality.draw, model="gemma3-270m", text="wiki.test.raw")),
    "frontier-authors": ("frontier-authors.jsonl", quality.draw),
    "tune-plans": ("plans-pairs.jsonl", plans.draw),
    "tune-families": ("plans-families.jsonl", plans.draw),
    "tune-searches": ("searches.jsonl", search_courses.draw),
    "head_errors": ("head_errors.jsonl", head_errors.draw),
    "roofline": ("roofline.jsonl", roofline_program.draw),
    "layers": ("layers.jsonl", layers.draw),
    "similarity": ("similarity.jsonl", similarity.draw),
    "tune-sensitivity": ("sensitivity.jsonl", lambda rows: tune_pictures.heat_map(rows, "kld")),
}


def clean_rows(file: str) -> list[Row]:
    """The rows of a file in results/. Raises KvjaxError where there are none or no commit reproduces them."""
    rows = read_rows(ROOT / "results" / file)
    if not rows:
        raise KvjaxError(f"no rows: {file}; expected it in results/")
    check_clean(file, rows)
    return rows


def _of_rows(make: Callable[[list[Row]], T], file: str) -> T:
    """What `make` makes of clean rows. Raises KvjaxError where they lack what rows have by now."""
    try:
        return make(clean_rows(file))
    except KeyError as error:
        raise KvjaxError(
            f"{file} has rows without {error.args[0]!r}, of an earlier form; run its program again"
        ) from None


def fill(page: Path, name: str, file: str | None, render: Callable[[list[Row]], str]) -> None:
    """Puts a table into a page.

    Args:
      page: the page, which has the table's marks.
      name: the table's.
      file: the file of its rows in results/, None where it has none.
      render: makes the table of the rows.

    Raises:
      KvjaxError: its rows are refused; the page stays as it is.
    """
    body = _of_rows(render, file) if file else render([])
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"(<!-- {name} -->\n).*?(<!-- end -->)", text, re.DOTALL)
    assert found, f"{page} has no table named {name}"
    write_atomically(page, (text[: found.end(1)] + body + "\n" + text[found.start(2) :]).encode())


def draw(name: str) -> None:
    """Draws a picture of PICTURES. Raises KvjaxError where its rows are refused."""
    file, draw_rows = PICTURES[name]
    _of_rows(functools.partial(style.write, ROOT / "docs" / f"{name}.png", draw_rows), file)


def write_bad_inputs() -> None:
    """Writes docs/bad_inputs.md. Raises KvjaxError where its rows are refused."""
    rows = [clean_rows(name) for name in ("bad_input.jsonl", "fuzz.jsonl")]
    write_atomically(ROOT / "docs/bad_inputs.md", bad_inputs(*rows).encode())


def main() -> None:
    """Writes what has clean rows; leaves the rest as it is, names the rows that it refused, and exits with 1."""
    tables = [(ROOT / page, name, *table) for page, tables in TABLES.items() for name, table in tables.items()]
    steps: list[Callable[[], None]] = [functools.partial(fill, *each) for each in tables]
    steps += [*(functools.partial(draw, name) for name in PICTURES), write_bad_inputs]
    refused = []
    for step in steps:
        try:
            step()
        except KvjaxError as error:
            refused.append(str(error))
    if refused:
        sys.exit("\n".join(dict.fromkeys(refused)))


if __name__ == "__main__":
    main()
