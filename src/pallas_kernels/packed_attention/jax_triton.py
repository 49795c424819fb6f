"""Packed attention for GPUs through jax-triton: the same plan as triton.py, the kernel in Triton's own language.

JAX deprecates Pallas through Triton, and this kernel does not need it. It also differs in that channels are not split
into pieces, and that the running maximum is updated for every sub-tile. Where a token has several groups, or scales
are per channel, values are dequantised in registers.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu_layout import SMALLEST, GpuTensor, check_gpu, power_of_two
from pallas_kernels.layout import Attended, Packed, by_kv_head, in_launches
from pallas_kernels.packed_attention import gpu


def packed_attention(
    q: Float[Array, "B T H D"],
    keys: Packed,
    values: Packed,
    start: Int[Array, "B"],
    stop: Int[Array, "B"],
    *,
    first: int,
    window: int | None,
    scale: float,
    interpret: bool = False,
    block: int | None = None,
    splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    compute_capability: int | None = None,
) -> Attended:
    """See `pallas_kernels.packed_attention`.

    The settings block, splits, num_warps and num_stages are those of `defaults` where None. `compute_capability` is
    that of the device to compile for, for example 90; None stands for this machine's device.
    """
    if interpret:
        raise NotImplementedError("Pallas' interpreter does not run Triton's language")
    jax_triton, kernel = _modules()
    if compute_capability is None:
        check_gpu()
    settings = {"block": block, "splits": splits, "num_warps": num_warps, "num_stages": num_stages}
    given = {name: value for name, value in settings.items() if value is not None}

    def launch(q: Array, start: Array) -> Attended:
        chosen = defaults(q, keys, values) | given
        plan, how = gpu.plan_of(gpu.AttentionPlan, q, keys, values, first, window, scale, interpret, chosen)
        each = gpu.share_of(plan, chosen["splits"], start, stop)
        parts = q.shape[0], keys.shape[1], plan.parts
        shapes = (*parts, plan.rows, values.shape[3]), (*parts, plan.rows)
        output, lse = jax_triton.triton_call(
            *arguments(q, keys, values, start, stop, each),
            kernel=kernel.attend_kernel,
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            grid=parts,
            P=plan,
            KV_HEADS=keys.shape[1],
            compute_capability=compute_capability,
            **how,
        )
        return gpu.result(output, lse, q.shape[1])

    return in_launches(launch, q, start, keys.shape[1], rows=gpu.LAUNCH_ROWS, most=gpu.MOST_ROWS)


def _modules() -> tuple[Any, Any]:
    """Imports jax-triton and the kernel, which needs Triton."""
    try:
        kernel = importlib.import_module("pallas_kernels.packed_attention.jax_triton_kernel")
        return importlib.import_module("jax_triton"), kernel
    except (ImportError, AttributeError) as error:  # AttributeError where jax has no GPU support
        raise NotImplementedError(f"no jax-triton: {error}") from None


def arguments(q: Array, keys: Packed, values: Packed, start: Array, stop: Array, each: Array) -> tuple[Array, ...]:
    """Lists the arrays that the kernel reads, in order.

    In place of a plane or scale that a tensor does not have, another array of the tensor is passed.

    Args:
      q: queries.
      keys: packed keys.
      values: packed values.
      start: position of the first query, per sequence.
      stop: the position after the last that is read, per sequence.
      each: blocks of a part.

    Returns:
      The arrays.

    Raises:
      NotImplementedError: there are too few channels, or groups that the kernel cannot spread over channels.
    """
    arrays = [by_kv_head(q, keys.shape[1]), start.astype(jnp.int32), stop.astype(jnp.int32), each]
    for packed in (keys, values):
        stored = GpuTensor.of(packed)
        if stored.channels < SMALLEST:
            raise NotImplementedError(f"{stored.channels} channels; expected at least {SMALLEST}")
        if stored.groups > 1 and not power_of_two(stored.group):
            raise NotImplementedError(f"groups of {stored.group} channels; expected a power of two")
        scales = [packed.planes[0] if a is None else a for a in (packed.scale, packed.zero)]
        arrays += [packed.planes[0], packed.planes[-1], *scales]
    return tuple(arrays)


def defaults(q: Float[Array, "B T H D"], keys: Packed, values: Packed) -> dict[str, int]:
    """Chooses block, splits, warps and stages.

    Sub-tiles have 64 tokens. They have fewer where registers would spill, because all bytes of a block are held at
    once: for float32, two planes or unequal widths. Exact values have 32, so that three blocks fit shared memory.

    Args:
      q: queries.
      keys: packed keys.
      values: packed values.

    Returns:
      The settings by name.
    """
    stored = [s for s in (GpuTensor.of(keys), GpuTensor.of(values)) if not s.exact]
    widths = {width for s in stored for width in s.widths}
    rows = 16 if q.dtype != jnp.bfloat16 or {1, 4} <= widths else 64 if len(widths) == 1 else 32
    return gpu.settings_of(q, keys, values, rows, buffers=3)
