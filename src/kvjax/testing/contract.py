"""What a method promises, as tests over the example names that it gives: float64, ragged batches, real layer stacks.

`text` is a plan's name; see `kvjax.testing` for how to run this over methods of your own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import kvjax
from kvjax.caches.base import CacheShape, CacheSpec, Chunk
from kvjax.caches.cross_layer import CrossLayerSpec
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Scorer
from kvjax.generation.states import grow
from kvjax.mesh import is_axes
from kvjax.models.config import ModelConfig
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.zoo import random_params
from kvjax.ops.dispatch import OPS, using
from kvjax.testing.layers import (
    BATCH,
    CONFIG,
    DIM,
    ENDS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    SHAPE,
    TOKENS,
    Layer,
    aligned,
    attend,
    attend_both_ways,
    make_chunk,
    other_stack,
    quick_jit,
    same_trees,
    schedule,
    stack,
)
from kvjax.tuner.simulate import Simulator, Streamed, levels_of

WIDTH = 7  # tokens of a chunk that divides nothing
WINDOW = 9
WINDOW_SHAPE = dataclasses.replace(SHAPE, window=WINDOW)
Chunks = Iterable[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(autouse=True)
def programs_of_some_tests() -> Iterator[None]:
    """Frees what tests compiled: each program takes memory maps, and where Linux has no more XLA crashes."""
    yield
    if next(COUNT) % 50 == 0:
        jax.clear_caches()


COUNT = itertools.count(1)  # of the tests that ran


# ---- a plan's layers, fed


@functools.cache
def plan_of(text: str) -> CachePlan:
    """Of three layers where they depend on one another, of one where they do not."""
    layers = 3 if isinstance(parse_spec(text), CrossLayerSpec) else 1
    return CachePlan.parse(text, dataclasses.replace(CONFIG, layers=layers))


@functools.cache
def bases_of(text: str, layers: Callable[[], tuple[Layer, ...]] = stack) -> list[Any]:
    """What each layer's spec computes once per model."""
    pairs = zip(plan_of(text).specs, layers(), strict=False)
    learned = lambda spec, layer: [layer.statistics] if spec.calibrated else []  # noqa: E731
    return [spec.bases(layer.weights, layer.norm, *learned(spec, layer)) for spec, layer in pairs]


def chunks_of(
    text: str, chunks: Chunks, width: int, layers: Callable[[], tuple[Layer, ...]] = stack, **how: Any
) -> Iterator[list[Any]]:
    """A chunk for every layer, for each (start, lengths)."""
    for at, lengths in chunks:
        pairs = zip(layers(), bases_of(text, layers), strict=False)
        yield [make_chunk(layer, bases, at, lengths, width, **how) for layer, bases in pairs]


def by_position(rows: list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]) -> np.ndarray:
    """Outputs [layers, B, TOKENS, H, d] of a run, 0 where a sequence has ended."""
    out = np.zeros((len(rows[0][2]), BATCH, TOKENS, HEADS, HEAD_DIM))
    for at, lengths, outputs in rows:
        for layer, output in enumerate(outputs):
            for b in range(BATCH):
                out[layer, b, at[b] : at[b] + lengths[b]] = output[b, : lengths[b]]
    return out


@functools.cache
def run(
    text: str,
    width: int,
    window: int | None = None,
    read: str = "exact",
    chunks: Any = schedule,
    layers: Any = stack,
    shape: CacheShape = SHAPE,
):
    """Outputs by position of `attend`, checked against attention over `materialize`, and the caches at the end."""
    with jax.enable_x64(True):
        order = list(chunks(width))
        fed = list(chunks_of(text, order, width, layers, window=window, read=read))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *fed)
        caches = [spec.init(shape) for spec in plan_of(text).specs]
        caches, (outputs, plain, apart) = _feed(plan_of(text), caches, stacked)
        assert max(map(np.max, apart)) <= 1e-12, "attend and materialize store something else"
        assert np.isfinite(outputs).all(), "padding or absent tokens reach the output"
        rows = [(at, lengths, list(np.asarray(out))) for (at, lengths), out in zip(order, outputs, strict=True)]
        wanted = [(at, lengths, list(np.asarray(out))) for (at, lengths), out in zip(order, plain, strict=True)]
        np.testing.assert_allclose(by_position(rows), by_position(wanted), atol=1e-11)
        return by_position(rows), caches


