"""The zoo's gemma3-270m equals transformers and SentencePiece. Only where its file is there already: it is large."""

import json

import numpy as np
import pytest
from tests.models.test_parity import TOLERANCE

from kvjax.checkpoints.load import load
from kvjax.downloads import cache_folder
from kvjax.generation.generate import generate
from kvjax.models.zoo import GEMMA3


@pytest.fixture(scope="module")
def gemma():
    if not (cache_folder() / GEMMA3.name).is_file():
        pytest.skip(f"{GEMMA3.name} is not fetched")
    return load("gemma3-270m", "float32")


@pytest.fixture(scope="module")
def golden(goldens):
    return dict(np.load(goldens / "gemma3-270m.npz"))


def test_shape(gemma):
    config = gemma.config
    assert (config.layers, config.kv_heads, config.head_dim, config.vocab_size) == (18, 1, 256, 262144)
    assert (config.window, config.full_layers) == (512, (5, 11, 17))


def test_ids_are_those_of_sentencepiece(gemma, golden):
    for text, ids in zip(json.loads(str(golden["tricky"])), json.loads(str(golden["tricky_ids"])), strict=True):
        assert gemma.tokenizer.encode(text).tolist() == ids
        assert gemma.tokenizer.encode(text, start=True).tolist() == [2, *ids]
        assert gemma.tokenizer.decode(ids) == text


def test_logits(gemma, golden, dense_logits):
    logits = dense_logits(gemma.config, gemma.params, golden["tokens"])[0]
    np.testing.assert_array_equal(logits.argmax(-1), golden["argmax"])
    at_positions = logits[golden["positions"]]
    error = np.abs(at_positions[:, golden["columns"]] - golden["logits"]).max()
    assert error <= TOLERANCE * golden["max_abs"]
    np.testing.assert_allclose(np.abs(at_positions).max(), golden["max_abs"], rtol=TOLERANCE)


def test_greedy_texts(gemma, goldens):
    rows = json.loads((goldens / "gemma3-270m-generation.json").read_text(encoding="utf-8"))
    assert len(rows) == 10
    for row in rows:
        assert gemma.tokenizer.encode(row["prompt"], start=True).tolist() == row["ids"]
    longest = max(len(row["new"]) for row in rows)
    made = generate(gemma, [row["prompt"] for row in rows], "dense", max_new_tokens=longest)
    assert made.tokens == [row["new"] for row in rows]
