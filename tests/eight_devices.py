"""A tiny model on one device and on meshes of eight: run by test_mesh.py in a process of its own.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.eight_devices FOLDER usual|weekly

prints `equal` or what differs, a tab and the name of the check, for each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tests.checkpoints.test_gguf import F32, Q8_0, write_gguf

import kvjax
from kvjax.calibrate import bases
from kvjax.checkpoints.orbax import save
from kvjax.generation.decode import decode_steps, start
from kvjax.generation.sampling import Sampling
from kvjax.generation.states import Held
from kvjax.mesh import abstract, current
from kvjax.models import zoo
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.decoder import Decoder
from kvjax.models.params import param_nbytes, param_shapes

CONFIG = ModelConfig("llama", 256, 64, 128, 2, 8, 4, 16, 256, rope=RopeConfig(1e3), qkv_bias=True)
PLAN = "0:k4v2@kivi(group=8,residual=8,sink=3);1:x4@head(group=8)"  # what is compiled is compiled once for both
REST = "0:dense;1:k4v4@token;2:x4@latent(group=8);3-4:xcl3(base=0)"  # the rest of the methods, weekly
MESH = "data=2,tensor=4"
CUBE = "data=2,seq=2,tensor=2"
PROMPTS = [list(range(5 + i, 21 + 3 * i)) for i in range(8)]
CONTEXT = 72  # tokens: more than a device holds where eight share them, or two
TEXT = [(7 * i * i + 3 * i) % 256 for i in range(8 * CONTEXT)]
GOLDEN = Path(__file__).parent / "goldens" / "llama-llama3"


@functools.cache
def model(mesh: str = "", layers: int = 2) -> kvjax.Model:
    return kvjax.load("random:tiny", "float64", layers, mesh=mesh)


def answers(mesh: str, plan: str, protocol: str) -> tuple[kvjax.Generation, list[np.ndarray]]:
    """Greedy tokens, and scores per token."""
    here = model(mesh, 5 if plan == REST else 2)
    made = kvjax.generate(here, PROMPTS, plan, max_new_tokens=6)
    score = kvjax.score(here, TEXT, plan, context=CONTEXT, windows=8, protocol=protocol)
    return made, [score.per_token.nll, score.per_token.kld]


one_device = functools.cache(functools.partial(answers, ""))


def same_numbers(mesh: str, plan: str, protocol: str) -> None:
    """Tokens and scores are those of one device, and the state is where it was made."""
    (expected, arrays), (made, found) = one_device(plan, protocol), answers(mesh, plan, protocol)
    assert made.tokens == expected.tokens and any(len(set(each)) > 1 for each in made.tokens)
    for a, b in zip(found, arrays, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    held = made.state.held
    where = held.layout.shardings(held.axes(), held)
    for leaf, wanted in zip(jax.tree.leaves(held), jax.tree.leaves(where), strict=True):
        assert not leaf.size or leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.shape, leaf.sharding)


def same_logits() -> None:
    """The logits of a prefill whose tokens are read as stored."""
    found = [np.asarray(kvjax.logits(model(mesh), np.array(TEXT).reshape(8, -1), PLAN)) for mesh in ("", MESH)]
    np.testing.assert_allclose(*found, atol=1e-9)


def nbytes(arrays: Any) -> dict[Any, int]:
    """Bytes on each device."""
    found: dict[Any, int] = {}
    for leaf in jax.tree.leaves(arrays):
        for shard in leaf.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return found


def bytes_of_parameters() -> None:
    """Norms are whole; all else is a fourth. The biases of q, k, v are divided like their rows."""
    shapes = {path: 8 * math.prod(shape) for path, shape in param_shapes(CONFIG).items()}
    whole = sum(size for path, size in shapes.items() if path[-1].endswith("norm"))
    share = whole + (sum(shapes.values()) - whole) / 4
    held = nbytes(model(MESH).params)
    assert len(held) == 8 and set(held.values()) == {share}


def bytes_of_caches() -> None:
    """Keys and values are an eighth, by batch and heads; what has no heads is a half, by batch.

    By tokens all is an eighth, the exact residual apart.
    """
    for name, heads, exact in (
        *(("dense", 4, 0), ("k4v2@kivi(sink=3)", 4, 35), ("k4v4@token", 4, 0)),
        *(("x4@latent", 1, 64), ("xcl3(base=0)", 1, 0)),
    ):
        plan = kvjax.plan(model(), name)
        whole, dense = (plan.nbytes(2048, 8, jnp.float64) for plan in (plan, kvjax.plan(model(), "dense")))
        rest = dense * exact / 2048  # of tokens that are kept exactly
        for mesh, share in ((MESH, whole / 2 / heads), ("seq=8", (whole - rest) / 8 + rest)):
            held = nbytes(Held.empty(model(mesh), plan, 8, 2048).cache.layers)
            assert len(held) == 8 and all(abs(size / share - 1) < 0.01 for size in held.values()), (name, mesh, held)


def same_parameters(load: Callable[[str], kvjax.Model]) -> None:
    """Values and checksum are those of one device, and no device ever got a whole weight to share it out."""
    expected = load("")
    moved = mock.Mock(side_effect=AssertionError("a whole array is put on a device"))
    with mock.patch.object(jnp, "array", moved), mock.patch.object(jax, "device_put", moved):
        loaded = load(MESH)
    assert loaded.checksum == expected.checksum and loaded.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    vocab, dim = loaded.params["embed"].shape
    assert loaded.params["embed"].addressable_shards[0].data.shape == (vocab // 4, dim)
    o = loaded.params["layer_0"]["o"]
    assert o.addressable_shards[0].data.shape == (dim, o.shape[1] // 4)


def safetensors() -> None:
    same_parameters(lambda mesh: kvjax.load(str(GOLDEN), "float64", mesh=mesh))
    same_parameters(lambda mesh: kvjax.load(str(GOLDEN), "bfloat16", mesh=mesh))


def gguf(folder: Path) -> None:
    """Q8_0's blocks of 32 are cut where `o` and `down` are divided by columns."""
    golden = kvjax.load(str(GOLDEN), "float32")
    for kind in (F32, Q8_0):
        file = write_gguf(folder / f"{kind.name}.gguf", golden.config, golden.params, kind)
        same_parameters(lambda mesh, file=file: _gguf(file, mesh))


