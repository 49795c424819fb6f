"""Checkpoints in Hugging Face's layout: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from kvjax.checkpoints.names import canonical, check_forms
from kvjax.checkpoints.views import PACKED, join_experts
from kvjax.errors import KvjaxError
from kvjax.files import brief, read_json
from kvjax.mesh import ONE_DEVICE, Index, Layout
from kvjax.models.config import ModelConfig
from kvjax.models.hf_config import from_hf
from kvjax.models.params import Names, ParamPath, Params, Shape, build_params

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
        "o_bias": "self_attn.o_proj.bias",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
        "gate_bias": "mlp.gate_proj.bias",
        "up_bias": "mlp.up_proj.bias",
        "down_bias": "mlp.down_proj.bias",
        "sinks": "self_attn.sinks",
        "router": "mlp.gate.weight",
        "router_bias": "mlp.gate.bias",
        "expert_gate_bias": "mlp.experts.gate_proj.bias",
        "expert_up_bias": "mlp.experts.up_proj.bias",
        "expert_down_bias": "mlp.experts.down_proj.bias",
        "expert_gate": "mlp.experts.gate_proj.weight",
        "expert_up": "mlp.experts.up_proj.weight",
        "expert_down": "mlp.experts.down_proj.weight",
    },
)
POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}
INDEX = "model.safetensors.index.json"
KINDS = ("F32", "BF16", "F16", "F64")
ROWS = 4096  # of two weights that are compared
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth")


def names_of(config: ModelConfig) -> Names:
    """HF's names of a decoder's parameters."""
    return dataclasses.replace(NAMES, layer={**NAMES.layer, **POST_NORMS}) if config.post_norm else NAMES


def as_decoder(config: ModelConfig, path: ParamPath, values: np.ndarray) -> np.ndarray:
    """A tensor's values as the decoder has them, from those of HF.

    Gemma's norms scale by 1 + w. Where RoPE turns only the first channels of a head, the pairs that it turns lie
    together; the decoder has the two halves of all pairs apart.
    """
    if config.family == "gemma3_text" and path[-1].endswith("norm"):
        return 1 + values.astype(np.float32)
    turned = config.rope.channels
    if turned is None or path[-1] not in ("q", "k", "q_bias", "k_bias"):
        return values
    first, last = np.split(np.arange(turned), 2), np.split(np.arange(turned, config.head_dim), 2)
    heads = values.reshape(-1, config.head_dim, *values.shape[1:])
    return heads[:, np.concatenate([first[0], last[0], first[1], last[1]])].reshape(values.shape)


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


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor is: a file, its name there, and its rows of that tensor."""

    handle: Any
    name: str
    shape: Shape
    start: int = 0

    def read(self, index: Index) -> np.ndarray:
        """Reads the part at an index, and no other bytes."""
        first, last, _ = index[0].indices(self.shape[0])
        return self.handle.get_slice(self.name)[self.start + first : self.start + last, *index[1:]]

    def split(self, sizes: Mapping[str, int]) -> dict[str, Stored]:
        """The parts of a fused tensor, by name, from the rows that each has."""
        if self.shape[:1] != (sum(sizes.values()),):
            expected = " + ".join(map(str, sizes.values()))
            raise KvjaxError(f"tensor {self.name} has shape {self.shape}; expected {expected} rows")
        starts = itertools.accumulate(sizes.values(), initial=0)
        return {
            name: dataclasses.replace(self, shape=(rows, *self.shape[1:]), start=start)
            for (name, rows), start in zip(sizes.items(), starts, strict=False)
        }


def read_hf_config(folder: Path) -> ModelConfig:
    """Reads the config of a HF folder.

    Args:
      folder: the folder.

    Returns:
      The config.

    Raises:
      KvjaxError: there is none, or `from_hf` refuses it.
    """
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise KvjaxError(f"{folder} holds an adapter ({ADAPTER}); expected the whole model, with the adapter merged")
    return from_hf(read_json(folder / "config.json"))


