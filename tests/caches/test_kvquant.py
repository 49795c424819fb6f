"""KVQuant by its own invariants: what is exact, how far the rest may be, and what its levels are the best for."""

import dataclasses

import jax
import numpy as np
import pytest

from kvjax.caches.base import CacheShape
from kvjax.caches.kvquant import Books, KVQuant
from kvjax.quant import codebook
from kvjax.testing.layers import (
    BATCH,
    HEAD_DIM,
    KV_HEADS,
    SHAPE,
    TOKENS,
    attend_both_ways,
    make_chunk,
    quick_jit,
    stack,
)

HALF = 2.0**-10  # what float16 may change, in parts of a number
WIDTH = KV_HEADS * HEAD_DIM


@pytest.fixture(scope="module", autouse=True)
def float64(quick_float64: None) -> None:
    """Errors below are the method's own."""


def chunk_of(spec: KVQuant):
    layer = stack()[0]
    bases = spec.bases(layer.weights, layer.norm, layer.statistics)
    return make_chunk(layer, bases, np.zeros(BATCH, int), np.full(BATCH, TOKENS), TOKENS, read="stored")


def read_back(spec: KVQuant):
    """The chunk, its books, and its keys before RoPE and values [B, T, K, d] as they are packed and read."""
    chunk = chunk_of(spec)
    books = Books.of(spec, chunk)
    turn = lambda tiles: [x.swapaxes(1, 2) for x in tiles]  # noqa: E731

    @quick_jit
    def there_and_back(k, v):
        packed = zip(books((k, v), chunk.positions), spec.tensors(SHAPE), strict=True)
        kept = [(t.format, t.format.encode(x)) for x, t in packed]
        return turn(books.load(turn([form.decode(arrays, k.dtype) for form, arrays in kept])))

    return chunk, books, *map(np.asarray, there_and_back(chunk.k, chunk.v))


@pytest.mark.parametrize("spec", [KVQuant(3), KVQuant(4), KVQuant(3, sparse=0)])
def test_inside_its_range_a_value_is_read_as_the_nearest_level(spec: KVQuant) -> None:
    chunk, books, k, v = read_back(spec)
    ranges = codebook.inner_range(chunk.v.reshape(BATCH, TOKENS, -1), books.outliers)
    pairs = (books.keys, books.key_range), (books.values, [np.asarray(a)[..., None] for a in ranges])
    for x, read, (levels, (middle, half)) in zip((chunk.k, chunk.v), (k, v), pairs, strict=True):
        ends = np.array([-1, *(np.asarray(levels[0])[1:] + np.asarray(levels[0])[:-1]) / 2, 1])
        gap = np.abs(ends[:, None] - np.asarray(levels[0])).min(1).max()  # from an edge of a cell to its level
        inside = np.abs(x - middle) <= half
        assert inside.mean() > 0.93
        assert ((np.abs(read - x) <= gap * half * 1.01 + 2 * HALF * np.abs(x).max()) | ~inside).all()


def test_the_outermost_are_exact() -> None:
    chunk, books, k, v = read_back(KVQuant(2))
    of_keys = codebook.normalise(chunk.k, *books.key_range)
    for x, read, normal in ((chunk.k, k, of_keys), (chunk.v, v, chunk.v)):
        normal, x, read = (np.asarray(a).reshape(BATCH, TOKENS, WIDTH) for a in (normal, x, read))
        for end in (normal.argmax(-1), normal.argmin(-1)):
            pair = (np.take_along_axis(a, end[..., None], -1) for a in (read, x))
            np.testing.assert_allclose(*pair, rtol=HALF)


def test_static_ranges_cover_the_calibration() -> None:
    """99 % of its keys lie inside, and all of them in the ranges without outliers."""
    layer = stack()[0]
    k, _ = layer.kv(layer.x.reshape(-1, layer.x.shape[-1]))
    for spec, wanted in ((KVQuant(3), 0.99), (KVQuant(3, sparse=0), 1.0)):
        low, high = spec.bases(layer.weights, layer.norm, layer.statistics)[0]
        assert ((k >= low) & (k <= high)).mean() == pytest.approx(wanted, abs=1 / len(k))


def test_levels_are_the_best_for_what_errors_cost() -> None:
    """Of keys in range, by the weights that they were learned of: uniform levels and those of values cost more."""
    layer = stack()[0]
    statistics = layer.statistics
    _, (levels, read), (others, _) = KVQuant(3).bases(layer.weights, layer.norm, statistics)
    assert levels is read
    weights = statistics.key_bins[1, 1]

    def cost(levels: np.ndarray) -> float:
        return float(weights @ np.abs(codebook.CENTRES[:, None] - levels).min(1) ** 2)

    assert cost(levels) < min(cost(np.linspace(-1, 1, 8)), cost(others))


def test_two_bits_are_read_with_the_spread_of_the_values() -> None:
    layer = stack()[0]
    _, (levels, read), _ = KVQuant(2).bases(layer.weights, layer.norm, layer.statistics)
    ratio = np.diff(read) / np.diff(levels)
    assert ratio.min() > 1 and np.ptp(ratio) < 1e-9  # quantising narrows


def test_the_first_token_is_exact() -> None:
    spec = KVQuant(2)
    chunk = chunk_of(spec)
    cut = jax.tree.map(lambda a: a, dataclasses.replace(chunk, lengths=np.ones(BATCH, np.int32)))
    output = quick_jit(attend_both_ways)(spec.init(SHAPE), cut, ())[0]
    np.testing.assert_allclose(output[:, 0], np.repeat(chunk.v[:, 0], 2, 1), atol=1e-12)


@pytest.mark.parametrize(("heads", "head_dim", "kept"), [(8, 128, 6), (3, 64, 1)])
def test_all_is_counted(heads: int, head_dim: int, kept: int) -> None:
    """A range of two numbers a token; at either end of its keys and of its values, so many numbers and places."""
    width = heads * head_dim
    shape = CacheShape(1, 64, heads, heads, head_dim, width)
    more = (2 * 16 + 2 * 2 * kept * (16 + 16)) / (2 * width)
    assert KVQuant(3).bits_asymptotic(shape) == pytest.approx(3 + more)
    assert KVQuant(3, sparse=0).bits_asymptotic(shape) == pytest.approx(3 + 16 / width)
