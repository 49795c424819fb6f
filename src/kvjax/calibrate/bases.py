"""What methods compute once per model (SVD bases): made in float64 on first use, kept beside fetched models."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from kvjax import hosts
from kvjax.caches.base import CacheSpec, KVWeights
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.statistics import load_statistics
from kvjax.checkpoints.orbax import new_folder
from kvjax.downloads import cache_folder
from kvjax.errors import KvjaxError
from kvjax.files import check_digests, digests, read_json, write_json
from kvjax.mesh import WHOLE, fetch
from kvjax.models.model import Model
from kvjax.records import load_arrays, save_arrays

METADATA = "bases.json"


def load_bases(model: Model, plan: CachePlan) -> tuple[Any, ...]:
    """The bases of every layer, in the model's dtype: an argument of `Decoder`, never a constant of a program.

    They are read from $KVJAX_CACHE/bases, where the checksum of the weights that they belong to names them, and that
    of the calibration text where they are learned.

    Raises:
      KvjaxError: a method learns from a text and the model is not calibrated; the files there are of other weights,
        or damaged, or cannot be written.
    """
    check_calibrated(model, plan)
    specs = {_key(model, spec): spec for spec in plan.specs if spec.bases_key}
    if not specs:
        return ((),) * model.config.layers
    layers = [weights_of(model, i) for i in range(model.config.layers)]
    digest = _digest(layers)
    for key, spec in specs.items():
        if not hosts.on_first(lambda key=key: _found(digest, key)):  # type: ignore[misc]
            _make(model, layers, digest, spec)
    place = lambda a: model.layout.build(a.shape, model.dtype, WHOLE, a.__getitem__)  # noqa: E731
    read = lambda i, key: hosts.on_first(lambda: read_layer(folder_of(digest, key), i))  # noqa: E731
    return tuple(
        jax.tree.map(place, read(i, _key(model, spec))) if spec.bases_key else () for i, spec in enumerate(plan.specs)
    )


def check_calibrated(model: Model, plan: CachePlan) -> None:
    """Raises KvjaxError where a method learns from a text and the model is not calibrated on one."""
    if model.calibration is None and (learns := next((spec for spec in plan.specs if spec.calibrated), None)):
        raise KvjaxError(
            f"{learns} learns from a text; expected a model calibrated on one:"
            " kvjax.calibrated(model, TEXT), or --config.calibration=TEXT"
        )


def _key(model: Model, spec: CacheSpec) -> str:
    """The name of a spec's bases, with that of what they are learned from."""
    learned = model.calibration.digest[:16] if spec.calibrated and model.calibration else ""
    return spec.bases_key + f"-{learned}" * spec.calibrated


def folder_of(digest: str, key: str) -> Path:
    """Where the bases of these weights are kept."""
    return cache_folder() / "bases" / f"{digest[:16]}-{key}-layers"


def weights_of(model: Model, i: int) -> tuple[KVWeights, jax.Array]:
    """What the bases of layer i are computed from: its K and V weights, and the weight of the norm before them."""
    params, config = model.params[f"layer_{i}"], model.config
    weights = KVWeights(params["k"], params["v"], norm_eps=config.norm_eps, head_dim=config.head_dim)
    return weights, params.get("attention_norm", jnp.ones(config.model_dim, model.dtype))


def _digest(layers: list[tuple[KVWeights, jax.Array]]) -> str:
    digest = hashlib.sha256()
    for weights, norm in layers:
        for array in (weights.k, weights.v, norm):
            digest.update(fetch(array).tobytes())
    return digest.hexdigest()


def _make(model: Model, layers: list[tuple[KVWeights, jax.Array]], digest: str, spec: CacheSpec) -> None:
    """Computes the bases and writes them, a layer at a time: in float64 all layers' are as large as their weights.

    Raises:
      KvjaxError: they are trained, so that somebody must have trained them.
    """
    key = _key(model, spec)
    folder = folder_of(digest, key)
    if spec.trained:
        assert model.calibration is not None
        raise KvjaxError(
            f"{spec} is not trained for {model.name} on {model.calibration.text}; run"
            f" kvjax.learn(model, {str(spec)!r}) or kvjax learn first"
        )
    print(f"kvjax: computing bases of {len(layers)} layers ({spec.bases_key}), once, for {folder}", file=sys.stderr)
    try:
        _write_all(model, layers, digest, spec, lambda i, layer: first_bases(model, spec, i, layer))
    except KvjaxError:
        if not hosts.on_first(lambda: _found(digest, key)):
            raise  # otherwise another program has made them meanwhile


