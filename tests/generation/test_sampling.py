"""Sampling against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import KvjaxError
from kvjax.generation.sampling import Sampling, sample


def draws(logits: list[float], count: int = 4000, **cut: float) -> np.ndarray:
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | cut
    sampling = Sampling.of(**options, seed=11, batch=count, vocab=len(logits))
    rows = jnp.broadcast_to(jnp.array(logits, jnp.float32), (count, len(logits)))
    tokens = jax.jit(sample)(rows, sampling, jnp.full((count,), 7, jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


def test_frequencies_are_the_softmax() -> None:
    logits = np.log([0.4, 0.1, 0.3, 0.15, 0.05]).tolist()
    np.testing.assert_allclose(draws(logits), [0.4, 0.1, 0.3, 0.15, 0.05], atol=0.03)
    hot = np.array([0.4, 0.1, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(draws(logits, temperature=2.0), hot / hot.sum(), atol=0.03)


@pytest.mark.parametrize(
    "cut,kept",
    [
        ({"top_k": 2}, [0, 2]),
        ({"top_p": 0.7}, [0, 2]),  # 0.4 + 0.3 reach it
        ({"top_p": 0.71}, [0, 2, 3]),
        ({"top_p": 0.01}, [0]),
        ({"top_k": 3, "top_p": 0.82}, [0, 2]),  # of the three: 0.47 + 0.35
        ({"top_k": 5, "top_p": 1.0}, [0, 1, 2, 3, 4]),
    ],
)
def test_cuts_keep_the_likeliest(cut: dict[str, float], kept: list[int]) -> None:
    p = np.array([0.4, 0.1, 0.3001, 0.15, 0.05])
    expected = np.where(np.isin(np.arange(5), kept), p, 0)
    found = draws(np.log(p).tolist(), **cut)
    assert np.flatnonzero(found).tolist() == kept
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


def test_seeds_and_positions_change_draws() -> None:
    logits = jnp.zeros((3, 1000))
    sampling = Sampling.of(1.0, None, None, 0, 3, 1000)
    tokens = {tuple(np.asarray(sample(logits, sampling, jnp.full((3,), at))).tolist()) for at in range(3)}
    assert len(tokens) == 3 and all(len(set(each)) == 3 for each in tokens)


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-30, 1e-7])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    """Logits divided by it overflow; the likeliest token is drawn all the same."""
    assert set(draws([1.0, 3.0, 2.0], 50, temperature=temperature).nonzero()[0]) == {1}


@pytest.mark.parametrize("top_p", [1e-50, 1e-30, 1e-9])
def test_a_tiny_top_p_keeps_the_likeliest(top_p: float) -> None:
    assert set(draws([1.0, 3.0, 2.0], 50, top_p=top_p).nonzero()[0]) == {1}


@pytest.mark.parametrize("temperature", [1e-39, 5e-324, float("inf"), float("nan"), -0.5])
def test_temperatures_that_float32_does_not_hold(temperature: float) -> None:
    with pytest.raises(KvjaxError, match=r"expected 0 \(greedy\) or a number from 1\.2e-38 on"):
        Sampling.of(temperature, None, None, 0, 1, 3)


def test_a_huge_temperature_is_uniform() -> None:
    np.testing.assert_allclose(draws([1.0, 3.0, 2.0], temperature=1e300), [1 / 3] * 3, atol=0.04)
