"""Perplexity, KL divergence and top-1 agreement of a cache plan, against the dense run of the same windows.

Three protocols say what a scored token reads: `streaming`, chunks of the plan's residual from position 0, which is
what token-by-token decoding sees; `decode`, step by step, the slow check of it; `parallel`, one pass in which every
token is read as stored, its own included, as in XQuant's perplexity tables.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int

from kvjax import records
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import check_calibrated, load_bases
from kvjax.checks import check_whole, show
from kvjax.errors import KvjaxError
from kvjax.evaluate import vocabulary
from kvjax.evaluate.forward import hidden_states
from kvjax.mesh import fetch
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.models.nonfinite import find_first_nonfinite

PROTOCOLS = ("streaming", "decode", "parallel")
T = TypeVar("T")
_compile_seconds = functools.cache(records.CompileSeconds)  # one clock for all scorers


def cut_windows(
    ids: Int[np.ndarray, "n"], context: int, windows: int | None, offset: int = 0, start: Sequence[int] = ()
) -> Int[np.ndarray, "w c"]:
    """Consecutive windows of a text.

    Args:
      ids: the text's tokens.
      context: tokens of a window.
      windows: how many windows; as many as there are where None.
      offset: tokens that are skipped first.
      start: tokens that every window begins with, counted in `context`.

    Raises:
      KvjaxError: fewer tokens than asked for, or sizes that cannot be scored.
    """
    context = check_whole("context", context, 2)
    offset = check_whole("offset", offset, 0)
    if context < len(start) + 2:
        raise KvjaxError(f"context={context}; expected at least {len(start) + 2}, {len(start)} of them for a start")
    own = context - len(start)
    windows = max((len(ids) - offset) // own, 1) if windows is None else check_whole("windows", windows, 1)
    needed = offset + own * windows
    if len(ids) < needed:
        raise KvjaxError(
            f"the text has {len(ids)} tokens; expected at least {needed}"
            f" (offset {offset} and {windows} windows of {own})"
        )
    cut = ids[offset:needed].reshape(windows, own)
    return np.concatenate([np.broadcast_to(np.array(start, ids.dtype), (windows, len(start))), cut], axis=1)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds spent running and compiling."""

    seconds: float = 0.0
    compile_seconds: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.seconds + other.seconds, self.compile_seconds + other.compile_seconds)


