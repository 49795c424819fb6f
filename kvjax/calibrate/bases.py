"""What methods compute once per model (SVD bases): made in float64 on first use, kept beside fetched models."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from kvjax.caches.base import CacheSpec, KVWeights
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.orbax import new_folder, write_arrays
from kvjax.downloads import cache_folder
from kvjax.errors import KvjaxError
from kvjax.files import brief, check_digests, digests, read_json, write_json
from kvjax.mesh import WHOLE, fetch
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
    folders = {key: _found(digest, key) or _made(layers, digest, spec) for key, spec in specs.items()}
    place = lambda a: model.layout.build(a.shape, model.dtype, WHOLE, a.__getitem__)  # noqa: E731
    with ocp.PyTreeCheckpointer() as checkpointer:
        return tuple(
            jax.tree.map(place, _read(checkpointer, folders[s.bases_key], i)) if s.bases_key else ()
            for i, s in enumerate(plan.specs)
        )


def folder_of(digest: str, key: str) -> Path:
    """Where the bases of these weights are kept."""
    return cache_folder() / "bases" / f"{digest[:16]}-{key}-by-layer"


def _layer(model: Model, i: int) -> tuple[KVWeights, jax.Array]:
    params, config = model.params[f"layer_{i}"], model.config
    weights = KVWeights(params["k"], params["v"], norm_eps=config.norm_eps, head_dim=config.head_dim)
    return weights, params.get("attention_norm", jnp.ones(config.model_dim, model.dtype))


def _digest(layers: list[tuple[KVWeights, jax.Array]]) -> str:
    digest = hashlib.sha256()
    for weights, norm in layers:
        for array in (weights.k, weights.v, norm):
            digest.update(fetch(array).tobytes())
    return digest.hexdigest()


def _made(layers: list[tuple[KVWeights, jax.Array]], digest: str, spec: CacheSpec) -> Path:
    """Computes the bases and writes them, a layer at a time: in float64 all layers' are as large as their weights."""
    folder = folder_of(digest, spec.bases_key)
    print(f"kvjax: computing bases of {len(layers)} layers ({spec.bases_key}), once, for {folder}", file=sys.stderr)
    try:
        with new_folder(folder) as part:
            for i, (weights, norm) in enumerate(layers):
                write_arrays(part / "arrays" / str(i), spec.bases(weights, norm))
            write_json(
                part / METADATA, {"weights": digest, "key": spec.bases_key, "arrays": digests(part / "arrays")}
            )
    except KvjaxError:
        if not folder.exists():
            raise
        return _found(digest, spec.bases_key) or folder  # another program has made them meanwhile
    return folder


def _found(digest: str, key: str) -> Path | None:
    folder = folder_of(digest, key)
    if not folder.exists():
        return None
    metadata = read_json(folder / METADATA)
    if metadata.get("weights") != digest or metadata.get("key") != key:
        raise KvjaxError(f"{folder} holds bases of other weights; expected those of sha256 {digest}: remove it")
    check_digests(folder / "arrays", metadata.get("arrays"))
    return folder


def _read(checkpointer: ocp.PyTreeCheckpointer, folder: Path, layer: int) -> Any:
    try:
        return checkpointer.restore(folder / "arrays" / str(layer))
    except Exception as error:  # Orbax and its storage raise many kinds
        raise KvjaxError(f"{folder} cannot be restored: {brief(error)}; remove it") from None
