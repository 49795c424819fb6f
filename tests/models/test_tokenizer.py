"""Tokenizers: HF's ids on the real model, what a sequence starts with, chats, saving."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from kvjax.errors import KvjaxError
from kvjax.evaluate.text import load_text
from kvjax.models.tokenizer import ByteTokenizer, Tokenizer
from kvjax.models.tokenizer_files import read_backend, read_tokenizer, start_with


def test_smollm2_ids_are_hf_ids(smollm2, goldens):
    golden, tokenizer = np.load(goldens / "smollm2-135m.npz"), smollm2.tokenizer
    np.testing.assert_array_equal(tokenizer.encode(load_text("demo")[:4000])[:256], golden["tokens"][0])
    tricky = str(golden["tricky"])
    np.testing.assert_array_equal(tokenizer.encode(tricky), golden["tricky_ids"])
    assert tokenizer.decode(golden["tricky_ids"]) == tricky
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert "<|im_start|>assistant" in tokenizer.chat_template


@pytest.fixture
def backend(goldens):
    return read_backend(goldens / "qwen3" / "tokenizer.json")


def around(single, *words):
    return processors.TemplateProcessing(single, special_tokens=[(word, i + 1) for i, word in enumerate(words)])


BYTES = processors.ByteLevel()


@pytest.mark.parametrize(
    ("processor", "start"),
    [
        (None, []),
        (BYTES, []),
        (around("<s> $A", "<s>"), [1]),
        (around("<s> $A </s>", "<s>", "</s>"), [1]),
        (around("$A </s>", "<s>", "</s>"), []),
        (around("<s> <s> $A", "<s>"), [1, 1]),
        (processors.Sequence([BYTES, around("<s> $A", "<s>")]), [1]),
        (processors.Sequence([around("</s> $A", "<s>", "</s>"), around("<s> $A", "<s>")]), [2]),
        (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), [1]),
        (processors.BertProcessing(("</s>", 2), ("<s>", 1)), [1]),
    ],
    ids=repr,
)
def test_a_sequence_starts_once_and_does_not_end(backend, processor, start):
    backend.post_processor = processor
    tokenizer = Tokenizer(backend, 1, (2,))
    text = tokenizer.encode("hello world").tolist()
    assert tokenizer.encode("hello world", start=True).tolist() == [*start, *text]
    hf = backend.encode("hello world", add_special_tokens=True).ids
    assert [*start, *text] == hf[: len(start) + len(text)]
    assert tokenizer.encode("", start=True).tolist() == start
    written = tokenizer.decode(start) + "hello world"
    assert tokenizer.encode(written, start=True).tolist() == [*start, *text]
    pieces = [tokenizer.encode("hello ", start=True), tokenizer.encode("world"), tokenizer.encode("")]
    assert np.concatenate(pieces).tolist() == [*start, *text]


def characters(normalizer=None, pre_tokenizer=None):
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("<▁\nabcdehlorw .")}, [], unk_token="<"))
    if normalizer:
        backend.normalizer = normalizers.Sequence(normalizer)
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        characters(),
        characters(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")),
        characters(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
        characters([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ],
    ids=["bare", "always", "first", "normalizer"],
)
@pytest.mark.parametrize("pieces", [("hello ", "world"), ("hello", " world"), ("a", "\nb", "c")])
def test_pieces_are_the_whole(backend, pieces):
    tokenizer = Tokenizer(backend)
    ids = [tokenizer.encode(pieces[0], start=True), *(tokenizer.encode_next(piece) for piece in pieces[1:])]
    assert np.concatenate(ids).tolist() == tokenizer.encode("".join(pieces), start=True).tolist()


@pytest.mark.parametrize("make", [lambda backend: Tokenizer(backend), lambda backend: ByteTokenizer()])
def test_half_a_character_is_refused_and_every_id_decodes(backend, make):
    tokenizer = make(backend)
    for text in ("ab\udcff", "ab\ud800c"):
        with pytest.raises(KvjaxError, match="half a character at 2"):
            tokenizer.encode(text)
    with pytest.raises(KvjaxError, match="of type bytes"):
        tokenizer.encode(b"ab")
    assert isinstance(tokenizer.decode([-1, 0, 255, 300, 2**31, 2**40, -(2**70)]), str)


def test_chat_and_follow_up(backend):
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{{ tools|length if tools else '' }}{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer = Tokenizer(backend, 1, (3, 2), template, {"bos_token": "<s>", "eos_token": "</s>"})
    hello = [{"role": "user", "content": "hello"}]
    assert tokenizer.chat(hello) == "<s>u:hello</s>a:"
    assert tokenizer.chat(hello, tools=[{}], add_generation_prompt=False) == "<s>u:hello</s>1"
    assert tokenizer.follow_up(hello, "</s>") == "u:hello</s>a:"
    assert tokenizer.encode(tokenizer.chat(hello)).tolist()[:2] == [1, *tokenizer.encode("u").tolist()]
    of_bytes = ByteTokenizer(chat_template=template, words=tokenizer.words)
    assert of_bytes.chat(hello) == tokenizer.chat(hello)
    for refused in (dataclasses.replace(tokenizer, chat_template=None), ByteTokenizer()):
        for method in (refused.chat, refused.follow_up):
            with pytest.raises(KvjaxError, match="no chat template"):
                method(hello)


def test_saved_and_read_again(backend, tmp_path):
    start_with(backend, 1)
    templates = {"default": "a", "tool_use": "b"}
    tokenizer = Tokenizer(backend, 1, (2, 5), templates, {"bos_token": "<s>", "pad_token": "<unk>"})
    tokenizer.save(tmp_path)
    again = read_tokenizer(tmp_path)
    for name in ("bos_id", "eos_ids", "chat_template", "words", "start_ids"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode("ab", start=True).tolist() == tokenizer.encode("<s>ab").tolist()


def test_bytes():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("é1")
    assert ids.tolist() == [0xC3, 0xA9, 0x31] and ids.dtype == np.int32
    assert tokenizer.decode([*ids, 4000]) == "é1\ufffd"
