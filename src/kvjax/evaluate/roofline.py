"""The time that no decode step can beat on a device: bytes from memory against operations (XQuant, section 3.4).

A layer takes as long as the slower of two: moving its bytes, each once, and computing its operations, both at the
device's peak and at the same time. Whether the one or the other bounds it is told by the ridge point, the operations
per byte at which they take equally long. Nothing is run or measured: all figures follow from shapes.

Counted, for every layer: weights, the bases of a method, the cache as it is allocated for the context, XQuant-CL's
accumulator read and written; 2 operations per weight and sequence, scores and sums of values, and what keys are
rebuilt with. Values are not rebuilt: (p X̂) R_v = p (X̂ R_v), see `kvjax.ops.remat`. Left out: norms, softmax,
unpacking of codes, and activations. What no weight is, is bfloat16 too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.caches.base import REAL_DTYPE, CacheShape, CacheSpec, LayerShapes
from kvjax.caches.cross_layer import init_carries
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.caches.x import X
from kvjax.caches.xcl import XCL
from kvjax.checkpoints.load import read_config
from kvjax.checks import check_whole, show
from kvjax.errors import KvjaxError
from kvjax.models.config import ModelConfig
from kvjax.models.model import Model
from kvjax.models.params import layer_shapes, param_shapes
from kvjax.tables import align_columns

ITEM = jnp.dtype(REAL_DTYPE).itemsize  # bytes of a weight
CONTEXTS = (1024, 8192, 32768, 131072)


@dataclasses.dataclass(frozen=True)
class Device:
    """The peaks of one device.

    bandwidth: bytes a second from and to its main memory.
    flops: operations a second of dense bfloat16 products, a multiplication and an addition counted as two.
    memory: bytes of its main memory.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float

    @property
    def ridge(self) -> float:
        """Operations per byte at which moving and computing take equally long."""
        return self.flops / self.bandwidth


# Google's page of Cloud TPU v6e, which has v5e beside it; NVIDIA's data sheets of A100 80GB SXM, H100 SXM and B200
# (HGX, per GPU). Figures with sparsity are halved.
DEVICES = {
    device.name: device
    for device in (
        Device("v5e", 819e9, 197e12, 16e9),
        Device("v6e", 1640e9, 918e12, 32e9),
        Device("a100", 2039e9, 312e12, 80e9),
        Device("h100", 3350e9, 989e12, 80e9),
        Device("b200", 8000e9, 2250e12, 192e9),
    )
}


class Work(NamedTuple):
    """What a method adds to a layer's decode step.

    Attributes:
      bases: elements of its own matrices, read once a step.
      rebuild: elements of the matrices that every stored token is multiplied with.
      value_width: channels that a query head sums up over the stored tokens.
    """

    bases: int
    rebuild: int
    value_width: int


@functools.singledispatch
def work(spec: CacheSpec, shape: LayerShapes) -> Work:
    """What a method does beside reading its cache; `work.register` tells it of a class of specs.

    Args:
      spec: the cache of a layer.
      shape: sizes of the layer.

    Returns:
      The work; for a class that is not registered, that of keys and values which need no rebuilding.
    """
    return Work(0, 0, shape.head_dim)


@work.register
def _of_x(spec: X, shape: LayerShapes) -> Work:
    kept = spec.tensors(shape)[0]
    up = kept.width * shape.kv_heads * shape.head_dim
    down = shape.model_dim * kept.width * kept.heads
    return Work(0 if spec.mode == "input" else 2 * (down + up), up, kept.width)


@work.register
def _of_xcl(spec: XCL, shape: LayerShapes) -> Work:
    basis = shape.model_dim * spec.tensors(shape)[0].width if spec.bases_key else 0
    return Work(basis, basis + shape.model_dim * shape.kv_heads * shape.head_dim, shape.model_dim)


