"""The matrix of cache x chunking x ragged batch, in float64: attend equals softmax attention over materialize, both
equal an oracle that knows nothing of packing. Ways of running a cache are the contract suite's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Meaning, expected, make_chunk, run

from kvjax.caches.base import CacheShape
from kvjax.caches.registry import parse_spec
from kvjax.models.rope import make_rope
from kvjax.testing.layers import ENDS, ROPE, TOKENS, both, same_trees, schedule

TOKEN, KIVI = ("token", 16), ("channel", 32)
MATRIX = [
    Meaning("dense", (16, 16), TOKEN, 16, 0),
    Meaning("k8v8@token", (8, 8), TOKEN, 16, 0),
    Meaning("k4v2@token", (4, 2), TOKEN, 16, 0),
    Meaning("k3v5@token(rope=pre)", (3, 5), TOKEN, 16, 0, pre=True),
    Meaning("k1v6@token(group=8)", (1, 6), ("token", 8), 8, 0),
    Meaning("k4v16@token(sink=5)", (4, 16), TOKEN, 16, 0, sink=5),
    Meaning("k4v2@token(residual=8,sink=3)", (4, 2), TOKEN, 16, 8, sink=3),
    Meaning("k4v4@token", (4, 4), ("token", 80), 80, 0, head_dim=80),
    Meaning("k4v4@kivi", (4, 4), KIVI, 16, 32),
    Meaning("k2v2@kivi", (2, 2), KIVI, 32, 32, head_dim=96),
    Meaning("k2v2@kivi(rope=pre)", (2, 2), KIVI, 16, 32, pre=True, head_dim=80),
    Meaning("k16v2@kivi", (16, 2), KIVI, 16, 32),
    Meaning("k3v16@kivi(sink=40)", (3, 16), KIVI, 16, 32, sink=40),
    Meaning("k4v2@kivi(group=8,residual=16,sink=5,rope=pre)", (4, 2), ("channel", 8), 8, 16, sink=5, pre=True),
]
RUNS = [  # width of the chunks, window, read
    (1, None, "exact"),
    (7, None, "exact"),
    (7, 20, "stored"),
    (TOKENS, 20, "exact"),
]
by_text = {"argvalues": MATRIX, "ids": lambda meaning: meaning.text}


def few(*texts):
    return {"argvalues": [m for m in MATRIX if m.text in texts], "ids": lambda meaning: meaning.text}


def check(meaning, width, window, read):
    rows, _ = run(meaning, width, window, read)  # holds attend's cache to materialize's, bit for bit
    assert any((lengths == 0).any() for _, lengths, _, _ in rows) or width == TOKENS
    for at, lengths, output, plain in rows:
        assert np.isfinite(output).all()
        for b, (start, length) in enumerate(zip(at, lengths, strict=True)):
            np.testing.assert_allclose(output[b, :length], plain[b, :length], atol=1e-12)
            wanted = expected(meaning, b, start, length, window, read)
            np.testing.assert_allclose(output[b, :length], wanted, atol=1e-9)


@pytest.mark.parametrize("case", RUNS, ids=str)
@pytest.mark.parametrize("meaning", **by_text)
def test_attend_is_attention_over_materialize(meaning, case):
    check(meaning, *case)


@pytest.mark.parametrize("case", [(TOKENS, None, "stored"), (1, 20, "exact"), (33, 50, "stored")], ids=str)
@pytest.mark.parametrize("meaning", **few("k4v2@token(residual=8,sink=3)", "k4v4@kivi", "k3v16@kivi(sink=40)"))
def test_more_runs_of_a_few(meaning, case):
    check(meaning, *case)


@pytest.mark.parametrize("meaning", **by_text)
def test_chunkings_leave_the_same_cache(meaning):
    """Also: nothing is ever requantised."""
    r = meaning.residual
    (_, steps), (_, chunks) = run(meaning, 1), run(meaning, 7)
    _, one_shot = run(meaning, TOKENS, 20)
    for other in (chunks, one_shot):
        for part in ("packed", "sinks"):
            same_trees(getattr(steps.store, part), getattr(other.store, part), 1e-12)
        for b, end in enumerate(ENDS):
            left = end % r if r else 0
            for mine, its in zip(steps.store.residual, other.store.residual, strict=True):
                same_trees(mine[b, :left], its[b, :left], 1e-12)


def test_read_may_change_on_the_way():
    """A partial block stored for one chunk is forgotten by the next: a completed block has all its tokens."""
    meaning = next(m for m in MATRIX if m.text == "k4v2@token(residual=8,sink=3)")
    _, exact = run(meaning, 7)
    with jax.enable_x64(True):
        cache = parse_spec(meaning.text).init(meaning.shape)
        for i, (at, lengths) in enumerate(schedule(7)):
            read = "stored" if i % 2 else "exact"
            output, _, cache, *_ = both(cache, make_chunk(meaning.head_dim, at, lengths, 7, None, read), ())
            for b, (start, length) in enumerate(zip(at, lengths, strict=True)):
                wanted = expected(meaning, b, start, length, None, read)
                np.testing.assert_allclose(output[b, :length], wanted, atol=1e-9)
    for b, end in enumerate(ENDS):
        whole = end // 8 * 8
        for a, other in zip(cache.store.packed, exact.store.packed, strict=True):
            np.testing.assert_array_equal(a.scale[b, ..., :whole], other.scale[b, ..., :whole])


def test_many_sinks_of_wide_heads():
    """64 sinks of 4096 channels, as in Llama-2-7B, are read by every query of a long chunk."""
    heads, sink, count = 32, 64, 300
    shape = CacheShape(1, count, heads, heads, 128, 4096)
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, count, heads, 128)).astype(np.float32)
    one = np.full(1, count)
    rope, positions = make_rope(ROPE, 128), np.arange(count)[None]
    chunk = make_chunk(16, one, one, 1).replace(
        **{"q": q, "k": k, "v": v, "positions": positions, "lengths": one},
        **{"rope": rope, "rotation": rope.table(jnp.asarray(positions), jnp.float32)},
    )
    attend = jax.jit(lambda cache, chunk: cache.attend(chunk, ())[0])
    output = attend(parse_spec(f"k8v8@token(sink={sink})").init(shape), chunk)
    plain = attend(parse_spec("dense").init(shape), chunk)
    np.testing.assert_allclose(output, plain, atol=0.1)