def load_hf(
    folder: Path,
    dtype: DTypeLike,
    layers: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[ModelConfig, Params]:
    """Reads the config and the parameters of a HF folder.

    Args:
      folder: the folder.
      dtype: dtype of the parameters.
      layers: how many layers to keep, from the first; all where None.
      layout: where the parameters live.

    Returns:
      The config and the parameters.

    Raises:
      KvjaxError: one line on what is missing, of another shape, corrupt or not supported.
    """
    config = read_hf_config(folder)
    with contextlib.ExitStack() as stack:
        found = _find(weight_files(folder), stack)
        check_forms(found)
        config, plain = _own_head(config, _split_fused(config, _by_canonical_name(found)))
        tensors = join_experts(plain, config.experts)
        present = {name: stored.shape for name, stored in tensors.items()}

        def read(path: ParamPath, name: str, index: Index) -> np.ndarray:
            return as_decoder(config, path, tensors[name].read(index))

        return build_params(config, names_of(config), present, read, dtype, layers, layout)


def _find(files: list[Path], stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Every tensor of the files, by its name there. The files stay open as long as the stack."""
    found: dict[str, Stored] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, "np"))
        except SafetensorError as error:
            raise KvjaxError(f"{file} is not a whole safetensors file: {brief(error)}") from None
        for name in handle.keys():  # noqa: SIM118
            if name in found:
                raise KvjaxError(f"{file} has tensor {name}, which another file has too")
            found[name] = Stored(handle, name, tuple(handle.get_slice(name).get_shape()))
    return found


def _by_canonical_name(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors by HF's names, without old rotary tables."""
    tensors: dict[str, Stored] = {}
    for name, stored in found.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if (own := canonical(name)) in tensors:
            raise KvjaxError(f"tensors {tensors[own].name} and {name} are both {own}; expected one")
        kinds = ("U8",) if name.endswith(PACKED) else KINDS
        if (kind := stored.handle.get_slice(name).get_dtype()) not in kinds:
            raise KvjaxError(f"tensor {name} is {kind}; expected one of {', '.join(kinds)}")
        tensors[own] = stored
    return tensors


def _split_fused(config: ModelConfig, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Splits `qkv_proj` into q, k, v and `gate_up_proj` into gate, up, by rows, as Phi-3 stores them."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    fused = {
        "self_attn.qkv_proj.": {"self_attn.q_proj.": q, "self_attn.k_proj.": kv, "self_attn.v_proj.": kv},
        "mlp.gate_up_proj.": {"mlp.gate_proj.": config.mlp_dim, "mlp.up_proj.": config.mlp_dim},
    }
    split: dict[str, Stored] = {}
    for name, stored in tensors.items():
        whole = next((part for part in fused if name.startswith("model.") and part in name), None)
        parts = {name: stored}
        if whole:
            parts = stored.split({name.replace(whole, part): rows for part, rows in fused[whole].items()})
        for part in parts.keys() & (split.keys() | (tensors.keys() if whole else ())):
            raise KvjaxError(f"tensor {part} is there twice: on its own and in a fused tensor")
        split |= parts
    return split


def _own_head(config: ModelConfig, tensors: dict[str, Stored]) -> tuple[ModelConfig, dict[str, Stored]]:
    """A head beside tied weights is, as in transformers, a copy, the embedding itself, or a head of its own."""
    embed, head = NAMES.top["embed"], NAMES.top["head"]
    if not config.tied or head not in tensors:
        return config, tensors
    others = {name: stored for name, stored in tensors.items() if name != head}
    if embed not in tensors:
        return config, others | {embed: tensors[head]}
    shaped = tensors[embed].shape == tensors[head].shape == (config.vocab_size, config.model_dim)
    if shaped and all(np.array_equal(tensors[embed].read(i), tensors[head].read(i)) for i in _rows(config)):
        return config, others
    return dataclasses.replace(config, tied=False), tensors


def _rows(config: ModelConfig) -> Iterator[Index]:
    """The vocabulary, ROWS words at a time."""
    return ((slice(i, i + ROWS), slice(None)) for i in range(0, config.vocab_size, ROWS))
