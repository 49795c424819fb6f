"""The fastest measured settings of kernels, by device and class of shapes.

They are in tuning/DEVICE_KIND.json, a list of entries

    {"op": "packed_attention", "class": {"key_bits": 4, ...}, "settings": {"block": 128, ...}, "us": 93.1}

written by `kvjax tune_kernels`. Where there is no entry, kernels use heuristics.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.layout import Packed

FOLDER = Path(__file__).parent / "tuning"


def file_of(device_kind: str) -> Path:
    """Returns the file with the settings for a device.

    Args:
      device_kind: the kind of device, as JAX names it.
    """
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json")


def lookup(op: str, shape: Mapping[str, Any]) -> dict[str, int]:
    """Looks up the settings for the device that JAX uses by default.

    Args:
      op: name of the op.
      shape: the class of shapes, see `attention_class`.

    Returns:
      The settings by name; empty where none were measured.
    """
    return dict(_table(file_of(jax.devices()[0].device_kind)).get((op, _key(shape)), {}))


def attention_class(q_shape: tuple[int, ...], keys: Packed, values: Packed) -> dict[str, Any]:
    """Describes the class of shapes on which settings of packed attention depend.

    Args:
      q_shape: B, T, H, D of the queries.
      keys: packed keys.
      values: packed values.

    Returns:
      The class; sizes that vary from call to call are rounded up to powers of two.
    """
    batch, tokens, heads, head_dim = q_shape
    kv_heads = keys.shape[1]
    return {
        **{"key_bits": keys.bits, "key_per": keys.per, "key_group": keys.group},
        **{"value_bits": values.bits, "value_per": values.per, "value_group": values.group},
        **{"pack": keys.pack, "head_dim": head_dim, "rows": _round(tokens * heads // kv_heads)},
        **{"programs": _round(batch * kv_heads), "tokens": _round(keys.shape[2])},
    }


def _round(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _key(shape: Mapping[str, Any]) -> str:
    return json.dumps(shape, sort_keys=True)


@functools.cache
def _table(file: Path) -> dict[tuple[str, str], dict[str, int]]:
    entries = json.loads(file.read_text()) if file.exists() else []
    return {(entry["op"], _key(entry["class"])): entry["settings"] for entry in entries}
