"""KVTuner's shipped presets: read as plans, and held against the paper's own tables."""

from __future__ import annotations

import math
import re
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal

import pytest
import yaml
from published import CANDIDATES, GROUPS, MODELS, PRESETS

from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError

TRUNCATED = (3.92, 5.43)  # 3.9286 and 5.4375, which Table 6 calls C5.43 and Table 5 C5.44; all else is rounded

each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
each_search = pytest.mark.parametrize(("model", "mode"), list(GROUPS))


def test_what_was_shipped():
    assert Counter((preset.model, preset.mode, preset.most) for preset in PRESETS) == {
        (model, mode, most): 2 for model in MODELS for mode in ("kivi", "token") for most in (4, 6)
    }
    assert len({preset.name for preset in PRESETS}) == 32
    contents = Counter((preset.model, preset.mode, tuple(sorted(preset.by_layer.items()))) for preset in PRESETS)
    assert [(model, mode) for (model, mode, _), count in contents.items() if count > 1] == [
        ("Qwen2.5-3B-Instruct", "kivi")  # 4_0 and 6_0
    ]


@each_preset
def test_presets_are_read(tmp_path, preset):
    rows = {layer: {"nbits_key": key, "nbits_value": value} for layer, (key, value) in preset.by_layer.items()}
    path = tmp_path / f"{preset.name}.yaml"
    path.write_text(yaml.safe_dump(rows))
    plan = CachePlan.parse(str(path), MODELS[preset.model])
    assert plan.specs == tuple(KV(*pair, preset.mode) for _, pair in sorted(preset.by_layer.items()))
    assert round(plan.bits_nominal, 4) == preset.bits
    assert plan.bits_nominal <= preset.most
    for called in preset.called:
        hundred = 100 * plan.bits_nominal
        assert called == (math.floor(hundred) if called in TRUNCATED else round(hundred)) / 100
    assert yaml.safe_load(plan.preset()) == rows


@each_preset
def test_presets_have_names(preset):
    bits = Decimal(str(preset.bits)).quantize(Decimal("0.01"), ROUND_HALF_UP)
    name = f"kvtuner:{preset.model}-{bits}@{preset.mode}"
    plan = CachePlan.parse(name, MODELS[preset.model])
    assert plan.specs == tuple(KV(*pair, preset.mode) for _, pair in sorted(preset.by_layer.items()))
    assert CachePlan.parse(str(plan), MODELS[preset.model]) == plan


def test_a_name_says_its_mode_where_one_plan_has_it():
    model = MODELS["Llama-3.1-8B-Instruct"]
    own, other = (CachePlan.parse(f"kvtuner:llama-3.1-8b-instruct-3.25{mode}", model) for mode in ("", "@token"))
    assert {spec.mode for spec in own.specs} == {"kivi"} and {spec.mode for spec in other.specs} == {"token"}
    assert [spec.key_bits for spec in own.specs] == [spec.key_bits for spec in other.specs]
    sinks = CachePlan.parse("kvtuner:llama-3.1-8b-instruct-3.25@kivi(sink=4)", model)
    assert all(spec.sink == 4 for spec in sinks.specs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kvtuner:llama-3.1-8b-instruct-3", "expected llama-3.1-8b-instruct-3.06, llama-3.1-8b-instruct-3.25"),
        ("kvtuner:", "expected llama-3.1-8b-instruct-3.06"),
        ("kvtuner:qwen2.5-7b-instruct-3.93", "two modes; expected @kivi or @token"),
        ("kvtuner:mistral-7b-instruct-v0.3-3.19@x", "mode 'x'"),
        ("kvtuner:llama-3.1-8b-instruct-3.25", "names layer 28; the model has 28 layers"),
    ],
)
def test_names_that_fit_no_plan_or_model(name, expected):
    with pytest.raises(KvjaxError, match=re.escape(expected)):
        CachePlan.parse(name, MODELS["Qwen2.5-7B-Instruct"])


@each_preset
def test_presets_name_every_layer_once(preset):
    assert sorted(layer for _, layers in preset.pairs for layer in layers) == list(range(MODELS[preset.model].layers))


@each_preset
def test_presets_give_a_group_one_pair(preset):
    for group in GROUPS[preset.model, preset.mode]:
        assert len({preset.by_layer[layer] for layer in group}) == 1


@each_preset
def test_presets_choose_among_the_candidates(preset):
    for candidates, layers in CANDIDATES[preset.model, preset.mode]:
        assert {preset.by_layer[layer] for layer in layers} <= candidates


@each_search
def test_groups_and_candidates_hold_every_layer_once(model, mode):
    for listed in (GROUPS[model, mode], [layers for _, layers in CANDIDATES[model, mode]]):
        assert sorted(layer for layers in listed for layer in layers) == list(range(MODELS[model].layers))


@each_search
def test_a_group_has_the_same_candidates(model, mode):
    """Layers are split by their candidates before they are clustered."""
    for group in GROUPS[model, mode]:
        assert any(set(group) <= set(layers) for _, layers in CANDIDATES[model, mode])


def test_numbers_of_groups():
    assert [len(groups) for groups in GROUPS.values()] == [6, 6, 5, 8, 8, 8, 8, 7]
