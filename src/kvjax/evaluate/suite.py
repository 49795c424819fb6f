"""Tasks over plans: result rows of what a model answers with each cache.

    needle(context=2048)   tracking(hops=8,samples=50)   gsm8k(data=FOLDER,seeds=3)      kvjax's own
    arc_easy(samples=200,shots=5)   path/task.yaml   lm_eval:gsm8k                       lm-evaluation-harness's

A task is named as a cache is: its name, and in parentheses the settings that differ from the defaults.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kvjax import hosts, records
from kvjax.caches import fields
from kvjax.caches.base import CacheSpec
from kvjax.caches.grammar import parse_fields, split_list
from kvjax.caches.plan import CachePlan
from kvjax.checks import check_progress
from kvjax.errors import KvjaxError
from kvjax.evaluate.answers import Answers
from kvjax.evaluate.gsm8k import GSM8K
from kvjax.evaluate.ruler import Needle, Tracking
from kvjax.evaluate.sweep import Row, kept_in
from kvjax.evaluate.task import Task
from kvjax.evaluate.text import strip_paths
from kvjax.models.model import Model, check_model

OWN: tuple[type[Task], ...] = (Needle, Tracking, GSM8K)
HARNESS = "lm_eval:"  # before a name that kvjax has too
Progress = Callable[[Task, CachePlan, int, int], None]
"""progress(task, plan, done, total): how many of its requests are answered."""
_NAME = re.compile(r"(?P<name>[^()]+?)\s*(?:\((?P<fields>[^()]*)\))?")


def parse_tasks(names: str | Sequence[str | Task]) -> list[Task]:
    """The tasks of names, each once.

    Args:
      names: names separated by commas, or a list of names and tasks.

    Raises:
      KvjaxError: a name or setting that is not known, or a task of the harness where that is not installed.
    """
    split = split_list(names, "tasks") if isinstance(names, str) else names
    tasks = [each if isinstance(each, Task) else parse_task(each) for each in split]
    if not tasks:
        raise KvjaxError("there are no tasks; expected at least one")
    return list(dict.fromkeys(tasks))


def parse_task(text: str) -> Task:
    """The task of a name; see `parse_tasks`."""
    match = _NAME.fullmatch(text.strip())
    if match is None:
        raise KvjaxError(f"task {text!r}; expected a name, or name(field=value,...)")
    name, settings = match["name"], parse_fields(match["fields"])
    for own in OWN:
        if task := fields.parse(own, name, None, settings):
            return task
    from kvjax.evaluate import lm_eval  # an extra, and seconds of imports, for those who name its tasks

    return lm_eval.parse(name.removeprefix(HARNESS), settings)


def evaluate(
    model: Model,
    tasks: str | Sequence[str | Task],
    caches: str | Sequence[str | CacheSpec | CachePlan],
    *,
    folder: str | Path | None = None,
    batch: int = 8,
    chat: bool = False,
    prefill_chunk: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Asks a model each task with each cache.

    Args:
      model: what `kvjax.load` gives.
      tasks: see `parse_tasks`.
      caches: names separated by commas, or a list of names, specs and plans.
      folder: keeps rows in FOLDER/evaluate.jsonl and answers in FOLDER/answers: a run that was cut off goes on there.
      batch: requests that are answered together.
      chat: put what is asked into the model's chat template.
      prefill_chunk: how prompts of generated texts are read, see `kvjax.generate`.
      progress: called as progress(task, plan, done, total) while requests are answered.

    Returns:
      The rows of each task with each cache, a row for each of its figures.

    Raises:
      KvjaxError: one line that says what was expected; names are checked before anything is computed.
    """
    check_model(model)
    hears = check_progress(progress)
    asked = parse_tasks(tasks)
    names = split_list(caches) if isinstance(caches, str) else caches
    plans = list(dict.fromkeys(CachePlan.cast(name, model.config) for name in names))
    rows: list[Row] = []
    with kept_in(folder) as where:
        for plan in plans:
            for task in asked:
                point = _point(model, task, plan, chat, prefill_chunk)
                tell = lambda done, total, task=task, plan=plan: hears(task, plan, done, total)  # noqa: E731
                answers = Answers(
                    model, plan, batch=batch, chat=chat, prefill_chunk=prefill_chunk, folder=where, progress=tell
                )
                rows += _found_or_asked(where / "evaluate.jsonl", point, task, answers)
    return rows


def _point(model: Model, task: Task, plan: CachePlan, chat: bool, prefill_chunk: int | None) -> Row:
    """What the rows of a task and a plan are found by."""
    return {
        "experiment": "evaluate",
        "model": strip_paths(model.name),
        "model_sha256": model.checksum,
        "dtype": str(model.dtype),
        "task": str(task),
        **task.identity,
        "chat": chat,
        "prefill_chunk": prefill_chunk,
        "cache": str(plan),
    }


def _found_or_asked(file: Path, point: Row, task: Task, answers: Answers) -> list[Row]:
    """The rows of a point, from the file where they are there, else appended to it, all together."""
    if found := hosts.on_first(lambda: records.find_rows(file, point)):
        return found
    plan = answers.plan
    told = {
        "bits_nominal": plan.bits_nominal,
        "bits_asymptotic": plan.bits_asymptotic,
        "simulated": plan.simulated,
        **answers.model.layout.described(),
    }
    rows: list[Row] = []
    for figure in task.figures(answers):
        values: Row = dataclasses.asdict(figure) | {"by_seed": list(figure.by_seed)}
        values["part"] = values.pop("task")
        rows.append(point | told | values | records.provenance())
    hosts.on_first(lambda: records.append_rows(file, rows))
    return rows
