"""Encoders trained layer by layer: Adam on what a layer's errors cost by the Fisher information.

Layer inputs are those of the model with exact keys and values. What an encoder of deltas starts from is what the
trained encoders below it read back. The last window is not trained on: of all that was tried in a layer, the start
among it, the encoder that costs least there is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from kvjax.learning import training
from kvjax.learning.encoders import Bases, Changes, Encoder, changed, cost, no_changes
from kvjax.learning.training import Curve, State


@struct.dataclass
class Task:
    """What one layer's encoder is trained on; w windows."""

    encoder: Encoder
    start: Bases
    fisher: Float[Array, "2C 2C"]
    units: Float[Array, "w N D"]
    below: Float[Array, "w N D"]
    counted: Bool[Array, "N"]

    def part(self, windows: Any) -> tuple[Array, Array]:
        return self.units[windows], self.below[windows]


class Trained(NamedTuple):
    """An encoder, and what it costs on the unseen window."""

    bases: Bases
    curve: Curve

    @property
    def first(self) -> float:
        """What the start costs."""
        return self.curve[0][1]

    @property
    def least(self) -> float:
        """What the kept encoder costs."""
        return min(cost for _, cost in self.curve)


def train(
    task: Task, optimizer: optax.GradientTransformation, steps: int, batch: int, place: Callable[[Any], Any]
) -> Trained:
    """Trains the encoder of one layer.

    Args:
      task: the layer.
      optimizer: one object for all layers, so that equal layers share a program.
      steps: steps of training.
      batch: windows a step.
      place: spreads a batch over the devices.
    """
    seen = len(task.units) - 1

    def step(state: State) -> State:
        rows = (np.arange(batch) + (state.step + 1) * batch) % seen
        by, inner = _step(optimizer, task, state.by, state.optimizer, *place(task.part(rows)))
        return state._replace(step=state.step + 1, by=by, optimizer=inner)

    look = lambda by: float(_mean_cost(task, by, *task.part(np.array([seen]))))  # noqa: E731
    state, curve = training.train(training.begun(no_changes(task.start), optimizer), steps, step, look)
    return Trained(changed(task.start, state.best), curve)


@jax.jit
def _mean_cost(task: Task, by: Changes, units: Float[Array, "b N D"], below: Float[Array, "b N D"]) -> Array:
    bases = changed(task.start, by)

    def one(unit, below):
        read, _ = task.encoder.read(bases, unit, below, task.counted)
        return cost(read - task.encoder.exact(unit), task.fisher, task.counted)

    return jax.vmap(one)(units, below).mean()


@functools.partial(jax.jit, static_argnames="optimizer")
def _step(optimizer, task, by, state, units, below):
    return training.update(optimizer, jax.grad(_mean_cost, 1)(task, by, units, below), state, by)


@jax.jit
def read_all(task: Task, bases: Bases) -> Float[Array, "w N D"]:
    """What the layer reads back of every window, for the layer above."""
    read = lambda unit, below: task.encoder.read(bases, unit, below, task.counted)[1]  # noqa: E731
    return jax.lax.map(lambda pair: read(*pair), (task.units, task.below))
