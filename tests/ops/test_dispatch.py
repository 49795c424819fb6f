"""Which implementation runs, and that whole models decode the same with any of them."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.errors import KvjaxError
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.models.zoo import random_params
from kvjax.ops import dispatch
from kvjax.ops.dispatch import using
from kvjax.testing.layers import QUICK

CONFIG = ModelConfig("qwen3", 64, 128, 128, 1, 4, 2, 64, 512, rope=RopeConfig(100.0), qk_norm=True)
CACHES = {  # and the op that a decode step of theirs uses
    "k4v2@token": "packed_attention",
    "k3v4@kivi(sink=3)": "packed_attention",
    "k16v8@token": "packed_attention",
    "x4@latent(group=32)": "remat_attention",
    "x3@head(group=32)": "remat_attention",
    "x4@input": "remat_attention",
    "xcl3@latent(base=0)": "remat_attention",
}
PROMPT, STEPS = 70, 6
PLAIN = dict.fromkeys(dispatch.OPS, "xla")
EXACT = {"xla_backend_optimization_level": 0}


@functools.cache
def tiny(layers: int) -> Model:
    config = dataclasses.replace(CONFIG, layers=layers)
    return Model("tiny", config, random_params(config, "float32"), ByteTokenizer(), jnp.dtype("float32"), "0")


class Decoding:
    """A tiny model that feeds a ragged batch of two to one kind of cache."""

    def __init__(self, cache: str, options: dict[str, Any] = QUICK) -> None:
        self.options = options
        self.model = tiny(2 if "base=" in cache else 1)  # a layer above the base too
        self.plan, self.decoder = CachePlan.parse(cache, self.model.config), Decoder(self.model.config)
        self.bases = load_bases(self.model, self.plan)
        self.empty = self.plan.init(CacheShape.of(self.model.config, 2, 160, jnp.float32))
        self.tokens = np.random.default_rng(0).integers(0, 64, (2, PROMPT + STEPS))

    def program(self):
        """The last token's logits, and the state; traced anew, for whichever implementation is named now."""

        def feed(params, bases, tokens, state, lengths):
            hidden, state = self.decoder.apply(params, tokens, state, lengths, bases=bases)
            return self.decoder.apply(params, hidden[:, -1:], method="logits"), state

        return jax.jit(feed, compiler_options=self.options)

    def prompt(self):
        lengths = np.array([PROMPT, PROMPT - 9], np.int32)
        return {"params": self.model.params}, self.bases, self.tokens[:, :PROMPT], self.empty, lengths

    def prompt_text(self) -> str:
        """The prompt's program, without the names of its values."""
        return re.sub(r"%\w+", "%", self.program().lower(*self.prompt()).as_text())

    def after_prompt(self):
        return self.program()(*self.prompt())[1]

    def steps(self, state):
        """Logits of the steps behind a prompt."""
        feed, every = self.program(), []
        for at in range(PROMPT, PROMPT + STEPS):
            tokens, lengths = self.tokens[:, at : at + 1], np.ones(2, np.int32)
            logits, state = feed({"params": self.model.params}, self.bases, tokens, state, lengths)
            every.append(logits)
        return np.concatenate(every, 1)


@functools.cache
def in_xla(cache: str):
    """All by XLA: the prompt's program as text, the state behind it, the logits of the steps."""
    decoding = Decoding(cache)
    with using(**PLAIN):
        state = decoding.after_prompt()
        return decoding, decoding.prompt_text(), state, decoding.steps(state)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["native", "triton", "mosaic_tpu"])
