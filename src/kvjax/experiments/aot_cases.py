"""What is compiled ahead of time, for any platform: shapes of packed tensors and of a model's whole decode step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from ml_collections import config_dict

from kvjax.caches.base import CacheShape
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.checks import check_whole
from kvjax.errors import KvjaxError
from kvjax.models.decoder import Decoder
from kvjax.models.params import param_shapes
from kvjax.models.zoo import RANDOM
from kvjax.ops import dispatch
from pallas_kernels.layout import EXACT, PLANES, Packed
from pallas_kernels.remat_attention.weights import Rebuild

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


class Kernels(NamedTuple):
    """A platform's implementations. packed_attention: one or more, by what their rows are called; twice: the settings
    by which it computes twice as many tokens at a time, where there are such; causal_attention: if there is one."""

    name: str
    packed_attention: dict[str, Callable]
    quantize_pack: Callable
    remat_attention: Callable
    reconstruct: Callable
    twice: dict[str, int]
    causal_attention: Callable | None = None


def cases(config: config_dict.ConfigDict, kernels: Kernels) -> Iterator[Case]:
    """What a config asks for.

    Raises:
      KvjaxError: an op, mode, width, cache, model or size that is none.
    """
    for name in SHAPE:
        if name != "model":
            check_whole(name, config[name], 1)
    makers: dict[str, Callable[..., Iterator[Case]]] = {
        **{op: functools.partial(_packed_attention, op) for op in kernels.packed_attention},
        "quantize_pack": _quantize_pack,
        "remat_attention": _remat_attention,
        "reconstruct": _reconstruct,
        "decode_step": _decode_steps,
    }
    if kernels.causal_attention:
        makers["causal_attention"] = _causal_attention
    for op in split_list(config.ops):
        if op not in makers:
            raise KvjaxError(f"op {op!r}; expected one of {', '.join(makers)}")
        yield from makers[op](config, kernels)


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


def _packed_attention(op: str, config: config_dict.ConfigDict, kernels: Kernels) -> Iterator[Case]:
    settings = {"first": 0, "window": None, "scale": config.head_dim**-0.5}
    run = functools.partial(kernels.packed_attention[op], **settings)
    stored = functools.partial(packed, config.batch, config.kv_heads, config.tokens, config.head_dim)
    q, lengths = queries(config)
    for mode, (k, v) in itertools.product(split_list(config.modes), pairs(config.bits)):
        if mode not in MODES:
            raise KvjaxError(f"mode {mode!r}; expected one of {', '.join(MODES)}")
        if (k, v) == (EXACT, EXACT) and mode != "token":
            continue
        arguments = q, stored(k, *MODES[mode][:2]), stored(v, *MODES[mode][2:]), lengths, lengths
        point = {"op": op, "bits": f"{k}/{v}", "mode": "" if k == v == EXACT else mode}
        yield Case(point, run, arguments, functools.partial(run, **kernels.twice) if kernels.twice else None)


def _quantize_pack(config: config_dict.ConfigDict, kernels: Kernels) -> Iterator[Case]:
    blocks = config.batch * config.tokens // PACK
    x = shaped((blocks, config.kv_heads, PACK, config.head_dim), jnp.bfloat16)
    counted = shaped((blocks, PACK), jnp.bool_)
    widths = sorted({width for pair in pairs(config.bits) for width in pair} - {EXACT})
    forms = ("token", config.head_dim), ("token", 32), ("channel", 32)
    for bits, (per, group), fit in itertools.product(widths, forms, ("minmax", "mse")):
        run = functools.partial(kernels.quantize_pack, bits=bits, per=per, group=group, fit=fit)
        mode = f"{per}{group}{', fitted' * (fit == 'mse')}"
        yield Case({"op": "quantize_pack", "bits": str(bits), "mode": mode}, run, (x, counted))


def _remat_attention(config: config_dict.ConfigDict, kernels: Kernels) -> Iterator[Case]:
    """Latents that all heads share, one stream for keys and values or two, inputs, and latents of each head."""
    heads, head_dim = config.kv_heads, config.head_dim
    q, lengths = queries(config)
    table = shaped((config.tokens, head_dim), jnp.float32)
    streams = {  # heads and width of keys, and whether values are others
        "shared": (1, config.rank, False),
        "shared, values apart": (1, config.rank, True),
        "inputs": (1, config.model_dim, False),
        "per head": (heads, head_dim, True),
    }
    run = functools.partial(_attend_rebuilt, kernels.remat_attention, head_dim**-0.5)
    kinds = itertools.product(streams.items(), ("token", "channel"), map(int, split_list(config.row_bits)))
    for (name, (groups, width, apart)), per, bits in kinds:
        rows = functools.partial(packed, config.batch, groups, config.tokens, width, bits)
        up = shaped((groups, width, heads * head_dim // groups), jnp.bfloat16)
        rebuild = Rebuild(up, table, table, norm=shaped((head_dim,), jnp.float32))
        keys, values = rows(per, 128 if per == "token" else 32), rows("token", 128) if apart else None
        point = {"op": "remat_attention", "bits": f"{bits}/{bits}" if apart else str(bits), "mode": f"{per}, {name}"}
        yield Case(point, run, (q, keys, values, rebuild, lengths, lengths))


def _attend_rebuilt(remat_attention: Callable, scale: float, q: Any, keys: Packed, values: Packed | None, *rest: Any):
    """Inside jit, where alone one tensor can be both."""
    return remat_attention(q, keys, values or keys, *rest, first=0, window=None, scale=scale)


def _reconstruct(config: config_dict.ConfigDict, kernels: Kernels) -> Iterator[Case]:
    below = shaped((config.batch, config.tokens, config.model_dim), jnp.bfloat16)
    up, until = shaped((config.rank, config.model_dim), jnp.bfloat16), shaped((config.batch,), jnp.int32)
    for bits, per in itertools.product(map(int, split_list(config.row_bits)), ("token", "channel")):
        delta = packed(config.batch, 1, config.tokens, config.rank, bits, per, 32)
        point = {"op": "reconstruct", "bits": str(bits), "mode": f"{per}32"}
        yield Case(point, kernels.reconstruct, (below, delta, up, until), donated=(0,))


def _causal_attention(config: config_dict.ConfigDict, kernels: Kernels) -> Iterator[Case]:
    """A prompt of as many tokens as the decode step's cache has."""
    shape = config.batch, config.step_tokens
    q, k = (shaped((*shape, heads, config.head_dim), jnp.bfloat16) for heads in (config.heads, config.kv_heads))
    assert kernels.causal_attention
    run = functools.partial(kernels.causal_attention, window=None)
    yield Case({"op": "causal_attention", "bits": f"{EXACT}/{EXACT}", "mode": ""}, run, (q, k, k))


def _decode_steps(config: config_dict.ConfigDict, kernels: Kernels) -> Iterator[Case]:
    """One step of a whole model, with every op's kernel where it serves; the cache is updated in place."""
    for cache in split_list(config.caches):
        yield _decode_step(config, cache, kernels.name)


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
    platform = next(platform for platform, names in dispatch.ORDER.items() if kernel in names)
    with dispatch.using(**{op: dispatch.order_of(op, platform) for op in dispatch.OPS}):  # type: ignore[arg-type]
        hidden, cache = decoder.apply({"params": params}, token, cache)
        logits = jnp.asarray(decoder.apply({"params": params}, hidden[:, -1:], method="logits"))
    return logits.argmax(-1).astype(jnp.int32), cache
