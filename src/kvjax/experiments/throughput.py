"""Ops against their floors and against bfloat16 attention, and whole decode steps; see configs/throughput.py.

Attention reads each byte of a cache once, so its floor is bytes over the bandwidth of a copy, measured in the same
run. Contestants take turns, and the median of the rounds counts. What does not fit the device's memory is a row that
says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from kvjax import records
from kvjax.caches.base import CacheShape
from kvjax.caches.grammar import split_list
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import parse_spec
from kvjax.calibrate.bases import check_calibrated, weights_of
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.experiments import program
from kvjax.generation.states import Held
from kvjax.mesh import BATCH, WHOLE, Layout
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.ops import attention, dispatch, store

COLD = 1 << 28  # bytes a contestant's calls go through before they read the same ones again
STEPS = 16  # of a model in a row
ROOM = 128  # tokens allocated beyond what the cache holds
Row = dict[str, Any]


class Contestant(NamedTuple):
    """A compiled function, its arguments several times over, so that no cache holds them, and the bytes it reads."""

    call: Callable
    args: list[tuple]
    nbytes: int

    @classmethod
    def of(cls, function: Callable, args: tuple, nbytes: int) -> Contestant:
        """Raises what compiling and running raise."""
        compiled = jax.jit(function).lower(*args).compile()
        jax.block_until_ready(compiled(*args))
        copies = [jax.tree.map(jnp.copy, args) for _ in range(min(COLD // nbytes, 15))]
        return cls(compiled, [args, *copies], nbytes)


class Heads(NamedTuple):
    """heads, kv_heads and head_dim."""

    heads: int
    kv_heads: int
    head_dim: int


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    check(config)
    for batch, _ in points_of(config.points):
        Layout.of(config.mesh, config.replicate).check(batch=batch)
    deadline = time.monotonic() + 60 * config.minutes
    results = workdir / "throughput.jsonl"
    work = [*_ops(config, results), *_models(config, results)]
    for number, (name, run) in enumerate(work):
        if time.monotonic() > deadline:
            print(f"{len(work) - number} of {len(work)} points are left: start again with the same folder")
            break
        Console(stderr=True).print(f"[{number + 1}/{len(work)}] {name}")
        records.append_rows(results, [row | records.provenance() for row in run()])
    rows = records.read_rows(results)
    for part, columns in COLUMNS.items():
        Console(width=160).print(_table([row for row in rows if row["part"] == part], part, columns))


# ---- ops


def _ops(config: config_dict.ConfigDict, results: Path) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    heads = heads_of(config.heads)
    for batch, tokens in points_of(config.ops):
        point = {"experiment": "throughput", "part": "op", "heads": config.heads, "batch": batch, "tokens": tokens}
        if records.find_row(results, point) is None:
            yield f"attention, {batch} x {tokens}", functools.partial(_attention, config, point, heads, batch, tokens)


def _attention(config: config_dict.ConfigDict, point: Row, heads: Heads, batch: int, tokens: int) -> list[Row]:
    """A row for each way to attend: bfloat16 in all forms at hand, then packed."""
    q = jax.random.normal(jax.random.key(0), (batch, 1, heads.heads, heads.head_dim), jnp.bfloat16)
    contestants = {"copy": _copy(batch * tokens * heads.kv_heads * heads.head_dim)}
    contestants |= _bfloat16(q, heads, tokens)
    own = q.astype(config.dtype)
    for name in split_list(config.pairs):
        contestants[f"{name} kernel"] = _packed(own, name, heads, batch, tokens)
        with dispatch.using(packed_attention="xla"):
            contestants[f"{name} xla"] = _packed(own, name, heads, batch, tokens)
    seconds = race(contestants, config.rounds, config.calls)
    bandwidth = contestants["copy"].nbytes / seconds.pop("copy")
    best = min(value for name, value in seconds.items() if name.startswith("bf16"))
    rows = []
    for name, value in seconds.items():
        nbytes = contestants[name].nbytes
        rate = nbytes / value
        figures = {"ms": 1e3 * value, "bytes": nbytes, "gb_per_s": rate / 1e9, "share_of_copy": rate / bandwidth}
        rows.append(point | {"name": name} | figures | {"copy_gb_per_s": bandwidth / 1e9, "times_bf16": best / value})
    return rows


def _copy(elements: int) -> Contestant:
    """Reads and writes as many bytes as keys and values have in bfloat16."""
    x = jnp.zeros((elements,), jnp.int32)
    return Contestant.of(lambda x: x + 1, (x,), 2 * x.nbytes)


def _bfloat16(q: jax.Array, heads: Heads, tokens: int) -> dict[str, Contestant]:
    """The forms of bfloat16 attention that this device has."""
    shape = q.shape[0], tokens, heads.kv_heads, heads.head_dim
    k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in (1, 2))
    by_head, channels = (0, 2, 1, 3), (0, 2, 3, 1)
    forms: dict[str, tuple[Callable, tuple]] = {
        "bf16 einsum": (_einsum("bknd"), (q, k.transpose(by_head), v.transpose(by_head))),
        "bf16 einsum, values by channel": (_einsum("bkdn"), (q, k.transpose(by_head), v.transpose(channels))),
    }
    for implementation in ("xla", "cudnn"):
        attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        forms[f"bf16 jax.nn, {implementation}"] = attend, (q, k, v)
    if importlib.util.find_spec("tokamax"):
        forms["bf16 tokamax"] = importlib.import_module("tokamax").dot_product_attention, (q, k, v)
    contestants = {}
    for name, (form, args) in forms.items():
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # forms that this device has not
            contestants[name] = Contestant.of(form, args, k.nbytes + v.nbytes)
    return contestants


def _einsum(values: str) -> Callable:
    def attend(q, k, v):
        batch, _, heads, head_dim = q.shape
        rows = q.reshape(batch, k.shape[1], heads // k.shape[1], head_dim)
        scores = jnp.einsum("bkqd,bknd->bkqn", rows, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        p = jax.nn.softmax(scores, -1).astype(v.dtype)
        return jnp.einsum(f"bkqn,{values}->bkqd", p, v, preferred_element_type=jnp.float32)

    return attend


def _packed(q: jax.Array, name: str, heads: Heads, batch: int, tokens: int) -> Contestant:
    shape = CacheShape(batch, tokens, *heads, model_dim=heads.heads * heads.head_dim, dtype=q.dtype)
    keys, values = (filled(stored, i) for i, stored in enumerate(pair_of(name).init(shape).store.packed))
    at, stop = jnp.full((batch, 1), tokens - 1), jnp.full((batch,), tokens)
    args = q, at, keys, values, stop
    attend = lambda q, at, k, v, stop: attention.attend_packed(q, attention.Span(at, 0, stop, None), k, v)  # noqa: E731
    return Contestant.of(attend, args, sum(a.nbytes for a in jax.tree.leaves((keys, values))))


def filled(stored: store.Stored, seed: int) -> store.Stored:
    """Random codes, and scales that leave values near one."""
    leaves, form = jax.tree.flatten(stored)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    fill = lambda key, a: (  # noqa: E731
        jax.random.bits(key, a.shape, a.dtype)
        if a.dtype == jnp.uint8
        else (0.1 * jax.random.normal(key, a.shape)).astype(a.dtype)
    )
    return jax.tree.unflatten(form, [fill(*pair) for pair in zip(keys, leaves, strict=True)])


# ---- decode steps


def _models(config: config_dict.ConfigDict, results: Path) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    where = {"mesh": "", **Layout.of(config.mesh, config.replicate).described()}
    for name in split_list(config.models) if config.models else []:
        made: list[Model] = []  # held while its points run
        for batch, tokens in points_of(config.points):
            for cache in split_list(config.caches):
                point = {"experiment": "throughput", "part": "step", "model": name, "dtype": config.dtype}
                point |= {"cache": cache, "batch": batch, "tokens": tokens, **where}
                if records.find_row(results, point) is None:
                    run = functools.partial(_step, config, point, made)
                    yield f"{name}, {batch} x {tokens}, {cache}", run


def _step(config: config_dict.ConfigDict, point: Row, made: list[Model]) -> list[Row]:
    made[:] = made or [load(point["model"], config.dtype, mesh=config.mesh, replicate=config.replicate)]
    model = made[0]
    try:
        plan = CachePlan.parse(point["cache"], model.config)
    except KvjaxError as error:  # a plan of 32 layers on a model of 28
        return [point | {"skipped": str(error)}]
    shape = CacheShape.of(model.config, point["batch"], point["tokens"] + ROOM, jnp.dtype(config.dtype))
    nbytes = plan.nbytes(shape.max_len, shape.batch, shape.dtype)
    sizes = {"cache_bytes": nbytes, "bits_real": plan.bits_real(shape.max_len, shape.batch)}
    try:
        with model.layout.entered():
            seconds, compile_seconds = _decode(model, plan, shape, point["tokens"], config.rounds)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [point | sizes | {"out_of_memory": True}]
    figures = {"step_ms": 1e3 * seconds, "tokens_per_second": point["batch"] / seconds}
    return [point | sizes | figures | {"compile_seconds": compile_seconds}]


def _decode(model: Model, plan: CachePlan, shape: CacheShape, tokens: int, rounds: int) -> tuple[float, float]:
    """Seconds a step, median of the rounds, and of compiling. What the cache holds does not matter: it is empty."""
    decoder, bases, layout = Decoder(model.config), _bases(model, plan), model.layout
    cache = Held.empty(model, plan, shape.batch, shape.max_len).cache

    def fill(value: int, *sizes: int) -> jax.Array:
        values = np.full(sizes, value, np.int32)
        return layout.build(sizes, np.int32, BATCH, values.__getitem__)

    def step(params, bases, token, cache):
        hidden, cache = decoder.apply({"params": params}, token, cache, bases=bases)
        logits = jnp.asarray(decoder.apply({"params": params}, hidden[:, -1:], method="logits"))
        token = logits.argmax(-1).astype(jnp.int32)
        return layout.constrain(token, BATCH), layout.constrain(cache, cache.axes())

    token, cache = fill(0, shape.batch, 1), dataclasses.replace(cache, length=fill(tokens, shape.batch))
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=3).lower(model.params, bases, token, cache).compile()
    compile_seconds = time.perf_counter() - began
    times = []
    for _ in range(1 + max(1, rounds // 3)):
        began = time.perf_counter()
        cache = dataclasses.replace(cache, length=fill(tokens, shape.batch))
        for _ in range(STEPS):
            token, cache = compiled(model.params, bases, token, cache)
        jax.block_until_ready(token)
        times.append((time.perf_counter() - began) / STEPS)
    return statistics.median(times[1:]), compile_seconds


def _bases(model: Model, plan: CachePlan) -> list[Any] | None:
    """Factors of the first layer's weights for every layer: their values do not matter, only that each is read."""
    check_calibrated(model, plan)
    made: dict[str, Any] = {}
    first = weights_of(model, 0)
    for spec in plan.specs:
        if spec.bases_key and spec.bases_key not in made:
            made[spec.bases_key] = spec.bases(*first)
    dtype = model.params["embed"].dtype
    place = lambda a: model.layout.build(a.shape, dtype, WHOLE, a.__getitem__)  # noqa: E731
    return [jax.tree.map(place, made.get(spec.bases_key, [])) for spec in plan.specs]


