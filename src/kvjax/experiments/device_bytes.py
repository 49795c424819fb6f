"""Tables of docs/scaling.md: what each device of a mesh holds, by the shapes and axes that allocate it."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from kvjax import mesh
from kvjax.caches.base import ModelSizes
from kvjax.caches.plan import CachePlan
from kvjax.experiments.shapes import part_nbytes
from kvjax.models import params
from kvjax.models.zoo import RANDOM

MODELS = ("llama-3.1-8b", "llama-3.1-70b")
PLANS = ("dense", "k8v4@kivi", "k4v4@token", "k4v2@kivi", "x4@latent", "xcl3@latent")
CONTEXTS = (8192, 32768, 131072)  # tokens of each sequence
BATCH = 8
DTYPE = jnp.bfloat16  # of parameters and of what caches keep exactly
MANY = ("data=1", "data=2,tensor=4", "tensor=8", "data=2,tensor=8", "tensor=16")  # meshes for BATCH sequences
ONE = ("data=1", "tensor=8", "seq=2,tensor=4", "seq=8")  # meshes for one sequence
WHOLE = {"tensor=16": ("kv_heads",)}  # what a mesh does not divide
WINDOWED = {  # shapes of models some of whose layers have a sliding window
    "gpt-oss-20b": ModelSizes(24, 64, 8, 64, 2880, windows=(128, None) * 12),
    "gemma-3-4b": ModelSizes(34, 8, 4, 256, 2560, windows=(((1024,) * 5 + (None,)) * 6)[:34]),
}
WINDOW_PLANS = ("dense", "k4v2@kivi", "sliding:dense;full:k4v2@kivi")
WINDOWS_HEADER = ("cache", "sliding layers", "full layers", "all", "of every layer whole")
AXES_HEADER = ("logical axis", "is divided by", "in parameters", "in caches")


def header(first: str, meshes: tuple[str, ...] = MANY) -> list[str]:
    """Names of columns: the meshes."""
    whole = {text: f"{text}, {' and '.join(names)} whole" for text, names in WHOLE.items()}
    return [first, *((whole | {"data=1": "one device"}).get(text, text) for text in meshes)]


def parameters() -> list[list[str]]:
    """Rows [model, gigabytes of parameters that a device of each mesh holds]."""
    return [[model, *(_parameters(model, text) for text in MANY)] for model in MODELS]


def caches() -> list[list[str]]:
    """Rows [cache of BATCH sequences, gigabytes of it that a device of each mesh holds]."""
    each = itertools.product(MODELS, CONTEXTS, PLANS)
    return [_cache(model, tokens, plan, BATCH, MANY) for model, tokens, plan in each]


def sequences() -> list[list[str]]:
    """Rows [cache of one sequence of the longest context, gigabytes of it that a device of each mesh holds]."""
    return [_cache(model, CONTEXTS[-1], plan, 1, ONE) for model, plan in itertools.product(MODELS, PLANS)]


def windows() -> list[list[str]]:
    """Rows [cache of one sequence, megabytes of its sliding and full layers, of all, over those without windows]."""
    return [_windows(*each) for each in itertools.product(WINDOWED, CONTEXTS[::2], WINDOW_PLANS)]


def _windows(model: str, tokens: int, name: str) -> list[str]:
    plan = CachePlan.parse(name, WINDOWED[model])
    whole = CachePlan.parse(str(plan), dataclasses.replace(plan.model, windows=()))
    kinds, total = plan.kind_nbytes(tokens, 1, DTYPE), plan.nbytes(tokens, 1, DTYPE)
    sizes = [f"{nbytes / 1e6:.1f}" for nbytes in (kinds["sliding"], kinds["full"], total)]
    return [f"{model}, {tokens // 1024}K, `{name}`", *sizes, f"{total / whole.nbytes(tokens, 1, DTYPE):.3f}"]


def axes() -> list[list[str]]:
    """Rows [logical axis, the mesh's axis, parameters that have it, caches that have it]."""
    stored = {plan: _cache_axes(plan) for plan in PLANS}
    lines = []
    for axis, by in mesh.RULES.items():
        weights = [f"`{name}`" for name, names in params.AXES.items() if axis in names]
        plans = [f"`{plan}`" for plan in PLANS if axis in stored[plan]]
        lines.append(
            [f"`{axis}`", f"`{by}`", ", ".join(weights), "all" if len(plans) == len(PLANS) else ", ".join(plans)]
        )
    return lines


def _parameters(model: str, text: str) -> str:
    nbytes = params.param_nbytes(RANDOM[f"random:{model}"], DTYPE, mesh.abstract(text), WHOLE.get(text, ()))
    return f"{nbytes / 1e9:.2f}"


def _cache(model: str, tokens: int, name: str, batch: int, meshes: tuple[str, ...]) -> list[str]:
    plan = CachePlan.parse(name, RANDOM[f"random:{model}"])
    sizes = []
    for text in meshes:
        sizes.append(part_nbytes(plan, batch, tokens, DTYPE, mesh.abstract(text), WHOLE.get(text, ())) / 1e9)
    return [f"{model}, {tokens // 1024}K, `{name}`", *(f"{size:.2f}" for size in sizes)]


def _cache_axes(name: str) -> set[str]:
    plan = CachePlan.parse(name, RANDOM[f"random:{MODELS[0]}"])
    names = jax.tree.leaves(plan.logical_axes(plan.shape(BATCH, CONTEXTS[0], DTYPE)), is_leaf=mesh.is_axes)
    return {axis for each in names for axis in each if axis}
