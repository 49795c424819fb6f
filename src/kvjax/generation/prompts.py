"""Prompts of any kind as token ids: texts, token ids, chat messages.

Special tokens follow the position, not the call: what a tokenizer puts before a text, mostly bos, stands once, at the
start of a sequence, and what goes on from a state gets nothing but what was given. A text that follows a chat is put
into the model's chat template as the user's next message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from kvjax.errors import KvjaxError
from kvjax.models.model import Model

Ids = Sequence[int] | np.ndarray | jax.Array  # of one sequence
Messages = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...} each: one conversation
Prompt = str | Ids | Messages
Prompts = Prompt | Sequence[Prompt]

EXPECTED = "expected a text, token ids or chat messages, or a list of prompts of one of these kinds"


class Read(NamedTuple):
    """What of a sequence was read."""

    tokens: int = 0
    last: int | None = None  # the last token's id, None where it is not known
    chat: bool = False  # whether it is a conversation in the model's chat template

    def then(self, ids: Sequence[int] | np.ndarray) -> Read:
        """This and more tokens."""
        return self._replace(tokens=self.tokens + len(ids), last=int(ids[-1])) if len(ids) else self


class Encoded(NamedTuple):
    """A prompt as token ids, and what was read when they are."""

    ids: Int[np.ndarray, "n"]
    read: Read


def encode_prompts(
    model: Model, prompt: Prompts, chat: bool = True, before: Sequence[Read] | None = None
) -> list[Encoded]:
    """The token ids, int32, of one prompt or of several of the same kind.

    Args:
      model: whose tokenizer and vocabulary count.
      prompt: a text; token ids (a list or 1-D array of ints), taken as they are; chat messages (a list of
        {"role", "content"} dicts), put into the model's chat template; or a list of prompts of one of these kinds.
      chat: put each text into the model's chat template, as the message of a user, where it has one and the text
        begins a sequence or follows a chat.
      before: what stands before each prompt in its sequence; nothing where None.

    Raises:
      KvjaxError: anything else, no prompts or another number than of sequences, half a character, ids outside the
        vocabulary, or messages for a model without a template.
    """
    kind, prompts = _split(prompt)
    before = [Read()] * len(prompts) if before is None else before
    if len(prompts) != len(before):
        raise KvjaxError(f"{len(prompts)} prompts for a state of {len(before)} sequences; expected one for each")
    encode = _ENCODERS[kind]
    return [_check(model, i, encode(model, *each, chat)) for i, each in enumerate(zip(prompts, before, strict=True))]


def _check(model: Model, number: int, prompt: Encoded) -> Encoded:
    if outside := [int(t) for t in prompt.ids if not 0 <= t < model.config.vocab_size][:1]:
        raise KvjaxError(
            f"prompt {number} holds the token id {outside[0]}; expected 0 to {model.config.vocab_size - 1}"
        )
    return prompt._replace(ids=prompt.ids.astype(np.int32))


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
    """Whether it looks like one; the tokenizer checks the rest."""
    return isinstance(value, Mapping) and "role" in value


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array of {value.dtype} {list(value.shape)}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"of type {type(value).__name__}"


def _encode_text(model: Model, text: str, before: Read, chat: bool) -> Encoded:
    in_chat = chat and text and model.tokenizer.chat_template is not None
    if in_chat and (before.chat or _holds_no_text(model, before)):
        return _encode_messages(model, [{"role": "user", "content": text}], before, chat)
    ids = (
        model.tokenizer.encode_next(text, before.last) if before.tokens else model.tokenizer.encode(text, start=True)
    )
    return Encoded(ids, before.then(ids))


def _holds_no_text(model: Model, read: Read) -> bool:
    """Whether nothing was read but what the tokenizer puts before every text."""
    start = model.tokenizer.start_ids
    return not read.tokens or (read.tokens, read.last) == (len(start), *start[-1:])


def _encode_ids(model: Model, ids: Ids, before: Read, chat: bool) -> Encoded:
    try:
        wide = np.asarray(ids, np.int64)  # not to wrap what is outside the vocabulary
    except OverflowError:
        raise KvjaxError(f"a token id is beyond 64 bits; expected 0 to {model.config.vocab_size - 1}") from None
    return Encoded(wide, before.then(wide))


def _encode_messages(model: Model, messages: Messages, before: Read, chat: bool) -> Encoded:
    tokenizer = model.tokenizer
    if before.chat:
        ended = tokenizer.decode([before.last]) if before.last in tokenizer.eos_ids else None
        text = tokenizer.follow_up(messages, ended)
        ids = tokenizer.encode_next(text, before.last)
    else:
        text = tokenizer.chat(messages)
        ids = tokenizer.encode(text, start=True)
        if before.tokens:  # a chat that begins behind a document
            ids = ids[len(tokenizer.start_ids) :]
    if not text:
        raise KvjaxError("the chat template writes nothing for the messages; give a text itself, with chat=False")
    return Encoded(ids, before.then(ids)._replace(chat=True))


_ENCODERS: dict[str, Callable[[Model, Any, Read, bool], Encoded]] = {
    "text": _encode_text,
    "token ids": _encode_ids,
    "chat messages": _encode_messages,
}
