"""Whole windows under a plan with its widths as data: what a search evaluates, compiled once for all plans.

A window goes through the model layer by layer, every layer by the one program of its spec's form (the spec with its
widths at 8), which reads and writes the method's own store with a byte a code (`store.Unpacked`). A query reads what
it would read while decoding (`attention.attend_streamed`), so that one pass gives the `streaming` protocol. Layers
below the first that differs from a plan kept before are not run again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.caches.base import Attends, CacheShape, CacheSpec, Chunk, LayerCache, ModelSizes
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.errors import KvjaxError
from kvjax.evaluate import vocabulary
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Layer, rms_norm
from kvjax.models.model import Model
from kvjax.models.rope import make_rope
from kvjax.ops import attention, store
from kvjax.ops.rotate import rotate_heads


@functools.cache
def levels_of(spec: CacheSpec, shape: CacheShape) -> Float[np.ndarray, "s"]:
    """2^b - 1 of every quantised stream that the spec stores."""
    cache = jax.eval_shape(lambda: spec.init(shape))
    return np.array([2**p.format.bits - 1 for p in _histories(cache)], np.float32)


def with_levels(cache: LayerCache, levels: Float[Array, "s"]) -> LayerCache:
    """The cache with its quantised streams unpacked and their widths as data."""
    left = iter(range(len(_histories(cache))))

    def convert(node):
        return store.unpacked(node, levels[next(left)]) if _is_quantised(node) else node

    return jax.tree.map(convert, cache, is_leaf=_is_quantised)


def _is_quantised(node: Any) -> bool:
    return isinstance(node, store.Packed) and node.format.bits != store.EXACT


def _histories(cache: Any) -> list[store.Packed]:
    return [node for node in jax.tree.leaves(cache, is_leaf=_is_quantised) if _is_quantised(node)]


@struct.dataclass
class Streamed:
    """An empty cache that a whole window is read through, as `streaming` would."""

    levels: Float[Array, "s"]
    form: CacheSpec = struct.field(pytree_node=False)
    shape: CacheShape = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], Streamed, Any]:
        k, v, positions, _, carry = self.materialize(chunk, carry)
        own = rotate_heads(chunk.k, chunk.rotation), chunk.v
        output = attention.attend_streamed(chunk.q, (k, v, positions), own, self.form.residual_length, chunk.window)
        return output, self, carry

    def materialize(self, chunk: Chunk, carry: Any):
        cache = with_levels(self.form.init(self.shape), self.levels)
        k, v, positions, _, carry = cache.materialize(dataclasses.replace(chunk, read="stored"), carry)
        return k, v, positions, self, carry


def run_layer(
    config: ModelConfig,
    layer: int,
    params: Any,
    h: Float[Array, "1 N D"],
    bases: Any,
    cache: Attends,
    carry: Any,
) -> tuple[Float[Array, "1 N D"], Any, Any]:
    """One layer over a whole window, through any cache: output, the cache after it, and the carry."""
    count = h.shape[1]
    positions = jnp.arange(count, dtype=jnp.int32)[None]
    rope = make_rope(config.rope, config.head_dim)
    module: Any = Layer(config, config.layer_window(layer))
    lengths = jnp.full((1,), count, jnp.int32)
    rotation = rope.table(positions, h.dtype)
    return module.apply({"params": params}, h, positions, lengths, rope, rotation, bases, cache, carry, "exact")


@functools.partial(jax.jit, static_argnames=("config", "layer", "form", "shape"))
def _step(config, layer, form, shape, params, h, carry, levels, bases):
    h, _, carry = run_layer(config, layer, params, h, bases, Streamed(levels, form, shape), carry)
    return h, carry


@functools.partial(jax.jit, static_argnames="eps")
def _final_norm(h: Array, weight: Array, eps: float) -> Array:
    return rms_norm(h, weight, eps)


_compare = jax.jit(vocabulary.compare)
_dense_run = jax.jit(vocabulary.dense_run)


@dataclasses.dataclass
class Trace:
    """A plan's inputs of every layer, and the output of the last, of one window."""

    plan: CachePlan
    h: list[Float[Array, "1 N D"]]
    carry: list[Any]

    def shared(self, plan: CachePlan) -> int:
        """Layers, from the first, whose inputs are the plan's too."""
        pairs = zip(self.plan.specs, plan.specs, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(plan.specs))


