"""Models whose keys, values or layer inputs are very small or large are read from a cache as well as usual ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.models.model import Model
from kvjax.models.units import in_usual_units

IDS = np.random.default_rng(0).integers(3, 100, 40)
QUERIES = {"llama-linear": ("q", "k"), "qwen2-tied": ("q", "k", "q_bias", "k_bias"), "qwen3": ("q_norm", "k_norm")}


def scaled(model: Model, size: float, **powers: int) -> dict[str, Any]:
    """Parameters with some weights of each layer multiplied by a power of `size`."""
    factor = lambda name: np.float32(size) ** powers.get(name, 0)  # noqa: E731
    return {
        top: {name: w * factor(name) for name, w in tree.items()} if isinstance(tree, dict) else tree
        for top, tree in model.params.items()
    }


@pytest.fixture(scope="module", params=list(QUERIES))
def model(request: pytest.FixtureRequest, goldens: Path) -> Model:
    return kvjax.load(str(goldens / request.param), "float32")


@pytest.mark.parametrize("size", [2.0**-24, 1e-7, 2.0**18])
def test_odd_sizes_read_as_well_as_usual_ones(model: Model, size: float) -> None:
    """Powers of two give the same codes; 1e-7, whose mantissa moves all roundings, the same error to a tenth."""
    q, k, *biases = QUERIES[model.name.rpartition("/")[2]]
    powers = {"v": 1, "v_bias": 1, "o": -1, k: 1, q: -1}
    powers |= dict(zip(biases, (-1, 1), strict=False))
    odd = dataclasses.replace(model, params=scaled(model, size, **powers))
    for cache in ("k8v8@token", "k4v4@kivi(group=8)"):
        exact, usual, found = (
            np.asarray(kvjax.logits(m, IDS, c)) for m, c in ((model, "dense"), (model, cache), (odd, cache))
        )
        if np.log2(size) % 1 == 0:
            np.testing.assert_array_equal(found, usual)
        errors = [np.abs(logits - exact).mean() for logits in (usual, found)]
        assert 0 < errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("size", [2.0**-24, 2.0**18])
def test_odd_layer_inputs(model: Model, size: float) -> None:
    powers = {"attention_norm": 1, "q": -1, "k": -1, "v": -1}
    odd = dataclasses.replace(model, params=scaled(model, size, **powers))
    for cache in ("x4@input(group=8)", "k4v4@token"):
        np.testing.assert_array_equal(kvjax.logits(odd, IDS, cache), kvjax.logits(model, IDS, cache))


def test_one_odd_head_of_several(goldens: Path) -> None:
    model = kvjax.load(str(goldens / "llama-linear"), "float32")
    c = model.config
    head = np.where(np.arange(c.kv_heads) == 0, 2.0**-24, 1.0).astype(np.float32)
    rows = np.repeat(head, c.head_dim)
    columns = np.repeat(np.repeat(head, c.heads // c.kv_heads), c.head_dim)
    layer = model.params["layer_0"]
    layer = layer | {"v": layer["v"] * rows[:, None], "o": layer["o"] / columns}
    odd = dataclasses.replace(model, params=model.params | {"layer_0": layer})
    np.testing.assert_array_equal(kvjax.logits(odd, IDS, "k4v4@token"), kvjax.logits(model, IDS, "k4v4@token"))


def test_a_usual_model_is_left_alone(model: Model) -> None:
    assert in_usual_units(model.config, model.params) is model.params


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_sizes_that_say_nothing(model: Model, value: float) -> None:
    layer = model.params["layer_0"] | {"v": jnp.full_like(model.params["layer_0"]["v"], value)}
    params = model.params | {"layer_0": layer}
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, in_usual_units(model.config, params), params))
