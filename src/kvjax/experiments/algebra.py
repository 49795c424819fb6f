"""How far the logits of unquantised X-type caches are from dense ones: rematerialisation is exact algebra.

    kvjax algebra --workdir=DIR

Appends a row per dtype, model and cache to DIR/algebra.jsonl, what is there already left out.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from ml_collections import config_dict

from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.checks import check_whole
from kvjax.evaluate.forward import hidden_states
from kvjax.evaluate.perplexity import cut_windows
from kvjax.evaluate.text import load_text
from kvjax.experiments import program
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    check_whole("chunk", config.chunk, 1, config.tokens, ", the tokens")
    jax.config.update("jax_enable_x64", True)
    results = workdir / "algebra.jsonl"
    for dtype in ("float64", "float32"):
        for name in split_list(config.models):
            model = load(name, dtype)
            tokens = cut_windows(model.tokenizer.encode(load_text(config.text)), config.tokens, 1)
            dense = None
            for cache in split_list(config.caches):
                plan = CachePlan.parse(cache, model.config)
                point = {"experiment": "algebra", "model": name, "dtype": dtype, "cache": str(plan)}
                point |= {"tokens": config.tokens, "chunk": config.chunk}
                row = records.find_row(results, point)
                if row is None:
                    if dense is None:
                        dense = _logits(model, CachePlan.parse("dense", model.config), tokens, config.chunk)
                    far = np.abs(_logits(model, plan, tokens, config.chunk) - dense).max() / np.abs(dense).max()
                    row = point | {"max_relative": float(far)} | records.provenance()
                    records.append_row(results, row)
                print(f"{dtype} {name:18s} {row['cache']:30s} {row['max_relative']:.1e}", flush=True)


def _logits(model: Model, plan: CachePlan, tokens: np.ndarray, chunk: int) -> np.ndarray:
    hidden = hidden_states(model, plan, tokens, chunk)
    return np.asarray(Decoder(model.config).apply({"params": model.params}, hidden, method="logits"))


if __name__ == "__main__":
    program.run(main, "configs/algebra.py")
