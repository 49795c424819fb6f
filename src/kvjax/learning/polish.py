"""All encoders trained together: Adam on the KL divergence of the whole model from the exact one.

Gradients go back layer by layer, so that one layer's activations are in memory at a time, and equal layers share a
program. The last window is not trained on; of all that was tried the encoders with the least KL there are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from kvjax.learning.encoders import Bases, Changes, Encoder
from kvjax.learning.forward import divergence, encoded_layer, exact_layer, pull_layer
from kvjax.learning.training import State, update
from kvjax.models.decoder import embed, first_alike
from kvjax.models.model import Model


class Stack(NamedTuple):
    """The encoders of all layers of a model."""

    model: Model
    encoders: list[Encoder]
    bases: list[Bases]
    counted: Bool[Array, "N"]

    def arguments(self, i: int, by: list[Changes]) -> tuple[Any, ...]:
        """Of `encoded_layer`, but for the layer's input."""
        config = self.model.config
        params = self.model.params[f"layer_{i}"]
        return config, first_alike(config, i), params, self.encoders[i], self.bases[i], self.counted, by[i]


def exact_output(model: Model, window: Array) -> Float[Array, "1 N D"]:
    """The output of the last layer with exact keys and values."""
    h = embed(model.config, model.params["embed"], window[None])
    for i in range(model.config.layers):
        h, _ = exact_layer(model.config, first_alike(model.config, i), model.params[f"layer_{i}"], h)
    return h


def loss(stack: Stack, by: list[Changes], window: Array, exact: Float[Array, "1 N D"]) -> float:
    """The mean KL divergence of a window, in nats."""
    hs, _ = _forward(stack, by, window)
    return float(_divergence(stack, hs[-1], exact)[0])


def gradient(stack: Stack, by: list[Changes], window: Array, exact: Float[Array, "1 N D"]) -> list[Changes]:
    """The gradient of `loss` with respect to the changes of every layer."""
    hs, belows = _forward(stack, by, window)
    _, g = _divergence(stack, hs[-1], exact)
    g_below, found = jnp.zeros_like(belows[-1]), []
    for i in reversed(range(len(by))):
        own, g, g_below = pull_layer(*stack.arguments(i, by), hs[i], belows[i], (g, g_below))
        found.append(own)
    return found[::-1]


def step(stack: Stack, optimizer: optax.GradientTransformation, state: State, window: Array, exact: Array) -> State:
    """One step of training."""
    by, inner = update(optimizer, gradient(stack, state.by, window, exact), state.optimizer, state.by)
    return state._replace(step=state.step + 1, by=by, optimizer=inner)


def _forward(stack: Stack, by: list[Changes], window: Array) -> tuple[list[Array], list[Array]]:
    """Of every layer the input and what was read back below it; at the end those that the last one leaves."""
    model = stack.model
    hs = [embed(model.config, model.params["embed"], window[None])]
    belows = [jnp.zeros(hs[0].shape[1:], jnp.float32)]
    for i in range(len(by)):
        h, below = encoded_layer(*stack.arguments(i, by), hs[-1], belows[-1])
        hs, belows = [*hs, h], [*belows, below]
    return hs, belows


def _divergence(stack: Stack, h: Array, exact: Array) -> tuple[Array, Array]:
    model = stack.model
    return divergence(model.config, model.params["norm"], model.head, h, exact)
