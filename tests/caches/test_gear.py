"""GEAR by its own invariants: what is exact, what the low-rank part can reach, and what is left without either."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.base import CacheShape
from kvjax.caches.gear import Gear, low_rank
from kvjax.errors import KvjaxError
from kvjax.testing.layers import quick_jit

CHUNKS, TOKENS, HEADS, DIM = 2, 16, 2, 16
HALF = 2.0**-10  # what float16 may change, in parts of a number


@pytest.fixture(scope="module", autouse=True)
def float64(quick_float64: None) -> None:
    """Errors below are the method's own."""


@pytest.fixture(scope="module")
def kv() -> tuple[np.ndarray, np.ndarray]:
    """Keys with a few large channels, and values."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, CHUNKS, TOKENS, HEADS, DIM))
    return k * np.where(np.arange(DIM) % 5, 1.0, 8.0), v


def read_back(spec: Gear, kv: tuple[np.ndarray, np.ndarray], real: np.ndarray | None = None) -> list[np.ndarray]:
    real = np.ones((CHUNKS, TOKENS), bool) if real is None else real
    return [np.asarray(a) for a in quick_jit(spec.simulate)(*kv, real)]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_is_nearly_the_best_there_is(rank: int) -> None:
    """No matrix of rank r is nearer than the truncated SVD (Eckart and Young); three iterations come close."""
    rng = np.random.default_rng(rank)
    left, right = (np.linalg.qr(rng.standard_normal((3, n, DIM)))[0] for n in (TOKENS, DIM))
    spread = 0.6 ** np.arange(DIM)
    error = (left * spread) @ right.swapaxes(1, 2)
    found = np.asarray(low_rank(jnp.asarray(error), rank))
    assert (np.linalg.matrix_rank(found, tol=1e-9) == rank).all()
    left_over = np.linalg.norm(error - found, axis=(1, 2))
    best = np.linalg.norm(spread[rank:])
    assert (left_over >= best * (1 - 1e-9)).all() and (left_over <= 1.6 * best).all()


def test_full_rank_gives_the_input_back(kv) -> None:
    spec = Gear(bits=1, group=TOKENS, rank=DIM)
    for x, found in zip(kv, read_back(spec, kv), strict=True):
        np.testing.assert_allclose(found, x, atol=4 * HALF * np.abs(x).max())


def test_outliers_are_exact_and_narrow_the_base(kv) -> None:
    """5 % of 16 tokens or of 32 channels are one at either end; the rest lies in the range of the rest."""
    spec = Gear(bits=2, group=TOKENS, rank=0, sparse=5.0)
    for x, found, axis in zip(kv, read_back(spec, kv), (1, 2), strict=True):
        rows, read = (np.moveaxis(a.reshape(CHUNKS, TOKENS, -1), axis, -1) for a in (x, found))
        order = np.argsort(rows, -1)
        for end in (order[..., :1], order[..., -1:]):
            np.testing.assert_allclose(*(np.take_along_axis(a, end, -1) for a in (read, rows)), rtol=HALF)
        inner = np.take_along_axis(rows, order[..., 1:-1], -1)
        step = (np.maximum(inner.max(-1), rows.mean(-1)) - np.minimum(inner.min(-1), rows.mean(-1))) / 3
        assert (np.abs(read - rows).max(-1) <= step / 2 + HALF * np.abs(rows).max(-1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_either_it_is_the_base(kv, bits: int) -> None:
    """2^b levels: the authors' code has b^2, which is the same only for 2 and 4 bits."""
    found = read_back(Gear(bits=bits, group=TOKENS, rank=0, sparse=0.0), kv)
    for x, read, axis in zip(kv, found, (1, 3), strict=True):
        x, (low, high) = x.astype(np.float32), (end(x, axis, keepdims=True) for end in (np.min, np.max))
        step, zero = (a.astype(np.float16).astype(np.float32) for a in ((high - low) / (2**bits - 1), low))
        codes = np.clip(np.round((x - zero) / step), 0, 2**bits - 1)
        np.testing.assert_allclose(read, codes * step + zero, atol=1e-6)


def test_each_part_lowers_the_error(kv) -> None:
    settings = ({"sparse": 0.0, "rank": 0}, {"sparse": 0.0}, {"sparse": 10.0, "rank": 0}, {"sparse": 10.0})
    errors = [
        sum(np.square(x - y).mean() for x, y in zip(kv, read_back(Gear(bits=2, group=TOKENS, **s), kv), strict=True))
        for s in settings
    ]
    base, ranked, sparse, both = errors
    assert both < min(ranked, sparse) and max(ranked, sparse) < base


def test_tokens_that_are_not_there_change_nothing(kv) -> None:
    real = np.arange(TOKENS) < np.array([[TOKENS], [9]])
    other = tuple(np.where(real[..., None, None], x, 50.0) for x in kv)
    spec = Gear(bits=2, group=TOKENS)
    for a, b in zip(read_back(spec, kv, real), read_back(spec, other, real), strict=True):
        np.testing.assert_allclose(a[real], b[real], atol=1e-12)


def test_all_is_counted() -> None:
    """2 bits, 8 heads of 128 channels: scales, 2 outliers of 64 keys and 20 of 1024 values, 2 directions."""
    spec = Gear(bits=2)
    shape = CacheShape(1, 64, 8, 8, 128, 1024)
    outliers = (2 / 64 + 20 / 1024) / 2 * 32
    assert spec.bits_asymptotic(shape) == pytest.approx(2 + 32 / 64 + outliers + 2 * (1 / 64 + 1 / 128) * 16)


@pytest.mark.parametrize("bad", [{"rank": 17}, {"group": 4}, {"sparse": 100.0}, {"residual": 24}])
def test_bad_settings(bad) -> None:
    with pytest.raises(KvjaxError):
        Gear(**{"bits": 2, "group": 16} | bad).init(CacheShape(1, 64, 2, 2, 16, 32))


def test_a_chunk_of_one_kind_of_numbers_is_finite() -> None:
    """Equal tokens leave no error, and no direction to find."""
    same = jnp.ones((1, 16, 2, 16))
    found = quick_jit(Gear(bits=2, group=16).simulate)(same, same, jnp.ones((1, 16), bool))
    np.testing.assert_array_equal(found, np.ones((2, 1, 16, 2, 16)))
