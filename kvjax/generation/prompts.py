"""Prompts of any kind as token ids: texts, token ids, chat messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from kvjax.errors import KvjaxError
from kvjax.models.model import Model

Ids = Sequence[int] | np.ndarray | jax.Array  # of one sequence
Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...} each: one conversation
Prompt = str | Ids | Messages
Prompts = Prompt | Sequence[Prompt]

EXPECTED = "expected a text, token ids or chat messages, or a list of prompts of one of these kinds"


def encode_prompts(model: Model, prompt: Prompts, chat: bool = True) -> list[Int[np.ndarray, "n"]]:
    """The token ids, int32, of one prompt or of several of the same kind.

    Args:
      model: whose tokenizer and vocabulary count.
      prompt: a text; token ids (a list or 1-D array of ints), taken as they are; chat messages (a list of
        {"role", "content"} dicts), put into the model's chat template; or a list of prompts of one of these kinds.
      chat: put each text into the model's chat template, as the message of a user, where it has one.

    Raises:
      KvjaxError: anything else, no prompts, ids outside the vocabulary, or messages for a model without a template.
    """
    kind, prompts = _split(prompt)
    ids = [_ENCODERS[kind](model, each, chat) for each in prompts]
    for i, each in enumerate(ids):
        if outside := [int(t) for t in each if not 0 <= t < model.config.vocab_size][:1]:
            raise KvjaxError(
                f"prompt {i} holds the token id {outside[0]}; expected 0 to {model.config.vocab_size - 1}"
            )
    return [each.astype(np.int32) for each in ids]


def _split(prompt: Any) -> tuple[str, list[Any]]:
    """The kind of the prompts, and the prompts."""
    if kind := _kind(prompt):
        return kind, [prompt]
    prompts = list(prompt) if isinstance(prompt, list | tuple) or _is_array(prompt, 2) else None
    if prompts is None:
        raise KvjaxError(f"the prompt is {_describe(prompt)}; {EXPECTED}")
    if not prompts:
        raise KvjaxError("no prompts; expected at least one")
    # Within a list of prompts [] is a sequence that gets no tokens.
    kinds = ["token ids" if isinstance(each, list | tuple) and not each else _kind(each) for each in prompts]
    for i, kind in enumerate(kinds):
        if kind is None:
            raise KvjaxError(f"prompt {i} is {_describe(prompts[i])}; {EXPECTED}")
        if kind != kinds[0]:
            raise KvjaxError(f"prompt 0 is of {kinds[0]}, prompt {i} of {kind}; expected prompts of one kind")
    return str(kinds[0]), prompts


def _kind(prompt: Any) -> str | None:
    """What one prompt is, None where it is none."""
    if isinstance(prompt, str):
        return "text"
    if _is_array(prompt, 1):
        return "token ids"
    if not isinstance(prompt, list | tuple) or not prompt:
        return None
    if all(isinstance(each, Integral) and not isinstance(each, bool) for each in prompt):
        return "token ids"
    return "chat messages" if all(map(_is_message, prompt)) else None


def _is_array(value: Any, axes: int) -> bool:
    return isinstance(value, np.ndarray | jax.Array) and value.ndim == axes and np.issubdtype(value.dtype, np.integer)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array of {value.dtype} {list(value.shape)}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"of type {type(value).__name__}"


def _encode_text(model: Model, text: str, chat: bool) -> np.ndarray:
    if chat and model.tokenizer.chat_template is not None and text:
        return _encode_messages(model, [{"role": "user", "content": text}], chat)
    return model.tokenizer.encode(_check_text(text), start=True)


def _encode_ids(model: Model, ids: Ids, chat: bool) -> np.ndarray:
    return np.asarray(ids, np.int64)  # wide: not to wrap what is outside the vocabulary


def _encode_messages(model: Model, messages: Messages, chat: bool) -> np.ndarray:
    return model.tokenizer.encode(_check_text(model.tokenizer.chat(messages)))


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise KvjaxError(f"the prompt holds half a character at {error.start}; expected Unicode text") from None
    return text


_ENCODERS: dict[str, Callable[[Model, Any, bool], np.ndarray]] = {
    "text": _encode_text,
    "token ids": _encode_ids,
    "chat messages": _encode_messages,
}
