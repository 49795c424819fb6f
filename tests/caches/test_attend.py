"""The matrix of cache x chunking x ragged batch, in float64: attend equals softmax attention over materialize, both
equal an oracle that knows nothing of packing, and no way of running a cache changes it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import ENDS, ROPE, TOKENS, Meaning, both, by_position, expected, make_chunk, run, same_bits, schedule

from kvjax.caches.base import CacheShape
from kvjax.caches.registry import parse_spec
from kvjax.models.rope import make_rope

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
            same_bits(getattr(steps.store, part), getattr(other.store, part), 1e-12)
        for b, end in enumerate(ENDS):
            left = end % r if r else 0
            for mine, its in zip(steps.store.residual, other.store.residual, strict=True):
                same_bits(mine[b, :left], its[b, :left], 1e-12)


@pytest.mark.parametrize("meaning", **few("k4v2@token", "k3v5@token(rope=pre)", "k4v16@token(sink=5)"))
def test_without_residual_chunks_do_not_matter(meaning):
    steps, chunks = (by_position(run(meaning, width)[0]) for width in (1, 7))
    np.testing.assert_allclose(steps, chunks, atol=1e-12)


@pytest.mark.parametrize("meaning", **few("k4v4@kivi", "k4v2@token(residual=8,sink=3)"))
def test_streaming_is_decoding(meaning):
    """Chunks of the residual from position 0 see what token-by-token decoding sees."""
    steps = by_position(run(meaning, 1)[0])
    r = meaning.residual
    with jax.enable_x64(True):
        cache = parse_spec(meaning.text).init(meaning.shape)
        for start in range(0, TOKENS, r):
            at = np.minimum(start, ENDS)
            lengths = np.minimum(r, ENDS - at)
            output, _, cache, _ = both(cache, make_chunk(meaning.head_dim, at, lengths, r))
            for b, length in enumerate(lengths):
                here = steps[b, at[b] : at[b] + length]
                np.testing.assert_allclose(output[b, :length], here, atol=1e-12)


def test_read_may_change_on_the_way():
    """A partial block stored for one chunk is forgotten by the next: a completed block has all its tokens."""
    meaning = next(m for m in MATRIX if m.text == "k4v2@token(residual=8,sink=3)")
    _, exact = run(meaning, 7)
    with jax.enable_x64(True):
        cache = parse_spec(meaning.text).init(meaning.shape)
        for i, (at, lengths) in enumerate(schedule(7)):
            read = "stored" if i % 2 else "exact"
            output, _, cache, _ = both(cache, make_chunk(meaning.head_dim, at, lengths, 7, None, read))
            for b, (start, length) in enumerate(zip(at, lengths, strict=True)):
                wanted = expected(meaning, b, start, length, None, read)
                np.testing.assert_allclose(output[b, :length], wanted, atol=1e-9)
    for b, end in enumerate(ENDS):
        whole = end // 8 * 8
        for a, other in zip(cache.store.packed, exact.store.packed, strict=True):
            np.testing.assert_array_equal(a.scale[b, ..., :whole], other.scale[b, ..., :whole])


LOOPED = few(
    "k4v2@token", "k4v16@token(sink=5)", "k4v2@kivi(group=8,residual=16,sink=5,rope=pre)", "k3v16@kivi(sink=40)"
)


def stacked(meaning, width):
    chunks = [make_chunk(meaning.head_dim, at, lengths, width) for at, lengths in schedule(width)]
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *chunks)


@pytest.mark.parametrize("meaning", **LOOPED)
def test_scan(meaning):
    rows, after = run(meaning, 7)
    with jax.enable_x64(True):

        def step(cache, chunk):
            output, cache, _ = cache.attend(chunk, ())
            return cache, output

        scan = jax.jit(lambda cache, chunks: jax.lax.scan(step, cache, chunks))
        cache, outputs = scan(parse_spec(meaning.text).init(meaning.shape), stacked(meaning, 7))
        same_bits(cache, after, 1e-12)
        for (_, lengths, output, _), looped in zip(rows, outputs, strict=True):
            for b, length in enumerate(lengths):
                np.testing.assert_allclose(looped[b, :length], output[b, :length], atol=1e-12)


@pytest.mark.parametrize("meaning", **LOOPED)
def test_while_loop_with_donation(meaning):
    rows, after = run(meaning, 1)
    with jax.enable_x64(True):
        chunks = stacked(meaning, 1)

        def step(state):
            i, cache, outputs = state
            output, cache, _ = cache.attend(jax.tree.map(lambda a: a[i], chunks), ())
            return i + 1, cache, outputs.at[i].set(output)

        def loop(cache, outputs):
            return jax.lax.while_loop(lambda state: state[0] < len(rows), step, (0, cache, outputs))[1:]

        cache = parse_spec(meaning.text).init(meaning.shape)
        outputs = jnp.zeros((len(rows), *rows[0][2].shape))
        donated = [leaf for leaf in jax.tree.leaves(cache) if leaf.size]
        cache, outputs = jax.jit(loop, donate_argnums=0)(cache, outputs)
        assert all(leaf.is_deleted() for leaf in donated)
        same_bits(cache, after, 1e-12)
        for (_, lengths, output, _), looped in zip(rows, outputs, strict=True):
            for b, length in enumerate(lengths):
                np.testing.assert_allclose(looped[b, :length], output[b, :length], atol=1e-12)


SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from kvjax.caches.plan import CachePlan
from kvjax.mesh import shardings
from oracle import make_chunk, model, same_bits
from test_attend import MATRIX

jax.config.update("jax_enable_x64", True)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
rules = {"batch": "data", "kv_heads": "model"}
step = lambda cache, chunk: cache.attend(chunk, ())[:2]
for meaning in (m for m in MATRIX if m.text in sys.argv[1:]):
    plan = CachePlan.parse(meaning.text, model(2))
    layout = shardings(plan, meaning.shape, mesh, rules)[1]
    plain = plan.init(meaning.shape).layers[1]
    sharded = jax.device_put(plain, layout)
    one, many = jax.jit(step), jax.jit(step, out_shardings=(None, layout))
    at = np.zeros(4, int)
    for lengths in ([37, 20, 0, 31], [36, 37, 33, 32]):
        lengths = np.array(lengths)
        chunk = make_chunk(meaning.head_dim, at, lengths, 37)
        heads = NamedSharding(mesh, P("data", None, "model"))
        spread = chunk.replace(**{name: jax.device_put(getattr(chunk, name), heads) for name in "qkv"})
        output, plain = one(plain, chunk)
        output_sharded, sharded = many(sharded, spread)
        np.testing.assert_allclose(output_sharded, output, atol=1e-12)
        same_bits(sharded, plain, 1e-12)
        at += lengths
    for leaf in jax.tree.leaves(sharded):
        assert 4 * np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size
    print("equal", meaning.text)
"""


def test_sharded_over_devices():
    """Batch over two devices, kv heads over two: the same outputs, the same cache."""
    texts = ["dense", "k4v2@token", "k4v2@token(residual=8,sink=3)", "k2v2@kivi(rope=pre)"]
    here = Path(__file__).parent
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", ""), str(here.parents[1])]),
    }
    done = subprocess.run([sys.executable, "-c", SHARDED, *texts], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"equal {text}" for text in texts]


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
