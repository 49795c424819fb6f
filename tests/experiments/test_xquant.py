"""The comparison of XQuant with KIVI: equal in everything but the method."""

from __future__ import annotations

import pytest

from kvjax.caches.base import ModelSizes
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.configs.xquant import get_config

SIZES = {"equal": ModelSizes(30, 9, 3, 64, 576), "equal-mha": ModelSizes(30, 9, 9, 64, 576)}


@pytest.mark.parametrize("variant", SIZES)
def test_families_share_sinks_residual_and_first_layers(variant: str) -> None:
    names = split_list(get_config(variant).caches)
    plans = [CachePlan.parse(name, SIZES[variant]) for name in names if name != "dense"]
    assert any("rope=pre" in str(plan) for plan in plans)
    for plan in plans:
        assert {(spec.residual_length, spec.sink) for spec in plan.specs} == {(64, 4)}  # type: ignore[attr-defined]
        assert {spec.bits_nominal for spec in plan.specs[:3]} == {4}


def test_families_of_a_gqa_model_have_equal_bits() -> None:
    plans = [CachePlan.parse(name, SIZES["equal"]) for name in split_list(get_config("equal").caches)]
    for figure in (lambda plan: plan.bits_asymptotic, lambda plan: plan.bits_real(1024)):
        assert len({round(figure(plan), 6) for plan in plans if str(plan) != "dense"}) == 3  # in 4, 3 and 2 bits
