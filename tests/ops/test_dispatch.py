"""Which implementation runs, and that whole models decode the same with any of them."""

from __future__ import annotations

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

CONFIG = ModelConfig("qwen3", 64, 128, 128, 2, 4, 2, 64, 512, rope=RopeConfig(100.0), qk_norm=True)
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


@pytest.fixture(scope="module")
def tiny() -> Model:
    return Model("tiny", CONFIG, random_params(CONFIG, "float32"), ByteTokenizer(), jnp.dtype("float32"), "0")


def decoded(model: Model, cache: str):
    """Logits of a prompt's end and of some steps behind it, a ragged batch of two."""
    plan, decoder = CachePlan.parse(cache, model.config), Decoder(model.config)
    bases = load_bases(model, plan)
    state = plan.init(CacheShape.of(model.config, 2, 160, jnp.float32))
    tokens = np.random.default_rng(0).integers(0, 64, (2, PROMPT + STEPS))

    @jax.jit
    def feed(tokens, state, lengths):
        hidden, state = decoder.apply({"params": model.params}, tokens, state, lengths, bases=bases)
        return decoder.apply({"params": model.params}, hidden[:, -1:], method="logits"), state

    logits, state = feed(jnp.asarray(tokens[:, :PROMPT]), state, jnp.asarray([PROMPT, PROMPT - 9]))
    every = []
    for step in range(STEPS):
        at = PROMPT + step
        logits, state = feed(jnp.asarray(tokens[:, at : at + 1]), state, jnp.ones((2,), jnp.int32))
        every.append(logits)
    return np.concatenate(every, 1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["native", "triton", "mosaic_tpu"])
def test_models_decode_the_same(tiny: Model, name: str, cache: str) -> None:
    op = CACHES[cache]
    if name not in dispatch.OPS[op]:
        return
    plain = dict.fromkeys(dispatch.OPS, "xla")
    with using(**plain):
        wanted = decoded(tiny, cache)
    # The prompt has more queries than kernels serve: that is XLA's.
    with using(interpret=name != "native", **plain | {op: (name, "xla")}):
        found = decoded(tiny, cache)
    # Codes of a layer may differ by one where its inputs differ in their last digit.
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    assert (found != wanted).any(), "the kernel did not run"


@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
def test_blocks_are_packed_the_same(tiny: Model, name: str) -> None:
    with using(packed_attention="xla"):
        wanted = decoded(tiny, "k4v2@kivi")
        with using(quantize_pack=name, interpret=True):
            np.testing.assert_array_equal(decoded(tiny, "k4v2@kivi"), wanted)


def test_one_that_is_named_alone_never_falls_back(tiny: Model) -> None:
    with using(packed_attention="native"), pytest.raises(NotImplementedError):
        decoded(tiny, "k4v4@token")  # the prompt has too many queries


def test_what_does_not_serve_is_passed_over() -> None:
    tried = []

    def kernel(name: str, interpret: bool) -> str:
        tried.append(name)
        raise NotImplementedError

    with using(packed_attention=("triton", "native", "xla")):
        assert dispatch.dispatch("packed_attention", kernel, lambda: "xla") == "xla"
    assert tried == ["triton", "native"]
    tried.clear()
    assert dispatch.dispatch("remat_attention", kernel, lambda: "xla") == "xla" and not tried  # none for CPU


@pytest.mark.parametrize("names", [{"packed_attention": "cuda"}, {"attention": "xla"}, {"quantize_pack": "native"}])
def test_unknown_names(names) -> None:
    with (
        pytest.raises(
            KvjaxError, match=r"expected xla, or packed_attention=triton or jax_triton or mosaic_tpu or native"
        ),
        using(**names),
    ):
        pass
