"""Generation: against HF, batched against one by one, and what it may allocate.

Compiling takes most of the time: tests share plans, batches, lengths and buckets of new tokens where they can.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.generation.decode import bucket, decode_steps, start
from kvjax.generation.sampling import Sampling
from kvjax.generation.states import Held
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.zoo import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["The cat", "a much longer prompt, of more than one block of thirty-two tokens", "x"]
TOKEN = "0:dense;1:k4v2@token"  # every token is stored as it comes
PLANS = [TOKEN, "0:k4v4@kivi(sink=2);1:k3v2@kivi(rope=pre)", "xcl3@latent(base=0,sink=2)"]
EIGHT = {"cache": "k8v8@token", "max_new_tokens": 40, "max_len": 128}
MIXED = {"cache": "0:k8v4@token;1:k4v2", "max_len": 64}  # for two short prompts


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


@pytest.mark.parametrize("cache,temperature", zip(PLANS, [0.0, 0.8, 0.0], strict=True))
def test_a_ragged_batch_is_one_by_one(tiny: Model, cache: str, temperature: float) -> None:
    with jax.enable_x64(True):
        model = in_float64(tiny)
        options = {"cache": cache, "max_new_tokens": 40, "temperature": temperature, "max_len": 128}
        together = kvjax.generate(model, PROMPTS, seed=3, **options)
        alone = [kvjax.generate(model, prompt, seed=3 + i, **options) for i, prompt in enumerate(PROMPTS)]
    assert together.tokens == [one.tokens[0] for one in alone]
    assert len(set(map(tuple, together.tokens))) == 3


def test_greedy_in_float32_is_one_by_one_too(tiny: Model) -> None:
    together = kvjax.generate(tiny, PROMPTS, **EIGHT)
    assert together.tokens == [kvjax.generate(tiny, prompt, **EIGHT).tokens[0] for prompt in PROMPTS]


def test_pauses_change_nothing(tiny: Model) -> None:
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5, "stop_tokens": []}
    whole = kvjax.generate(tiny, PROMPTS[1], "k4v2", max_new_tokens=30, max_len=128, **options)
    prefilled = kvjax.generate(tiny, PROMPTS[1], "k4v2", max_new_tokens=17, max_len=128, **options)
    before = jax.tree.map(np.asarray, prefilled.state.held)
    for _ in range(2):  # a state may be gone on from many times
        rest = kvjax.generate(tiny, "", prefilled.state, max_new_tokens=17, **options)
        assert (prefilled.tokens[0] + rest.tokens[0])[:30] == whole.tokens[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, prefilled.state.held))
    pieces = list(kvjax.stream(tiny, PROMPTS[1], "k4v2", max_new_tokens=30, max_len=128, **options))
    assert "".join(text for text, _ in pieces) == whole.text and len(pieces) > 5
    assert len(pieces[0][1].tokens[0]) == 1  # the first token is not waited for


def test_a_document_is_read_once_and_asked_many_times(tiny: Model) -> None:
    with jax.enable_x64(True):
        model = in_float64(tiny)
        document = kvjax.prefill(model, PROMPTS[1], TOKEN, max_len=128, chat=False)
        for question in ("why?", "who was it?"):
            asked = kvjax.generate(model, question, document, max_new_tokens=40)
            whole = kvjax.generate(model, PROMPTS[1] + question, TOKEN, max_new_tokens=40, max_len=128)
            assert asked.tokens == whole.tokens


def test_stop_tokens_end_each_sequence_by_itself(tiny: Model) -> None:
    free = kvjax.generate(tiny, PROMPTS, **EIGHT, stop_tokens=[])
    assert free.stopped == [False] * 3 and [len(each) for each in free.tokens] == [40] * 3
    stop = free.tokens[0][3]
    made = kvjax.generate(tiny, PROMPTS, **EIGHT, stop_tokens=[stop])
    for each, whole, stopped, text in zip(made.tokens, free.tokens, made.stopped, made.texts, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 40
        assert each == whole[:end] and stopped == (stop in whole)
        assert text == tiny.tokenizer.decode(whole[: end - stopped])
    assert made.stopped[0] and len(made.tokens[0]) <= 4


def test_a_full_state_is_read_on_from(tiny: Model) -> None:
    """A state without room for more is copied into a larger cache by every reader."""
    ids = np.arange(5, 45)
    state = kvjax.prefill(tiny, ids[:16], "k8v4@token", max_len=16)
    more = kvjax.logits(tiny, ids[16:], state, read="exact")
    whole = kvjax.logits(tiny, ids, "k8v4@token", read="exact")[:, 16:]
    np.testing.assert_allclose(more, whole, atol=1e-4 * np.abs(whole).max())
    assert state.max_len == 16


def test_stop_strings_end_across_token_borders(tiny: Model) -> None:
    """Most tokens are one character here, so that each string is made of several."""
    decode = tiny.tokenizer.decode
    free = kvjax.generate(tiny, PROMPTS, **EIGHT, stop_tokens=[])
    stops = [free.texts[0][5:8], free.texts[1][11:13], "never said"]
    made = kvjax.generate(tiny, PROMPTS, **EIGHT, stop_tokens=[], stop_strings=stops)
    for i, whole in enumerate(free.texts):
        ends = [whole.find(stop) for stop in stops if stop in whole]
        assert made.texts[i] == whole[: min(ends, default=None)] and made.stopped[i] == bool(ends)
        read = next((n for n in range(40) if any(stop in decode(free.tokens[i][:n]) for stop in stops)), 40)
        assert made.tokens[i] == free.tokens[i][:read]  # the state holds no token behind the stop string
        assert made.state.read[i].tokens == made.state.lengths[i] == len(PROMPTS[i]) + read
    assert made.stopped[0] and made.stopped[1]


def test_a_stop_string_is_never_shown(tiny: Model) -> None:
    options = {**EIGHT, "stop_tokens": []}
    whole = kvjax.generate(tiny, PROMPTS[1], **options).text
    stop = whole[20:25]
    pieces = [text for text, _ in kvjax.stream(tiny, PROMPTS[1], **options, stop_strings=stop)]
    assert "".join(pieces) == whole[: whole.find(stop)]
    late = [text for text, _ in kvjax.stream(tiny, PROMPTS[1], **options, stop_strings=whole[-2:] + "~~")]
    assert "".join(late) == whole  # what looked like its beginning comes at the end


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


@pytest.fixture(scope="module")
def weightless(tiny: Model) -> Model:
    """A model that nothing can be compiled for and run with: what is said is said before."""
    return dataclasses.replace(tiny, params=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt,options,said",
    [
        ("", {}, "empty"),
        ([], {}, "at least one"),
        (["a", ""], {}, "prompt 1 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        (["a", [1]], {}, "prompts of one kind"),
        ("a" * 30, {"max_len": 20}, "at most max_len=20"),
        ("a" * 200, {"max_new_tokens": 100}, "the model's 256 tokens"),
        ("a", {"max_len": 1000}, "expected 1 to 256"),
        ("a", {"max_len": 0}, "max_len=0; expected 1 to 256"),
        ("a", {"max_len": 12.5}, "max_len=12.5; expected 1 to 256"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"temperature": float("nan")}, "temperature"),
        ("a", {"temperature": "hot"}, "temperature='hot'; expected 0"),
        ("a", {"top_k": 0, "temperature": 1.0}, "top_k"),
        ("a", {"top_k": 1.5, "temperature": 1.0}, "top_k=1.5; expected at least 1"),
        ("a", {"top_p": 1.5, "temperature": 1.0}, "top_p"),
        ("a", {"top_p": 0, "temperature": 1.0}, "top_p"),
        ("a", {"seed": -1}, "seed"),
        ("a", {"seed": None}, "seed=None; expected 0 to"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens"),
        ("a", {"max_new_tokens": None}, "max_new_tokens=None; expected 0 or more"),
        ("a", {"stop_tokens": 5}, "stop_tokens=5; expected a list of token ids"),
        ("a", {"stop_tokens": [128]}, "a stop token=128; expected 0 to 127"),
        ("a", {"stop_tokens": "x"}, "stop_tokens='x'; expected a list"),
        ("a", {"stop_tokens": np.array(2)}, "stop_tokens=array.2.; expected a list"),
        ("a", {"stop_strings": ""}, "stop_strings=''; expected a text that is not empty"),
        ("a", {"stop_strings": ["x", 5]}, r"stop_strings=\['x', 5\]; expected a text"),
        ("a", {"stop_strings": 5}, "stop_strings=5; expected a text"),
        ("a", {"cache": "k9v9"}, "key_bits=9; expected 1, 2"),
        ("a", {"cache": 4}, "the cache is of type int; expected a name, a CacheSpec or a CachePlan"),
    ],
)
def test_bad_input_is_said(weightless: Model, prompt: str | list[str], options: dict, said: str) -> None:
    for function in (kvjax.generate, kvjax.stream):  # stream: when it is called, not when it is first read
        with pytest.raises(kvjax.KvjaxError, match=said):
            function(weightless, prompt, **{"max_new_tokens": 2} | options)


def test_a_stream_is_of_one_prompt(weightless: Model) -> None:
    with pytest.raises(kvjax.KvjaxError, match="2 prompts; expected one to stream"):
        kvjax.stream(weightless, ["a", "b"])


def test_what_is_no_model_or_no_argument() -> None:
    with pytest.raises(kvjax.KvjaxError, match=r"the model is of type str; expected what kvjax\.load gives"):
        kvjax.generate("smollm2-135m", "a")  # type: ignore[arg-type]
    for function in (kvjax.generate, kvjax.stream):
        assert {"max_new_tokens", "top_p", "stop_tokens", "chat"} < set(inspect.signature(function).parameters)
        with pytest.raises(TypeError, match="max_tokens"):
            function(None, "a", max_tokens=3)  # type: ignore[call-arg]


def test_states_are_held_to_their_size(tiny: Model, goldens: Path) -> None:
    state = kvjax.prefill(tiny, ["ab", "abc"], **MIXED)
    for prompt, options, said in (
        ("a", {}, "1 prompts for a state of 2"),
        (["a", "b" * 270], {}, "sequence 1 holds 3 tokens, 270 more and 2 new ones do not fit; the model takes 256"),
        (["a", "b"], {"max_len": 32}, "max_len=32; expected 64 to 256"),
    ):
        with pytest.raises(kvjax.KvjaxError, match=said):
            kvjax.generate(tiny, prompt, state, max_new_tokens=2, **options)
    other = kvjax.load(str(goldens / "llama-llama3"), "float32")
    with pytest.raises(kvjax.KvjaxError, match=r"made by another model, <Model .*llama-linear: .*llama-llama3"):
        kvjax.generate(other, ["a", "b"], state)


def test_numbers_that_are_not_finite_are_traced_to_their_layer(tiny: Model) -> None:
    params = jax.tree.map(lambda a: a, tiny.params)
    bad = tiny.tokenizer.encode("z")[0]
    params["embed"] = params["embed"].at[bad].set(jnp.nan)
    broken = dataclasses.replace(tiny, params=params)
    with pytest.raises(kvjax.KvjaxError, match=r"not finite.*the embedding, at token 2 of sequence 1"):
        kvjax.generate(broken, ["abcdef", "abz"], **MIXED, max_new_tokens=4)
    params["layer_1"] = params["layer_1"] | {"down": params["layer_1"]["down"].at[3].set(jnp.nan)}
    params["embed"] = tiny.params["embed"]
    with pytest.raises(kvjax.KvjaxError, match=r"not finite.*layer 1, at token 0 of sequence 0"):
        kvjax.generate(dataclasses.replace(tiny, params=params), ["abc", "d"], **MIXED, max_new_tokens=4)


# ---- what the front takes and shows


def test_a_cache_may_be_a_name_a_spec_or_a_plan(tiny: Model) -> None:
    spec, plan = KV(4, 2, mode="token"), kvjax.plan(tiny, "k4v2@token")
    assert kvjax.plan(tiny, spec) == kvjax.plan(tiny, plan) == plan
    deeper = dataclasses.replace(tiny.config, layers=3)
    with pytest.raises(kvjax.KvjaxError, match=r"is for ModelSizes\(layers=3.*this model has ModelSizes\(layers=2"):
        kvjax.prefill(tiny, "a", CachePlan.cast(spec, deeper))


def test_prompts_of_all_kinds_are_read_alike(tiny: Model) -> None:
    tokenizer = dataclasses.replace(tiny.tokenizer, chat_template="{{ messages[0].content }}")
    model = dataclasses.replace(tiny, tokenizer=tokenizer)
    texts = ["abc", "d"]
    ids = [tokenizer.encode(text) for text in texts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    states = [
        kvjax.prefill(model, prompt, **MIXED) for prompt in (texts, ids, [each.tolist() for each in ids], chats)
    ]
    assert all(state.lengths == list(map(len, ids)) for state in states)
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state.held, states[0].held)


def test_logits_are_the_decoders(tiny: Model, goldens: Path) -> None:
    golden = np.load(goldens / "llama-linear" / "logits.npz")
    found = kvjax.logits(tiny, golden["tokens"])
    assert found.shape == golden["logits"].shape and found.dtype == jnp.float32
    assert np.abs(found - golden["logits"]).max() <= 2e-5 * np.abs(golden["logits"]).max()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny.params)
    shown = jax.eval_shape(lambda params: kvjax.logits(dataclasses.replace(tiny, params=params), [1, 2]), half)
    assert shown.shape == (1, 2, 128) and shown.dtype == jnp.float32


def test_logits_of_one_sequence_and_of_a_state(tiny: Model) -> None:
    ids = [*range(1, 41)]
    whole = kvjax.logits(tiny, ids)
    np.testing.assert_array_equal(kvjax.logits(tiny, np.array([ids])), whole)
    state = kvjax.prefill(tiny, ids[:30], max_len=48)
    rest = kvjax.logits(tiny, ids[30:], state)
    assert rest.shape == (1, 10, 128)
    np.testing.assert_allclose(rest, whole[:, 30:], atol=1e-5 * np.abs(whole).max())
    assert state.lengths == [30]


def test_logits_read_tokens_as_stored_or_as_a_prefill_does(tiny: Model) -> None:
    ids = [*range(1, 41)]
    dense, exact = kvjax.logits(tiny, ids), kvjax.logits(tiny, ids, "k2v2@kivi", read="exact")
    np.testing.assert_allclose(exact, dense, atol=1e-5 * np.abs(dense).max())
    assert np.abs(kvjax.logits(tiny, ids, "k2v2@kivi") - dense).max() > 0.01 * np.abs(dense).max()
    for wrong, options, said in (
        ([[1], [2, 3]], {}, "sequences of 1 and 2 tokens; expected one length"),
        ([128], {}, "token id 128"),
        ([1], {"read": "twice"}, "read='twice'; expected stored or exact"),
    ):
        with pytest.raises(kvjax.KvjaxError, match=said):
            kvjax.logits(tiny, wrong, **options)


def test_a_cache_says_what_it_is(tiny: Model) -> None:
    state = kvjax.prefill(tiny, ["abc", "abcdefgh"], **MIXED, chat=False)
    plan, text = state.cache.plan, str(state)
    assert str(state.cache) == text
    for spec in plan.specs:
        assert str(spec) in text and f"{spec.nbytes(state.cache.shape):,}" in text
    assert "3 + 8 tokens held, room for 2 x 64 (9%)" in text
    assert state.nbytes == plan.nbytes(64, 2, jnp.float32)
    assert repr(state) == f"<State {plan}: 3 + 8 tokens held, room for 2 x 64, {state.nbytes:,} bytes>"
    assert repr(state.cache) == f"<Cache {plan}: room for 2 x 64 tokens>"


def test_what_a_notebook_shows_is_short(tiny: Model) -> None:
    assert re.fullmatch(r"<Model .*llama-linear: llama, 2 layers, 78,144 parameters, float32>", repr(tiny))
    state = kvjax.prefill(tiny, ["ab", "abc"], **MIXED)
    made = kvjax.Generation(
        ["x" * 50, "y\n", "z", "w"], [[1] * 50, [1, 2], [3], [4]], [False, True, False, False], state
    )
    x = "x" * 40
    said = f"<Generation '{x}'... (50 tokens), 'y\\n' (2 tokens, stopped), 'z' (1 tokens), and 1 more>"
    assert repr(made) == said
    assert re.fullmatch(r"\d+\.\d+.*", kvjax.__version__)
