"""Tensors of a file seen as the decoder has them: the experts of a layer joined, transposed, parted or dequantised.

A view has a shape and reads the part at an index, and no other bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Float32, UInt8

from kvjax.errors import KvjaxError
from kvjax.mesh import Index
from kvjax.models.params import Shape

EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d{1,9})\.(.*)")
PACKED = ("_blocks", "_scales")  # ends of the names of MXFP4's parts
MXFP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class View(Protocol):
    """A tensor that is read in parts."""

    @property
    def shape(self) -> Shape: ...

    def read(self, index: Index) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Tensors of one shape, with an axis more before the others."""

    parts: tuple[View, ...]

    @property
    def shape(self) -> Shape:
        return len(self.parts), *self.parts[0].shape

    def read(self, index: Index) -> np.ndarray:
        return np.stack([part.read(index[1:]) for part in self.parts[index[0]]])


@dataclasses.dataclass(frozen=True)
class Transposed:
    """The last two of three axes the other way round."""

    of: View

    @property
    def shape(self) -> Shape:
        experts, rows, columns = self.of.shape
        return experts, columns, rows

    def read(self, index: Index) -> np.ndarray:
        return self.of.read((index[0], index[2], index[1])).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class EveryOther:
    """Every second entry of the second axis, from `first` on."""

    of: View
    first: int

    @property
    def shape(self) -> Shape:
        experts, both, *rest = self.of.shape
        return experts, both // 2, *rest

    def read(self, index: Index) -> np.ndarray:
        start, stop, _ = index[1].indices(self.shape[1])
        return self.of.read((index[0], slice(2 * start, 2 * stop), *index[2:]))[:, self.first :: 2]


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Weights of 4 bits (OCP Microscaling, E2M1), 32 in a row with one power of two (E8M0) as their scale."""

    blocks: View  # [E, o, i / 32, 16], the lower half of each byte first
    scales: View  # [E, o, i / 32]

    @property
    def shape(self) -> Shape:
        experts, rows, groups = self.scales.shape
        return experts, rows, 32 * groups

    def read(self, index: Index) -> np.ndarray:
        rows = index[:2]
        all_of_it = slice(None)
        values = dequantize(self.blocks.read((*rows, all_of_it, all_of_it)), self.scales.read((*rows, all_of_it)))
        return values[:, :, index[2]]


def dequantize(
    blocks: UInt8[np.ndarray, "E o g 16"], scales: UInt8[np.ndarray, "E o g"]
) -> Float32[np.ndarray, "E o i"]:
    """The weights of MXFP4's bytes."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    values = np.ldexp(MXFP4_VALUES[codes], scales[..., None].astype(np.int32) - 127)
    return values.reshape(*scales.shape[:-1], -1)


def join_experts(tensors: Mapping[str, View], count: int) -> dict[str, View]:
    """Joins the experts of each layer, whether they are stored one by one (Qwen) or together (gpt-oss).

    Args:
      tensors: tensors by HF's names.
      count: experts of a layer.

    Returns:
      The tensors, those of experts as `mlp.experts.gate_proj.weight` and the like, [E, ...], weights as [E, out, in].

    Raises:
      KvjaxError: experts are missing, or they have different shapes.
    """
    found: dict[str, dict[int, View]] = {}
    others: dict[str, View] = {}
    for name, view in tensors.items():
        if match := EXPERT.fullmatch(name):
            found.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = view
        else:
            others[name] = view
    for name, parts in found.items():
        if parts.keys() != set(range(count)):
            numbers = f"{len(parts)} experts, up to number {max(parts)}"
            raise KvjaxError(f"tensor {name} is there for {numbers}; expected {count}, numbered from 0")
        if len(shapes := {part.shape for part in parts.values()}) > 1:
            raise KvjaxError(f"tensor {name} has shapes {sorted(shapes)} in its experts; expected one")
        others[name] = Stacked(tuple(parts[i] for i in range(count)))
    return _part_together(others)


def _part_together(tensors: Mapping[str, View]) -> dict[str, View]:
    """Parts gpt-oss's tensors of all experts: gate and up alternate, weights are transposed or in MXFP4."""
    parted: dict[str, View] = {}
    for name, view in _dequantized(tensors).items():
        layer, together, end = name.partition("mlp.experts.")
        if together and end in ("gate_up_proj", "gate_up_proj_bias"):
            kind = "bias" if end.endswith("bias") else "weight"
            for first, part in enumerate(("gate", "up")):
                parted[f"{layer}mlp.experts.{part}_proj.{kind}"] = EveryOther(view, first)
        elif together and end in ("down_proj", "down_proj_bias"):
            parted[f"{layer}mlp.experts.down_proj.{'bias' if end.endswith('bias') else 'weight'}"] = view
        else:
            parted[name.replace(".mlp.router.", ".mlp.gate.")] = view
    return parted


def _dequantized(tensors: Mapping[str, View]) -> dict[str, View]:
    """The same tensors, gpt-oss's weights as [E, out, in]."""
    found: dict[str, View] = {}
    for name, view in tensors.items():
        base = name.removesuffix("_blocks").removesuffix("_scales")
        if name.endswith(PACKED):
            parts = [tensors.get(f"{base}{end}") for end in PACKED]
            blocks, scales = parts
            if blocks is None or scales is None or blocks.shape != (*scales.shape, 16) or len(scales.shape) != 3:
                shapes = [part and part.shape for part in parts]
                raise KvjaxError(
                    f"tensor {base} has blocks and scales of shapes {shapes}; expected [E, o, g, 16], [E, o, g]"
                )
            found[base] = Mxfp4(blocks, scales)
        elif name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj")) and len(view.shape) == 3:
            found[name] = Transposed(view)
        else:
            found[name] = view
    return found
