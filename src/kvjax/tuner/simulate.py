"""Fast evaluation of plans for a search: code widths are data, so that programs are compiled once for all plans.

A window goes through the model layer by layer. All specs that differ only in their widths share one program, that of
their form (the spec with its widths at 8). It reads and writes the method's own store with one byte per code
(`store.UnpackedStore`). A query reads what it would read while decoding (`attention.attend_streamed`), so that one
pass gives the `streaming` protocol. The lowest layers are not run again where a plan kept before has the same ones.
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

from kvjax.caches import cross_layer
from kvjax.caches.base import CacheShape, CacheSpec, Chunk, LayerCache, ModelSizes
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.errors import KvjaxError
from kvjax.evaluate import vocabulary
from kvjax.mesh import fetch
from kvjax.models.decoder import embed, final_states, first_alike, run_layer
from kvjax.models.model import Model
from kvjax.ops import attention, store
from kvjax.ops.rotate import rotate_heads


@functools.cache
def levels_of(spec: CacheSpec, shape: CacheShape) -> Float[np.ndarray, "s"]:
    """Lists the largest code, 2^b - 1, of every quantised tensor that a spec stores.

    Args:
      spec: the cache of a layer.
      shape: sizes of the cache.

    Returns:
      The largest codes, as float32.
    """
    cache = jax.eval_shape(lambda: spec.init(shape))
    return np.array([2**p.format.bits - 1 for p in _histories(cache)], np.float32)


def with_levels(cache: LayerCache, levels: Float[Array, "s"]) -> LayerCache:
    """Unpacks the quantised tensors of a cache and makes their widths data.

    Args:
      cache: the cache.
      levels: largest code of every quantised tensor, see `levels_of`.

    Returns:
      The cache with `store.UnpackedStore` in place of `store.PackedStore`.
    """
    left = iter(range(len(_histories(cache))))

    def convert(node):
        return store.unpacked(node, levels[next(left)]) if _is_quantised(node) else node

    return jax.tree.map(convert, cache, is_leaf=_is_quantised)


def _is_quantised(node: Any) -> bool:
    return isinstance(node, store.PackedStore) and node.format.bits != store.EXACT


def _histories(cache: Any) -> list[store.PackedStore]:
    return [node for node in jax.tree.leaves(cache, is_leaf=_is_quantised) if _is_quantised(node)]


@struct.dataclass
class Streamed:
    """An empty cache through which a whole window is read in one pass, with the result of `streaming`."""

    levels: Float[Array, "s"]
    form: CacheSpec = struct.field(pytree_node=False)
    shape: CacheShape = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any) -> tuple[Float[Array, "B T H d"], Streamed, Any]:
        k, v, positions, _, carry = self.materialize(chunk, carry)
        own = rotate_heads(chunk.k, chunk.rotation), chunk.v
        r, sinks = self.form.residual_length, chunk.learned_sinks
        output = attention.attend_streamed(chunk.q, (k, v, positions), own, r, chunk.window, sinks)
        return output, self, carry

    def materialize(self, chunk: Chunk, carry: Any):
        cache = with_levels(self.form.init(self.shape), self.levels)
        k, v, positions, _, carry = cache.materialize(dataclasses.replace(chunk, read="stored"), carry)
        return k, v, positions, self, carry


@functools.partial(jax.jit, static_argnames=("config", "layer", "form", "shape"))
def _step(config, layer, form, shape, params, h, carry, levels, bases):
    h, _, carry = run_layer(config, layer, params, h, bases, Streamed(levels, form, shape), carry)
    return h, carry


@functools.partial(jax.jit, static_argnames=("config", "layer", "form", "shape"))
def _hand_on(config, layer, form, shape, params, h, carry, levels, bases):
    return run_layer(config, layer, params, h, bases, Streamed(levels, form, shape), carry)[2]


_final_states = jax.jit(final_states, static_argnums=0)


@dataclasses.dataclass
class Trace:
    """The inputs of every layer, and the output of the last, for one window under a plan."""

    plan: CachePlan
    h: list[Float[Array, "1 N D"]]
    carry: list[Any]

    def shared(self, plan: CachePlan) -> int:
        """Counts the lowest layers that another plan has in common with this one."""
        pairs = zip(self.plan.specs, plan.specs, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(plan.specs))


class Simulator:
    """Evaluates plans on the same windows.

    Attributes:
      layers_run: how many layers were run so far, over all windows.
    """

    def __init__(self, model: Model, windows: Int[np.ndarray, "w n"]):
        """Runs the dense plan and keeps it.

        Args:
          model: the model.
          windows: token ids of w windows of n tokens.

        Raises:
          KvjaxError: the windows are longer than the model's `max_positions`.
        """
        if windows.shape[1] > model.config.max_positions:
            raise KvjaxError(f"context={windows.shape[1]}; expected at most the model's {model.config.max_positions}")
        self.model, self.windows = model, windows
        self.shape = model.cache_shape(1, windows.shape[1])
        self.layers_run = 0
        self.dense_plan = CachePlan.parse("dense", model.config)
        self._bases: dict[str, tuple[Any, ...]] = {"": ((),) * model.config.layers}
        self._kept: dict[CachePlan, list[Trace]] = {}
        self._dense: list[vocabulary.DenseRun] = []
        self.keep(self.dense_plan)

    @property
    def evaluations(self) -> float:
        """The work so far, in evaluations of a whole plan on all windows."""
        return self.layers_run / (self.model.config.layers * len(self.windows))

    def keep(self, plan: CachePlan) -> list[Trace]:
        """Keeps the inputs of every layer under a plan, for plans that have the same lowest layers.

        Args:
          plan: the plan.

        Returns:
          A trace per window.
        """
        if plan not in self._kept:
            with self.model.layout.entered():
                self._kept[plan] = [self._trace(plan, w, True) for w in range(len(self.windows))]
        return self._kept[plan]

    def forget(self, plan: CachePlan) -> None:
        """Frees what `keep` kept of a plan; the dense plan stays."""
        if plan != self.dense_plan:
            self._kept.pop(plan, None)

    def handed_on(self, layer: int, spec: CacheSpec, h: Float[Array, "1 N D"], carry: Any) -> Any:
        """The carry that a layer with this spec leaves for the next, of its input and the carry that enters it."""
        with self.model.layout.entered():
            return _hand_on(*self._arguments(layer, spec, h, carry or self.empty_carry(spec)))

    def empty_carry(self, spec: CacheSpec) -> Any:
        """What enters the first layer of a spec's own."""
        return next(iter(cross_layer.init_carries([spec], self.shape)), ())

    def score(self, plan: CachePlan, start: list[Trace] | None = None) -> vocabulary.TokenScores:
        """Scores a plan against the dense run.

        Args:
          plan: the plan.
          start: a trace per window, from which the plan goes on where it differs; None: the best of those kept.

        Returns:
          Scores of shape [w, n - 1] per field.

        Raises:
          KvjaxError: a layer's method does not allow whole windows, or the logits are not finite.
        """
        plan.require_whole_windows("a search")
        with self.model.layout.entered():
            parts = [self._score(plan, w, start[w] if start else None) for w in range(len(self.windows))]
        scores = jax.tree.map(lambda *a: np.stack([fetch(x).astype(np.float64) for x in a]), *parts)
        if not np.isfinite([scores.nll, scores.kld]).all():
            raise KvjaxError(f"{plan}: the logits are not finite")
        return scores

    def dense(self, window: int) -> vocabulary.DenseRun:
        """Returns the dense run of the tokens of a window that are scored."""
        with self.model.layout.entered():
            while len(self._dense) <= window:
                self._dense.append(vocabulary.dense_run(*self._scored(self.dense_plan, len(self._dense)))[1])
        return self._dense[window]

    def bases(self, spec: CacheSpec) -> tuple[Any, ...]:
        """Returns the bases of a spec for every layer."""
        if spec.bases_key not in self._bases:
            plan = CachePlan((spec,) * self.model.config.layers, ModelSizes.of(self.model.config))
            self._bases[spec.bases_key] = load_bases(self.model, plan)
        return self._bases[spec.bases_key]

    def _score(self, plan: CachePlan, window: int, start: Trace | None) -> vocabulary.TokenScores:
        return vocabulary.compare(*self._scored(plan, window, start), self.dense(window))

    def _scored(self, plan: CachePlan, window: int, start: Trace | None = None) -> tuple[Array, Array, Array]:
        """Returns final hidden states, the head and the targets of a window."""
        params, config = self.model.params, self.model.config
        hidden = _final_states(config, params["norm"], self._trace(plan, window, False, start).h[-1])
        return hidden[0, :-1], self.model.head, jnp.asarray(self.windows[window, 1:], jnp.int32)

    def _trace(self, plan: CachePlan, window: int, whole: bool, start: Trace | None = None) -> Trace:
        """Runs a window, starting at the first layer in which the plan differs from a trace.

        With `whole` the trace has the inputs of all layers, otherwise only the output of the last.
        """
        config, params = self.model.config, self.model.params
        best = start or self._best_kept(plan, window)
        first = best.shared(plan) if best else 0
        if best and first:
            hs, carries = best.h[: first + 1], best.carry[: first + 1]
        else:
            hs = [embed(config, params["embed"], jnp.asarray(self.windows[window : window + 1], jnp.int32))]
            carries = [plan.init_carry(self.shape)]
        h, carry = hs[-1], carries[-1] or plan.init_carry(self.shape)
        for i in range(first, config.layers):
            h, carry = _step(*self._arguments(i, plan.specs[i], h, carry))
            self.layers_run += 1
            if whole:
                hs, carries = [*hs, h], [*carries, carry]
        return Trace(plan, hs if whole else [h], carries)

    def _best_kept(self, plan: CachePlan, window: int) -> Trace | None:
        """Of the kept traces that the plan can go on from, the one that shares most layers with it."""
        kept = (traces[window] for plan_kept, traces in self._kept.items() if self._carries_alike(plan_kept, plan))
        return max(kept, key=lambda trace: trace.shared(plan), default=None)

    def _arguments(self, layer: int, spec: CacheSpec, h: Float[Array, "1 N D"], carry: Any) -> tuple[Any, ...]:
        """Of `_step`."""
        statics = self.model.config, self.program(layer), spec.program_form, self.shape
        return (
            *statics,
            self.model.params[f"layer_{layer}"],
            h,
            carry,
            levels_of(spec, self.shape),
            self.bases(spec)[layer],
        )

    def _carries_alike(self, a: CachePlan, b: CachePlan) -> bool:
        """Whether plan b can continue from the carry of plan a."""
        here, there = (jax.eval_shape(lambda plan=plan: plan.init_carry(self.shape)) for plan in (a, b))
        return here in ((), there)

    def program(self, layer: int) -> int:
        """Returns the first layer that differs from this one only in weights, so that the two share a program."""
        return first_alike(self.model.config, layer)
