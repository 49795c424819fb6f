"""What one decode step costs with each cache: the median of steps taken in turn, so that drift hits all alike.

    python -m experiments.decode --config=configs/decode.py --workdir=DIR

Appends a row per cache to DIR/decode.jsonl and prints a table.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import program
from kvjax.caches.base import Cache, CacheShape
from kvjax.caches.plan import CachePlan, split_list
from kvjax.checkpoints.model import Model
from kvjax.errors import KvjaxError
from kvjax.evaluate.text import load_text
from kvjax.load import load
from kvjax.models.decoder import Decoder

PREFILL = 512  # tokens a prefill chunk
WARM_UP = 3


@dataclasses.dataclass
class Contestant:
    """A cache under test: its compiled step, its state and the seconds its steps took."""

    name: str
    kv_dtype: str
    compiled: Any
    token: jax.Array
    cache: Cache
    seconds: list[float]

    def step(self, params: Any) -> None:
        start = time.perf_counter()
        self.token, self.cache = self.compiled(params, self.token, self.cache)
        jax.block_until_ready(self.token)
        self.seconds.append(time.perf_counter() - start)


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    model = load(config.model, config.dtype)
    if config.steps < 1 or config.depth < 1 or config.depth + config.steps + WARM_UP > config.max_len:
        raise KvjaxError(f"expected depth + steps + {WARM_UP} to be at most max_len={config.max_len}, all positive")
    ids = model.tokenizer.encode(load_text(config.text))[: config.depth]
    if len(ids) < config.depth:
        raise KvjaxError(f"the text has {len(ids)} tokens; expected at least depth={config.depth}")
    entries = [(name, config.dtype) for name in split_list(config.caches)]
    if config.dtype != "bfloat16":
        entries += [("dense", "bfloat16")]
    contestants = [
        _prepare(model, ids, name, kv_dtype, config.max_len)
        for name, kv_dtype in track(entries, "prefill", console=Console(stderr=True))
    ]
    for _ in track(range(WARM_UP + config.steps), "steps", console=Console(stderr=True)):
        for contestant in contestants:
            contestant.step(model.params)
    dense = contestants[0]
    rows = [_row(contestant, dense, config) for contestant in contestants]
    for row in rows:
        program.append_row(workdir / "decode.jsonl", row)
    Console(width=120).print(_table(rows))


def _prepare(model: Model, ids: np.ndarray, name: str, kv_dtype: str, max_len: int) -> Contestant:
    plan, decoder = CachePlan.parse(name, model.config.layers), Decoder(model.config)

    def feed(params, tokens, cache, lengths):
        hidden, cache = decoder.apply({"params": params}, tokens, cache, lengths)
        logits = jnp.asarray(decoder.apply({"params": params}, hidden[:, -1:], method="logits"))
        return logits.argmax(-1).astype(jnp.int32), cache

    cache = plan.init(CacheShape.of(model.config, 1, max_len, jnp.dtype(kv_dtype)))
    prefill = jax.jit(feed, donate_argnums=2)
    token = jnp.zeros((1, 1), jnp.int32)
    for start in range(0, len(ids), PREFILL):
        piece = ids[start : start + PREFILL]
        padded = jnp.asarray(np.pad(piece, (0, PREFILL - len(piece))))[None]
        token, cache = prefill(model.params, padded, cache, jnp.asarray([len(piece)], jnp.int32))
    one = jnp.ones((1,), jnp.int32)
    step = jax.jit(lambda params, token, cache: feed(params, token, cache, one), donate_argnums=2)
    compiled = step.lower(model.params, token, cache).compile()
    return Contestant(str(plan), kv_dtype, compiled, token, cache, [])


def _row(contestant: Contestant, dense: Contestant, config: config_dict.ConfigDict) -> dict[str, Any]:
    timed = [1e3 * s for s in contestant.seconds[WARM_UP:]]
    memory = contestant.compiled.memory_analysis()
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(contestant.cache.layers))
    dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(dense.cache.layers))
    return {
        "experiment": "decode",
        "model": config.model,
        "dtype": config.dtype,
        "depth": config.depth,
        "max_len": config.max_len,
        "cache": contestant.name,
        "kv_dtype": contestant.kv_dtype,
        "step_ms": statistics.median(timed),
        "step_ms_min": min(timed),
        "ratio": statistics.median(
            a / b for a, b in zip(contestant.seconds[WARM_UP:], dense.seconds[WARM_UP:], strict=True)
        ),
        "steps": len(timed),
        "cache_bytes": nbytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "temp_share": memory.temp_size_in_bytes / dense_bytes,
    } | program.provenance()


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="{model}, {dtype} weights, one step at depth {depth}".format(**rows[0]), title_justify="left")
    for name in ("cache", "KV dtype", "ms", "x dense", "cache MB", "temporary MB", "% of dense"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        sizes = f"{row['cache_bytes'] / 1e6:.1f}", f"{row['temp_bytes'] / 1e6:.2f}", f"{100 * row['temp_share']:.2f}"
        table.add_row(row["cache"], row["kv_dtype"], f"{row['step_ms']:.1f}", f"{row['ratio']:.2f}", *sizes)
    return table


if __name__ == "__main__":
    program.run(main, "configs/decode.py")
