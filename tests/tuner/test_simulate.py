"""The simulator against the packed caches: the same figures per token in float64, and what it saves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate import vocabulary
from kvjax.evaluate.perplexity import Scorer
from kvjax.models.model import Model
from kvjax.tuner.simulate import Simulator

pytestmark = pytest.mark.usefixtures("quick_float64")

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENS, WINDOWS = 75, 2  # a partial block at the end of every residual
WINDOWED, BIASED, NORMED, MHA = "mistral-window", "qwen2-tied", "qwen3", "llama-llama3"
MIXED_KV = "0:k4v2@kivi(group=8,residual=16,sink=3);1:k3v5@token(rope=pre);2:k16v2@kivi(rope=pre,residual=64,sink=70)"
KV_PLAN = "0-1:k4v4;2:k2v2"
XCL_PLAN = "0-1:xclr2(base=1,group=8);2:xclr4(base=1,group=8)"
CASES = [  # 3 layers with a window of 12; 2, the second windowed; 2; 2
    (WINDOWED, MIXED_KV),
    (WINDOWED, "0:x3@input(sink=2);1:x4@latent(group=8,sink=3,outlier=1);2:x2@head(group=8,residual=24,rotate=1)"),
    (WINDOWED, XCL_PLAN),
    (BIASED, "xcl3@input(base=0,norm=pre,residual=32)"),
    (NORMED, "xcl3@latent(base=0,sink=3)"),
    (WINDOWED, "0:k2v3@kivi(group=8,sink=3,fit=keys);1:k3v2@token(fit=mse);2:x2@latent(group=8,fit=mse)"),
    (BIASED, "0:k2v3@kivi(group=8,rotate=hadamard,center=bias);1:k3v2@token(rope=pre,rotate=hadamard,center=bias)"),
    (MHA, "0:x4;1:x4@latent(group=16)"),
    (WINDOWED, "0-1:k2v3/k4v2@kivi(group=8,sink=3);2:k3v2/k2v16@token"),
]


@functools.cache
def model_of(name: str) -> Model:
    model = load(str(GOLDENS / name), "float32")
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model.params)
    return dataclasses.replace(model, params=params, dtype=jnp.dtype("float64"))


@functools.cache
def windows_of(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).integers(0, model_of(name).config.vocab_size, (WINDOWS, TOKENS))


@functools.cache
def simulator_of(name: str) -> Simulator:
    return Simulator(model_of(name), windows_of(name))


@functools.cache
def scorer_of(name: str) -> Scorer:
    return Scorer(model_of(name), TOKENS, WINDOWS)


def plan_of(name: str, text: str) -> CachePlan:
    return CachePlan.parse(text, model_of(name).config)


def dense_of(simulator: Simulator) -> vocabulary.Dense:
    return jax.tree.map(lambda *a: np.concatenate(a), *map(simulator.dense, range(WINDOWS)))


def same(a: vocabulary.TokenScores, b: vocabulary.TokenScores, atol: float = 0.0) -> None:
    for field in ("nll", "kld", "agree"):
        x, y = getattr(a, field), getattr(b, field)
        assert x.shape == y.shape == (WINDOWS, TOKENS - 1)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=field)


@pytest.mark.parametrize(("name", "text"), CASES)
def test_equals_the_packed_caches(name: str, text: str) -> None:
    plan, simulator = plan_of(name, text), simulator_of(name)
    scores = simulator.score(plan)
    same(scores, scorer_of(name).run(plan, windows_of(name), dense_of(simulator))[0], 1e-11)
    assert scores.kld.mean() > 1e-4 and 0 < scores.agree.mean() < 1


def test_dense_is_the_dense_run() -> None:
    simulator = simulator_of(NORMED)
    scores, dense, _ = scorer_of(NORMED).run(simulator.dense_plan, windows_of(NORMED), None)
    same(simulator.score(simulator.dense_plan), scores, 1e-11)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), dense_of(simulator), dense)


# ---- what is not done twice


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Hears of every program that is compiled."""
    heard: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if "backend_compile" in event:
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield heard
    jax.monitoring.unregister_event_duration_listener(listen)


def test_widths_compile_nothing(compiled: list[str]) -> None:
    """Nor do layers, each other's widths, or windows."""
    simulator = Simulator(model_of(WINDOWED), windows_of(WINDOWED))
    for text in (MIXED_KV, XCL_PLAN, "0:k4v4@token(sink=9);1-2:dense"):
        simulator.score(plan_of(WINDOWED, text))
    before = len(compiled)
    jax.jit(lambda x: x + 1)(jnp.zeros(3))
    assert len(compiled) > before  # it does hear
    before = len(compiled)
    for text in (
        "0:k1v8@kivi(group=8,residual=16,sink=3);1:k6v2@token(rope=pre);2:k16v3@kivi(rope=pre,residual=64,sink=70)",
        "0-1:xclr5(base=1,group=8);2:xclr1(base=1,group=8)",
        "0:k8v1@token(sink=9);1:k5v6@token(sink=9);2:k2v3@token(sink=9)",
    ):
        simulator.score(plan_of(WINDOWED, text))
    assert len(compiled) == before


