"""The kernel in Triton's own language: what its host side gives it and, where Triton and torch are installed, what it
computes in Triton's interpreter. On a GPU it is one of the kernels of the other files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers import INTERPRETED
from test_packed_attention import Case, run

from pallas_kernels.gpu_layout import GpuTensor, cut
from pallas_kernels.packed_attention import jax_triton


def test_arguments_have_one_order() -> None:
    """Planes that a width has not and scales of exact values are stood in for."""
    case = Case(3, 16, "channel", group=32)
    q, keys, values, start, stop = case.tensors()
    each = jnp.ones(1, jnp.int32)
    rows, begin, end, size, *rest = jax_triton.arguments(q, keys, values, start, stop, each)
    assert rows.shape == (2, case.kv_heads, case.rows, case.head_dim) and begin.dtype == end.dtype == jnp.int32
    assert size is each
    own = [*keys.planes, keys.scale, keys.zero, *[values.planes[0]] * 4]
    assert len(rest) == len(own) and all(a is b for a, b in zip(rest, own, strict=True))


@pytest.mark.parametrize(("bits", "rows"), [((4, 4), 64), ((8, 8), 64), ((4, 2), 32), ((3, 3), 32), ((5, 5), 16)])
def test_default_blocks_hold_fewer_tokens_where_more_bytes_are_held(bits, rows: int) -> None:
    case = Case(*bits, head_dim=128, rows=4)
    q, keys, values, *_ = case.tensors(jnp.bfloat16)
    chosen = cut([GpuTensor.of(keys), GpuTensor.of(values)], 0, jax_triton.defaults(q, keys, values)["block"])
    assert chosen.rows == max(rows, chosen.run)


def test_what_it_does_not_serve(monkeypatch) -> None:
    case = Case(4, 4, head_dim=96, group=24)
    with pytest.raises(NotImplementedError, match="groups of 24 channels"):
        jax_triton.arguments(*case.tensors(), jnp.ones(1, jnp.int32))
    with pytest.raises(NotImplementedError, match="interpreter"):
        jax_triton.packed_attention(*case.tensors(), first=0, window=None, scale=1.0, interpret=True)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(NotImplementedError, match="no jax-triton"):
        run("jax_triton", case, case.tensors())


@pytest.mark.skipif("native" not in INTERPRETED, reason="on a device the kernel itself is tested")
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("triton", "torch"))), reason="Triton's interpreter needs triton and torch"
)
def test_every_pair_in_tritons_interpreter() -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, here / "triton_interpreter.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
