"""What is compiled ahead of time, for any platform: shapes of packed tensors and of a model's whole decode step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from ml_collections import config_dict

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan, split_list
from kvjax.errors import KvjaxError
from kvjax.models.decoder import Decoder
from kvjax.models.params import param_shapes
from kvjax.models.zoo import RANDOM
from kvjax.ops import dispatch
from pallas_kernels.layout import EXACT, PLANES, Packed

MODES = {  # per, group of keys; per, group of values; 0 is the whole width of a head
    "token": ("token", 0, "token", 0),
    "token32": ("token", 32, "token", 32),
    "kivi32": ("channel", 32, "token", 32),
}
WIDTHS = (*PLANES, EXACT)
PACK = 32
SHAPE = ("batch", "heads", "kv_heads", "head_dim", "tokens", "queries", "rank", "model_dim", "model", "step_tokens")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled: its name in a row and its arguments' shapes.

    twice: the same function computing twice as many tokens at a time: what it takes more is the cost of tokens.
    """

    point: dict[str, Any]
    function: Callable
    arguments: tuple
    twice: Callable | None = None
    donated: tuple[int, ...] = ()


def shaped(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def packed(batch: int, heads: int, tokens: int, width: int, bits: int, per: str, group: int) -> Packed:
    """Shapes of a packed tensor; group 0 is the whole width."""
    if bits == EXACT:
        return Packed((shaped((batch, heads, tokens, width), jnp.bfloat16),), None, None, bits, "token", width, PACK)
    group = min(group or width, width if per == "token" else tokens)
    groups = (width // group, tokens) if per == "token" else (tokens // group, width)
    planes = tuple(shaped((batch, heads, tokens * n // 8, width), jnp.uint8) for n in PLANES[bits])
    scale = shaped((batch, heads, *groups), jnp.float16)
    return Packed(planes, scale, scale, bits, per, group, PACK)


def pairs(bits: str) -> list[tuple[int, int]]:
    """Widths of keys and values in 4/2,8/8 or, for all, every pair."""
    if bits == "all":
        return list(itertools.product(WIDTHS, WIDTHS))
    try:
        found = [tuple(map(int, pair.split("/"))) for pair in split_list(bits)]
    except ValueError:
        found = [()]
    if any(len(pair) != 2 or not set(pair) <= set(WIDTHS) for pair in found):
        raise KvjaxError(f"bits {bits!r}; expected all or pairs like 4/2 of {', '.join(map(str, WIDTHS))}")
    return found  # type: ignore[return-value]


def queries(config: config_dict.ConfigDict) -> tuple[Any, Any]:
    """Queries, and what start and stop look like."""
    shape = (config.batch, config.queries, config.heads, config.head_dim)
    return shaped(shape, jnp.bfloat16), shaped((config.batch,), jnp.int32)


def decode_steps(config: config_dict.ConfigDict, kernel: str) -> list[Case]:
    """One step of a whole model, with every op's kernel where it serves; the cache is updated in place."""
    return [_decode_step(config, cache, kernel) for cache in split_list(config.caches)]


def _decode_step(config: config_dict.ConfigDict, cache: str, kernel: str) -> Case:
    if config.model not in RANDOM:
        raise KvjaxError(f"model {config.model!r}; expected one of {', '.join(RANDOM)}")
    model = RANDOM[config.model]
    plan = CachePlan.parse(cache, model)
    shape = CacheShape.of(model, config.batch, config.step_tokens, jnp.bfloat16)
    params = unflatten_dict({path: shaped(size, jnp.bfloat16) for path, size in param_shapes(model).items()})
    arguments = params, shaped((config.batch, 1), jnp.int32), jax.eval_shape(lambda: plan.init(shape))
    point = {"op": "decode_step", "bits": "", "mode": cache}
    return Case(point, functools.partial(_step, config.model, kernel), arguments, donated=(2,))


def _step(model: str, kernel: str, params: Any, token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    decoder = Decoder(RANDOM[model])
    with dispatch.using(**dict.fromkeys(dispatch.OPS, (kernel, "xla"))):  # type: ignore[arg-type]
        hidden, cache = decoder.apply({"params": params}, token, cache)
        logits = jnp.asarray(decoder.apply({"params": params}, hidden[:, -1:], method="logits"))
    return logits.argmax(-1).astype(jnp.int32), cache
