"""A state on disk: what a model has read, compressed, to go on from in another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.orbax import new_folder, write_arrays
from kvjax.errors import KvjaxError
from kvjax.files import brief, check_digests, digests, read_json, write_json
from kvjax.generation.generate import State, empty_state
from kvjax.models.model import Model

METADATA = "state.json"


def save_state(folder: str | Path, model: Model, state: State) -> None:
    """Writes a state of this model to a new folder; it appears whole or not at all.

    Raises:
      KvjaxError: something is there already, or it cannot be written.
    """
    metadata = _made_by(model) | {
        "cache": str(state.cache.plan),
        "batch": state.cache.shape.batch,
        "max_len": state.cache.shape.max_len,
    }
    with new_folder(Path(folder)) as part:
        write_arrays(part / "arrays", _named(state))
        write_json(part / METADATA, metadata | {"arrays": digests(part / "arrays")})


def restore_state(folder: str | Path, model: Model, cache: str | None = None) -> State:
    """The state that `save_state` wrote.

    Args:
      cache: the plan that is expected; any where None.

    Raises:
      KvjaxError: another model, dtype or plan made it, or it is damaged.
    """
    folder = Path(folder).absolute()
    metadata = read_json(folder / METADATA)
    for key, own in _made_by(model).items():
        if metadata.get(key) != own:
            raise KvjaxError(f"{folder} was made with {key} {metadata.get(key)}; this model has {own}")
    try:
        plan = CachePlan.parse(metadata["cache"], model.config)
        expected = jax.eval_shape(lambda: empty_state(model, plan, metadata["batch"], metadata["max_len"]))
        sums = metadata["arrays"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise KvjaxError(f"{folder / METADATA} is not one that kvjax wrote: {brief(error)}") from None
    if cache is not None and CachePlan.parse(cache, model.config) != plan:
        raise KvjaxError(f"{folder} holds a cache of {plan}; expected {cache}")
    check_digests(folder / "arrays", sums)
    arrays = _read(folder / "arrays", _named(expected))
    leaves = [
        arrays.get(_name(i), jax.numpy.zeros(leaf.shape, leaf.dtype))
        for i, leaf in enumerate(jax.tree.leaves(expected))
    ]
    return jax.tree.unflatten(jax.tree.structure(expected), leaves)


def _made_by(model: Model) -> dict[str, Any]:
    return {"model": model.checksum, "layers": model.config.layers, "dtype": str(model.dtype)}


def _name(leaf: int) -> str:
    return f"{leaf:05d}"


def _named(state: State) -> dict[str, Any]:
    """The leaves that hold something: Orbax saves no others."""
    return {_name(i): leaf for i, leaf in enumerate(jax.tree.leaves(state)) if leaf.size}


def _read(folder: Path, expected: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for name, a in expected.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, wanted)
    except Exception as error:  # Orbax and its storage raise many kinds
        raise KvjaxError(f"{folder} cannot be restored: {brief(error)}") from None