@functools.partial(quick_jit, static_argnums=0)
def _feed(plan: CachePlan, caches: list[Any], chunks: list[Chunk]):
    """A scan over chunks: caches, and of every chunk both outputs and how far both ways to store lie apart."""

    def apart(a: Any, b: Any) -> list[Array]:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return [jnp.abs(x.astype(jnp.float64) - y).max() for x, y in pairs if x.size]

    def step(caches, chunks):
        carry = plan.init_carry(SHAPE)
        after, outputs, wanted, differences = _lists(4)
        for cache, chunk in zip(caches, chunks, strict=True):
            output, plain, cache, other, above, other_above = attend_both_ways(cache, chunk, carry)
            differences += apart(cache, other) + apart(above, other_above)
            after, outputs, wanted, carry = [*after, cache], [*outputs, output], [*wanted, plain], above
        return after, (jnp.stack(outputs), jnp.stack(wanted), differences)

    return jax.lax.scan(step, caches, chunks)


def _lists(count: int) -> tuple[list[Any], ...]:
    return tuple([] for _ in range(count))


# ---- names


def test_names_parse_back(text: str) -> None:
    """Canonical names parse back to the same spec, which is hashable, and bad settings are refused in one line."""
    plan = plan_of(text)
    again = CachePlan.parse(str(plan), plan.model)
    assert again == plan and hash(again) == hash(plan) and str(again) == str(plan)
    for spec in plan.specs:
        assert type(parse_spec(str(spec)).resolve(CONFIG)) is type(spec)
    name = text.partition("(")[0]
    for bad in (f"{name}(no_such_field=1)", f"{name.partition('@')[0]}@nosuchmode", f"{name}(sink=)"):
        with pytest.raises(KvjaxError) as error:
            parse_spec(bad)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_values_are_checked(text: str) -> None:
    """A value of another type than the field's is refused in one line."""
    spec = parse_spec(text)
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]
        with pytest.raises(KvjaxError) as error:
            dataclasses.replace(spec, **{field.name: [1]})  # type: ignore[type-var]
        assert "\n" not in str(error.value)


# ---- reading and writing


@pytest.mark.parametrize("width", [1, WIDTH, TOKENS])
def test_attend_is_attention_over_materialize(text: str, width: int) -> None:
    """Token by token, in ragged chunks, and the whole window at once."""
    run(text, width)


def test_windows_and_stored_reads(text: str) -> None:
    """A sliding window; every token read as stored, where the method allows whole windows.

    A cache that may forget what its queries no longer see gives what one gives that keeps everything.
    """
    read = "stored" if allows_windows(text) else "exact"
    (kept, _), (some, _) = (run(text, WIDTH, WINDOW, read, shape=shape) for shape in (SHAPE, WINDOW_SHAPE))
    np.testing.assert_allclose(some, kept, atol=1e-11)


def test_layers_of_another_kind(text: str) -> None:
    """No norm before attention, one over all keys, a part of each head turned, learned sinks, a window."""
    run(text, WIDTH, WINDOW, layers=other_stack, shape=WINDOW_SHAPE)


def allows_windows(text: str) -> bool:
    """Whether all specs promise whole windows."""
    return all(spec.whole_windows for spec in plan_of(text).specs)


def test_decoding_in_the_largest_chunks(text: str) -> None:
    """What `largest_chunk` promises: aligned chunks of so many tokens give what token by token gives."""
    chunk = {spec.largest_chunk for spec in plan_of(text).specs}
    steps, _ = run(text, 1)
    assert len(chunk) == 1, "layers of one plan name promise different chunks"
    largest = chunk.pop()
    if largest == 1:
        return  # what every method does
    for width in [WIDTH, TOKENS] if largest is None else [min(largest, TOKENS)]:
        chunks, _ = run(text, width) if largest is None else run(text, width, chunks=aligned)
        np.testing.assert_allclose(chunks, steps, atol=1e-9, err_msg=f"largest_chunk={largest} is not kept")


