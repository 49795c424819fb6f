"""The jax-triton kernel over all pairs of widths in Triton's interpreter, which has to be chosen before Triton is
imported: python triton_interpreter.py, with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import torch
from test_packed_attention import LENGTHS, PAIRS, Case, check, reference
from test_unseen import CASES, seen, spoil, tensors_of

from pallas_kernels.packed_attention import gpu, jax_triton, jax_triton_kernel


def attend(case: Case, dtype, spoil=lambda tensor: tensor, **settings: int):
    q, keys, *rest = case.tensors(dtype)
    return attend_to(case, q, spoil(keys), *rest, **settings)


def attend_to(case: Case, q, keys, values, *lengths, **settings: int):
    chosen = jax_triton.defaults(q, keys, values) | settings
    scale = case.head_dim**-0.5
    plan, _ = gpu.plan_of(gpu.AttentionPlan, q, keys, values, case.first, case.window, scale, True, chosen)
    each = gpu.share_of(plan, chosen["splits"], *lengths)
    parts = q.shape[0], case.kv_heads, plan.parts
    output = torch.full((*parts, plan.rows, case.head_dim), torch.nan)
    lse = torch.full((*parts, plan.rows), torch.nan)
    arguments = [tensor(a) for a in jax_triton.arguments(q, keys, values, *lengths, each)]
    jax_triton_kernel.attend_kernel[parts](*arguments, output, lse, P=plan, KV_HEADS=case.kv_heads)
    return gpu.result(jnp.asarray(output.numpy()), jnp.asarray(lse.numpy()), case.queries)


def tensor(array) -> torch.Tensor:
    if array.dtype == jnp.bfloat16:
        return torch.tensor(np.asarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.tensor(np.asarray(array))


for name in CASES:
    for queries in (1, 3):
        case, *tensors = tensors_of(name, queries)
        q, keys, values, start, stop = tensors
        bad = ~np.any([seen(case, start, stop, query) for query in range(queries)], axis=0)
        for spoilt in (np.nan, np.inf):
            unseen = attend_to(case, q, spoil(keys, bad, spoilt), spoil(values, bad, spoilt), start, stop)
            for a, b in zip(unseen, attend_to(case, *tensors), strict=True):
                assert np.isfinite(b).all()
                np.testing.assert_array_equal(a, b, err_msg=f"{name}, {queries} queries")
    late = seen(case, start, stop, 2) & ~seen(case, start, stop, 0)
    if values.per == "token":
        late = attend_to(case, q, keys, spoil(values, late, np.nan), start, stop)[0]
        assert np.isfinite(late[:, 0]).all() and np.isnan(late[:, 2]).all((1, 2)).all(), name
for case in PAIRS:
    check(attend(case, jnp.float32), reference(case), 3e-6)
for per in ("token", "channel"):
    lengths = Case(4, 2, per, kv_heads=1, group=32, stops=LENGTHS, tokens=4128)
    check(attend(lengths, jnp.float32), reference(lengths), 3e-6)
    for bits in ((4, 4), (3, 5), (8, 16)):
        for group in (None, 32):
            case = Case(*bits, per, 128, rows=4, group=group)
            # The interpreter cuts bfloat16 off where devices round: an error twice as large, and one-sided.
            check(attend(case, jnp.bfloat16, splits=3), reference(case, jnp.bfloat16), 3e-2)

for per, group in (("token", None), ("channel", 32)):
    case = Case(4, 4, per, group=group)
    bad = attend(case, jnp.float32, lambda k: dataclasses.replace(k, scale=k.scale.at[0, 0, 0, 10].set(jnp.nan)))[0]
    found = np.isnan(np.asarray(bad)).any((1, 3))
    assert found[0, :2].all() and not found[0, 2:].any() and not found[1].any(), per