def _gguf(file: Path, mesh: str) -> kvjax.Model:
    with mock.patch("kvjax.checkpoints.gguf.read_tokenizer"):  # the file has none
        return kvjax.load(str(file), "float32", mesh=mesh)


def orbax(folder: Path) -> None:
    """Saved from a mesh, read on another one and on one device."""
    save(folder / "orbax", model("tensor=2"))
    loaded = kvjax.load(str(folder / "orbax"), "float64", mesh=MESH)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model().params)
    assert nbytes(loaded.params) == nbytes(model(MESH).params)


def states(folder: Path) -> None:
    """A state saved on one mesh goes on on another."""
    made, _ = one_device(PLAN, "streaming")
    for there, mesh in (("data=8", MESH), (MESH, CUBE), (CUBE, "data=8")):
        saved, here = folder / f"state-{there}", model(mesh)
        kvjax.save_state(saved, model(there), kvjax.prefill(model(there), PROMPTS, PLAN, max_len=50))
        state = kvjax.restore_state(saved, here)
        assert nbytes(state.held) == nbytes(Held.empty(here, state.plan, 8, 50))
        assert kvjax.generate(here, [""] * 8, state, max_new_tokens=6).tokens == made.tokens
    refused("is where .* is; this is", lambda: kvjax.generate(model(there), [""] * 8, state))


def what_does_not_divide() -> None:
    """One line that says what to type, and what is kept whole then."""
    name, short = "random:odd", "k4v4@token"
    refused(
        r"kv_heads 3 does not divide over tensor=4; --config\.replicate=kv_heads keeps them whole",
        lambda: kvjax.load(name, "float64", mesh="tensor=4"),
    )
    whole = odd_model()
    assert set(nbytes(whole.params).values()) == {param_nbytes(whole.config, "float64", whole.mesh, ["kv_heads"])}
    assert whole.params["layer_0"]["k"].addressable_shards[0].data.shape == (48, 48)
    tokens = [kvjax.generate(m, "ab", short, max_new_tokens=3).tokens for m in (whole, kvjax.load(name, "float64"))]
    assert tokens[0] == tokens[1]
    refused("batch 1 does not divide over data=8", lambda: kvjax.generate(model("data=8"), "ab", short))
    refused("needs 16 devices; there are 8", lambda: kvjax.load(name, mesh="data=16"))


