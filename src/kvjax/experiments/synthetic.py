"""Checkpoints of random weights in HF's layout, as each family's files are: fused, expert by expert, packed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from kvjax.checkpoints.safetensors import INDEX, names_of
from kvjax.files import read_json, write_json
from kvjax.models.config import ModelConfig
from kvjax.models.hf_config import from_hf
from kvjax.models.params import Shape, param_shapes

MXFP4_GROUP = 32  # weights that share a scale
SCALE = 120  # of MXFP4: 2^(120 - 127)


def make_checkpoint(folder: Path, config: Mapping[str, Any], count: int) -> list[Path]:
    """Writes a checkpoint of random weights, bfloat16 or MXFP4, unless it is there.

    Args:
      folder: where it is written.
      config: its config.json.
      count: safetensors files, of about as many bytes each.

    Returns:
      The files.
    """
    files = [folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if (folder / "config.json").is_file() and read_json(folder / "config.json") == config and files[-1].is_file():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # it comes last, and says that all is there
    where: dict[str, str] = {}
    for file, shapes in zip(files, _share_out(stored_shapes(from_hf(config)), count), strict=True):
        save_file(dict(_draw(shapes)), file)
        where |= dict.fromkeys(shapes, file.name)
    write_json(folder / INDEX, {"weight_map": where})
    words = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", dict(config))
    return files


def stored_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The tensors of a family's files, by HF's names."""
    names = names_of(model)
    shapes = {names.of(path): shape for path, shape in param_shapes(model).items()}
    layout = {"phi3": _fused, "qwen3_moe": _expert_by_expert, "gpt_oss": _packed}.get(model.family, dict)
    return layout(shapes)


def _fused(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Phi-3's: q, k and v in one tensor, gate and up in one."""
    parts = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    parts |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        part = name.split(".")[-2]
        whole = name.replace(part, parts.get(part, part))
        rows = found[whole][0] if whole in found else 0
        found[whole] = (rows + shape[0], *shape[1:])
    return found


def _expert_by_expert(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Qwen3-MoE's: a tensor for each expert."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        each = [name.replace(".experts.", f".experts.{i}.") for i in range(shape[0])] if ".experts." in name else []
        found |= dict.fromkeys(each, shape[1:]) if each else {name: shape}
    return found


def _packed(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """gpt-oss's: all experts of a layer in one tensor, gate and up alternating, in MXFP4."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        layer, of_experts, rest = name.partition("mlp.experts.")
        if not of_experts:
            found[name.replace("mlp.gate.", "mlp.router.")] = shape
            continue
        part, kind = rest.split(".")
        if part == "up_proj":
            continue  # with the gate
        experts, rows, *columns = shape
        if part == "gate_proj":
            part, rows = "gate_up_proj", 2 * rows
        stem = f"{layer}{of_experts}{part}"
        if kind == "bias":
            found[f"{stem}_bias"] = (experts, rows)
        else:
            groups = columns[0] // MXFP4_GROUP
            found[f"{stem}_blocks"] = (experts, rows, groups, MXFP4_GROUP // 2)
            found[f"{stem}_scales"] = (experts, rows, groups)
    return found


def _share_out(shapes: Mapping[str, Shape], count: int) -> list[dict[str, Shape]]:
    """The tensors of each file: in order, as HF cuts them, and about as many bytes in each."""
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    parts: list[dict[str, Shape]] = [{} for _ in range(count)]
    for (name, shape), end in zip(shapes.items(), ends, strict=True):
        parts[(end - 1) * count // ends[-1]][name] = shape
    return parts


def _draw(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name.endswith("_blocks"):
            yield name, rng.integers(0, 256, shape, np.uint8)
        elif name.endswith("_scales"):
            yield name, np.full(shape, SCALE, np.uint8)
        else:
            weight = np.ones(shape) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)
            yield name, weight.astype(jnp.bfloat16)
