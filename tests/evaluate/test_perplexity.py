"""Scores of the tiny golden models and of the real one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.plan import CachePlan
from kvjax.calibrate.bases import load_bases
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate.forward import hidden_states
from kvjax.evaluate.perplexity import Score, Scorer, cut_windows, mean_and_interval, standard_error
from kvjax.evaluate.text import load_text, read_windows
from kvjax.evaluate.vocabulary import TokenScores
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.models.tokenizer import Tokenizer
from kvjax.models.tokenizer_files import start_with
from kvjax.testing.layers import QUICK

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLANS = [
    "dense",
    "k8v8@token",
    "k4v4@kivi(sink=4)",
    "0:k4v2@token;1:k3v3@kivi(group=8,residual=16)",
    "0:x4@latent(group=8,residual=16);1:x4@head(group=8,sink=2)",
    "0:x3@input;1:k4v4@kivi(group=8)",
    "xcl3@latent(base=0,sink=3)",
    "xcl3@input(base=0)",
    "xcl2@latent(group=8,base=0,per=channel,fold=1)",
]


@pytest.fixture(scope="module")
def tiny(goldens: Path) -> Model:
    return load(str(goldens / "qwen3"), "float32")


def test_windows() -> None:
    ids = np.arange(100)
    np.testing.assert_array_equal(cut_windows(ids, 10, 3, 5), np.arange(5, 35).reshape(3, 10))
    with pytest.raises(KvjaxError, match="the text has 100 tokens; expected at least 105"):
        cut_windows(ids, 20, 5, 5)
    for bad, said in (
        ((1, 3, 0), "context=1; expected at least 2"),
        ((10, 0, 0), "windows=0; expected at least 1"),
        ((10, 3, -1), "offset=-1; expected 0 or more"),
    ):
        with pytest.raises(KvjaxError, match=said):
            cut_windows(ids, *bad)


def test_a_window_of_a_text_begins_as_a_sequence_does(tiny: Model) -> None:
    backend = copy.deepcopy(tiny.tokenizer.backend)
    start_with(backend, 1)
    model = dataclasses.replace(tiny, tokenizer=Tokenizer(backend, 1))
    ids = tiny.tokenizer.encode("a text of letters").tolist()
    assert read_windows("a text of letters", tiny, 5, 2, 1).tolist() == [ids[1:6], ids[6:11]]
    assert read_windows("a text of letters", model, 5, 2, 1).tolist() == [[1, *ids[1:5]], [1, *ids[5:9]]]
    assert read_windows(ids, model, 5, 2, 1).tolist() == [ids[1:6], ids[6:11]]  # taken as they are
    with pytest.raises(KvjaxError, match="context=2; expected at least 3, 1 of them for a start"):
        read_windows("a text of letters", model, 2, 2, 0)


def test_dense_scores_are_those_of_the_logits(tiny: Model, dense_logits) -> None:
    tokens = np.random.default_rng(0).integers(0, tiny.config.vocab_size, (1, 40))
    logits = dense_logits(tiny.config, tiny.params, tokens)[0, :-1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for protocol in ("streaming", "decode", "parallel"):
        scorer = Scorer(tiny, 40, 1, protocol)
        scores, dense, _ = scorer.run(CachePlan.parse("dense", tiny.config), tokens, None)
        np.testing.assert_allclose(scores.nll[0], -log_p[np.arange(39), tokens[0, 1:]], atol=2e-5)
        np.testing.assert_array_equal(dense.top, logits.argmax(-1))


def test_batches_and_their_padding_change_nothing(tiny: Model) -> None:
    tokens = np.random.default_rng(1).integers(0, tiny.config.vocab_size, (5, 37))
    plan = CachePlan.parse("k8v8@kivi", tiny.config)
    scorer, one = Scorer(tiny, 37, 5), Scorer(tiny, 37, 1)
    assert (scorer.batch, one.batch) == (4, 1)
    together = [scorer.run(plan, part, None)[0].nll for part in (tokens[:4], tokens[4:])]
    single = [one.run(plan, tokens[i : i + 1], None)[0].nll for i in range(5)]
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(single), atol=2e-4)


@pytest.fixture(scope="module")
def dense_states() -> dict[str, np.ndarray]:
    """Hidden states of the dense cache, once they are known: every plan is compared with them."""
    return {}


def step_by_step(model: Model, plan: CachePlan, tokens: np.ndarray) -> np.ndarray:
    """Final hidden states of decoding, all layers in one program."""
    decoder, bases = Decoder(model.config), load_bases(model, plan)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, bases, tokens):
        def step(cache, token):
            hidden, cache = decoder.apply({"params": params}, token[:, None], cache, bases=bases)
            return cache, hidden[:, 0]

        return jax.lax.scan(step, plan.init(model.cache_shape(*tokens.shape)), tokens.T)[1].swapaxes(0, 1)

    return np.asarray(run(model.params, bases, jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize("name", PLANS)
def test_streaming_is_decode(tiny: Model, dense_states: dict[str, np.ndarray], name: str) -> None:
    """Per token, in float64, a ragged batch on top (lengths 75 and 50)."""
    with jax.enable_x64(True):
        config = tiny.config
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tiny.params)
        tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 75))
        double = dataclasses.replace(tiny, params=params, dtype=jnp.dtype("float64"))

        def hidden(name: str, chunk: int | None) -> np.ndarray:
            plan = CachePlan.parse(name, config)
            chunk = chunk or plan.stream_chunk
            return np.asarray(hidden_states(double, plan, tokens, chunk))

        decode = hidden(name, 1)
        np.testing.assert_allclose(hidden(name, None), decode, atol=1e-9)
        np.testing.assert_allclose(step_by_step(double, CachePlan.parse(name, config), tokens), decode, atol=1e-12)
        if name != "dense":
            if "exact" not in dense_states:
                dense_states["exact"] = hidden("dense", 75)
            exact = dense_states["exact"]
            assert np.abs(exact - decode).max() > 1e-4  # what is compared is not the dense cache twice


def test_not_finite_is_traced_to_layer_and_token(tiny: Model) -> None:
    params = dict(tiny.params)
    params["layer_1"] = params["layer_1"] | {"up": params["layer_1"]["up"].at[3].set(jnp.nan)}
    scorer = Scorer(dataclasses.replace(tiny, params=params), 16, 2, "streaming")
    with pytest.raises(KvjaxError, match="not finite: first in layer 1, at token 0 of sequence 0"):
        scorer.run(CachePlan.parse("dense", tiny.config), np.ones((2, 16), np.int32), None)


def test_unknown_protocol_and_context(tiny: Model) -> None:
    with pytest.raises(KvjaxError, match="streaming, decode, parallel"):
        Scorer(tiny, 16, 1, "serial")
    with pytest.raises(KvjaxError, match=str(tiny.config.max_positions)):
        Scorer(tiny, tiny.config.max_positions + 1, 1)


def divergences(model: Model) -> tuple[float, dict[str, float]]:
    """One window of the demo text: the dense run's mean nll, and KL from it for three caches."""
    windows = cut_windows(model.tokenizer.encode(load_text("demo")), 512, 1)
    scorer = Scorer(model, 512, 1, "parallel")
    scores, dense, _ = scorer.run(CachePlan.parse("dense", model.config), windows, None)
    plans = {name: CachePlan.parse(name, model.config) for name in ("k8v8@token", "k4v4@kivi", "k4v4@token")}
    kld = {name: Score.of(scorer.run(plan, windows, dense)[0], windows).kld for name, plan in plans.items()}
    return scores.nll.mean(), kld