@pytest.mark.parametrize(
    ("kept", "scored", "shared"),
    [
        ([], "k4v4", 0),
        ([], "0-1:dense;2:k4v4", 2),  # the dense run is always kept
        ([KV_PLAN], "0-1:k4v4;2:k8v3", 2),
        ([KV_PLAN], "0:k4v4;1-2:k8v3", 1),
        ([KV_PLAN], "0:k4v3;1-2:k4v4", 0),
        ([KV_PLAN], KV_PLAN, 3),
        (["k4v4", KV_PLAN, "0:k4v4;1-2:k8v3"], "0-1:k4v4;2:k2v3", 2),
        ([XCL_PLAN], "0-1:xclr2(base=1,group=8);2:xclr3(base=1,group=8)", 2),  # its carry goes on
        ([XCL_PLAN], "0-1:xclr2(base=1,group=8);2:k4v4", 2),
        (["0-1:dense;2:xclr2(base=0,group=8)"], "0-1:dense;2:xclr2(base=0,base_bits=2,group=8)", 2),
    ],
)
def test_starts_where_a_kept_plan_ends(kept: list[str], scored: str, shared: int) -> None:
    plan = plan_of(WINDOWED, scored)
    fresh, other = (Simulator(model_of(WINDOWED), windows_of(WINDOWED)) for _ in range(2))
    fresh._kept.clear()  # the dense run, too
    run, wanted = counted(fresh, plan)
    assert run == 3 * WINDOWS
    for text in kept:
        other.keep(plan_of(WINDOWED, text))
    run, scores = counted(other, plan)
    assert run == (3 - shared) * WINDOWS
    same(scores, wanted)
    for text in kept:
        other.forget(plan_of(WINDOWED, text))
    run, scores = counted(other, plan)
    assert run == (3 - other.keep(other.dense_plan)[0].shared(plan)) * WINDOWS
    same(scores, wanted)


def counted(simulator: Simulator, plan: CachePlan) -> tuple[int, vocabulary.TokenScores]:
    """Layers that were run for the plan's scores, and these; the dense run is there before."""
    dense_of(simulator)
    before = simulator.layers_run
    scores = simulator.score(plan)
    return simulator.layers_run - before, scores


def test_keeping_again_runs_nothing_and_the_dense_run_stays() -> None:
    simulator = Simulator(model_of(WINDOWED), windows_of(WINDOWED))
    simulator.keep(plan_of(WINDOWED, KV_PLAN))
    before = simulator.layers_run
    simulator.keep(plan_of(WINDOWED, KV_PLAN))
    simulator.forget(simulator.dense_plan)
    simulator.keep(simulator.dense_plan)
    simulator.forget(plan_of(WINDOWED, "k2v2"))  # never kept
    assert simulator.layers_run == before


def test_evaluations_count_whole_plans() -> None:
    simulator = Simulator(model_of(WINDOWED), windows_of(WINDOWED))
    assert (simulator.layers_run, simulator.evaluations) == (3 * WINDOWS, 1)
    simulator.score(plan_of(WINDOWED, "k4v4"))
    assert simulator.evaluations == 2
    simulator.score(plan_of(WINDOWED, "0-1:dense;2:k4v4"))
    assert simulator.evaluations == pytest.approx(2 + 1 / 3)


def test_a_kept_plan_may_have_a_shorter_accumulator() -> None:
    """Its layers below the first XQuant-CL layer are shared, its accumulator of 96 tokens is not one of 128."""
    kept, plan = (plan_of(WINDOWED, f"0:k4v4;1-2:xcl3@latent(base=0{residual})") for residual in ("", ",residual=64"))
    simulator = Simulator(model_of(WINDOWED), windows_of(WINDOWED))
    wanted = simulator.score(plan)
    simulator.keep(kept)
    same(simulator.score(plan), wanted)


def test_runs_with_residuals_of_their_own() -> None:
    """The longest accumulator that a layer needs, not the first's."""
    plan = plan_of(WINDOWED, "0-1:k4v4;2:xclr2(base=0,group=8,residual=64)")
    both = plan_of(WINDOWED, "0:xclr2(base=0,group=8);1:k4v4;2:xclr2(base=0,group=8,residual=64)")
    shape = simulator_of(WINDOWED).shape
    assert both.init_carry(shape)["acc"].shape == plan.init_carry(shape)["acc"].shape
    assert np.isfinite(Simulator(model_of(WINDOWED), windows_of(WINDOWED)).score(both).nll).all()


# ---- what is refused


def changed(name: str, layer: str, **params: float) -> Simulator:
    model = model_of(name)
    its = model.params[layer] | {key: model.params[layer][key] + value for key, value in params.items()}
    return Simulator(dataclasses.replace(model, params=model.params | {layer: its}), windows_of(name))


def test_logits_that_are_not_finite() -> None:
    simulator = changed(WINDOWED, "layer_1", down=np.nan)
    with pytest.raises(KvjaxError, match="dense: the logits are not finite"):
        simulator.score(simulator.dense_plan)


def test_values_beyond_float16() -> None:
    """A model whose values float16 scales would not hold is kept in other units."""
    simulator = changed(WINDOWED, "layer_1", v=1e5)
    for plan in (simulator.dense_plan, plan_of(WINDOWED, "0+2:dense;1:k4v4")):
        assert np.isfinite(simulator.score(plan).nll).all()


def test_windows_longer_than_the_model() -> None:
    model = model_of(NORMED)
    assert model.config.max_positions == 256
    with pytest.raises(KvjaxError, match="context=257; expected at most the model's 256"):
        Simulator(model, np.zeros((1, 257), int))
