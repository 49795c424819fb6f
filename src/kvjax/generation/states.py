"""What a model has read, compressed: to look at, to go on from, and to keep on disk.

B sequences of a batch, D model_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import struct
from jaxtyping import Array, Float

from kvjax import hosts
from kvjax.caches.base import CacheShape, CacheSpec
from kvjax.caches.plan import Cache, CachePlan
from kvjax.checkpoints.orbax import new_folder, together, write_arrays
from kvjax.checks import check_path, check_whole
from kvjax.errors import KvjaxError
from kvjax.files import brief, check_digests, digests, read_json, write_json
from kvjax.generation.layers import LayerView, read_layer
from kvjax.generation.prompts import Read
from kvjax.mesh import BATCH, ONE_DEVICE, Layout, fetch
from kvjax.models.model import Model, check_model
from kvjax.models.rope import reach

METADATA = "state.json"


@struct.dataclass
class Held:
    """The arrays of a state, which programs take: all tokens in the cache, and what predicts the next one."""

    cache: Cache
    hidden: Float[Array, "B D"]  # final hidden state of each sequence's last token
    layout: Layout = struct.field(pytree_node=False, default=ONE_DEVICE)

    @classmethod
    def empty(cls, model: Model, plan: CachePlan, batch: int, max_len: int) -> Held:
        """Nothing read yet. Each device makes its own part.

        Raises:
          KvjaxError: the model's mesh does not divide the batch.
        """
        model.layout.check(batch=batch)
        return _empty(plan, model.cache_shape(batch, max_len), model.layout)

    def axes(self) -> Any:
        """The same tree, leaves PartitionSpecs of logical axis names."""
        return dataclasses.replace(self, cache=self.cache.axes(), hidden=BATCH)  # type: ignore[arg-type]

    def then(self, cache: Cache, hidden: Float[Array, "B D"]) -> Held:
        """What is held after a step, where it was before."""
        return Held(cache, hidden, self.layout).placed()

    def placed(self) -> Held:
        """The same in a program, whose compiler is told where every array lives."""
        return self.layout.constrain(self, self.axes())


@functools.partial(jax.jit, static_argnames=("plan", "shape", "layout"))
def _empty(plan: CachePlan, shape: CacheShape, layout: Layout) -> Held:
    hidden = jnp.zeros((shape.batch, shape.model_dim), shape.dtype)
    return Held(plan.init(shape), hidden, layout).placed()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class State:
    """Sequences that a model has read. `print` it for a table of its layers.

    Attributes:
      model: the model that read them.
      held: the arrays.
      read: of each sequence, what was read.
    """

    model: Model
    held: Held
    read: list[Read]

    @property
    def cache(self) -> Cache:
        """The caches of all layers."""
        return self.held.cache

    @property
    def plan(self) -> CachePlan:
        """Which cache each layer has."""
        return self.cache.plan

    @property
    def lengths(self) -> list[int]:
        """Tokens read, of each sequence."""
        return fetch(self.cache.length).tolist()

    @property
    def max_len(self) -> int:
        """Tokens that each sequence has room for."""
        return self.cache.shape.max_len

    @property
    def nbytes(self) -> int:
        """Allocated bytes of the caches."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache.layers))

    def layer(self, index: int) -> LayerView:
        """Keys and values as the cache of one layer gives them back, dequantised.

        Args:
          index: the layer, counted from 0.

        Raises:
          KvjaxError: the model has no such layer.
        """
        return read_layer(self.model, self.cache, check_whole("layer", index, 0, len(self.cache.layers) - 1))

    def __repr__(self) -> str:
        held = " + ".join(map(str, self.lengths))
        room = f"{len(self.lengths)} x {self.max_len}"
        return f"<State {self.plan}: {held} tokens held, room for {room}, {self.nbytes:,} bytes>"

    def __str__(self) -> str:
        return str(self.cache)


def grow(held: Held, model: Model, max_len: int) -> Held:
    """The same sequences in caches with room for `max_len` tokens, no fewer than before; copied.

    Raises:
      KvjaxError: the model's RoPE depends on the room, so that the stored keys would be turned by other angles.
    """
    config, room = model.config, held.cache.shape.max_len
    for rope in map(config.layer_rope, range(config.layers)):
        if reach(rope, room) != reach(rope, max_len):
            raise KvjaxError(
                f"a state with room for {room} tokens cannot grow to {max_len}: {rope.scaling} rope scaling turns"
                f" keys by other angles there; expected max_len={max_len} when the state begins"
            )
    return _refit(held, model.cache_shape(held.hidden.shape[0], max_len), model.layout)


@functools.partial(jax.jit, static_argnames=("shape", "layout"))
def _refit(held: Held, shape: CacheShape, layout: Layout) -> Held:
    empty = _empty(held.cache.plan, shape, layout)

    def place(old: Array, new: Array) -> Array:
        """Tokens lie in order from the start; those that no longer fit hold nothing."""
        kept = jax.lax.slice(old, (0,) * old.ndim, tuple(map(min, old.shape, new.shape)))
        return jax.lax.dynamic_update_slice(new, kept, (0,) * new.ndim)

    leaves = map(place, jax.tree.leaves(held), jax.tree.leaves(empty))
    return jax.tree.unflatten(jax.tree.structure(empty), list(leaves)).placed()


