"""Scoring against HF transformers' forward, in one run: tokens per second of both, taken in turn.

    kvjax forward --workdir=DIR

Needs torch, transformers and accelerate, which are no dependencies of kvjax. Appends rows to DIR/forward.jsonl; what
is there already is not timed again.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_dict

from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.evaluate.perplexity import Scorer, cut_windows
from kvjax.evaluate.text import load_text
from kvjax.experiments import hf, program
from kvjax.models.model import Model

HF = ("HF transformers", "forward")
PROTOCOLS = ("parallel", "streaming")


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    results = workdir / "forward.jsonl"
    model = load("smollm2-135m", "float32")
    windows = cut_windows(model.tokenizer.encode(load_text(config.text)), config.context, config.windows)
    plans = dict.fromkeys(CachePlan.parse(name, model.config) for name in split_list(config.caches))
    points = {HF: _point(config, *HF)} | {
        (str(plan), protocol): _point(config, str(plan), protocol) for protocol in PROTOCOLS for plan in plans
    }
    missing = [key for key, point in points.items() if records.find_row(results, point) is None]
    if missing:
        runs = {HF: _hf(windows)}
        for protocol in PROTOCOLS:
            some = [plan for plan in plans if (str(plan), protocol) in missing]
            runs |= _scorings(model, config, windows, protocol, some)
        seconds = _time(runs, config.repeats)
        rows = [points[key] | _figures(windows.size, seconds[key], seconds[HF]) for key in missing]
        records.append_rows(results, rows)
    for (name, protocol), point in points.items():
        row = records.find_row(results, point)
        assert row
        print(f"{name:20s} {protocol:10s} {row['tokens_per_second']:7.0f} tokens/s   {row['x_hf']:.2f} x HF")


def _point(config: config_dict.ConfigDict, name: str, protocol: str) -> dict[str, Any]:
    """What is measured."""
    return {
        "experiment": "forward",
        "cache": name,
        "protocol": protocol,
        "context": config.context,
        "windows": config.windows,
        "repeats": config.repeats,
    }


def _scorings(
    model: Model, config: config_dict.ConfigDict, windows: np.ndarray, protocol: str, plans: list[CachePlan]
) -> dict[tuple[str, str], Callable[[], Any]]:
    """What scores all windows under each plan."""
    if not plans:
        return {}
    scorer = Scorer(model, config.context, config.windows, protocol)
    parts = [windows[i : i + scorer.batch] for i in range(0, len(windows), scorer.batch)]
    dense_plan = CachePlan.parse("dense", model.config)
    dense = [scorer.run(dense_plan, part, None)[1] for part in parts]

    def score(plan: CachePlan) -> None:
        for part, reference in zip(parts, dense, strict=True):
            scorer.run(plan, part, reference)

    return {(str(plan), protocol): functools.partial(score, plan) for plan in plans}


def _time(runs: dict[tuple[str, str], Callable[[], Any]], repeats: int) -> dict[tuple[str, str], float]:
    """The median seconds of each of the runs, which are made in turn."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for repeat in range(1 + repeats):  # the first compiles
        for key, call in runs.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(each) for key, each in seconds.items()}


def _figures(tokens: int, seconds: float, hf_seconds: float) -> dict[str, Any]:
    figures = {"tokens_per_second": tokens / seconds, "x_hf": hf_seconds / seconds} | records.provenance()
    figures["versions"] |= hf.versions()
    return figures


def _hf(windows: np.ndarray) -> Callable[[], Any]:
    """HF's float32 forward, default attention, of the same file and windows, one window at a time."""
    model = hf.smollm2()
    import torch

    tokens = torch.tensor(windows).long()

    def forward():
        with torch.no_grad():
            for window in tokens:
                model(window[None])

    return forward


if __name__ == "__main__":
    program.run(main, "configs/forward.py")
