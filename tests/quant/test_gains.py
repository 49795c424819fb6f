"""Gains of blocks against KVarN's algorithm, written plainly, and against what they are for."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.quant import affine
from kvjax.quant.gains import balanced, gains_of

R, D = 32, 64


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def block(seed: int = 0) -> np.ndarray:
    """Tokens and channels of very different sizes; means that are not 0."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.standard_normal((R, 1))) * np.exp(rng.standard_normal(D))
    return sizes * (rng.standard_normal((R, D)) + rng.standard_normal(D))


def everything(x: np.ndarray) -> np.ndarray:
    return np.ones((*x.shape[:-1], 1), bool)


def plainly(x: np.ndarray, axis: int) -> np.ndarray:
    """KVarN's gains of a block of root mean square 1, whose standard deviations are along `axis`."""
    x = x if axis == -1 else x.T  # gains are of rows from here on
    log, other = np.zeros(len(x)), np.zeros(x.shape[1])

    def now() -> np.ndarray:
        return x / np.exp(log)[:, None] / np.exp(other)

    def imbalance() -> float:
        rows, columns = now().std(1, ddof=1), now().std(0, ddof=1)
        return rows.max() / rows.min() + columns.max() / columns.min()

    best, least = log, imbalance()
    for _ in range(8):
        log = np.clip(log + np.log(np.clip(now().std(1, ddof=1), 1e-3, 1e3)), -0.3, 10)
        other = np.clip(other + np.log(np.clip(now().std(0, ddof=1), 1e-3, 1e3)), -0.3, 10)
        if imbalance() <= least:
            best, least = log, imbalance()
    return np.exp(best)


@pytest.mark.parametrize(("per", "axis"), [("channel", -1), ("token", -2)])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
def test_gains_are_the_algorithms_at_any_size(per: str, axis: int, size: float) -> None:
    x = block()
    found = balanced(jnp.asarray(size * x), jnp.asarray(everything(x)), per)
    assert found.shape == ((R, 1) if per == "channel" else (1, D))
    np.testing.assert_allclose(np.ravel(found), plainly(x / np.sqrt(np.square(x).mean()), axis), rtol=1e-9)


@pytest.mark.parametrize("per", ["channel", "token"])
def test_blocks_become_even(per: str) -> None:
    """Divided by the gains, tokens (channels) differ less than before, and errors of 2 bits are smaller."""
    x = block(1)
    gain = np.asarray(gains_of(jnp.asarray(x), jnp.asarray(everything(x)), per, "balanced"), np.float64)
    axis, group = (-2, R) if per == "channel" else (-1, D)

    def errors(x: np.ndarray) -> np.ndarray:
        back = affine.dequantize(affine.quantize(jnp.asarray(x), 2, axis, group), axis, group, jnp.float64)
        return np.asarray(back) - x

    assert np.square(errors(x / gain) * gain).sum() < 0.8 * np.square(errors(x)).sum()
    across = -1 if per == "channel" else -2
    spread = [a.std(across).max() / a.std(across).min() for a in (x, x / gain)]
    assert spread[1] < 0.3 * spread[0]


@pytest.mark.parametrize("per", ["channel", "token"])
def test_tokens_that_do_not_count_change_nothing(per: str) -> None:
    x = np.concatenate([block(2), np.full((5, D), 77.0)])
    counted = np.arange(R + 5)[:, None] < R
    found = np.asarray(balanced(jnp.asarray(x), jnp.asarray(counted), per))
    alone = np.asarray(balanced(jnp.asarray(x[:R]), jnp.asarray(counted[:R]), per))
    np.testing.assert_allclose(found[:R] if per == "channel" else found, alone, rtol=1e-12)


@pytest.mark.parametrize("how", ["norm", "balanced"])
def test_nothing_to_divide_by(how: str) -> None:
    """Zeros, one token alone and values that are not finite have gains to divide by, and none that is not finite."""
    odd = np.stack([np.zeros((R, D)), np.where(np.arange(R)[:, None] == 3, block(), 0), np.full((R, D), np.nan)])
    counted = np.ones((3, R, 1), bool)
    counted[1] = np.arange(R)[:, None] == 3
    found = np.asarray(gains_of(jnp.asarray(odd), jnp.asarray(counted), "channel", how))
    assert np.isfinite(found).all() and (found > 0).all()
    assert (found[0] == found[0, 0]).all()


def test_norms_are_root_mean_squares() -> None:
    x = block(3)
    found = gains_of(jnp.asarray(x), jnp.asarray(everything(x)), "channel", "norm")
    np.testing.assert_allclose(found[:, 0], np.linalg.norm(x, axis=1) / np.sqrt(D), rtol=1e-3)
