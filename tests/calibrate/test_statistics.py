"""Statistics against their definitions in numpy, kept on disk, and never of a text that is judged."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.traverse_util import unflatten_dict

import kvjax
from kvjax.caches.base import Chunk, visible
from kvjax.calibrate import bases, predictors, statistics
from kvjax.calibrate.statistics import SAMPLES, SKIPPED, load_statistics
from kvjax.configs import perplexity
from kvjax.evaluate.sweep import identity_of
from kvjax.experiments import program
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.decoder import embed, run_layer
from kvjax.models.model import Model
from kvjax.models.params import param_shapes
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.ops.rotate import rotate_heads
from kvjax.quant.codebook import BINS, outliers_of
from kvjax.tuner.card import make_card
from kvjax.tuner.judge import make_judge
from kvjax.tuner.settings import SearchSettings

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 5, 40, 4, 2, 8, 24
CONFIG = ModelConfig(
    *("qwen3", 256, DIM, 40, LAYERS, HEADS, KV_HEADS, HEAD_DIM, 64),
    rope=RopeConfig(theta=100.0),
    qkv_bias=True,
    qk_norm=True,
    window=10,
    full_layers=(0, 2),
)
IDS = np.random.default_rng(1).integers(0, 256, 200)
WINDOWS = IDS[: 2 * TOKENS].reshape(2, TOKENS)
LEARNED = "xcl2@latent(group=16,sink=4,per=channel,fold=1,rotate=1,base=1,basis=balanced,gain=1)"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (bases, statistics):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    return tmp_path


pytestmark = pytest.mark.usefixtures("quick_float64")


@functools.cache
def model() -> Model:
    rng, flat = np.random.default_rng(0), {}
    for path, shape in param_shapes(CONFIG).items():
        x = rng.standard_normal(shape) * (1 if path[-1] == "embed" else 0.3 if len(shape) == 1 else shape[1] ** -0.5)
        flat[path] = jnp.asarray(1 + 0.5 * x if path[-1].endswith("norm") else x)
    return Model("tiny", CONFIG, unflatten_dict(flat), ByteTokenizer(), jnp.dtype("float64"), "")


def calibrated(windows: int = 2) -> Model:
    return kvjax.calibrated(model(), IDS, context=TOKENS, windows=windows)


# ---- a decoder that is looked into


@struct.dataclass
class Plain:
    """Softmax attention in plain form over keys and values of x W + `by`; its carry is the chunk."""

    by: Any  # [N, 2 K d]

    def attend(self, chunk: Chunk, carry: Any):
        w, count = chunk.weights, chunk.x.shape[1]
        own = zip((w.k, w.v), (w.k_bias, w.v_bias), np.split(self.by, 2, 1), strict=True)
        k, v = ((chunk.x @ weight.T + by + bias).reshape(1, count, KV_HEADS, HEAD_DIM) for weight, bias, by in own)
        k = k / jnp.sqrt((k * k).mean(-1, keepdims=True) + w.norm_eps) * w.k_norm
        k = rotate_heads(k, chunk.rotation)
        k, v = (jnp.repeat(a, HEADS // KV_HEADS, 2) for a in (k, v))
        scores = jnp.einsum("bthd,bnhd->bhtn", chunk.q, k) / np.sqrt(HEAD_DIM)
        weights = jax.nn.softmax(jnp.where(visible(chunk, chunk.positions)[:, None], scores, -jnp.inf))
        return jnp.einsum("bhtn,bnhd->bthd", weights, v), self, chunk


def through(layer: int, h: Any, by: Any = None) -> tuple[np.ndarray, Chunk]:
    """The output of a layer, and what its cache saw."""
    zeros = np.zeros((h.shape[1], 2 * KV_HEADS * HEAD_DIM))
    out, chunk = _through(layer, model().params[f"layer_{layer}"], h, zeros if by is None else by)
    return np.asarray(out), chunk


@functools.partial(jax.jit, static_argnums=0)
def _through(layer: int, params: Any, h: Any, by: Any) -> tuple[Any, Chunk]:
    out, _, chunk = run_layer(CONFIG, layer, params, h, (), Plain(by), ())
    return out, chunk


@functools.cache
def chunks() -> list[list[Chunk]]:
    """Of every layer, what each window's cache saw."""
    hs = [embed(CONFIG, model().params["embed"], jnp.asarray(window[None])) for window in WINDOWS]
    found = []
    for layer in range(LAYERS):
        passed = [through(layer, h) for h in hs]
        hs = [out for out, _ in passed]
        found.append([chunk for _, chunk in passed])
    return found


