"""What is asked of a model: the arguments of `generate`, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from kvjax.caches.base import CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.checks import check_flag, check_whole, show
from kvjax.errors import KvjaxError
from kvjax.generation.decode import bucket
from kvjax.generation.prompts import Prompts, Read, encode_prompts
from kvjax.generation.sampling import Sampling
from kvjax.generation.states import State, check_made_by
from kvjax.models.model import Model, check_model


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Request:
    """Arguments of `generate` that make sense together."""

    model: Model
    ids: list[Int[np.ndarray, "n"]]  # of each sequence
    read: list[Read]  # of each sequence, the prompt included
    before: State | None  # what is gone on from
    plan: CachePlan
    max_len: int  # tokens that each sequence has room for
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: list[int]
    stop_strings: list[str]
    prefill_chunk: int | None  # tokens of the prompts that are read at a time; all of them where None


def ask(
    model: Model,
    prompt: Prompts,
    cache: str | CacheSpec | CachePlan | State = "dense",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    max_len: int | None = None,
    chat: bool = True,
    prefill_chunk: int | None = None,
) -> Request:
    """Takes the arguments of `generate`, which says what they mean. Raises KvjaxError for the first that does not."""
    check_model(model)
    new = check_whole("max_new_tokens", max_new_tokens, 0)
    if prefill_chunk is not None:
        prefill_chunk = check_whole("prefill_chunk", prefill_chunk, 1)
    before = cache if isinstance(cache, State) else None
    if before is not None:
        check_made_by(before, model)
    prompts = encode_prompts(model, prompt, check_flag("chat", chat), before.read if before else None)
    ids, read = [each.ids for each in prompts], [each.read for each in prompts]
    if isinstance(cache, State):
        plan, room = cache.plan, _grown_room(model, cache, read, new, max_len)
    else:
        plan, room = CachePlan.cast(cache, model.config), _find_room(model, ids, new, max_len)
    sampling = Sampling.of(temperature, top_k, top_p, seed, len(ids), model.config.vocab_size)
    stop = _find_stop_tokens(model, stop_tokens), _find_stop_strings(stop_strings)
    return Request(model, ids, read, before, plan, room, new, sampling, *stop, prefill_chunk)


def _find_room(model: Model, ids: list[np.ndarray], new: int, max_len: int | None) -> int:
    """Tokens to allocate per sequence."""
    if empty := [i for i, each in enumerate(ids) if not len(each)]:
        raise KvjaxError(f"prompt {empty[0]} is empty; expected text")
    prompt, most = max(map(len, ids)), model.config.max_positions
    if max_len is None:
        room = min(bucket(prompt + new), most)
    else:
        room = check_whole("max_len", max_len, 1, most, ", what the model was made for")
    if prompt + new > room:
        limit = f"the model's {room} tokens" if max_len is None else f"max_len={room}"
        raise KvjaxError(f"a prompt of {prompt} tokens and {new} new ones; expected at most {limit} together")
    return room


def _grown_room(model: Model, state: State, read: list[Read], new: int, max_len: int | None) -> int:
    """Tokens per sequence that a state needs room for: more than it has where they would not fit."""
    most, longest = model.config.max_positions, max(range(len(read)), key=lambda i: read[i].tokens)
    needed = read[longest].tokens + new
    if max_len is None:
        room = state.max_len if needed <= state.max_len else min(bucket(needed), most)
    else:
        room = check_whole("max_len", max_len, state.max_len, most, ", from the state's room to what the model has")
    if needed > room:
        held = state.lengths[longest]
        raise KvjaxError(
            f"sequence {longest} holds {held} tokens, {read[longest].tokens - held} more and {new} new ones do not"
            f" fit; {'the model takes' if max_len is None else 'max_len is'} {room}"
        )
    return room


def _find_stop_tokens(model: Model, tokens: Sequence[int] | None) -> list[int]:
    if tokens is None:
        return list(model.tokenizer.eos_ids)
    if isinstance(tokens, str) or not hasattr(tokens, "__iter__") or getattr(tokens, "ndim", 1) != 1:
        raise KvjaxError(f"stop_tokens={show(tokens)}; expected a list of token ids")
    return [check_whole("a stop token", token, 0, model.config.vocab_size - 1) for token in tokens]


def _find_stop_strings(strings: str | Sequence[str]) -> list[str]:
    each: Any
    found: list[str] = []
    for each in strings if hasattr(strings, "__iter__") and not isinstance(strings, str) else [strings]:
        if not isinstance(each, str) or not each:
            raise KvjaxError(f"stop_strings={show(strings)}; expected a text that is not empty, or a list of such")
        found.append(each)
    return found
