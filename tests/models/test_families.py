"""Every cache method on every family: at 16 bits it gives the logits of transformers."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.models.test_parity import FAMILIES, TOLERANCE

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.checkpoints import orbax
from kvjax.checkpoints.safetensors import load_hf
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.tuner.simulate import Simulator

pytestmark = pytest.mark.usefixtures("quick_compilation")
EXACT = ("k16v16@kivi(sink=3)", "x16@input", "x16@latent(group=8,sink=2)", "x16@head(group=8)")
RUN = "xcl16@latent(base=0,base_bits=16)"
CHUNK = 16
KINDS = ("smollm3", "gemma3", "olmo3", "phi3-long", "qwen3-moe", "gpt-oss")  # of layers


def load(goldens: Path, family: str) -> tuple[Model, dict[str, np.ndarray]]:
    config, params = load_hf(goldens / family, jnp.float32)
    model = Model(family, config, params, ByteTokenizer(), jnp.dtype("float32"), family)
    return model, dict(np.load(goldens / family / "logits.npz"))


def plans(config: ModelConfig) -> list[str]:
    """Each method in some layer, and a run of XQuant-CL."""
    starts = range(0, len(EXACT), config.layers)
    methods = itertools.cycle(EXACT)
    return [";".join(f"{i}:{next(methods)}" for i in range(config.layers)) for _ in starts] + [RUN]


def logits(model: Model, text: str, tokens: np.ndarray) -> np.ndarray:
    """Logits [1, T, V], read CHUNK tokens at a time."""
    plan, decoder = CachePlan.parse(text, model.config), Decoder(model.config)
    shape = CacheShape.of(model.config, 1, tokens.shape[1], jnp.float32)
    bases = load_bases(model, plan)

    @jax.jit
    def read(params, cache, tokens):
        hidden, cache = decoder.apply({"params": params}, tokens, cache, bases=bases)
        return decoder.apply({"params": params}, hidden, method="logits"), cache

    cache, parts = plan.init(shape), []
    for start in range(0, tokens.shape[1], CHUNK):
        part, cache = read(model.params, cache, jnp.asarray(tokens[:, start : start + CHUNK]))
        parts.append(part)
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("family", KINDS)
def test_every_method_reads_every_kind_of_layer(family: str, goldens: Path) -> None:
    model, golden = load(goldens, family)
    for text in plans(model.config):
        error = np.abs(logits(model, text, golden["tokens"]) - golden["logits"]).max()
        assert error <= 2 * TOLERANCE * np.abs(golden["logits"]).max(), text


@pytest.mark.parametrize("family", ["granite", "gemma3", "olmo2", "gpt-oss"])
def test_a_search_evaluates_the_same_model(family: str, goldens: Path) -> None:
    model, golden = load(goldens, family)
    simulator = Simulator(model, golden["tokens"])
    scores = simulator.score(CachePlan.parse("k16v16@kivi", model.config))
    shifted = golden["logits"][0, :-1] - golden["logits"][0, :-1].max(-1, keepdims=True)
    chance = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nll = -np.take_along_axis(chance, golden["tokens"][0, 1:, None], 1)[:, 0]
    np.testing.assert_allclose(scores.nll[0], nll, atol=1e-3)
    assert scores.kld.max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_comes_back_from_disk(family: str, goldens: Path, tmp_path: Path) -> None:
    model, _ = load(goldens, family)
    orbax.save(tmp_path / "saved", model)
    again = orbax.load(tmp_path / "saved", jnp.float32)
    assert again[0] == model.config
    jax.tree.map(np.testing.assert_array_equal, again[1], model.params)
