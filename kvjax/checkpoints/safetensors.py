"""Checkpoints in Hugging Face's layout: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from kvjax.errors import KvjaxError
from kvjax.files import brief, read_json
from kvjax.models.config import ModelConfig, from_hf
from kvjax.models.params import Names, Params, build_params

NAMES = Names(
    top={"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"},
    prefix="model.layers.{i}.",
    layer={
        "attention_norm": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "q_bias": "self_attn.q_proj.bias",
        "k_bias": "self_attn.k_proj.bias",
        "v_bias": "self_attn.v_proj.bias",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    },
)
INDEX = "model.safetensors.index.json"
KINDS = ("F32", "BF16", "F16", "F64")
PICKLES = (".bin", ".pt", ".pth")


def weight_files(folder: Path) -> list[Path]:
    """Lists the safetensors files of a HF folder.

    Args:
      folder: the folder.

    Returns:
      The files, in name order.

    Raises:
      KvjaxError: there are none, there are only pickles (never loaded: they can run any code), or a shard is missing.
    """
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        names = shards.values() if isinstance(shards, dict) else [None]
        if not all(isinstance(name, str) and name == Path(name).name and name.isprintable() for name in names):
            raise KvjaxError(f"{folder / INDEX}: expected a weight_map from tensors to files of that folder")
        files = [folder / name for name in sorted(set(names))]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise KvjaxError(f"{folder} holds pickles ({pickles[0]}), which are never loaded; expected safetensors")
    else:
        raise KvjaxError(f"{folder} has no model.safetensors")
    for file in files:
        if not file.is_file():
            raise KvjaxError(f"{file} is missing; {INDEX} names it")
    return files


def load_hf(folder: Path, dtype: DTypeLike, layers: int | None = None) -> tuple[ModelConfig, Params]:
    """Reads the config and the parameters of a HF folder.

    Args:
      folder: the folder.
      dtype: dtype of the parameters.
      layers: how many layers to keep, from the first; all where None.

    Returns:
      The config and the parameters.

    Raises:
      KvjaxError: one line on what is missing, of another shape, corrupt or not supported.
    """
    config = from_hf(read_json(folder / "config.json"))
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(file, "np"))
            except SafetensorError as error:
                raise KvjaxError(f"{file} is not a whole safetensors file: {brief(error)}") from None
            for name in handle.keys():  # noqa: SIM118
                if _unused(name, config):
                    continue
                if name in where:
                    raise KvjaxError(f"{file} has tensor {name}, which another file has too")
                if (kind := handle.get_slice(name).get_dtype()) not in KINDS:
                    raise KvjaxError(f"tensor {name} of {file} is {kind}; expected one of {', '.join(KINDS)}")
                where[name] = handle
        present = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in where.items()}
        return build_params(config, NAMES, present, lambda _, name: where[name].get_tensor(name), dtype, layers)


def _unused(name: str, config: ModelConfig) -> bool:
    """Whether the decoder does not need a tensor: old rotary tables, the head of a model with tied weights."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tied and name == NAMES.top["head"])
