"""Low-rank adapters of the weights around attention, which make up for what a cache loses (LoRA, arXiv 2106.09685).

A weight W [out, in] becomes W + up @ down, up [out, r] and down [r, in]. The adapted model is a model like any other:
its caches, kernels and programs are the same, and a step takes no longer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvjax.checks import check_path
from kvjax.errors import KvjaxError
from kvjax.files import brief, write_atomically
from kvjax.mesh import fetch
from kvjax.models.model import Model, check_model

WEIGHTS = ("q", "k", "v", "o")
CARD = ("model", "model_sha256", "dtype", "cache", "learned_from", "rank", "steps", "rate", "curve")


@struct.dataclass
class LowRank:
    """A change of a weight."""

    up: Float[Array, "out r"]
    down: Float[Array, "r in"]


Layers = list[dict[str, LowRank]]  # of every layer, by the weight's name


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapters:
    """Changes of a model's weights, and what they were trained for.

    Attributes:
      layers: the changes of every layer.
      card: the plan, the model's name and checksum, the text that was learned from, rank, steps and rate; `curve`,
        the (step, KL) of every look at the window that is not learned from.
    """

    layers: Layers
    card: Mapping[str, Any]

    def save(self, file: str | Path) -> None:
        """Writes them as safetensors, the card among its metadata.

        Args:
          file: ends in .safetensors.

        Raises:
          KvjaxError: another name, or a file that cannot be written.
        """
        path = check_path("file", file)
        if path.suffix != ".safetensors":
            raise KvjaxError(f"{path}; expected a name that ends in .safetensors")
        arrays = {
            f"layer_{i}.{name}.{part}": np.ascontiguousarray(fetch(getattr(change, part)), np.float32)
            for i, layer in enumerate(self.layers)
            for name, change in layer.items()
            for part in ("up", "down")
        }
        write_atomically(path, save(arrays, {"kvjax": json.dumps(dict(self.card))}))

    def __repr__(self) -> str:
        rank = next(iter(self.layers[0].values())).down.shape[0]
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.layers))
        return f"<Adapters of rank {rank} for {self.card['cache']}: {count:,} parameters>"


def first_adapters(model: Model, rank: int) -> Layers:
    """Adapters that change nothing: up is 0, down is drawn."""
    keys = iter(jax.random.split(jax.random.key(0), len(WEIGHTS) * model.config.layers))

    def one(weight: Array) -> LowRank:
        rows, columns = weight.shape
        down = jax.random.normal(next(keys), (rank, columns), jnp.float32) / math.sqrt(columns)
        return LowRank(jnp.zeros((rows, rank), jnp.float32), down)

    layers = (model.params[f"layer_{i}"] for i in range(model.config.layers))
    return [{name: one(layer[name]) for name in WEIGHTS} for layer in layers]


def with_changes(params: Mapping[str, Array], changes: Mapping[str, LowRank]) -> dict[str, Array]:
    """A layer's parameters, changed."""
    new = {
        name: (params[name] + change.up @ change.down).astype(params[name].dtype) for name, change in changes.items()
    }
    return {**params, **new}


def read_adapters(file: str | Path) -> Adapters:
    """Reads what `Adapters.save` wrote.

    Args:
      file: the safetensors file.

    Raises:
      KvjaxError: it cannot be read, or it is something else.
    """
    path = check_path("file", file)
    try:
        with safe_open(path, "np") as handle:
            card = json.loads((handle.metadata() or {}).get("kvjax", "null"))
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise KvjaxError(f"{path} cannot be read: {brief(error)}; expected adapters that kvjax saved") from None
    try:
        pair = lambda i, name: LowRank(*(arrays[f"layer_{i}.{name}.{part}"] for part in ("up", "down")))  # noqa: E731
        layers = [{name: pair(i, name) for name in WEIGHTS} for i in range(len(arrays) // (2 * len(WEIGHTS)))]
        return Adapters(layers, {key: card[key] for key in CARD})
    except (KeyError, TypeError) as error:
        raise KvjaxError(f"{path} lacks {brief(error)}; expected adapters that kvjax saved") from None


def adapted(model: Model, adapters: Adapters | str | Path) -> Model:
    """The model with adapters in its weights.

    Args:
      model: what they were trained for; where it is calibrated, the new model is not: its weights are others.
      adapters: what `kvjax.learn_adapters` gives, or a file of it.

    Raises:
      KvjaxError: the file is no adapters, or they belong to another model.
    """
    check_model(model)
    if not isinstance(adapters, Adapters):
        adapters = read_adapters(adapters)
    if adapters.card["model_sha256"] != model.checksum:
        raise KvjaxError(
            f"the adapters are of other weights than {model.name}; expected the model they were trained on"
        )
    leaves = [np.asarray(fetch(leaf), np.float32) for leaf in jax.tree.leaves(adapters.layers)]
    rank = leaves[0].shape[-1] if leaves else 1
    expected = jax.eval_shape(lambda: first_adapters(model, rank))
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in jax.tree.leaves(expected)]:
        raise KvjaxError(f"the adapters' sizes are not those of {model.name}")
    digest = hashlib.sha256(model.checksum.encode() + b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
    layers = {f"layer_{i}": with_changes(model.params[f"layer_{i}"], each) for i, each in enumerate(adapters.layers)}
    name = f"{model.name} with adapters {digest[:8]}"
    return dataclasses.replace(model, name=name, params={**model.params, **layers}, checksum=digest, calibration=None)
