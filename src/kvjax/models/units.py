"""Weights in units that float16 scales hold: the same function, with layer inputs, keys and values of usual size.

Packed caches keep scales and zero points in float16. Where a model's values lie near 1e-7 or 1e6, scales vanish or
overflow, and 8 bits are as bad as 2. What is small in such a model is made up for behind it: tiny values by a large
output projection, tiny keys by large queries. So both sides are multiplied by a power of two and its inverse, which
rounds nothing. A model of usual sizes stays as it is, bit for bit.

D model_dim, H heads, K kv_heads, d head_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.mesh import fetch
from kvjax.models.config import ModelConfig
from kvjax.models.params import Params

USUAL = (2.0**-8, 2.0**8)  # rms at which the scales of 8-bit codes are normal float16 numbers, outliers included


def in_usual_units(config: ModelConfig, params: Params) -> Params:
    """Rescales the layers whose inputs, keys or values would not fit float16 scales.

    Args:
      config: the decoder's config.
      params: its parameters; what is abstract or traced stays as it is.

    Returns:
      Parameters of the same function; the same object where no layer needs it.
    """
    if not all(map(_is_concrete, jax.tree.leaves(params))):
        return params
    changed = {}
    for name in (f"layer_{i}" for i in range(config.layers)):
        factors = [_factor(fetch(size).astype(np.float64)) for size in _sizes(params[name], config.head_dim)]
        if any((factor != 1).any() for factor in factors):
            changed[name] = _rescale(params[name], config, *factors)
    return {**params, **changed} if changed else params


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, jax.core.Tracer)


@functools.partial(jax.jit, static_argnames="head_dim")
def _sizes(layer: Any, head_dim: int) -> tuple[Float[Array, ""], Float[Array, "K"], Float[Array, "K"]]:
    """The rms of normalised layer inputs, and of keys and values per head, as if channels were independent."""
    wide = {name: array.astype(jnp.promote_types(array.dtype, jnp.float32)) for name, array in layer.items()}
    norm = wide.get("attention_norm", jnp.ones(1))  # without one, layer inputs are taken to be of usual size

    def of_heads(name: str) -> Float[Array, "K"]:
        squares = jnp.square(wide[name] * norm).sum(1) + jnp.square(wide.get(f"{name}_bias", 0.0))
        return jnp.sqrt(squares.reshape(-1, head_dim).mean(1))

    rms = lambda a: jnp.sqrt(jnp.square(a).mean())  # noqa: E731
    k, v = of_heads("k"), of_heads("v")
    return rms(norm), jnp.full_like(k, rms(wide["k_norm"])) if "k_norm" in layer else k, v


def _factor(size: np.ndarray) -> np.ndarray:
    """The power of two that brings a size near 1; 1 where it is usual, or no size at all."""
    odd = np.isfinite(size) & (size > 0) & ((size < USUAL[0]) | (size > USUAL[1]))
    return np.exp2(-np.round(np.log2(np.where(odd, size, 1.0))))


def _rescale(layer: Any, config: ModelConfig, x: np.ndarray, k: np.ndarray, v: np.ndarray) -> Any:
    """The layer with its inputs, and the keys and values of each head, multiplied by powers of two."""
    channels = lambda factor: np.repeat(factor, config.head_dim)  # noqa: E731
    queries = lambda factor: channels(np.repeat(factor, config.heads // config.kv_heads))  # noqa: E731
    factors = {
        "attention_norm": x,
        "q": np.broadcast_to(1 / x, (config.heads * config.head_dim, 1)),
        "k": np.broadcast_to(1 / x, (config.kv_heads * config.head_dim, 1)),
        "v": channels(v)[:, None] / x,
        "v_bias": channels(v),
        "o": 1 / queries(v),
    }
    if config.qk_norm:
        factors |= {"q_norm": 1 / k[0], "k_norm": k[0]}
    else:
        factors |= {"q": factors["q"] / queries(k)[:, None], "q_bias": 1 / queries(k)}
        factors |= {"k": factors["k"] * channels(k)[:, None], "k_bias": channels(k)}
    return layer | {name: layer[name] * factors[name].astype(layer[name].dtype) for name in factors if name in layer}