class Scorer:
    """Scores plans on batches of windows of one size. Layers that are alike share programs, of all plans.

    Attributes:
      batch: windows that are scored together.
    """

    def __init__(self, model: Model, context: int, windows: int, protocol: str = "streaming"):
        """Raises KvjaxError for an unknown protocol or a context beyond what the model was made for."""
        if not isinstance(protocol, str) or protocol not in PROTOCOLS:
            raise KvjaxError(f"protocol {show(protocol)}; expected one of {', '.join(PROTOCOLS)}")
        if context > model.config.max_positions:
            raise KvjaxError(f"context={context}; expected at most the model's {model.config.max_positions}")
        self.model, self.protocol = model, protocol
        # A whole window already fills a matmul; chunks and steps need a few windows side by side, on each device.
        devices = model.layout.parts("batch")
        self.batch = devices * min(-(-windows // devices), 1 if protocol == "parallel" else 4)
        self.shape = model.cache_shape(self.batch, context)
        self._decoder = Decoder(model.config)
        self._loaded: dict[CachePlan, Any] = {}

    def check(self, plan: CachePlan) -> None:
        """Raises KvjaxError where the plan does not fit the model, its calibration or the protocol; nothing runs."""
        plan.init_shapes(self.shape)
        if self.protocol == "parallel":
            plan.require_whole_windows("protocol parallel")
        check_calibrated(self.model, plan)

    def run(
        self, plan: CachePlan, windows: Int[np.ndarray, "w c"], dense: vocabulary.DenseRun | None
    ) -> tuple[vocabulary.TokenScores, vocabulary.DenseRun | None, Timing]:
        """Scores at most `batch` windows, [w, context - 1] a field (position 0 is not scored).

        Args:
          plan: which cache each layer has.
          windows: token ids.
          dense: the dense run of the same windows; None where this is the dense run, which is then returned.

        Raises:
          KvjaxError: the logits are not finite; it names the first token and layer.
        """
        count = len(windows)
        tokens = np.pad(windows, ((0, self.batch - count), (0, 0)), mode="edge").astype(np.int32)
        hidden, timing = self._timed(self._hidden, plan, tokens)
        scored = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        targets = tokens[:, 1:].reshape(-1)
        head = self.model.head
        if dense is None:
            (scores, dense), more = self._timed(vocabulary.dense_run, scored, head, targets)
        else:
            full = jax.tree.map(lambda a: np.pad(a, _pad_rows(a, len(targets)), mode="edge"), dense)
            scores, more = self._timed(vocabulary.compare, scored, head, targets, full)
        rows = count * (windows.shape[1] - 1)
        scores = jax.tree.map(lambda a: fetch(a).astype(np.float64)[:rows].reshape(count, -1), scores)
        if not np.isfinite([scores.nll, scores.kld]).all():
            raise KvjaxError(f"{plan}: the logits are not finite: {self._explain_nonfinite(plan, tokens)}")
        return scores, jax.tree.map(lambda a: fetch(a)[:rows], dense), timing + more

    def _protocol(self, plan: CachePlan, count: int) -> tuple[int, str]:
        """Tokens a step, and what their queries read."""
        self.check(plan)
        chunk = {"parallel": count, "decode": 1, "streaming": plan.stream_chunk}[self.protocol]
        return chunk, "stored" if self.protocol == "parallel" else "exact"

    def _explain_nonfinite(self, plan: CachePlan, tokens: Int[np.ndarray, "B N"]) -> str:
        """The windows again, with every layer looked at."""
        batch, count = tokens.shape
        chunk, read = self._protocol(plan, count)
        pieces = (jnp.asarray(tokens[:, i : i + chunk]) for i in range(0, count, chunk))
        chunks = ((piece, jnp.full((batch,), piece.shape[1], jnp.int32)) for piece in pieces)
        bases = self._bases(plan)
        with self.model.layout.entered():
            fault = find_first_nonfinite(self._decoder, self.model.params, plan.init(self.shape), chunks, read, bases)
        return str(fault) if fault else "every layer is finite, the head is not"

    def _hidden(self, plan: CachePlan, tokens: Int[np.ndarray, "B N"]) -> Float[Array, "B N D"]:
        chunk, read = self._protocol(plan, tokens.shape[1])
        return hidden_states(self.model, plan, tokens, chunk, read, bases=self._bases(plan))

    def _bases(self, plan: CachePlan) -> Any:
        """The plan's bases, read once for all its windows."""
        if plan not in self._loaded:
            self._loaded[plan] = load_bases(self.model, plan)
        return self._loaded[plan]

    def _timed(self, function: Callable[..., T], *args: Any) -> tuple[T, Timing]:
        """What a function gives when it has ended, and the seconds that it ran and compiled."""
        start, compiled = time.perf_counter(), _compile_seconds().total()
        with self.model.layout.entered():
            out = jax.block_until_ready(function(*args))
        compiling = _compile_seconds().total() - compiled
        return out, Timing(time.perf_counter() - start - compiling, compiling)

    def forget(self, plan: CachePlan) -> None:
        """Drops a plan's bases, so that memory does not grow with the number of plans."""
        self._loaded.pop(plan, None)


def score_against(
    reference: Model, model: Model, plan: CachePlan, windows: Int[np.ndarray, "w c"], protocol: str = "streaming"
) -> Score:
    """The score of a plan of a model, its KL divergence counted from the dense run of another one.

    Args:
      reference: the model that predictions are compared with.
      model: one with the same vocabulary.
      plan: of `model`.
      windows: token ids.
      protocol: see the module.

    Raises:
      KvjaxError: what `Scorer` raises.
    """
    exact, own = (Scorer(each, windows.shape[1], len(windows), protocol) for each in (reference, model))
    dense, parts = CachePlan.parse("dense", reference.config), []
    for start in range(0, len(windows), exact.batch):
        cut = windows[start : start + exact.batch]
        _, run, _ = exact.run(dense, cut, None)
        parts.append(own.run(plan, cut, run)[0])
    return Score.of(functools.reduce(concatenate, parts), windows)


def _pad_rows(a: np.ndarray, rows: int) -> list[tuple[int, int]]:
    return [(0, rows - len(a))] + [(0, 0)] * (a.ndim - 1)


@dataclasses.dataclass(frozen=True, repr=False)
class Score:
    """A plan's figures on some windows. `figures` has them as a dict.

    Attributes:
      nll: mean negative log-likelihood, nats a token.
      nll_se: the standard error of `nll`.
      ppl: exp(nll); inf beyond the largest float.
      kld: mean KL(dense || plan) per token, nats.
      kld_se: the standard error of `kld`.
      kld_p99: the 99th percentile of KL(dense || plan), nats.
      top1: share of tokens whose argmax is the dense run's.
      tokens: scored tokens.
      windows: the token ids, [w, c]; position 0 of a window is not scored.
      per_token: nll, KL and agreement of each scored token, [w, c - 1].

    Standard errors are those of `standard_error`: over the means of windows.
    """

    nll: float
    nll_se: float
    ppl: float
    kld: float
    kld_se: float
    kld_p99: float
    top1: float
    tokens: int
    windows: Int[np.ndarray, "w c"] = dataclasses.field(repr=False, compare=False)
    per_token: vocabulary.TokenScores = dataclasses.field(repr=False, compare=False)

    @classmethod
    def of(cls, scores: vocabulary.TokenScores, windows: Int[np.ndarray, "w c"]) -> Score:
        """The figures of scores per token, [w, c - 1] a field."""
        nll, kld = np.asarray(scores.nll), np.asarray(scores.kld)
        mean = float(nll.mean())
        return cls(
            nll=mean,
            nll_se=standard_error(nll),
            ppl=perplexity(mean),
            kld=float(kld.mean()),
            kld_se=standard_error(kld),
            kld_p99=float(np.percentile(kld, 99)),
            top1=float(scores.agree.mean()),
            tokens=nll.size,
            windows=windows,
            per_token=scores,
        )

    @property
    def figures(self) -> dict[str, Any]:
        """The numbers by name, as result rows have them."""
        names = ("nll", "nll_se", "ppl", "kld", "kld_se", "kld_p99", "top1", "tokens")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return (
            f"<Score nll {self.nll:.4f} ± {self.nll_se:.4f}, ppl {self.ppl:.2f}, KL {self.kld:.4f}"
            f" (p99 {self.kld_p99:.3f}), top-1 {self.top1:.3f}, {self.tokens} tokens>"
        )

    def compare(self, other: Score) -> Comparison:
        """This score minus another one of the same windows, token by token.

        Raises:
          KvjaxError: the other is no score, or of other tokens.
        """
        if not isinstance(other, Score):
            raise KvjaxError(f"the other score is of type {type(other).__name__}; expected what kvjax.score gives")
        if not np.array_equal(self.windows, other.windows):
            raise KvjaxError("the scores are of other tokens; expected two plans on the same windows of one text")
        nll, kld = (getattr(self.per_token, n) - getattr(other.per_token, n) for n in ("nll", "kld"))
        return Comparison(*mean_and_interval(nll), *mean_and_interval(kld), self.tokens)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences of two scores, paired by token, in nats a token; above 0 where the first is worse.

    Attributes:
      nll: mean difference of negative log-likelihoods.
      nll_interval: half the width of its 95 % interval.
      kld: mean difference of KL divergences from the dense run.
      kld_interval: half the width of its 95 % interval.
      tokens: compared tokens.

    The intervals are those of `mean_and_interval`.
    """

    nll: float
    nll_interval: float
    kld: float
    kld_interval: float
    tokens: int


def perplexity(nll: float) -> float:
    """exp(nll), of nats per token; inf beyond the largest float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def standard_error(values: Float[np.ndarray, "w t"]) -> float:
    """The standard error of the mean of a value per token; NaN of one value.

    It is over the means of windows, since tokens of a window depend on one another. Where there is one window it is
    over its tokens as if they were independent, and so too small.
    """
    samples = _samples(values)
    return float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else math.nan


def mean_and_interval(values: Float[np.ndarray, "w t"]) -> tuple[float, float]:
    """The mean of a value per token, and half the width of its 95 % interval by Student's t.

    The interval is that of `standard_error`, with a degree of freedom less than there are windows.
    """
    width = scipy.special.stdtrit(max(len(_samples(values)) - 1, 1), 0.975)
    return float(values.mean()), float(width * standard_error(values))


def _samples(values: Float[np.ndarray, "w t"]) -> Float[np.ndarray, "n"]:
    return values.mean(1) if len(values) > 1 else values[0]


def concatenate(a: vocabulary.TokenScores, b: vocabulary.TokenScores) -> vocabulary.TokenScores:
    """Scores of two batches of windows as one."""
    return jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)
