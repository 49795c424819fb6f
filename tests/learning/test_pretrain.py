"""Training of all weights: gradients, learning, freed heads, resuming, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.checkpoints import orbax
from kvjax.errors import KvjaxError
from kvjax.learning import pretrain, training
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.zoo import expand_kv_heads, random_params

TIED = ModelConfig(
    *("qwen3", 256, 40, 40, 2, 4, 2, 8, 64), rope=RopeConfig(theta=100.0), qkv_bias=True, qk_norm=True, tied=True
)
UNTIED = ModelConfig(*("llama", 256, 40, 40, 3, 4, 2, 8, 64), rope=RopeConfig(theta=100.0), embedding_scale=3.0)
TEXT = np.random.default_rng(1).integers(97, 101, 40 * 24)  # four letters: the first thing to learn
SIZES = {"context": 24, "batch": 4, "steps": 20, "rate": 3e-3}
pytestmark = pytest.mark.usefixtures("quick_compilation")


def _model(config: ModelConfig) -> Model:
    params = random_params(config, jnp.float32)
    return Model("tiny", config, params, ByteTokenizer(), jnp.dtype("float32"), "0")


@pytest.fixture(scope="module")
def model() -> Model:
    return _model(TIED)


@pytest.fixture(scope="module")
def trained(model: Model):
    return kvjax.learn_model(model, TEXT, **SIZES)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_loss_is_the_score_and_its_gradient_that_of_one_program(config: ModelConfig) -> None:
    """The gradient that goes back layer by layer is JAX's own of the whole loss."""
    model = _model(config)
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 24)), jnp.int32)
    cost, slopes = pretrain.gradient(config, model.params, windows)
    score = kvjax.score(model, np.ravel(windows), "dense", context=24, windows=2)
    assert float(cost) == pytest.approx(score.nll, rel=1e-4)
    expected = jax.grad(lambda params: pretrain.loss(config, params, windows))(model.params)
    assert jax.tree.structure(slopes) == jax.tree.structure(expected)
    for path, slope in jax.tree_util.tree_leaves_with_path(expected):
        own = dict(jax.tree_util.tree_leaves_with_path(slopes))[path]
        np.testing.assert_allclose(own, slope, rtol=1e-3, atol=1e-4 * float(jnp.abs(slope).max()))


def test_it_learns_and_is_a_model_of_its_own(model: Model, trained, tmp_path: Path) -> None:
    other, curve = trained
    costs = [cost for _, cost in curve]
    assert costs[0] == pytest.approx(np.log(256), rel=0.05)  # random weights know nothing
    assert min(costs) < costs[0] - 0.5
    unseen = kvjax.score(other, TEXT[-4 * 24 :], "dense", context=24, windows=4)
    assert unseen.nll == pytest.approx(min(costs), rel=1e-3)
    assert other.checksum != model.checksum and other.name.startswith("tiny trained ")
    orbax.save(tmp_path / "kept", other)
    window = TEXT[None, :24]
    again = kvjax.load(tmp_path / "kept")
    np.testing.assert_array_equal(*(kvjax.logits(each, window, cache="x4@input(group=8)") for each in (other, again)))


def test_copies_of_heads_part() -> None:
    config, params = expand_kv_heads(UNTIED, random_params(UNTIED, jnp.float32))
    copies = Model("copies", config, params, ByteTokenizer(), jnp.dtype("float32"), "0")
    freed, _ = kvjax.learn_model(copies, TEXT, **SIZES | {"steps": 5})
    for name in ("k", "v"):
        before, after = (pretrain.head_likeness(config, each.params, name) for each in (copies, freed))
        assert before == pytest.approx(1, abs=1e-6) and 0.1 < after < 1 - 1e-5
    own = pretrain.head_likeness(UNTIED, _model(UNTIED).params, "k")
    assert abs(own) < 0.2  # drawn alone


def test_a_run_that_was_cut_off_goes_on_to_the_same_losses(
    model: Model, trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, update = [], training.update

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(training, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        kvjax.learn_model(model, TEXT, **SIZES, folder=tmp_path)
    monkeypatch.undo()
    again, curve = kvjax.learn_model(model, TEXT, **SIZES, folder=tmp_path)
    np.testing.assert_allclose(np.array(curve), np.array(trained[1]), rtol=1e-6)
    assert again.checksum == trained[0].checksum


def test_every_window_is_seen_once_in_a_pass() -> None:
    order = np.concatenate([pretrain._order(first, 4, 10) for first in range(0, 20, 4)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])


def test_bad_input_is_one_line(model: Model) -> None:
    half = dataclasses.replace(
        model, dtype=jnp.dtype("bfloat16"), params=jax.tree.map(lambda a: a.astype("bfloat16"), model.params)
    )
    cases = [
        (half, {}, "expected dtype=float32"),
        (model, {"batch": 0}, "batch"),
        (model, {"steps": 0}, "steps"),
        (model, {"rate": 0.0}, "expected a number above 0"),
        (model, {"windows": 1}, "expected two or more"),
        (model, {"windows": 41}, "expected at least 984"),
    ]
    for one, options, says in cases:
        with pytest.raises(KvjaxError, match=says):
            kvjax.learn_model(one, TEXT, **SIZES | options)
