"""What people type, given to the library's public entries: a result or a KvjaxError, never anything else."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tests.robustness import odd
from tests.robustness.attempts import attempt

import kvjax
from kvjax.caches.plan import CachePlan
from kvjax.generation.request import ask
from kvjax.models import zoo
from kvjax.models.tokenizer import Tokenizer

PLAN = "k4v4@token"
CHAT = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
WORDS = {"bos_token": "<s>", "eos_token": "</s>"}
NEEDED = ("random:llama-2-7b", "random:llama-3.1-8b")  # sizes of models that plans are for


class Question(NamedTuple):
    """A call of a public entry."""

    entry: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __repr__(self) -> str:
        name = getattr(self.entry, "__name__", repr(self.entry))
        return f"{name}(*{self.arguments}, **{self.options})"


@dataclasses.dataclass(frozen=True)
class Typed:
    """One kind of what people type.

    Attributes:
      name: in result rows.
      folder: where odd paths lie.
      ask: draws a question.
    """

    name: str
    folder: Path
    ask: Callable[[random.Random], Question]

    def attempt(self, seed: int, seconds: float = 30.0) -> str:
        """`attempts.attempt` at the question of a seed; what it raises has a note of both."""
        question = self.ask(random.Random(f"{self.name} {seed}"))
        try:
            with contextlib.chdir(self.folder):
                return attempt(lambda: question.entry(*question.arguments, **question.options), seconds)
        except BaseException as error:
            error.add_note(f"{self.name}, seed {seed}: {_shown(question)}")
            raise


def _shown(question: Question) -> str:
    """The question, not longer than a few lines."""
    try:
        shown = repr(question)
    except Exception as error:  # an odd value's own
        shown = f"{question.entry} of what cannot be shown ({type(error).__name__})"
    return shown if len(shown) < 800 else f"{shown[:600]} [...] {shown[-150:]}"


def make_kinds(folder: Path, models: Path) -> list[Typed]:
    """The kinds; plan files and states are made in a folder, models are HF folders (llama-linear, qwen3)."""
    inner = folder.joinpath("typed", *"abcdef")  # deep enough that ../ stays within the folder
    inner.mkdir(parents=True)
    plain = kvjax.load(str(models.absolute() / "llama-linear"), "float32")
    chats = kvjax.load(str(models.absolute() / "qwen3"), "float32")
    chats.tokenizer = dataclasses.replace(chats.tokenizer, chat_template=CHAT, words=WORDS)
    state = kvjax.prefill(plain, "the quick", PLAN, max_len=64)
    configs = [plain.config, *(zoo.RANDOM[name] for name in NEEDED)]
    files = folder / "plan.yaml", folder / "preset.yaml"
    files[0].write_text("plan: 0:k8v8;1:k4v4\n")
    files[1].write_text(CachePlan.parse("0:k8v8;1:k4v4", plain.config).preset())
    return [
        Typed("prompts", inner, lambda rng: _prompt(rng, plain, chats, state)),
        Typed("token ids", inner, lambda rng: _ids(rng, plain, state)),
        Typed("arguments", inner, lambda rng: _arguments(rng, plain, state, folder)),
        Typed("chat templates", inner, lambda rng: _template(rng, chats.tokenizer)),
        Typed("plan names", inner, lambda rng: _plan(rng, configs, folder)),
    ]


# ---- questions


def _prompt(rng: random.Random, plain: kvjax.Model, chats: kvjax.Model, state: kvjax.State) -> Question:
    model = rng.choice((plain, plain, plain, chats))
    cache = state if model is plain and rng.random() < 0.2 else PLAN
    options = {"max_new_tokens": 1, "chat": rng.random() < 0.8}
    return Question(_sometimes(rng, kvjax.generate, ask), (model, odd.prompt(rng), cache), options)


def _sometimes(rng: random.Random, whole: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    """A whole entry one time in twenty, for it may compile a program, else what checks its arguments."""
    return whole if rng.random() < 0.05 else check


def _ids(rng: random.Random, model: kvjax.Model, state: kvjax.State) -> Question:
    ids, few = odd.ids(rng), {"context": 4, "windows": 1}
    questions = (
        Question(_sometimes(rng, kvjax.generate, ask), (model, ids, PLAN), {"max_new_tokens": 1}),
        Question(_sometimes(rng, kvjax.generate, ask), (model, ids, state), {"max_new_tokens": 1, "max_len": 64}),
        Question(ask, (model, [1, 2], PLAN), {"max_new_tokens": 2, "stop_tokens": ids}),
        Question(_sometimes(rng, kvjax.logits, ask), (model, ids, PLAN), {}),
        Question(_sometimes(rng, kvjax.prefill, ask), (model, ids, PLAN), {}),
        Question(kvjax.score, (model, ids, PLAN), few | {"offset": rng.choice((0, *[10**6] * 9))}),
        Question(kvjax.tune, (model, ids), {"context": 512, "windows": 1}),
        Question(state.layer, (ids,), {}),
        Question(state.layer, (rng.choice(odd.NUMBERS),), {}),
        Question(model.tokenizer.decode, (ids,), {}),
    )
    return rng.choice(questions)


def _arguments(rng: random.Random, model: kvjax.Model, state: kvjax.State, folder: Path) -> Question:
    """One or two arguments of an entry are odd, the others good."""
    few = {"context": 4, "windows": 1, "offset": 0, "protocol": "parallel"}
    draws = {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 1, "stop_strings": "x", "stop_tokens": [3]}
    sizes = {"max_new_tokens": 2, "max_len": 64, "chat": True}
    # A search of good values would take long: the text is too short for it.
    search = {"budget": 4.0, "context": 512, "windows": 1, "candidates": "", "method": "knapsack", "points": 3}
    entries: tuple[tuple[Callable[..., Any], dict[str, Any]], ...] = (
        (kvjax.generate, {"model": model, "prompt": "the", "cache": PLAN, **sizes, **draws}),
        (_stream, {"model": model, "prompt": "the", "cache": state, **sizes, **draws}),
        (kvjax.prefill, {"model": model, "prompt": "the", "cache": PLAN, "max_len": 64}),
        (kvjax.logits, {"model": model, "ids": [1, 2], "cache": PLAN, "read": "stored"}),
        (kvjax.score, {"model": model, "text": [1, 2, 3, 4], "cache": PLAN, **few}),
        (kvjax.sweep, {"model": model, "text": [1, 2, 3, 4], "caches": PLAN, **few, "folder": None}),
        (kvjax.tune, {"model": model, "text": "the quick", **search, "judged_on": "a fox", "folder": None}),
        (kvjax.load, {"name": model.name, "dtype": "float32", "layers": 1}),
        (kvjax.plan, {"model": model, "cache": PLAN}),
        (kvjax.register, {"method": type(state.plan.specs[0])}),
        (kvjax.load_plugins, {"names": "nowhere_at_all"}),
        (kvjax.restore_state, {"folder": folder / "no state", "model": model, "cache": PLAN}),
        (kvjax.save_state, {"folder": folder / "one-file", "model": model, "state": state}),
        (state.plan.table, {"context": 64, "batch": 1}),
        (state.plan.bits_real, {"context": 64, "batch": 1}),
    )
    entry, options = rng.choice(entries)
    for name in rng.sample(sorted(options), rng.choice((1, 1, 2)) if len(options) > 1 else 1):
        options[name] = odd.value(rng)
    return Question(entry, (), options)


def _stream(**options: Any) -> list[Any]:
    return list(kvjax.stream(**options))


def _template(rng: random.Random, tokenizer: Tokenizer) -> Question:
    tokenizer = dataclasses.replace(tokenizer, chat_template=odd.template(rng))
    chat = odd.messages(rng) if rng.random() < 0.2 else [{"role": "user", "content": "Hello"}]
    return Question(rng.choice((tokenizer.chat, tokenizer.chat, tokenizer.follow_up)), (chat,), {})


def _plan(rng: random.Random, configs: list[Any], folder: Path) -> Question:
    config = rng.choice(configs)
    name = odd.plan(rng, config.layers)
    return Question(read_plan, (f"{folder}/{name}" if name in odd.PATHS else name, config), {})


def read_plan(name: str, config: Any) -> None:
    """Takes a plan's name, its canonical name, and its figures."""
    plan = CachePlan.parse(name, config)
    assert CachePlan.parse(str(plan), config) == plan, "the canonical name is another plan's"
    jax.eval_shape(lambda: plan.init(plan.shape(1, 256, "float32")))
    plan.table(256)