@pytest.mark.weekly
def test_real_model_in_float32(smollm2: Model) -> None:
    """The order that the papers and the reference values give."""
    nll, kld = divergences(smollm2)
    assert 2.5 < nll < 3.6  # English prose through a model that works
    assert 0 < kld["k8v8@token"] < 1e-3 < kld["k4v4@kivi"] < 0.04 < kld["k4v4@token"] < 0.3


def test_first_layers_of_the_real_model_in_float32() -> None:
    """The same order; that all layers give HF's logits is in models/test_parity.py."""
    _, kld = divergences(load("smollm2-135m(layers=2)", "float32"))
    assert 0 < kld["k8v8@token"] < 1e-3 < kld["k4v4@kivi"] < 0.01 < kld["k4v4@token"] < 0.1


REAL_FLOAT64 = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.evaluate.forward import hidden_states
from kvjax.evaluate.text import load_text
from kvjax.evaluate.vocabulary import TokenScores
from kvjax.models.decoder import Decoder
name, spec = sys.argv[1:]
model = load(name, "float64")
tokens = jnp.asarray(model.tokenizer.encode(load_text("demo"))[:192].reshape(2, 96), jnp.int32)
decoder, config = Decoder(model.config), model.config
plan = CachePlan.parse(spec, config)
nll = []
for chunk in (plan.stream_chunk, 1):
    hidden = hidden_states(model, plan, np.asarray(tokens), chunk)[:, :-1]
    logits = decoder.apply({"params": model.params}, hidden, method="logits")
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0]
    nll.append(np.asarray(jax.nn.logsumexp(logits, -1) - picked))
print(np.abs(nll[0] - nll[1]).max())
assert np.abs(nll[0] - nll[1]).max() < 1e-6
"""


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("smollm2-135m(layers=3)", "0:k4v4@kivi(sink=4);1:k4v2@token;2:k2v3@kivi(rope=pre)"),
        pytest.param(
            "smollm2-135m",
            "0-9:k4v4@kivi(sink=4);10-19:k4v2@token;20-29:k2v3@kivi(rope=pre)",
            marks=pytest.mark.weekly,
        ),
    ],
    ids=["first layers", "all layers"],
)
def test_real_model_streaming_is_decode_in_float64(name: str, plan: str) -> None:
    command = [sys.executable, "-c", REAL_FLOAT64, name, plan]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_standard_errors_and_intervals_are_over_windows() -> None:
    """Student's t from a table of its quantiles: 4.3027 for 2 degrees of freedom, 12.706 for 1."""
    values = np.repeat([[1.0], [2.0], [6.0]], 5, 1)  # within a window nothing differs
    assert standard_error(values) == pytest.approx(np.sqrt(7 / 3))
    assert mean_and_interval(values) == pytest.approx((3.0, 4.3027 * np.sqrt(7 / 3)), rel=1e-4)
    assert mean_and_interval(values[1:, :1]) == pytest.approx((4.0, 12.7062 * 2), rel=1e-4)
    assert standard_error(np.array([[1.0, 2.0, 6.0]])) == pytest.approx(np.sqrt(7 / 3))  # one window: its tokens
    assert np.isnan(mean_and_interval(np.ones((1, 1)))[1])


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    nll = np.full((2, 3), 1e4)
    score = Score.of(TokenScores(nll, nll, np.zeros((2, 3))), np.zeros((2, 4), int))
    assert score.ppl == np.inf and score.figures["nll"] == 1e4 and "ppl inf" in repr(score)
