"""A state saved in one process and gone on from in another."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import kvjax
from kvjax.models.config import RopeConfig
from kvjax.models.model import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")

OTHER = """
import sys, kvjax
model = kvjax.load(sys.argv[1], "float32")
state = kvjax.restore_state(sys.argv[2], model)
made = kvjax.generate(model, ["", ""], state, max_new_tokens=15, temperature=0.7, seed=4)
print(made.tokens)
"""
PROMPTS = ["the first of two prompts, rather long: more than a block", "second"]
PLAN = "0:k4v2@kivi(sink=3);1:k3v8@token"


@pytest.fixture(scope="module")
def saved(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state") / "saved"
    made = kvjax.generate(tiny, PROMPTS, PLAN, max_new_tokens=33, max_len=128, temperature=0.7, seed=4)
    kvjax.save_state(folder, tiny, made.state)
    return folder


def test_another_process_goes_on_as_if_never_stopped(tiny: Model, saved: Path, goldens: Path) -> None:
    whole = kvjax.generate(tiny, PROMPTS, PLAN, max_new_tokens=48, max_len=128, temperature=0.7, seed=4)
    command = [sys.executable, "-c", OTHER, str(goldens / "llama-linear"), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [tokens[33:] for tokens in whole.tokens]


def test_a_mismatch_is_refused(tiny: Model, saved: Path, goldens: Path, tmp_path: Path) -> None:
    other = kvjax.load(str(goldens / "llama-llama3"), "float32")
    half = kvjax.load(str(goldens / "llama-linear"), "bfloat16")
    for model, cache, said in (
        (other, None, r"made by \S+linear \(checksum \w{8}\); this is \S+llama3 \(checksum \w{8}\)$"),
        (half, None, r"\(dtype float32\); this is .* \(dtype bfloat16\)"),
        (tiny, "k4v4", "holds a cache of 0:k4v2@kivi"),
    ):
        with pytest.raises(kvjax.KvjaxError, match=said):
            kvjax.restore_state(saved, model, cache)
    assert kvjax.restore_state(saved, tiny, PLAN).cache.plan == kvjax.plan(tiny, PLAN)
    with pytest.raises(kvjax.KvjaxError, match="exists already"):
        kvjax.save_state(saved, tiny, kvjax.restore_state(saved, tiny))
    with pytest.raises(kvjax.KvjaxError, match="cannot be read"):
        kvjax.restore_state(tmp_path / "nowhere", tiny)


def test_damage_is_noticed(tiny: Model, saved: Path, tmp_path: Path) -> None:
    """Every file in turn: a flipped byte, a byte less, gone."""
    for i, name in enumerate(file.relative_to(saved) for file in saved.rglob("*") if file.is_file()):
        data = (saved / name).read_bytes()
        middle = len(data) // 2
        for j, bad in enumerate((data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :], data[:-1], None)):
            copy = tmp_path / f"{i}-{j}"
            shutil.copytree(saved, copy)
            (copy / name).unlink() if bad is None else (copy / name).write_bytes(bad)
            if name.name == "state.json" and bad is not None:
                continue  # its last byte is a newline; flips in it are for the fuzzer
            with pytest.raises(kvjax.KvjaxError, match=str(copy)):
                kvjax.restore_state(copy, tiny)


# ---- states that grow


def test_a_state_grows_where_it_must(tiny: Model, saved: Path, goldens: Path) -> None:
    """Gone on from beyond its 128 tokens, here and in another process, it is as if made larger at once."""
    options = {"temperature": 0.7, "seed": 4}
    whole = kvjax.generate(tiny, PROMPTS, PLAN, max_new_tokens=33 + 90, max_len=192, **options)
    state = kvjax.restore_state(saved, tiny)
    rest = kvjax.generate(tiny, ["", ""], state, max_new_tokens=90, **options)
    assert [a + b for a, b in zip([t[:33] for t in whole.tokens], rest.tokens, strict=True)] == whole.tokens
    assert rest.state.max_len == 192 and state.max_len == 128
    program = OTHER.replace("max_new_tokens=15", "max_new_tokens=90, max_len=250")
    command = [sys.executable, "-c", program, str(goldens / "llama-linear"), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == rest.tokens


def test_the_room_has_bounds(tiny: Model, saved: Path) -> None:
    state = kvjax.restore_state(saved, tiny)
    longest = max(state.lengths)
    for options, said in (
        ({"max_new_tokens": 200}, rf"sequence 0 holds {longest} tokens, 0 more and 200 new ones .* model takes 256"),
        ({"max_new_tokens": 60, "max_len": 130}, "max_len is 130"),
        ({"max_new_tokens": 1, "max_len": 64}, "max_len=64; expected 128 to 256"),
    ):
        with pytest.raises(kvjax.KvjaxError, match=said):
            kvjax.generate(tiny, ["", ""], state, **options)


def test_a_state_whose_rope_depends_on_its_room_keeps_it(tiny: Model) -> None:
    rope = RopeConfig(scaling="dynamic", factor=4.0, original_max_positions=64)
    model = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, rope=rope))
    state = kvjax.prefill(model, ["short"], max_len=32)
    options = {"max_new_tokens": 2}
    state = kvjax.generate(model, [""], state, max_len=64, **options).state  # up to 64 tokens the angles are the same
    assert state.max_len == 64
    with pytest.raises(kvjax.KvjaxError, match="room for 64 tokens cannot grow to 128: dynamic rope scaling turns"):
        kvjax.generate(model, [""], state, max_len=128, **options)


def test_going_on_compiles_the_loop_once(tiny: Model, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A restored state is placed on a device by name: a loop that gave it back otherwise would be compiled again."""
    state = kvjax.restore_state(saved, tiny)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        kvjax.generate(tiny, ["", ""], state, max_new_tokens=12, max_len=224, stop_strings="never said")
    compiled = [r.message for r in caplog.records if "Finished XLA compilation of jit(decode_steps)" in r.message]
    assert len(compiled) == 1
