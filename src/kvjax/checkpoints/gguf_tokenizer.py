"""Tokenizers in GGUF files: byte-level BPE, SentencePiece's BPE, or a tokenizer.json beside the file.

Every key of the metadata under `tokenizer.` is used, stands in a table here, or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kvjax.errors import KvjaxError
from kvjax.files import brief
from kvjax.models.chat_template import ChatTemplate
from kvjax.models.tokenizer import Tokenizer
from kvjax.models.tokenizer_files import read_backend, start_with

Get = Callable[..., Any]  # (key, type, default) -> the value, as GGUFFile.get

TEMPLATE = "tokenizer.chat_template"
_INFILL = "for infilling, which kvjax does not do"
_BESIDE = "only for kinds that need a tokenizer.json beside the file, which holds the result"

KEYS = {  # under tokenizer.: what kvjax does with it
    "ggml.model": "used",
    "ggml.pre": "used",
    "ggml.tokens": "used",
    "ggml.token_type": "used: control and user-defined tokens are matched whole in a text",
    "ggml.merges": "used",
    "ggml.bos_token_id": "used",
    "ggml.eos_token_id": "used: ends generation",
    "ggml.eot_token_id": "used: ends generation",
    "ggml.eom_token_id": "used: ends generation",
    "ggml.unknown_token_id": "used: seen by the template",
    "ggml.padding_token_id": "used: seen by the template",
    "ggml.add_bos_token": "used; where it is not stated, llama.cpp's default of the kind",
    "ggml.add_eos_token": "no eos is added to a text that is to be gone on from",
    "ggml.add_sep_token": "no separator is added to a text that is to be gone on from",
    "ggml.add_space_prefix": "used: SentencePiece's BPE needs a tokenizer.json beside the file, unless it is false",
    "ggml.remove_extra_whitespaces": _BESIDE,
    "ggml.escape_whitespaces": _BESIDE,
    "ggml.precompiled_charsmap": _BESIDE,
    "ggml.normalizer.lowercase": _BESIDE,
    "ggml.normalizer.strip_accents": _BESIDE,
    "ggml.scores": "used: SentencePiece joins the pair with the highest score first",
    "ggml.token_type_count": "for models with segments",
    "ggml.seperator_token_id": "for models with segments",  # as GGUF spells it
    "ggml.separator_token_id": "for models with segments",
    "ggml.cls_token_id": "for models with segments",
    "ggml.mask_token_id": "for models with masks",
    "ggml.fim_pre_token_id": _INFILL,
    "ggml.fim_suf_token_id": _INFILL,
    "ggml.fim_mid_token_id": _INFILL,
    "ggml.fim_pad_token_id": _INFILL,
    "ggml.fim_rep_token_id": _INFILL,
    "ggml.fim_sep_token_id": _INFILL,
    "ggml.prefix_token_id": _INFILL,
    "ggml.suffix_token_id": _INFILL,
    "ggml.middle_token_id": _INFILL,
    "ggml.suppress_tokens": "not applied: kvjax samples from the model's own logits",
    "huggingface.json": "the same tokenizer once more",
    "rwkv.world": _BESIDE,
    "chat_template": "used",
    "chat_templates": "used: names of the templates chat_template.NAME",
}
STARTS_WITH_BOS = {"llama": True, "bert": True, "t5": False, "rwkv": False}  # by ggml.model
STARTS_WITH_BOS_BPE = frozenset(  # values of ggml.pre, where the model is gpt2
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
) | {"tekken", "chameleon", "gemma4"}


def read_tokenizer(get: Get, keys: Iterable[str], path: Path) -> Tokenizer:
    """Reads the tokenizer in a GGUF file; where its kind is not supported, a tokenizer.json beside the file.

    Args:
      get: reads a value of the metadata.
      keys: all keys of the metadata.
      path: the file.

    Returns:
      The tokenizer.

    Raises:
      KvjaxError: a key or the kind is not known, or a value is damaged.
    """
    for key in keys:
        known = not key.startswith("tokenizer.") or key.removeprefix("tokenizer.") in KEYS
        if not known and not key.startswith(TEMPLATE + "."):
            raise KvjaxError(f"metadata {key} of {path} is not known; it may change what the model is given")
    backend = _backend(get, path)
    ids = {name: get(f"tokenizer.ggml.{name}_token_id", int) for name in ("bos", "eos", "eot", "eom")}
    _set_start(get, backend, ids["bos"], path)
    ends = (ids[name] for name in ("eos", "eot", "eom"))
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        chat_template=_chat_template(get, keys),
        words=_words(get, backend),
    )


def _backend(get: Get, path: Path) -> Backend:
    kind, pre = get("tokenizer.ggml.model", str), get("tokenizer.ggml.pre", str, "default")
    beside = path.parent / "tokenizer.json"
    read: Callable[[Get, str, Path], Backend] | None = None
    if kind == "gpt2" and pre in PRE_TOKENIZERS:
        read = _byte_level_bpe
    elif kind == "llama" and pre == "default" and get("tokenizer.ggml.add_space_prefix", bool, True) is False:
        read = _sentencepiece_bpe
    if read:
        try:
            return read(get, pre, path)
        except KvjaxError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise KvjaxError(f"the tokenizer of {path} is damaged: {brief(error)}") from None
    if beside.is_file():
        return read_backend(beside)
    raise KvjaxError(f"the tokenizer of {path} ({kind}, {pre}) is not supported; put its HF form at {beside}")


def _set_start(get: Get, backend: Backend, bos: int | None, path: Path) -> None:
    """Whether a sequence starts with bos: what the file says, or else llama.cpp (src/llama-vocab.cpp)."""
    kind, pre = get("tokenizer.ggml.model", str), get("tokenizer.ggml.pre", str, "default")
    stated = get("tokenizer.ggml.add_bos_token", bool)
    if stated and bos is None:
        raise KvjaxError(f"{path} has tokenizer.ggml.add_bos_token and no tokenizer.ggml.bos_token_id")
    default = pre in STARTS_WITH_BOS_BPE if kind == "gpt2" else STARTS_WITH_BOS.get(kind)
    adds = default if stated is None else stated
    if adds is not None:  # of another kind nothing is known but the tokenizer.json
        start_with(backend, bos if adds else None)


def _words(get: Get, backend: Backend) -> dict[str, str]:
    """The special tokens that templates see by name."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {word: get(f"tokenizer.ggml.{name}_token_id", int) for name, word in names.items()}
    words = {word: backend.id_to_token(i) for word, i in ids.items() if i is not None and 0 <= i < 2**32}
    return {word: token for word, token in words.items() if token is not None}


