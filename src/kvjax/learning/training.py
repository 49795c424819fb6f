"""A training that keeps the best it has seen, and goes on where it was cut off."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax import records
from kvjax.checkpoints.orbax import new_folder, together, write_arrays
from kvjax.checks import check_path
from kvjax.errors import KvjaxError
from kvjax.files import brief

T = TypeVar("T")
LOOKS = 10  # times that the unseen window is looked at
Curve = list[tuple[int, float]]
"""(step, nats per token on the unseen window) at every look, the start among them."""


class State(NamedTuple):
    """A training that may go on: what is trained, and what was best on the unseen window."""

    step: int
    by: Any
    optimizer: Any
    best: Any


@dataclasses.dataclass(frozen=True)
class Kept:
    """Where a training's newest state lies, in an Orbax checkpoint.

    Attributes:
      folder: of the run.
      stem: begins the checkpoint's name.
      point: what the training is known by; a checkpoint of another is not gone on from.
    """

    folder: Path
    stem: str
    point: dict[str, Any]

    def save(self, state: State, curve: Curve) -> None:
        """Older states are removed."""
        folder = self.folder / f"{self.stem}-{state.step}"
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as part:
            write_arrays(part.absolute() / "state", state._asdict())
            records.append_row(part / "curve.jsonl", self.point | {"curve": curve})
        for old in self.folder.glob(f"{self.stem}-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def restored(self, start: State) -> tuple[State, Curve]:
        """The state that was saved, and its curve; the start and nothing where there is none.

        Raises:
          KvjaxError: what is there cannot be read.
        """
        last = lambda path: int(path.name[len(self.stem) + 1 :])  # noqa: E731
        folder = max(self.folder.glob(f"{self.stem}-*"), key=last, default=None)
        row = folder and records.find_row(folder / "curve.jsonl", self.point)
        if not folder or not row:
            return start, []
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=together()) as checkpointer:
                saved = checkpointer.restore(folder.absolute() / "state", start._asdict())
        except Exception as error:  # Orbax and its storage raise many kinds
            raise KvjaxError(f"{folder} cannot be restored: {brief(error)}; remove it to train again") from None
        return State(**saved | {"step": int(saved["step"])}), [tuple(look) for look in row["curve"]]


def check_rate(name: str, rate: Any) -> None:
    """Raises KvjaxError for a learning rate that is not possible."""
    if not (isinstance(rate, float) and 0 < rate < math.inf):
        raise KvjaxError(f"{name}={rate}; expected a number above 0")


def in_folder(folder: str | Path | None, run: Callable[[Path], T]) -> T:
    """Runs a training in a folder from which it may go on, or in a temporary one where None."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return run(Path(temporary))
    return run(check_path("folder", folder))


def whole_batch(batch: int, mesh: Mesh | None) -> int:
    """A batch that the devices of the mesh's axis data divide, not below the one asked for."""
    devices = 1 if mesh is None else mesh.shape.get("data", 1)
    return -(-batch // devices) * devices


def over_data(batch: Any, mesh: Mesh | None) -> Any:
    """A batch of windows over the devices of the axis data."""
    if mesh is None or "data" not in mesh.shape:
        return batch
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a rate that falls to 0 by a cosine. Costs are tiny, and so are their gradients: eps is far below."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps), eps=1e-16)


def begun(by: Any, optimizer: optax.GradientTransformation) -> State:
    """A training that has not taken a step."""
    return State(0, by, optimizer.init(by), by)


def train(
    state: State,
    steps: int,
    step: Callable[[State], State],
    look: Callable[[Any], float],
    kept: Kept | None = None,
) -> tuple[State, Curve]:
    """Trains up to `steps`.

    Args:
      state: the start.
      steps: how many in all.
      step: takes one; its result's `step` is one higher.
      look: what something costs on the unseen window.
      kept: where the state lies between two looks; None: it is not kept.

    Returns:
      The last state, which has the best, and the curve.
    """
    state, curve = kept.restored(state) if kept else (state, [])
    curve = curve or [(0, look(state.by))]
    while state.step < steps:
        state = step(state)
        if state.step % -(-steps // LOOKS) == 0 or state.step == steps:
            now = look(state.by)
            state = state._replace(best=state.by if now < min(cost for _, cost in curve) else state.best)
            curve.append((state.step, now))
            if kept:
                kept.save(state, curve)
    return state, curve


@functools.partial(jax.jit, static_argnames="optimizer")
def update(optimizer: optax.GradientTransformation, gradient: Any, inner: Any, by: Any) -> tuple[Any, Any]:
    """What is trained and the optimizer's state after a gradient."""
    updates, inner = optimizer.update(gradient, inner, by)
    return optax.apply_updates(by, updates), inner
