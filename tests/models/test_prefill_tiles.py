"""A long prefill: taken in tiles it gives the same numbers and holds nothing that grows but [T, D]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.models import decoder
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.zoo import random_params

CONFIG = ModelConfig("llama", 64, 32, 96, 2, 4, 2, 8, 65536, qkv_bias=True, o_bias=True, mlp_bias=True)


def prefill(layers: int, tokens: int, cache: str):
    """The compiled step that reads two sequences, and its arguments."""
    config = ModelConfig(**{**vars(CONFIG), "layers": layers})
    shape = CacheShape.of(config, 2, tokens, jnp.float32)
    plan = CachePlan.parse(cache, config)
    step = lambda params, tokens: Decoder(config).apply({"params": params}, tokens, plan.init(shape))[0]  # noqa: E731
    params = random_params(config, jnp.float32)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, tokens)), jnp.int32)
    return jax.jit(step).lower(params, ids).compile(), (params, ids)


def test_tiles_change_no_number_but_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, arguments = prefill(2, 100, "dense")
    monkeypatch.setattr(decoder, "TOKEN_TILE", 32)  # does not divide 100
    tiled, _ = prefill(2, 100, "dense")
    np.testing.assert_allclose(tiled(*arguments), whole(*arguments), rtol=1e-5, atol=2e-6)


def test_gradients_pass_through_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: a[:, 0] if name == "mlp_norm" else a for name, a in random_weights().items()}
    h = jax.random.normal(jax.random.key(9), (1, 100, 8))

    def gradient() -> jax.Array:
        return jax.vjp(lambda h: decoder.finish_by_tiles(CONFIG, weights, h, h), h)[1](jnp.ones_like(h))[0]

    whole = gradient()
    monkeypatch.setattr(decoder, "TOKEN_TILE", 32)
    np.testing.assert_allclose(gradient(), whole, rtol=1e-5, atol=1e-6)


def random_weights() -> dict[str, jax.Array]:
    shapes = {"o": (8, 8), "mlp_norm": (8, 1), "gate": (16, 8), "up": (16, 8), "down": (8, 16)}
    return {n: jax.random.normal(jax.random.key(i), s) / 4 for i, (n, s) in enumerate(shapes.items())}


def test_temporaries_do_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "TOKEN_TILE", 256)
    few, many = (prefill(layers, 2048, "k4v2@kivi")[0].memory_analysis().temp_size_in_bytes for layers in (1, 4))
    one = 2 * 2048 * CONFIG.model_dim * 4  # [B, T, D] in float32
    assert many - few < 4 * one, "each further layer holds arrays of its own"