def check_made_by(state: State, model: Model) -> None:
    """Raises KvjaxError where another model made the state, or the same one on other devices."""
    check_model(model)
    if not isinstance(state, State):
        raise KvjaxError(f"the state is of type {type(state).__name__}; expected what kvjax.prefill gives")
    if _made_by(state.model) != _made_by(model) or state.model.config != model.config:
        raise KvjaxError(f"the state was made by another model, {state.model!r}; this is {model!r}")
    if _learned_from(state.model, state.plan) != _learned_from(model, state.plan):
        raise KvjaxError(f"the state's cache of {state.plan} learned from another text than this model's calibration")
    if state.model.layout != model.layout:
        raise KvjaxError(f"the state is where {state.model!r} is; this is {model!r}: save the state and restore it")


# ---- on disk


def save_state(folder: str | Path, model: Model, state: State) -> None:
    """Writes a state of this model to a new folder; it appears whole or not at all.

    Several processes that share the model must all call it, with a folder that all see.

    Raises:
      KvjaxError: another model made the state, something is there already, or it cannot be written.
    """
    check_made_by(state, model)
    metadata = _made_by(model) | {
        "name": model.name,
        "cache": str(state.plan),
        "max_len": state.max_len,
        "parts": state.cache.shape.parts,
        "learned_from": _learned_from(model, state.plan),
        "read": [each._asdict() for each in state.read],
    }
    with new_folder(check_path("folder", folder)) as part:
        write_arrays(part / "arrays", _named(state.held))
        hosts.on_first(lambda: write_json(part / METADATA, metadata | {"arrays": digests(part / "arrays")}))


def restore_state(folder: str | Path, model: Model, cache: str | CacheSpec | CachePlan | None = None) -> State:
    """The state that `save_state` wrote.

    Args:
      folder: where it was saved.
      model: the model that made it.
      cache: the plan that is expected; any where None.

    Raises:
      KvjaxError: another model, dtype or plan made it, or it is damaged.
    """
    check_model(model)
    folder = check_path("folder", folder).absolute()
    metadata = read_json(folder / METADATA)
    for key, own in _made_by(model).items():
        if (made := str(metadata.get(key))) != str(own):
            what = "checksum" if key == "model" else key
            other = f"{metadata.get('name', 'another model')} ({what} {made[:8]})"
            raise KvjaxError(f"{folder} was made by {other}; this is {model.name} ({what} {str(own)[:8]})")
    try:
        plan = CachePlan.parse(metadata["cache"], model.config)
        read = [_check_read(Read(**each)) for each in metadata["read"]]
        shape, layout = _layout_of(model, len(read), metadata["max_len"], metadata.get("parts", 1))
        expected = jax.eval_shape(lambda: _empty(plan, shape, layout))
        sums = metadata["arrays"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise KvjaxError(f"{folder / METADATA} is not one that kvjax wrote: {brief(error)}") from None
    if (learned := metadata.get("learned_from", "")) != _learned_from(model, plan):
        raise KvjaxError(f"{folder} holds a cache of {plan}; expected a model with its calibration ({learned[:8]})")
    if cache is not None and CachePlan.cast(cache, model.config) != plan:
        raise KvjaxError(f"{folder} holds a cache of {plan}; expected {cache}")
    check_digests(folder / "arrays", sums)
    arrays = _read(folder / "arrays", expected)
    leaves = [
        arrays[_name(i)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(jax.tree.leaves(expected))
    ]
    held = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    if layout != model.layout:
        held = _refit(held, model.cache_shape(len(read), shape.max_len), model.layout)
    state = State(model, held, read)
    if state.lengths != [each.tokens for each in read]:
        raise KvjaxError(f"{folder / METADATA} is not one that kvjax wrote: the cache holds {state.lengths} tokens")
    return state


def _layout_of(model: Model, batch: int, max_len: int, parts: int) -> tuple[CacheShape, Layout]:
    """The shape of a saved state, and where it is put: all tokens on every device where another mesh divided them.

    Raises:
      KvjaxError: the model's mesh does not divide the batch.
    """
    model.layout.check(batch=batch)
    shape, layout = model.cache_shape(batch, max_len), model.layout
    if parts == shape.parts:
        return shape, layout
    whole = dataclasses.replace(layout, replicate=(*layout.replicate, "tokens"))
    return dataclasses.replace(shape, parts=check_whole("parts", parts, 1)), whole


def _check_read(read: Read) -> Read:
    """Raises TypeError where a value is of another type."""
    if type(read.tokens) is not int or not isinstance(read.last, int | None) or type(read.chat) is not bool:
        raise TypeError(f"read is {read}")
    return read


def _learned_from(model: Model, plan: CachePlan) -> str:
    """The checksum of what the plan's methods learned from; "" where they learn nothing."""
    return model.calibration.digest if model.calibration and plan.calibrated else ""


def _made_by(model: Model) -> dict[str, Any]:
    return {"model": model.checksum, "layers": model.config.layers, "dtype": str(model.dtype)}


def _name(leaf: int) -> str:
    return f"{leaf:05d}"


def _named(held: Held) -> dict[str, Any]:
    """The leaves that hold something: Orbax saves no others."""
    return {_name(i): leaf for i, leaf in enumerate(jax.tree.leaves(held)) if leaf.size}


def _read(folder: Path, expected: Held) -> dict[str, jax.Array]:
    """The leaves that are on disk, each device's part read alone, on whatever devices they were when saved."""
    wanted = _named(expected.layout.structs(expected.axes(), expected))
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=together()) as checkpointer:
            return checkpointer.restore(folder, wanted)
    except Exception as error:  # Orbax and its storage raise many kinds
        raise KvjaxError(f"{folder} cannot be restored: {brief(error)}") from None
