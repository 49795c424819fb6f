"""Tokenizers: HF's ids on the real model, and what a HF folder's files say."""

import json
import shutil

import numpy as np
import pytest

from kvjax.errors import KvjaxError
from kvjax.evaluate.text import load_text
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.tokenizer_files import read_tokenizer


def test_smollm2_ids_are_hf_ids(smollm2, goldens):
    golden, tokenizer = np.load(goldens / "smollm2-135m.npz"), smollm2.tokenizer
    np.testing.assert_array_equal(tokenizer.encode(load_text("demo")[:4000])[:256], golden["tokens"][0])
    tricky = str(golden["tricky"])
    np.testing.assert_array_equal(tokenizer.encode(tricky), golden["tricky_ids"])
    assert tokenizer.decode(golden["tricky_ids"]) == tricky
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert "<|im_start|>assistant" in tokenizer.chat_template


def test_hf_folder(goldens, tmp_path):
    shutil.copy(goldens / "qwen3" / "tokenizer.json", tmp_path)
    words = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (1, (2,), "old")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    (tmp_path / "chat_template.jinja").write_text("new")
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.chat_template) == ((2, 5), "new")
    assert tokenizer.decode(tokenizer.encode("</s> a1\n")) == "</s> a1\n"


def test_refused(tmp_path):
    with pytest.raises(KvjaxError, match=r"tokenizer\.json is missing; put the model's tokenizer\.json there"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(KvjaxError, match="is not a tokenizer"):
        read_tokenizer(tmp_path)


def test_bytes():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("é1")
    assert ids.tolist() == [0xC3, 0xA9, 0x31] and ids.dtype == np.int32
    assert tokenizer.decode([*ids, 4000]) == "é1\ufffd"
