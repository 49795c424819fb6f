"""Routed experts: each token's MLP is a few of many, chosen by a router.

T tokens, D model_dim, E experts, F hidden units of an expert, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import mesh

Gated = Callable[[Array, Array], Array]  # what becomes of gate and up


class Experts(NamedTuple):
    """The weights of all experts; biases where the model has them."""

    gate: Float[Array, "E F D"]
    up: Float[Array, "E F D"]
    down: Float[Array, "E D F"]
    gate_bias: Float[Array, "E F"] | None = None
    up_bias: Float[Array, "E F"] | None = None
    down_bias: Float[Array, "E D"] | None = None


def route(scores: Float[Array, "T E"], k: int, normalized: bool) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Chooses the k experts with the largest scores; of equal ones those with the lower index.

    Args:
      scores: the router's scores.
      k: experts of a token.
      normalized: whether a token's weights add up to 1, or are parts of a softmax over all experts.

    Returns:
      The experts and their weights.
    """
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    top, chosen = jax.lax.top_k(wide, k)
    total = jax.nn.logsumexp(top if normalized else wide, -1, keepdims=True)
    return chosen, jnp.exp(top - total).astype(scores.dtype)


def mix(
    x: Float[Array, "T D"],
    experts: Experts,
    chosen: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gated: Gated,
) -> Float[Array, "T D"]:
    """The sum of the chosen experts' outputs, weighted.

    Args:
      x: inputs.
      experts: the experts.
      chosen: the experts of each token.
      weights: what their outputs are multiplied by.
      gated: what becomes of gate and up.
    """
    # On CPU, XLA computes a ragged product as a whole one for every expert; under a mesh it may gather the weights.
    form = dense if jax.default_backend() == "cpu" or mesh.current() is not None else by_sorting
    return form(x, experts, chosen, weights, gated)


def dense(
    x: Float[Array, "T D"], experts: Experts, chosen: Int[Array, "T k"], weights: Float[Array, "T k"], gated: Gated
) -> Float[Array, "T D"]:
    """`mix` one expert after the other, each for all tokens; those that no token has chosen are skipped."""

    def add(total: Float[Array, "T D"], each: tuple[Array, Experts]) -> tuple[Float[Array, "T D"], None]:
        index, expert = each
        share = jnp.where(chosen == index, weights, 0).sum(-1, keepdims=True)

        def output() -> Float[Array, "T D"]:
            gate, up = _plus(x @ expert.gate.T, expert.gate_bias), _plus(x @ expert.up.T, expert.up_bias)
            return total + share * _plus(gated(gate, up) @ expert.down.T, expert.down_bias)

        return jax.lax.cond((chosen == index).any(), output, lambda: total), None

    return jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(experts.gate.shape[0]), experts))[0]


def by_sorting(
    x: Float[Array, "T D"], experts: Experts, chosen: Int[Array, "T k"], weights: Float[Array, "T k"], gated: Gated
) -> Float[Array, "T D"]:
    """`mix` of tokens in the order of their experts, in one ragged product per weight."""
    count, k = chosen.shape
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=experts.gate.shape[0])
    rows, of_row = x[order // k], expert[order]

    def product(a: Array, weight: Float[Array, "E o i"], bias: Float[Array, "E o"] | None) -> Array:
        y = jax.lax.ragged_dot(a, weight.swapaxes(1, 2), sizes)
        return y if bias is None else y + bias[of_row]

    hidden = gated(product(rows, experts.gate, experts.gate_bias), product(rows, experts.up, experts.up_bias))
    outputs = product(hidden, experts.down, experts.down_bias)[jnp.argsort(order)]  # in the order of tokens again
    return (outputs.reshape(count, k, -1) * weights[..., None]).sum(1)


def _plus(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias
