"""How far `streaming` is from token-by-token `decode`, per token, on a ragged batch of a real model.

    kvjax protocols --workdir=DIR

In float64 the two are the same computation; in float32 rounding flips cascade. Appends a row per dtype and plan to
DIR/protocols.jsonl, what is there already left out.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import config_dict

from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate.forward import hidden_states
from kvjax.evaluate.perplexity import cut_windows
from kvjax.evaluate.text import load_text
from kvjax.evaluate.vocabulary import score_targets
from kvjax.experiments import program
from kvjax.models.model import Model


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    jax.config.update("jax_enable_x64", True)
    results = workdir / "protocols.jsonl"
    lengths = _lengths(config.lengths)
    for dtype in ("float64", "float32"):
        model = load(config.model, dtype)
        ids = model.tokenizer.encode(load_text(config.text))
        tokens = cut_windows(ids, int(lengths.max()), len(lengths))
        for name in split_list(config.caches):
            plan = CachePlan.parse(name, model.config)
            point = {
                "experiment": "protocols",
                "model": config.model,
                "dtype": dtype,
                "lengths": lengths.tolist(),
                "cache": str(plan),
            }
            row = records.find_row(results, point)
            if row is None:
                row = point | _difference(model, plan, tokens, lengths) | records.provenance()
                records.append_row(results, row)
            print(
                f"{dtype} {row['cache']:60s} max {row['max_difference']:.1e} mean {row['mean_nll_difference']:+.1e}"
            )


def _lengths(text: str) -> np.ndarray:
    try:
        lengths = np.array([int(part) for part in text.split(",")])
    except ValueError:
        raise KvjaxError(f"lengths={text}: expected whole numbers separated by commas") from None
    if lengths.min() < 2:
        raise KvjaxError(f"lengths={text}: expected at least 2 tokens a sequence")
    return lengths


def _difference(model: Model, plan: CachePlan, windows: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """nll of streaming less nll of decode, of the first `lengths[b]` tokens of window b."""

    def nll(chunk: int) -> Float[Array, "B T"]:
        hidden = hidden_states(model, plan, windows, chunk, lengths=lengths)
        targets = jnp.asarray(windows[:, 1:], jnp.int32)
        values, _ = score_targets(hidden[:, :-1].reshape(-1, hidden.shape[-1]), model.head, targets.reshape(-1))
        return values.reshape(targets.shape)

    real = np.arange(1, lengths.max()) < lengths[:, None]
    streaming, decode = (np.asarray(nll(chunk))[real] for chunk in (plan.stream_chunk, 1))
    return {
        "max_difference": float(np.abs(streaming - decode).max()),
        "mean_nll_difference": float(streaming.mean() - decode.mean()),
    }


if __name__ == "__main__":
    program.run(main, "configs/protocols.py")
