"""Text to token ids and back."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from kvjax.errors import KvjaxError
from kvjax.files import write_json
from kvjax.models import chat_template
from kvjax.models.chat_template import ChatTemplate, Message


class Chats:
    """What every tokenizer does with the chat template of its model."""

    chat_template: ChatTemplate | None
    words: Mapping[str, str]  # the special tokens that templates see by name

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Formats a conversation by the model's chat template, as transformers' `apply_chat_template` does.

        Args:
          messages: one {"role": "system" | "user" | "assistant", "content": text} per message. The content may be a
            list of parts, {"type": "text", "text": text} each. Other keys, tool_calls for example, are passed on.
          tools: JSON schemas of functions that the model may call.
          documents: {"title": ..., "text": ...} each.
          add_generation_prompt: go on up to where the assistant answers.

        Returns:
          The text, which holds bos where the template writes it: encode it with start=False.

        Raises:
          KvjaxError: the model has no template, the template refuses the messages, or it takes too long.
        """
        template = chat_template.choose(self.chat_template, tools is not None)
        names = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        return chat_template.render(template, [messages], {**self.words, **names})[0]

    def follow_up(self, messages: Sequence[Message], ended: str | None = None) -> str:
        """Formats the messages that follow an answer whose tokens stand in a cache.

        What was said earlier need not be known: the template is shown another short conversation instead.

        Args:
          messages: the new messages, as for `chat`; mostly one of the user.
          ended: the stop token with which the answer in the cache ends, written out; None where it ends without one.

        Returns:
          The text from the end of the answer to where the assistant answers again, for `encode_next`. It begins with
          the template's stop token, unless that is `ended`. It holds bos only where the template writes one per turn.

        Raises:
          KvjaxError: as `chat`, or the template does not show earlier answers.
        """
        template = chat_template.choose(self.chat_template, False)
        names = {"tools": None, "documents": None, "add_generation_prompt": True}
        return chat_template.follow_up(template, messages, ended, {**self.words, **names})


@dataclasses.dataclass(frozen=True)
class Tokenizer(Chats):
    """A model's tokenizer. A special token written out in a text is encoded as its id."""

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: ChatTemplate | None = None
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises KvjaxError for invalid ids, and for templates and words that are not texts."""
        ids = self.eos_ids if self.bos_id is None else (self.bos_id, *self.eos_ids)
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise KvjaxError(f"the ids of bos and eos are {self.bos_id!r} and {self.eos_ids!r}; expected token ids")
        templates = self.chat_template.values() if isinstance(self.chat_template, Mapping) else [self.chat_template]
        for each in (*templates, *self.words.values()):
            if not isinstance(each, str | None):
                raise KvjaxError(
                    f"a chat template or special token is of type {type(each).__name__}; expected a text"
                )

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What stands before the text of a sequence: what the backend's post-processor puts there, mostly bos."""
        processor = self.backend.post_processor
        return () if processor is None else _start_ids(json.loads(processor.__getstate__()))

    def encode(self, text: str, start: bool = False) -> Int[np.ndarray, "n"]:
        """Turns a text into token ids.

        No eos is added, whatever the tokenizer's files say of it: every text here is to be gone on from.

        Args:
          text: the text.
          start: the text begins a sequence. What the tokenizer puts there, mostly bos, comes first, unless the text
            begins with it written out.

        Returns:
          Token ids, int32.

        Raises:
          KvjaxError: the text holds half a character.
        """
        ids = self.backend.encode(_check_text(text), add_special_tokens=False).ids
        before = self.start_ids if start and tuple(ids[: len(self.start_ids)]) != self.start_ids else ()
        return np.array([*before, *ids], np.int32)

    def encode_next(self, text: str, last: int | None = None) -> Int[np.ndarray, "n"]:
        """Turns a text that follows other tokens into token ids: those that it has in one text with them.

        SentencePiece puts a blank before a text; here it stands only where it would behind `last`.

        Args:
          text: the text.
          last: the token before it, None where that is an ordinary one.

        Returns:
          Token ids, int32.

        Raises:
          KvjaxError: as `encode`.
        """
        added = None if last is None else self.backend.get_added_tokens_decoder().get(last)
        before = "\n" if added is None else added.content  # a line's end takes the blank, as in transformers
        alone, both = self.encode(before), self.encode(before + _check_text(text))
        return both[alone.size :] if np.array_equal(both[: alone.size], alone) else self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids into text, special tokens included.

        Bytes that are not UTF-8 become U+FFFD; ids without a token are left out.

        Raises:
          KvjaxError: they are no whole numbers.
        """
        return self.backend.decode([i for i in _check_ids(ids) if 0 <= i < 2**32], skip_special_tokens=False)

    def decode_next(self, ids: Iterable[int], last: int | None) -> str:
        """`decode` of ids that follow the token `last`, with the blank that SentencePiece writes between them."""
        if last is None:
            return self.decode(ids)
        before, both = self.decode([last]), self.decode([last, *ids])
        return both[len(before) :] if both.startswith(before) else self.decode(ids)

    def save(self, folder: Path) -> None:
        """Writes the JSON files that `read_tokenizer` reads."""
        self.backend.save(str(folder / "tokenizer.json"))
        templates: Any = self.chat_template
        if isinstance(templates, Mapping):
            templates = [{"name": name, "template": each} for name, each in templates.items()]
        named = {name: word for name, word in self.words.items() if not name.endswith("_token")}
        words = {name: word for name, word in self.words.items() if name not in named}
        config = {**words, "extra_special_tokens": named, "chat_template": templates}
        write_json(folder / "tokenizer_config.json", config)
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids)}
        write_json(folder / "generation_config.json", ids)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Chats):
    """A tokenizer whose ids are UTF-8 bytes, for models that come without a vocabulary."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: ChatTemplate | None = None
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def start_ids(self) -> tuple[int, ...]:
        """Nothing stands before a text."""
        return ()

    def encode(self, text: str, start: bool = False) -> Int[np.ndarray, "n"]:
        """Returns the bytes of the text, int32; `start` adds nothing."""
        return np.frombuffer(_check_text(text).encode(), np.uint8).astype(np.int32)

    def encode_next(self, text: str, last: int | None = None) -> Int[np.ndarray, "n"]:
        """Returns the same as `encode`."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns bytes into text; other ids and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(bytes([i]) if 0 <= i < 256 else b"\xff" for i in _check_ids(ids)).decode(errors="replace")

    def decode_next(self, ids: Iterable[int], last: int | None) -> str:
        """Returns the same as `decode`."""
        return self.decode(ids)


AnyTokenizer = Tokenizer | ByteTokenizer


def adds_space(backend: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer puts a blank before a text, as SentencePiece does."""
    tokens = backend.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith(("Ġ", "▁", " "))


def _check_text(text: Any) -> str:
    if not isinstance(text, str):
        raise KvjaxError(f"the text is of type {type(text).__name__}; expected a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise KvjaxError(f"the text holds half a character at {error.start}; expected Unicode text") from None
    return text


def _check_ids(ids: Any) -> list[int]:
    try:
        return [operator.index(i) for i in ids]
    except TypeError:
        raise KvjaxError(f"the ids are of type {type(ids).__name__}; expected whole numbers") from None


def _start_ids(processor: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that a post-processor puts before a text, from its JSON form."""
    if processor["type"] == "Sequence":  # after one that adds something, the others see a pair, and add nothing here
        return next(filter(None, map(_start_ids, processor["processors"])), ())
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],)
    found: list[int] = []
    for piece in processor.get("single", ()):
        if "SpecialToken" not in piece:
            break
        found += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return tuple(found)
