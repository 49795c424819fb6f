"""Generation: against HF, batched against one by one, sampling against its definition, and what it may allocate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.generation.decode import bucket, decode_steps, start
from kvjax.generation.sampling import Sampling, sample
from kvjax.generation.states import Held
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.zoo import random_params

PROMPTS = ["The cat", "a much longer prompt, of more than one block of thirty-two tokens", "x"]
PLANS = ["dense", "k4v4@kivi(sink=2)", "0:k4v2@token;1:k3v2@kivi(rope=pre)", "xcl3@latent(base=0,sink=2)"]


@pytest.fixture(scope="module")
def tiny(goldens: Path) -> Model:
    return kvjax.load(str(goldens / "llama-linear"), "float32")


def in_float64(model: Model) -> Model:
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model.params)
    return dataclasses.replace(model, params=params, dtype=jnp.dtype("float64"))


@pytest.mark.parametrize("chat", [True, False])
def test_greedy_is_hf_token_for_token(smollm2: Model, goldens: Path, chat: bool) -> None:
    """Twenty prompts in two ragged batches; HF generated them one by one."""
    rows = [r for r in json.loads((goldens / "smollm2-135m-generation.json").read_text()) if r["chat"] == chat]
    assert len(rows) == 10
    made = kvjax.generate(smollm2, [row["prompt"] for row in rows], max_new_tokens=64, max_len=192, chat=chat)
    assert made.tokens == [row["new"] for row in rows]
    assert made.stopped == [len(row["new"]) < 64 for row in rows]
    read = [len(row["ids"]) + len(row["new"]) for row in rows]
    assert np.asarray(made.state.cache.length).tolist() == read


@pytest.mark.parametrize("cache,temperature", zip(PLANS, [0.0, 0.8, 0.0, 0.0], strict=True))
def test_a_ragged_batch_is_one_by_one(tiny: Model, cache: str, temperature: float) -> None:
    with jax.enable_x64(True):
        model = in_float64(tiny)
        options = {"cache": cache, "max_new_tokens": 40, "temperature": temperature, "max_len": 128}
        together = kvjax.generate(model, PROMPTS, seed=3, **options)
        alone = [kvjax.generate(model, prompt, seed=3 + i, **options) for i, prompt in enumerate(PROMPTS)]
    assert together.tokens == [one.tokens[0] for one in alone]
    assert len(set(map(tuple, together.tokens))) == 3


def test_greedy_in_float32_is_one_by_one_too(tiny: Model) -> None:
    options = {"cache": "k8v8@token", "max_new_tokens": 40, "max_len": 128}
    together = kvjax.generate(tiny, PROMPTS, **options)
    assert together.tokens == [kvjax.generate(tiny, prompt, **options).tokens[0] for prompt in PROMPTS]


def test_pauses_change_nothing(tiny: Model) -> None:
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5, "stop_tokens": []}
    whole = kvjax.generate(tiny, PROMPTS[1], "k4v2", max_new_tokens=30, max_len=128, **options)
    prefilled = kvjax.generate(tiny, PROMPTS[1], "k4v2", max_new_tokens=11, max_len=128, **options)
    before = jax.tree.map(np.asarray, prefilled.state.held)
    for _ in range(2):  # a state may be gone on from many times
        rest = kvjax.generate(tiny, "", prefilled.state, max_new_tokens=19, **options)
        assert prefilled.tokens[0] + rest.tokens[0] == whole.tokens[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, prefilled.state.held))
    pieces = list(kvjax.stream(tiny, PROMPTS[1], "k4v2", max_new_tokens=30, max_len=128, **options))
    assert "".join(text for text, _ in pieces) == whole.text and len(pieces) > 5
    assert len(pieces[0][1].tokens[0]) == 1  # the first token is not waited for


def test_a_document_is_read_once_and_asked_many_times(tiny: Model) -> None:
    with jax.enable_x64(True):
        model = in_float64(tiny)
        document = kvjax.prefill(model, PROMPTS[1], "k8v8@token", max_len=128, chat=False)
        for question in ("why?", "who was it?"):
            asked = kvjax.generate(model, question, document, max_new_tokens=8)
            whole = kvjax.generate(model, PROMPTS[1] + question, "k8v8@token", max_new_tokens=8, max_len=128)
            assert asked.tokens == whole.tokens


def test_stop_tokens_end_each_sequence_by_itself(tiny: Model) -> None:
    free = kvjax.generate(tiny, PROMPTS, max_new_tokens=24, stop_tokens=[])
    assert free.stopped == [False] * 3 and [len(each) for each in free.tokens] == [24] * 3
    stop = free.tokens[0][3]
    made = kvjax.generate(tiny, PROMPTS, max_new_tokens=24, stop_tokens=[stop])
    for each, whole, stopped, text in zip(made.tokens, free.tokens, made.stopped, made.texts, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 24
        assert each == whole[:end] and stopped == (stop in whole)
        assert text == tiny.tokenizer.decode(whole[: end - stopped])
    assert made.stopped[0] and len(made.tokens[0]) <= 4


def test_characters_of_several_tokens_come_whole() -> None:
    config = ModelConfig("llama", 256, 16, 16, 1, 2, 2, 8, 64)
    model = Model("bytes", config, random_params(config, jnp.float32), ByteTokenizer(), jnp.dtype("float32"), "")
    # A head that says the bytes of "é🙂." in turn, whatever was read: byte i is followed by byte i + 1.
    said = "aé🙂."
    ids = list(said.encode())
    embed = np.zeros((256, 16), np.float32)
    head = np.zeros((256, 16), np.float32)
    for i, (a, b) in enumerate(zip(ids, [*ids[1:], ids[0]], strict=True)):
        embed[a, i] = head[b, i] = 1.0
    params = model.params | {"embed": jnp.asarray(embed), "head": jnp.asarray(head)}
    params["layer_0"] = params["layer_0"] | {name: 0 * params["layer_0"][name] for name in ("o", "down")}
    model = dataclasses.replace(model, params=params)
    pieces = [text for text, _ in kvjax.stream(model, "a", max_new_tokens=14)]
    assert "".join(pieces) == "é🙂.aé🙂" and not any("\ufffd" in text for text in pieces)


# ---- sampling


def draws(logits: list[float], count: int = 4000, **cut: float) -> np.ndarray:
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | cut
    sampling = Sampling.of(**options, seed=11, batch=count, vocab=len(logits))
    rows = jnp.broadcast_to(jnp.array(logits, jnp.float32), (count, len(logits)))
    tokens = jax.jit(sample)(rows, sampling, jnp.full((count,), 7, jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


def test_frequencies_are_the_softmax() -> None:
    logits = np.log([0.4, 0.1, 0.3, 0.15, 0.05]).tolist()
    np.testing.assert_allclose(draws(logits), [0.4, 0.1, 0.3, 0.15, 0.05], atol=0.03)
    hot = np.array([0.4, 0.1, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(draws(logits, temperature=2.0), hot / hot.sum(), atol=0.03)


@pytest.mark.parametrize(
    "cut,kept",
    [
        ({"top_k": 2}, [0, 2]),
        ({"top_p": 0.7}, [0, 2]),  # 0.4 + 0.3 reach it
        ({"top_p": 0.71}, [0, 2, 3]),
        ({"top_p": 0.01}, [0]),
        ({"top_k": 3, "top_p": 0.82}, [0, 2]),  # of the three: 0.47 + 0.35
        ({"top_k": 5, "top_p": 1.0}, [0, 1, 2, 3, 4]),
    ],
)
def test_cuts_keep_the_likeliest(cut: dict[str, float], kept: list[int]) -> None:
    p = np.array([0.4, 0.1, 0.3001, 0.15, 0.05])
    expected = np.where(np.isin(np.arange(5), kept), p, 0)
    found = draws(np.log(p).tolist(), **cut)
    assert np.flatnonzero(found).tolist() == kept
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


def test_seeds_and_positions_change_draws() -> None:
    logits = jnp.zeros((3, 1000))
    sampling = Sampling.of(1.0, None, None, 0, 3, 1000)
    tokens = {tuple(np.asarray(sample(logits, sampling, jnp.full((3,), at))).tolist()) for at in range(3)}
    assert len(tokens) == 3 and all(len(set(each)) == 3 for each in tokens)


# ---- cost


@pytest.mark.parametrize("cache", ["dense", "k4v4@token", "k4v4@kivi"])
def test_the_loop_writes_into_one_cache(cache: str) -> None:
    config = ModelConfig("llama", 64, 64, 64, 2, 9, 3, 64, 8192)
    params = jax.eval_shape(lambda: random_params(config, jnp.float32))
    model = Model("", config, params, None, jnp.dtype("float32"), "")  # type: ignore[arg-type]
    plan = kvjax.plan(model, cache)
    run = jax.eval_shape(lambda: start(Held.empty(model, plan, 1, 8192), 32))
    sampling = Sampling.of(0.7, 40, 0.9, 0, 1, 64)
    program = decode_steps.lower(Decoder(config), params, ((),) * 2, run, sampling, jnp.array([2]), 32, 32).compile()
    memory = program.memory_analysis()
    cache_bytes = plan.nbytes(8192, 1, jnp.float32)
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 2**20 < cache_bytes / 2  # 1 MiB of workspace, no second cache


def test_one_program_per_bucket(tiny: Model) -> None:
    sizes = [decode_steps._cache_size()]
    for prompt, new in (("a" * 20, 20), ("a" * 25, 18), ("b" * 31, 17)):
        kvjax.generate(tiny, prompt, "k2v2", max_new_tokens=new, temperature=0.5 + new / 100, max_len=64)
        sizes.append(decode_steps._cache_size())
    assert sizes == [sizes[0], *[sizes[0] + 1] * 3]
    assert [bucket(n) for n in (1, 16, 17, 100, 1000, 1025)] == [16, 16, 32, 112, 1024, 1280]


# ---- bad input


@pytest.mark.parametrize(
    "prompt,options,said",
    [
        ("", {}, "empty"),
        ([], {}, "at least one"),
        (["a", ""], {}, "prompt 1 is empty"),
        ("a" * 30, {"max_len": 20}, "at most max_len=20"),
        ("a" * 200, {"max_new_tokens": 100}, "the model's 256 tokens"),
        ("a", {"max_len": 1000}, "expected 1 to 256"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"temperature": float("nan")}, "temperature"),
        ("a", {"top_k": 0, "temperature": 1.0}, "top_k"),
        ("a", {"top_p": 1.5, "temperature": 1.0}, "top_p"),
        ("a", {"seed": -1}, "seed"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens"),
        ("a", {"cache": "k9v9"}, "key_bits=9; expected 1, 2"),
    ],
)
def test_bad_input_is_said(tiny: Model, prompt: str | list[str], options: dict, said: str) -> None:
    with pytest.raises(kvjax.KvjaxError, match=said):
        kvjax.generate(tiny, prompt, **{"max_new_tokens": 2} | options)


def test_states_are_held_to_their_size(tiny: Model) -> None:
    state = kvjax.prefill(tiny, ["ab", "abc"], "k4v4", max_len=32)
    for prompt, options, said in (
        ("a", {}, "1 prompts for a state of 2"),
        (["a", "b" * 40], {}, "sequence 1 holds 3 tokens"),
        (["a", "b"], {"max_len": 64}, "keeps it"),
    ):
        with pytest.raises(kvjax.KvjaxError, match=said):
            kvjax.generate(tiny, prompt, state, max_new_tokens=2, **options)


def test_numbers_that_are_not_finite_are_traced_to_their_layer(tiny: Model) -> None:
    params = jax.tree.map(lambda a: a, tiny.params)
    bad = tiny.tokenizer.encode("z")[0]
    params["embed"] = params["embed"].at[bad].set(jnp.nan)
    broken = dataclasses.replace(tiny, params=params)
    with pytest.raises(kvjax.KvjaxError, match=r"not finite.*the embedding, at token 2 of sequence 1"):
        kvjax.generate(broken, ["abcdef", "abz"], "k4v4", max_new_tokens=4)
    params["layer_1"] = params["layer_1"] | {"down": params["layer_1"]["down"].at[3].set(jnp.nan)}
    params["embed"] = tiny.params["embed"]
    with pytest.raises(kvjax.KvjaxError, match=r"not finite.*layer 1, at token 0 of sequence 0"):
        kvjax.generate(dataclasses.replace(tiny, params=params), "abc", max_new_tokens=4)


def test_a_cache_says_what_it_is(tiny: Model) -> None:
    state = kvjax.prefill(tiny, ["abc", "abcdefgh"], "0:k8v4@token;1:k4v2", max_len=64, chat=False)
    plan, text = state.cache.plan, str(state)
    assert str(state.cache) == text
    for spec in plan.specs:
        assert str(spec) in text and f"{spec.nbytes(state.cache.shape):,}" in text
    assert "3 + 8 tokens held, room for 2 x 64 (9%)" in text
