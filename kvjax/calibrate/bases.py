"""What methods compute once per model (SVD bases): made in float64 on first use, kept beside fetched models."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kvjax.caches.base import CacheSpec, KVWeights
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.orbax import new_folder, write_arrays
from kvjax.downloads import cache_folder
from kvjax.errors import KvjaxError
from kvjax.files import brief, check_digests, digests, read_json, write_json
from kvjax.models.model import Model

METADATA = "bases.json"


def load_bases(model: Model, plan: CachePlan) -> tuple[Any, ...]:
    """The bases of every layer, in the model's dtype: an argument of `Decoder`, never a constant of a program.

    They are read from $KVJAX_CACHE/bases, where the checksum of the weights that they belong to names them.

    Raises:
      KvjaxError: the files there are of other weights, or damaged, or cannot be written.
    """
    specs = {spec.bases_key: spec for spec in plan.specs if spec.bases_key}
    if not specs:
        return ((),) * model.config.layers
    layers = [_layer(model, i) for i in range(model.config.layers)]
    digest = _digest(layers)
    found = {key: _found(digest, key) or _made(layers, digest, spec) for key, spec in specs.items()}
    cast = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, model.dtype))
    return tuple(cast(found[s.bases_key][i]) if s.bases_key else () for i, s in enumerate(plan.specs))


def folder_of(digest: str, key: str) -> Path:
    """Where the bases of these weights are kept."""
    return cache_folder() / "bases" / f"{digest[:16]}-{key}"


def _layer(model: Model, i: int) -> tuple[KVWeights, jax.Array]:
    params, config = model.params[f"layer_{i}"], model.config
    weights = KVWeights(params["k"], params["v"], norm_eps=config.norm_eps, head_dim=config.head_dim)
    return weights, params["attention_norm"]


def _digest(layers: list[tuple[KVWeights, jax.Array]]) -> str:
    digest = hashlib.sha256()
    for weights, norm in layers:
        for array in (weights.k, weights.v, norm):
            digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def _made(layers: list[tuple[KVWeights, jax.Array]], digest: str, spec: CacheSpec) -> list[Any]:
    folder = folder_of(digest, spec.bases_key)
    print(f"kvjax: computing bases of {len(layers)} layers ({spec.bases_key}), once, for {folder}", file=sys.stderr)
    trees = [spec.bases(weights, norm) for weights, norm in layers]
    with new_folder(folder) as part:
        write_arrays(part / "arrays", trees)
        write_json(part / METADATA, {"weights": digest, "key": spec.bases_key, "arrays": digests(part / "arrays")})
    return trees


def _found(digest: str, key: str) -> list[Any] | None:
    folder = folder_of(digest, key)
    if not folder.exists():
        return None
    metadata = read_json(folder / METADATA)
    if metadata.get("weights") != digest or metadata.get("key") != key:
        raise KvjaxError(f"{folder} holds bases of other weights; expected those of sha256 {digest}: remove it")
    check_digests(folder / "arrays", metadata.get("arrays"))
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "arrays")
    except Exception as error:  # Orbax and its storage raise many kinds
        raise KvjaxError(f"{folder} cannot be restored: {brief(error)}; remove it") from None
