"""Evaluations of plans per minute, as a search makes them: kvjax's Simulator beside HF transformers, in one run.

    kvjax search_speed --workdir=DIR

One evaluation is a plan's KL divergence from the dense run, which both sides made before, and its nll, over the whole
vocabulary and under the `streaming` protocol. HF has a cache that quantises and dequantises what it stores, as
KVTuner's has, and is given all windows side by side, 32 tokens at a time. HF in one pass is lent the Simulator's
idea: each window goes through at once, and an attention of its own reads old blocks as stored and the rest exactly.
`random` plans draw the widths of every layer. `one layer` plans are what a sensitivity sweep evaluates, dense but for
one layer: the Simulator starts at that layer from the dense run that it keeps, HF has to run everything.

Needs torch, transformers and accelerate, which are no dependencies of kvjax. Appends rows to DIR/search_speed.jsonl;
what is there already is not timed again.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_dict

from kvjax import records
from kvjax.caches.base import CacheSpec
from kvjax.caches.dense import Dense
from kvjax.caches.kv import KIVI_GROUP, KV
from kvjax.caches.plan import CachePlan
from kvjax.caches.stored import Width
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import cut_windows
from kvjax.evaluate.text import load_text
from kvjax.experiments import hf, program
from kvjax.models.config import ModelConfig
from kvjax.tuner.simulate import Simulator

OURS, HF, ONE_PASS = SIDES = "kvjax", "HF transformers", "HF transformers, one pass"
KINDS = ("random", "one layer")
WIDTHS: tuple[Width, ...] = (2, 4, 8)
Evaluate = Callable[[CachePlan], tuple[float, float]]  # mean KL divergence and nll, nats a token


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.plans < 2:
        raise KvjaxError(f"plans={config.plans}; expected at least 2, the first of which warms up")
    if config.context < 2 * KIVI_GROUP or config.context % KIVI_GROUP:
        raise KvjaxError(f"context={config.context}; expected whole blocks of {KIVI_GROUP} tokens, at least two")
    results = workdir / "search_speed.jsonl"
    points = {(kind, side): _point(config, kind, side) for kind in KINDS for side in SIDES}
    missing = [kind for kind in KINDS if any(records.find_row(results, points[kind, s]) is None for s in SIDES)]
    if missing:
        _measure(config, missing, points, results)
    for kind in KINDS:
        for side in SIDES:
            row = records.find_row(results, points[kind, side])
            assert row
            speed = f"{row['evaluations_per_minute']:6.1f} evaluations/minute, {row['x_hf']:.2f} x HF"
            print(f"{kind:10s} {side:26s} {speed}; KL within {row['kld_difference']:.1%} of ours")


def _point(config: config_dict.ConfigDict, kind: str, side: str) -> dict[str, Any]:
    """What is measured."""
    return {
        "experiment": "search_speed",
        "what": side,
        "plans": kind,
        "text": config.text,
        "mode": config.mode,
        "context": config.context,
        "windows": config.windows,
        "timed": config.plans - 1,
        "seed": config.seed,
    }


def _measure(config: config_dict.ConfigDict, kinds: Sequence[str], points: dict, results: Path) -> None:
    """Appends the rows of some kinds of plans."""
    model = load("smollm2-135m", "float32")
    plans = {kind: _plans(config, kind, model.config) for kind in kinds}
    windows = cut_windows(model.tokenizer.encode(load_text(config.text)), config.context, config.windows)
    simulator = Simulator(model, windows)
    simulator.dense(len(windows) - 1)
    theirs = _hf(windows, simulator.dense_plan)

    def ours(plan: CachePlan) -> tuple[float, float]:
        scores = simulator.score(plan)
        return float(scores.kld.mean()), float(scores.nll.mean())

    for kind in kinds:
        figures = _time({OURS: ours, **theirs}, plans[kind])
        provenance = records.provenance()
        provenance["versions"] |= hf.versions()
        records.append_rows(results, [points[kind, side] | figures[side] | provenance for side in SIDES])


def _plans(config: config_dict.ConfigDict, kind: str, model: ModelConfig) -> list[CachePlan]:
    """Plans of a kind. After the first, layers that are quantised alone are spread evenly: their median costs what
    the mean of a sweep does."""
    rng, layers = random.Random(f"{kind} {config.seed}"), model.layers

    def draw() -> KV:
        return KV(rng.choice(WIDTHS), rng.choice(WIDTHS), config.mode)

    if kind == "random":
        return [CachePlan.of([draw() for _ in range(layers)], model) for _ in range(config.plans)]
    timed = config.plans - 1
    plans = []
    for layer in [0, *((2 * i + 1) * layers // (2 * timed) for i in range(timed))]:
        specs: list[CacheSpec] = [Dense()] * layers
        specs[layer] = draw()
        plans.append(CachePlan.of(specs, model))
    return plans


def _time(sides: dict[str, Evaluate], plans: Sequence[CachePlan]) -> dict[str, dict[str, float]]:
    """Median speed of the sides, which evaluate every plan in turn, and how much they differ at most; the first plan
    counts for neither."""
    seconds = {side: np.zeros(len(plans)) for side in sides}
    scores = {side: np.zeros((len(plans), 2)) for side in sides}
    for i, plan in enumerate(plans):
        for side, evaluate in sides.items():
            start = time.perf_counter()
            scores[side][i] = evaluate(plan)
            seconds[side][i] = time.perf_counter() - start
    typical = {side: float(np.median(each[1:])) for side, each in seconds.items()}
    kld = {side: each[1:, 0] for side, each in scores.items()}
    return {
        side: {
            "evaluations_per_minute": 60 / typical[side],
            "x_hf": typical[HF] / typical[side],
            "kld_difference": float((np.abs(kld[side] - kld[OURS]) / kld[OURS]).max()),
        }
        for side in sides
    }


# ---- HF transformers


def _hf(windows: np.ndarray, dense_plan: CachePlan) -> dict[str, Evaluate]:
    """Evaluations by HF's float32 model of the same file; makes the dense run."""
    model = hf.smollm2()
    import torch
    import transformers

    transformers.AttentionInterface.register("streamed", _attention(windows.shape[1]))
    tokens = torch.tensor(windows).long()

    def chunked(plan: CachePlan):
        model.set_attn_implementation("sdpa")
        cache = _growing(plan)
        pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split(KIVI_GROUP, 1)]
        return torch.cat(pieces, 1)

    def whole(plan: CachePlan):
        model.set_attn_implementation("streamed")
        return (model(window[None], past_key_values=_cache(plan)).logits[0] for window in tokens)

    with torch.inference_mode():
        dense = [logits[:-1].log_softmax(-1) for logits in whole(dense_plan)]
        dense = [(log_p.exp(), _dot(log_p.exp(), log_p)) for log_p in dense]

    def evaluate(run: Callable[[CachePlan], Any], plan: CachePlan) -> tuple[float, float]:
        kld, nll = [], []
        with torch.inference_mode():
            for window, logits, (p, negative_entropy) in zip(tokens, run(plan), dense, strict=True):
                log_q = logits[:-1].log_softmax(-1)
                kld.append(negative_entropy - _dot(p, log_q))
                nll.append(-log_q.gather(1, window[1:, None]))
            return torch.stack(kld).mean().item(), torch.stack(nll).mean().item()

    return {HF: functools.partial(evaluate, chunked), ONE_PASS: functools.partial(evaluate, whole)}


