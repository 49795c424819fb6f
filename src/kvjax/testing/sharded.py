"""Each name's caches on one device and sharded over four, whole sequences or parts of them.

The contract suite runs it in a process of its own:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m kvjax.testing.sharded [--windows] PLUGINS NAME ...

prints `equal` or what differs, a tab and the name, for each. With --windows the layers have sliding windows.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.caches.base import CacheSpec, Chunk
from kvjax.caches.heads import PerHead
from kvjax.caches.registry import load_plugins
from kvjax.mesh import Layout, parse
from kvjax.testing.contract import WINDOW, bases_of, plan_of
from kvjax.testing.layers import BATCH, CONFIG, SHAPE, attend, make_chunk, quick_jit, same_trees, stack

WIDTH = 37
MESHES = "data=2,tensor=2", "seq=2,tensor=2"
WINDOWS = "--windows"
FIRST, SECOND = np.array([37, 20, 0, 31]), np.array([36, 37, 33, 32])  # tokens of two chunks of ragged sequences
AXES = {  # of what a chunk holds, whole on every device where not named
    **dict.fromkeys(("h", "x", "positions", "lengths", "rotation"), PartitionSpec("data")),
    **dict.fromkeys("qkv", PartitionSpec("data", None, "tensor")),
}
CARRY = ("data", "seq")
EXCHANGE = re.compile(r"= (.*) (all-gather|all-to-all|collective-permute)(?:-start)?\(")


class Feeder:
    """Feeds the layers of a plan on a mesh.

    Attributes:
      caches: one per layer.
    """

    def __init__(self, text: str, mesh: Mesh, window: int | None) -> None:
        self.text, self.mesh, self.plan = text, mesh, plan_of(text)
        self.shape = dataclasses.replace(SHAPE, parts=mesh.shape["seq"], window=window)
        self.layouts = [self._layout(spec) for spec in self.plan.specs]
        empty = (spec.init(self.shape) for spec in self.plan.specs)
        self.caches = [jax.device_put(cache, layout) for cache, layout in zip(empty, self.layouts, strict=True)]
        self.programs: dict[tuple[Any, ...], Any] = {}

    def _layout(self, spec: CacheSpec) -> Any:
        """Where the arrays of a layer's cache live."""
        arrays = jax.eval_shape(lambda: spec.init(self.shape))
        return Layout(self.mesh).shardings(spec.logical_axes(self.shape), arrays)

    def chunk(self, i: int, at: np.ndarray, lengths: np.ndarray, width: int, read: str = "exact") -> Chunk:
        """The chunk of layer `i`."""
        window = self.shape.window
        return make_chunk(stack()[i], bases_of(self.text)[i], at, lengths, width, window, read)

    def carry(self) -> Any:
        """What the first layer is given."""
        return jax.device_put(self.plan.init_carry(self.shape), self._over(*CARRY))

    def program(self, i: int, chunk: Chunk, carry: Any) -> Any:
        """The compiled step of layer `i`; layers with the same spec share it."""
        key = self.plan.specs[i], chunk.q.shape, chunk.read
        if key not in self.programs:
            heads = NamedSharding(self.mesh, AXES["q"])
            step = quick_jit(
                lambda cache, chunk, carry: cache.attend(chunk, carry),
                out_shardings=(heads, self.layouts[i], self._over(*CARRY)),
            )
            with jax.set_mesh(self.mesh):
                self.programs[key] = step.lower(self.caches[i], self.spread(chunk), carry).compile()
        return self.programs[key]

    def feed(self, i: int, chunk: Chunk, carry: Any) -> tuple[Any, Any]:
        """The output of layer `i`, and the carry for the next."""
        program = self.program(i, chunk, carry)
        output, self.caches[i], carry = program(self.caches[i], self.spread(chunk), carry)
        return output, carry

    def spread(self, chunk: Chunk) -> Chunk:
        """The chunk on the mesh: sequences over data; heads, and weights by their heads, over tensor."""
        weights = chunk.weights
        by_head = {name: getattr(weights, name) for name in ("k", "v", "k_bias", "v_bias")}
        weights = jax.device_put(weights, self._over())
        weights = dataclasses.replace(weights, **jax.device_put(by_head, self._over("tensor")))
        each = {
            field.name: jax.device_put(getattr(chunk, field.name), self._over(*AXES.get(field.name, ())))
            for field in dataclasses.fields(chunk)
            if field.metadata.get("pytree_node", True) and field.name != "weights"
        }
        return dataclasses.replace(chunk, weights=weights, **each)

    def _over(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def check(text: str, mesh: Mesh, window: int | None) -> None:
    """Raises AssertionError where the sharded caches or their outputs differ, or devices exchange what they hold."""
    many = Feeder(text, mesh, window)
    plain = [spec.init(many.shape) for spec in many.plan.specs]
    at = np.zeros(BATCH, int)
    for lengths in (FIRST, SECOND):
        carry, carry_sharded = many.plan.init_carry(many.shape), many.carry()
        for i in range(len(plain)):
            chunk = many.chunk(i, at, lengths, WIDTH)
            output, plain[i], carry = attend(plain[i], chunk, carry)
            output_sharded, carry_sharded = many.feed(i, chunk, carry_sharded)
            np.testing.assert_allclose(output_sharded, output, atol=1e-11)
            same_trees(many.caches[i], plain[i], 1e-11)
        at += lengths
    leaves = [leaf for leaf in jax.tree.leaves(many.caches) if leaf.size]
    shares = [leaf.size // np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    assert min(shares, default=4) >= mesh.shape["data"], "a leaf is not spread over the batch"
    check_exchanges(many)


def check_exchanges(many: Feeder) -> None:
    """Raises AssertionError where devices exchange arrays in a prefill, a decode step or a pass over a window.

    Numbers (of tokens, of tiles) are reduced over devices, never gathered. A method that names no axis but the batch
    has its rows whole on every device, which takes an exchange, as have pairs of widths for each kv head.
    """
    top = len(many.plan.specs) - 1
    for width, read in ((1, "exact"), (WIDTH, "stored")):
        if read == "exact" or many.plan.specs[top].whole_windows:
            chunk = many.chunk(top, FIRST, np.minimum(width, SECOND), width, read)
            many.program(top, chunk, many.carry())
    for (spec, (_, width, *_), read), program in many.programs.items():
        if type(spec).logical_axes is not CacheSpec.logical_axes and not isinstance(spec, PerHead):
            found = EXCHANGE.search(program.as_text())
            assert not found, f"{found and found[2]} of {found and found[1]} in a step of {width} tokens, {read}"


def main(*arguments: str) -> None:
    """Checks every name."""
    window = WINDOW if WINDOWS in arguments else None
    plugins, *names = (argument for argument in arguments if argument != WINDOWS)
    jax.config.update("jax_enable_x64", True)
    load_plugins(plugins)
    meshes = [parse(mesh) for mesh in MESHES]
    assert BATCH % 2 == 0 and CONFIG.kv_heads % 2 == 0
    for text in names:
        try:
            for mesh in meshes:
                check(text, mesh, window)
        except AssertionError as error:
            print(" ".join(str(error).split())[:500], text, sep="\t")
        else:
            print("equal", text, sep="\t", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
