"""A model some of whose layers have a sliding window: what they hold, how it is fed, and states that go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.caches.plan import CachePlan
from kvjax.evaluate.perplexity import Scorer
from kvjax.models.config import ModelConfig
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.zoo import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = ModelConfig("mistral", 256, 32, 48, 2, 4, 2, 16, 4096, window=9, full_layers=(1,))
PLAN = "sliding:k4v2@token(sink=2);full:k3v4@kivi(group=8)"
PROMPTS = ["a prompt of a good many tokens, more than a window", "another"]
ROOM = len(PROMPTS[0]) + 4  # less than a ring has


@pytest.fixture(scope="module")
def model() -> Model:
    params = jax.tree.map(lambda a: 4 * a if a.ndim > 1 else a, random_params(CONFIG, jnp.float32))
    return Model("windows", CONFIG, params, ByteTokenizer(), jnp.dtype("float32"), "windows")


def test_window_layers_cost_a_window(model: Model) -> None:
    """Allocated bytes: those of a window layer stay, whatever max_len; XQuant-CL's layers above read all of it."""
    for text in ("dense", "k4v2@token(sink=2)", "k3v4@kivi(group=8)", "x4@latent(group=8)", "x4@head(group=8)"):
        plan = kvjax.plan(model, text)
        short, long = (plan.init(model.cache_shape(2, n)).layers for n in (512, 2048))
        sizes = [[sum(leaf.nbytes for leaf in jax.tree.leaves(layer)) for layer in at] for at in (short, long)]
        assert sizes[0][0] == sizes[1][0] < sizes[0][1] and sizes[1][1] > 3.5 * sizes[0][1], text
        assert sum(sizes[1]) == plan.nbytes(2048, 2, jnp.float32)
        assert plan.kind_nbytes(2048, 2, jnp.float32) == dict(zip(("sliding", "full"), sizes[1], strict=True))
    run = kvjax.plan(model, "xcl4(base=0)")
    assert run.kind_nbytes(2048)["sliding"] == run.kind_nbytes(2048)["full"]
    assert kvjax.plan(model, "dense").bits_real(2**14) == pytest.approx(8, rel=0.01)


def test_plans_name_kinds_of_layers(model: Model) -> None:
    plan = kvjax.plan(model, PLAN)
    assert str(plan) == "0:k4v2@token(sink=2);1:k3v4@kivi(group=8)"
    assert kvjax.plan(model, "sliding+full:dense") == kvjax.plan(model, "dense")
    shown, kinds = plan.table(4096), plan.kind_nbytes(4096)
    assert f"(sliding layers {kinds['sliding']:,}, full layers {kinds['full']:,})" in shown
    for text, said in (
        ("sliding:dense", "no cache for layer 1"),
        ("sliding:dense;0-1:k4v4", "names layer 0 twice"),
        ("windows:dense", "layers 'windows': expected numbers"),
    ):
        with pytest.raises(kvjax.KvjaxError, match=said):
            kvjax.plan(model, text)
    with pytest.raises(kvjax.KvjaxError, match="has no sliding layers"):
        CachePlan.parse("sliding:dense;full:k4v4", dataclasses.replace(CONFIG, window=None))


def test_streaming_is_decoding(model: Model) -> None:
    """Per token, in float64, through more than two laps."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype(jnp.float64), model.params)
        double = dataclasses.replace(model, params=params, dtype=jnp.dtype("float64"))
        plan, ids = kvjax.plan(double, PLAN), np.random.default_rng(0).integers(0, 256, (1, 150))
        nll = [Scorer(double, 150, 1, protocol).run(plan, ids, None)[0].nll for protocol in ("streaming", "decode")]
    np.testing.assert_allclose(*nll, atol=1e-9)


def test_states_go_on(model: Model, tmp_path: Path) -> None:
    """A state that has room for less than a ring grows into one; a ring is saved and restored."""
    whole = kvjax.generate(model, PROMPTS, PLAN, max_new_tokens=90, max_len=160, chat=False)
    small = kvjax.prefill(model, PROMPTS, PLAN, max_len=ROOM, chat=False)
    assert not small.cache.layers[0].store.ring
    first = kvjax.generate(model, ["", ""], small, max_new_tokens=50, max_len=160)
    assert first.state.cache.layers[0].store.ring and first.state.nbytes == whole.state.nbytes
    kvjax.save_state(tmp_path / "state", model, first.state)
    restored = kvjax.restore_state(tmp_path / "state", model)
    rest = kvjax.generate(model, ["", ""], restored, max_new_tokens=40)
    assert [a + b for a, b in zip(first.tokens, rest.tokens, strict=True)] == whole.tokens
    held = restored.layer(0).positions
    assert [row[row >= 0].tolist() for row in held] == [[0, 1, *range(n - 8, n)] for n in restored.lengths]