def first_bases(model: Model, spec: CacheSpec, i: int, layer: tuple[KVWeights, jax.Array]) -> Any:
    """What a spec computes for layer i of its weights (`weights_of`, on this host) and of what it learns from."""
    if spec.calibrated and model.calibration:
        return spec.bases(*layer, load_statistics(model.calibration.digest, i))
    return spec.bases(*layer)


def replace_bases(model: Model, spec: CacheSpec, trained: Sequence[Any]) -> None:
    """Keeps what was trained of every layer where `load_bases` finds it.

    Raises:
      KvjaxError: they cannot be written.
    """
    layers = [weights_of(model, i) for i in range(model.config.layers)]
    digest = _digest(layers)
    hosts.on_first(lambda: shutil.rmtree(folder_of(digest, _key(model, spec)), ignore_errors=True))
    _write_all(model, layers, digest, spec, lambda i, _: trained[i])


def trained_identity(model: Model, plan: CachePlan) -> dict[str, str]:
    """What rows say of trained bases: the sha256 of what was learned; nothing where none is, or they are missing."""
    keys = sorted({_key(model, spec) for spec in plan.specs if spec.trained})
    if not keys or model.calibration is None:
        return {}
    digest = _digest([weights_of(model, i) for i in range(model.config.layers)])
    files = [folder_of(digest, key) / METADATA for key in keys]
    if not hosts.on_first(lambda: all(file.exists() for file in files)):
        return {}
    sums = hosts.on_first(lambda: [read_json(file).get("arrays") for file in files])
    return {"trained_sha256": hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()}


def _write_all(
    model: Model,
    layers: list[tuple[KVWeights, jax.Array]],
    digest: str,
    spec: CacheSpec,
    one: Callable[[int, tuple[KVWeights, jax.Array]], Any],
) -> None:
    key = _key(model, spec)
    with new_folder(folder_of(digest, key)) as part:
        for i, layer in enumerate(layers):
            whole = jax.tree.map(fetch, layer)
            hosts.on_first(lambda i=i, whole=whole: write_layer(part, i, one(i, whole)))  # type: ignore[misc]
        metadata = {"weights": digest, "key": key}
        hosts.on_first(lambda: write_json(part / METADATA, metadata | {"arrays": digests(part / "arrays")}))


def _found(digest: str, key: str) -> bool:
    """Whether they are there.

    Raises:
      KvjaxError: they are of other weights, or damaged.
    """
    folder = folder_of(digest, key)
    if not folder.exists():
        return False
    metadata = read_json(folder / METADATA)
    if metadata.get("weights") != digest or metadata.get("key") != key:
        raise KvjaxError(f"{folder} holds bases of other weights; expected those of sha256 {digest}: remove it")
    check_digests(folder / "arrays", metadata.get("arrays"))
    return True


def write_layer(folder: Path, layer: int, tree: Any) -> None:
    """Writes the bases of one layer, nested lists of arrays, to a file of a folder."""
    names = {".".join(str(key.idx) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    save_arrays(_file(folder, layer), names)


def read_layer(folder: Path, layer: int) -> Any:
    """Reads what `write_layer` wrote. Raises KvjaxError where it is damaged."""
    return _lists(unflatten_dict(load_arrays(_file(folder, layer)), sep="."))


def _file(folder: Path, layer: int) -> Path:
    return folder / "arrays" / f"{layer}.npz"


def _lists(tree: Any) -> Any:
    """Dicts with numbers as keys as lists."""
    return [_lists(tree[key]) for key in sorted(tree, key=int)] if isinstance(tree, dict) else tree
