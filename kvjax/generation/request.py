"""What is asked of a model: the arguments of `generate`, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from kvjax.caches.base import CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.generation.checks import check_whole
from kvjax.generation.decode import bucket
from kvjax.generation.prompts import Prompts, encode_prompts
from kvjax.generation.sampling import Sampling
from kvjax.generation.states import State, check_made_by
from kvjax.models.model import Model


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Request:
    """Arguments of `generate` that make sense together."""

    model: Model
    ids: list[Int[np.ndarray, "n"]]  # of each sequence
    before: State | None  # what is gone on from
    plan: CachePlan
    max_len: int  # tokens that each sequence has room for
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: list[int]


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
    max_len: int | None = None,
    chat: bool = True,
) -> Request:
    """Takes the arguments of `generate`, which says what they mean. Raises KvjaxError for the first that does not."""
    if not isinstance(model, Model):
        raise KvjaxError(f"the model is of type {type(model).__name__}; expected what kvjax.load gives")
    new = check_whole("max_new_tokens", max_new_tokens, 0)
    before = cache if isinstance(cache, State) else None
    ids = encode_prompts(model, prompt, chat and before is None)
    if isinstance(cache, State):
        _check_fits(model, cache, ids, new, max_len)
        plan, room = cache.plan, cache.max_len
    else:
        plan = CachePlan.cast(cache, model.config)
        room = _find_room(model, ids, new, max_len)
    sampling = Sampling.of(temperature, top_k, top_p, seed, len(ids), model.config.vocab_size)
    return Request(model, ids, before, plan, room, new, sampling, _find_stop_tokens(model, stop_tokens))


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


def _check_fits(model: Model, state: State, ids: list[np.ndarray], new: int, max_len: int | None) -> None:
    check_made_by(state, model)
    lengths = state.lengths
    if len(ids) != len(lengths):
        raise KvjaxError(f"{len(ids)} prompts for a state of {len(lengths)} sequences; expected one for each")
    if max_len not in (None, state.max_len):
        raise KvjaxError(f"max_len={max_len}; the state has room for {state.max_len} tokens and keeps it")
    for i, (held, each) in enumerate(zip(lengths, ids, strict=True)):
        if held + len(each) + new > state.max_len:
            raise KvjaxError(
                f"sequence {i} holds {held} tokens, {len(each)} more and {new} new ones do not fit;"
                f" the state was made with max_len={state.max_len}"
            )


def _find_stop_tokens(model: Model, tokens: Sequence[int] | None) -> list[int]:
    if tokens is None:
        return list(model.tokenizer.eos_ids)
    if isinstance(tokens, str) or not hasattr(tokens, "__iter__"):
        raise KvjaxError(f"stop_tokens={tokens!r}; expected a list of token ids")
    return [check_whole("a stop token", token, 0, model.config.vocab_size - 1) for token in tokens]
