"""`kvjax.learn`: trains the encoders of a method on the text that a model is calibrated on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import records
from kvjax.caches.base import CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.calibrate import bases
from kvjax.calibrate.statistics import load_statistics
from kvjax.checks import check_whole
from kvjax.errors import KvjaxError
from kvjax.learning import layerwise, polish, training
from kvjax.learning.encoders import as_arrays, changed, counted_tokens, encoder_of, no_changes
from kvjax.learning.forward import exact_layer
from kvjax.learning.training import Curve, Kept, State
from kvjax.mesh import fetch
from kvjax.models.decoder import embed, first_alike
from kvjax.models.model import Model, check_model

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How encoders are trained.

    Attributes:
      steps: of every layer alone.
      rate: Adam's learning rate there, which falls to 0 by a cosine.
      polish: steps of all layers together; 0 leaves them as they are.
      polish_rate: the learning rate there.
      batch: windows a step of a layer; at least the devices of the mesh's axis data.
    """

    steps: int = 200
    rate: float = 3e-4
    polish: int = 0
    polish_rate: float = 3e-5
    batch: int = 1

    def check(self) -> None:
        """Raises KvjaxError for values that are not possible."""
        for name, least in {"steps": 1, "polish": 0, "batch": 1}.items():
            check_whole(name, getattr(self, name), least)
        for name in ("rate", "polish_rate"):
            training.check_rate(name, getattr(self, name))


