"""All weights of a model trained on a text: from scratch where they are random, further where they are not.

XQuant promises most for models with as many kv heads as heads, and small ones of these are not to be had. This makes
them: by training random weights, or by freeing the heads that `smollm2-135m-mha` has several times.

Gradients go back layer by layer, so that one layer's activations are in memory at a time, and equal layers share a
program.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kvjax.checks import check_whole
from kvjax.errors import KvjaxError
from kvjax.learning import training
from kvjax.learning.forward import Exact, likelihood
from kvjax.learning.training import Curve, Kept, State
from kvjax.mesh import fetch
from kvjax.models.calibration import Calibration
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import embed, first_alike, run_layer
from kvjax.models.model import Model
from kvjax.models.params import Params

MOST_UNSEEN = 16  # windows that choose among the steps
DECAY = 0.1  # of matrices, a step, times the rate
Progress = Callable[[int, int], None]


def pretrain(
    model: Model,
    text: Calibration,
    batch: int,
    steps: int,
    rate: float,
    folder: str | Path | None,
    progress: Progress,
) -> tuple[Model, Curve]:
    """Trains all weights by the next token; see `kvjax.learn_model`.

    Args:
      model: the model; it is not changed.
      text: two windows or more: one in ten, the last ones, choose, the others are learned from.
      batch: windows a step; rounded up to a multiple of the mesh's axis data.
      steps: of AdamW.
      rate: its learning rate at its highest.
      folder: from which a run that was cut off goes on; a temporary one where None.
      progress: called as progress(step, steps) at every step.

    Returns:
      The model at its best step, and the curve.

    Raises:
      KvjaxError: a model that is refused, numbers that are not possible, or files that cannot be written.
    """
    for name, value in {"batch": batch, "steps": steps}.items():
        check_whole(name, value, 1)
    training.check_rate("rate", rate)
    if model.dtype == jnp.bfloat16:
        raise KvjaxError(f"{model.name} is in bfloat16, which small steps do not change; expected dtype=float32")
    if model.config.learned_sinks:
        raise KvjaxError("learned sinks are not trained through; expected a model without")
    if len(text.windows) < 2:
        raise KvjaxError("the text has one window; expected two or more: one is for choosing")
    run = functools.partial(_run, model, text, batch, steps, rate, progress)
    return training.in_folder(folder, run)


def _run(
    model: Model, text: Calibration, batch: int, steps: int, rate: float, progress: Progress, folder: Path
) -> tuple[Model, Curve]:
    batch = training.whole_batch(batch, model.mesh)
    count = min(MOST_UNSEEN, -(-len(text.windows) // 10))
    seen, unseen = text.windows[:-count], text.windows[-count:]
    point = {
        **{"model_sha256": model.checksum, "dtype": str(model.dtype), "learned_from": text.identity},
        **{"batch": batch, "steps": steps, "rate": rate},
    }
    optimizer = adamw(rate, steps)
    place = lambda windows: training.over_data(jnp.asarray(windows, jnp.int32), model.mesh)  # noqa: E731

    def step(state: State) -> State:
        windows = place(seen[_order(state.step * batch, batch, len(seen))])
        _, slopes = gradient(model.config, state.by, windows)
        by, inner = training.update(optimizer, slopes, state.optimizer, state.by)
        progress(state.step + 1, steps)
        return state._replace(step=state.step + 1, by=by, optimizer=inner)

    def look(by: Params) -> float:
        return float(np.mean([loss(model.config, by, jnp.asarray(each[None], jnp.int32)) for each in unseen]))

    with model.layout.entered():
        begun = training.begun(model.params, optimizer)
        state, curve = training.train(begun, steps, step, look, Kept(folder, "pretrained", point))
    return _with_weights(model, state.best), curve


def adamw(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW for a model: gradients of length 1 at most, matrices decay, the rate rises and falls."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, -(-steps // 20), steps + 1)
    decayed = lambda params: jax.tree.map(lambda a: a.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=DECAY, mask=decayed)
    )


def _order(first: int, count: int, windows: int) -> Int[np.ndarray, "count"]:
    """Which windows come from the `first` on, where every pass over all of them has an order of its own."""
    at = np.arange(first, first + count)
    orders = {epoch: np.random.default_rng(epoch).permutation(windows) for epoch in np.unique(at // windows)}
    return np.array([orders[i // windows][i % windows] for i in at])


def _with_weights(model: Model, params: Params) -> Model:
    """The model with other weights, known by their checksum."""
    digest = hashlib.sha256(model.checksum.encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(fetch(leaf)).tobytes())
    name, checksum = f"{model.name} trained {digest.hexdigest()[:8]}", digest.hexdigest()
    return dataclasses.replace(model, name=name, params=params, checksum=checksum, calibration=None)


def head_likeness(config: ModelConfig, params: Params, name: str) -> float:
    """How alike the kv heads of a layer are: the cosine of a head's weight with the nearest other's, 1 for copies.

    Args:
      config: the model's config.
      params: its parameters.
      name: k or v.

    Returns:
      The mean over heads and layers; 0 where a layer has one kv head.
    """
    if config.kv_heads == 1:
        return 0.0

    def of(weight: Float[Array, "KD D"]) -> Float[Array, ""]:
        heads = weight.reshape(config.kv_heads, -1)
        heads = heads / jnp.linalg.norm(heads, axis=1, keepdims=True)
        return (heads @ heads.T - 2 * jnp.eye(len(heads))).max(0).mean()

    return float(np.mean([of(params[f"layer_{i}"][name]) for i in range(config.layers)]))


# ---- the model with gradients


def loss(config: ModelConfig, params: Params, windows: Int[Array, "B N"]) -> Float[Array, ""]:
    """The mean negative log-likelihood of every token but the first of a window, in nats."""
    return _likelihood(config, params, _forward(config, params, windows)[-1], windows)[0]


def gradient(config: ModelConfig, params: Params, windows: Int[Array, "B N"]) -> tuple[Float[Array, ""], Params]:
    """`loss` and its gradient with respect to the parameters."""
    hs = _forward(config, params, windows)
    cost, (norm, head, g) = _likelihood(config, params, hs[-1], windows)
    found: Params = {"norm": norm}
    for i in reversed(range(config.layers)):
        found[f"layer_{i}"], g = _pull(config, first_alike(config, i), params[f"layer_{i}"], hs[i], g)
    found["embed"] = _pull_embed(config, params["embed"], windows, g)
    if config.tied:
        return cost, found | {"embed": found["embed"] + head}
    return cost, found | {"head": head}


def _forward(config: ModelConfig, params: Params, windows: Int[Array, "B N"]) -> list[Array]:
    """The input of every layer and the output of the last."""
    hs = [embed(config, params["embed"], windows)]
    for i in range(config.layers):
        hs.append(_layer(config, first_alike(config, i), params[f"layer_{i}"], hs[-1]))
    return hs


def _likelihood(config: ModelConfig, params: Params, h: Float[Array, "B N D"], windows: Int[Array, "B N"]) -> Any:
    return likelihood(config, params["norm"], params["embed" if config.tied else "head"], h, windows)


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _layer(config, layer, params, h: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    return run_layer(config, layer, params, h, (), Exact(), ())[0]


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _pull(config, layer, params, h: Float[Array, "B N D"], g: Float[Array, "B N D"]) -> tuple[Params, Array]:
    """Gradients with respect to a layer's weights and its input, of that of its output."""
    return jax.vjp(functools.partial(_layer, config, layer), params, h)[1](g)


@functools.partial(jax.jit, static_argnames="config")
def _pull_embed(config, table: Float[Array, "V D"], windows: Int[Array, "B N"], g: Float[Array, "B N D"]) -> Array:
    return jax.vjp(lambda table: embed(config, table, windows), table)[1](g)[0]
