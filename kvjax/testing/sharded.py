"""Each name's caches on one device and sharded over four: run by the contract suite in a process of its own.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m kvjax.testing.sharded PLUGINS NAME ...

prints `equal` or what differs, a tab and the name, for each.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.caches.registry import load_plugins
from kvjax.testing.contract import bases_of, plan_of
from kvjax.testing.layers import BATCH, CONFIG, SHAPE, attend, make_chunk, quick_jit, same_trees, stack

WIDTH = 37


def check(text: str, mesh: Mesh) -> None:
    """Raises AssertionError where the sharded caches or their outputs differ."""
    plan = plan_of(text)
    layouts = plan.shardings(SHAPE, mesh)
    step = lambda cache, chunk, carry: cache.attend(chunk, carry)  # noqa: E731
    plain = [spec.init(SHAPE) for spec in plan.specs]
    sharded = [jax.device_put(cache, layout) for cache, layout in zip(plain, layouts, strict=True)]
    many = {
        spec: quick_jit(step, out_shardings=(None, lay, None)) for spec, lay in zip(plan.specs, layouts, strict=True)
    }
    at = np.zeros(BATCH, int)
    for lengths in ([37, 20, 0, 31], [36, 37, 33, 32]):
        carry = carry_sharded = plan.init_carry(SHAPE)
        for i, layer in enumerate(stack()[: len(plain)]):
            chunk = make_chunk(layer, bases_of(text)[i], at, np.array(lengths), WIDTH)
            heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
            by_heads: Any = {name: jax.device_put(getattr(chunk, name), heads) for name in "qkv"}
            spread = dataclasses.replace(chunk, **by_heads)
            output, plain[i], carry = attend(plain[i], chunk, carry)
            output_sharded, sharded[i], carry_sharded = many[plan.specs[i]](sharded[i], spread, carry_sharded)
            np.testing.assert_allclose(output_sharded, output, atol=1e-11)
            same_trees(sharded[i], plain[i], 1e-11)
        at += lengths
    leaves = [leaf for leaf in jax.tree.leaves(sharded) if leaf.size]
    shares = [leaf.size // np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    assert min(shares, default=4) >= 2, "a leaf is not spread over the batch"


def main(plugins: str, *names: str) -> None:
    """Checks every name."""
    jax.config.update("jax_enable_x64", True)
    load_plugins(plugins)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
    assert BATCH % 2 == 0 and CONFIG.kv_heads % 2 == 0
    for text in names:
        try:
            check(text, mesh)
        except AssertionError as error:
            print(" ".join(str(error).split())[:500], text, sep="\t")
        else:
            print("equal", text, sep="\t", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
