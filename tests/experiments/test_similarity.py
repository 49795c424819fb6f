"""Similarity of neighbouring layers and outlying channels, on vectors whose answers are known."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.configs import similarity as study
from kvjax.experiments import similarity
from kvjax.records import read_rows


def test_angles_and_steps_are_means_over_tokens() -> None:
    here, below = jnp.array([[2.0, 0], [0, 1]]), jnp.array([[1.0, 0], [1, 0]])
    assert similarity.cosine(here, below) == pytest.approx((1 + 0) / 2)
    assert similarity.step(here, below) == pytest.approx((1 / 2 + 2**0.5) / 2)


def test_the_outlier_is_the_channel_of_the_largest_mean_magnitude() -> None:
    x = np.random.default_rng(0).choice([-1.0, 1.0], (8, 6))
    x[:, 4] *= 10
    x[0, 1] *= 50  # large for one token: 57 / 8 on average
    assert similarity.outlier(jnp.asarray(x)) == (4, pytest.approx(10))


def test_latents_of_keys_that_share_a_direction_have_their_outlier_in_channel_0() -> None:
    random = np.random.default_rng(1)
    towards = random.standard_normal(16)
    towards /= np.linalg.norm(towards)
    x = random.standard_normal((64, 16)) + 20 * towards
    weights = {"k": 0.1 * random.standard_normal((8, 16)) + np.outer(random.standard_normal(8), towards)}
    weights["v"] = random.standard_normal((8, 16))
    found = similarity.tensors({name: jnp.asarray(w) for name, w in weights.items()}, jnp.asarray(x))
    channel, ratio = similarity.outlier(found["XU_k"])
    assert channel == 0 and ratio > 5
    np.testing.assert_allclose(found["X/w"], x, rtol=1e-6)  # a layer without a norm


@pytest.mark.usefixtures("quick_compilation")
def test_a_row_per_layer_and_a_picture(goldens: Path, tmp_path: Path) -> None:
    config = study.get_config()
    config.update(model=str(goldens / "llama-linear"), tokens=24)
    similarity.main(config, tmp_path)
    rows = read_rows(tmp_path / "similarity.jsonl")
    assert [row["layer"] for row in rows] == list(range(len(rows)))
    assert "cosine X" not in rows[0] and -1 <= rows[1]["cosine X"] <= 1
    assert (tmp_path / "similarity.png").stat().st_size > 5_000
