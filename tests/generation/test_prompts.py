"""Prompts of every kind become the same ids; anything else is said in a line."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import kvjax
from kvjax.generation.prompts import encode_prompts
from kvjax.models.model import Model
from kvjax.models.tokenizer_files import start_with

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}|"
HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
HELLO_TEXT = "<system>be brief<user>hello|"


@pytest.fixture(scope="module")
def chatty(tiny: Model) -> Model:
    return dataclasses.replace(tiny, tokenizer=dataclasses.replace(tiny.tokenizer, chat_template=TEMPLATE))


def encoded(model: Model, prompt: Any, chat: bool = True) -> list[list[int]]:
    ids = [each.ids for each in encode_prompts(model, prompt, chat)]
    assert all(each.dtype == np.int32 and each.ndim == 1 for each in ids)
    return [each.tolist() for each in ids]


def test_texts(chatty: Model) -> None:
    encode = chatty.tokenizer.encode
    assert encoded(chatty, "hello") == [encode("<user>hello|").tolist()]
    assert encoded(chatty, "hello", chat=False) == [encode("hello", start=True).tolist()]
    assert encoded(chatty, ("a", "bc", ""), chat=False) == [encode(t, start=True).tolist() for t in ("a", "bc", "")]


def test_a_chat_begins_behind_an_empty_text(chatty: Model) -> None:
    """What holds bos alone goes on as a sequence that begins; what holds a text does not."""
    backend = tokenizers.Tokenizer.from_str(chatty.tokenizer.backend.to_str())
    start_with(backend, 1)
    model = dataclasses.replace(chatty, tokenizer=dataclasses.replace(chatty.tokenizer, backend=backend))
    (nothing,), (text,) = (encode_prompts(model, prompt, chat=False) for prompt in ("", "hello"))
    assert nothing.ids.tolist() == [1]
    for prompt in ("hello", HELLO[1:]):
        (after,) = encode_prompts(model, prompt, before=[nothing.read])
        assert [1, *after.ids.tolist()] == encoded(model, "hello")[0] and after.read.chat
    (after,) = encode_prompts(model, "hello", before=[text.read])
    assert after.ids.tolist() == model.tokenizer.encode_next("hello").tolist() and not after.read.chat


@pytest.mark.parametrize(
    "prompt,ids",
    [
        ([1, 2, 3], [[1, 2, 3]]),
        ((5,), [[5]]),
        (np.array([1, 127], np.uint8), [[1, 127]]),
        (jnp.array([4, 5]), [[4, 5]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[np.int64(1)], np.array([2, 3])], [[1], [2, 3]]),
        (np.arange(6).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
        ([[], [7]], [[], [7]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("chat", [True, False])
def test_token_ids_are_taken_as_they_are(chatty: Model, prompt: Any, ids: list[list[int]], chat: bool) -> None:
    assert encoded(chatty, prompt, chat) == ids


@pytest.mark.parametrize("chat", [True, False])
def test_messages_are_put_into_the_template(chatty: Model, chat: bool) -> None:
    ids = chatty.tokenizer.encode(HELLO_TEXT).tolist()
    assert encoded(chatty, HELLO, chat) == [ids]
    assert encoded(chatty, [HELLO, HELLO[1:]], chat) == [ids, chatty.tokenizer.encode("<user>hello|").tolist()]


@pytest.mark.parametrize(
    "prompt,said",
    [
        ([], "no prompts; expected at least one"),
        (np.zeros((0, 3), int), "no prompts"),
        (7, "the prompt is of type int; expected a text, token ids or chat messages"),
        (None, "of type NoneType"),
        (b"abc", "of type bytes"),
        (HELLO[0], "of type dict"),
        (np.array([0.5]), r"an array of float64 \[1\]"),
        (np.zeros((1, 2, 3), int), r"an array of int64 \[1, 2, 3\]"),
        ([1, 2.5], "prompt 0 is of type int"),
        ([True, False], "prompt 0 is of type bool"),
        (["a", [1]], "prompt 0 is of text, prompt 1 of token ids; expected prompts of one kind"),
        ([[1], HELLO], "prompt 0 is of token ids, prompt 1 of chat messages"),
        (["a", None], "prompt 1 is of type NoneType"),
        ([{"content": "a"}], "prompt 0 is of type dict"),
        ([[{"content": 3}]], "prompt 0 is a list of dict"),
        ([1, 128], "prompt 0 holds the token id 128; expected 0 to 127"),
        ([[1], [-1]], "prompt 1 holds the token id -1"),
        ([2**32 + 1], "holds the token id 4294967297"),
        ("a\ud800", "half a character at 1"),
    ],
    ids=repr,
)
def test_anything_else_is_refused(chatty: Model, prompt: Any, said: str) -> None:
    with pytest.raises(kvjax.KvjaxError, match=said):
        encode_prompts(chatty, prompt, chat=False)


@pytest.mark.parametrize("template", ["", "{% if not messages %}never{% endif %}", "{{ bos_token }}"])
def test_a_template_that_writes_nothing(chatty: Model, template: str) -> None:
    model = dataclasses.replace(chatty, tokenizer=dataclasses.replace(chatty.tokenizer, chat_template=template))
    for prompt in ("hello", HELLO):
        with pytest.raises(kvjax.KvjaxError, match="template writes nothing for the messages; give a text itself"):
            encode_prompts(model, prompt)


@pytest.mark.parametrize("chat", ["no", 0, None, [True]])
def test_chat_is_true_or_false(chatty: Model, chat: Any) -> None:
    """A word would count as True, "no" as well."""
    with pytest.raises(kvjax.KvjaxError, match=r"chat=.*; expected True or False"):
        kvjax.generate(chatty, "hello", chat=chat)
    assert encoded(chatty, "hello", np.False_) == encoded(chatty, "hello", chat=False)  # type: ignore[arg-type]


def test_messages_need_a_template(tiny: Model) -> None:
    with pytest.raises(kvjax.KvjaxError, match="no chat template"):
        encode_prompts(tiny, HELLO)