def test_models_decode_the_same(name: str, cache: str) -> None:
    op = CACHES[cache]
    if name not in dispatch.OPS[op]:
        return
    decoding, text, state, wanted = in_xla(cache)
    with using(interpret=name != "native", **PLAIN | {op: (name, "xla")}):
        if "base=" in cache:  # a kernel rebuilds what the layers above the base attend over, in prompts too
            state = decoding.after_prompt()
        else:  # the prompt has more queries than kernels serve: that is XLA's, to the last instruction
            assert decoding.prompt_text() == text
        found = decoding.steps(state)
    # Codes of a layer may differ by one where its inputs differ in their last digit.
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    assert (found != wanted).any(), "the kernel did not run"


def test_blocks_are_packed_the_same() -> None:
    decoding, found = Decoding("k4v2@kivi", EXACT), {}
    for name in ("xla", "native", "triton", "mosaic_tpu"):
        with using(interpret=name != "native", **PLAIN | {"quantize_pack": name}):
            found[name] = decoding.steps(decoding.after_prompt())
    for name in ("native", "triton", "mosaic_tpu"):
        np.testing.assert_array_equal(found[name], found["xla"], err_msg=name)


def test_one_that_is_named_alone_never_falls_back() -> None:
    decoding = Decoding("k4v4@token")
    with using(packed_attention="native"), pytest.raises(NotImplementedError):
        decoding.after_prompt()  # the prompt has too many queries


def test_what_does_not_serve_is_passed_over() -> None:
    tried = []

    def kernel(name: str, interpret: bool) -> str:
        tried.append(name)
        raise NotImplementedError

    with using(packed_attention=("triton", "native", "xla")):
        assert dispatch.dispatch("packed_attention", kernel, lambda: "xla") == "xla"
    assert tried == ["triton", "native"]
    tried.clear()
    assert dispatch.dispatch("causal_attention", kernel, lambda: "xla") == "xla" and not tried  # none for CPU


def test_reasons_are_kept() -> None:
    def kernel(name: str, interpret: bool) -> str:
        raise NotImplementedError(f"a reason of {name}")

    def twice() -> list[dispatch.Reason]:
        for _ in range(2):
            dispatch.dispatch("packed_attention", kernel, lambda: "xla")
        return dispatch.reasons()

    with dispatch.fresh_reasons(), using(packed_attention=("triton", "native", "xla")):
        triton, native = twice()
        assert triton == ("packed_attention", "triton", "a reason of triton") and native.text == "a reason of native"
        with dispatch.fresh_reasons():
            assert not dispatch.reasons()
        assert len(dispatch.reasons()) == 2
    with dispatch.fresh_reasons():
        for i in range(dispatch.MOST_REASONS + 1):
            with using(packed_attention=("triton", "xla")):
                dispatch.dispatch("packed_attention", lambda name, _: kernel(f"{name} {i}", False), lambda: "xla")  # noqa: B023
        found = dispatch.reasons()
    assert len(found) == dispatch.MOST_REASONS and found[0].text == "a reason of triton 1"


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        ("k4v4@token", "140 query rows per kv head; expected at most 128"),
        ("k16v8@token(rope=pre)", "keys that need their position; kernels read keys after RoPE, with their bias"),
    ],
)
def test_reasons_say_what_is_not_served(cache: str, reason: str) -> None:
    decoding = Decoding(cache)
    state = jax.eval_shape(decoding.program(), *decoding.prompt())[1]
    step = {"params": decoding.model.params}, decoding.bases, decoding.tokens[:, :1], state, np.ones(2, np.int32)
    with dispatch.fresh_reasons(), using(**PLAIN | {"packed_attention": ("native", "xla")}):
        jax.eval_shape(decoding.program(), *(decoding.prompt() if "query" in reason else step))
        assert dispatch.reasons() == [("packed_attention", "native", reason)]


@pytest.mark.parametrize("names", [{"packed_attention": "cuda"}, {"attention": "xla"}, {"quantize_pack": "splash"}])
def test_unknown_names(names) -> None:
    with (
        pytest.raises(
            KvjaxError, match=r"expected xla, or packed_attention=triton or jax_triton or mosaic_tpu or native"
        ),
        using(**names),
    ):
        pass