def _chat_template(get: Get, keys: Iterable[str]) -> ChatTemplate | None:
    default = get(TEMPLATE, str)
    named = {key.removeprefix(TEMPLATE + "."): get(key, str) for key in keys if key.startswith(TEMPLATE + ".")}
    return {**named, **({} if default is None else {"default": default})} if named else default


def _need(get: Get, key: str, kind: type, path: Path) -> Any:
    value = get(key, kind)
    if value is None:
        raise KvjaxError(f"{path} has no metadata {key}")
    return value


def _read_tokens(get: Get, path: Path) -> tuple[list[str], list[int]]:
    """All tokens, and the kind of each."""
    kinds = _need(get, "tokenizer.ggml.token_type", np.ndarray, path).tolist()
    return _need(get, "tokenizer.ggml.tokens", list, path), kinds


def _add_whole(backend: Backend, tokens: list[str], kinds: list[int]) -> None:
    """Control and user-defined tokens are matched whole in a text."""
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED)
    added = [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds, strict=True) if k in whole]
    backend.add_special_tokens(added)


def _byte_level_bpe(get: Get, pre: str, path: Path) -> Backend:
    tokens, kinds = _read_tokens(get, path)
    merges = [tuple(merge.split(" ")) for merge in _need(get, "tokenizer.ggml.merges", list, path)]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3's vocabulary has whole words that no merges lead to.
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    _add_whole(backend, tokens, kinds)
    return backend


def _sentencepiece_bpe(get: Get, pre: str, path: Path) -> Backend:
    """The BPE of SentencePiece (arXiv 1808.06226): any pair that makes a token joins, the highest score first.

    What no token holds is written in bytes. `▁` stands for a blank.
    """
    tokens, kinds = _read_tokens(get, path)
    scores = _need(get, "tokenizer.ggml.scores", np.ndarray, path).tolist()
    words = {t: s for t, k, s in zip(tokens, kinds, scores, strict=True) if k == TokenType.NORMAL}
    merges = [
        (word[:i], word[i:])
        for word in sorted(words, key=words.__getitem__, reverse=True)
        for i in range(1, len(word))
        if word[:i] in words and word[i:] in words
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = get("tokenizer.ggml.unknown_token_id", int)
    backend = Backend(
        models.BPE(vocab, merges, byte_fallback=True, unk_token=None if unknown is None else tokens[unknown])
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_whole(backend, tokens, kinds)
    return backend


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # by `tokenizer.ggml.pre`
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _split(_WORDS % r"\p{N}{1,3}"),
    "qwen2": _split(_WORDS % r"\p{N}"),
}
