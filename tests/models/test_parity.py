"""Logits equal HF transformers' for every family and for the real model, relative to the largest logit."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoints.safetensors import load_hf

TOLERANCE = 2e-5

FAMILIES = [
    *("smollm3", "granite", "gemma3", "olmo2", "olmo3", "phi3-long", "phi3-short"),
    *("qwen3-moe", "qwen3-moe-window", "gpt-oss", "gpt-oss-mxfp4"),
]
FOLDERS = ["llama-linear", "llama-llama3", "mistral-window", "qwen2-tied", "qwen3", *FAMILIES]


@pytest.mark.parametrize("name", FOLDERS)
def test_tiny(name, goldens, dense_logits):
    config, params = load_hf(goldens / name, jnp.float32)
    golden = np.load(goldens / name / "logits.npz")
    error = np.abs(dense_logits(config, params, golden["tokens"]) - golden["logits"]).max()
    assert error <= TOLERANCE * np.abs(golden["logits"]).max()


def test_smollm2(smollm2, goldens, dense_logits):
    golden = np.load(goldens / "smollm2-135m.npz")
    logits = dense_logits(smollm2.config, smollm2.params, golden["tokens"])[0]
    np.testing.assert_array_equal(logits.argmax(-1), golden["argmax"])
    at_positions = logits[golden["positions"]]
    error = np.abs(at_positions[:, golden["columns"]] - golden["logits"]).max()
    assert error <= TOLERANCE * golden["max_abs"]
    np.testing.assert_allclose(np.abs(at_positions).max(), golden["max_abs"], rtol=TOLERANCE)
