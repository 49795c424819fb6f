"""Compiled programs are let go before memory maps run out."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import programs

MODEL = Path(__file__).parent / "goldens/llama-llama3"


def limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maps: int) -> None:
    """As if a process might have so many."""
    (tmp_path / "most").write_text(f"{maps}\n")
    monkeypatch.setattr(programs, "MOST", tmp_path / "most")


@pytest.mark.parametrize(("maps", "kept"), [(10, 0), (2**30, 1)])
def test_programs_go_where_more_than_half_is_used(
    maps: int, kept: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    limit(monkeypatch, tmp_path, maps)
    programs.make_room()
    assert double._cache_size() == kept


def test_other_systems_keep_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(programs, "OWN", tmp_path / "none")
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    programs.make_room()
    assert double._cache_size() == 1


@pytest.mark.usefixtures("quick_compilation")
def test_scores_are_the_same_where_programs_went(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, text = kvjax.load(str(MODEL), "float32"), "the quick brown fox jumps over the lazy dog. " * 20
    scores = [kvjax.score(model, text, "k4v4@token", context=32, windows=2)]
    limit(monkeypatch, tmp_path, 10)
    scores.append(kvjax.score(model, text, "k4v4@token", context=32, windows=2))
    np.testing.assert_array_equal(*(score.per_token.kld for score in scores))
