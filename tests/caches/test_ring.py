"""Layers with a sliding window keep a ring: what queries read is what a cache of all tokens gives them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.base import CacheShape, CacheSpec
from kvjax.caches.registry import load_plugins, parse_spec
from kvjax.caches.stored import StoredCache
from kvjax.testing.layers import (
    BATCH,
    CONFIG,
    DIM,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    Layer,
    attend_both_ways,
    make_chunk,
    quick_jit,
    stack,
)

load_plugins(str(Path(__file__).parents[2] / "examples/int8.py"))
WINDOW, TOKENS = 11, 200
ENDS = np.array([200, 171, 90, 200])
METHODS = (
    "dense",
    "k4v2@token",
    "k3v16@token(group=8,sink=5,rope=pre)",
    "k3v5@token(group=8,residual=8,sink=3)",
    "k2v16@kivi(group=8,residual=16,sink=21,rope=pre)",
    "k4v4@kivi(rotate=hadamard)",
    "k3v4@token(rope=post,rotate=hadamard,center=bias)",
    "x3@input(group=16)",
    "x2@latent(group=16,sink=5,outlier=1)",
    "x4@head(group=8,residual=16)",
    "int8(residual=16)",
)


@functools.cache
def layer() -> Layer:
    """A layer of the contract suite's, with more tokens."""
    rng = np.random.default_rng(0)
    h = 2 * rng.standard_normal((BATCH, TOKENS, DIM)) + rng.standard_normal(DIM)
    return dataclasses.replace(stack()[0], h=h, q=2 * rng.standard_normal((BATCH, TOKENS, HEADS, HEAD_DIM)))


def shape_of(window: int | None, max_len: int = TOKENS) -> CacheShape:
    return dataclasses.replace(CacheShape.of(CONFIG, BATCH, max_len, jnp.float64), window=window)


def ragged(widths: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(start, lengths, width) of chunks of these widths, then of the last one's, until ENDS; some are not full."""
    rng, at, widths = np.random.default_rng(len(widths)), np.zeros(BATCH, int), list(widths)
    while (at < ENDS).any():
        width = widths.pop(0) if len(widths) > 1 else widths[0]
        lengths = np.minimum(width, ENDS - at)
        lengths = np.where(rng.random(BATCH) < 0.2, rng.integers(0, lengths + 1), lengths)
        yield at.copy(), lengths, width
        at += lengths


@functools.partial(quick_jit, static_argnames=())
def step(cache, chunk):
    output, plain, cache, *_ = attend_both_ways(cache, chunk, ())
    return output, plain, cache


def outputs(spec: CacheSpec, cache: Any, widths: list[int], read: str = "exact") -> np.ndarray:
    """Outputs by position, of `attend` and of attention over `materialize`."""
    found = np.zeros((2, BATCH, TOKENS, HEADS, HEAD_DIM))
    bases = spec.bases(layer().weights, layer().norm)
    for at, lengths, width in ragged(widths):
        chunk = make_chunk(layer(), bases, at, lengths, width, WINDOW, read)
        *both, cache = step(cache, chunk)
        for b in range(BATCH):
            found[:, b, at[b] : at[b] + lengths[b]] = np.stack(both)[:, b, : lengths[b]]
    return found


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("widths", [[1], [7], [9, 90, 3], [200, 1]])
@pytest.mark.parametrize("read", ["exact", "stored"])
def test_a_ring_is_read_like_all_tokens(text: str, widths: list[int], read: str) -> None:
    if read == "stored" and widths == [1]:
        return
    with jax.enable_x64(True):
        spec = parse_spec(text).resolve(CONFIG)
        ring = spec.init(shape_of(WINDOW))
        assert isinstance(ring, StoredCache) and ring.store.ring and ring.store.tokens < TOKENS / 2
        attended, plain = outputs(spec, ring, widths, read)
        whole, _ = outputs(spec, spec.init(shape_of(None)), widths, read)
    np.testing.assert_allclose(attended, whole, atol=1e-11)
    np.testing.assert_allclose(plain, whole, atol=1e-11)
