"""The cost of quantising one layer alone, per candidate: KVTuner's errors, and measures that predict quality better.

Everything is measured on a full-precision run, so that no error accumulates (KVTuner, section 4 and appendix B).

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
is then slightly too low, but has far less noise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kvjax.caches.base import CacheShape, CacheSpec, Chunk, ModelSizes, visible
from kvjax.caches.cross_layer import CrossLayerSpec
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.fisher import pull_head
from kvjax.errors import KvjaxError
from kvjax.mesh import fetch
from kvjax.models.decoder import run_layer
from kvjax.ops import attention
from kvjax.ops.rotate import rotate_heads
from kvjax.tuner.simulate import Simulator, Streamed, levels_of

TINY = 1e-8  # added to norms that are divided by
RELATIVE = "norms per token and head"  # what rows say of e_k, e_v and e_o
ERRORS = ("e_k", "e_v", "e_a", "e_o", "predicted")


def quantise_one(simulator: Simulator, layer: int, spec: CacheSpec) -> CachePlan:
    """Builds the plan with one layer quantised and the others exact.

    The exact layers are dense; for a cross-layer method they are the method's exact form.

    Args:
      simulator: the simulator, for its model.
      layer: the layer to quantise.
      spec: its cache.

    Returns:
      The plan.
    """
    specs = list(_exact(simulator, spec).specs)
    specs[layer] = spec
    return CachePlan(tuple(specs), ModelSizes.of(simulator.model.config))


def _exact(simulator: Simulator, spec: CacheSpec) -> CachePlan:
    """The full-precision plan that the spec is compared with."""
    if not isinstance(spec, CrossLayerSpec):
        return simulator.dense_plan
    return CachePlan.uniform(spec.exact, simulator.model.config)


def measured(simulator: Simulator, layer: int, spec: CacheSpec) -> float:
    """Measures the KL divergence from the dense run with one layer quantised.

    Args:
      simulator: evaluates the plan.
      layer: the layer to quantise.
      spec: its cache.

    Returns:
      Mean KL divergence in nats per token.
    """
    simulator.keep(_exact(simulator, spec))
    return float(simulator.score(quantise_one(simulator, layer, spec)).kld.mean())


def local_errors(
    simulator: Simulator, layer: int, specs: Sequence[CacheSpec], gradients: Sequence[Float[np.ndarray, "L S N H d"]]
) -> list[dict[str, float]]:
    """Computes the `ERRORS` of specs at one layer.

    Args:
      simulator: gives the windows and the full-precision runs.
      layer: the layer.
      specs: the caches to compare.
      gradients: gradients of every window, see the function `gradients`.

    Returns:
      Per spec, the errors by name, averaged over the windows.

    Raises:
      KvjaxError: the model has learned sinks.
    """
    _check_sinks(simulator)
    config, params = simulator.model.config, simulator.model.params[f"layer_{layer}"]
    found: dict[CacheSpec, dict[str, float]] = {}
    for form, group in itertools.groupby(
        sorted(specs, key=lambda s: str(s.program_form)), key=lambda s: s.program_form
    ):
        same = list(group)
        levels = jnp.stack([levels_of(spec, simulator.shape) for spec in same])
        parts = [
            _local_errors(
                *(
                    config,
                    simulator.program(layer),
                    form,
                    simulator.shape,
                    params,
                    trace.h[layer],
                    trace.carry[layer],
                ),
                *(levels, simulator.bases(form)[layer], g[layer]),
            )
            for trace, g in zip(simulator.keep(_exact(simulator, form)), gradients, strict=True)
        ]
        for i, spec in enumerate(same):
            found[spec] = {name: float(np.mean([float(fetch(part[name])[i]) for part in parts])) for name in ERRORS}
    return [found[spec] for spec in specs]


def _check_sinks(simulator: Simulator) -> None:
    """Raises KvjaxError for scores that join the softmax: the errors and gradients here are of keys alone."""
    if simulator.model.config.learned_sinks:
        name = simulator.model.name
        raise KvjaxError(f"{name} has learned sinks; expected a model without them, or errors measured by KL")


@functools.partial(jax.jit, static_argnames=("config", "layer", "form", "shape"))
def _local_errors(config, layer, form, shape, params, h, carry, levels, bases, g):
    return run_layer(config, layer, params, h, bases, _Probe(levels, g, form, shape), carry)[2]


@struct.dataclass
class _Probe:
    """A cache that returns the errors of C candidates of one form in place of the carry."""

    levels: Float[Array, "C s"]
    g: Float[Array, "S N H d"]
    form: CacheSpec = struct.field(pytree_node=False)
    shape: CacheShape = struct.field(pytree_node=False)

    def attend(self, chunk: Chunk, carry: Any):
        dtype = jnp.promote_types(chunk.q.dtype, jnp.float32)
        own = rotate_heads(chunk.k, chunk.rotation).astype(dtype), chunk.v.astype(dtype)
        exact = attention.attend_streamed(chunk.q, (*own, chunk.positions), own, 0, chunk.window)
        a, o = _late_attention(chunk, *own)
        seen = visible(chunk, chunk.positions)[:, chunk.q.shape[1] // 2 :].sum() * chunk.q.shape[2]

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
                "e_k": relative_error(own[0][0], k),
                "e_v": relative_error(own[1][0], v),
                "e_a": jnp.abs(a - a_hat).sum() / seen,
                "e_o": relative_error(o, o_hat),
                "predicted": 0.5 * (moved**2).sum(1).mean() / (moved.shape[1] - 1),
            }

        return jnp.zeros_like(chunk.q), self, jax.lax.map(candidate, self.levels)


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


def relative_error(exact: Float[Array, "*tokens H d"], other: Float[Array, "*tokens H d"]) -> Float[Array, ""]:
    """The norm of the error over the norm of the exact vector, averaged over tokens and heads."""
    error, size = jnp.linalg.norm(exact - other, axis=-1), jnp.linalg.norm(exact, axis=-1)
    return jnp.mean(error / (size + TINY))


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