def learn(
    model: Model,
    cache: str | CacheSpec | CachePlan,
    *,
    steps: int = Settings.steps,
    rate: float = Settings.rate,
    polish: int = Settings.polish,
    polish_rate: float = Settings.polish_rate,
    batch: int = Settings.batch,
    folder: str | Path | None = None,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Trains the encoders of a cache and keeps them where every plan with this cache finds them.

    They belong to the model's weights, to the calibration text and to the cache's settings. The model is not changed.

    Args:
      model: calibrated, see `kvjax.calibrated`, on two windows or more; the last one is not trained on and chooses.
      cache: what all layers have: `x{b}@latent` or `xcl{b}@latent(fold=1)`, with basis=learned.
      steps: see `Settings`.
      rate: see `Settings`.
      polish: see `Settings`.
      polish_rate: see `Settings`.
      batch: see `Settings`.
      folder: from which a run that was cut off goes on; a temporary one where None.
      progress: called with every row as it is made.

    Returns:
      A row a layer, then one for all together where these are polished: `first`, `least` and `curve` are what the
      encoders cost on the unseen window (nats per token) at the start, at the best step and at every look.

    Raises:
      KvjaxError: the model is not calibrated, the cache is not one that is trained, or files cannot be written.
    """
    check_model(model)
    settings = Settings(steps, rate, polish, polish_rate, batch)
    settings.check()
    plan = CachePlan.cast(cache, model.config)
    _check(model, plan)
    hears = progress or (lambda row: None)
    return training.in_folder(folder, lambda path: _Run(model, plan, settings, path, hears).all())


def _check(model: Model, plan: CachePlan) -> None:
    if model.calibration is None:
        raise KvjaxError(f"{model.name} is not calibrated; expected kvjax.calibrated(model, TEXT) before it learns")
    if len(model.calibration.windows) < 2:
        raise KvjaxError("the calibration has one window; expected two or more: one is for choosing")
    if untrained := next((spec for spec in plan.specs if not spec.trained), None):
        raise KvjaxError(f"{untrained} is not trained; expected basis=learned in every layer")
    if len({str(spec) for spec in plan.specs}) > 1:
        raise KvjaxError(f"{plan} has several caches; expected one for all layers")


@dataclasses.dataclass(frozen=True)
class _Run:
    model: Model
    plan: CachePlan
    settings: Settings
    workdir: Path
    hears: Callable[[Row], None]

    def all(self) -> list[Row]:
        with self.model.layout.entered():
            rows, encoders, found = self._layers()
            if self.settings.polish:
                row, found = self._polish(encoders, found)
                rows.append(row)
        bases.replace_bases(self.model, self.plan.specs[0], jax.tree.map(fetch, found))
        return rows

    @property
    def windows(self) -> np.ndarray:
        assert self.model.calibration is not None
        return self.model.calibration.windows

    @functools.cached_property
    def _identity(self) -> Row:
        assert self.model.calibration is not None
        return {
            "experiment": "learn",
            "model": self.model.name,
            "model_sha256": self.model.checksum,
            "dtype": str(self.model.dtype),
            "cache": str(self.plan),
            "learned_from": self.model.calibration.identity,
            "steps": self.settings.steps,
            "rate": self.settings.rate,
            "batch": self.settings.batch,
        }

    @property
    def _file(self) -> Path:
        return self.workdir / "learn.jsonl"

    # ---- layer by layer

    def _layers(self) -> tuple[list[Row], list[Any], list[Any]]:
        """Rows, encoders and what they learned, of every layer."""
        model, config = self.model, self.model.config
        optimizer = training.adam(self.settings.rate, self.settings.steps)
        h = [embed(config, model.params["embed"], jnp.asarray(window[None], jnp.int32)) for window in self.windows]
        below = jnp.zeros((len(h), *h[0].shape[1:]), jnp.float32)
        rows: list[Row] = []
        encoders: list[Any] = []
        found: list[Any] = []
        for i in range(config.layers):
            args = config, first_alike(config, i), model.params[f"layer_{i}"]
            h, units = map(list, zip(*(exact_layer(*args, each) for each in h), strict=True))
            task = self._task(i, jnp.stack(units), below)
            row, learned = self._layer(i, task, optimizer)
            below = layerwise.read_all(task, learned)
            rows, encoders, found = [*rows, row], [*encoders, task.encoder], [*found, learned]
        return rows, encoders, found

    def _task(self, i: int, units: Any, below: Any) -> layerwise.Task:
        spec = self.plan.specs[i]
        weights, norm = jax.tree.map(fetch, bases.weights_of(self.model, i))
        assert self.model.calibration is not None
        start = as_arrays(bases.first_bases(self.model, spec, i, (weights, norm)))
        fisher = jnp.asarray(load_statistics(self.model.calibration.digest, i).gradient, jnp.float32)
        encoder = encoder_of(spec, weights, norm, self.model.config)
        return layerwise.Task(encoder, start, fisher, units, below, counted_tokens(spec, units.shape[1]))

    def _layer(self, i: int, task: layerwise.Task, optimizer: Any) -> tuple[Row, Any]:
        point = self._identity | {"layer": i}
        if row := records.find_row(self._file, point):
            return row, as_arrays(bases.read_layer(self.workdir, i))
        mesh = self.model.mesh
        batch = training.whole_batch(self.settings.batch, mesh)
        place = functools.partial(training.over_data, mesh=mesh)
        learned = layerwise.train(task, optimizer, self.settings.steps, batch, place)
        bases.write_layer(self.workdir, i, jax.tree.map(fetch, learned.bases))
        row = self._keep(point, learned.curve)
        return row, learned.bases

    def _keep(self, point: Row, curve: Curve) -> Row:
        figures = {"first": curve[0][1], "least": min(cost for _, cost in curve), "curve": curve}
        row = point | figures | records.provenance()
        records.append_row(self._file, row)
        self.hears(row)
        return row

    # ---- all together

    def _polish(self, encoders: list[Any], found: list[Any]) -> tuple[Row, list[Any]]:
        settings, (*seen, unseen) = self.settings, [jnp.asarray(window, jnp.int32) for window in self.windows]
        counted = counted_tokens(self.plan.specs[0], len(unseen))
        stack = polish.Stack(self.model, encoders, found, counted)
        exact = [polish.exact_output(self.model, window) for window in (*seen, unseen)]
        optimizer = training.adam(settings.polish_rate, settings.polish)
        point = self._identity | {"layer": "all", "polish": settings.polish, "polish_rate": settings.polish_rate}
        none = training.begun([no_changes(each) for each in found], optimizer)
        look = lambda by: polish.loss(stack, by, unseen, exact[-1])  # noqa: E731

        def step(state: State) -> State:
            w = state.step % len(seen)
            return polish.step(stack, optimizer, state, seen[w], exact[w])

        state, curve = training.train(none, settings.polish, step, look, Kept(self.workdir, "polish", point))
        row = records.find_row(self._file, point) or self._keep(point, curve)
        return row, [changed(*pair) for pair in zip(found, state.best, strict=True)]
