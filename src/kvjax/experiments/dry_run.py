"""What a run would take, before any weights are read: bytes of the model and of each cache, seconds of compiling."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax.numpy as jnp

from kvjax import mesh
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import read_config
from kvjax.errors import KvjaxError
from kvjax.experiments.shapes import lower_decode_loop, part_nbytes
from kvjax.models.config import ModelConfig
from kvjax.models.params import param_nbytes
from kvjax.tables import align_columns

HEADER = ("cache", "bits", "real", "cache MB", "beside it MB", "compiling s")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a program would run: names of plans, and the tokens that each sequence has room for."""

    caches: Sequence[str]
    tokens: int


def show(model_name: str, dtype: str, mesh_text: str, replicate: str, sizes: Sizes) -> None:
    """Prints the bytes of a model and of one sequence's caches, and compiles the decode step of each cache.

    With a mesh the bytes are those of each device, and nothing is compiled.

    Args:
      model_name: as for `kvjax.load`; of its files the config alone is read.
      dtype: of the weights, and of what caches keep exactly.
      mesh_text: as in data=2,tensor=4; one device where empty.
      replicate: logical axes that each device keeps whole.
      sizes: what would be run.

    Raises:
      KvjaxError: what `read_config`, `CachePlan.parse` and `kvjax.mesh` raise.
    """
    model, kept = read_config(model_name), tuple(filter(None, replicate.split(",")))
    plans = [CachePlan.parse(name, model) for name in sizes.caches]
    places = mesh.abstract(mesh_text or "data=1")
    held = param_nbytes(model, jnp.dtype(dtype), places, kept)
    print(f"{model_name} in {dtype}: {held / 1e6:,.0f} MB of parameters" + " on each device" * bool(mesh_text))
    print(f"one sequence of {sizes.tokens} tokens:")
    rows = [_bytes(plan, sizes.tokens, dtype, places, kept) for plan in plans]
    if not mesh_text:
        rows = [[*row, *_compile(model, plan, sizes.tokens, dtype)] for plan, row in zip(plans, rows, strict=True)]
    print(align_columns([HEADER[: 4 if mesh_text else None], *rows], left=1), "nothing was run", sep="\n")


def _bytes(plan: CachePlan, tokens: int, dtype: str, places: mesh.AbstractMesh, kept: tuple[str, ...]) -> list[str]:
    nbytes = part_nbytes(plan, 1, tokens, jnp.dtype(dtype), places, kept)
    bits = f"{plan.bits_nominal:.2f}", f"{plan.bits_real(tokens):.2f}"
    return [str(plan), *bits, f"{nbytes / 1e6:.2f}"]


def _compile(model: ModelConfig, plan: CachePlan, tokens: int, dtype: str) -> tuple[str, ...]:
    """Megabytes that a decode step holds beside the cache, and seconds of compiling it."""
    begun = time.perf_counter()
    try:
        memory = lower_decode_loop(model, plan, tokens, jnp.dtype(dtype)).compile().memory_analysis()
    except KvjaxError:  # a method that learns from a text: its bases' shapes are not known without weights
        return ("not compiled: learns from a text",)
    return f"{memory.temp_size_in_bytes / 1e6:.2f}", f"{time.perf_counter() - begun:.1f}"
