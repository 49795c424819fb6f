"""kvjax as a model of lm-evaluation-harness (extra `eval`; neither needs torch), and the harness's tasks as ours.

    lm = KvjaxLM(kvjax.load("smollm2-135m"), "k4v4@kivi", folder="runs/evaluate")
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

Importing this raises KvjaxError where lm_eval is not installed. The harness's own cache of answers knows nothing of
plans and unpickles what it finds, so it is refused: `folder` keeps them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kvjax.caches import fields
from kvjax.caches.base import CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.evaluate.answers import Answers, Writing
from kvjax.evaluate.task import Figure, Task
from kvjax.extras import needed
from kvjax.files import brief
from kvjax.models.model import Model

with needed("lm_eval"):
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

NEW_TOKENS = 256  # of a text where the task does not say; the harness's own default
DRAWS = 1000  # of the harness's bootstrap


class KvjaxLM(TemplateLM):
    """A model with a small cache, as the harness sees models.

    Attributes:
      answers: what asks the model.
    """

    def __init__(
        self,
        model: Model | Answers,
        cache: str | CacheSpec | CachePlan = "dense",
        *,
        batch: int = 8,
        prefill_chunk: int | None = None,
        folder: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        """Takes the arguments of `Answers`, or one made already."""
        super().__init__()
        options: dict[str, Any] = {"batch": batch, "prefill_chunk": prefill_chunk}
        self.answers = (
            model
            if isinstance(model, Answers)
            else Answers(model, cache, **options, folder=folder, progress=progress)
        )

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises KvjaxError where the tokenizer has none."""
        return self._first(self._tokens.eos_ids)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: bos, else eos. Raises KvjaxError where there is neither."""
        bos = self._tokens.bos_id
        return self._first(self._tokens.eos_ids) if bos is None else bos

    @property
    def _tokens(self) -> Any:
        return self.answers.model.tokenizer

    def _first(self, ids: Sequence[int]) -> int:
        if not ids:
            raise KvjaxError(
                f"{self.answers.model.name}: the tokenizer has no eos; expected one to stand before texts"
            )
        return ids[0]

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.answers.model.config.max_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. What the tokenizer puts before a text is added unless it is there, or the flag is False."""
        return self._tokens.encode(string, start=add_special_tokens is not False).tolist()

    # ---- answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self.answers.loglikelihoods([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows that the model reads, each token scored once."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [
            (number, *make_disjoint_window(window))
            for number, ids in enumerate(texts)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        ]
        totals = [0.0] * len(texts)
        for (number, *_), (value, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts that go on from each context, up to the first stop string."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        writings = [writing_of(request.args[1]) for request in requests]
        texts: dict[int, str] = {}
        for writing in dict.fromkeys(writings):
            own = [number for number, each in enumerate(writings) if each == writing]
            texts |= dict(zip(own, self.answers.texts([prompts[number] for number in own], writing), strict=True))
        return [texts[number] for number in range(len(prompts))]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuses the harness's cache of answers. Raises KvjaxError."""
        raise KvjaxError("use_cache would mix the answers of all plans; expected KvjaxLM(..., folder=...) instead")

    # ---- chats

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests under: the same for the same weights and template."""
        return f"{Path(self.answers.model.name).name}-{self.answers.model.checksum[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, by its name where it has several; None where none is asked for."""
        templates = self._tokens.chat_template
        if not chat_template or not isinstance(templates, Mapping):
            return templates if chat_template else None
        name = "default" if chat_template is True else chat_template
        if name not in templates:
            raise KvjaxError(f"no chat template {name!r}; expected one of {', '.join(sorted(templates))}")
        return templates[name]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to where the assistant answers, or goes on with its last message."""
        text = self._tokens.chat(chat_history, add_generation_prompt=add_generation_prompt)
        return text if add_generation_prompt else _up_to(text, chat_history[-1]["content"])


def _up_to(text: str, message: str) -> str:
    """A chat up to the end of its last message, whose blanks a template may have cut."""
    start = text.rfind(message.strip())
    if start < 0:
        raise KvjaxError("the chat template changes the assistant's message, which cannot be gone on from")
    left = message.lstrip()
    kept = left if text.startswith(left, start) else message.strip()
    return text[: start + len(kept)]


def writing_of(arguments: Mapping[str, Any]) -> Writing:
    """How a text is generated, from a task's `generation_kwargs`.

    Raises:
      KvjaxError: an argument that kvjax does not know.
    """
    known = dict(normalize_gen_kwargs(dict(arguments), NEW_TOKENS))
    until, tokens, samples = known.pop("until"), known.pop("max_gen_toks"), known.pop("do_sample", False)
    sampling = {name: known.pop(name, None) for name in ("top_k", "top_p")}
    temperature = float(known.pop("temperature", None) or 0)
    if known:
        raise KvjaxError(
            f"generation_kwargs {', '.join(sorted(known))}; expected until, max_gen_toks, do_sample, temperature,"
            " top_k, top_p"
        )
    stops = tuple(stop for stop in until if stop)
    return Writing(tokens, stops, temperature, **sampling) if samples else Writing(tokens, stops)


# ---- the harness's tasks


@dataclasses.dataclass(frozen=True)
class Harness(Task):
    """A task or group of the harness, by its name or by the path of its YAML file.

    Attributes:
      name: the name or path.
      samples: how many of each task are asked, the first ones; all where 0.
      shots: solved ones before each; what the task says where None.
      seed: what shots are drawn with, where the task draws them.
    """

    form: ClassVar[str] = "lm_eval"
    samples: int = 0
    shots: int | None = None
    seed: int = 1234
    name: str = fields.derived("")

    @property
    def identity(self) -> dict[str, Any]:
        found = {"lm_eval": importlib.metadata.version("lm_eval")}
        if _is_file(self.name):
            found["data_sha256"] = hashlib.sha256(Path(self.name).read_bytes()).hexdigest()
        return found

    def __str__(self) -> str:
        """The name, without the folder of a file, which says nothing to others."""
        name = Path(self.name).name if _is_file(self.name) else self.name
        return name + fields.to_text(self).removeprefix(self.form)

    def figures(self, answers: Answers) -> list[Figure]:
        with _quietly():
            try:
                found = simple_evaluate(
                    KvjaxLM(answers),
                    tasks=[self.name],
                    num_fewshot=self.shots,
                    limit=self.samples or None,
                    bootstrap_iters=DRAWS,
                    log_samples=False,
                    apply_chat_template=answers.chat,
                    fewshot_random_seed=self.seed,
                    task_manager=_manager(),
                )
            except KvjaxError:
                raise
            except (OSError, ValueError, KeyError, ImportError) as error:  # of data sets, mostly
                raise KvjaxError(f"{self}: the harness cannot run it ({brief(error)})") from None
        if not (figures := figures_of(found)):
            raise KvjaxError(f"{self}: the harness gives no figures; expected a task with metrics")
        return figures


def figures_of(results: Mapping[str, Any]) -> list[Figure]:
    """The figures of what the harness returns: those of tasks, then those of groups."""
    counts = results.get("n-samples", {})
    figures = []
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, comma, way = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{way}")
            stderr = float(error) if isinstance(error, int | float) else float("nan")
            samples = counts.get(name, {}).get("effective", values.get("sample_len", 0))
            figures.append(Figure(name, metric if way == "none" else key, float(value), stderr, int(samples)))
    return figures


def parse(name: str, settings: Mapping[str, str]) -> Harness:
    """The task of a name and its settings.

    Raises:
      KvjaxError: the harness knows no such task, or tasks have no such setting.
    """
    if not _is_file(name) and not _manager().match_tasks([name]):
        raise KvjaxError(f"no task {name!r}; expected one of kvjax's or of the harness's, or the path of a YAML file")
    return dataclasses.replace(fields.parse(Harness, Harness.form, None, settings), name=name)


def _is_file(name: str) -> bool:
    with contextlib.suppress(OSError):  # a long text is no name that a file system allows
        return Path(name).is_file()
    return False


@functools.cache
def _manager() -> Any:
    """The harness's list of tasks, which takes seconds to make."""
    return TaskManager()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No bootstrap in forked processes, which JAX's threads do not survive; what is printed is no result of ours."""
    log, old = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = log.level
    log.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if old is not None:
            os.environ["DISABLE_MULTIPROC"] = old
