"""Which GPUs and which sizes of arrays the Triton kernels refuse before they are launched, with a reason."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from kvjax.ops import attention, dispatch, store
from kvjax.ops.dispatch import using
from pallas_kernels import gpu_layout
from pallas_kernels.layout import Packed
from pallas_kernels.packed_attention import packed_attention
from pallas_kernels.triton_common import check_launch


@pytest.mark.parametrize(("capability", "good"), [("8.0", True), ("9.0", True), ("12.0", True), ("7.5", False)])
def test_capability(monkeypatch, capability: str, good: bool) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    if good:
        return gpu_layout.check_gpu()
    with pytest.raises(NotImplementedError, match=r"capability 7.5; kernels are for NVIDIA's, of 8.0"):
        gpu_layout.check_gpu()


@pytest.mark.parametrize("device", [SimpleNamespace(compute_capability="gfx942"), SimpleNamespace()])
def test_other_makers(monkeypatch, device) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with pytest.raises(NotImplementedError, match="kernels are for NVIDIA's"):
        gpu_layout.check_gpu()


def test_an_old_gpu_gets_the_next_implementation_and_the_reason_is_kept(monkeypatch) -> None:
    """Found when tracing: what the compiler says later, nobody catches."""
    keys = store.exact(jnp.ones((1, 1, 64, 64)))
    span = attention.Span(jnp.full((1, 1), 7), 0, jnp.full(1, 8), None)
    plain = attention.attend_packed(jnp.ones((1, 1, 1, 64)), span, keys, keys)  # before anything is changed
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="7.5", device_kind="Tesla T4")])
    with dispatch.fresh_reasons(), using(packed_attention=("triton", "xla")):
        found = attention.attend_packed(jnp.ones((1, 1, 1, 64)), span, keys, keys)
        [reason] = dispatch.reasons()
    assert reason.implementation == "triton" and "capability 7.5" in reason.text
    assert float(jnp.abs(found.output - plain.output).max()) < 1e-6


def shaped(batch: int, tokens: int) -> tuple:
    """Arguments of packed attention at 8 bits, without their contents."""
    array = jax.ShapeDtypeStruct
    shape = batch, 8, tokens, 128
    scale = array((batch, 8, 1, tokens), jnp.float16)
    tensor = Packed((array(shape, jnp.uint8),), scale, scale, 8, "token", 128, 32)
    ends = array((batch,), jnp.int32)
    return array((batch, 1, 32, 128), jnp.bfloat16), tensor, tensor, ends, ends


@pytest.mark.parametrize(("batch", "served"), [(16, True), (17, False), (24, False), (32, False), (33, True)])
def test_planes_of_2_to_4_gib(batch: int, served: bool) -> None:
    """Of 131072 tokens: 128 MiB a sequence."""
    call = functools.partial(packed_attention, implementation="triton", interpret=True)
    if served:
        jax.eval_shape(call, *shaped(batch, 131072))
    else:
        with pytest.raises(NotImplementedError, match=f"{batch * 2**27} bytes in an array"):
            jax.eval_shape(call, *shaped(batch, 131072))


def test_floats_of_4_gib_have_fewer_elements() -> None:
    check_launch(True, jax.ShapeDtypeStruct((2**31,), jnp.bfloat16), jax.ShapeDtypeStruct((2**33,), jnp.float32))