def test_whole_windows_read_what_decoding_reads(text: str) -> None:
    """What `whole_windows` promises, with widths of codes as data; or the readers that need it refuse in one line."""
    plan = plan_of(text)
    if not allows_windows(text):
        model, ids = tiny_model(text), np.zeros((1, 8), np.int64)
        for refused in (
            lambda: Scorer(model, 8, 1, "parallel").run(plan, ids, None),
            lambda: Simulator(model, ids).score(plan),
        ):
            with pytest.raises(KvjaxError, match="whole windows"):
                refused()
        return
    steps, _ = run(text, 1)
    with jax.enable_x64(True):
        carry, whole = plan.init_carry(SHAPE), np.full(BATCH, TOKENS)
        (layers,) = chunks_of(text, [(np.zeros(BATCH, int), whole)], TOKENS)
        real = np.arange(TOKENS) < ENDS[:, None]
        for i, (spec, chunk) in enumerate(zip(plan.specs, layers, strict=True)):
            cache = Streamed(jnp.asarray(levels_of(spec, SHAPE)), spec.program_form, SHAPE)
            output, _, carry = attend(cache, chunk, carry)
            error = "whole_windows is not kept: reads depend on how tokens are fed"
            np.testing.assert_allclose(output[real], steps[i][real], atol=1e-9, err_msg=error)


# ---- ways to run


def test_loops_and_donation(text: str) -> None:
    """Under a while loop whose caches are donated; the other tests scan."""
    plan, order = plan_of(text), list(schedule(1))
    steps, caches = run(text, 1)
    with jax.enable_x64(True):
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chunks_of(text, order, 1))

        def body(state):
            i, caches, outputs = state
            carry, (after,) = plan.init_carry(SHAPE), _lists(1)
            for layer, (cache, chunk) in enumerate(zip(caches, stacked, strict=True)):
                output, cache, carry = cache.attend(jax.tree.map(lambda a: jnp.asarray(a)[i], chunk), carry)
                after, outputs = [*after, cache], outputs.at[i, layer].set(output)
            return i + 1, after, outputs

        def loop(caches, outputs):
            return jax.lax.while_loop(lambda state: state[0] < len(order), body, (0, caches, outputs))[1:]

        fresh = [spec.init(SHAPE) for spec in plan.specs]
        donated = [leaf for leaf in jax.tree.leaves(fresh) if leaf.size]
        outputs = jnp.zeros((len(order), len(fresh), BATCH, 1, HEADS, HEAD_DIM))
        after, outputs = quick_jit(loop, donate_argnums=0)(fresh, outputs)
        assert all(leaf.is_deleted() for leaf in donated), "a leaf changes its type or shape from step to step"
        same_trees(after, caches, 1e-12)
        rows = [(at, lengths, list(np.asarray(out))) for (at, lengths), out in zip(order, outputs, strict=True)]
        np.testing.assert_allclose(by_position(rows), steps, atol=1e-11)


