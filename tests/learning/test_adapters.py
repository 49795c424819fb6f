"""Adapters: their loss is the score, their gradient that of differences, they learn, are kept, and resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import score_against
from kvjax.learning import distill, training
from kvjax.learning.adapters import Adapters, first_adapters
from kvjax.learning.polish import exact_output
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.zoo import random_params

CONFIG = ModelConfig(
    *("qwen3", 256, 40, 40, 3, 4, 2, 8, 64), rope=RopeConfig(theta=100.0), qkv_bias=True, qk_norm=True
)
TOKENS = 48
IDS = np.random.default_rng(1).integers(0, 256, 400)
PLAN = "k2v2@kivi(group=8,residual=8,sink=2)"
# One window thrice: a random model has nothing to learn that holds for other tokens.
TEXT = np.tile(IDS[:TOKENS], 3)
QUICK = {"context": TOKENS, "windows": 3, "rank": 3, "steps": 20, "rate": 3e-3}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model() -> Model:
    params = jax.tree.map(lambda a: 4 * a if a.ndim > 1 else a, random_params(CONFIG, jnp.float32))
    return Model("tiny", CONFIG, params, ByteTokenizer(), jnp.dtype("float32"), "0")


@pytest.fixture(scope="module")
def found(model: Model) -> Adapters:
    return kvjax.learn_adapters(model, PLAN, TEXT, **QUICK)


@pytest.mark.parametrize(
    "cache", [PLAN, pytest.param("0-1:k2v4@token(group=8);2:x2@input(group=8)", marks=pytest.mark.weekly)]
)
def test_the_loss_is_the_score_of_a_window(model: Model, cache: str) -> None:
    plan, ids = CachePlan.parse(cache, CONFIG), IDS[200 : 200 + TOKENS]
    window = jnp.asarray(ids, jnp.int32)
    empty, exact = plan.init(model.cache_shape(1, TOKENS)), exact_output(model, window)
    loss = distill.loss(model, empty, first_adapters(model, 2), window, exact)
    score = kvjax.score(model, ids, cache, context=TOKENS, windows=1, protocol="parallel")
    # The score leaves out what the last token predicts; the loss has it.
    logits = [kvjax.logits(model, window[None], cache=each, read="stored")[0] for each in ("dense", cache)]
    dense, other = (jax.nn.log_softmax(each) for each in logits)
    kld = (jnp.exp(dense) * (dense - other)).sum(-1)
    assert float(kld[:-1].mean()) == pytest.approx(score.kld, rel=0.02)
    assert loss == pytest.approx(float(kld.mean()), rel=0.02)


def test_gradients_are_those_of_differences(model: Model) -> None:
    """With exact keys and values, where straight-through is no approximation, and adapters that move predictions."""
    plan, window = CachePlan.parse("dense", CONFIG), jnp.asarray(IDS[:TOKENS], jnp.int32)
    empty, exact = plan.init(model.cache_shape(1, TOKENS)), exact_output(model, window)
    draw = np.random.default_rng(0)
    some = lambda a, size: jnp.asarray(size * draw.standard_normal(a.shape), jnp.float32)  # noqa: E731
    by = jax.tree.map(lambda a: some(a, 0.1), first_adapters(model, 2))
    way = jax.tree.map(lambda a: some(a, 1.0), by)
    slopes = distill.gradient(model, empty, by, window, exact)
    slope = sum(float((a * b).sum()) for a, b in zip(*map(jax.tree.leaves, (slopes, way)), strict=True))
    ends = [
        distill.loss(model, empty, jax.tree.map(lambda a, b, s=s: a + s * b, by, way), window, exact)
        for s in (-1e-3, 1e-3)
    ]
    assert (ends[1] - ends[0]) / 2e-3 == pytest.approx(slope, rel=0.02)


def test_they_learn_and_the_adapted_model_is_what_was_looked_at(model: Model, found) -> None:
    costs = [cost for _, cost in found.card["curve"]]
    assert min(costs) < 0.9 * costs[0] and len(costs) == 1 + QUICK["steps"] // 2
    unseen = TEXT[None, -TOKENS:]
    exact = model
    plan = CachePlan.parse(PLAN, CONFIG)
    before, after = (
        score_against(exact, each, plan, unseen, "parallel") for each in (exact, kvjax.adapted(exact, found))
    )
    assert after.kld / before.kld == pytest.approx(min(costs) / costs[0], rel=0.05)


def test_kept_in_a_file(model: Model, found, tmp_path: Path) -> None:
    adapters = found
    file = tmp_path / "adapters.safetensors"
    adapters.save(file)
    one, other = (kvjax.adapted(model, each) for each in (adapters, file))
    window = IDS[None, :20]
    np.testing.assert_array_equal(*(kvjax.logits(each, window, cache="k4v4@token(group=8)") for each in (one, other)))
    assert one.checksum == other.checksum != model.checksum and one.calibration is None
    assert np.abs(kvjax.logits(one, window) - kvjax.logits(model, window)).max() > 1e-3


def test_a_run_that_was_cut_off_goes_on_to_the_same_losses(model: Model, found, tmp_path: Path, monkeypatch) -> None:
    whole, calls = found.card["curve"], []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return update(*arguments)

    update = training.update
    monkeypatch.setattr(training, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        kvjax.learn_adapters(model, PLAN, TEXT, **QUICK, folder=tmp_path)
    monkeypatch.undo()
    again = kvjax.learn_adapters(model, PLAN, TEXT, **QUICK, folder=tmp_path)
    np.testing.assert_allclose(np.array(again.card["curve"]), np.array(whole), rtol=1e-6)


def test_bad_input_is_one_line(model: Model, found, tmp_path: Path) -> None:
    adapters = found
    broken = tmp_path / "broken.safetensors"
    adapters.save(broken)
    broken.write_bytes(broken.read_bytes()[:-8])
    other = dataclasses.replace(model, checksum="1")
    sizes = {"context": TOKENS, "windows": 3}
    cases = [
        (lambda: kvjax.adapted(other, adapters), "other weights"),
        (lambda: kvjax.adapted(model, broken), "adapters that kvjax saved"),
        (lambda: kvjax.adapted(model, tmp_path / "none.safetensors"), "adapters that kvjax saved"),
        (lambda: kvjax.learn_adapters(model, PLAN, TEXT, context=TOKENS, windows=1), "expected two or more"),
        (lambda: kvjax.learn_adapters(model, "x2@latent", TEXT, **sizes), "expected methods without"),
        (lambda: kvjax.learn_adapters(model, PLAN, TEXT, **sizes, rank=0), "rank"),
        (lambda: adapters.save(tmp_path / "a.bin"), ".safetensors"),
    ]
    for call, says in cases:
        with pytest.raises(KvjaxError, match=says):
            call()
