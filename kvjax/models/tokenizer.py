"""Text to token ids and back."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np
import tokenizers
from jaxtyping import Int

from kvjax.errors import KvjaxError
from kvjax.files import brief, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. A special token written out in a text is encoded as its id."""

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None  # Jinja

    def __post_init__(self) -> None:
        """Raises KvjaxError for invalid ids and for a template that is not a text."""
        ids = self.eos_ids if self.bos_id is None else (self.bos_id, *self.eos_ids)
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise KvjaxError(f"the ids of bos and eos are {self.bos_id!r} and {self.eos_ids!r}; expected token ids")
        if not isinstance(self.chat_template, str | None):
            raise KvjaxError(f"the chat template is of type {type(self.chat_template).__name__}; expected a text")

    def encode(self, text: str, special: bool = False) -> Int[np.ndarray, "n"]:
        """Turns a text into token ids.

        Args:
          text: the text.
          special: adds the special tokens that the tokenizer puts around a text, a leading bos for example.

        Returns:
          Token ids, int32.
        """
        return np.array(self.backend.encode(text, add_special_tokens=special).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids into text, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Formats a conversation by the model's chat template, up to where the assistant answers.

        Args:
          messages: one {"role": "system" | "user" | "assistant", "content": text} per message.

        Returns:
          The text.

        Raises:
          KvjaxError: the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise KvjaxError("the model has no chat template; give the text itself, with chat=False")
        names = {} if self.bos_id is None else {"bos_token": self.backend.id_to_token(self.bos_id)}
        names |= {"eos_token": self.backend.id_to_token(self.eos_ids[0])} if self.eos_ids else {}
        try:
            template = _JINJA.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=True, **names)
        except jinja2.TemplateError as error:
            raise KvjaxError(f"the chat template cannot be applied: {brief(error)}") from None

    def save(self, folder: Path) -> None:
        """Writes the JSON files that `read_tokenizer` reads."""
        self.backend.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {"chat_template": self.chat_template})
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids)}
        write_json(folder / "generation_config.json", ids)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """A tokenizer whose ids are UTF-8 bytes, for models that come without a vocabulary."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def encode(self, text: str, special: bool = False) -> Int[np.ndarray, "n"]:
        """Returns the bytes of the text, int32; `special` adds nothing."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns bytes into text; ids above 255 and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(bytes([i]) if i < 256 else b"\xff" for i in map(int, ids)).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Raises KvjaxError: there is no chat template."""
        raise KvjaxError("the model has no chat template; give the text itself, with chat=False")


AnyTokenizer = Tokenizer | ByteTokenizer


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


# A template comes with the checkpoint, so it runs in a sandbox and sees only its arguments.
_JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
_JINJA.globals |= {
    "raise_exception": _refuse,
    "strftime_now": lambda form: datetime.datetime.now().strftime(form),
}


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a HF folder.

    It is tokenizer.json, with bos, eos and the chat template from the folder's other files.

    Args:
      folder: the folder.

    Returns:
      The tokenizer.

    Raises:
      KvjaxError: there is no tokenizer.json, or it cannot be read.
    """
    backend = read_backend(folder / "tokenizer.json")
    words = _optional_json(folder / "tokenizer_config.json")
    # As in transformers, generation_config.json has the last word on where generation ends.
    ids = _optional_json(folder / "config.json") | _optional_json(folder / "generation_config.json")
    bos, eos = (_ids(ids.get(f"{x}_token_id"), words.get(f"{x}_token"), backend) for x in ("bos", "eos"))
    return Tokenizer(backend, bos[0] if bos else None, eos, _chat_template(folder, words))


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """Reads a tokenizer.json.

    Args:
      file: the file.

    Returns:
      The tokenizer of the `tokenizers` library, without truncation and padding.

    Raises:
      KvjaxError: it is missing, or it cannot be read.
    """
    if not file.is_file():
        raise KvjaxError(f"{file} is missing; put the model's tokenizer.json there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # the library raises nothing narrower, and a panic of its Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise KvjaxError(f"{file} is not a tokenizer: {brief(error)}") from None
    # Files set these for batches of training texts: here they would cut a text, or pad it.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _ids(value: int | list[int] | None, word: str | Mapping[str, Any] | None, backend) -> tuple[int, ...]:
    """Token ids from a *_token_id, or else from a *_token of tokenizer_config.json."""
    if value is None and word is not None:
        content = word.get("content") if isinstance(word, Mapping) else word
        if not isinstance(content, str):
            raise KvjaxError(f"bos or eos of tokenizer_config.json is {word!r}; expected a token")
        value = backend.token_to_id(content.encode(errors="replace").decode())  # JSON may hold half a surrogate pair
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _chat_template(folder: Path, words: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise KvjaxError(f"{file} is not UTF-8: byte {error.start} does not decode") from None
    template = words.get("chat_template")
    if isinstance(template, list):  # several templates with names
        named = (each for each in template if isinstance(each, Mapping) and each.get("name") == "default")
        return next((each.get("template") for each in named), None)
    return template
