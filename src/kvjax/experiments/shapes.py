"""What programs take, without arrays: they are compiled, and their memory is known, before any weights are read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh

from kvjax import mesh
from kvjax.caches.base import CacheShape, CacheSpec, KVWeights
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.generation.decode import decode_steps, start
from kvjax.generation.sampling import Sampling
from kvjax.generation.states import Held
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.params import Params, param_shapes

NEW = 64  # tokens that the decode loop has room for


def arguments(model: ModelConfig, plan: CachePlan, max_len: int, dtype: Any) -> tuple[Params, Any, Held]:
    """What programs take of one sequence: parameters, bases, and a state of `max_len` tokens.

    Raises:
      KvjaxError: a layer's cache learns from a text.
    """
    shaped: Any = jax.ShapeDtypeStruct
    params = unflatten_dict({path: shaped(size, dtype) for path, size in param_shapes(model).items()})
    bases = tuple(jax.tree.map(lambda a: shaped(a.shape, dtype), _bases(spec, model)) for spec in plan.specs)
    cache = plan.init_shapes(CacheShape.of(model, 1, max_len, dtype))
    return params, bases, Held(cache, shaped((1, model.model_dim), dtype))


def lower_decode_loop(model: ModelConfig, plan: CachePlan, max_len: int, dtype: Any) -> Any:
    """The greedy decode loop of one sequence, traced and ready to compile. Raises what `arguments` raises."""
    params, bases, held = arguments(model, plan, max_len, dtype)
    run = jax.eval_shape(functools.partial(start, room=NEW), held)
    sampling, stop = Sampling.of(0.0, None, None, 0, 1, model.vocab_size), jnp.zeros(1, jnp.int32)
    return decode_steps.lower(Decoder(model), params, bases, run, sampling, stop, NEW, NEW)


def part_nbytes(
    plan: CachePlan, batch: int, tokens: int, dtype: Any, places: AbstractMesh, whole: Sequence[str]
) -> int:
    """Bytes of a cache that each device of a mesh holds; `whole` names logical axes that are not divided."""
    shape = dataclasses.replace(plan.shape(batch, tokens, dtype), parts=mesh.parts(places, "tokens", whole))
    return plan.part_nbytes(shape, places, tuple(whole))


@functools.cache
def _bases(spec: CacheSpec, model: ModelConfig) -> Any:
    """What a spec computes once per model, of weights that are zero: only its sizes count here."""
    if not spec.bases_key:
        return ()
    if spec.calibrated:
        raise KvjaxError(f"{spec} learns from a text; expected methods that need none, because no weights are read")
    zeros: Any = np.zeros((model.kv_heads * model.head_dim, model.model_dim), np.float32)
    ones: Any = np.ones(model.model_dim)
    weights = KVWeights(zeros, zeros, norm_eps=model.norm_eps, head_dim=model.head_dim)
    return spec.bases(weights, ones)
