"""One search: sensitivity, pruning, clustering, the methods, and the front that they come to.

Every stage goes on where it was cut off: errors of layers are rows of FOLDER/sensitivity.jsonl, evaluated plans lie
in FOLDER/evaluations, NSGA-II's trials in FOLDER/journal.log, which more processes may share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kvjax import hosts, records
from kvjax.caches import cross_layer
from kvjax.caches.base import REAL_DTYPE, CacheShape, CacheSpec
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import check_calibrated
from kvjax.checks import check_progress
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Score
from kvjax.files import locked
from kvjax.models.model import Model
from kvjax.tuner import sensitivity
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.evolve import evolve
from kvjax.tuner.knapsack import knapsack
from kvjax.tuner.objective import make_objective
from kvjax.tuner.refine import refine
from kvjax.tuner.settings import ANSWERS, SearchSettings
from kvjax.tuner.simulate import Simulator
from kvjax.tuner.space import Bits, cluster, default_candidates, halving_order, pareto, resolved

SAMPLES = 2  # draws of every token's prediction, for the prediction of KL
Row = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): a stage may have more to say after a comma, as in `refining, kld 0.01`."""


class Search:
    """One search: its candidates, what was measured, and the methods.

    Attributes:
      candidates: resolved for the model; uniform: a plan of each for all layers.
      bits: what plans are counted by, and the budget.
      evaluations: figures of plans, each made once.
    """

    def __init__(
        self,
        settings: SearchSettings,
        model: Model,
        windows: Int[np.ndarray, "w n"],
        identity: dict[str, Any],
        folder: Path,
        progress: Progress | None = None,
    ):
        """Checks all that can be checked before anything is computed.

        Args:
          settings: what is asked for.
          model: the model that is searched for.
          windows: token ids to calibrate on.
          identity: what two searches must share for their windows to be the same.
          folder: where measurements are kept.
          progress: hears how far each stage is.

        Raises:
          KvjaxError: candidates that the model cannot hold, that a search cannot evaluate or that are all beyond the
            budget; problems that cannot be read; a progress that cannot be called.
        """
        self.settings, self.model, self.windows, self.identity = settings, model, windows, identity
        self.folder, self.progress = folder, check_progress(progress)
        self.context = windows.shape[1]
        self.shape = CacheShape.of(model.config, 1, self.context, REAL_DTYPE)
        kind = "asymptotic" if settings.budget_asymptotic else "nominal"
        self.bits = Bits(kind, settings.budget_asymptotic or settings.budget, self.shape)
        names = split_list(settings.candidates) if settings.candidates else default_candidates(settings.mode)
        self.candidates = resolved(names, model.config)
        self.uniform = [CachePlan.uniform(spec, model.config) for spec in self.candidates]
        self._check_candidates()
        self.objective = make_objective(settings, model)
        figures = ("kld", "nll", "top1", *({settings.objective} & {*ANSWERS}))
        self.evaluations = Evaluations(
            folder / "evaluations", identity | self.objective.identity, self._evaluate, figures
        )
        self._simulator: Simulator | None = None
        self._errors: dict[tuple[int, str], Row] = {}
        self._complete = False  # whether they are those of all candidates

    def _check_candidates(self) -> None:
        for plan in self.uniform:
            plan.require_whole_windows("a search")
            check_calibrated(self.model, plan)
        budget, least = self.bits.budget, min(self.bits.of_plan(plan) for plan in self.uniform)
        if least > budget + 1e-9:
            raise KvjaxError(
                f"budget={budget} {self.bits.kind} bits; expected at least {least:g}, the least of the candidates"
            )

    # ---- what is measured

    @property
    def simulator(self) -> Simulator:
        """Made when it is first needed: a search that is done already needs none."""
        if self._simulator is None:
            self._simulator = Simulator(self.model, self.windows)
        return self._simulator

    def share(self, other: Search) -> None:
        """Takes over the simulator of another search on the same windows."""
        self._simulator = other.simulator

    def _evaluate(self, plan: CachePlan) -> dict[str, float]:
        simulator, start = self.simulator, time.perf_counter()
        score = Score.of(simulator.score(plan), self.windows)
        figures = {"kld": score.kld, "nll": score.nll, "top1": score.top1} | self.objective.measure(plan)
        return figures | {"seconds": time.perf_counter() - start}

    def loss(self, plan: CachePlan) -> float:
        """What the search makes small."""
        name = self.settings.objective
        figure = self.evaluations(plan)[name]
        return figure if name in ("kld", "nll") else 1 - figure

    def errors(self) -> dict[tuple[int, str], Row]:
        """A row for every layer and candidate, from disk where it is there; by the candidate's name in its place."""
        if self._complete:
            return self._errors
        # Processes that share a folder measure one after the other: the first measures, the others read.
        with locked(self.folder / "sensitivity.lock"):
            self._errors, self._complete = self._measured(self.folder / "sensitivity.jsonl"), True
        return self._errors

    def measured_errors(self) -> list[Row]:
        """The rows of `errors`, layer by layer; none where the search needed none."""
        layers = range(self.model.config.layers if self._errors else 0)
        return [self._errors[layer, cross_layer.label(spec)] for layer in layers for spec in self._places()]

    def _measured(self, file: Path) -> dict[tuple[int, str], Row]:
        """The rows of a file and, appended to it, those that it lacked."""
        layers, specs = self.model.config.layers, self._places()
        common = {"experiment": "sensitivity", **self.identity, "samples": SAMPLES, "seed": self.settings.seed}
        common["relative_errors"] = sensitivity.RELATIVE
        needed = {"layer", "cache", "bits_asymptotic", "e_o", "predicted", self.settings.error}
        rows = hosts.on_first(lambda: records.read_rows(file))
        rows = [row for row in rows if common.items() <= row.items() and needed <= row.keys()]
        found = {(row["layer"], row["cache"]): row for row in rows}
        names = {spec: cross_layer.label(spec) for spec in specs}
        missing = [[spec for spec in specs if (layer, names[spec]) not in found] for layer in range(layers)]
        left = [layer for layer, some in enumerate(missing) if some]
        self.progress("sensitivity", layers - len(left), layers)
        gradients = self._gradients() if left else []
        for ended, layer in enumerate(left, layers - len(left) + 1):
            rows = self._measure_and_keep(layer, missing[layer], gradients, file, common)
            found |= {(layer, row["cache"]): row for row in rows}
            self.progress("sensitivity", ended, layers)
        return found

    def _measure_and_keep(
        self, layer: int, specs: Sequence[CacheSpec], gradients: Sequence[np.ndarray], file: Path, common: Row
    ) -> list[Row]:
        """The rows of a layer, appended to a file."""
        rows = self._measure(layer, specs, gradients)
        rows = [common | row | records.provenance() for row in rows]
        hosts.on_first(lambda: records.append_rows(file, rows))
        return hosts.on_first(lambda: rows)

    def _gradients(self) -> list[Float[np.ndarray, "L S N H d"]]:
        """Of every window."""
        count, seed = len(self.windows), self.settings.seed
        return [sensitivity.gradients(self.simulator, window, SAMPLES, seed) for window in range(count)]

    def _measure(self, layer: int, specs: Sequence[CacheSpec], gradients: Sequence[np.ndarray]) -> list[Row]:
        local = sensitivity.local_errors(self.simulator, layer, specs, gradients)
        rows = []
        for spec, figures in zip(specs, local, strict=True):
            bits = {"bits_nominal": spec.bits_nominal, "bits_asymptotic": spec.bits_asymptotic(self.shape)}
            row = {"layer": layer, "cache": cross_layer.label(spec), **bits, **figures}
            if self.settings.error == "kld":
                row["kld"] = sensitivity.measured(self.simulator, layer, spec)
            rows.append(row)
        return rows

    def _places(self) -> list[CacheSpec]:
        """What the candidates store in all their places."""
        return list(dict.fromkeys(cross_layer.canonical(spec) for plan in self.uniform for spec in plan.specs))

    def error(self, layer: int, spec: CacheSpec) -> float:
        """The error of one layer with the spec in its place."""
        return self.errors()[layer, cross_layer.label(spec)][self.settings.error]

    # ---- the methods

    def plans(self) -> list[CachePlan]:
        """What the method comes to, best candidates for the budget among it, evaluated."""
        plans = {"knapsack": self._knapsack, "refine": self._refine, "nsga2": self._nsga2}[self.settings.method]()
        compared = [*plans, *self.uniform]
        self.progress("evaluating", 0, len(compared))
        for count, plan in enumerate(compared, 1):
            self.evaluations(plan)
            self.progress("evaluating", count, len(compared))
        return plans

    def knapsack_front(self) -> list[CachePlan]:
        """The front under additive errors, most bits first."""
        choices = [self.candidates] * self.model.config.layers
        return [plan for plan, _ in knapsack(choices, self.bits.of, self.error, self.model.config)]

    def _knapsack(self) -> list[CachePlan]:
        """The budget's plan, and some of the front below it, evenly spread over the bits."""
        front = self.knapsack_front()
        ends = self.bits.of_plan(front[-1]), min(self.bits.of_plan(front[0]), self.bits.budget)
        targets = np.linspace(*ends, self.settings.points)
        targets = targets[halving_order(len(targets))]  # few evaluations cover the front, too
        spread = [min(front, key=lambda plan, t=t: abs(self.bits.of_plan(plan) - t)) for t in targets]  # type: ignore[misc]
        return list(dict.fromkeys([self._for_budget(front), *spread]))

    def _for_budget(self, front: list[CachePlan]) -> CachePlan:
        return next(plan for plan in front if self.bits.fits(plan))

    def _refine(self) -> list[CachePlan]:
        known = filter(self.bits.fits, self.uniform)
        start = min([self._for_budget(self.knapsack_front()), *known], key=self.loss)
        choices, total = self._choices_around(start), self.settings.rounds + 1
        self.progress("refining", 0, total)
        plans: list[CachePlan] = []
        for plan, loss in refine(start, choices, self.bits, self.loss, self.settings.rounds, self.model.config):
            if plans:
                self.simulator.forget(plans[-1])
            self.simulator.keep(plan)
            plans.append(plan)
            self.progress(f"refining, {self.settings.objective} {loss:.5f}", len(plans), total)
        return plans

    def _choices_around(self, start: CachePlan) -> list[list[CacheSpec]]:
        """Every layer's candidates, most bits first: pruned or not, the plan's own is one."""
        choices = []
        for layer, spec in enumerate(start.specs):
            names = {str(spec), *map(str, self._pruned(layer, self.bits, self._nats))}
            some = [each for each in self.candidates if str(each) in names]
            choices.append(sorted(some, key=lambda each: self.bits.of(self._top(each)), reverse=True))
        return choices

    def _nsga2(self) -> list[CachePlan]:
        groups, choices = self.groups()
        settings, names = self.settings, [[str(spec) for spec in choice] for choice in choices]
        identity = [self.evaluations.identity, names, groups, settings.objective, self.bits.kind, self.bits.budget]
        name = hashlib.sha256(json.dumps([*identity, settings.seed]).encode())
        return evolve(
            *(self.folder / "journal.log", name.hexdigest()[:16], groups, choices, self.bits, self.loss),
            *(settings.trials, (settings.seed, settings.worker), self.model.config),
            lambda ended: self.progress("NSGA-II", ended, settings.trials),
        )

    def groups(self) -> tuple[list[list[int]], list[list[CacheSpec]]]:
        """Layers that share a choice, and every layer's choice."""
        layers = range(self.model.config.layers)
        choices = [self._choice(layer) for layer in layers]
        if self.settings.cluster == "none":
            return [[layer] for layer in layers], choices
        errors = [[self._row(layer, spec)["e_o"] for spec in choices[layer]] for layer in layers]
        return cluster(choices, errors, self.settings.cluster), choices

    def named_groups(self) -> list[dict[str, Any]]:
        """The `layers` of every group, and its `candidates` by their names in `errors`."""
        groups, choices = self.groups()
        kept = [[cross_layer.label(self._top(spec)) for spec in choices[group[0]]] for group in groups]
        return [{"layers": group, "candidates": names} for group, names in zip(groups, kept, strict=True)]

    def _choice(self, layer: int) -> list[CacheSpec]:
        """The candidates that NSGA-II has at a layer."""
        if self.settings.prune == "none":
            return list(self.candidates)
        if self.settings.prune == "paper":
            return self._pruned(layer, dataclasses.replace(self.bits, kind="nominal"), "e_o")
        return self._pruned(layer, self.bits, self._nats)

    @property
    def _nats(self) -> str:
        """The error that prunes: a layer's KL, measured where the search measures it; e_o drops the better pairs."""
        return "kld" if self.settings.error == "kld" else "predicted"

    def _pruned(self, layer: int, bits: Bits, error: str) -> list[CacheSpec]:
        """The candidates that no other beats in both bits and error at a layer, most bits first."""
        return pareto(
            self.candidates, lambda spec: bits.of(self._top(spec)), lambda spec: self._row(layer, spec)[error]
        )

    def _top(self, candidate: CacheSpec) -> CacheSpec:
        """The candidate where all layers have it, at the top: above the base of a run."""
        return self.uniform[self.candidates.index(candidate)].specs[-1]

    def _row(self, layer: int, candidate: CacheSpec) -> Row:
        return self.errors()[layer, cross_layer.label(self._top(candidate))]

    # ---- what is handed over

    def front(self, plans: Sequence[CachePlan]) -> list[Row]:
        """A row per evaluated plan, uniform ones among them; last the best one that fits the budget: the chosen."""
        kinds = dict.fromkeys(plans, "search") | dict.fromkeys(self.uniform, "uniform")
        best = min(filter(self.bits.fits, kinds), key=self.loss)
        asked = {key: getattr(self.settings, key) for key in ("method", "objective", "error", "seed")}
        common = {"experiment": "tune", **self.identity, **asked} | records.provenance()
        rows = [common | {"kind": kind} | self._describe(plan) for plan, kind in kinds.items()]
        return [*rows, common | {"kind": "chosen", "was": kinds[best]} | self._describe(best)]

    def _describe(self, plan: CachePlan) -> Row:
        return {
            "cache": str(plan),
            "bits_nominal": plan.bits_nominal,
            "bits_asymptotic": plan.bits_asymptotic,
            "bits_real": plan.bits_real(self.context),
            "predicted": self.predicted(plan),
            **self.evaluations(plan),
        }

    def predicted(self, plan: CachePlan) -> float | None:
        """The sum of the layers' errors, where they are in nats and were measured."""
        if not self._errors or self.settings.error == "e_o":
            return None
        return sum(self.error(layer, spec) for layer, spec in enumerate(plan.specs))
