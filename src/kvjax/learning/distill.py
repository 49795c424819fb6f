"""Adapters that are trained by self-distillation: a model under a plan learns to predict what the exact one does.

The loss is the KL divergence from the exact model's predictions, with every token read as it is stored (protocol
`parallel`). Keys and values carry the cache's errors forwards; backwards they count as exact (straight-through).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.caches.base import Chunk, LayerCache
from kvjax.caches.plan import Cache, CachePlan
from kvjax.checks import check_whole
from kvjax.errors import KvjaxError
from kvjax.learning import training
from kvjax.learning.adapters import Adapters, Layers, first_adapters, with_changes
from kvjax.learning.forward import attention, divergence
from kvjax.learning.polish import exact_output
from kvjax.learning.training import Kept, State
from kvjax.models.calibration import Calibration
from kvjax.models.decoder import embed, first_alike, run_layer
from kvjax.models.model import Model
from kvjax.ops.rotate import rotate_heads

Progress = Callable[[int, int], None]
still = jax.lax.stop_gradient


def distill(
    model: Model,
    plan: CachePlan,
    text: Calibration,
    rank: int,
    steps: int,
    rate: float,
    folder: str | Path | None,
    progress: Progress,
) -> Adapters:
    """Trains low-rank adapters of q, k, v and o for a plan; see `kvjax.learn_adapters`.

    Args:
      model: the model; it is not changed.
      plan: methods that compute bases of the weights are refused, since the weights change.
      text: two windows or more: the last one chooses, the others are learned from, one a step.
      rank: of every adapter.
      steps: of Adam.
      rate: its learning rate, which falls to 0 by a cosine.
      folder: from which a run that was cut off goes on; a temporary one where None.
      progress: called as progress(step, steps) at every step.

    Raises:
      KvjaxError: a plan that is refused, numbers that are not possible, or files that cannot be written.
    """
    for name, value in {"rank": rank, "steps": steps}.items():
        check_whole(name, value, 1)
    training.check_rate("rate", rate)
    _check(model, plan)
    if len(text.windows) < 2:
        raise KvjaxError("the text has one window; expected two or more: one is for choosing")
    run = functools.partial(_run, model, plan, text, rank, steps, rate, progress)
    return training.in_folder(folder, run)


def _check(model: Model, plan: CachePlan) -> None:
    if based := next((spec for spec in plan.specs if spec.bases_key), None):
        raise KvjaxError(f"{based} computes bases of weights, which adapters change; expected methods without")
    if model.config.learned_sinks:
        raise KvjaxError("learned sinks are not trained through; expected a model without")
    plan.require_whole_windows("training")


def _run(
    model: Model,
    plan: CachePlan,
    text: Calibration,
    rank: int,
    steps: int,
    rate: float,
    progress: Progress,
    folder: Path,
) -> Adapters:
    *seen, unseen = [jnp.asarray(window, jnp.int32) for window in text.windows]
    card = {
        **{"model": model.name, "model_sha256": model.checksum, "dtype": str(model.dtype), "cache": str(plan)},
        **{"learned_from": text.identity, "rank": rank, "steps": steps, "rate": rate},
    }
    optimizer = training.adam(rate, steps)
    with model.layout.entered():
        exact = [exact_output(model, window) for window in (*seen, unseen)]
        empty = plan.init(model.cache_shape(1, len(unseen)))

        def step(state: State) -> State:
            w = state.step % len(seen)
            by, inner = training.update(
                optimizer, gradient(model, empty, state.by, seen[w], exact[w]), state.optimizer, state.by
            )
            progress(state.step + 1, steps)
            return state._replace(step=state.step + 1, by=by, optimizer=inner)

        look = lambda by: loss(model, empty, by, unseen, exact[-1])  # noqa: E731
        begun = training.begun(first_adapters(model, rank), optimizer)
        state, curve = training.train(begun, steps, step, look, Kept(folder, "adapters", card))
    return Adapters(state.best, card | {"curve": curve})


# ---- the model under a plan, with gradients


@struct.dataclass
class Stored:
    """Keys and values as a cache reads them back of a window; gradients pass as if they were exact."""

    cache: LayerCache

    def attend(self, chunk: Chunk, carry: Any):
        k, v, positions, _, carry = self.cache.materialize(still(dataclasses.replace(chunk, read="stored")), carry)
        exact = rotate_heads(chunk.k, chunk.rotation), chunk.v
        read = [_in_order(held, positions, own) for held, own in zip((k, v), exact, strict=True)]
        return (
            attention(chunk, *(own + still(held - own) for held, own in zip(read, exact, strict=True))),
            self,
            carry,
        )


def _in_order(held: Float[Array, "1 S K d"], positions: Int[Array, "1 S"], own: Float[Array, "1 N K d"]) -> Array:
    """What is held, by position; a token that is not, as it is."""
    at = jnp.where(positions[0] < 0, own.shape[1], positions[0])
    return own.at[0, at].set(held[0].astype(own.dtype), mode="drop")


def loss(model: Model, empty: Cache, by: Layers, window: Int[Array, "N"], exact: Float[Array, "1 N D"]) -> float:
    """The mean KL divergence of a window from the exact model, in nats.

    Args:
      model: the model.
      empty: an empty cache of the plan, with room for the window.
      by: adapters.
      window: token ids.
      exact: the last layer's output with exact keys and values.
    """
    hs, _ = _forward(model, empty, by, window)
    return float(divergence(model.config, model.params["norm"], model.head, hs[-1], exact)[0])


def gradient(model: Model, empty: Cache, by: Layers, window: Int[Array, "N"], exact: Float[Array, "1 N D"]) -> Layers:
    """The gradient of `loss` with respect to the adapters, one layer's activations in memory at a time."""
    hs, carries = _forward(model, empty, by, window)
    _, g = divergence(model.config, model.params["norm"], model.head, hs[-1], exact)
    found = []
    for i in reversed(range(len(by))):
        own, g = _pull(*_arguments(model, empty, i), by[i], hs[i], carries[i], g)
        found.append(own)
    return found[::-1]


def _forward(model: Model, empty: Cache, by: Layers, window: Int[Array, "N"]) -> tuple[list[Array], list[Any]]:
    """The input of every layer and the carry that it takes, at the end those that the last one leaves."""
    hs, carries = [embed(model.config, model.params["embed"], window[None])], [empty.plan.init_carry(empty.shape)]
    for i in range(len(by)):
        h, carry = _layer(*_arguments(model, empty, i), by[i], hs[-1], carries[-1])
        hs, carries = [*hs, h], [*carries, carry]
    return hs, carries


def _arguments(model: Model, empty: Cache, i: int) -> tuple[Any, ...]:
    """Of `_layer`, but for what changes."""
    return model.config, first_alike(model.config, i), model.params[f"layer_{i}"], empty.layers[i]


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _layer(config, layer, params, cache: LayerCache, by, h: Float[Array, "1 N D"], carry):
    out, _, carry = run_layer(config, layer, with_changes(params, by), h, (), Stored(cache), carry)
    return out, carry


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _pull(config, layer, params, cache: LayerCache, by, h: Float[Array, "1 N D"], carry, g: Float[Array, "1 N D"]):
    """Gradients with respect to the layer's adapters and its input, of that of its output."""
    forward = lambda by, h: _layer(config, layer, params, cache, by, h, carry)[0]  # noqa: E731
    return jax.vjp(forward, by, h)[1](g)
