"""One search: sensitivity, pruning, clustering, the methods, and the front that they come to.

Every stage goes on where it was cut off: errors of layers are rows of FOLDER/sensitivity.jsonl, evaluated plans lie
in FOLDER/evaluations, NSGA-II's trials in FOLDER/journal.log, which more processes may share.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from kvjax import records
from kvjax.caches.base import REAL_DTYPE, CacheShape, CacheSpec
from kvjax.caches.cross_layer import Place
from kvjax.caches.grammar import split_list
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import check_calibrated
from kvjax.checks import check_progress
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Score
from kvjax.models.model import Model
from kvjax.tuner import heads
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.knapsack import Error, knapsack, reachable
from kvjax.tuner.layer_errors import LayerErrors, Row, Rows
from kvjax.tuner.objective import make_objective
from kvjax.tuner.refine import near, refine
from kvjax.tuner.settings import ANSWERS, SearchSettings
from kvjax.tuner.simulate import Simulator
from kvjax.tuner.space import Bits, cluster, default_candidates, halving_order, pareto, resolved

FINALISTS = 5  # plans that are compared on the validation windows
Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): a stage may have more to say after a comma, as in `refining, kld 0.01`."""


class Search:
    """One search: its candidates, what was measured, and the methods.

    Attributes:
      candidates: resolved for the model; uniform: a plan of each for all layers.
      bits: what plans are counted by, and the budget.
      evaluations: figures of plans, each made once.
      layer_errors: of single layers, each measured once.
    """

    def __init__(
        self,
        settings: SearchSettings,
        model: Model,
        windows: Int[np.ndarray, "w n"],
        identity: dict[str, Any],
        folder: Path,
        progress: Progress | None = None,
        validation: Evaluations | None = None,
    ):
        """Checks all that can be checked before anything is computed.

        Args:
          settings: what is asked for.
          model: the model that is searched for.
          windows: token ids to calibrate on.
          identity: what two searches must share for their windows to be the same.
          folder: where measurements are kept.
          progress: hears how far each stage is.
          validation: evaluates plans on windows that they were not found on; chooses among the best of them.

        Raises:
          KvjaxError: candidates that the model cannot hold, that a search cannot evaluate or that are all beyond the
            budget; problems that cannot be read; a progress that cannot be called.
        """
        self.settings, self.model, self.windows, self.identity = settings, model, windows, identity
        self.folder, self.progress, self.validation = folder, check_progress(progress), validation
        self.context = windows.shape[1]
        self.dense = CachePlan.parse("dense", model.config)
        self.bits = Bits(settings.budget_of, settings.budget, self._shape(settings.budget_context))
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
        self.layer_errors = LayerErrors(
            *(folder, identity, settings.seed, windows.size, self._shape(self.context)),
            *(lambda: self.simulator, lambda *counts: self.progress("sensitivity", *counts)),
        )
        self._errors: Rows = {}
        self._joint: dict[CacheSpec, float] = {}
        self._by_head: list[dict[CacheSpec, float]] = []

    def _shape(self, tokens: int) -> CacheShape:
        return CacheShape.of(self.model.config, 1, tokens, REAL_DTYPE)

    def _check_candidates(self) -> None:
        for plan in self.uniform:
            plan.require_whole_windows("a search")
            check_calibrated(self.model, plan)
        if self.settings.by == "head":
            heads.pairs_of(self.candidates)
        budget, least = self.bits.budget, min(self.bits.of_plan(plan) for plan in self.uniform)
        if least > budget + 1e-9:
            raise KvjaxError(f"budget={budget} {self.bits}; expected at least {least:g}, the least of the candidates")

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
        return self._loss(self.evaluations(plan))

    def _loss(self, figures: Row) -> float:
        name = self.settings.objective
        figure = figures[name]
        return figure if name in ("kld", "nll") else 1 - figure

    def errors(self) -> Rows:
        """A row for every layer and each place that a plan may have there, from disk where it is there."""
        if not self._errors:
            choices = self._everywhere(self.candidates)
            self._errors = self._errors_around(self.dense, choices)
            self._joint = _joint_shares(self._errors, choices)
        return self._errors

    def _errors_around(self, plan: CachePlan, choices: Sequence[Sequence[CacheSpec]]) -> Rows:
        places = [[Place.of(*pair) for pair in pairs] for pairs in reachable(choices)]
        error = self.settings.error if plan == self.dense else "predicted"
        return self.layer_errors.around(plan, places, error)

    def measured_errors(self) -> list[Row]:
        """A row for every layer and candidate, as it is where all layers have it; none where none was needed."""
        layers = range(self.model.config.layers if self._errors else 0)
        return [self._row(layer, spec) | {"cache": str(spec)} for layer in layers for spec in self.candidates]

    def error(self, layer: int, spec: CacheSpec, below: CacheSpec | None) -> float:
        """The error of one layer with the spec in its place, stacked on the one below.

        A predicted one is scaled by what tokens have in common, so that errors of several methods compare.
        """
        place = Place.of(spec, below)
        row = self.errors().get((layer, place.label))
        if row is None:  # no candidate, but pairs that heads chose from these
            return self.head_choices()[layer][spec]
        return self._in_common(row[self.settings.error], place.spec)

    def _in_common(self, error: float, spec: CacheSpec) -> float:
        return error * self._joint[spec.program_form] if self.settings.error == "predicted" else error

    # ---- the methods

    def plans(self) -> list[CachePlan]:
        """What the method comes to, best candidates for the budget among it, evaluated."""
        plans = {"knapsack": self._knapsack, "refine": self._refine, "nsga2": self._nsga2}[self.settings.method]()
        if self.settings.by == "head":
            plans = list(dict.fromkeys([*plans, *filter(None, [self._within(self.head_front())])]))
        compared = [*plans, *self.uniform]
        self.progress("evaluating", 0, len(compared))
        for count, plan in enumerate(compared, 1):
            self.evaluations(plan)
            self.progress("evaluating", count, len(compared))
        return plans

    def knapsack_front(self, candidates: Sequence[CacheSpec]) -> list[CachePlan]:
        """The front of some candidates under additive errors, most bits first."""
        choices = self._everywhere(candidates)
        return [plan for plan, _ in knapsack(choices, self.bits.of, self.error, self.model.config)]

    def head_front(self) -> list[CachePlan]:
        """The front of a choice for each kv head under additive errors, most bits first."""
        found = self.head_choices()
        error = lambda layer, spec, below: found[layer][spec]  # noqa: E731
        return [plan for plan, _ in knapsack([[*each] for each in found], self.bits.of, error, self.model.config)]

    def head_choices(self) -> list[dict[CacheSpec, float]]:
        """Of every layer, the specs with a choice for each kv head that no other beats, with their errors."""
        if not self._by_head:
            pairs, model = heads.pairs_of(self.candidates), self.model.config
            single = [heads.alone(pair, head, model) for pair in pairs for head in range(model.kv_heads)]
            rows = self._errors_around(self.dense, self._everywhere(single))
            self.errors()

            def error(layer: int, head: int, pair: KV) -> float:
                found = rows[layer, str(heads.alone(pair, head, model))][self.settings.error]
                return self._in_common(found, pair)

            for layer in range(model.layers):
                of_layer = functools.partial(error, layer)
                self._by_head.append(heads.choices(pairs, self.bits.of, of_layer, model))
        return self._by_head

    def _everywhere(self, candidates: Sequence[CacheSpec]) -> list[Sequence[CacheSpec]]:
        return [candidates] * self.model.config.layers

    def _knapsack(self) -> list[CachePlan]:
        """The budget's plan, and some of the front below it, evenly spread over the bits."""
        front = self.knapsack_front(self.candidates)
        ends = self.bits.of_plan(front[-1]), min(self.bits.of_plan(front[0]), self.bits.budget)
        targets = np.linspace(*ends, self.settings.points)
        targets = targets[halving_order(len(targets))]  # few evaluations cover the front, too
        spread = [min(front, key=lambda plan, t=t: abs(self.bits.of_plan(plan) - t)) for t in targets]  # type: ignore[misc]
        return list(dict.fromkeys([*filter(None, [self._within(front)]), *spread]))

    def _within(self, front: list[CachePlan]) -> CachePlan | None:
        """The plan of a front that makes most of the budget; None where all are beyond it."""
        return next(filter(self.bits.fits, front), None)

    def _refine(self) -> list[CachePlan]:
        """Every family alone, then all candidates from the best plan so far: together they cannot lose to one."""
        found: list[CachePlan] = []
        families = self._families()
        for count, family in enumerate(families):
            mine = [plan for plan, spec in zip(self.uniform, self.candidates, strict=True) if spec in family]
            known = [*filter(self.bits.fits, mine), *(found if len(family) == len(self.candidates) else [])]
            starts = [*filter(None, [self._within(self.knapsack_front(family))]), *known]
            for plan, loss in self._rounds(min(starts, key=self.loss), family) if starts else []:
                found.append(plan)
                self.progress(f"refining, {self.settings.objective} {loss:.5f}", count, len(families))
        self.progress("refining", len(families), len(families))
        return list(dict.fromkeys(found))

    def _families(self) -> list[list[CacheSpec]]:
        """The candidates of each method and mode, and last all of them where there are several."""
        families: dict[Any, list[CacheSpec]] = {}
        for spec in self.candidates:
            families.setdefault((type(spec), getattr(spec, "mode", None)), []).append(spec)
        return [*families.values(), *([[*self.candidates]] if len(families) > 1 else [])]

    def _rounds(self, start: CachePlan, family: Sequence[CacheSpec]) -> Iterator[tuple[CachePlan, float]]:
        """The start, and ever better plans, with their losses."""
        neighbours = functools.partial(near, candidates=family, size=lambda spec: self.bits.of(self._top(spec)))
        settings = self.settings.rounds, self.model.config
        return refine(start, neighbours, self.bits, self.loss, self._linearise, *settings)

    def _linearise(self, plan: CachePlan, choices: list[list[CacheSpec]]) -> Error:
        """The predicted errors of layers around a plan."""
        rows = self._errors_around(plan, choices)
        if self._simulator:
            self._simulator.forget(plan)
        return lambda layer, spec, below: rows[layer, Place.of(spec, below).label]["predicted"]

    def _nsga2(self) -> list[CachePlan]:
        from kvjax.tuner.evolve import evolve  # by Optuna, an extra, which the settings have asked for

        groups, choices = self.groups()
        settings, names = self.settings, [[str(spec) for spec in choice] for choice in choices]
        identity = [self.evaluations.identity, names, groups, settings.objective, str(self.bits), self.bits.budget]
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
        """The `layers` of every group, and its `candidates` by their names."""
        groups, choices = self.groups()
        kept = [[str(spec) for spec in choices[group[0]]] for group in groups]
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
        """The candidate's errors at a layer where all layers have it."""
        specs = self.uniform[self.candidates.index(candidate)].specs
        return self.errors()[layer, Place.of(specs[layer], specs[layer - 1] if layer else None).label]

    # ---- what is handed over

    def choose(self, plans: Iterable[CachePlan]) -> CachePlan:
        """The best plan within the budget: of those that are best on the calibrated windows, by the validation's."""
        finalists = sorted(filter(self.bits.fits, plans), key=self.loss)[:FINALISTS]
        if self.validation is None or self.settings.objective in ANSWERS:
            return finalists[0]
        for count, plan in enumerate(finalists, 1):
            self.validation(plan)
            self.progress("validating", count, len(finalists))
        return min(finalists, key=lambda plan: self._loss(self.validation(plan)))  # type: ignore[misc]

    def front(self, plans: Sequence[CachePlan]) -> list[Row]:
        """A row per evaluated plan, uniform ones among them; last the chosen one."""
        kinds = dict.fromkeys(plans, "search") | dict.fromkeys(self.uniform, "uniform")
        best = self.choose(kinds)
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
        pairs = zip(plan.specs, (None, *plan.specs), strict=False)
        return sum(self.error(layer, *pair) for layer, pair in enumerate(pairs))


def _joint_shares(rows: Rows, choices: Sequence[Sequence[CacheSpec]]) -> dict[CacheSpec, float]:
    """What `joint` is of `predicted`, for each form of cache: the mean over its layers and places."""
    ratios: dict[CacheSpec, list[float]] = {}
    for layer, pairs in enumerate(reachable(choices)):
        for place in {Place.of(*pair) for pair in pairs}:
            row, own = rows[layer, place.label], ratios.setdefault(place.spec.program_form, [])
            own += [row["joint"] / row["predicted"]] if row["predicted"] > 0 else []
    return {form: float(np.mean(own or [1.0])) for form, own in ratios.items()}
