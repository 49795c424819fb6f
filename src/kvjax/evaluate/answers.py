"""What a model answers with a small cache: log-likelihoods of continuations, and texts; kept on disk as they come.

Log-likelihoods are read as by the protocol `streaming`: chunks of the plan's residual from position 0, so that a
token reads what decoding would have read. One exact prefill would read the whole context uncompressed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import hosts
from kvjax.caches.base import CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.checks import check_flag, check_path, check_progress, check_whole
from kvjax.errors import KvjaxError
from kvjax.evaluate.forward import hidden_states
from kvjax.evaluate.vocabulary import score_targets
from kvjax.files import read_json, write_json
from kvjax.generation.decode import pad
from kvjax.generation.generate import generate
from kvjax.mesh import fetch
from kvjax.models.model import Model, check_model
from kvjax.models.tokenizer import Tokenizer

LEAST = 32  # tokens of the smallest program
MOST_BATCH = 1024
Ids = Sequence[int]
Pair = tuple[Ids, Ids]  # a context and its continuation
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Writing:
    """How texts are generated; the fields are those of `kvjax.generate`."""

    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Answers:
    """Answers of one model with one plan, several requests at a time, the longest first.

    Sizes are powers of two, so that few programs are compiled. What is answered is kept in FOLDER/answers, apart for
    each model and plan, so that a run that was cut off goes on.

    Attributes:
      model: what `kvjax.load` gives.
      plan: the caches of all layers.
      batch: requests that are answered together.
      chat: whether `encode` puts texts into the model's chat template.
      prefill_chunk: how prompts of texts are read, see `kvjax.generate`.
    """

    def __init__(
        self,
        model: Model,
        cache: str | CacheSpec | CachePlan = "dense",
        *,
        batch: int = 8,
        chat: bool = False,
        prefill_chunk: int | None = None,
        folder: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        """Takes what all answers share.

        Args:
          model: what `kvjax.load` gives.
          cache: a plan or its name, see `kvjax.caches.grammar`; a spec stands for all layers.
          batch: requests that are answered together.
          chat: put texts into the model's chat template.
          prefill_chunk: as for `kvjax.generate`; says nothing of log-likelihoods.
          folder: keeps the answers. None: nothing is kept.
          progress: called as progress(done, total) while requests are answered.

        Raises:
          KvjaxError: one line that says what was expected.
        """
        check_model(model)
        self.model, self.plan = model, CachePlan.cast(cache, model.config)
        self.batch = check_whole("batch", batch, 1, MOST_BATCH)
        model.layout.check(batch=self.batch)
        if prefill_chunk is not None:
            prefill_chunk = check_whole("prefill_chunk", prefill_chunk, 1)
        self.chat, self.prefill_chunk = check_flag("chat", chat), prefill_chunk
        self._progress = check_progress(progress)
        made_by = [model.checksum, str(model.dtype), str(self.plan), prefill_chunk]
        self._kept = _Kept(None if folder is None else check_path("folder", folder) / "answers" / _digest(made_by))
        self._bases: Any = None

    def encode(self, text: str, answer: str = "") -> list[int]:
        """Token ids of a question that begins a sequence, and of the beginning of its answer.

        Raises:
          KvjaxError: `chat` is on and the model has no template, or the text holds half a character.
        """
        tokenizer = self.model.tokenizer
        asked = tokenizer.chat([{"role": "user", "content": text}]) if self.chat else text
        return tokenizer.encode(asked + answer, start=True).tolist()

    # ---- log-likelihoods

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is what greedy decoding would write.

        Args:
          pairs: token ids of a context and of its continuation. Where both are longer than the model reads, the
            context's beginning is left out.

        Returns:
          For each pair the sum over the continuation's tokens in nats, and whether each has the largest logit.

        Raises:
          KvjaxError: an empty context or continuation, a continuation longer than the model reads, or logits that are
            not finite.
        """
        most = self.model.config.max_positions
        for context, continuation in pairs:
            if not len(context) or not 0 < len(continuation) <= most:
                raise KvjaxError(
                    f"a context of {len(context)} tokens and a continuation of {len(continuation)}; expected at least"
                    f" 1 and 1 to {most}"
                )
        keys = [_digest(["loglikelihood", list(map(int, c)), list(map(int, y))]) for c, y in pairs]
        # Continuations that differ in their last token, as the letters of a choice, are read together.
        groups: dict[tuple[int, ...], dict[str, Ids]] = {}
        for key, (context, continuation) in zip(keys, pairs, strict=True):
            read = tuple(map(int, [*context, *continuation]))[-most - 1 : -1]
            groups.setdefault(read, {})[key] = continuation
        units = sorted(groups.items(), key=lambda unit: (-len(unit[0]), unit[0]))
        self._fill(units, lambda unit: list(unit[1]), lambda some, _: self._score(some))
        return [(float(value), bool(greedy)) for value, greedy in map(self._kept.found.__getitem__, keys)]

    def _score(self, units: Sequence[tuple[Ids, Mapping[str, Ids]]]) -> dict[str, tuple[float, bool]]:
        """The answers of at most `batch` inputs, each with the continuations that end it."""
        found = [(row, len(read), key, y) for row, (read, own) in enumerate(units) for key, y in own.items()]
        rows = np.repeat([row for row, *_ in found], [len(y) for *_, y in found])
        columns = np.concatenate([np.arange(end - len(y), end) for _, end, _, y in found])
        targets = np.concatenate([np.asarray(y) for *_, y in found])
        nll, greedy = self._score_tokens([np.array(read) for read, _ in units], rows, columns, targets)
        if not np.isfinite(nll).all():
            raise KvjaxError(f"{self.plan}: the logits are not finite; kvjax.score on a text names the layer")
        ends = np.cumsum([len(y) for *_, y in found])[:-1]
        each = zip(found, np.split(nll, ends), np.split(greedy, ends), strict=True)
        return {key: (-float(own.sum()), bool(best.all())) for (_, _, key, _), own, best in each}

    def _score_tokens(
        self,
        inputs: Sequence[Int[np.ndarray, "t"]],
        rows: Int[np.ndarray, "n"],
        columns: Int[np.ndarray, "n"],
        targets: Int[np.ndarray, "n"],
    ) -> tuple[Float[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
        """Negative log-likelihoods of targets that follow tokens of inputs, and whether their logits are largest."""
        model, count = self.model, len(targets)
        size = self._size(max(map(len, inputs)))
        tokens, lengths = pad(_filled(inputs, self.batch), size)
        if self._bases is None:
            self._bases = load_bases(model, self.plan)
        room = 1 << (count - 1).bit_length()
        places = [jnp.asarray(np.pad(a, (0, room - count)), jnp.int32) for a in (rows, columns, targets)]
        with model.layout.entered():
            hidden = hidden_states(model, self.plan, tokens, self.plan.stream_chunk, "exact", lengths, self._bases)
            nll, greedy = _score_places(hidden, model.head, *places)
        return fetch(nll)[:count].astype(np.float64), fetch(greedy)[:count]

    # ---- texts

    def texts(self, prompts: Sequence[Ids], writing: Writing) -> list[str]:
        """Texts that go on from prompts, special tokens left out.

        Args:
          prompts: token ids. Where a prompt and the new tokens are longer than the model reads, its beginning is left
            out.
          writing: how they are generated. Prompts that are the same get draws of their own.

        Raises:
          KvjaxError: the model has no room for a prompt beside the new tokens, or what else `generate` refuses.
        """
        room = self.model.config.max_positions - writing.max_new_tokens
        if room < 1:
            raise KvjaxError(
                f"{writing.max_new_tokens} new tokens; expected fewer than the model's"
                f" {self.model.config.max_positions}, which prompts are part of"
            )
        asked, seen, keys = dataclasses.asdict(writing), Counter[tuple[int, ...]](), []
        units: dict[str, tuple[int, ...]] = {}
        for prompt in prompts:
            ids = tuple(map(int, prompt))[-room:]
            key = _digest(["text", ids, asked, seen[ids] if writing.temperature else 0])
            seen[ids] += 1
            units[key] = ids
            keys.append(key)
        order = sorted(units.items(), key=lambda unit: (-len(unit[1]), unit[1], unit[0]))
        self._fill(order, lambda unit: [unit[0]], functools.partial(self._write, writing))
        return [self._kept.found[key] for key in keys]

    def _write(self, writing: Writing, units: Sequence[tuple[str, tuple[int, ...]]], before: int) -> dict[str, str]:
        """The texts of at most `batch` prompts; `before` them come so many others, whose seeds are not used again."""
        prompts = [list(ids) for _, ids in units]
        made = generate(
            self.model,
            _filled(prompts, self.batch),
            self.plan,
            **dataclasses.asdict(writing) | {"seed": writing.seed + before},
            max_len=self._size(max(map(len, prompts)) + writing.max_new_tokens),
            chat=False,
            prefill_chunk=self.prefill_chunk,
        )
        return {key: self._without_special(text) for (key, _), text in zip(units, made.texts, strict=False)}

    def _without_special(self, text: str) -> str:
        for token in _special_tokens(self.model.tokenizer):
            text = text.replace(token, "")
        return text

    # ---- what both share

    def _size(self, tokens: int) -> int:
        """The size that is compiled for so many tokens."""
        return min(max(LEAST, 1 << (tokens - 1).bit_length()), self.model.config.max_positions)

    def _fill(
        self,
        units: Sequence[T],
        keys: Callable[[T], list[str]],
        answer: Callable[[Sequence[T], int], Mapping[str, Any]],
    ) -> None:
        """Answers what is not kept yet, a batch at a time; batches are the same whatever is kept."""
        self._progress(0, len(units))
        for start in range(0, len(units), self.batch):
            group = units[start : start + self.batch]
            if any(key not in self._kept.found for unit in group for key in keys(unit)):
                self._kept.add(answer(group, start))
            self._progress(start + len(group), len(units))


@jax.jit
def _score_places(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    rows: Int[Array, "n"],
    columns: Int[Array, "n"],
    targets: Int[Array, "n"],
) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    return score_targets(hidden[rows, columns], head, targets)


def _filled(units: Sequence[T], count: int) -> list[T]:
    """So many units, the last one again where there are fewer: one program serves every batch."""
    return [*units, *itertools.repeat(units[-1], count - len(units))]


def _special_tokens(tokenizer: Any) -> Iterator[str]:
    """Special tokens as they are written out."""
    if isinstance(tokenizer, Tokenizer):
        yield from (each.content for each in tokenizer.backend.get_added_tokens_decoder().values() if each.special)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


class _Kept:
    """Answers by the digest of what was asked; on disk a file per batch, written whole or not at all."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.found: dict[str, Any] = hosts.on_first(self._read)

    def _read(self) -> dict[str, Any]:
        files = sorted(self.folder.glob("*.json")) if self.folder is not None else ()
        return {key: answer for file in files for key, answer in read_json(file).items()}

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps those that are not kept yet: an answer stays as it was first given."""
        new = {key: answer for key, answer in answers.items() if key not in self.found}
        self.found |= new
        if self.folder is not None:
            file = self.folder / f"{_digest(sorted(new))}.json"
            hosts.on_first(lambda: write_json(file, new))
