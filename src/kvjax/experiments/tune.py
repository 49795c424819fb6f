"""The search for a plan: sensitivity, pruning, clustering, search, and a plan file with its card.

    kvjax tune --config.budget=3.25 --workdir=DIR

Leaves DIR/plan.yaml, DIR/front.jsonl and pictures. With --config.judged_on=TEXT, the plan's card also says how good
it is on that text, which must be another than the one calibrated on. Every stage goes on where it was cut off: errors
of layers are rows of DIR/sensitivity.jsonl, evaluated plans lie in DIR/evaluations, NSGA-II's trials in
DIR/journal.log, which more processes may share (--config.worker=1, ...).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from kvjax import hosts, records
from kvjax.caches import modelopt
from kvjax.caches.grammar import split_list
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.evaluate import calibrated as evaluated
from kvjax.evaluate.sweep import identity_of
from kvjax.experiments import bars, dry_run, program, style, tune_pictures
from kvjax.experiments.printed import print_table
from kvjax.files import write_atomically
from kvjax.models.model import Model
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.judge import make_judge, make_validation
from kvjax.tuner.search import Search
from kvjax.tuner.settings import SearchSettings
from kvjax.tuner.space import default_candidates
from kvjax.tuner.tune import Tuning

Row = dict[str, Any]
Chooser = tuple[np.ndarray, Evaluations]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    settings_of(config)  # refuses bad values before the model is loaded
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model = program.load(config, config.judged_on)
    windows = calibration(config, model)
    chooser = validation(config, model, workdir)
    search, judge = make_search(config, model, windows, workdir, chooser), None
    if config.judged_on:
        seen, sizes = seen_by(windows, chooser), (config.context, config.windows)
        judge = make_judge(model, config.text, seen, config.judged_on, *sizes, workdir / "judgements")
    with bars.shown() as search.progress:
        tuning = Tuning.of(search, judge)
    hosts.on_first(lambda: _leave(search, tuning, workdir))
    _print(tuning.rows)
    if judged := tuning.card.get("judged"):
        print("judged on {text}: KL {kld:.5f}, nll {nll:.4f}, top-1 {top1:.3f}".format(**judged))
    print(f"plan: {workdir / 'plan.yaml'}\nfront: {workdir / 'front.jsonl'}")


def _leave(search: Search, tuning: Tuning, workdir: Path) -> None:
    """What the program leaves in its folder."""
    tuning.save(workdir / "plan.yaml")
    _write_presets(tuning.plan, workdir)
    records.write_rows(workdir / "front.jsonl", tuning.rows)
    draw(search, tuning.rows, workdir)


def settings_of(config: config_dict.ConfigDict) -> SearchSettings:
    """The search's settings among a program's."""
    return SearchSettings.of({field.name: config[field.name] for field in dataclasses.fields(SearchSettings)})


def calibration(config: config_dict.ConfigDict, model: Model) -> np.ndarray:
    """The windows [w, n] of all texts."""
    return evaluated.calibration(model, config.text, config.context, config.windows, config.offset)


def validation(config: config_dict.ConfigDict, model: Model, workdir: Path) -> Chooser | None:
    """The windows after those of `calibration`, and what evaluates plans on them; None where the config has 0."""
    sizes = config.context, config.windows, config.offset, config.validation
    return make_validation(model, config.text, *sizes, workdir / "validation")


def seen_by(windows: np.ndarray, chooser: Chooser | None) -> np.ndarray:
    """The windows that plans are found and chosen on."""
    return np.concatenate([windows, chooser[0]]) if chooser else windows


def make_search(
    config: config_dict.ConfigDict,
    model: Model,
    windows: np.ndarray,
    workdir: Path,
    chooser: Chooser | None = None,
) -> Search:
    """The search of a config, whose windows are `calibration`'s; `validation`'s choose."""
    identity = identity_of(model, config.text, windows, "streaming", config.windows, config.offset)
    return Search(settings_of(config), model, windows, identity, workdir, validation=chooser and chooser[1])


def draw(search: Search, rows: list[Row], workdir: Path) -> None:
    """The pictures of a search and the rows of its front."""
    style.write(workdir / "front.png", tune_pictures.front, rows)
    if errors := search.measured_errors():
        style.write(workdir / "sensitivity.png", tune_pictures.heat_map, errors, search.settings.error)
        clusters = lambda: tune_pictures.clusters(errors, search.named_groups())  # noqa: E731 - groups need an extra
        style.write(workdir / "clusters.png", clusters)


def _write_presets(plan: CachePlan, workdir: Path) -> None:
    """KVTuner's YAML of the plan and ModelOpt's JSON, where they can say it."""
    quantisation = workdir / "hf_quant_config.json"
    quantisation.unlink(missing_ok=True)  # of an earlier plan
    if modelopt.says(plan.specs):
        write_atomically(quantisation, plan.modelopt().encode())
    for mode, name in {"token": "kvtuner_pertoken.yaml", "kivi": "kvtuner_kivi.yaml"}.items():
        file = workdir / name
        file.unlink(missing_ok=True)
        if all(type(spec) is KV and spec == KV(spec.key_bits, spec.value_bits, mode) for spec in plan.specs):
            write_atomically(file, plan.preset().encode())


def _print(rows: list[Row]) -> None:
    title = "{model} ({dtype}), calibrated on {text}: {windows} windows of {context} tokens each; {method}"
    header = ("cache", "kind", "bits", "with scales", "KL", "nll", "top-1")
    ordered = sorted(rows, key=lambda row: (row["kind"] == "chosen", row["bits_asymptotic"]))
    print_table(title.format(**rows[0]), header, map(_cells, ordered), left=2)


def _cells(row: Row) -> tuple[str, ...]:
    bits = f"{row['bits_nominal']:.2f}", f"{row['bits_asymptotic']:.2f}"
    return row["cache"], row["kind"], *bits, f"{row['kld']:.5f}", f"{row['nll']:.4f}", f"{row['top1']:.3f}"


def sizes(config: config_dict.ConfigDict) -> dry_run.Sizes:
    names = split_list(config.candidates) if config.candidates else default_candidates(config.mode)
    return dry_run.Sizes(names, config.context)


if __name__ == "__main__":
    program.run(main, "configs/tune.py", sizes)
