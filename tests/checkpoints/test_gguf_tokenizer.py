"""Tokenizers in GGUF files: bos as llama.cpp adds it, ends, words, templates, and every key accounted for."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from kvjax.checkpoints.gguf_tokenizer import read_tokenizer
from kvjax.errors import KvjaxError

TOKENS = [*sorted(ByteLevel.alphabet()), "<s>", "</s>", "<eot>", "<eom>"]
BASE = {
    "general.name": "x",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": np.array([1] * 256 + [3] * 4),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 256,
    "tokenizer.ggml.eos_token_id": 257,
}
BASE["tokenizer.ggml.tokens"] = [*TOKENS, "ab"]
BASE["tokenizer.ggml.token_type"] = np.array([1] * 256 + [3] * 4 + [1])


def read(path=Path("model.gguf"), without=(), **more):
    metadata = {key: value for key, value in BASE.items() if key not in without}
    metadata |= {"tokenizer." + key.replace("__", "."): value for key, value in more.items()}

    def get(key, kind, default=None):
        value = metadata.get(key, default)
        assert value is default or type(value) is kind
        return value

    return read_tokenizer(get, metadata, path)


@pytest.mark.parametrize(
    ("pre", "stated", "starts"),
    [
        ("gpt-2", None, False),
        ("qwen2", None, False),
        ("smollm", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_bos(pre, stated, starts, tmp_path):
    tokenizer = read(ggml__pre=pre, **({} if stated is None else {"ggml__add_bos_token": stated}))
    assert tokenizer.encode("ab c", start=True).tolist() == [256] * starts + tokenizer.encode("ab c").tolist()
    assert tokenizer.encode("<s>ab", start=True).tolist() == [256, 260]
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text().count("TemplateProcessing") == starts


@pytest.mark.parametrize(("kind", "starts"), [("llama", True), ("t5", False)])
def test_bos_with_a_file_beside(kind, starts, goldens, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((goldens / "qwen3" / "tokenizer.json").read_bytes())
    tokenizer = read(tmp_path / "model.gguf", ggml__model=kind, ggml__bos_token_id=1)
    assert tokenizer.encode("a", start=True).tolist() == [1] * starts + tokenizer.encode("a").tolist()


def test_ends_and_words():
    tokenizer = read(
        ggml__eot_token_id=258, ggml__eom_token_id=259, ggml__padding_token_id=257, ggml__unknown_token_id=999
    )
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (256, (257, 258, 259))
    assert tokenizer.words == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def test_templates():
    assert read().chat_template is None
    assert read(chat_template="a").chat_template == "a"
    named = read(chat_template="a", chat_template__tool_use="b", chat_templates=["tool_use"])
    assert named.chat_template == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize(
    ("without", "more", "said"),
    [
        ((), {"ggml__squeeze_blanks": True}, r"metadata tokenizer\.ggml\.squeeze_blanks of model\.gguf is not known"),
        ((), {"ggml__pre": "odd"}, r"\(gpt2, odd\) is not supported"),
        ((), {"ggml__bos_token_id": 5000, "ggml__add_bos_token": True}, "bos is the token id 5000"),
        (("tokenizer.ggml.bos_token_id",), {"ggml__add_bos_token": True}, "and no tokenizer.ggml.bos_token_id"),
        (("tokenizer.ggml.merges",), {}, "has no metadata tokenizer.ggml.merges"),
        ((), {"ggml__merges": ["a z z"]}, "is damaged"),
    ],
    ids=str,
)
def test_refused(without, more, said):
    with pytest.raises(KvjaxError, match=said):
        read(without=without, **more)