def rows(layer: int, what: str) -> np.ndarray:
    """Of a layer, of the tokens that count."""
    return np.concatenate([np.asarray(getattr(chunk, what))[0, SKIPPED:] for chunk in chunks()[layer]])


def units(layer: int) -> np.ndarray:
    h = rows(layer, "h")
    return h / np.sqrt((h * h).mean(-1, keepdims=True) + CONFIG.norm_eps)


def moment(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


# ---- what is gathered


def test_activations_are_means_over_tokens() -> None:
    digest = calibrated().calibration.digest
    for layer in (0, 3):
        found = load_statistics(digest, layer)
        rotation = chunks()[layer][0].rotation
        k = np.concatenate([np.asarray(rotate_heads(c.k, rotation))[0, SKIPPED:] for c in chunks()[layer]])
        np.testing.assert_allclose(found.unit_mean, units(layer).mean(0), atol=1e-12)
        np.testing.assert_allclose(found.unit, moment(units(layer)), atol=1e-12)
        norm = np.asarray(model().params[f"layer_{layer}"]["attention_norm"])
        np.testing.assert_allclose(found.scaled_unit(norm), moment(rows(layer, "x")), atol=1e-12)
        means = {"key_mean": rows(layer, "k"), "turned_mean": k, "value_mean": rows(layer, "v")}
        for name, x in means.items():
            np.testing.assert_allclose(getattr(found, name), x.mean(0), atol=1e-12)
        for head in range(KV_HEADS):
            group = slice(2 * head, 2 * head + 2)
            q, v = rows(layer, "q")[:, group].reshape(-1, HEAD_DIM), rows(layer, "v")[:, head]
            np.testing.assert_allclose(found.query[head], moment(q), atol=1e-12)
            np.testing.assert_allclose(found.key[head], moment(rows(layer, "k")[:, head]), atol=1e-12)
            np.testing.assert_allclose(found.turned[head], moment(k[:, head]), atol=1e-12)
            np.testing.assert_allclose(found.value[head], moment(v), atol=1e-12)
            parts = np.split(rows(layer, "q")[:, group], 2), np.split(k[:, head], 2), np.split(v, 2)
            weighted = []  # of each window
            for queries, keys, values in zip(*parts, strict=True):
                weight = np.einsum("nd,mhd,mhe,ne->n", keys, queries, queries, keys)
                weighted.append(np.einsum("n,nd,ne->de", weight / weight.mean(), values, values) / len(values))
            np.testing.assert_allclose(found.seen_value[head], np.mean(weighted, 0), atol=1e-12)


def test_deltas_are_of_what_latents_recall() -> None:
    """Layer by layer, with the gain that least squares has in each channel."""
    digest, recalled = calibrated().calibration.digest, [np.zeros((2 * (TOKENS - SKIPPED), DIM))] * 2
    for layer in range(LAYERS):
        found, u, params = load_statistics(digest, layer), units(layer), model().params[f"layer_{layer}"]
        seen = np.concatenate([np.asarray(params[name]).T for name in "kv"], 1)
        seen = np.asarray(params["attention_norm"])[:, None] * seen
        project = seen @ np.linalg.pinv(seen)
        fits = [np.linalg.lstsq(a[:, None], b, rcond=None)[0][0] for a, b in zip(recalled[1].T, u.T, strict=True)]
        gains = np.stack([np.ones(DIM), fits])
        deltas = [u - gain * below for gain, below in zip(gains, recalled, strict=True)]
        recalled = [u @ project if layer <= 2 else u - delta + delta @ project for delta in deltas]
        np.testing.assert_allclose(found.gain, gains[1], atol=1e-5)
        np.testing.assert_allclose(found.delta, moment(deltas[0]), atol=1e-5)
        np.testing.assert_allclose(found.gained_delta, moment(deltas[1]), atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_gradients_are_finite_differences(layer: int) -> None:
    """The second moment in a direction is the mean square of slopes, one token moved at a time."""
    rng, step = np.random.default_rng(layer), 1e-5
    h = np.asarray(chunks()[layer][0].h)
    above = rng.standard_normal((SAMPLES, 1, TOKENS, DIM))
    way = rng.standard_normal(2 * KV_HEADS * HEAD_DIM)
    slopes = []
    for token in range(SKIPPED, TOKENS):
        by = np.zeros((TOKENS, len(way)))
        by[token] = step * way
        change = (through(layer, h, by)[0] - through(layer, h, -by)[0]) / (2 * step)
        slopes.append(np.einsum("sbnd,bnd->s", above, change))
    sums, _ = statistics._down(model(), layer, [h], [above])
    np.testing.assert_allclose(way @ sums["gradient"] @ way, np.mean(np.square(slopes)), rtol=1e-6)


def test_ranges_and_what_errors_in_them_cost() -> None:
    """Ends of keys before RoPE; of what lies between them, in all, the squared gradients that moments have."""
    digest, width = calibrated().calibration.digest, KV_HEADS * HEAD_DIM
    for layer in (0, 3):
        found, k = load_statistics(digest, layer), rows(layer, "k")
        np.testing.assert_allclose(found.key_ends, np.percentile(k, [[0, 100], [0.5, 99.5]], 0), atol=1e-12)
        assert found.key_bins.shape == found.value_bins.shape == (2, 2, BINS)
        np.testing.assert_allclose([found.key_bins[0, 0].sum(), found.value_bins[0, 0].sum()], width)
        inside = ((k >= found.key_ends[1, 0]) & (k <= found.key_ends[1, 1])).sum()
        np.testing.assert_allclose(found.key_bins[1, 0].sum(), inside / len(k))
        np.testing.assert_allclose(found.value_bins[1, 0].sum(), width - 2 * outliers_of(width))
        of_keys, of_values = np.einsum("kdd->", found.turned_gradient), np.trace(found.gradient[width:, width:])
        np.testing.assert_allclose(found.key_bins[0, 1].sum(), of_keys, rtol=1e-9)  # RoPE keeps lengths
        np.testing.assert_allclose(found.value_bins[0, 1].sum(), of_values, rtol=1e-9)


def test_predictors_are_fitted_from_the_first_layer_up() -> None:
    digest = calibrated().calibration.digest
    flat = lambda layer, what: rows(layer, what).reshape(2 * (TOKENS - SKIPPED), -1)  # noqa: E731
    read = predictors.first_read(flat(0, "k"), flat(0, "v"))
    assert not load_statistics(digest, 0).key_predictor.any()
    for layer in range(1, 3):
        of_keys, of_values, read = predictors.fit(flat(layer, "k"), flat(layer, "v"), read)
        found = load_statistics(digest, layer)
        np.testing.assert_allclose(found.key_predictor, of_keys, atol=1e-6)
        np.testing.assert_allclose(found.value_predictor, of_values, atol=1e-6)


# ---- on disk


def test_a_run_that_was_cut_off_goes_on(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = calibrated().calibration.digest
    wanted = [load_statistics(digest, layer) for layer in range(LAYERS)]
    shutil.rmtree(own_cache / "calibration")
    save, passed = statistics.save_arrays, []
    up, down = statistics._up, statistics._down
    monkeypatch.setattr(statistics, "_up", lambda *a: passed.append("up") or up(*a))
    monkeypatch.setattr(statistics, "_down", lambda *a: passed.append("down") or down(*a))
    for count in (7, 6, 8):  # files that are written before the kill
        left = iter(range(count))

        def killed(file: Path, arrays: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            save(file, arrays)

        monkeypatch.setattr(statistics, "save_arrays", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrated()
    monkeypatch.setattr(statistics, "save_arrays", save)
    calibrated()
    assert passed.count("up") + passed.count("down") <= 2 * LAYERS + 3  # of each kill, at most one layer is lost
    for layer, each in enumerate(wanted):
        jax.tree.map(np.testing.assert_array_equal, vars(each), vars(load_statistics(digest, layer)))
    passed.clear()
    calibrated()
    assert not passed and [file.name for file in (own_cache / "calibration").glob("*/*")].count("waiting") == 0


def test_damage_is_said(own_cache: Path) -> None:
    calibrated()
    file = next((own_cache / "calibration").glob("*/arrays/1-up.npz"))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(kvjax.KvjaxError, match="is damaged"):
        calibrated()


def test_other_texts_and_weights_are_kept_apart() -> None:
    plan, first, second = kvjax.plan(model(), LEARNED), calibrated(), calibrated(1)
    assert first.calibration.digest != second.calibration.digest
    (one, *_), (other, *_) = (bases.load_bases(each, plan)[3] for each in (first, second))
    assert np.abs(one - other).max() > 1e-3
    params = dict(model().params) | {"norm": 2 * model().params["norm"]}
    trained = kvjax.calibrated(dataclasses.replace(model(), params=params), IDS, context=TOKENS, windows=1)
    assert trained.calibration.digest != second.calibration.digest


# ---- what it is for


def test_a_method_that_learns_asks_for_a_text() -> None:
    for refused in (
        lambda: bases.load_bases(model(), kvjax.plan(model(), LEARNED)),
        lambda: kvjax.score(model(), IDS, LEARNED, context=TOKENS, windows=1),
        lambda: kvjax.tune(model(), IDS, 16, candidates=LEARNED, context=TOKENS, windows=1),
    ):
        with pytest.raises(kvjax.KvjaxError, match=r"learns from a text; expected .* kvjax.calibrated"):
            refused()


def test_the_text_is_not_judged() -> None:
    """Nor is another that holds it; rows name what was learned from."""
    place = {"context": 40, "windows": 1, "protocol": "parallel"}
    for text in (IDS[:40], IDS[TOKENS // 2 :], np.concatenate([[3, 1, 4], IDS])):
        with pytest.raises(kvjax.KvjaxError, match="expected windows that are not seen"):
            kvjax.sweep(calibrated(), text, "dense", **place)
    (row,) = kvjax.sweep(calibrated(), IDS[2 * TOKENS :], LEARNED, **place)
    learned = row["learned_from"]
    assert (
        learned["text"] == "token ids" and learned["tokens"] == WINDOWS.size and len(learned["tokens_sha256"]) == 64
    )
    assert np.isfinite(row["kld"])


def test_nor_by_a_search(tmp_path: Path) -> None:
    """A plan may be chosen by other windows of the text; what judges it holds none that bases learned from."""
    seen = IDS[100:140][None]
    with pytest.raises(kvjax.KvjaxError, match="expected windows that are not seen"):
        make_judge(calibrated(), "another", seen, list(IDS[:40]), 40, 1, tmp_path)
    judge = make_judge(calibrated(), "another", seen, list(IDS[50:90]), 40, 1, tmp_path)
    assert judge.identity["learned_from"] == calibrated().calibration.identity


def test_cards_name_the_text() -> None:
    identity = identity_of(calibrated(), "another", IDS[100:140][None], "streaming")
    chosen = dict.fromkeys(("kld", "nll", "top1", "bits_nominal", "bits_asymptotic", "bits_real"), 1.0)
    made_with = dict.fromkeys(("device", "versions", "git"))
    bits = SimpleNamespace(budget=4, kind="nominal")
    search: Any = SimpleNamespace(
        **{"identity": identity, "settings": SearchSettings(), "model": calibrated(), "bits": bits},
        **{"candidates": [], "validation": None},
    )
    for cache, named in ((LEARNED, True), ("k4v4", False)):
        row = chosen | made_with | {"cache": str(kvjax.plan(model(), cache))}
        assert ("learned_from" in make_card(search, [row, row], 0.0)) == named


def test_programs_calibrate(goldens: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(97, 123, 1500))))
    config = perplexity.get_config()
    config.update(model=str(goldens / "llama-linear"), text="demo", calibration=str(text))
    with jax.enable_x64(False):
        found = program.load(config, config.text).calibration
    assert found is not None and found.text == "text.txt" and found.windows.shape[0] == 4
    config.model = "nowhere"  # texts are compared first
    with pytest.raises(kvjax.KvjaxError, match="both calibrated on and judged"):
        program.load(config, f"demo,{text}")


def test_states_know_what_their_bases_learned_from(tmp_path: Path) -> None:
    plan, first, second = kvjax.plan(model(), LEARNED), calibrated(), calibrated(1)
    state = kvjax.prefill(first, "some text", plan, chat=False)
    kvjax.save_state(tmp_path / "state", first, state)
    assert kvjax.restore_state(tmp_path / "state", first).lengths == state.lengths
    with pytest.raises(kvjax.KvjaxError, match="expected a model with its calibration"):
        kvjax.restore_state(tmp_path / "state", second)
    with pytest.raises(kvjax.KvjaxError, match="learned from another text"):
        kvjax.save_state(tmp_path / "again", second, state)
