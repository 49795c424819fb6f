"""Fisher gradients: of Σ_t log p(y_t), with every y_t drawn from the model's own prediction.

The mean of their squares is the Fisher information, which is the curvature of the KL divergence: an error δ costs
½ E (g·δ)². B batch, N tokens, D model_dim, V vocabulary, S draws.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from kvjax.models.config import ModelConfig
from kvjax.models.decoder import final_states

ROWS = 128  # tokens whose logits are held at a time


@functools.partial(jax.jit, static_argnames="config")
def pull_head(
    config: ModelConfig,
    head: Float[Array, "V D"],
    norm: Float[Array, "D"],
    h: Float[Array, "1 N D"],
    keys: Key[Array, "S"],
) -> Float[Array, "S 1 N D"]:
    """The gradient with respect to the output of the last layer.

    Args:
      config: config of the model.
      head: the weight that gives the logits.
      norm: the weight of the last norm.
      h: the output of the last layer.
      keys: one for each draw of all y_t.
    """
    hidden, pull = jax.vjp(lambda h: final_states(config, norm, h), h)
    g = draw_gradients(hidden[0, :-1], head, keys).astype(h.dtype)
    g = jnp.pad(g, ((0, 0), (0, 1), (0, 0)))  # the last token predicts nothing
    return jax.vmap(lambda g: pull(g[None])[0])(g)


def draw_gradients(hidden: Float[Array, "n D"], head: Float[Array, "V D"], keys: Key[Array, "S"]) -> Array:
    """The gradient [S, n, D] of log p(y_t) with respect to final hidden states: y_t's row less the expected one."""
    count = hidden.shape[0]
    size = min(ROWS, count)
    rows = jnp.pad(hidden, ((0, -count % size), (0, 0))).reshape(-1, size, hidden.shape[1])
    own = jax.vmap(lambda key: jax.random.split(key, len(rows)))(keys).swapaxes(0, 1)  # [blocks, S]

    def block(rows: Float[Array, "n D"], keys: Key[Array, "S"]) -> Float[Array, "S n D"]:
        logits = rows @ head.T
        drawn = jax.vmap(lambda key: jax.random.categorical(key, logits))(keys)
        return head[drawn] - jax.nn.softmax(logits) @ head

    found = jax.lax.map(lambda x: block(*x), (rows, own))  # [blocks, S, size, D]
    return found.swapaxes(0, 1).reshape(len(keys), -1, hidden.shape[1])[:, :count]
