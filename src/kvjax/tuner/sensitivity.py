"""The cost of quantising one layer alone, per candidate: KVTuner's errors, and measures that predict quality better.

Everything is measured on a full-precision run, so that no error accumulates (KVTuner, section 4 and appendix B); or
around a plan, on the layer inputs that it leads to. A delta of XQuant-CL is taken from what the layer below left,
which is not exact: its error is measured for every spec that may be below it (`carries`).

    e_k = mean ‖k - k̂‖ / ‖k‖    e_v likewise    e_a = mean |a - â|    e_o = mean ‖o - ô‖ / ‖o‖

with â = softmax(q K̂ᵀ / √d) and ô = â V̂. The norms are Euclidean, over the head_dim values of one head and token; the
means are over tokens and heads. Every key and value is read as stored. The queries are those of the decoding phase,
which is here the second half of a window. `kld` is the KL divergence of the whole model with this layer quantised.

KVTuner's equations divide element by element, |o - ô| / |o|. That mean does not exist for values whose density is
positive at 0 (it grows with the logarithm of the sample, so a few elements near 0 decide it). A ratio of norms has a
mean, ranks layers better, and has the magnitudes of the paper's Table 9.

`predicted` estimates `kld` for all layers and candidates from one backward pass. Let g be the gradient of
Σ_t log p(y_t) with respect to the layer's attention output, with y_t drawn from the predictions of the dense run, and
let δ be the change of that output by quantisation under `streaming`. Then KL ≈ ½ E Σ_t (g_t·δ_t)² / N, because the
Fisher information is the curvature of KL. Cross terms between the δ of different tokens are left out: the estimate
is then too low, since queries share the errors of what they read, but has far less noise. `joint` has these terms:
its mean over many layers and candidates says by how much.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, Chunk, ModelSizes, visible
from kvjax.caches.cross_layer import CrossLayerSpec, Place
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.fisher import pull_head
from kvjax.errors import KvjaxError
from kvjax.mesh import fetch
from kvjax.models.decoder import run_layer
from kvjax.ops import attention
from kvjax.ops.rotate import rotate_heads
from kvjax.tuner.simulate import Simulator, Streamed, Trace, levels_of

TINY = 1e-8  # added to norms that are divided by
AT_ONCE = 16  # candidates of one form that one call compares
RELATIVE = "norms per token and head"  # what rows say of e_k, e_v and e_o
ERRORS = ("e_k", "e_v", "e_a", "e_o", "predicted", "joint")

Carries = dict[CacheSpec | None, list[Any]]
"""Of every window, the carry that a spec at the layer below leaves."""


def quantise_one(simulator: Simulator, layer: int, spec: CacheSpec) -> CachePlan:
    """Builds the plan with one layer quantised and the others dense.

    Args:
      simulator: the simulator, for its model.
      layer: the layer to quantise.
      spec: its cache.

    Returns:
      The plan.
    """
    specs = list(simulator.dense_plan.specs)
    specs[layer] = spec
    return CachePlan(tuple(specs), ModelSizes.of(simulator.model.config))


def carries(simulator: Simulator, plan: CachePlan, belows: Sequence[Iterable[CacheSpec]]) -> Iterator[Carries]:
    """Computes what specs leave for the layer above them while layer inputs stay those of a plan.

    Around the dense plan, such a spec stands on a run of its own that begins at the first layer, so that its carry is
    typical of it. Around another plan, it stands on that plan's layers.

    Args:
      simulator: gives the plan's trace.
      plan: what errors are measured around.
      belows: per layer, the specs that may be below it.

    Yields:
      The carries that enter every layer, one layer after the other.
    """
    traces, found = simulator.keep(plan), Carries()
    alone = plan == simulator.dense_plan
    everywhere = list(dict.fromkeys(itertools.chain(*belows)))
    for layer, some in enumerate(belows):
        before = found if alone else {}
        found = {}
        for below in (everywhere if alone else some) if layer else ():
            entering = before.get(below) or [trace.carry[layer - 1] for trace in traces]
            pairs = zip(traces, entering, strict=True)
            found[below] = [
                simulator.handed_on(layer - 1, below, trace.h[layer - 1], carry) for trace, carry in pairs
            ]
        yield found


def measured(simulator: Simulator, layer: int, place: Place, entering: Carries) -> float:
    """Measures the KL divergence from the dense run with one layer quantised.

    Args:
      simulator: evaluates the plan.
      layer: the layer to quantise.
      place: its cache.
      entering: the layer's, of `carries` around the dense plan.

    Returns:
      Mean KL divergence in nats per token.
    """
    start = None
    if place.below and layer:
        start = [
            dataclasses.replace(trace, carry=[*trace.carry[:layer], carry])
            for trace, carry in zip(simulator.keep(simulator.dense_plan), entering[place.below], strict=True)
        ]
    return float(simulator.score(quantise_one(simulator, layer, place.spec), start).kld.mean())


def local_errors(
    simulator: Simulator,
    layer: int,
    places: Sequence[Place],
    traces: Sequence[Trace],
    entering: Carries,
    gradients: Sequence[Float[np.ndarray, "L S N H d"]],
) -> list[dict[str, float]]:
    """Computes the `ERRORS` of what may be at one layer.

    Args:
      simulator: for its model.
      layer: the layer.
      places: the caches to compare.
      traces: of every window, the run that errors are measured around.
      entering: the layer's, of `carries` around the same run.
      gradients: gradients of every window, see the function `gradients`.

    Returns:
      Per place, the errors by name, averaged over the windows.

    Raises:
      KvjaxError: the model has learned sinks.
    """
    found = _errors(simulator, layer, places, traces, entering, gradients)
    return [{name: float(errors[name].mean()) for name in ERRORS} for errors in found]


def head_errors(simulator: Simulator, layer: int, specs: Sequence[CacheSpec]) -> list[dict[str, np.ndarray]]:
    """Computes the errors of specs at one layer of the full-precision run, head by head.

    Args:
      simulator: gives the windows and the full-precision runs.
      layer: the layer.
      specs: the caches to compare.

    Returns:
      Per spec, averaged over the windows: e_k and e_v of each kv head, e_a and e_o of each query head; and
      `largest_weight`, the largest attention weight of a query without quantisation, averaged over queries.

    Raises:
      KvjaxError: the model has learned sinks, or a spec stores a difference from the layer below.
    """
    if deltas := [spec for spec in specs if isinstance(spec, CrossLayerSpec) and spec.delta]:
        raise KvjaxError(f"{deltas[0]} stores a difference from the layer below; expected caches of a layer's own")
    config, (windows, tokens) = simulator.model.config, simulator.windows.shape
    nothing = np.zeros((config.layers, 0, tokens, config.heads, config.head_dim), simulator.model.dtype)
    traces, places = simulator.keep(simulator.dense_plan), [Place.of(spec, None) for spec in specs]
    found = _errors(simulator, layer, places, traces, {}, [nothing] * windows)
    of_heads = lambda name: name not in ("predicted", "joint")  # noqa: E731
    return [{name: each for name, each in errors.items() if of_heads(name)} for errors in found]


def _errors(
    simulator: Simulator,
    layer: int,
    places: Sequence[Place],
    traces: Sequence[Trace],
    entering: Carries,
    gradients: Sequence[Float[np.ndarray, "L S N H d"]],
) -> list[dict[str, np.ndarray]]:
    """Per place, what `_Probe` finds, averaged over the windows."""
    _check_sinks(simulator)
    found: dict[Place, dict[str, np.ndarray]] = {}
    alike: dict[Any, list[Place]] = {}  # one call each: of a program and its bases, on one carry
    for place in places:
        alike.setdefault((place.spec.program_form, place.spec.bases_key, place.below), []).append(place)
    for (form, _, below), group in alike.items():
        for some in (group[i : i + AT_ONCE] for i in range(0, len(group), AT_ONCE)):
            own = entering.get(below) or [trace.carry[layer] for trace in traces]
            windows = zip(traces, own, gradients, strict=True)
            parts = [_errors_of(simulator, layer, form, some, trace.h[layer], *rest) for trace, *rest in windows]
            for i, place in enumerate(some):
                found[place] = {name: np.mean([part[name][i] for part in parts], 0) for name in parts[0]}
    return [found[place] for place in places]


def _errors_of(
    simulator: Simulator,
    layer: int,
    form: CacheSpec,
    places: Sequence[Place],
    h: Float[Array, "1 N D"],
    carry: Any,
    g: Float[np.ndarray, "L S N H d"],
) -> dict[str, np.ndarray]:
    """Of at most `AT_ONCE` places of one form in one window."""
    levels = np.stack([levels_of(place.spec, simulator.shape) for place in places])
    levels = np.pad(levels, ((0, AT_ONCE - len(places)), (0, 0)))
    found = _local_errors(
        *(simulator.model.config, simulator.program(layer), form, simulator.shape),
        *(simulator.model.params[f"layer_{layer}"], h, carry or simulator.empty_carry(form)),
        *(levels, len(places), simulator.bases(places[0].spec)[layer], g[layer]),
    )
    return jax.tree.map(fetch, found)


def _check_sinks(simulator: Simulator) -> None:
    """Raises KvjaxError for scores that join the softmax: the errors and gradients here are of keys alone."""
    if simulator.model.config.learned_sinks:
        name = simulator.model.name
        raise KvjaxError(f"{name} has learned sinks; expected a model without them, or errors measured by KL")


@functools.partial(jax.jit, static_argnames=("config", "layer", "form", "shape"))
def _local_errors(config, layer, form, shape, params, h, carry, levels, count, bases, g):
    return run_layer(config, layer, params, h, bases, _Probe(levels, count, g, form, shape), carry)[2]


@struct.dataclass
class _Probe:
    """A cache that returns the errors of C candidates of one form, head by head, in place of the carry."""

    levels: Float[Array, "C s"]
    count: Int[Array, ""]  # how many of the C there are
    g: Float[Array, "S N H d"]
    form: CacheSpec = struct.field(pytree_node=False)
    shape: CacheShape = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any):
        dtype = jnp.promote_types(chunk.q.dtype, jnp.float32)
        own = rotate_heads(chunk.k, chunk.rotation).astype(dtype), chunk.v.astype(dtype)
        exact = attention.attend_streamed(chunk.q, (*own, chunk.positions), own, 0, chunk.window)
        a, o = _late_attention(chunk, *own)
        seen = visible(chunk, chunk.positions)[:, chunk.q.shape[1] // 2 :].sum()

        def candidate(levels):
            cache = Streamed(levels, self.form, self.shape)
            k, v, positions, _, _ = cache.materialize(chunk, carry)
            streamed = attention.attend_streamed(
                chunk.q, (k, v, positions), own, self.form.residual_length, chunk.window
            )
            moved = jnp.einsum("snhd,nhd->sn", self.g, (streamed - exact)[0])
            k, v = (_by_position(x[0], positions[0], self.shape.max_len) for x in (k, v))
            a_hat, o_hat = _late_attention(chunk, k[None], v[None])
            return {
                "e_k": relative_errors(own[0][0], k),
                "e_v": relative_errors(own[1][0], v),
                "e_a": jnp.abs(a - a_hat).sum((0, 2, 3)) / seen,
                "e_o": relative_errors(o[0], o_hat[0]),
                "largest_weight": a.max(-1).mean((0, 2)),
                "predicted": 0.5 * (moved**2).sum(1).mean() / (moved.shape[1] - 1),
                "joint": 0.5 * (moved.sum(1) ** 2).mean() / (moved.shape[1] - 1),
            }

        def add(i, found):
            return jax.tree.map(lambda all, one: all.at[i].set(one), found, candidate(self.levels[i]))

        one = jax.eval_shape(candidate, self.levels[0])
        found = jax.tree.map(lambda a: jnp.zeros((len(self.levels), *a.shape), a.dtype), one)
        return jnp.zeros_like(chunk.q), self, jax.lax.fori_loop(0, self.count, add, found)


def _by_position(x: Float[Array, "n K d"], positions: Int[Array, "n"], tokens: int) -> Float[Array, "N K d"]:
    at = jnp.where(positions < 0, tokens, positions)
    return jnp.zeros((tokens, *x.shape[1:]), x.dtype).at[at].set(x, mode="drop")


def _late_attention(
    chunk: Chunk, k: Float[Array, "1 N K d"], v: Float[Array, "1 N K d"]
) -> tuple[Float[Array, "1 H T N"], Float[Array, "1 T H d"]]:
    """Attention weights and outputs of the queries in the second half of the window."""
    late = chunk.q.shape[1] // 2
    mask: Bool[Array, "1 T N"] = visible(chunk, chunk.positions)[:, late:]
    k, v = (jnp.repeat(a, chunk.q.shape[2] // a.shape[2], 2) for a in (k, v))
    scores = jnp.einsum("bthd,bnhd->bhtn", chunk.q[:, late:].astype(k.dtype), k) * k.shape[-1] ** -0.5
    a = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return a, jnp.einsum("bhtn,bnhd->bthd", a, v)


def relative_errors(exact: Float[Array, "N H d"], other: Float[Array, "N H d"]) -> Float[Array, "H"]:
    """The norm of the error over the norm of the exact vector, averaged over tokens."""
    error, size = jnp.linalg.norm(exact - other, axis=-1), jnp.linalg.norm(exact, axis=-1)
    return jnp.mean(error / (size + TINY), 0)


# ---- gradients


@struct.dataclass
class _Moved:
    """A cache with exact attention that adds `by` to the output, so that gradients with respect to `by` exist.

    It does not use `attend_streamed`, which has no gradient.
    """

    by: Float[Array, "1 N H d"]

    def attend(self, chunk: Chunk, carry: Any):
        k, v, window = rotate_heads(chunk.k, chunk.rotation), chunk.v, chunk.window
        reach = None if window is None else (window - 1, 0)
        output = jax.nn.dot_product_attention(chunk.q, k, v, is_causal=True, local_window_size=reach)
        return output + self.by, self, carry


def gradients(simulator: Simulator, window: int, samples: int, seed: int) -> Float[np.ndarray, "L S N H d"]:
    """Computes gradients of sum_t log p(y_t) with respect to the attention output of every layer.

    Args:
      simulator: gives the dense run.
      window: index of the window.
      samples: how many times S all y_t are drawn.
      seed: seed of the draws.

    Returns:
      The gradients, for L layers and N tokens.

    Raises:
      KvjaxError: the model has learned sinks.
    """
    _check_sinks(simulator)
    config, params = simulator.model.config, simulator.model.params
    trace = simulator.keep(simulator.dense_plan)[window]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), window), samples)
    g = pull_head(config, simulator.model.head, params["norm"], trace.h[-1], keys)
    found = []
    for layer in reversed(range(config.layers)):
        g, moved = _pull_layer(config, simulator.program(layer), params[f"layer_{layer}"], trace.h[layer], g)
        found.append(fetch(moved))
    return np.stack(found[::-1])


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _pull_layer(config, layer, params, h, g):
    def forward(h, by):
        return run_layer(config, layer, params, h, (), _Moved(by), ())[0]

    zeros = jnp.zeros((*h.shape[:2], config.heads, config.head_dim), h.dtype)
    _, pull = jax.vjp(forward, h, zeros)
    below, moved = jax.vmap(pull)(g)
    return below, moved[:, 0]