# ---- what both share


def race(contestants: dict[str, Contestant], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds a call of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            done = [contestant.call(*contestant.args[i % len(contestant.args)]) for i in range(calls)]
            jax.block_until_ready(done)
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def check(config: config_dict.ConfigDict) -> None:
    """Raises KvjaxError where nothing could be timed that way, before anything is."""
    if config.rounds < 1 or config.calls < 1 or not config.minutes > 0:
        given = f"rounds={config.rounds}, calls={config.calls}, minutes={config.minutes}"
        raise KvjaxError(f"{given}: expected at least 1 round and 1 call, and minutes above 0")
    if config.dtype not in ("float32", "bfloat16"):
        raise KvjaxError(f"dtype={config.dtype}: expected float32 or bfloat16")
    points_of(config.points)
    heads_of(config.heads)
    for name in split_list(config.pairs):
        pair_of(name)


def pair_of(name: str) -> KV:
    spec = parse_spec(name)
    if not isinstance(spec, KV):
        raise KvjaxError(f"pairs: {name}; expected widths of keys and values, as in k4v2@kivi")
    return spec


def heads_of(text: str) -> Heads:
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise KvjaxError(f"heads={text}: expected query heads/kv heads x head_dim, as in 32/8x128")
    heads = Heads(*map(int, match.groups()))
    if heads.heads % heads.kv_heads:
        raise KvjaxError(f"heads={text}: expected query heads that are a multiple of the kv heads")
    return heads


def points_of(text: str) -> list[tuple[int, int]]:
    points = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if not match:
            raise KvjaxError(f"{part!r}: expected batch x tokens, as in 8x1024")
        points.append((int(match[1]), int(match[2])))
    return points


COLUMNS = {
    "op": ("name", "batch", "tokens", "ms", "gb_per_s", "share_of_copy", "times_bf16"),
    "step": ("model", "cache", "batch", "tokens", "step_ms", "tokens_per_second", "out_of_memory", "cache_bytes"),
}


def _table(rows: list[Row], part: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=part, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("name", "model", "cache") else "right", overflow="fold")
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table


if __name__ == "__main__":
    program.run(main, "configs/throughput.py")
