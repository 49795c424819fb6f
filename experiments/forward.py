"""Scoring against HF transformers' forward, in one run: tokens per second of both, taken in turn.

    python -m experiments.forward --config=configs/forward.py --workdir=DIR

Needs torch and transformers, which are no dependencies of kvjax. Appends rows to DIR/forward.jsonl.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_dict

from experiments import program
from kvjax.caches.plan import CachePlan, split_list
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Scorer, cut_windows
from kvjax.evaluate.text import load_text
from kvjax.load import load
from kvjax.models import zoo


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    model = load("smollm2-135m", "float32")
    windows = cut_windows(model.tokenizer.encode(load_text(config.text)), config.context, config.windows)
    runs: dict[tuple[str, str], Callable[[], Any]] = {("HF transformers", "forward"): _hf(windows)}
    dense_plan = CachePlan.parse("dense", model.config.layers)
    for protocol in ("parallel", "streaming"):
        scorer = Scorer(model, config.context, config.windows, protocol)
        parts = [windows[i : i + scorer.batch] for i in range(0, len(windows), scorer.batch)]
        dense = [scorer.run(dense_plan, part, None)[1] for part in parts]
        for name in split_list(config.caches):
            plan = CachePlan.parse(name, model.config.layers)

            def run(scorer=scorer, plan=plan, parts=parts, dense=dense):
                for part, reference in zip(parts, dense, strict=True):
                    scorer.run(plan, part, reference)

            runs[str(plan), protocol] = run
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for repeat in range(1 + config.repeats):  # the first compiles
        for key, call in runs.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[key].append(time.perf_counter() - start)
    hf = statistics.median(seconds["HF transformers", "forward"])
    for (name, protocol), times in seconds.items():
        median = statistics.median(times)
        row = {
            "experiment": "forward",
            "cache": name,
            "protocol": protocol,
            "context": config.context,
            "windows": config.windows,
            "tokens_per_second": windows.size / median,
            "x_hf": hf / median,
            "repeats": config.repeats,
        } | program.provenance()
        row["versions"] |= _hf_versions()
        program.append_row(workdir / "forward.jsonl", row)
        print(f"{name:20s} {protocol:10s} {row['tokens_per_second']:7.0f} tokens/s   {row['x_hf']:.2f} x HF")


def _hf(windows: np.ndarray) -> Callable[[], Any]:
    """HF's float32 forward, default attention, of the same file and windows, one window at a time."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise KvjaxError(f"{error.name} is not installed; this comparison needs torch and transformers") from None
    file = zoo.fetch(zoo.SMOLLM2)
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokens = torch.tensor(windows).long()

    def forward():
        with torch.no_grad():
            for window in tokens:
                hf(window[None])

    return forward


def _hf_versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    program.run(main, "configs/forward.py")
