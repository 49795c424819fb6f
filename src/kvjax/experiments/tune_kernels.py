"""Measures settings of the Triton attention kernel and keeps the fastest; see configs/tune_kernels.py.

One setting after the other is varied from the heuristic's choice, the best value kept before the next. A setting that
does not compile or does not fit is passed over.
"""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict
from rich.console import Console

from kvjax.caches.base import CacheShape
from kvjax.caches.grammar import split_list
from kvjax.errors import KvjaxError
from kvjax.experiments import program
from kvjax.experiments.throughput import Contestant, check, filled, heads_of, pair_of, points_of, race
from kvjax.files import write_atomically
from kvjax.ops import store
from pallas_kernels.packed_attention import triton
from pallas_kernels.tuning import attention_class, file_of

FACTORS = {"block": (0.5, 1, 2), "num_warps": (0.5, 1, 2), "num_stages": (0.5, 1, 1.5, 2), "splits": (0.5, 1, 2)}
Entry = dict[str, Any]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    check(config)
    if jax.default_backend() != "gpu" and not config.interpret:
        raise KvjaxError(f"no GPU, but {jax.default_backend()}; interpret=True tries the program without one")
    deadline = time.monotonic() + 60 * config.minutes
    file = workdir / file_of(jax.devices()[0].device_kind).name
    entries = _read(file)
    work = [(name, *point) for point in points_of(config.points) for name in split_list(config.pairs)]
    for number, (name, batch, tokens) in enumerate(work):
        if time.monotonic() > deadline:
            print(f"{len(work) - number} of {len(work)} points are left: start again with the same folder")
            break
        args, shape = _arguments(config, name, batch, tokens)
        if any(entry["class"] == shape for entry in entries):
            continue
        entries.append(_tuned(config, args, shape))
        write_atomically(file, json.dumps(entries, indent=1).encode())
        Console(stderr=True).print(
            f"[{number + 1}/{len(work)}] {name}, {batch} x {tokens}: {entries[-1]['settings']}"
        )
    print(file)


def _read(file: Path) -> list[Entry]:
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if all(entry.keys() >= {"op", "class", "settings", "us"} for entry in entries):
            return entries
    except (ValueError, AttributeError, TypeError):
        pass
    raise KvjaxError(f"{file.name}: no settings of kernels; remove it to measure them again")


def _arguments(config: config_dict.ConfigDict, name: str, batch: int, tokens: int) -> tuple[tuple, dict[str, Any]]:
    heads = heads_of(config.heads)
    q = jax.random.normal(jax.random.key(0), (batch, 1, heads.heads, heads.head_dim), config.dtype)
    shape = CacheShape(batch, tokens, *heads, model_dim=heads.heads * heads.head_dim, dtype=q.dtype)
    packed = pair_of(name).init(shape).store.packed
    keys, values = (store.for_kernels(filled(stored, i)) for i, stored in enumerate(packed))
    stop = jax.numpy.full((batch,), tokens, jax.numpy.int32)
    return (q, keys, values, stop - 1, stop), attention_class(q.shape, keys, values)


def _tuned(config: config_dict.ConfigDict, args: tuple, shape: dict[str, Any]) -> Entry:
    best = triton.defaults(*args[:3])
    seconds = _seconds(config, args, best)
    for name, bases in FACTORS.items():
        start = best
        for value in dict.fromkeys(max(1, round(start[name] * factor)) for factor in bases):
            settings = start | {name: value}
            if settings != best and (taken := _seconds(config, args, settings)) < seconds:
                best, seconds = settings, taken
    if math.isinf(seconds):
        return {"op": "packed_attention", "class": shape, "settings": {}, "us": None}
    return {"op": "packed_attention", "class": shape, "settings": best, "us": 1e6 * seconds}


def _seconds(config: config_dict.ConfigDict, args: tuple, settings: dict[str, int]) -> float:
    q = args[0]
    where: dict[str, Any] = {"first": 0, "window": None, "scale": q.shape[3] ** -0.5, "interpret": config.interpret}
    attend = functools.partial(triton.packed_attention, **where | settings)
    try:
        contestant = Contestant.of(attend, args, sum(a.nbytes for a in jax.tree.leaves(args[1:3])))
    except (NotImplementedError, ValueError, RuntimeError):  # also what the compiler says of too much shared memory
        return math.inf
    return race({"": contestant}, config.rounds, config.calls)[""]


if __name__ == "__main__":
    program.run(main, "configs/tune_kernels.py")