def _dot(a, b):
    """Row by row, a quarter of the time of a batched product."""
    import torch

    return torch.stack([x.dot(y) for x, y in zip(a, b, strict=True)])


def _attention(context: int) -> Callable[..., Any]:
    """HF's default attention; where a layer gives stored keys and then exact ones, a query reads what `streaming`
    would let it: blocks before its own as stored, its own block exactly."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    at = torch.arange(context)
    edge = (at // KIVI_GROUP * KIVI_GROUP)[:, None]
    stored, own = at[: context // KIVI_GROUP * KIVI_GROUP] < edge, (at >= edge) & (at <= at[:, None])
    streamed = torch.cat([stored, own], 1)[None, None]

    def attend(module, query, key, value, attention_mask, **kwargs):
        mask = streamed if key.shape[2] > query.shape[2] else None  # causal
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    return attend


def _growing(plan: CachePlan):
    """The simulated cache of windows that are given a block at a time."""
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    class Layer(DynamicLayer):
        keys: Any
        values: Any

        def __init__(self, spec: Any):
            super().__init__()
            self.spec = spec

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            new = key_states, value_states
            stored = new if isinstance(self.spec, Dense) else _block(self.spec, *new)
            read = stored if self.spec.mode == "token" else new
            read = tuple(torch.cat(pair, 2) for pair in zip((self.keys, self.values), read, strict=True))
            self.keys, self.values = (
                torch.cat(pair, 2) for pair in zip((self.keys, self.values), stored, strict=True)
            )
            return read

    return Cache(layers=[Layer(spec) for spec in plan.specs])


def _block(spec: Any, keys, values):
    """A block as stored."""
    if spec.mode == "token":
        group = keys.shape[3]
        return _stored(keys, spec.key_bits, -1, group), _stored(values, spec.value_bits, -1, group)
    return _stored(keys, spec.key_bits, -2, KIVI_GROUP), _stored(values, spec.value_bits, -1, KIVI_GROUP)


def _cache(plan: CachePlan):
    """The simulated cache of a window that is given in one pass."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Layer(DynamicLayer):
        def __init__(self, spec: CacheSpec):
            super().__init__()
            self.spec = spec

        def update(self, key_states, value_states, *args, **kwargs):
            return _read(self.spec, key_states, value_states)

    return Cache(layers=[Layer(spec) for spec in plan.specs])


def _read(spec: Any, keys, values):
    """Keys and values of a window to read: all as stored, or complete blocks as stored and then all exact ones."""
    import torch

    if isinstance(spec, Dense):
        return keys, values
    if spec.mode == "token":
        return _block(spec, keys, values)
    whole = keys.shape[2] // KIVI_GROUP * KIVI_GROUP
    stored_keys, stored_values = _block(spec, keys[:, :, :whole], values[:, :, :whole])
    return torch.cat([stored_keys, keys], 2), torch.cat([stored_values, values], 2)


def _stored(x, bits: int, axis: int, group: int):
    """Quantised and dequantised in groups of neighbours along a negative axis."""
    grouped = x.unflatten(axis, (-1, group))
    low, high = grouped.amin(axis, True), grouped.amax(axis, True)
    scale, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = (grouped - zero).div_(scale.masked_fill(scale == 0, 1.0)).round_().clamp_(0, 2**bits - 1)
    return codes.mul_(scale).add_(zero).reshape(x.shape)


if __name__ == "__main__":
    program.run(main, "configs/search_speed.py")