class Layer(NamedTuple):
    """One layer's decode step of a batch: bytes and operations, fixed ones and those of `tokens` stored tokens."""

    tokens: int
    weight_bytes: float
    token_bytes: float
    weight_flops: float
    token_flops: float

    def seconds(self, device: Device) -> tuple[float, float]:
        """How long moving and computing take."""
        moved = self.weight_bytes + self.token_bytes
        return moved / device.bandwidth, (self.weight_flops + self.token_flops) / device.flops


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step of a batch of sequences that hold `context` tokens each.

    weight_bytes: what is read once, whatever the context: weights and bases.
    cache_bytes: what is read and written of caches and accumulators.
    flops: operations.
    seconds: the least time, the layers one after the other.
    computing: the share of that time in which computing, not moving, is the bound.
    ridge_tokens: tokens of the whole batch above which layers that see all tokens are bound by computing; infinite
      where they never are.
    held_bytes: parameters, bases, caches and one accumulator.
    room: tokens of the whole batch that fit the device's memory.
    """

    device: Device
    cache: CachePlan
    batch: int
    context: int
    weight_bytes: float
    cache_bytes: float
    flops: float
    seconds: float
    computing: float
    ridge_tokens: float
    held_bytes: float
    room: float

    @property
    def fits(self) -> bool:
        """Whether the device's memory holds it."""
        return self.held_bytes <= self.device.memory


class Steps(list[Step]):
    """Decode steps of several caches at several contexts on one device."""

    def table(self) -> str:
        """Milliseconds a step, a line per cache: * is the fastest that fits, (..) does not fit the device."""
        contexts = list(dict.fromkeys(step.context for step in self))
        lines = [["cache", *(f"{context:,}" for context in contexts), "computes above", "room"]]
        for cache in dict.fromkeys(step.cache for step in self):
            own = [step for step in self if step.cache == cache]
            times = [self._shown(step) for step in own]
            lines.append([str(cache), *times, _tokens(own[-1].ridge_tokens), _tokens(own[-1].room)])
        return align_columns(lines, left=1)

    def fastest(self, context: int) -> Step | None:
        """The fastest step at a context that fits the device; of equals the first."""
        fitting = [step for step in self if step.context == context and step.fits]
        return min(fitting, key=lambda step: step.seconds, default=None)

    def _shown(self, step: Step) -> str:
        time = f"{1e3 * step.seconds:.2f}"
        if not step.fits:
            return f"({time})"
        return f"*{time}" if step is self.fastest(step.context) else time


def roofline(
    model: Model | ModelConfig | str,
    device: Device | str = "h100",
    caches: str | CacheSpec | CachePlan | Sequence[str | CacheSpec | CachePlan] = "dense",
    *,
    contexts: int | Sequence[int] = CONTEXTS,
    batch: int = 1,
) -> Steps:
    """Computes the least time of a decode step, and what bounds it.

    Args:
      model: a model, its config, or a name that `kvjax.load` takes; no weights are read.
      device: a name of DEVICES, or the peaks of another device.
      caches: as for `kvjax.sweep`.
      contexts: tokens that each sequence holds.
      batch: sequences.

    Returns:
      A step per cache and context, in order.

    Raises:
      KvjaxError: no such device, or a model, cache, context or batch that is none.
    """
    config = model.config if isinstance(model, Model) else model
    if not isinstance(config, ModelConfig):
        config = read_config(config)
    names = split_list(caches) if isinstance(caches, str) else caches if isinstance(caches, Sequence) else [caches]
    plans = [CachePlan.cast(name, config) for name in names]
    lengths = contexts if isinstance(contexts, Sequence) else [contexts]
    if not plans or not lengths or isinstance(lengths, str):
        raise KvjaxError("no caches or no contexts; expected at least one of each")
    lengths = [check_whole("context", length, 1) for length in lengths]
    batch = check_whole("batch", batch, 1)
    peaks = _device(device)
    return Steps(_step(config, peaks, plan, batch, length) for plan in plans for length in lengths)