class Simulator:
    """Evaluates plans on the same windows.

    Attributes:
      layers_run: layers of a window that were run so far.
    """

    def __init__(self, model: Model, windows: Int[np.ndarray, "w n"]):
        """Raises KvjaxError where the windows are longer than the model was made for."""
        if windows.shape[1] > model.config.max_positions:
            raise KvjaxError(f"context={windows.shape[1]}; expected at most the model's {model.config.max_positions}")
        self.model, self.windows = model, windows
        self.shape = CacheShape.of(model.config, 1, windows.shape[1], model.dtype)
        self.layers_run = 0
        self.dense_plan = CachePlan.parse("dense", model.config)
        self._bases: dict[str, tuple[Any, ...]] = {"": ((),) * model.config.layers}
        self._kept: dict[CachePlan, list[Trace]] = {}
        self._dense: list[vocabulary.DenseRun] = []
        self.keep(self.dense_plan)

    @property
    def evaluations(self) -> float:
        """Evaluations of a whole plan on all windows that the layers run so far amount to."""
        return self.layers_run / (self.model.config.layers * len(self.windows))

    def keep(self, plan: CachePlan) -> list[Trace]:
        """Keeps the plan's inputs of every layer: plans that begin like it start from there."""
        if plan not in self._kept:
            self._kept[plan] = [self._trace(plan, w, True) for w in range(len(self.windows))]
        return self._kept[plan]

    def forget(self, plan: CachePlan) -> None:
        """Undoes `keep`."""
        if plan != self.dense_plan:
            self._kept.pop(plan, None)

    def score(self, plan: CachePlan) -> vocabulary.TokenScores:
        """Scores against the dense run, [w, N - 1] a field.

        Raises:
          KvjaxError: a layer's method does not allow whole windows, or the logits are not finite.
        """
        plan.require_whole_windows("a search")
        parts = [self._score(plan, w) for w in range(len(self.windows))]
        scores = jax.tree.map(lambda *a: np.stack([np.asarray(x, np.float64) for x in a]), *parts)
        if not np.isfinite([scores.nll, scores.kld]).all():
            raise KvjaxError(f"{plan}: the logits are not finite")
        return scores

    def dense(self, window: int) -> vocabulary.DenseRun:
        """The dense run of a window's scored tokens."""
        while len(self._dense) <= window:
            self._dense.append(_dense_run(*self._scored(self.dense_plan, len(self._dense)))[1])
        return self._dense[window]

    def bases(self, spec: CacheSpec) -> tuple[Any, ...]:
        """The spec's bases of every layer."""
        if spec.bases_key not in self._bases:
            plan = CachePlan((spec,) * self.model.config.layers, ModelSizes.of(self.model.config))
            self._bases[spec.bases_key] = load_bases(self.model, plan)
        return self._bases[spec.bases_key]

    def _score(self, plan: CachePlan, window: int) -> vocabulary.TokenScores:
        return _compare(*self._scored(plan, window), self.dense(window))

    def _scored(self, plan: CachePlan, window: int) -> tuple[Array, Array, Array]:
        """Final hidden states, the head and the targets of a window."""
        params, config = self.model.params, self.model.config
        hidden = _final_norm(self._trace(plan, window, False).h[-1], params["norm"], config.norm_eps)
        return hidden[0, :-1], self.model.head, jnp.asarray(self.windows[window, 1:], jnp.int32)

    def _trace(self, plan: CachePlan, window: int, whole: bool) -> Trace:
        """Runs a window; from where a kept plan leaves this one, with all inputs where `whole`, else the last."""
        config, params = self.model.config, self.model.params
        kept = (traces[window] for plan_kept, traces in self._kept.items() if self._carries_alike(plan_kept, plan))
        best = max(kept, key=lambda trace: trace.shared(plan), default=None)
        start = best.shared(plan) if best else 0
        if best and start:
            hs, carries = best.h[: start + 1], best.carry[: start + 1]
        else:
            hs = [params["embed"][jnp.asarray(self.windows[window : window + 1], jnp.int32)]]
            carries = [plan.init_carry(self.shape)]
        h, carry = hs[-1], carries[-1] or plan.init_carry(self.shape)
        for i in range(start, config.layers):
            spec = plan.specs[i]
            h, carry = _step(
                *(config, self.program(i), spec.program_form, self.shape),
                *(params[f"layer_{i}"], h, carry, levels_of(spec, self.shape), self.bases(spec)[i]),
            )
            self.layers_run += 1
            if whole:
                hs, carries = [*hs, h], [*carries, carry]
        return Trace(plan, hs if whole else [h], carries)

    def _carries_alike(self, a: CachePlan, b: CachePlan) -> bool:
        """Whether b may go on with what runs across a's layers."""
        here, there = (jax.eval_shape(lambda plan=plan: plan.init_carry(self.shape)) for plan in (a, b))
        return here in ((), there)

    def program(self, layer: int) -> int:
        """The first layer that differs from this one in its weights only."""
        config = self.model.config
        return next(i for i in range(layer + 1) if config.layer_window(i) == config.layer_window(layer))
