"""Trained encoders: what they read is what the cache reads, they cost no more than their start, runs resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kvjax
from kvjax.caches.plan import CachePlan
from kvjax.calibrate import bases, statistics
from kvjax.errors import KvjaxError
from kvjax.learning import encoders, layerwise, polish, training
from kvjax.learning.encoders import as_arrays, counted_tokens, encoder_of, no_changes
from kvjax.learning.forward import encoded_layer
from kvjax.learning.learn import learn
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.decoder import embed, final_states
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.zoo import random_params

CONFIG = ModelConfig(
    *("qwen3", 256, 40, 40, 4, 4, 2, 8, 64), rope=RopeConfig(theta=100.0), qkv_bias=True, qk_norm=True
)
TOKENS = 48
IDS = np.random.default_rng(1).integers(0, 256, 400)
DELTAS = "xcl2@latent(group=16,sink=4,per=channel,fold=1,rotate=1,base=1,basis=learned,gain=1)"
LATENTS = "x2@latent(group=16,sink=3,rotate=1,fit=mse,basis=learned)"
QUICK = {"steps": 10, "rate": 3e-3}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        for module in (bases, statistics):
            patch.setattr(module, "cache_folder", lambda: folder)
        yield


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = ByteTokenizer()
    params = jax.tree.map(lambda a: 4 * a if a.ndim > 1 else a, random_params(CONFIG, jnp.float32))
    plain = Model("tiny", CONFIG, params, tokenizer, jnp.dtype("float32"), "0")
    return kvjax.calibrated(plain, IDS[: 4 * TOKENS], context=TOKENS, windows=4)


@pytest.mark.parametrize("cache", [DELTAS, LATENTS])
def test_an_encoder_reads_what_the_cache_reads(model: Model, cache: str) -> None:
    """The whole model, every layer's output, with the bases that training begins with."""
    plan = CachePlan.parse(cache, CONFIG)
    balanced = CachePlan.parse(cache.replace("learned", "balanced"), CONFIG)
    window = jnp.asarray(IDS[200 : 200 + TOKENS], jnp.int32)
    h, below = embed(CONFIG, model.params["embed"], window[None]), jnp.zeros((TOKENS, CONFIG.model_dim))
    for i, spec in enumerate(plan.specs):
        layer = jax.tree.map(np.asarray, bases.weights_of(model, i))
        start = as_arrays(bases.first_bases(model, spec, i, layer))
        encoder, counted = encoder_of(spec, *layer, CONFIG), counted_tokens(spec, TOKENS)
        args = CONFIG, 0, model.params[f"layer_{i}"], encoder, start, counted
        h, below = encoded_layer(*args, no_changes(start), h, below)
    logits = kvjax.logits(model, window[None], cache=balanced, read="stored")
    hidden = final_states(CONFIG, model.params["norm"], h)
    found, dense = hidden @ model.head.T, kvjax.logits(model, window[None], cache="dense")
    # A value between two codes may take either; one that does moves all tokens behind it.
    assert np.linalg.norm(found - logits) < 0.01 * np.linalg.norm(dense - logits)


def test_training_finds_a_better_basis(model: Model) -> None:
    """From a bad start: two bits for channels of very different sizes that all matter alike, mixed by a rotation."""
    spec = CachePlan.parse(DELTAS, CONFIG).specs[0]
    draw, size = np.random.default_rng(0), 32
    u = np.linalg.qr(draw.standard_normal((40, size)))[0].astype(np.float32)
    mixed = np.linalg.qr(draw.standard_normal((size, size)))[0].astype(np.float32)
    sizes = np.geomspace(1, 30, size).astype(np.float32)
    units = (draw.standard_normal((9, 64, size)) * sizes) @ u.T
    weights = (u / sizes) @ draw.standard_normal((size, 32)).astype(np.float32) / size
    encoder = dataclasses.replace(encoder_of(spec, *bases.weights_of(model, 0), CONFIG), weights=jnp.asarray(weights))
    start = as_arrays([u @ mixed, mixed.T @ u.T, np.ones(40)])
    task = layerwise.Task(
        encoder, start, jnp.eye(32), jnp.asarray(units, jnp.float32), jnp.zeros((9, 64, 40)), jnp.ones(64, bool)
    )
    optimizer = optax.adam(1e-2)
    found = layerwise.train(task, optimizer, 100, 2, lambda batch: batch)
    assert found.least < 0.6 * found.first and found.curve[0] == (0, found.first)


@pytest.mark.parametrize("cache", [DELTAS, LATENTS])
def test_no_layer_costs_more_than_at_the_start(model: Model, cache: str) -> None:
    rows = learn(model, cache, **QUICK)
    assert [row["layer"] for row in rows] == list(range(CONFIG.layers))
    for row in rows:
        assert row["least"] <= row["first"] == row["curve"][0][1]
        assert row["learned_from"] == model.calibration.identity and len(row["curve"]) == 1 + training.LOOKS
    score = kvjax.score(model, IDS[200:], cache, context=TOKENS, windows=2, protocol="parallel")
    assert score.kld > 0


