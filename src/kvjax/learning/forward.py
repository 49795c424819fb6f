"""The model over whole windows, layer by layer, with exact keys and values or with those that encoders read back.

Where there are encoders, every query reads every token as it is stored, its own among them, but for sinks (protocol
`parallel`). All of it has gradients, so that attention is `jax.nn.dot_product_attention` and not the cache's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvjax.caches.base import Chunk, KVWeights
from kvjax.learning.encoders import Bases, Changes, Encoder, changed
from kvjax.models.decoder import final_states, kv_weights, norm_parts, run_layer
from kvjax.ops.rotate import rotate_heads

ROWS = 128  # tokens whose logits are held at a time


@struct.dataclass
class Exact:
    """A cache that stores keys and values as they are."""

    def attend(self, chunk: Chunk, carry: Any):
        return attention(chunk, rotate_heads(chunk.k, chunk.rotation), chunk.v), self, carry


@struct.dataclass
class Encoded:
    """A cache that reads keys and values back from an encoder; the carry is what the layer below read back."""

    encoder: Encoder
    bases: Bases
    counted: Bool[Array, "N"]

    def attend(self, chunk: Chunk, below: Float[Array, "N D"]):
        unit = chunk.weights.normalize(chunk.h)[0].astype(jnp.float32)
        rows, here = self.encoder.read(self.bases, unit, below, self.counted)
        k, v = _keys_and_values(rows.astype(chunk.k.dtype), chunk.weights, chunk.k.shape[2])
        return attention(chunk, rotate_heads(k, chunk.rotation), v), self, here


def attention(chunk: Chunk, k: Float[Array, "1 N K d"], v: Float[Array, "1 N K d"]) -> Float[Array, "1 N H d"]:
    """Causal attention over keys after RoPE, in the layer's window."""
    reach = None if chunk.window is None else (chunk.window - 1, 0)
    return jax.nn.dot_product_attention(chunk.q, k, v, is_causal=True, local_window_size=reach)


def _keys_and_values(rows: Float[Array, "N 2C"], weights: KVWeights, heads: int) -> tuple[Array, Array]:
    """Keys before RoPE and values of their projections."""
    k, v = jnp.split(rows[None], 2, -1)
    if weights.k_bias is not None and weights.v_bias is not None:
        k, v = k + weights.k_bias, v + weights.v_bias
    if weights.k_norm is not None:
        k = norm_parts(k, weights.k_norm, weights.norm_eps)
    return k.reshape(*k.shape[:2], heads, -1), v.reshape(*v.shape[:2], heads, -1)


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def exact_layer(config, layer, params, h: Float[Array, "1 N D"]) -> tuple[Array, Float[Array, "N D"]]:
    """The output of a layer, and its input, normalised."""
    unit = kv_weights(config, params).normalize(h)[0].astype(jnp.float32)
    return run_layer(config, layer, params, h, (), Exact(), ())[0], unit


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def encoded_layer(config, layer, params, encoder: Encoder, bases: Bases, counted, by: Changes, h, below):
    """The output of a layer whose encoder has changes, and what it read back for the layer above."""
    return _encoded(config, layer, params, encoder, bases, counted, by, h, below)


def _encoded(config, layer, params, encoder, bases, counted, by, h, below):
    cache = Encoded(encoder, changed(bases, by), counted)
    out, _, here = run_layer(config, layer, params, h, (), cache, below)
    return out, here


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def pull_layer(config, layer, params, encoder: Encoder, bases: Bases, counted, by: Changes, h, below, gradients):
    """Gradients with respect to changes, input and `below`, of those of `encoded_layer`'s results."""
    forward = functools.partial(_encoded, config, layer, params, encoder, bases, counted)
    return jax.vjp(forward, by, h, below)[1](gradients)


@functools.partial(jax.jit, static_argnames="config")
def divergence(
    config, norm: Float[Array, "D"], head: Float[Array, "V D"], h: Float[Array, "1 N D"], exact: Float[Array, "1 N D"]
) -> tuple[Float[Array, ""], Float[Array, "1 N D"]]:
    """The mean KL divergence from the exact model of a window, in nats, and its gradient.

    Args:
      config: config of the model.
      norm: the weight of the last norm.
      head: the weight that gives the logits.
      h: the output of the last layer.
      exact: that of the exact model.
    """
    target = final_states(config, norm, exact)[0]

    def block(rows, target):
        logs = [jax.nn.log_softmax((each @ head.T).astype(jnp.float32)) for each in (rows, target)]
        return (jnp.exp(logs[1]) * (logs[1] - logs[0])).sum(-1)

    return jax.value_and_grad(lambda h: _by_blocks(block, final_states(config, norm, h)[0], target).mean())(h)


@functools.partial(jax.jit, static_argnames="config")
def likelihood(
    config, norm: Float[Array, "D"], head: Float[Array, "V D"], h: Float[Array, "B N D"], windows: Int[Array, "B N"]
) -> tuple[Float[Array, ""], tuple[Float[Array, "D"], Float[Array, "V D"], Float[Array, "B N D"]]]:
    """The mean negative log-likelihood of every token but the first of a window, in nats, and its gradients.

    Args:
      config: config of the model.
      norm: the weight of the last norm.
      head: the weight that gives the logits.
      h: the output of the last layer.
      windows: token ids.

    Returns:
      The mean, and gradients with respect to norm, head and h.
    """
    following = windows[:, 1:].reshape(-1)

    def mean(norm, head, h):
        def block(rows, following):
            logs = jax.nn.log_softmax((rows @ head.T).astype(jnp.float32))
            return -jnp.take_along_axis(logs, following[:, None], 1)[:, 0]

        rows = final_states(config, norm, h[:, :-1])
        return _by_blocks(block, rows.reshape(-1, rows.shape[-1]), following).mean()

    return jax.value_and_grad(mean, argnums=(0, 1, 2))(norm, head, h)


def _by_blocks(of: Callable[..., Float[Array, "n"]], *rows: Shaped[Array, "N ..."]) -> Float[Array, "N"]:
    """A figure of every row, whose logits are held for a block of `ROWS` rows at a time, backwards too."""
    count = len(rows[0])
    held = min(ROWS, count)
    pad = lambda a: jnp.pad(a, ((0, -count % held), *[(0, 0)] * (a.ndim - 1)))  # noqa: E731
    blocks = [pad(a).reshape(-1, held, *a.shape[1:]) for a in rows]
    return jax.lax.map(jax.checkpoint(lambda each: of(*each)), tuple(blocks)).reshape(-1)[:count]
