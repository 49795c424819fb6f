"""Errors of layers, each measured once: rows of FOLDER/sensitivity.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax import hosts, records
from kvjax.caches.base import CacheShape
from kvjax.caches.cross_layer import Place
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.files import locked
from kvjax.tuner import sensitivity
from kvjax.tuner.simulate import Simulator

DRAWS = 8192  # next tokens that are drawn in all: few of them decide a prediction of KL, and layers must not be lucky
Row = dict[str, Any]
Rows = dict[tuple[int, str], Row]
"""By the layer, and the label of the place."""


class LayerErrors:
    """What quantising one layer costs, around the dense run or around a plan."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        seed: int,
        tokens: int,
        shape: CacheShape,
        simulator: Callable[[], Simulator],
        advance: Callable[[int, int], None],
    ):
        """Measures nothing yet.

        Args:
          folder: where the rows are kept.
          identity: what two searches must share for their windows to be the same.
          seed: of the draws.
          tokens: of all windows.
          shape: sizes of a cache, for the bits that rows state.
          simulator: gives the simulator; called when something is measured.
          advance: hears how many of the layers are measured.
        """
        self._folder, self._shape, self._simulator, self._advance = folder, shape, simulator, advance
        self._common = {"experiment": "sensitivity", **identity, "samples": -(-DRAWS // tokens), "seed": seed}
        self._common["relative_errors"] = sensitivity.RELATIVE
        self._slopes: list[Float[np.ndarray, "L S N H d"]] = []

    def share(self, other: LayerErrors) -> None:
        """Takes over the gradients of another search on the same windows, if it has them."""
        if other._common["seed"] == self._common["seed"]:
            self._slopes = other._slopes

    def around(self, plan: CachePlan, places: Sequence[Iterable[Place]], error: str) -> Rows:
        """The errors of the places of every layer, on the layer inputs and the carries that a plan leads to.

        Args:
          plan: the dense plan, or another.
          places: of every layer.
          error: what every row must have: `kld` is measured where it is asked for (around the dense plan).
        """
        # Processes that share a folder measure one after the other: the first measures, the others read.
        with locked(self._folder / "sensitivity.lock"):
            return self._around(plan, [list(dict.fromkeys(some)) for some in places], error)

    def _around(self, plan: CachePlan, places: list[list[Place]], error: str) -> Rows:
        file, layers = self._folder / "sensitivity.jsonl", len(places)
        common = self._common | {"around": str(plan)}
        needed = {"layer", "cache", "bits_asymptotic", "e_o", "predicted", "joint", error}
        rows = hosts.on_first(lambda: records.find_rows(file, common))
        found = {(row["layer"], row["cache"]): row for row in rows if needed <= row.keys()}
        missing = [[place for place in some if (i, place.label) not in found] for i, some in enumerate(places)]
        left = [layer for layer, some in enumerate(missing) if some]
        self._advance(layers - len(left), layers)
        if left:
            self._slopes = self._slopes or self._gradients()
            for layer, entering in enumerate(self._carries(plan, missing)):
                if missing[layer]:
                    rows = self._measure(layer, missing[layer], plan, entering, error)
                    found |= {(layer, row["cache"]): row for row in self._kept(rows, file, common)}
                    self._advance(layers - len(left) + left.index(layer) + 1, layers)
        return found

    def _kept(self, rows: list[Row], file: Path, common: Row) -> list[Row]:
        """The rows, appended to a file."""
        rows = [common | row | records.provenance() for row in rows]
        hosts.on_first(lambda: records.append_rows(file, rows))
        return hosts.on_first(lambda: rows)

    def _gradients(self) -> list[Float[np.ndarray, "L S N H d"]]:
        """Of every window."""
        simulator, draws = self._simulator(), (self._common["samples"], self._common["seed"])
        return [sensitivity.gradients(simulator, window, *draws) for window in range(len(simulator.windows))]

    def _carries(self, plan: CachePlan, places: Sequence[Sequence[Place]]) -> Iterable[sensitivity.Carries]:
        belows = [[place.below for place in some if place.below] for some in places]
        return sensitivity.carries(self._simulator(), plan, [list(dict.fromkeys(some)) for some in belows])

    def _measure(
        self, layer: int, places: list[Place], plan: CachePlan, entering: sensitivity.Carries, error: str
    ) -> list[Row]:
        """The rows of a layer."""
        simulator = self._simulator()
        local = sensitivity.local_errors(simulator, layer, places, simulator.keep(plan), entering, self._slopes)
        rows = []
        for place, figures in zip(places, local, strict=True):
            spec = place.spec
            bits = {"bits_nominal": spec.bits_nominal, "bits_asymptotic": spec.bits_asymptotic(self._shape)}
            row = {"layer": layer, "cache": place.label, **bits, **figures}
            if error == "kld":
                row["kld"] = sensitivity.measured(simulator, layer, place, entering)
            if not all(map(math.isfinite, figures.values())):
                raise KvjaxError(f"layer {layer} under {place.label}: its errors are not finite")
            rows.append(row)
        return rows