def test_what_is_learned_is_what_is_scored(model: Model) -> None:
    """Encoders that stay at their start score as it does, and others do not."""
    at = {"context": TOKENS, "windows": 2, "protocol": "parallel"}
    learn(model, LATENTS, steps=1, rate=1e-12)
    start = kvjax.score(model, IDS[200:], LATENTS.replace("learned", "balanced"), **at)
    assert kvjax.score(model, IDS[200:], LATENTS, **at).kld == pytest.approx(start.kld, rel=1e-3)
    plan = CachePlan.parse(LATENTS, CONFIG)
    halved = jax.tree.map(lambda a: np.asarray(a) / 2, bases.load_bases(model, plan))
    bases.replace_bases(model, plan.specs[0], halved)
    assert kvjax.score(model, IDS[200:], LATENTS, **at).kld != pytest.approx(start.kld, rel=1e-3)


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch):
    """In place of rounding, which has no differences, something that bends as much."""
    jax.clear_caches()
    monkeypatch.setattr(encoders, "rounded", lambda x, form, counted: jnp.tanh(x))
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("smooth")
def test_gradients_are_those_of_differences(model: Model) -> None:
    """Through all layers: along a direction, against finite differences."""
    plan, window = CachePlan.parse(DELTAS, CONFIG), jnp.asarray(IDS[:TOKENS], jnp.int32)
    layers = [jax.tree.map(np.asarray, bases.weights_of(model, i)) for i in range(CONFIG.layers)]
    specs = list(enumerate(plan.specs))
    starts = [as_arrays(bases.first_bases(model, spec, i, layers[i])) for i, spec in specs]
    own = [encoder_of(spec, *layers[i], CONFIG) for i, spec in specs]
    stack = polish.Stack(model, own, starts, counted_tokens(plan.specs[0], TOKENS))
    exact, draw = polish.exact_output(model, window), np.random.default_rng(0)
    some = lambda a, size: jnp.asarray(size * draw.standard_normal(a.shape), jnp.float32)  # noqa: E731
    by = [jax.tree.map(lambda a: some(a, 0.05), no_changes(each)) for each in starts]
    way = jax.tree.map(lambda a: some(a, 1.0), by)
    slopes = polish.gradient(stack, by, window, exact)
    slope = sum(float((a * b).sum()) for a, b in zip(*map(jax.tree.leaves, (slopes, way)), strict=True))
    step = 3e-3
    moved = [jax.tree.map(lambda a, b, s=s: a + s * step * b, by, way) for s in (-1, 1)]
    ends = [polish.loss(stack, each, window, exact) for each in moved]
    assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_a_run_goes_on_where_it_was_cut_off(model: Model, tmp_path: Path, monkeypatch) -> None:
    settings = QUICK | {"polish": 4, "polish_rate": 1e-3}
    whole = learn(model, DELTAS, **settings, folder=tmp_path / "whole")
    assert whole[-1]["layer"] == "all" and whole[-1]["least"] <= whole[-1]["first"]
    kept = bases.load_bases(model, CachePlan.parse(DELTAS, CONFIG))
    train, step = layerwise.train, polish.step

    def cut(original, most):
        calls = iter(range(most))

        def one(*args):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(*args)

        return one

    for module, name, original, most in ((layerwise, "train", train, 2), (polish, "step", step, 2)):
        monkeypatch.setattr(module, name, cut(original, most))
        with pytest.raises(KeyboardInterrupt):
            learn(model, DELTAS, **settings, folder=tmp_path / "parts")
        monkeypatch.setattr(module, name, original)
    parts = learn(model, DELTAS, **settings, folder=tmp_path / "parts")
    figures = lambda rows: [(row["layer"], row["curve"]) for row in rows]  # noqa: E731
    assert json.loads(json.dumps(figures(parts))) == json.loads(json.dumps(figures(whole)))
    again = bases.load_bases(model, CachePlan.parse(DELTAS, CONFIG))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_bad_input_is_one_line(model: Model) -> None:
    plain = dataclasses.replace(model, calibration=None)
    one = kvjax.calibrated(plain, IDS[:TOKENS], context=TOKENS, windows=1)
    for who, cache, settings, message in (
        (plain, DELTAS, QUICK, "not calibrated"),
        (one, DELTAS, QUICK, "one window"),
        (model, DELTAS.replace("learned", "balanced"), QUICK, "basis=learned in every layer"),
        (model, f"0:{LATENTS};1-3:{DELTAS}", QUICK, "several caches"),
        (model, DELTAS, {"steps": 0}, "steps"),
        (model, DELTAS, {"rate": float("nan")}, "rate"),
    ):
        with pytest.raises(KvjaxError, match=message) as error:
            learn(who, cache, **settings)
        assert "\n" not in str(error.value)
    other = LATENTS.replace("x2", "x5")
    with pytest.raises(KvjaxError, match="is not trained for tiny"):
        kvjax.score(model, IDS[200:], other, context=TOKENS, windows=1)
