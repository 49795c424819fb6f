"""Text to token ids and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from kvjax.errors import KvjaxError
from kvjax.files import brief, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. No special tokens are added; those written in the text become their ids."""

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None  # Jinja

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        """Token ids, int32."""
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Writes the JSON files that `read_tokenizer` reads."""
        self.backend.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {"chat_template": self.chat_template})
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids)}
        write_json(folder / "generation_config.json", ids)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are the ids: for models without a vocabulary of their own."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        """The bytes of the text, int32."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; ids above 255 and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(bytes([i]) if i < 256 else b"\xff" for i in map(int, ids)).decode(errors="replace")


AnyTokenizer = Tokenizer | ByteTokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a HF folder: tokenizer.json, and what its other JSON files say of bos, eos and chats.

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
    """A tokenizer.json.

    Raises:
      KvjaxError: it is missing, or it cannot be read.
    """
    if not file.is_file():
        raise KvjaxError(f"{file} is missing; put the model's tokenizer.json there")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise KvjaxError(f"{file} is not a tokenizer: {brief(error)}") from None


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _ids(value: int | list[int] | None, word: str | Mapping[str, Any] | None, backend) -> tuple[int, ...]:
    """Token ids from a *_token_id, or else from a *_token of tokenizer_config.json."""
    if value is None and word is not None:
        value = backend.token_to_id(word if isinstance(word, str) else word["content"])
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _chat_template(folder: Path, words: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = words.get("chat_template")
    if isinstance(template, list):  # several named ones
        return {each["name"]: each["template"] for each in template}.get("default")
    return template
