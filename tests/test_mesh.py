"""Meshes from text, and what eight_devices.py says of a tiny model on eight devices."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.mesh import Layout, abstract, parse, sharding
from kvjax.models.params import param_nbytes, param_shapes
from kvjax.models.zoo import RANDOM
from kvjax.testing.layers import QUICK

# Eight devices, and programs that compile far sooner.
OPTIONS = {"xla_force_host_platform_device_count": 8, **QUICK}
FLAGS = " ".join(f"--{name}={value}".lower() for name, value in OPTIONS.items())
USUAL = (
    *("data=2,tensor=4", "data=2,seq=2,tensor=2", "bytes of parameters", "bytes of caches", "safetensors", "gguf"),
    *("orbax", "states", "what does not divide", "counted bytes", "exchanges", "the mesh in context"),
)


def run(which: str, folder: Path) -> dict[str, str]:
    """What each check says, in a process with eight devices; its errors under ""."""
    env = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.eight_devices", str(folder), which]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    lines = dict(line.split("\t", 1)[::-1] for line in done.stdout.splitlines() if "\t" in line)
    return {**lines, "": done.stderr[-3000:]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run("usual", tmp_path_factory.mktemp("eight"))


@pytest.mark.parametrize("name", USUAL)
def test_on_eight_devices(name: str, found: dict[str, str]) -> None:
    assert found.get(name) == "equal", found.get(name, "no answer") + "\n" + found[""]


@pytest.mark.weekly
def test_every_method_on_every_mesh(tmp_path: Path) -> None:
    found = run("weekly", tmp_path)
    errors = found.pop("")
    assert len(found) == 21 and set(found.values()) == {"equal"}, f"{found}\n{errors}"


def test_a_mesh_of_one_line() -> None:
    mesh = parse(" data=1, tensor=1")
    assert dict(mesh.shape) == {"data": 1, "seq": 1, "tensor": 1}
    assert sharding(mesh, PartitionSpec("batch", None, "kv_heads"), (3, 5, 7)).spec == PartitionSpec(None, None, None)
    assert mesh.devices.ravel().tolist() == jax.devices()[:1]


def test_bytes_are_counted_without_devices() -> None:
    config = RANDOM["random:llama-3.1-70b"]
    plan = CachePlan.parse("k4v2@kivi", config)
    whole = plan.nbytes(8192, 8, jnp.bfloat16)
    shape = plan.shape(8, 8192, jnp.bfloat16)
    assert plan.part_nbytes(shape, abstract("data=1")) == whole
    assert plan.part_nbytes(shape, abstract("data=8,tensor=8")) == pytest.approx(whole / 64, rel=1e-3)
    assert plan.part_nbytes(shape, abstract("data=2,tensor=16"), ("kv_heads",)) == pytest.approx(whole / 2, rel=1e-3)
    with pytest.raises(KvjaxError, match="kv_heads 8 does not divide over tensor=16"):
        plan.part_nbytes(shape, abstract("tensor=16"))
    count = sum(math.prod(shape) for shape in param_shapes(config).values())
    assert param_nbytes(config, jnp.bfloat16, abstract("data=4")) == 2 * count
    with pytest.raises(KvjaxError, match="kv_heads 8 does not divide over tensor=16"):
        param_nbytes(config, jnp.bfloat16, abstract("tensor=16"))


@pytest.mark.parametrize("text", ["data", "data=0", "rows=2", "data=2,data=2", "data=2;tensor=2", "data=-1"])
def test_what_is_no_mesh(text: str) -> None:
    with pytest.raises(KvjaxError, match="expected sizes of data, seq, tensor, as in data=2,tensor=4"):
        parse(text)


def test_what_is_no_layout() -> None:
    assert Layout.of("", "kv_heads, mlp") == Layout.of(None, ["kv_heads", "mlp"])
    with pytest.raises(KvjaxError, match="replicate=q; expected some of batch, heads"):
        Layout.of(None, "q")
    for odd in (3, None, [3]):
        with pytest.raises(KvjaxError, match=r"replicate=.*; expected a text or a list of batch, tokens"):
            Layout.of(None, odd)  # type: ignore[arg-type]
    with pytest.raises(KvjaxError, match="the mesh is of type int"):
        Layout.of(4)  # type: ignore[arg-type]
    with pytest.raises(KvjaxError, match="the mesh has axes x; expected some of data"):
        Layout.of(jax.make_mesh((1,), ("x",)))
