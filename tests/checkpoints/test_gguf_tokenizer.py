"""Tokenizers in GGUF files: bos as llama.cpp adds it, ends, words, templates, and every key accounted for."""

import random
import re
from itertools import pairwise
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


PIECES = ["<unk>", "<s>", "  ", "\n\n", "<b>", *(f"<0x{i:02X}>" for i in range(256)), *"ab▁c", "ab", "▁a", "ba", "aa"]
PIECES += ["▁ab", "aab", "bab", "aaaa", "c▁", "▁▁a"]
KINDS = np.array([2, 3, 4, 4, 4] + [6] * 256 + [1] * (len(PIECES) - 261))
SCORES = np.random.default_rng(0).permutation(len(PIECES)).astype(np.float32)
SENTENCEPIECE = {
    "ggml__model": "llama",
    "ggml__pre": "default",
    "ggml__tokens": PIECES,
    "ggml__token_type": KINDS,
    "ggml__scores": SCORES,
    "ggml__add_space_prefix": False,
    "ggml__bos_token_id": 1,
    "ggml__eos_token_id": 0,
    "ggml__unknown_token_id": 0,
}


def join_pairs(text):
    """SentencePiece's BPE, as published: of all pairs that make a token the best joins, the leftmost of equals."""
    scores = {piece: SCORES[i] for i, piece in enumerate(PIECES) if KINDS[i] == 1}
    parts = list(text.replace(" ", "▁"))
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = [[part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [PIECES.index(piece) for pieces in known for piece in pieces]


def test_sentencepiece():
    tokenizer = read(**SENTENCEPIECE)
    rng = random.Random(0)
    texts = [
        "".join(rng.choices(["a", "b", "c", " ", "é", "\n", "<b>", "<s>"], k=rng.randint(0, 24))) for _ in range(300)
    ]
    for text in texts:
        whole = re.split(r"(  |\n\n|<b>|<s>)", text)  # tokens that no pair reaches into
        expected = [PIECES.index(part) if i % 2 else join_pairs(part) for i, part in enumerate(whole)]
        ids = tokenizer.encode(text)
        assert ids.tolist() == np.hstack([[], *expected]).tolist(), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("ab", start=True).tolist() == [1, PIECES.index("ab")]


def test_a_space_prefix_needs_a_file(goldens, tmp_path):
    with pytest.raises(KvjaxError, match=r"\(llama, default\) is not supported; put its HF form at"):
        read(**SENTENCEPIECE | {"ggml__add_space_prefix": True})
