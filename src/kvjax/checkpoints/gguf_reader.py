"""Reader of the GGUF container: metadata and tensors.

Every size in the file is checked against the file's length before it is used.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType
from jaxtyping import UInt8

from kvjax.mesh import Index

VERSIONS = (2, 3)
MAX_DIMS = 4
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in its stored form."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first
    rows: UInt8[np.ndarray, "..."]  # a map of the file; the last axis is the bytes of a row

    def part(self, index: Index) -> tuple[UInt8[np.ndarray, "..."], slice]:
        """The stored bytes that hold the elements at an index, whole blocks of them, and where those are in there."""
        block, width = GGML_QUANT_SIZES[self.kind]
        start, stop, _ = index[-1].indices(self.shape[-1])
        first, last = start // block, -(-stop // block)
        within = slice(start - first * block, stop - first * block)
        return self.rows[*index[:-1], first * width : last * width], within


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a GGUF file.

    Args:
      file: the file.

    Returns:
      Metadata and tensors, by name. Arrays of strings are lists, other arrays numpy arrays.

    Raises:
      ValueError: the file is damaged or not a GGUF file; the message says where.
      OSError: the file cannot be opened.
    """
    if not file.stat().st_size:
        raise ValueError("it is empty")
    header = _Header(np.asarray(np.memmap(file, mode="r")))
    if header.u32() != GGUF_MAGIC:
        raise ValueError("its magic is not GGUF's")
    if (version := header.u32()) not in VERSIONS:
        raise ValueError(f"its version is {version}; expected 2 or 3, little-endian")
    tensors, fields = header.u64(), header.u64()
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        key = header.string()
        if key in metadata:
            raise ValueError(f"metadata {key} is there twice")
        metadata[key] = header.value()
    infos = [header.tensor_info() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}; expected a power of two")
    return metadata, _tensors(header.data, -(-header.at // alignment) * alignment, infos)


def _tensors(data: np.ndarray, start: int, infos: list[tuple[str, list[int], int, int]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, dims, number, offset in infos:
        if name in found:
            raise ValueError(f"tensor {name} is there twice")
        kind = GGMLQuantizationType(number)
        block, width = GGML_QUANT_SIZES[kind]
        if not 1 <= len(dims) <= MAX_DIMS or min(dims) < 1 or dims[0] % block:
            raise ValueError(
                f"tensor {name} has dims {dims}; expected up to {MAX_DIMS}, rows of whole {kind.name} blocks"
            )
        row = dims[0] // block * width
        size = row * math.prod(dims[1:])
        if start + offset + size > data.size:
            raise ValueError(f"tensor {name} ends at byte {start + offset + size}; the file has {data.size}")
        rows = data[start + offset :][:size].reshape(*dims[:0:-1], row)
        found[name] = Tensor(kind, tuple(reversed(dims)), rows)
    if sum(tensor.rows.size for tensor in found.values()) > data.size:
        raise ValueError("its tensors overlap")
    return found


class _Header:
    """A reader of the header, from front to back."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0
        self._view = memoryview(data)

    def _take(self, size: int) -> memoryview:
        if size > len(self._view) - self.at:
            raise ValueError(f"{size} bytes are wanted at byte {self.at}; the file has {len(self._view)}")
        self.at += size
        return self._view[self.at - size : self.at]

    def u32(self) -> int:
        return struct.unpack("<I", self._take(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self._take(8))[0]

    def string(self) -> str:
        return str(self._take(self.u64()), "utf-8")

    def _array(self, kind: GGUFValueType, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"there is an array of {kind.name}, which is not supported")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def value(self) -> Any:
        kind = GGUFValueType(self.u32())
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            inner, count = GGUFValueType(self.u32()), self.u64()
            return (
                [self.string() for _ in range(count)] if inner == GGUFValueType.STRING else self._array(inner, count)
            )
        scalar = self._array(kind, 1)[0]
        # The shortest decimals of the stored float32: 1e-05, not 9.99e-06.
        return float(str(scalar)) if kind == GGUFValueType.FLOAT32 else scalar.item()

    def tensor_info(self) -> tuple[str, list[int], int, int]:
        """Name, dims (innermost first), kind and offset."""
        name, count = self.string(), self.u32()
        return name, self._array(GGUFValueType.UINT64, count).tolist(), self.u32(), self.u64()
