"""AQUA-KV by its own invariants: what predictors are the best for, and that errors do not add up over layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.aqua import Aqua
from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.calibrate import predictors
from kvjax.testing.layers import BATCH, CONFIG, SHAPE, TOKENS, WIDTH, make_chunk, quick_jit, stack


@pytest.fixture(scope="module", autouse=True)
def float64(quick_float64: None) -> None:
    """Errors below are the method's own."""


def rows_of(layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys before RoPE and values [n, C] of a layer of the stack."""
    one = stack()[layer]
    k, v = one.kv(one.x.reshape(-1, one.x.shape[-1]))
    return k.reshape(len(k), -1), v.reshape(len(v), -1)


def test_ridge_is_least_squares_with_a_little_more() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 6)), rng.standard_normal((50, 3))
    wide = np.concatenate([x, np.ones((50, 1))], 1)
    more = np.sqrt(predictors.RIDGE * np.mean((wide**2).sum(0))) * np.eye(7)  # as rows more that should give 0
    wanted = np.linalg.lstsq(np.concatenate([wide, more]), np.concatenate([y, np.zeros((7, 3))]), rcond=None)[0]
    np.testing.assert_allclose(predictors.ridge(jnp.asarray(x), jnp.asarray(y)), wanted, atol=1e-12)


def test_predictors_are_the_best_for_what_is_read() -> None:
    """Of what is read in the layer below; those of exact keys do worse on it. Own keys help to predict values."""
    below = predictors.first_read(*rows_of(0))
    k, v = rows_of(1)
    of_keys, of_values, read = map(np.asarray, predictors.fit(k, v, below))
    with_ones = lambda *parts: np.concatenate([*parts, np.ones((len(k), 1))], 1)  # noqa: E731
    old, old_v = np.split(np.asarray(below)[0], 2, 1)
    exact = np.asarray(predictors.ridge(*map(jnp.asarray, (rows_of(0)[0], k))))
    left = [np.square(k - with_ones(old) @ weight).sum() for weight in (of_keys[0], exact)]
    assert left[0] < left[1] and left[0] < np.square(k - k.mean(0)).sum()
    for i in range(3):
        own = read[i][:, :WIDTH]
        both = with_ones(own, old_v) @ of_values[i]
        alone = with_ones(old_v) @ np.linalg.lstsq(with_ones(old_v), v, rcond=None)[0]
        assert np.square(v - both).sum() < np.square(v - alone).sum()


def test_errors_are_those_of_what_is_left_and_do_not_add_up() -> None:
    """Of what is not predicted, each width leaves its share, in every layer; the carry holds what is read."""
    below, count = predictors.first_read(*rows_of(0)), 3
    learned = [[]]
    for layer in range(1, count):
        *weights, below = predictors.fit(*rows_of(layer), below)
        learned.append(weights)
    for width, share in ((0, 0.2), (1, 0.06)):
        plan = CachePlan((Aqua(2 + width, sink=0, residual=0),) * count, CachePlan.parse("dense", CONFIG).model)
        specs = [spec.with_index(under) for spec, under in zip(plan.specs, [None, *plan.specs], strict=False)]
        carry, at = specs[0].init_carry(SHAPE), np.zeros(BATCH, int)
        for layer, (spec, weights) in enumerate(zip(specs, learned, strict=True)):
            bases = [np.asarray(weight[width]) for weight in weights]
            chunk = make_chunk(stack()[layer], bases, at, np.full(BATCH, TOKENS), TOKENS)
            old = np.asarray(carry["keys"])[:, :TOKENS]
            _, carry = quick_jit(spec.init(SHAPE).append)(chunk, carry)
            k = chunk.k.reshape(BATCH, TOKENS, WIDTH)
            left = k - (old @ bases[0][:-1] + bases[0][-1] if bases else 0)
            error = np.square(carry["keys"][:, :TOKENS] - k).sum() / np.square(left).sum()
            assert 0 < error < (share if layer else 0.02)


def test_all_is_counted() -> None:
    """A scale and a zero point a token; the first layer in 4 bits; predictors are the model's, as weights are."""
    shape = CacheShape(1, 64, 8, 8, 128, 1024)
    assert Aqua(2).bits_asymptotic(shape) == pytest.approx(4 + 32 / 1024)
    assert Aqua(2).with_index(Aqua(2)).bits_asymptotic(shape) == pytest.approx(2 + 32 / 1024)
    plan = CachePlan.parse("aqua2", CONFIG)
    assert [spec.bits_nominal for spec in plan.specs] == [4, 2, 2, 2]
    assert plan.calibrated and str(CachePlan.parse(str(plan), CONFIG)) == "aqua2"


def test_beside_another_method_with_a_carry() -> None:
    """Each has its own part of it, and hands the other's on."""
    name = "xcl2@latent(group=16,base=0,residual=0)"
    plan = CachePlan.parse(f"0-1:{name};2-3:aqua2(residual=0)", CONFIG)
    carry = plan.init_carry(SHAPE)
    assert set(carry) == {"acc", "keys", "values"} and [spec.bits_nominal for spec in plan.specs] == [4, 2, 4, 2]
    spec, layer = plan.specs[0], stack()[0]
    chunk = make_chunk(layer, spec.bases(layer.weights, layer.norm), np.zeros(BATCH, int), np.ones(BATCH, int), 1)
    _, above = quick_jit(spec.init(SHAPE).append)(chunk, carry)
    assert set(above) == set(carry)
