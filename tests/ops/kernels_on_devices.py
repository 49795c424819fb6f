"""Kernels on one device and on the four of two meshes: run by test_shards.py in a process of its own.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python tests/ops/kernels_on_devices.py

prints `equal` or what differs, a tab and the name, for each case.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kvjax import mesh as meshes
from kvjax.ops import attention, store
from kvjax.ops.dispatch import using
from kvjax.ops.reconstruct import reconstruct
from kvjax.ops.remat import Latents, Remat, attend_latents
from kvjax.ops.shards import by_tokens, first_token
from kvjax.testing.layers import QUICK

B, K, H, D, S, M = 2, 2, 4, 32, 64, 64  # sequences, kv heads, heads, channels of a head, tokens, channels of a latent
STARTS = jnp.array([40, 17])
MESHES = ("data=2,tensor=2", "seq=2,tensor=2")
BATCH, HEADS, WHOLE = PartitionSpec("batch"), PartitionSpec("batch", None, "kv_heads"), PartitionSpec()
TOKEN, CHANNEL = store.Format(4, "token", D, 32), store.Format(2, "channel", 32, 32)


def random(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def history(format: Any, heads: int, width: int) -> Any:
    """Random tokens, all packed."""
    empty = store.init(format, B, heads, S, width, jnp.float32)
    blocks = random(B, S // 32, 32, heads, width)
    index = jnp.broadcast_to(jnp.arange(S // 32), (B, S // 32))
    return store.write_blocks(empty, blocks, jnp.ones(blocks.shape[:3], bool), index)


def packed_attention(kv_heads: int, keys: Any) -> tuple[Callable, list[Any], list[Any]]:
    def op(q, keys, values, positions):
        return attention.attend_packed(q, attention.Span(positions, 3, positions[:, 0] + 1, 30), keys, values)

    stored = [history(keys, kv_heads, D), history(TOKEN, kv_heads, D)]
    split = "kv_heads" if kv_heads % 2 == 0 else None
    axes = [PartitionSpec("batch", None, split), *(store.logical_axes(each, split) for each in stored), BATCH]
    return op, [random(B, 1, 2 * kv_heads, D), *stored, STARTS[:, None]], axes


def remat_attention(groups: int) -> tuple[Callable, list[Any], list[Any]]:
    def op(q, keys, values, weights, bias, positions):
        span = attention.Span(positions, 0, positions[:, 0] + 1, None)
        up = weights.reshape(groups, M, K // groups, D)
        remat = Remat(up, up, bias, bias, jnp.ones(D))
        return attend_latents(q, span, Latents((keys, values)), remat, (random(S, D), random(S, D + 1)[:, 1:]))

    stored = [history(CHANNEL, groups, M), history(TOKEN, groups, M)]
    own, shared = ("kv_heads", None) if groups == K else (None, "kv_heads")
    weights = random(groups, M, K * D // groups)
    axes = [HEADS, *(store.logical_axes(each, own) for each in stored), PartitionSpec(own, None, shared)]
    args = [random(B, 1, H, D), *stored, weights, random(K, D), STARTS[:, None]]
    return op, args, [*axes, PartitionSpec("kv_heads"), BATCH]


def reconstruction() -> tuple[Callable, list[Any], list[Any]]:
    def op(acc, stored, basis, stop):
        return reconstruct(acc, stored, basis.T, True, stop)

    stored = history(TOKEN, 1, M)
    axes = [PartitionSpec("batch", "tokens"), store.logical_axes(stored, None), WHOLE, BATCH]
    return op, [random(B, S, 2 * M), stored, random(2 * M, M), STARTS], axes


def quantize_pack() -> tuple[Callable, list[Any], list[Any]]:
    def write(stored, blocks, index):
        index = index - first_token(stored.tokens) // 32
        return store.write_blocks(stored, blocks, jnp.ones(blocks.shape[:3], bool), index)

    def op(stored, blocks, index):
        return by_tokens(write, (stored, blocks, index), tuple(axes), axes[0])

    stored = history(CHANNEL, K, D)
    axes = [store.logical_axes(stored, "kv_heads"), PartitionSpec("batch", None, None, "kv_heads"), BATCH]
    return op, [stored, 3 * random(B, 1, 32, K, D), jnp.array([[1], [0]])], axes


PAIRS = ("triton", "mosaic_tpu")
CASES: dict[str, tuple[str, tuple[str, ...], Callable]] = {
    "per token": ("packed_attention", ("native", *PAIRS), functools.partial(packed_attention, K, TOKEN)),
    "per channel": ("packed_attention", ("native",), functools.partial(packed_attention, K, CHANNEL)),
    "three kv heads": ("packed_attention", ("native",), functools.partial(packed_attention, 3, TOKEN)),
    "shared latents": ("remat_attention", ("native", "mosaic_tpu"), functools.partial(remat_attention, 1)),
    "latents per head": ("remat_attention", ("native", *PAIRS), functools.partial(remat_attention, K)),
    "reconstruction": ("remat_attention", ("native", *PAIRS), reconstruction),
    "blocks": ("quantize_pack", ("native", *PAIRS), quantize_pack),
}
NAMES = [f"{case}, {name}" for case, (_, names, _) in CASES.items() for name in names]


def check(text: str, mesh: jax.sharding.Mesh) -> None:
    """Raises AssertionError where the devices of a mesh compute something else than one, or exchange arrays."""
    case, _, name = text.rpartition(", ")
    which, _, make = CASES[case]
    op, args, axes = make()
    # Native is the default here; the others are named alone, so that nothing else can run.
    with using() if name == "native" else using(**{which: name}, interpret=True):
        one = jax.jit(op, compiler_options=QUICK).lower(*args).compile()
        layouts = meshes.Layout(mesh).shardings(axes, args)
        spread = jax.device_put(args, layouts)
        with jax.set_mesh(mesh):
            many = jax.jit(op, compiler_options=QUICK).lower(*spread).compile()
    wanted, found = one(*args), many(*spread)
    assert name != "native" or all("pallas_kernels_" in each.as_text() for each in (one, many))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-5)
    exchanged = {*re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", many.as_text())}
    # One bit: whether any block is complete. Over tokens: outputs and log-sum-exps of parts.
    parts = mesh.shape["seq"] > 1 and "attention" in which and case != "reconstruction"
    allowed = {"all-reduce"} if parts or (case == "blocks" and mesh.shape["seq"] == 1) else set()
    assert exchanged <= allowed, exchanged


def main() -> None:
    for text in sys.argv[1:] or NAMES:
        try:
            for mesh in MESHES:
                check(text, meshes.parse(mesh))
        except AssertionError as error:
            print(" ".join(str(error).split())[:500], text, sep="\t", flush=True)
        else:
            print("equal", text, sep="\t", flush=True)


if __name__ == "__main__":
    main()