def the_mesh_in_context() -> None:
    """`current` knows it inside programs; between two pieces of a stream there is none."""
    seen: list[Any] = []
    look = jax.jit(lambda x: seen.append(current()) or x)
    with odd_model().layout.entered():
        look(1.0)
    for text, _ in kvjax.stream(odd_model(), "ab", "k4v4@token", max_new_tokens=3):
        assert current() is None, text
    with kvjax.load("random:odd", "float64", mesh="data=1").layout.entered():
        look(1.0)
    look(1)
    assert dict(seen[0].shape) == {"data": 1, "seq": 1, "tensor": 4} and seen[1:] == [None, None]


def counted_bytes() -> None:
    """What is counted without devices is what each device holds, on every mesh."""
    for mesh in (MESH, "data=8", CUBE):
        for text, layers in ((PLAN, 2), (REST, 5)):
            here, places = model(mesh, layers), abstract(mesh)
            assert set(nbytes(here.params).values()) == {param_nbytes(here.config, "float64", places)}
            cache = Held.empty(here, kvjax.plan(here, text), 8, 256).cache
            assert set(nbytes(cache.layers).values()) == {cache.plan.part_nbytes(cache.shape, places)}, (mesh, text)


EXCHANGE = r"= \w+\[([\d,]*)\]\S* (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def exchanges() -> None:
    """A step sums what `o`, `down` and the embedding give; else only a few numbers a sequence go between devices."""
    here, stop = model(MESH), jnp.zeros(1, jnp.int32)
    for name in ("dense", "k4v4@token"):
        with here.layout.entered():
            run = start(Held.empty(here, kvjax.plan(here, name), 8, 64), 16)
            greedy = Sampling.of(0.0, None, None, 0, 8, CONFIG.vocab_size)
            lowered = decode_steps.lower(Decoder(CONFIG), here.params, ((),) * 2, run, greedy, stop, 16, 16)
        found = re.findall(EXCHANGE, lowered.compile().as_text())
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape, _ in found]
        sums = sizes.count(8 // 2 * CONFIG.model_dim)
        assert sums == 2 * CONFIG.layers + 1 and sorted(sizes)[-sums - 1] <= 8 * 4, (name, found)


@functools.cache
def odd_model() -> kvjax.Model:
    return kvjax.load("random:odd", "float64", mesh="tensor=4", replicate="kv_heads")


def refused(message: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kvjax.KvjaxError as error:
        assert re.search(message, str(error)) and "\n" not in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {message}")


def checks(folder: Path) -> dict[str, Callable[[], None]]:
    return {
        **{mesh: functools.partial(same_numbers, mesh, PLAN, "streaming") for mesh in (MESH, CUBE)},
        "bytes of parameters": bytes_of_parameters,
        "bytes of caches": bytes_of_caches,
        "safetensors": safetensors,
        "gguf": functools.partial(gguf, folder),
        "orbax": functools.partial(orbax, folder),
        "states": functools.partial(states, folder),
        "what does not divide": what_does_not_divide,
        "counted bytes": counted_bytes,
        "exchanges": exchanges,
        "the mesh in context": the_mesh_in_context,
    }


def weekly() -> dict[str, Callable[[], None]]:
    """All methods on all meshes, which takes minutes."""
    meshes, protocols = ("data=8", MESH, "tensor=2", "seq=8", CUBE), ("streaming", "parallel")
    every = [(mesh, plan, protocol) for plan in (PLAN, REST) for protocol in protocols for mesh in meshes]
    return {"; ".join(each): functools.partial(same_numbers, *each) for each in every} | {"logits": same_logits}


def main(folder: Path, which: str) -> None:
    """Runs the checks."""
    jax.config.update("jax_enable_x64", True)
    zoo.RANDOM["random:tiny"] = dataclasses.replace(CONFIG, layers=5)
    zoo.RANDOM["random:odd"] = ModelConfig("llama", 256, 48, 128, 1, 12, 3, 16, 256)
    with mock.patch.object(bases, "cache_folder", lambda: folder):
        for name, check in (weekly() if which == "weekly" else checks(folder)).items():
            try:
                check()
            except Exception as error:
                traceback.print_exc()
                print(" ".join(f"{type(error).__name__}: {error}".split())[:500], name, sep="\t", flush=True)
            else:
                print("equal", name, sep="\t", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
