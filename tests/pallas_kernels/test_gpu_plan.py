"""How the GPU kernels cut their work, for GPUs that are described but not there."""

from __future__ import annotations

import heapq
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu_layout
from pallas_kernels.gpu_layout import STARTUP, splits_of
from pallas_kernels.layout import PLANES, Packed
from pallas_kernels.packed_attention import gpu, triton


def arguments(batch: int, tokens: int, bits: int = 4, head_dim: int = 128, heads: int = 32, kv_heads: int = 8):
    """Queries, keys and values of one query a sequence, without their contents."""
    array, shape = jax.ShapeDtypeStruct, (batch, kv_heads, tokens, head_dim)
    if bits == 16:
        tensor = Packed((array(shape, jnp.bfloat16),), None, None, 16, "token", head_dim, 32)
    else:
        planes = tuple(array((batch, kv_heads, tokens * n // 8, head_dim), jnp.uint8) for n in PLANES[bits])
        scale = array((batch, kv_heads, 1, tokens), jnp.float16)
        tensor = Packed(planes, scale, scale, bits, "token", head_dim, 32)
    return array((batch, 1, heads, head_dim), jnp.bfloat16), tensor, tensor


def on(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(core_count=cores)])


def simulated(programs: int, blocks: int, slots: int, parts: int) -> int:
    """When the last part is done, each started in order on the first slot that is free."""
    each = -(-blocks // parts)
    lengths = [max(0, min(each, blocks - part * each)) for part in range(parts)]
    free = [0] * slots
    for length in itertools.chain.from_iterable(itertools.repeat(lengths, programs)):
        heapq.heapreplace(free, free[0] + length + STARTUP)
    return max(free)


@pytest.mark.parametrize("slots", [27, 33, 83])
@pytest.mark.parametrize(("programs", "blocks"), [(1, 128), (8, 32), (8, 64), (16, 16), (64, 4), (75, 32)])
def test_no_number_of_parts_is_much_faster(programs: int, blocks: int, slots: int) -> None:
    chosen = splits_of(programs, blocks, slots)
    assert 1 <= chosen <= blocks // 2
    best = min(simulated(programs, blocks, slots, parts) for parts in range(1, blocks // 2 + 1))
    assert simulated(programs, blocks, slots, chosen) <= 1.15 * best


def test_a_last_wave_is_not_left_almost_empty() -> None:
    """8 sequences of 8 kv heads, two programs on each of 132 multiprocessors: 5 parts are 320 programs on 264."""
    assert splits_of(64, 256, 264) == 4
    assert simulated(64, 256, 264, 4) < 0.7 * simulated(64, 256, 264, 5)


@pytest.mark.parametrize("cores", [58, 108, 132, 148])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_programs_fill_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch, cores: int, bits: int) -> None:
    """One long sequence: waves of programs, of which the last is nearly full too."""
    on(monkeypatch, cores)
    q, keys, values = arguments(1, 131072, bits)
    slots = cores * (triton.gpu.RESIDENT if bits == 16 else triton.LIGHT)
    programs = 8 * triton.defaults(q, keys, values)["splits"]
    assert 0.9 <= programs / slots / -(-programs // slots) <= 1


def parts_of(lengths: list[int], splits: int, window: int | None = None) -> tuple[int, list[int], int]:
    """Blocks of a part, the parts of every sequence, and how many a launch has room for."""
    q, keys, values = arguments(len(lengths), 32768)
    settings = {"block": 128, "splits": splits, "num_warps": 4, "num_stages": 3}
    plan, _ = gpu.plan_of(triton.TritonPlan, q, keys, values, 0, window, 1.0, False, settings)
    stop = jnp.asarray(lengths, jnp.int32)
    each = int(gpu.share_of(plan, splits, jnp.maximum(stop - 1, 0), stop)[0])
    seen = np.minimum(lengths, window or max(lengths))
    return each, [-(-int(tokens) // (128 * each)) for tokens in seen], plan.parts


@pytest.mark.parametrize("tokens", [1, 128, 1000, 4096, 32768])
@pytest.mark.parametrize(("batch", "splits"), [(1, 1), (1, 7), (8, 1), (8, 4), (8, 6)])
def test_sequences_of_one_length_are_cut_alike(batch: int, splits: int, tokens: int) -> None:
    each, _, room = parts_of([tokens] * batch, splits)
    blocks = -(-tokens // 128)
    assert each == -(-blocks // splits)
    assert room == splits * (1 if batch == 1 else gpu.RAGGED)


@pytest.mark.parametrize("splits", [1, 3, 6])
@pytest.mark.parametrize(
    "lengths", [[32768] + [1024] * 7, [32768, 16384, 8192, 4096, 2048, 1024, 512, 0], [30000] * 2 + [100] * 30]
)
def test_a_long_sequence_is_not_waited_for(lengths: list[int], splits: int) -> None:
    """On slots that equal sequences would fill, ragged ones take at most .7 of the time of equal parts for each."""
    each, parts, room = parts_of(lengths, splits)
    assert max(parts) <= room and all(parts[i] * each * 128 >= lengths[i] for i in range(len(lengths)))

    def time(found: list[list[int]]) -> int:
        free = [0] * (splits * len(lengths))
        for blocks in itertools.chain.from_iterable(found):
            heapq.heapreplace(free, free[0] + blocks + STARTUP)
        return max(free)

    blocks = [-(-tokens // 128) for tokens in lengths]
    cut = lambda n, size: [min(size, n - at) for at in range(0, n, size)]  # noqa: E731
    alike = [cut(n, max(1, -(-n // splits))) for n in blocks]
    assert time([cut(n, each) for n in blocks]) <= 0.7 * time(alike)


def test_a_window_is_what_counts_of_a_long_sequence() -> None:
    assert parts_of([32768, 1024], 2, window=1024)[:2] == parts_of([1024, 1024], 2)[:2]


def test_short_sequences_are_not_cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 132)
    q, keys, values = arguments(1, 512)
    settings = triton.defaults(q, keys, values)
    assert settings["splits"] * 2 * settings["block"] <= 512


def test_where_there_is_no_gpu_one_is_assumed() -> None:
    if jax.default_backend() == "cpu":
        assert gpu_layout.cores() == gpu_layout.CORES


@pytest.mark.parametrize(("head_dim", "bits", "stages"), [(128, 16, 3), (256, 4, 3), (256, 8, 3), (256, 16, 2)])
def test_blocks_fetched_ahead_fit_shared_memory(head_dim: int, bits: int, stages: int) -> None:
    """Of the least GPU that is served, 99 KiB a program: exact values of wide heads are not fetched far ahead."""
    settings = triton.defaults(*arguments(1, 4096, bits, head_dim))
    assert settings["num_stages"] == stages
    assert (stages - 1) * settings["block"] * 2 * head_dim * bits // 8 < 99 << 10


ROWS = [json.loads(line) for line in (Path(__file__).parents[2] / "results/aot-cuda.jsonl").read_text().splitlines()]
COUNTED = [
    (row["op"], row["mode"], row["bits"], row["target"], kernel)
    for row in ROWS
    for kernel in row["kernels"]
    if "copy_distance" in kernel
]


def counted(op: str, targets: str = "a100,h100,b200"):
    found = [entry for entry in COUNTED if entry[0] == op and entry[3] in targets.split(",")]
    return [pytest.param(*entry, id="-".join(entry[:4])) for entry in found]


@pytest.mark.parametrize(("op", "mode", "bits", "target", "kernel"), counted("packed_attention"))
def test_compiled_pallas_kernels_load_ahead(op: str, mode: str, bits: str, target: str, kernel: dict) -> None:
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0
    assert kernel["waits"] <= 1 and kernel["copy_distance"] >= 280
    assert kernel["load_distance"] is None or kernel["load_distance"] >= 300
    light = mode == "token" and bits in ("8/8", "4/4", "2/2")
    assert kernel["resident"] >= (triton.LIGHT if light else triton.gpu.RESIDENT)
    assert kernel["per_element"] <= {"8/8": 6.6, "4/4": 5.0, "2/2": 4.6, "16/16": 2.4}[bits]


@pytest.mark.parametrize(
    ("op", "mode", "bits", "target", "kernel"), counted("packed_attention_jax_triton", "a100,h100")
)
def test_compiled_jax_triton_kernels_copy_ahead(op: str, mode: str, bits: str, target: str, kernel: dict) -> None:
    """On B200 its products are asynchronous, and the distance from copies to waits does not tell."""
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0
    assert kernel["copy_distance"] >= 240 and kernel["resident"] >= triton.gpu.RESIDENT
    assert kernel["waits"] <= (1 if mode != "kivi32" else 9)


@pytest.mark.parametrize("target", ["a100", "h100", "b200"])
def test_compiled_kernels_are_counted_on_every_gpu(target: str) -> None:
    found = {entry[:3] for entry in COUNTED if entry[3] == target}
    assert len(found) >= 16
