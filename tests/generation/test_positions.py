"""Special tokens follow positions, not calls: one bos at the start of a sequence; the turns of a chat."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import tokenizers

import kvjax
from kvjax.generation.prompts import Read, encode_prompts
from kvjax.models.model import Model
from kvjax.models.tokenizer import Tokenizer
from kvjax.models.tokenizer_files import start_with

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOS, EOS = 1, 2
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_BOS = CHAT.removeprefix("{{ bos_token }}")
PLAN: dict[str, Any] = {"cache": "0:dense;1:k8v8@token", "max_len": 128}


def with_bos(tiny: Model, template: str | None = None) -> Model:
    """The tiny model with a tokenizer that puts bos before a text."""
    backend = tokenizers.Tokenizer.from_str(tiny.tokenizer.backend.to_str())  # type: ignore[union-attr]
    start_with(backend, BOS)
    words = {"bos_token": backend.id_to_token(BOS), "eos_token": backend.id_to_token(EOS)}
    return dataclasses.replace(copy.copy(tiny), tokenizer=Tokenizer(backend, BOS, (EOS,), template, words))


def ids_of(model: Model, prompt: Any, before: Read | None = None, chat: bool = True) -> list[int]:
    return encode_prompts(model, prompt, chat, [before or Read()])[0].ids.tolist()


def test_a_sequence_gets_its_bos_once(tiny: Model) -> None:
    """Reading "hello " and then "world" is reading "hello world"; an empty prompt adds nothing."""
    model = with_bos(tiny)
    whole = kvjax.prefill(model, "hello world", **PLAN)
    parts = kvjax.prefill(model, "world", kvjax.prefill(model, "hello ", **PLAN))
    assert parts.lengths == whole.lengths == [12] and ids_of(model, "hello world")[0] == BOS
    assert kvjax.prefill(model, "", parts).lengths == [12]
    made = kvjax.generate(model, "hello ", **PLAN, max_new_tokens=9, stop_tokens=[])
    first = kvjax.generate(model, "hello ", **PLAN, max_new_tokens=4, stop_tokens=[])
    rest = kvjax.generate(model, "", first.state, max_new_tokens=5, stop_tokens=[])
    assert first.tokens[0] + rest.tokens[0] == made.tokens[0]


def test_bos_written_out_is_not_doubled(tiny: Model) -> None:
    model = with_bos(tiny)
    assert ids_of(model, "<s>a") == ids_of(model, "a") == [BOS, *model.tokenizer.encode("a")]
    assert ids_of(model, "<s>a", Read(3, 7))[0] == BOS  # it was given


@pytest.mark.parametrize("template", [CHAT, NO_BOS])
def test_a_chat_has_one_bos(tiny: Model, template: str) -> None:
    model = with_bos(tiny, template)
    for prompt in ("hi", [{"role": "user", "content": "hi"}]):
        ids = ids_of(model, prompt)
        assert ids.count(BOS) == 1 and ids[0] == BOS


@pytest.mark.parametrize("ended", [True, False])
def test_what_follows_a_chat_is_its_next_turn(tiny: Model, ended: bool) -> None:
    """Fed turn by turn, a conversation is the tokens of the whole one in the template."""
    model = with_bos(tiny, CHAT)
    encode, tokenizer = model.tokenizer.encode, model.tokenizer
    first = encode_prompts(model, "hi")[0]
    answer = [*encode("yes"), *([EOS] if ended else [])]
    read = first.read.then(answer)
    assert read == Read(len(first.ids) + len(answer), answer[-1], True)
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "why?")]
    whole = encode(tokenizer.chat([{"role": who, "content": said} for who, said in turns]), start=True).tolist()
    for follow in ("why?", [{"role": "user", "content": "why?"}]):
        assert [*first.ids, *answer, *ids_of(model, follow, read)] == whole
    assert ids_of(model, "why?", read, chat=False) == encode("why?").tolist()
    assert ids_of(model, "", read) == []
    assert ids_of(model, encode("why?").tolist(), read) == encode("why?").tolist()


def test_turns_through_states(tiny: Model, tmp_path: Any) -> None:
    """The state remembers that it is a chat, on disk as well."""
    model = with_bos(tiny, CHAT)
    one = kvjax.generate(model, "hi", **PLAN, max_new_tokens=3, stop_tokens=[])
    assert one.state.read == [Read(one.state.lengths[0], one.tokens[0][-1], True)]
    two = kvjax.prefill(model, "why?", one.state)
    assert two.lengths[0] == one.state.lengths[0] + len(ids_of(model, "why?", one.state.read[0]))
    kvjax.save_state(tmp_path / "chat", model, one.state)
    again = kvjax.restore_state(tmp_path / "chat", model)
    assert again.read == one.state.read and kvjax.prefill(model, "why?", again).lengths == two.lengths


def test_a_chat_may_begin_behind_a_document(tiny: Model) -> None:
    model = with_bos(tiny, CHAT)
    document = kvjax.prefill(model, "a document", **PLAN, chat=False)
    ids = ids_of(model, [{"role": "user", "content": "hi"}], document.read[0])
    assert BOS not in ids and model.tokenizer.decode(ids).startswith("<user>")
    assert ids_of(model, "text", document.read[0]) == model.tokenizer.encode("text").tolist()  # goes on with it


# ---- SentencePiece, which puts a blank before a text


def spaced(scheme: str) -> Tokenizer:
    """A tokenizer of single characters whose blank is a part of words."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"\n▁abcdefghijklmnopqrstuvwxyz?<>/"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    if scheme == "prepend":
        parts = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        backend.normalizer = tokenizers.normalizers.Sequence(parts)
        backend.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<s>", "</s>"])
    start_with(backend, BOS)
    return Tokenizer(backend, BOS, (EOS,), CHAT, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
@pytest.mark.parametrize("ended", [True, False])
def test_blanks_stand_where_the_whole_text_has_them(tiny: Model, scheme: str, ended: bool) -> None:
    model = dataclasses.replace(tiny, tokenizer=spaced(scheme))
    tokenizer = model.tokenizer
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "why?")]
    whole = tokenizer.encode(tokenizer.chat([{"role": who, "content": said} for who, said in turns]), start=True)
    first = encode_prompts(model, "hi")[0]
    answer = tokenizer.encode_next("yes", int(first.ids[-1])).tolist() + [EOS] * ended
    assert [*first.ids, *answer, *ids_of(model, "why?", first.read.then(answer))] == whole.tolist()
    for a, b in (("hello", " world"), ("x</s>", "y"), ("a", "b"), ("end\n", "next")):
        before = encode_prompts(model, a, chat=False)[0]
        parts = [*before.ids, *ids_of(model, b, before.read, chat=False)]
        assert parts == tokenizer.encode(a + b, start=True).tolist()


@pytest.mark.parametrize("scheme", ["prepend", "always", "first"])
def test_resumed_texts_join(scheme: str) -> None:
    tokenizer = spaced(scheme)
    ids = tokenizer.encode("hello world and more").tolist()
    for at in range(1, len(ids)):
        assert tokenizer.decode(ids[:at]) + tokenizer.decode_next(ids[at:], ids[at - 1]) == "hello world and more"
