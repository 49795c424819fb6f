"""Final hidden states of texts, a layer at a time: one small program serves all layers that are alike, of all plans.

Generation compiles a plan's layers as one program, because it runs many times. A score runs once: one program would
take longer to compile than to run (docs/decisions.md).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, LayerCache
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.mesh import BATCH, Layout
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Weights, embed, final_states, first_alike, run_layer
from kvjax.models.model import Model
from kvjax.programs import make_room


def hidden_states(
    model: Model,
    plan: CachePlan,
    tokens: Int[np.ndarray | Array, "B N"],
    chunk: int,
    read: str = "exact",
    lengths: Int[np.ndarray | Array, "B"] | None = None,
    bases: tuple[Any, ...] | None = None,
) -> Float[Array, "B N D"]:
    """Final hidden states of all tokens, fed `chunk` at a time into an empty cache.

    Args:
      model: the model.
      plan: which cache each layer has.
      tokens: token ids.
      chunk: tokens that are fed together.
      read: as in `Decoder.__call__`.
      lengths: real tokens per sequence; all N where None.
      bases: what `load_bases` gives for the plan; read here where None.
    """
    make_room()
    config, params, layout = model.config, model.params, model.layout
    batch, count = tokens.shape
    steps = -(-count // chunk)
    tokens = np.pad(np.asarray(tokens, np.int32), ((0, 0), (0, steps * chunk - count)))
    total = np.full(batch, count, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    bases = load_bases(model, plan) if bases is None else bases
    shape, alike = model.cache_shape(batch, count), [first_alike(config, i) for i in range(config.layers)]
    with layout.entered():
        caches = [_empty_cache(spec, own, layout) for spec, own in plan.each(shape)]
        hidden = _empty_hidden(tokens.shape, config.model_dim, model.dtype, layout)
        for start in range(0, steps * chunk, chunk):
            h = _embed(config, layout, params["embed"], tokens[:, start : start + chunk])
            carry = _empty_carry(plan, shape)
            stored, real = np.minimum(start, total), np.clip(total - start, 0, chunk)
            for i, cache in enumerate(caches):
                statics = config, alike[i], read, count, layout
                h, caches[i], carry = _step(*statics, params[f"layer_{i}"], h, stored, real, bases[i], cache, carry)
            hidden = _keep(config, params["norm"], hidden, h, start)
        return hidden[:, :count]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_cache(spec: CacheSpec, shape: CacheShape, layout: Layout) -> LayerCache:
    return layout.constrain(spec.init(shape), spec.logical_axes(shape))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_carry(plan: CachePlan, shape: CacheShape) -> Any:
    return plan.init_carry(shape)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_hidden(tokens: tuple[int, int], dim: int, dtype: Any, layout: Layout) -> Float[Array, "B N D"]:
    return layout.constrain(jnp.zeros((*tokens, dim), dtype), BATCH)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(
    config: ModelConfig, layout: Layout, table: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    return layout.constrain(embed(config, table, tokens), BATCH)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnames=("cache", "carry"))
def _step(
    config: ModelConfig,
    layer: int,
    read: str,
    max_len: int,
    layout: Layout,
    params: Weights,
    h: Float[Array, "B T D"],
    stored: Int[Array, "B"],
    lengths: Int[Array, "B"],
    bases: Any,
    cache: LayerCache,
    carry: Any,
) -> tuple[Float[Array, "B T D"], LayerCache, Any]:
    h, cache, carry = run_layer(
        config, layer, params, h, bases, cache, carry, stored=stored, lengths=lengths, max_len=max_len, read=read
    )
    return layout.constrain(h, BATCH), cache, carry


@functools.partial(jax.jit, static_argnums=0, donate_argnames="hidden")
def _keep(
    config: ModelConfig, norm: Float[Array, "D"], hidden: Float[Array, "B N D"], h: Float[Array, "B T D"], start: int
) -> Float[Array, "B N D"]:
    """The final states of a chunk, written in their place."""
    return jax.lax.dynamic_update_slice_in_dim(hidden, final_states(config, norm, h), start, 1)
