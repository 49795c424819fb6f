"""Sensitivities against their definitions in plain numpy: errors, gradients, and the KL divergence they predict."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from reference import CONFIG, Seen, attention, by_channel, by_token, forward, random_model, rotated

from kvjax.caches.base import CacheSpec
from kvjax.caches.cross_layer import Place
from kvjax.caches.plan import CachePlan
from kvjax.calibrate import fisher
from kvjax.evaluate.perplexity import Scorer
from kvjax.models.model import Model
from kvjax.tuner.sensitivity import (
    ERRORS,
    Carries,
    carries,
    gradients,
    head_errors,
    local_errors,
    measured,
    quantise_one,
    relative_errors,
)
from kvjax.tuner.simulate import Simulator

pytestmark = pytest.mark.usefixtures("quick_float64", "is_decode_shape")

TOKENS, SAMPLES = 40, 512
WINDOWS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, TOKENS))


@pytest.fixture(scope="module")
def is_decode_shape() -> Iterator[None]:
    """Several passes over the rows of a window, the last not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher, "ROWS", 16)
        yield


@functools.cache
def model() -> Model:
    return random_model()


@functools.cache
def simulator() -> Simulator:
    return Simulator(model(), WINDOWS)


@functools.cache
def dense(window: int) -> tuple[list[Seen], np.ndarray]:
    return forward(model(), WINDOWS[window])


@functools.cache
def g_of(window: int) -> np.ndarray:
    return gradients(simulator(), window, SAMPLES, seed=3)


def spec_of(text: str, layer: int) -> CacheSpec:
    return CachePlan.parse(text, CONFIG).specs[layer]


def place_of(text: str, layer: int) -> Place:
    return Place.of(spec_of(text, layer), spec_of(text, layer - 1) if layer else None)


def entering(layer: int, places: Sequence[Place], plan: CachePlan | None = None) -> Carries:
    """The carries of one layer, around the dense run or a plan."""
    belows = [[place.below for place in places if place.below]] * CONFIG.layers
    return list(carries(simulator(), plan or simulator().dense_plan, belows))[layer]


# ---- what each candidate stores: [N, K, d] after RoPE


def kivi(k_bits: int, v_bits: int, seen: Seen, *_: Seen) -> tuple[np.ndarray, np.ndarray]:
    return by_channel(seen.k, k_bits, 32), by_token(seen.v, v_bits, 8)


def token(k_bits: int, v_bits: int, sink: int, seen: Seen, *_: Seen) -> tuple[np.ndarray, np.ndarray]:
    return by_token(seen.k, k_bits, 8, sink), by_token(seen.v, v_bits, 8, sink)


def before_rope(seen: Seen, *_: Seen) -> tuple[np.ndarray, np.ndarray]:
    return rotated(by_channel(seen.raw, 2, 8, 5)), seen.v


def delta(seen: Seen, *below: Seen) -> tuple[np.ndarray, np.ndarray]:
    """X as what the layer below left and a quantised difference: above the base layer's 4 bits, else above deltas."""
    left = np.zeros_like(seen.x)
    for each in below[::-1]:
        left = read_back(left, each.x, 4 if len(below) == 1 else 3)
    k, v = seen.kv(read_back(left, seen.x, 3))
    return rotated(k), v


def read_back(left: np.ndarray, x: np.ndarray, bits: int) -> np.ndarray:
    return left + by_token((x - left)[:, None], bits, 32)[:, 0]


STORED = {  # by candidate: its residual, and what it reads back
    "k4v2@kivi": (32, functools.partial(kivi, 4, 2)),
    "k3v6@token(sink=3)": (0, functools.partial(token, 3, 6, 3)),
    "k8v5@kivi": (32, functools.partial(kivi, 8, 5)),
    "k2v16@kivi(group=8,residual=16,rope=pre,sink=5)": (16, before_rope),
    "k8v8@token": (0, functools.partial(token, 8, 8, 0)),
    "xcl3@input(base=0)": (0, delta),
}
KV = [text for text in STORED if text.startswith("k")]
XCL = "xcl3@input(base=0)"


def stored(text: str, layer: int, seen: list[Seen]) -> tuple[np.ndarray, np.ndarray]:
    return STORED[text][1](*seen[: layer + 1][::-1])


