"""What is compiled ahead of time can be traced: shapes and settings fit the kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kvjax.configs import aot as tpu_config
from kvjax.configs import aot_cuda as cuda_config
from kvjax.errors import KvjaxError
from kvjax.experiments import aot, aot_cuda
from kvjax.experiments.aot_cases import Kernels, cases
from kvjax.models.zoo import RANDOM
from kvjax.ops import dispatch
from kvjax.ops.dispatch import using

CUDA = aot_cuda.kernels_of("h100")
SMALL = {"batch": 2, "tokens": 1024, "heads": 4, "kv_heads": 2, "rank": 128, "model_dim": 256}


def small(kernels: Kernels):
    config = (tpu_config if kernels is aot.KERNELS else cuda_config).get_config()
    config.update(SMALL)
    return config


@pytest.mark.parametrize("kernels", [aot.KERNELS, CUDA], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("op", ["packed_attention", "quantize_pack", "remat_attention", "reconstruct"])
def test_every_case_is_traced(kernels: Kernels, op: str) -> None:
    config = small(kernels)
    config.ops = op
    found = list(cases(config, kernels))
    names = [tuple(case.point.values()) for case in found]
    assert len(set(names)) == len(names) > 1
    for case in found:
        results = jax.tree.leaves(jax.eval_shape(case.function, *case.arguments))
        assert results and all(a.size for a in results)
        if op.endswith("attention"):
            assert results[0].dtype == jnp.float32 and results[0].shape[:3] == (2, 1, 4)


@pytest.mark.parametrize("kernels", [aot.KERNELS, CUDA], ids=lambda kernels: kernels.name)
def test_a_prompt_is_traced(kernels: Kernels) -> None:
    config = small(kernels)
    config.update(ops="causal_attention", step_tokens=256, head_dim=64)
    (case,) = cases(config, kernels)
    output, lse = jax.eval_shape(case.function, *case.arguments)
    assert output.shape == (2, 256, 4, 64) and lse.shape == (2, 256, 4)
    with pytest.raises(KvjaxError, match="op 'causal_attention'"):
        list(cases(config, kernels._replace(causal_attention=None)))


@pytest.mark.parametrize("kernels", [aot.KERNELS, CUDA], ids=lambda kernels: kernels.name)
def test_a_decode_step_is_traced(kernels: Kernels, monkeypatch) -> None:
    """With the kernels of its platform, which are not the same for all ops."""
    named = {}
    monkeypatch.setitem(RANDOM, "random:mistral-7b", dataclasses.replace(RANDOM["random:mistral-7b"], layers=2))
    monkeypatch.setattr(dispatch, "using", lambda **names: named.update(names) or using(**names, interpret=True))
    config = small(kernels)
    config.update(ops="decode_step", model="random:mistral-7b", step_tokens=256)
    for case in cases(config, kernels):
        token, cache = jax.eval_shape(case.function, *case.arguments)
        assert token.shape == (2, 1) and cache.shape.max_len == 256
    assert named["packed_attention"] == [kernels.name, "xla"]
    assert named["causal_attention"] == (["splash", "xla"] if kernels is aot.KERNELS else ["xla"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ops": "attention"}, "op 'attention'"), ({"modes": "kivi"}, "mode 'kivi'"), ({"bits": "7/7"}, "bits '7/7'")],
)
def test_bad_settings_are_named(settings, message: str) -> None:
    config = small(aot.KERNELS)
    config.update(settings)
    with pytest.raises(KvjaxError, match=message):
        list(cases(config, aot.KERNELS))
