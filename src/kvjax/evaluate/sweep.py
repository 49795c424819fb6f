"""The sweep: plans scored on the same windows of a text, one result row each.

Partial work is kept in a folder, so that a sweep that was cut off goes on where it was: the scores of every batch of
windows in FOLDER/partial, finished rows in FOLDER/results.jsonl.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from kvjax import hosts, records
from kvjax.caches.base import CacheSpec
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import trained_identity
from kvjax.checks import check_path, check_progress, show
from kvjax.errors import KvjaxError
from kvjax.evaluate.calibrated import check_judged
from kvjax.evaluate.perplexity import Score, Scorer, Timing, concatenate, standard_error
from kvjax.evaluate.text import Text, name_of, read_windows, strip_paths
from kvjax.evaluate.vocabulary import DenseRun, TokenScores
from kvjax.extras import needed
from kvjax.models.model import Model, check_model
from kvjax.tables import align_columns, format_figure

Row = dict[str, Any]
Progress = Callable[[CachePlan, int, int], None]
"""progress(plan, done, total): how many of its windows are scored; called first with 0."""
COLUMNS = {
    "bits": "bits_nominal",
    "with scales": "bits_asymptotic",
    "real": "bits_real",
    "peak": "bits_peak",
    "x smaller": "compression",
}
OVER = ("devices", "plans")
FIGURES = {"kld": ".4f", "kld_p99": ".3f", "top1": ".3f", "nll": ".4f", "ppl": ".2f", "seconds": ".1f"}


class Rows(list[Row]):
    """Result rows, one per plan."""

    def to_pandas(self) -> Any:
        """A pandas DataFrame.

        Raises:
          KvjaxError: pandas is not installed.
        """
        with needed("pandas"):
            import pandas
        return pandas.DataFrame(list(self))

    def table(self) -> str:
        """The rows as plain text."""
        lines = [["cache", *COLUMNS, *FIGURES]]
        for row in self:
            bits = [format_figure(row, key, ".2f") for key in COLUMNS.values()]
            figures = [row["error"]] if "error" in row else [format_figure(row, *each) for each in FIGURES.items()]
            lines.append([row["cache"] + " (simulated)" * row["simulated"], *bits, *figures])
        return align_columns(lines, left=1)

    def __repr__(self) -> str:
        return f"<Rows of {', '.join(row['cache'] for row in self)}>"


def sweep(
    model: Model,
    text: Text,
    caches: str | CacheSpec | CachePlan | Sequence[str | CacheSpec | CachePlan],
    *,
    protocol: str = "streaming",
    context: int = 1024,
    windows: int = 4,
    offset: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    over: str = "devices",
) -> Rows:
    """Scores plans on the same windows of a text.

    Args:
      model: what `kvjax.load` gives.
      text: a name, a file, a literal text or token ids, see `kvjax.evaluate.text.read_ids`.
      caches: names separated by commas, see `kvjax.caches.grammar`; a list of names, specs and plans; or one.
      protocol: streaming, decode or parallel, see `kvjax.evaluate.perplexity`.
      context: tokens a window.
      windows: how many windows.
      offset: tokens that are skipped first.
      folder: keeps partial work and rows; a sweep that was cut off goes on there. None: nothing is kept.
      progress: called as progress(plan, done, total) when windows of a plan are scored.
      over: what several processes divide: `devices`, all of which score each plan together; or `plans`, of which each
        process scores its own on its own devices, where the model must be loaded with `kvjax.hosts.alone()`.

    Returns:
      A row per plan, in order, each plan once.

    Raises:
      KvjaxError: one line that says what was expected; arguments are checked before anything is computed.
    """
    check_model(model)
    hears = check_progress(progress)
    if not isinstance(over, str) or over not in OVER:
        raise KvjaxError(f"over {show(over)}; expected one of {', '.join(OVER)}")
    if over == "plans" and model.layout.mesh is not None and model.layout.mesh.is_multi_process:
        raise KvjaxError("over plans, but the processes share the model; expected one loaded in kvjax.hosts.alone()")
    names = split_list(caches) if isinstance(caches, str) else caches if isinstance(caches, Sequence) else [caches]
    plans = list(dict.fromkeys(CachePlan.cast(name, model.config) for name in names))
    if not plans:
        raise KvjaxError("there are no caches; expected at least one plan")
    cut = read_windows(text, model, context, windows, offset)
    identity = identity_of(model, name_of(text), cut, protocol, offset=offset)
    with kept_in(folder) as where:
        made = Sweep(model, cut, identity, where)
        rows = made.rows if over == "devices" else made.rows_apart
        return rows(plans, hears)


def score(
    model: Model,
    text: Text,
    cache: str | CacheSpec | CachePlan = "dense",
    *,
    protocol: str = "streaming",
    context: int = 1024,
    windows: int = 4,
    offset: int = 0,
) -> Score:
    """Scores one plan on a text.

    Args:
      model: what `kvjax.load` gives.
      text: as for `sweep`.
      cache: a plan or its name, see `kvjax.caches.grammar`; a spec stands for all layers.
      protocol: as for `sweep`.
      context: tokens a window.
      windows: how many windows.
      offset: tokens that are skipped first.

    Raises:
      KvjaxError: one line that says what was expected; arguments are checked before anything is computed.
    """
    check_model(model)
    plan = CachePlan.cast(cache, model.config)
    cut = read_windows(text, model, context, windows, offset)
    with kept_in(None) as where:
        run = Sweep(model, cut, identity_of(model, name_of(text), cut, protocol, offset=offset), where)
        run.scorer.check(plan)
        return run.score(plan, lambda done: None)[0]


def identity_of(
    model: Model, text: str, cut: Int[np.ndarray, "w c"], protocol: str, windows: int | None = None, offset: int = 0
) -> dict[str, Any]:
    """What two runs must share for their windows to be the same.

    Args:
      model: the model that reads them.
      text: the name of the text, or of several, separated by commas.
      cut: the windows' token ids.
      protocol: how they are scored.
      windows: of each text; all of `cut` where None.
      offset: tokens that were skipped first.
    """
    learned = {} if model.calibration is None else {"learned_from": model.calibration.identity}
    return {
        "model": strip_paths(model.name),
        "model_sha256": model.checksum,
        "dtype": str(model.dtype),
        "text": strip_paths(text),
        "tokens_sha256": hashlib.sha256(cut.astype(np.int32).tobytes()).hexdigest(),
        "protocol": protocol,
        "context": cut.shape[1],
        "windows": len(cut) if windows is None else windows,
        "offset": offset,
        **learned,
    }


@contextlib.contextmanager
def kept_in(folder: str | Path | None) -> Iterator[Path]:
    """The folder, made where it is missing; None: one that is removed afterwards.

    Raises:
      KvjaxError: it is no path, or it cannot be made.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="kvjax-") as made:
            yield Path(made)
        return
    folder = check_path("folder", folder)
    hosts.on_first(lambda: _make(folder))
    yield folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvjaxError(f"{folder} cannot be a folder for results: {error.strerror}") from None