def moved(text: str, layer: int, seen: list[Seen]) -> np.ndarray:
    """By how much the candidate moves the layer's attention output while decoding: [N, H, d]."""
    exact, its = seen[layer], stored(text, layer, seen)
    return attention(exact, *its, STORED[text][0])[1] - attention(exact, exact.k, exact.v)[1]


def kld_of(text: str, layer: int) -> float:
    """Mean KL divergence with this layer alone quantised."""
    parts = []
    for window in range(len(WINDOWS)):
        seen, log_p = dense(window)
        # The layers below are exact: what this one moves is what it moves on the dense run.
        by = moved(text, layer, seen)
        _, log_q = forward(model(), WINDOWS[window], lambda i, _, o, by=by: o + by if i == layer else o)
        parts.append((np.exp(log_p) * (log_p - log_q)).sum(-1)[:-1].mean())
    return float(np.mean(parts))


def relative_norms(exact: np.ndarray, other: np.ndarray) -> float:
    """One head of one token after the other."""
    vectors = zip(exact.reshape(-1, exact.shape[-1]), other.reshape(-1, exact.shape[-1]), strict=True)
    return float(np.mean([math.dist(x, y) / math.hypot(*x) for x, y in vectors]))


def definitions(text: str, layer: int, window: int, g: np.ndarray) -> dict[str, float]:
    """KVTuner's errors, and the prediction."""
    seen, _ = dense(window)
    exact, (k_hat, v_hat) = seen[layer], stored(text, layer, seen)
    (a, o), (a_hat, o_hat) = attention(exact, exact.k, exact.v), attention(exact, k_hat, v_hat)
    late = slice(TOKENS // 2, None)  # the decoding phase
    index = np.arange(TOKENS)
    visible = (index <= index[late, None]) & (index > index[late, None] - exact.window)
    along = np.einsum("snhd,nhd->sn", g, moved(text, layer, seen))
    return {
        "e_k": relative_norms(exact.k, k_hat),
        "e_v": relative_norms(exact.v, v_hat),
        "e_a": np.abs(a - a_hat)[:, late][:, visible].mean(),
        "e_o": relative_norms(o[late], o_hat[late]),
        "predicted": 0.5 * (along**2).sum(1).mean() / (TOKENS - 1),
        "joint": 0.5 * (along.sum(1) ** 2).mean() / (TOKENS - 1),
    }


@pytest.mark.parametrize(("layer", "texts"), [(0, KV[:3:2]), (2, KV), (1, [XCL]), (2, [XCL, KV[1]])])
def test_errors_are_those_of_the_definitions(layer: int, texts: list[str]) -> None:
    """In the order of the candidates, averaged over windows."""
    g = [g_of(window)[:, :8] for window in range(len(WINDOWS))]
    places = [place_of(text, layer) for text in texts]
    traces = simulator().keep(simulator().dense_plan)
    found = local_errors(simulator(), layer, places, traces, entering(layer, places), g)
    for text, errors in zip(texts, found, strict=True):
        each = [definitions(text, layer, window, g[window][layer]) for window in range(len(WINDOWS))]
        assert tuple(errors) == ERRORS
        for name in ERRORS:
            wanted = np.mean([one[name] for one in each])
            np.testing.assert_allclose(errors[name], wanted, rtol=1e-6, err_msg=f"{text} {name}")
    assert all(errors["e_k"] > 1e-4 and errors["predicted"] > 0 for errors in found)


def test_errors_of_heads_are_those_of_each_head_alone() -> None:
    text, layer, late = "k4v2@kivi", 2, slice(TOKENS // 2, None)
    found = head_errors(simulator(), layer, [spec_of(text, layer)])[0]
    assert set(found) == {"e_k", "e_v", "e_a", "e_o", "largest_weight"}
    each = []
    for window in range(len(WINDOWS)):
        seen = dense(window)[0]
        exact, (k_hat, v_hat) = seen[layer], stored(text, layer, seen)
        (a, o), (a_hat, o_hat) = attention(exact, exact.k, exact.v), attention(exact, k_hat, v_hat)
        visible = (a[:, late] > 0).sum() / CONFIG.heads
        each.append(
            {
                "e_k": [relative_norms(exact.k[:, i], k_hat[:, i]) for i in range(CONFIG.kv_heads)],
                "e_v": [relative_norms(exact.v[:, i], v_hat[:, i]) for i in range(CONFIG.kv_heads)],
                "e_a": [np.abs(a - a_hat)[i, late].sum() / visible for i in range(CONFIG.heads)],
                "e_o": [relative_norms(o[late, i], o_hat[late, i]) for i in range(CONFIG.heads)],
                "largest_weight": a[:, late].max(-1).mean(-1),
            }
        )
    for name, errors in found.items():
        np.testing.assert_allclose(errors, np.mean([one[name] for one in each], 0), rtol=1e-6, err_msg=name)


GROUP, MEAN_RANGE = 32, 4.14  # the mean range of 32 standard normal values, in standard deviations


@pytest.mark.parametrize(("bits", "wanted"), [(8, 0.0048), (4, 0.081), (2, 0.41)])
def test_relative_errors_of_gaussian_values(bits: int, wanted: float) -> None:
    """Rounding to steps of range / (2^b - 1) errs by a step / √12; the paper's Table 9 has .0078, .125, .605."""
    x = np.random.default_rng(bits).standard_normal((500, 2, 64))
    read = by_token(x, bits, GROUP)
    found = float(relative_errors(x, read).mean())
    assert found == pytest.approx(relative_norms(x, read), rel=1e-6)
    assert found == pytest.approx(wanted, rel=0.08)
    assert found == pytest.approx(MEAN_RANGE / (2**bits - 1) / math.sqrt(12), rel=0.05)


def test_relative_errors_have_a_mean() -> None:
    """Elements near 0 do not decide it, and a vector of zeros that is read back exactly has no error."""
    x = np.random.default_rng(0).standard_normal((500, 2, 64))
    noise = 0.1 * np.random.default_rng(1).standard_normal(x.shape)
    near = np.where(np.arange(64) == 0, 1e-6 * x, x)
    np.testing.assert_allclose(relative_errors(near, near + noise), relative_errors(x, x + noise), rtol=0.05)
    assert relative_errors(np.zeros((1, 1, 64)), np.zeros((1, 1, 64))) == 0


@pytest.mark.parametrize(("text", "layer"), [(KV[0], 0), (KV[1], 2), (KV[2], 1), (XCL, 1), (XCL, 2)])
def test_measured_is_the_divergence_with_this_layer_alone(text: str, layer: int) -> None:
    place = place_of(text, layer)
    found = measured(simulator(), layer, place, entering(layer, [place]))
    np.testing.assert_allclose(found, kld_of(text, layer), rtol=1e-6)


def test_measured_is_the_scorers() -> None:
    scorer, text = Scorer(model(), TOKENS, len(WINDOWS)), "k4v2@kivi"
    _, dense_run, _ = scorer.run(simulator().dense_plan, WINDOWS, None)
    wanted = scorer.run(quantise_one(simulator(), 2, spec_of(text, 2)), WINDOWS, dense_run)[0].kld.mean()
    np.testing.assert_allclose(measured(simulator(), 2, place_of(text, 2), {}), wanted, rtol=1e-9)


def test_around_a_plan_carries_are_the_plans() -> None:
    """What its own layers leave is what enters the layers above; another width leaves something else."""
    plan = CachePlan.parse("0-1:xcl3@input(base=0);2:xcl5@input(base=0)", CONFIG)
    traces = simulator().keep(plan)
    for layer in (1, 2):
        own, other = (Place.of(spec, None).spec for spec in (plan.specs[layer - 1], spec_of("xcl8@input(base=0)", 1)))
        found = entering(layer, [Place(plan.specs[layer], own), Place(plan.specs[layer], other)], plan)
        for window, trace in enumerate(traces):
            wanted = np.asarray(trace.carry[layer]["acc"])
            np.testing.assert_allclose(found[own][window]["acc"], wanted, rtol=0, atol=1e-12)
            assert np.abs(np.asarray(found[other][window]["acc"]) - wanted).max() > 1e-3
    simulator().forget(plan)


def test_alone_leaves_the_others_dense() -> None:
    plan = quantise_one(simulator(), 1, spec_of(KV[0], 1))
    assert str(plan) == "0+2:dense;1:k4v2@kivi"


# ---- gradients


@functools.cache
def slopes() -> np.ndarray:
    """d log p(v) of token t by the last layer's attention output at t: [N, V, H * d]."""
    size, step = CONFIG.heads * CONFIG.head_dim, 1e-5
    found = []
    for i in range(size):
        by = step * np.eye(size)[i].reshape(CONFIG.heads, CONFIG.head_dim)
        up, down = (
            forward(model(), WINDOWS[0], lambda j, _, o, by=sign * by: o + by if j == CONFIG.layers - 1 else o)[1]
            for sign in (1, -1)
        )
        found.append((up - down) / (2 * step))
    return np.stack(found, -1)


@functools.cache
def draws() -> np.ndarray:
    """What was drawn, [S, N - 1]: the last layer's gradient at a token depends on that token's draw alone."""
    last = g_of(0)[-1].reshape(SAMPLES, TOKENS, -1)
    found = []
    for t in range(TOKENS - 1):
        distance = np.abs(last[:, t, None] - slopes()[t]).max(-1)
        nearest = np.sort(distance, 1)
        assert nearest[:, 0].max() < 1e-6 and nearest[:, 1].min() > 1e-3
        found.append(distance.argmin(1))
    return np.stack(found, 1)


@pytest.mark.parametrize("layer", range(CONFIG.layers))
def test_gradients_are_finite_differences(layer: int) -> None:
    """Of sum_t log p(y_t), along random directions, of all samples."""
    rng, step = np.random.default_rng(layer), 1e-5
    assert g_of(0).shape == (CONFIG.layers, SAMPLES, TOKENS, CONFIG.heads, CONFIG.head_dim)
    for _ in range(3):
        way = rng.standard_normal((TOKENS, CONFIG.heads, CONFIG.head_dim))
        up, down = (
            forward(model(), WINDOWS[0], lambda i, _, o, by=by: o + by if i == layer else o)[1][:-1]
            for by in (step * way, -step * way)
        )
        slope = np.take_along_axis((up - down) / (2 * step), draws().T, 1).sum(0)
        np.testing.assert_allclose(np.einsum("snhd,nhd->s", g_of(0)[layer], way), slope, atol=1e-5)
        assert np.abs(slope).mean() > 1
    assert not g_of(0)[layer, :, -1].any()  # the last token predicts nothing that is scored


def test_draws_follow_the_predictions() -> None:
    """Their frequencies miss the probabilities by what chance gives, p (1 - p) / S."""
    p = np.exp(dense(0)[1][:-1])
    frequency = (draws()[:, :, None] == np.arange(CONFIG.vocab_size)).mean(0)
    missed, chance = ((frequency - p) ** 2).sum(1), (p * (1 - p) / SAMPLES).sum(1)
    assert 0.8 < missed.sum() / chance.sum() < 1.25
    assert (missed < 5 * chance).all()


def test_draws_of_tokens_are_independent() -> None:
    """Those of two tokens are equal as often as chance has it, also in different passes over the rows."""
    p = np.exp(dense(0)[1][:-1])
    equal, chance = (draws()[:, :, None] == draws()[:, None]).mean(0), p @ p.T
    deviation = (equal - chance) / np.sqrt(chance * (1 - chance) / SAMPLES)
    assert np.abs(deviation[np.triu_indices(len(p), 1)]).max() < 5
    assert len(np.unique(draws(), axis=0)) == SAMPLES


def test_draws_follow_from_the_seed_and_the_window() -> None:
    same, other = (gradients(simulator(), 0, SAMPLES, seed) for seed in (3, 4))
    np.testing.assert_array_equal(same, g_of(0))
    assert (other[-1] != same[-1]).any((-1, -2)).mean() > 0.5
    second = gradients(Simulator(model(), WINDOWS[[0, 0]]), 1, SAMPLES, seed=3)
    assert (second[-1] != same[-1]).any((-1, -2)).mean() > 0.5


@pytest.mark.parametrize("layer", range(CONFIG.layers))
def test_the_prediction_converges_to_the_divergence(layer: int) -> None:
    """KL is half the variance of the change of sum_t log p(y_t), where that is small. `predicted` leaves out what
    tokens have in common; this has it all."""
    squares = []
    for window in range(len(WINDOWS)):
        by = moved("k8v8@token", layer, dense(window)[0])
        squares.append(0.5 * np.einsum("snhd,nhd->s", g_of(window)[layer], by) ** 2 / (TOKENS - 1))
    samples = np.mean(squares, 0)
    error = samples.std(ddof=1) / np.sqrt(SAMPLES)
    kld = measured(simulator(), layer, place_of("k8v8@token", layer), {})
    assert kld < 1e-3 and error < 0.08 * kld  # small enough for the second order, and for the comparison
    assert abs(samples.mean() - kld) < 4 * error