def ridge_tokens(
    ridge: float, weight_bytes: float, token_flops: float, token_bytes: float, weight_flops: float = 0
) -> float:
    """Tokens above which a step is bound by computing: XQuant's break-even l (section 3.4, equations 3 and 4).

    It solves ridge = (weight_flops + l token_flops) / (weight_bytes + l token_bytes).

    Args:
      ridge: operations per byte of the device.
      weight_bytes: bytes that are moved whatever l is.
      token_flops: operations of each stored token.
      token_bytes: bytes of each stored token.
      weight_flops: operations whatever l is; the paper's equations leave them out.

    Returns:
      l; infinite where a token needs less computing than moving.
    """
    computing = token_flops - ridge * token_bytes
    return max(ridge * weight_bytes - weight_flops, 0) / computing if computing > 0 else math.inf


def _device(device: Device | str) -> Device:
    if isinstance(device, Device):
        return device
    if not isinstance(device, str) or device not in DEVICES:
        raise KvjaxError(f"device {show(device)}; expected one of {', '.join(DEVICES)}, or a Device")
    return DEVICES[device]


def _step(config: ModelConfig, device: Device, plan: CachePlan, batch: int, context: int) -> Step:
    layers = [_layer(config, spec, config.layer_window(i), batch, context) for i, spec in enumerate(plan.specs)]
    head = config.vocab_size * config.model_dim
    steps = [*layers, Layer(0, ITEM * head, 0, 2 * batch * head, 0)]
    times = [layer.seconds(device) for layer in steps]
    seconds = sum(map(max, times))
    whole = [layer for i, layer in enumerate(layers) if config.layer_window(i) is None]
    bases = ITEM * sum(work(spec, config).bases for spec in plan.specs)
    fixed = ITEM * sum(map(math.prod, param_shapes(config).values())) + bases
    held = plan.counted_bytes(context, batch) + _nbytes(
        lambda: plan.init_carry(plan.shape(batch, context, REAL_DTYPE))
    )
    return Step(
        *(device, plan, batch, context),
        weight_bytes=sum(layer.weight_bytes for layer in steps),
        cache_bytes=sum(layer.token_bytes for layer in layers),
        flops=sum(layer.weight_flops + layer.token_flops for layer in steps),
        seconds=seconds,
        computing=sum(max(pair) for pair in times if pair[1] > pair[0]) / seconds,
        ridge_tokens=_ridge_tokens(device.ridge, whole),
        held_bytes=fixed + held,
        room=max(device.memory - fixed, 0) / held * batch * context,
    )


def _ridge_tokens(ridge: float, layers: Sequence[Layer]) -> float:
    """`ridge_tokens` of layers that see the same tokens."""
    if not layers:
        return math.inf
    _, weight_bytes, token_bytes, weight_flops, token_flops = (sum(each) for each in zip(*layers, strict=True))
    tokens = layers[0].tokens
    return ridge_tokens(ridge, weight_bytes, token_flops / tokens, token_bytes / tokens, weight_flops)


@functools.lru_cache(maxsize=1024)  # layers of one spec are alike
def _layer(config: ModelConfig, spec: CacheSpec, window: int | None, batch: int, context: int) -> Layer:
    shape = CacheShape.of(config, batch, min(context, window or context), REAL_DTYPE)
    own, tokens = work(spec, shape), batch * shape.max_len
    sizes = {name: math.prod(each) for name, each in layer_shapes(config).items()}
    experts = sum(size for name, size in sizes.items() if name.startswith("expert_"))
    others = sum(sizes.values()) - experts
    chosen = config.experts_per_token / config.experts if config.experts else 0
    read = 1 - (1 - chosen) ** batch  # the share of experts that any sequence chooses, each chosen alike
    return Layer(
        tokens,
        weight_bytes=ITEM * (others + read * experts + own.bases),
        token_bytes=spec.counted_bytes(shape) + 2 * _nbytes(lambda: init_carries([spec], shape)),  # read and written
        weight_flops=2 * batch * (others + chosen * experts),
        token_flops=2 * tokens * (own.rebuild + config.heads * (config.head_dim + own.value_width)),
    )


def _nbytes(make: Callable[[], Any]) -> int:
    """Bytes of the arrays that a function would make."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))


def _tokens(count: float) -> str:
    """A number of tokens for a table."""
    return "never" if math.isinf(count) else f"{count:,.0f}"
