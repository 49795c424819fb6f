"""Families at equal conditions: which caches are compared, and that differences are of the same windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ml_collections import config_dict

import kvjax
from kvjax.checkpoints.load import read_config
from kvjax.configs import frontier
from kvjax.configs.quality import get_config
from kvjax.experiments import quality
from kvjax.records import read_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def config(goldens: Path, tmp_path: Path) -> config_dict.ConfigDict:
    words = np.random.default_rng(0).choice(["an", "owl", "saw", "no", "moon"], 900)
    (tmp_path / "text.txt").write_text(" ".join(words))
    config = get_config()
    config.update(model=str(goldens / "llama-linear"), texts=str(tmp_path / "text.txt"), context=48, windows=3)
    config.update(bits="2", contexts="64,512", offset=5)
    config.families = config_dict.ConfigDict({"per token": ("k{b}v{b}@token(group=8)", ("fit=mse",))})
    config.conditions = config_dict.ConfigDict({"exact": ("streaming", "residual=16,sink=4")})
    return config


def test_every_family_of_the_study_has_its_forms_under_all_conditions() -> None:
    config = get_config()
    found = quality.cases(config, read_config("smollm2-135m"))
    assert len(found) == len({(case.condition, case.plan) for case in found})
    assert {case.bits for case in found} == {2, 3, 4} and {case.condition for case in found} == {*config.conditions}
    for case in found:
        spec, plain = case.plan.specs[-1], case.plain.specs[-1]
        assert type(spec) is type(plain) and spec.sink == plain.sink == (4 if case.condition == "exact" else 0)
        same = case.plan.bits_asymptotic == case.plain.bits_asymptotic
        assert same or "scale=8" in str(case.plan)
        assert case.condition == "stored" or spec.residual_length == 64


@pytest.mark.parametrize("variant", ["equal", "authors"])
def test_the_frontiers_methods_have_equal_tokens(variant: str) -> None:
    """All methods at all bits; under `stored` and `exact` with the same sinks, and read by the same control."""
    config = frontier.get_config(variant)
    found = quality.cases(config, read_config("smollm2-135m"))
    assert len(found) == len(config.conditions) * 3 * (1 + len(frontier.METHODS))
    assert len({case.plain for case in found}) == len(config.conditions) * 3
    for case in found if variant == "equal" else ():
        spec = case.plan.specs[-1]
        assert spec.sink == (0 if case.condition == "stored" else 4)
        assert case.condition == "stored" or spec.residual_length == 128


def test_a_form_may_be_another_cache(config: config_dict.ConfigDict) -> None:
    config.families = config_dict.ConfigDict({"rivals": ("k{b}v{b}@token(group=8)", ("x{b}@input", "fit=keys"))})
    found = quality.cases(config, read_config(config.model))
    assert [str(case.plan) for case in found] == [
        "k2v2@token(group=8,residual=16,sink=4)",
        "x2@input(residual=16,sink=4)",
        "k2v2@token(group=8,residual=16,sink=4,fit=keys)",
    ]


def test_differences_are_of_the_same_windows(config: config_dict.ConfigDict, tmp_path: Path) -> None:
    quality.main(config, tmp_path / "out")
    plain, fitted = read_rows(tmp_path / "out/quality.jsonl")
    model = kvjax.load(config.model, config.dtype)
    sizes = {"context": 48, "windows": 3, "offset": 5}
    scores = [kvjax.score(model, Path(config.texts), row["cache"], **sizes) for row in (plain, fitted)]
    compared = scores[1].compare(scores[0])
    assert fitted["kld_less_plain"] == pytest.approx(compared.kld, rel=1e-3) and compared.kld
    assert fitted["kld_less_plain_ci95"] == pytest.approx(compared.kld_interval, rel=1e-3)
    assert fitted["kld_over_plain"] == pytest.approx(scores[1].kld / scores[0].kld)
    assert (plain["kld_less_plain"], plain["cache"]) == (0, fitted["plain"])
    plan = kvjax.CachePlan.parse(fitted["cache"], model.config)
    assert (tmp_path / "out/quality.png").stat().st_size > 10_000
    assert [fitted["bits_64"], fitted["bits_512"]] == [plan.bits_real(64), plan.bits_real(512)]


def test_what_is_there_is_not_scored_again(
    config: config_dict.ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality.main(config, tmp_path / "out")
    monkeypatch.setattr(quality.Sweep, "score", lambda *_: pytest.fail("scored again"))
    quality.main(config, tmp_path / "out")
    assert len(read_rows(tmp_path / "out/quality.jsonl")) == 2
