"""Layers with a sliding window keep a ring: what queries read is what a cache of all tokens gives them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.base import CacheShape, CacheSpec, Chunk
from kvjax.caches.registry import load_plugins, parse_spec
from kvjax.ops.dispatch import OPS, using
from kvjax.testing.layers import (
    BATCH,
    CONFIG,
    DIM,
    HEAD_DIM,
    HEADS,
    Layer,
    attend_both_ways,
    make_chunk,
    quick_jit,
    stack,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

load_plugins(str(Path(__file__).parents[2] / "examples/int8.py"))
WINDOW, TOKENS = 11, 200
ENDS = np.array([200, 171, 90, 200])
METHODS = {  # what they read
    "dense": "exact",
    "k3v16@token(group=8,sink=5,rope=pre)": "exact",
    "k4v2@token(rotate=hadamard,center=bias)": "stored",
    "k2v5@kivi(group=8,residual=16,sink=21)": "exact",
    "k4v4@kivi(group=8,sink=11)": "stored",
    "x2@latent(group=16,sink=5,outlier=1)": "exact",
    "int8(residual=16)": "exact",
}
LONG, SHORT = 90, 6  # tokens of a chunk that a ring does not hold beside a window, and of one that it does


@functools.cache
def layer() -> Layer:
    """A layer of the contract suite's, with more tokens."""
    rng = np.random.default_rng(0)
    h = 2 * rng.standard_normal((BATCH, TOKENS, DIM)) + rng.standard_normal(DIM)
    return dataclasses.replace(stack()[0], h=h, q=2 * rng.standard_normal((BATCH, TOKENS, HEADS, HEAD_DIM)))


def shape_of(window: int | None, max_len: int = TOKENS) -> CacheShape:
    return dataclasses.replace(CacheShape.of(CONFIG, BATCH, max_len, jnp.float64), window=window)


def ragged() -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(start, lengths, width) of chunks until ENDS: two short ones, a long one, then short ones; some not full."""
    rng, at = np.random.default_rng(0), np.zeros(BATCH, int)
    for width in itertools.chain([SHORT, SHORT, LONG], itertools.repeat(SHORT)):
        lengths = np.minimum(width, ENDS - at)
        lengths = np.where(rng.random(BATCH) < 0.2, rng.integers(0, lengths + 1), lengths)
        yield at.copy(), lengths, width
        at += lengths
        if (at == ENDS).all():
            return


def outputs(spec: CacheSpec, window: int | None, read: str, step: Callable[..., Any]) -> list[np.ndarray]:
    """What `step` gives beside the cache at its end, by position."""
    bases, cache = spec.bases(layer().weights, layer().norm), spec.init(shape_of(window))
    found = [np.zeros((BATCH, TOKENS, HEADS, HEAD_DIM)) for _ in range(2)]
    for at, lengths, width in ragged():
        *each, cache = step(cache, make_chunk(layer(), bases, at, lengths, width, WINDOW, read))
        for into, output in zip(found, each, strict=False):
            for b in range(BATCH):
                into[b, at[b] : at[b] + lengths[b]] = output[b, : lengths[b]]
    return found


@quick_jit
def both_ways(cache, chunk):
    output, plain, cache, *_ = attend_both_ways(cache, chunk, ())
    return output, plain, cache


@quick_jit
def one_way(cache, chunk):
    output, cache, _ = cache.attend(chunk, ())
    return output, cache


@pytest.mark.parametrize(("text", "read"), METHODS.items())
def test_a_ring_is_read_like_all_tokens(text: str, read: str) -> None:
    """`attend` and attention over `materialize`, through laps of ragged sequences, against a cache of all tokens."""
    with jax.enable_x64(True):
        spec: Any = parse_spec(text).resolve(CONFIG)
        ring = spec.init(shape_of(WINDOW)).store
        assert ring.ring and WINDOW <= ring.tokens < TOKENS / 3
        attended, plain = outputs(spec, WINDOW, read, both_ways)
        whole, _ = outputs(spec, None, read, one_way)
    np.testing.assert_allclose(attended, whole, atol=1e-11)
    np.testing.assert_allclose(plain, whole, atol=1e-11)


def decode_step(text: str, batch: int, **implementations: str) -> np.ndarray:
    """The output of a decode step in float32, laps after the first token; of the first sequences of the batch."""

    def at(start: np.ndarray, lengths: np.ndarray, width: int) -> Chunk:
        chunk = make_chunk(layer(), bases, start, lengths, width, WINDOW, dtype=np.float32)
        some = {name: getattr(chunk, name)[:batch] for name in ("h", "x", "q", "k", "v", "positions", "lengths")}
        return dataclasses.replace(chunk, **some, rotation=tuple(a[:batch] for a in chunk.rotation))

    spec: Any = parse_spec(text).resolve(CONFIG)
    bases = spec.bases(layer().weights, layer().norm)
    cache = spec.init(dataclasses.replace(shape_of(WINDOW), batch=batch, dtype=jnp.float32))
    with using(**dict.fromkeys(OPS, "xla")):
        cache = one_way(cache, at(0 * ENDS, ENDS, TOKENS))[1]
    with using(interpret="native" not in implementations.values(), **implementations):
        attend = quick_jit(lambda cache, chunk: cache.attend(chunk, ())[0])
        return np.asarray(attend(cache, at(ENDS, 0 * ENDS + 1, 1)))


@pytest.mark.parametrize(
    ("text", "batch", "op", "names"),
    [
        ("dense", 4, "packed_attention", ["native"]),
        ("k4v2@token(sink=5)", 4, "packed_attention", ["native", "mosaic_tpu", "triton"]),
        ("x4@head", 1, "remat_attention", ["native", "mosaic_tpu"]),
    ],
)
def test_kernels_read_rings(text: str, batch: int, op: str, names: list[str]) -> None:
    plain = decode_step(text, batch, **dict.fromkeys(OPS, "xla"))
    for name in names:
        np.testing.assert_allclose(decode_step(text, batch, **{op: name}), plain, atol=1e-5, err_msg=name)