def test_kernels_read_the_same(text: str) -> None:
    """In float32, the kernels that are the default here and XLA's own code read the same in a decode step."""
    plan, (_, caches) = plan_of(text), run(text, WIDTH)
    single = lambda a: jnp.asarray(a, np.float32 if a.dtype == np.float64 else a.dtype)  # noqa: E731
    caches = jax.tree.map(single, caches)
    (layers,) = chunks_of(text, [(ENDS, np.ones(BATCH, int))], 1, dtype=np.float32)

    def outputs() -> list[np.ndarray]:
        carry, found = plan.init_carry(dataclasses.replace(SHAPE, dtype=jnp.float32)), []
        step = quick_jit(lambda cache, chunk, carry: cache.attend(chunk, carry))
        for cache, chunk in zip(caches, layers, strict=True):
            output, _, carry = step(cache, chunk, carry)
            found.append(np.asarray(output))
        return found

    default = outputs()
    with using(interpret=False, **dict.fromkeys(OPS, "xla")):  # type: ignore[arg-type]
        plain = outputs()
    for a, b in zip(default, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_sharded_over_devices(text: str, sharded: dict[str, str]) -> None:
    """Batch, kv heads or tokens over four devices: the same outputs and caches."""
    assert sharded.get(text) == "equal", sharded.get(text, sharded[""])


@pytest.fixture(scope="session")
def sharded(request: pytest.FixtureRequest) -> dict[str, str]:
    """What `run_sharded` says of the names that this run is about."""
    chosen = (item for item in request.session.items if "sharded" in getattr(item, "fixturenames", ()))
    return run_sharded([item.callspec.params["text"] for item in chosen])  # type: ignore[attr-defined]


def run_sharded(names: Iterable[str], *flags: str) -> dict[str, str]:
    """What `kvjax.testing.sharded` says of every name, in a process with four devices; its errors under ""."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "kvjax.testing.sharded", *flags, SETTINGS["plugins"], *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = dict(line.split("\t", 1)[::-1] for line in done.stdout.splitlines() if "\t" in line)
    return {**found, "": done.stderr[-2000:]}


SETTINGS = {"plugins": ""}  # of this run, for processes that it starts


# ---- bytes and files


def test_bytes_are_the_compilers(text: str) -> None:
    """The method's bytes, its arrays' bytes, and those of a compiled program's argument; axes for every leaf."""
    for spec in dict.fromkeys(plan_of(text).specs):
        shape = CacheShape(2, 256, HEADS, KV_HEADS, HEAD_DIM, DIM, jnp.bfloat16)
        cache = spec.init(shape)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == spec.nbytes(shape)
        compiled = jax.jit(lambda cache: jax.tree.map(lambda a: a + 1, cache)).lower(cache).compile()
        memory: Any = compiled.memory_analysis()
        assert memory.argument_size_in_bytes == spec.nbytes(shape)
        assert spec.simulated or spec.counted_bytes(shape) == spec.nbytes(shape)
        axes = jax.tree.leaves(spec.logical_axes(shape), is_leaf=is_axes)
        assert all(map(is_axes, axes)) and len(axes) == len(jax.tree.leaves(cache))
        assert spec.bits_asymptotic(shape) >= 0 and spec.bits_nominal >= 0
        assert spec.nbytes(dataclasses.replace(shape, window=WINDOW)) <= spec.nbytes(shape)
        long = dataclasses.replace(shape, batch=1, max_len=2**20)
        real = 8 * spec.counted_bytes(long) / (long.max_len * long.elements_per_token)
        assert spec.bits_asymptotic(shape) == pytest.approx(real, rel=0.02, abs=0.02)


def test_saved_restored_and_grown(text: str, tmp_path: Any) -> None:
    """A state on disk comes back with every array; in a larger cache its tokens lie where they would have lain."""
    model, prompt = tiny_model(text), "a text of forty tokens, which fill blocks"
    state = kvjax.prefill(model, prompt, plan_of(text), max_len=48, chat=False)
    kvjax.save_state(tmp_path / "state", model, state)
    restored = kvjax.restore_state(tmp_path / "state", model)
    assert str(restored.cache.plan) == str(plan_of(text))
    same_trees(restored.cache.layers, state.cache.layers)
    large = kvjax.prefill(model, prompt, plan_of(text), max_len=96, chat=False)
    same_trees(grow(restored.held, model, 96).cache.layers, large.cache.layers)


def tiny_model(text: str) -> Model:
    """A random model with the layers of the plan, calibrated where the plan needs it."""
    plan = plan_of(text)
    model = _tiny(len(plan.specs))
    return kvjax.calibrated(model, list(range(64)), context=32, windows=2) if plan.calibrated else model


@functools.cache
def _tiny(layers: int) -> Model:
    config = ModelConfig("llama", 256, DIM, 64, layers, HEADS, KV_HEADS, HEAD_DIM, 256)
    return Model("tiny", config, random_params(config, jnp.float32), ByteTokenizer(), jnp.dtype("float32"), "tiny")


def specs_of(methods: Iterable[type[CacheSpec]]) -> list[str]:
    """The example names of methods."""
    return [text for method in methods for text in method.examples]
