"""What layers of states give back, against keys and values that numpy computes from the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax.generation.layers import LayerView
from kvjax.generation.states import State
from kvjax.models.model import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["a prompt of more than one block of thirty-two tokens", "another"]
LENGTHS = [52, 7]


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, theta: float, factor: float) -> np.ndarray:
    """RoPE of [T, heads, d]."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] / theta ** (np.arange(half) / half) / factor
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def keys_and_values(model: Model, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """[T, K, d] of every layer, in float64."""
    c = model.config
    h = np.asarray(model.params["embed"], np.float64)[ids]
    found = []
    for i in range(c.layers):
        w = {name: np.asarray(x, np.float64) for name, x in model.params[f"layer_{i}"].items()}
        x = norm(h, w["attention_norm"], c.norm_eps)
        q, k, v = ((x @ w[n].T + w.get(f"{n}_bias", 0)).reshape(len(ids), -1, c.head_dim) for n in "qkv")
        if c.qk_norm:
            q, k = norm(q, w["q_norm"], c.norm_eps), norm(k, w["k_norm"], c.norm_eps)
        q, k = (rotate(each, c.rope.theta, c.rope.factor) for each in (q, k))
        found.append((k, v))
        k, v = (np.repeat(each, c.heads // c.kv_heads, 1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)
        h = h + attended.reshape(len(ids), -1) @ w["o"].T
        x = norm(h, w["mlp_norm"], c.norm_eps)
        gate = x @ w["gate"].T
        h = h + (gate / (1 + np.exp(-gate)) * (x @ w["up"].T)) @ w["down"].T
    return found


@pytest.mark.parametrize("name", ["llama-linear", "qwen2-tied", "qwen3"])
def test_dense_layers_are_the_weights_keys_and_values(name: str, tiny: Model, goldens: Path) -> None:
    model = tiny if name == "llama-linear" else kvjax.load(str(goldens / name), "float32")
    ids = [[(7 * i + i * i) % 128 for i in range(length)] for length in LENGTHS]
    state = kvjax.prefill(model, ids, max_len=64)
    for row, each in enumerate(ids):
        for i, (k, v) in enumerate(keys_and_values(model, np.array(each))):
            view = state.layer(i)
            there = view.positions[row] >= 0
            window = dict(enumerate(model.config.windows)).get(i) or max(LENGTHS) + 1
            first = max(0, len(each) - (window - 1))  # the next token sees so many, and itself
            assert view.positions[row].tolist() == [p if here else -1 for p, here in enumerate(there)]
            assert there[first : len(each)].all() and not there[len(each) :].any()
            for found, expected in ((view.keys, k), (view.values, v)):
                tolerance = 2e-5 * np.abs(expected).max()
                np.testing.assert_allclose(found[row][there], expected[there[: len(each)]], atol=tolerance)
                assert not found[row][~there].any()


@pytest.fixture(scope="module")
def dense(tiny: Model) -> State:
    return kvjax.prefill(tiny, PROMPTS, max_len=64)


def errors(tiny: Model, dense: State, cache: str) -> list[tuple[float, float]]:
    """Of each layer's keys and values."""
    state = kvjax.prefill(tiny, PROMPTS, cache, max_len=64)
    assert state.lengths == LENGTHS
    found = [state.layer(i).error(dense.layer(i)) for i in range(2)]
    assert all(each.keys_per_head.shape == (2,) for each in found)
    return [(each.keys, each.values) for each in found]


def test_more_bits_are_closer(tiny: Model, dense: State) -> None:
    eight, two = errors(tiny, dense, "k8v8@token"), errors(tiny, dense, "k2v2@token")
    for (k8, v8), (k2, v2) in zip(eight, two, strict=True):
        assert 0 < k8 < 0.02 < 0.2 < k2 < 1 and 0 < v8 < 0.02 < 0.2 < v2 < 1


def test_keys_and_values_are_told_apart(tiny: Model, dense: State) -> None:
    (keys, values), _ = errors(tiny, dense, "k2v8@token")
    assert keys > 0.2 and 0 < values < 0.02


@pytest.mark.parametrize("name", ["x{}@input", "x{}@latent(group=16)", "xcl{}@latent(base=0)"])
def test_layer_inputs_come_back_as_keys_and_values(tiny: Model, dense: State, name: str) -> None:
    """Of the second layer with what runs up to it from the first."""
    exact = errors(tiny, dense, name.format(16).replace("base=0", "base=0,base_bits=16"))
    np.testing.assert_allclose(exact, 0, atol=2e-5)
    for four in np.ravel(errors(tiny, dense, name.format(4))):
        assert 0.01 < four < 0.35


def test_a_residual_and_sinks_are_exact(tiny: Model, dense: State) -> None:
    view = kvjax.prefill(tiny, PROMPTS, "k2v2@kivi(sink=3)", max_len=64).layer(0)
    exact = dense.layer(0)
    wrong = np.abs(view.keys - exact.keys).max((2, 3)) > 1e-5 * np.abs(exact.keys).max()
    assert wrong[0].tolist() == [*[False] * 3, *[True] * 29, *[False] * 20]  # one block of 32, three of it sinks
    assert not wrong[1].any()


def test_an_error_is_what_it_says() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1, 3, 2, 4))
    exact, found = LayerView(x, y, np.array([[0, 1, 2]])), LayerView(1.1 * x, y, np.array([[0, -1, 2]]))
    error = found.error(exact)
    assert error.keys == pytest.approx(0.1) and error.values == 0
    found.keys[0, 1] = 99  # held by one of the two only
    found.keys[0, 0, 0] = 0
    per_head = np.sqrt([((x[0, 0, 0] ** 2).sum() + 0.01 * (x[0, 2, 0] ** 2).sum()) / (x[0, ::2, 0] ** 2).sum(), 0.01])
    np.testing.assert_allclose(found.error(exact).keys_per_head, per_head)
    both = (per_head**2 * (x[0, ::2] ** 2).sum((0, 2))).sum() / (x[0, ::2] ** 2).sum()
    assert found.error(exact).keys == pytest.approx(np.sqrt(both))
    shorter = LayerView(x[:, :1], y[:, :1], np.array([[0]]))
    assert shorter.error(exact).keys == 0
    assert repr(error) == "<LayerError keys 0.1, values 0>"
    for other, said in (
        (LayerView(x[..., :2], y[..., :2], np.array([[0, 1, 2]])), "heads of one size"),
        (LayerView(x, y, np.full((1, 3), -1)), "no position in common"),
    ):
        with pytest.raises(kvjax.KvjaxError, match=said):
            found.error(other)


def test_a_layer_that_is_not_there(dense: State) -> None:
    for index in (-1, 2, "0", 0.5):
        with pytest.raises(kvjax.KvjaxError, match="expected 0 to 1"):
            dense.layer(index)  # type: ignore[arg-type]
    assert repr(dense.layer(0)) == "<LayerView of 2 sequences: 52 + 7 tokens, 2 kv heads of 24, float32>"