class Sweep:
    """Scores plans one after the other; the dense run of each batch of windows is made once and kept on disk.

    Attributes:
      scorer: scores batches of windows.
    """

    def __init__(self, model: Model, windows: Int[np.ndarray, "w c"], identity: dict[str, Any], folder: Path):
        """Raises KvjaxError for windows or a protocol that cannot be scored, and windows that methods learn from."""
        check_judged(model, windows)
        self.model, self.windows, self.identity, self.folder = model, windows, identity, folder
        self.scorer = Scorer(model, windows.shape[1], len(windows), identity["protocol"])
        self.dense = CachePlan.parse("dense", model.config)
        self._trained = functools.cache(functools.partial(trained_identity, model))  # it hashes the weights

    def rows(self, plans: Sequence[CachePlan], progress: Progress) -> Rows:
        """The rows of plans, from results.jsonl where they are there, else appended to it."""
        for plan in plans:
            self.scorer.check(plan)  # before anything is scored
        return Rows(self._found_or_scored(plan, functools.partial(progress, plan)) for plan in plans)

    def rows_apart(self, plans: Sequence[CachePlan], progress: Progress) -> Rows:
        """`rows` for processes that each score plans of their own.

        A round is a plan for each; when all have ended it, process 0 keeps the rows. What a process has scored lies
        in its own folder, so that a run that was cut off loses nothing.
        """
        for plan in plans:
            self.scorer.check(plan)
        rows: dict[CachePlan, Any] = {plan: hosts.on_first(functools.partial(self._found, plan)) for plan in plans}
        left = [plan for plan in plans if rows[plan] is None]
        for start in range(0, len(left), hosts.count()):
            group = left[start : start + hosts.count()]
            own = dict(enumerate(group)).get(hosts.index())
            made: list[Any] = hosts.on_each(functools.partial(self._scored, own, progress))[: len(group)]
            hosts.on_first(functools.partial(records.append_rows, self._results, made))
            rows |= dict(zip(group, made, strict=True))
        return Rows(rows.values())

    def _scored(self, plan: CachePlan | None, progress: Progress) -> Row | None:
        """The row of a plan, if there is one to score."""
        total = len(self.windows)
        return None if plan is None else self.row(plan, lambda done: progress(plan, done, total))

    @property
    def _results(self) -> Path:
        return self.folder / "results.jsonl"

    def _found(self, plan: CachePlan) -> Row | None:
        """The row of a plan, if it is there already."""
        return records.find_row(self._results, self._point(plan))

    def _found_or_scored(self, plan: CachePlan, progress: Callable[[int, int], None]) -> Row:
        total = len(self.windows)
        progress(0, total)
        row = hosts.on_first(lambda: self._found(plan))
        if row is None:
            row = self.row(plan, lambda done: progress(done, total))
            hosts.on_first(lambda: records.append_row(self._results, row))
        progress(total, total)
        return row

    def _point(self, plan: CachePlan) -> Row:
        """What the row of a plan is found by."""
        return {
            "experiment": "perplexity",
            **self.identity,
            "cache": str(plan),
            **self._trained(plan),
        }

    def row(self, plan: CachePlan, progress: Callable[[int], None]) -> Row:
        """The result row of one plan; `progress(done)` is told the number of finished windows.

        `nll_increase_se` is the standard error of the plan's nll less the dense run's, token by token.
        """
        try:
            score, timing = self.score(plan, progress)
            paired = score.per_token.nll - self.score(self.dense, lambda done: None)[0].per_token.nll
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return self.describe(plan) | {"error": "out of memory"} | records.provenance()
        figures = score.figures | {"nll_increase_se": standard_error(np.asarray(paired))}
        return self.describe(plan) | figures | dataclasses.asdict(timing) | records.provenance()

    def score(self, plan: CachePlan, progress: Callable[[int], None]) -> tuple[Score, Timing]:
        """The score of one plan, and the seconds it took; `progress` as for `row`."""
        try:
            parts = []
            for start in range(0, len(self.windows), self.scorer.batch):
                parts.append(self._batch(plan, start))
                progress(min(start + self.scorer.batch, len(self.windows)))
        finally:
            if plan != self.dense:
                self.scorer.forget(plan)
        scores = functools.reduce(concatenate, (scores for scores, _ in parts))
        return Score.of(scores, self.windows), sum((timing for _, timing in parts), Timing())

    def describe(self, plan: CachePlan) -> Row:
        """What a plan's row says before it is scored."""
        context = self.windows.shape[1]
        return {
            **self._point(plan),
            "bits_nominal": plan.bits_nominal,
            "bits_asymptotic": plan.bits_asymptotic,
            "bits_real": plan.bits_real(context),
            "bits_peak": plan.bits_peak(context),
            "bytes_per_token": plan.counted_bytes(context) / context,
            "compression": plan.compression(context),
            "simulated": plan.simulated,
            **self.model.layout.described(),
        }

    def _batch(self, plan: CachePlan, start: int) -> tuple[TokenScores, Timing]:
        """Scores of the windows from `start`, from disk where they are there."""
        file = self._file("; ".join([str(plan), *self._trained(plan).values()]), start)
        if not hosts.on_first(file.exists):
            windows = self.windows[start : start + self.scorer.batch]
            dense = None if plan == self.dense else self._dense(start)
            scores, kept, timing = self.scorer.run(plan, windows, dense)
            arrays = vars(scores) | dataclasses.asdict(timing)
            if plan == self.dense and kept is not None:
                # numpy's files know no bfloat16: hidden states go into the wider type that they are compared in.
                wide = vars(kept) | {"hidden": np.asarray(kept.hidden, kept.mean.dtype)}
                hosts.on_first(lambda: records.save_arrays(self._file("dense run", start), wide))
            hosts.on_first(lambda: records.save_arrays(file, arrays))
        arrays = hosts.on_first(lambda: records.load_arrays(file))
        timing = Timing(float(arrays.pop("seconds")), float(arrays.pop("compile_seconds")))
        return TokenScores(**arrays), timing

    def _dense(self, start: int) -> DenseRun:
        """The dense run of the windows from `start`, made where it is not there yet."""
        self._batch(self.dense, start)
        return DenseRun(**hosts.on_first(lambda: records.load_arrays(self._file("dense run", start))))

    def _file(self, what: str, start: int) -> Path:
        kept = [field.name for field in dataclasses.fields(DenseRun)]  # what kept others cannot be gone on from
        key = json.dumps([self.identity, what, self.scorer.batch, kept], sort_keys=True)  # the batch follows the mesh
        return self.folder / "partial" / hashlib.sha256(key.encode()).hexdigest()[:16] / f"{start}.npz"
