"""The search for a plan: sensitivity, pruning, clustering, search, and a plan file with its card.

    python -m experiments.tune --config=configs/tune.py --config.budget=3.25 --workdir=DIR

Leaves DIR/plan.yaml, DIR/front.jsonl and pictures. Every stage goes on where it was cut off: errors of layers are
rows of DIR/sensitivity.jsonl, evaluated plans lie in DIR/evaluations, NSGA-II's trials in DIR/journal.log, which more
processes may share (--config.worker=1, ...).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from ml_collections import config_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments import program, tune_pictures
from experiments.perplexity import identity_of
from kvjax import records
from kvjax.caches import cross_layer
from kvjax.caches.base import REAL_DTYPE, CacheShape, CacheSpec
from kvjax.caches.grammar import split_list
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Score, cut_windows
from kvjax.evaluate.tasks import accuracy, agreement, load_gsm8k
from kvjax.evaluate.text import load_text
from kvjax.files import write_atomically
from kvjax.generation.generate import generate
from kvjax.models.model import Model
from kvjax.tuner import sensitivity
from kvjax.tuner.evaluations import Evaluations, locked
from kvjax.tuner.evolve import evolve
from kvjax.tuner.knapsack import knapsack
from kvjax.tuner.refine import refine
from kvjax.tuner.simulate import Simulator
from kvjax.tuner.space import Bits, cluster, default_candidates, pareto, resolved

CHOICES = {
    "mode": ("kivi", "token"),
    "method": ("knapsack", "nsga2", "refine"),
    "error": ("predicted", "kld", "e_o"),
    "prune": ("nominal", "asymptotic", "none"),
    "cluster": ("group", "singletons", "none"),
    "objective": ("kld", "nll", "top1", "agreement", "gsm8k"),
    "dtype": ("float32", "bfloat16", "float64"),
}
EXPECTED = ("kld", "nll", "top1", "bits_nominal", "bits_asymptotic", "bits_real")
SAMPLES = 2  # draws of every token's prediction, for the prediction of KL
NEW_TOKENS = {"agreement": 64, "gsm8k": 256}
Row = dict[str, Any]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    _check(config)
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model = load(config.model, config.dtype)
    search = Search(config, model, calibration(config, model), workdir)
    started = time.perf_counter()
    plans = search.plans()
    rows = search.front(plans)
    chosen = next(row for row in rows if row["kind"] == "chosen")
    _write_plan(search, chosen, rows, time.perf_counter() - started)
    records.write_rows(workdir / "front.jsonl", rows)
    search.draw(rows)
    Console(width=150).print(_table(rows))
    print(f"plan: {workdir / 'plan.yaml'}\nfront: {workdir / 'front.jsonl'}\npictures: {workdir}/*.png")


def calibration(config: config_dict.ConfigDict, model: Model) -> np.ndarray:
    """The windows [w, n] of all texts."""
    texts = (model.tokenizer.encode(load_text(name)) for name in split_list(config.text))
    return np.concatenate([cut_windows(ids, config.context, config.windows, config.offset) for ids in texts])


def _check(config: config_dict.ConfigDict) -> None:
    for field, values in CHOICES.items():
        if config[field] not in values:
            raise KvjaxError(f"{field}={config[field]!r}; expected one of {', '.join(values)}")
    for field in ("points", "trials", "rounds", "count"):
        if config[field] < 1:
            raise KvjaxError(f"{field}={config[field]}; expected at least 1")
    if min(config.seed, config.worker, config.shots) < 0 or config.seed >= 2**32:
        seeds = f"seed={config.seed}, worker={config.worker}, shots={config.shots}"
        raise KvjaxError(f"{seeds}; expected at least 0, and a seed below 2**32")
    if not 0 < config.budget < math.inf or not 0 <= config.budget_asymptotic < math.inf:
        budgets = f"budget={config.budget}, budget_asymptotic={config.budget_asymptotic}"
        raise KvjaxError(f"{budgets}; expected bits above 0, and budget_asymptotic=0 where budget counts")
    if config.objective in NEW_TOKENS and not config.problems:
        raise KvjaxError(f"objective={config.objective} needs problems; expected GSM8K's jsonl file")


class Search:
    """One search: its candidates, what was measured, and the methods."""

    def __init__(self, config: config_dict.ConfigDict, model: Model, windows: np.ndarray, workdir: Path):
        self.config, self.model, self.windows, self.workdir = config, model, windows, workdir
        self.shape = CacheShape.of(model.config, 1, config.context, REAL_DTYPE)
        kind = "asymptotic" if config.budget_asymptotic else "nominal"
        budget = config.budget_asymptotic or config.budget
        self.bits = Bits(kind, budget, self.shape)
        names = split_list(config.candidates) if config.candidates else default_candidates(config.mode)
        self.candidates = resolved(names, model.config)
        self.uniform = [CachePlan.uniform(spec, model.config) for spec in self.candidates]
        least = min(self.bits.of_plan(plan) for plan in self.uniform)
        if least > budget + 1e-9:
            raise KvjaxError(f"budget={budget} {kind} bits; expected at least {least:g}, the least of the candidates")
        self.identity = identity_of(config, model, windows, "streaming")
        self.objective = _objective(config, model)
        identity = self.identity | self.objective.identity
        figures = ("kld", "nll", "top1", *({config.objective} & NEW_TOKENS.keys()))
        self.evaluations = Evaluations(workdir / "evaluations", identity, self._evaluate, figures)
        self._simulator: Simulator | None = None
        self._errors: dict[tuple[int, str], Row] = {}
        self._complete = False  # whether they are those of all candidates

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
        score = Score.of(simulator.score(plan))
        figures = {"kld": score.kld, "nll": score.nll, "top1": score.top1} | self.objective.measure(plan)
        return figures | {"seconds": time.perf_counter() - start}

    def loss(self, plan: CachePlan) -> float:
        """What the search makes small."""
        figures = self.evaluations(plan)
        name = self.config.objective
        return figures[name] if name in ("kld", "nll") else 1 - figures[name]

    def errors(self) -> dict[tuple[int, str], Row]:
        """A row for every layer and candidate, from disk where it is there; by the candidate's name in its place."""
        if self._complete:
            return self._errors
        # Processes that share a folder measure one after the other: the first measures, the others read.
        with locked(self.workdir / "sensitivity.lock"):
            self._errors, self._complete = self._measured(self.workdir / "sensitivity.jsonl"), True
        return self._errors

    def _measured(self, file: Path) -> dict[tuple[int, str], Row]:
        """The rows of a file and, appended to it, those that it lacked."""
        layers, specs = self.model.config.layers, self._places()
        common = {"experiment": "sensitivity", **self.identity, "samples": SAMPLES, "seed": self.config.seed}
        needed = {"layer", "cache", "bits_asymptotic", "e_o", self.config.error}
        rows = [row for row in records.read_rows(file) if common.items() <= row.items() and needed <= row.keys()]
        found = {(row["layer"], row["cache"]): row for row in rows}
        names = {spec: cross_layer.label(spec) for spec in specs}
        missing = [[spec for spec in specs if (layer, names[spec]) not in found] for layer in range(layers)]
        gradients = None
        with progress_bar() as progress:
            task = progress.add_task("sensitivity", total=layers, completed=sum(not m for m in missing))
            for layer, some in enumerate(missing):
                if not some:
                    continue
                if gradients is None:
                    count = range(len(self.windows))
                    gradients = [sensitivity.gradients(self.simulator, w, SAMPLES, self.config.seed) for w in count]
                rows = self._measure(layer, some, gradients)
                records.append_rows(file, [common | row | records.provenance() for row in rows])
                found |= {(layer, row["cache"]): row for row in rows}
                progress.advance(task)
        return found

    def _measure(self, layer: int, specs: Sequence[CacheSpec], gradients: Any) -> list[Row]:
        local = sensitivity.local_errors(self.simulator, layer, specs, gradients)
        rows = []
        for spec, figures in zip(specs, local, strict=True):
            row = {"layer": layer, "cache": cross_layer.label(spec), **_bits(spec, self.shape), **figures}
            if self.config.error == "kld":
                row["kld"] = sensitivity.measured(self.simulator, layer, spec)
            rows.append(row)
        return rows

    def _places(self) -> list[CacheSpec]:
        """What the candidates store in all their places."""
        return list(dict.fromkeys(cross_layer.canonical(spec) for plan in self.uniform for spec in plan.specs))

    def error(self, layer: int, spec: CacheSpec) -> float:
        return self.errors()[layer, cross_layer.label(spec)][self.config.error]

    # ---- the methods

    def plans(self) -> list[CachePlan]:
        """What the method comes to, best candidates for the budget among it, evaluated."""
        plans = {"knapsack": self._knapsack, "refine": self._refine, "nsga2": self._nsga2}[self.config.method]()
        with progress_bar() as progress:
            for plan in progress.track([*plans, *self.uniform], description="evaluating"):
                self.evaluations(plan)
        return plans

    def knapsack_front(self) -> list[CachePlan]:
        """The front under additive errors, most bits first."""
        choices = [self.candidates] * self.model.config.layers
        return [plan for plan, _ in knapsack(choices, self.bits.of, self.error, self.model.config)]

    def _knapsack(self) -> list[CachePlan]:
        """The budget's plan, and some of the front below it, evenly spread over the bits."""
        front = self.knapsack_front()
        ends = self.bits.of_plan(front[-1]), min(self.bits.of_plan(front[0]), self.bits.budget)
        targets = np.linspace(*ends, self.config.points)
        spread = [min(front, key=lambda plan, t=t: abs(self.bits.of_plan(plan) - t)) for t in targets]  # type: ignore[misc]
        return list(dict.fromkeys([self._for_budget(front), *spread]))

    def _for_budget(self, front: list[CachePlan]) -> CachePlan:
        return next(plan for plan in front if self.bits.fits(plan))

    def _refine(self) -> list[CachePlan]:
        known = filter(self.bits.fits, self.uniform)
        start = min([self._for_budget(self.knapsack_front()), *known], key=self.loss)
        choices = []
        for layer, spec in enumerate(start.specs):  # pruned or not, the plan's own is a choice
            names = {str(spec), *map(str, self._pruned(layer, self.bits.of, self.config.error))}
            some = [each for each in self.candidates if str(each) in names]
            choices.append(sorted(some, key=lambda each: self.bits.of(self._top(each)), reverse=True))
        plans: list[CachePlan] = []
        with progress_bar() as progress:
            task = progress.add_task("refining", total=self.config.rounds + 1)
            rounds = refine(start, choices, self.bits, self.loss, self.config.rounds, self.model.config)
            for plan, loss in rounds:
                if plans:
                    self.simulator.forget(plans[-1])
                self.simulator.keep(plan)
                plans.append(plan)
                progress.update(task, advance=1, description=f"refining, {self.config.objective} {loss:.5f}")
        return plans

    def _nsga2(self) -> list[CachePlan]:
        groups, choices = self.groups()
        config, names = self.config, [[str(spec) for spec in choice] for choice in choices]
        identity = [self.evaluations.identity, names, groups, config.objective, self.bits.kind, self.bits.budget]
        name = hashlib.sha256(json.dumps([*identity, config.seed]).encode())
        with progress_bar() as progress:
            task = progress.add_task("NSGA-II", total=config.trials)
            return evolve(
                *(self.workdir / "journal.log", name.hexdigest()[:16], groups, choices, self.bits, self.loss),
                *(config.trials, (config.seed, config.worker), self.model.config),
                lambda ended: progress.update(task, completed=ended),
            )

    def groups(self) -> tuple[list[list[int]], list[list[CacheSpec]]]:
        """Layers that share a choice, and every layer's choice."""
        layers = range(self.model.config.layers)
        choices = [list(self.candidates) for _ in layers]
        if self.config.prune != "none":
            bits = dataclasses.replace(self.bits, kind=self.config.prune)
            choices = [self._pruned(layer, bits.of, "e_o") for layer in layers]
        if self.config.cluster == "none":
            return [[layer] for layer in layers], choices
        errors = [[self._row(layer, spec)["e_o"] for spec in choices[layer]] for layer in layers]
        return cluster(choices, errors, self.config.cluster), choices

    def _pruned(self, layer: int, bits: Callable[[CacheSpec], float], error: str) -> list[CacheSpec]:
        return pareto(self.candidates, lambda spec: bits(self._top(spec)), lambda spec: self._row(layer, spec)[error])

    def _top(self, candidate: CacheSpec) -> CacheSpec:
        """The candidate where all layers have it, at the top: above the base of a run."""
        return self.uniform[self.candidates.index(candidate)].specs[-1]

    def _row(self, layer: int, candidate: CacheSpec) -> Row:
        return self.errors()[layer, cross_layer.label(self._top(candidate))]

    # ---- what is handed over

    def front(self, plans: Sequence[CachePlan]) -> list[Row]:
        """A row per evaluated plan; the best one that fits the budget, uniform or not, is the chosen one."""
        kinds = dict.fromkeys(plans, "search") | dict.fromkeys(self.uniform, "uniform")
        best = min(filter(self.bits.fits, kinds), key=self.loss)
        config = {key: self.config[key] for key in ("method", "objective", "error", "seed", "dtype")}
        common = {"experiment": "tune", **self.identity, **config} | records.provenance()
        rows = [common | {"kind": kind} | self._describe(plan) for plan, kind in kinds.items()]
        return [*rows, common | {"kind": "chosen", "was": kinds[best]} | self._describe(best)]

    def _describe(self, plan: CachePlan) -> Row:
        return {
            "cache": str(plan),
            "bits_nominal": plan.bits_nominal,
            "bits_asymptotic": plan.bits_asymptotic,
            "bits_real": plan.bits_real(self.config.context),
            "predicted": self.predicted(plan),
            **self.evaluations(plan),
        }

    def predicted(self, plan: CachePlan) -> float | None:
        """The sum of the layers' errors, where they are in nats and were measured."""
        if not self._errors or self.config.error == "e_o":
            return None
        return sum(self.error(layer, spec) for layer, spec in enumerate(plan.specs))

    def draw(self, rows: list[Row]) -> None:
        """The pictures."""
        tune_pictures.front(rows, self.workdir / "front.png")
        if self._errors:
            layers = range(self.model.config.layers)
            errors = [self._errors[layer, cross_layer.label(spec)] for layer in layers for spec in self._places()]
            tune_pictures.heat_map(errors, self.config.error, self.workdir / "sensitivity.png")
            groups, choices = self.groups()
            kept = [[cross_layer.label(self._top(spec)) for spec in choices[group[0]]] for group in groups]
            named = [{"layers": g, "candidates": names} for g, names in zip(groups, kept, strict=True)]
            tune_pictures.clusters(errors, named, self.workdir / "clusters.png")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is measured of a plan beside KL, nll and top-1 agreement, and what that depends on."""

    identity: dict[str, Any]
    measure: Callable[[CachePlan], dict[str, float]]


def _objective(config: config_dict.ConfigDict, model: Model) -> Objective:
    if config.objective not in NEW_TOKENS:
        return Objective({}, lambda plan: {})
    problems = load_gsm8k(Path(config.problems))
    needed = config.count + config.shots
    if len(problems) < needed:
        raise KvjaxError(f"{config.problems} has {len(problems)} problems; expected count + shots = {needed}")
    some, shots = problems[: config.count], problems[config.count : needed]
    identity = {"objective": config.objective, "count": config.count}
    asked = hashlib.sha256(json.dumps([[p.question, p.answer] for p in problems[:needed]]).encode()).hexdigest()
    identity |= {"problems_sha256": asked, "shots": config.shots if config.objective == "gsm8k" else 0}
    tokens = NEW_TOKENS[config.objective]
    if config.objective == "gsm8k":
        return Objective(
            identity, lambda plan: {"gsm8k": accuracy(model, plan, some, shots, max_new_tokens=tokens).share}
        )
    questions = [problem.question for problem in some]
    dense: list[list[list[int]]] = []

    def greedy(plan: CachePlan) -> list[list[int]]:
        return generate(model, questions, plan, max_new_tokens=tokens, chat=True).tokens

    def measure(plan: CachePlan) -> dict[str, float]:
        if not dense:
            dense.append(greedy(CachePlan.parse("dense", model.config)))
        return {"agreement": agreement(dense[0], greedy(plan)).share}

    return Objective(identity, measure)


def _bits(spec: CacheSpec, shape: CacheShape) -> dict[str, float]:
    return {"bits_nominal": spec.bits_nominal, "bits_asymptotic": spec.bits_asymptotic(shape)}


def progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True))


def _write_plan(search: Search, chosen: Row, rows: list[Row], seconds: float) -> None:
    """DIR/plan.yaml: the plan in our grammar, and its card. Beside it KVTuner's YAML, where it can say the plan."""
    config = search.config
    plan = CachePlan.parse(chosen["cache"], search.model.config)
    calibration = {key: search.identity[key] for key in ("text", "tokens_sha256", "context", "windows", "offset")}
    front = pareto(rows[:-1], lambda row: row["bits_asymptotic"], lambda row: row["kld"])
    card = {
        "model": search.identity["model"],
        "model_sha256": search.identity["model_sha256"],
        "calibration": calibration | {"dtype": config.dtype},
        "search": {
            **{key: config[key] for key in ("method", "objective", "error", "seed")},
            "candidates": [str(spec) for spec in search.candidates],
            "budget": search.bits.budget,
            "budget_of": f"{search.bits.kind} bits",
            "seconds": round(seconds, 1),
        },
        "expected": {key: chosen[key] for key in EXPECTED},
        "front": [[row["bits_asymptotic"], row["kld"]] for row in front],
        "made_with": {key: chosen[key] for key in ("device", "versions", "git")},
    }
    text = yaml.safe_dump({"plan": str(plan), "card": card}, sort_keys=False, width=1000)
    write_atomically(search.workdir / "plan.yaml", text.encode())
    for mode, name in {"token": "kvtuner_pertoken.yaml", "kivi": "kvtuner_kivi.yaml"}.items():
        file = search.workdir / name
        file.unlink(missing_ok=True)  # of an earlier plan
        if all(type(spec) is KV and spec == KV(spec.key_bits, spec.value_bits, mode) for spec in plan.specs):
            write_atomically(file, plan.preset().encode())


def _table(rows: list[Row]) -> Table:
    first = rows[0]
    title = "{model} ({dtype}), calibrated on {text}: {windows} windows of {context} tokens each; {method}".format(
        **first
    )
    table = Table(title=title, title_justify="left")
    table.add_column("cache", overflow="ellipsis", no_wrap=True, max_width=60)
    for name in ("kind", "bits", "with scales", "KL", "predicted", "nll", "top-1"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: (row["kind"] == "chosen", row["bits_asymptotic"])):
        predicted = "" if row["predicted"] is None else f"{row['predicted']:.5f}"
        bits = f"{row['bits_nominal']:.2f}", f"{row['bits_asymptotic']:.2f}"
        figures = f"{row['kld']:.5f}", predicted, f"{row['nll']:.4f}", f"{row['top1']:.3f}"
        table.add_row(row["cache"], row["kind"], *bits, *figures)
    return table


if __name__ == "__main__":
    program.run(main, "configs/tune.py")
