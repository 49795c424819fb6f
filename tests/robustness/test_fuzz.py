"""Damaged inputs are loaded or refused with one clear line; `tests.robustness.fuzz` tries many more."""

import dataclasses
import functools
import json
import shutil
import signal
import struct
import time

import numpy as np
import pytest
from gguf import GGUFValueType
from ml_collections import config_dict
from safetensors.numpy import load_file, save_file
from tests.robustness import attempts, fuzz, programs, typed
from tests.robustness.attempts import OutOfBounds, attempt

from kvjax import records
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints import orbax
from kvjax.checkpoints.gguf_reader import read_gguf
from kvjax.checkpoints.load import load
from kvjax.errors import LONGEST, KvjaxError
from kvjax.models import zoo

TRIES = 80


@pytest.fixture(scope="module")
def kinds(goldens, tmp_path_factory):
    return {kind.name: kind for kind in fuzz.make_files(tmp_path_factory.mktemp("inputs"), goldens)}


def test_damaged(kinds):
    """A few seeds of every kind; what is not damaged loads."""
    for kind in kinds.values():
        whole = functools.partial(kind.loader, kind.path)
        assert attempt(whole) == "loaded", kind.name
        assert "refused" in {kind.attempt(seed) for seed in range(TRIES)}, kind.name
        assert attempt(whole) == "loaded", kind.name


def test_typed(goldens, tmp_path, quick_compilation):
    """A few seeds of what people type."""
    for kind in typed.make_kinds(tmp_path, goldens):
        tries = 8 if kind.name == "chat templates" else 30
        assert "refused" in {kind.attempt(seed) for seed in range(tries)}, kind.name


def test_programs(goldens, tmp_path, quick_compilation):
    """A few seeds of what people type on command lines; seed 0 may start a process."""
    for kind in programs.make_kinds(tmp_path, goldens):
        assert "refused" in {kind.attempt(seed) for seed in range(1, 21)}, kind.name


def test_ends_of_programs():
    with pytest.raises(KvjaxError, match="error: it is bad"):
        programs.judge(2, "a warning\nerror: it is bad\n")
    for code, said in ((1, "error: x"), (2, "x"), (2, "error: x\nerror: y"), (2, "Traceback\nerror: x"), (2, "")):
        with pytest.raises(OutOfBounds, match="exit"):
            programs.judge(code, said)


def test_experiment(goldens, tmp_path, kinds, monkeypatch):
    monkeypatch.setattr(fuzz, "make_kinds", fuzz.make_files)
    fuzz.main(config_dict.create(models=str(goldens), tries=2, seconds=20.0), tmp_path)
    rows = records.read_rows(tmp_path / "fuzz.jsonl")
    assert [row["kind"] for row in rows] == list(kinds)
    assert all(row["loaded"] + row["refused"] == row["tried"] == 2 and row["other"] == 0 for row in rows)
    assert {"experiment", "seconds_max", "device", "versions", "git"} <= set(rows[0])


# ---- what an attempt lets through, and what it does not


def test_attempt(kinds, monkeypatch):
    def refuse():
        raise KvjaxError("the file is bad")

    assert attempt(lambda: 1) == "loaded"
    assert attempt(refuse, naming="file") == "refused"
    with pytest.raises(OutOfBounds, match="does not name text: the file is bad"):
        attempt(refuse, naming="text")
    with pytest.raises(OutOfBounds, match="took more than"):
        attempt(lambda: time.sleep(20), seconds=0.1)
    monkeypatch.setattr(attempts, "_peak", iter([0, 1 << 40]).__next__)
    with pytest.raises(OutOfBounds, match="took 1048576 MiB"):
        attempt(lambda: 1)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    whole = kinds["text"].path.read_bytes()
    broken = dataclasses.replace(kinds["text"], loader=lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        broken.attempt(3)
    assert caught.value.__notes__ == ["text, seed 3: damage to text.txt"]
    assert kinds["text"].path.read_bytes() == whole


def test_messages_are_one_printable_line():
    line = str(KvjaxError("a\nb\x1b[31m\ud800é" + "x" * 9999 + " expected y"))
    assert line.startswith(r"a\nb\x1b[31m\ud800éxxx") and line.endswith("xxx expected y")
    assert line.isprintable() and len(line) <= LONGEST


# ---- what random damage seldom finds


def refused(path, message):
    with pytest.raises(KvjaxError, match=message) as caught:
        load(str(path), "float32")
    assert str(path) in str(caught.value)


@pytest.fixture
def folder(goldens, tmp_path):
    return shutil.copytree(goldens / "llama-linear", tmp_path / "model")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000; expected a whole number from 1 to 65535"),
        ("num_hidden_layers", 9999, "9999 layers, but there are"),
        ("num_hidden_layers", 2.5, r"num_hidden_layers is 2\.5; expected a whole number"),
        ("num_attention_heads", 0, "num_attention_heads is 0; expected a whole number"),
        ("num_attention_heads", -4, "num_attention_heads is -4; expected a whole number"),
        ("num_attention_heads", "4", "num_attention_heads is '4'; expected a whole number"),
        ("num_key_value_heads", 3, "num_attention_heads is 4; expected a multiple of num_key_value_heads, 3"),
        ("head_dim", 15, "head_dim is 15; expected an even number"),
        ("vocab_size", 2**31, "vocab_size is 2147483648; expected"),
        ("hidden_size", True, "hidden_size is True; expected"),
        ("max_position_embeddings", float("inf"), "max_position_embeddings is inf; expected"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan; expected a positive number"),
        (
            "rope_parameters",
            {"rope_theta": 0.5, "rope_type": "linear", "factor": 0},
            "factor of rope_parameters is 0; expected",
        ),
        (
            "rope_parameters",
            {"rope_theta": 10**400},
            "rope_theta of rope_parameters is 10+[.]+0+; expected a positive number",
        ),
        ("rope_parameters", [1], r"rope_parameters is \[1\]; expected an object"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no'; expected true or false"),
        ("eos_token_id", [-1], r"ids of bos and eos are .*; expected token ids"),
        ("bos_token_id", {}, r"ids of bos and eos are .*; expected token ids"),
    ],
)
def test_config_values(folder, field, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    refused(folder, message)


def test_hf_folders(folder, goldens, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"].astype(np.int32)}, folder / "model.safetensors")
    refused(folder, r"tensor lm_head\.weight is I32; expected one of F32")
    (folder / "config.json").write_text("[" * 100000)
    refused(folder, r"config\.json is not JSON")
    shards = shutil.copytree(goldens / "qwen3", tmp_path / "shards")
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    shutil.copy(shards / "model-00002-of-00004.safetensors", shards / "again.safetensors")
    for name, message in (
        ("again.safetensors", "which another file has too"),
        ("../shards/again.safetensors", "expected a weight_map from tensors to files of that folder"),
        (5, "expected a weight_map"),
    ):
        index["weight_map"]["lm_head.weight"] = name
        (shards / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(shards, message)


def test_tokenizers(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    file.write_text(json.dumps(content | {"truncation": cut, "padding": fill | {"pad_to_multiple_of": None}}))
    assert len(load(str(folder)).tokenizer.encode("abcd")) == 4  # neither cut nor filled, which would need 4 TB
    file.write_text(json.dumps(content | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}))
    refused(folder, r"tokenizer\.json is not a tokenizer")  # the library panics


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def field(key, kind, data):
    return string(key) + struct.pack("<I", kind) + data


def array(kind, count):
    return field("a", V.ARRAY, struct.pack("<IQ", kind, count))


def write_tensor(file, version=3, tensors=1, fields=0, metadata=b"", dims=(1,), kind=0, offset=0):
    """A GGUF file of one tensor `x`, a float32 of 2."""
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + metadata + string("x")
    head += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    file.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\x00") + struct.pack("<f", 2))


V = GGUFValueType
ALIGNED = field("general.alignment", V.UINT32, struct.pack("<I", 32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"version": 3 << 24}, "version is 50331648; expected 2 or 3, little-endian"),
        ({"tensors": 1 << 63}, "bytes are wanted at byte"),
        ({"fields": 1 << 63, "metadata": ALIGNED}, "is there twice|is not a valid GGUFValueType"),
        ({"fields": 2, "metadata": ALIGNED * 2}, "metadata general.alignment is there twice"),
        ({"fields": 1, "metadata": ALIGNED.replace(b" \x00", b"!\x00")}, "is 33; expected a power of two"),
        (
            {"fields": 1, "metadata": field("a", V.STRING, struct.pack("<Q", 1 << 62))},
            "4611686018427387904 bytes are",
        ),
        ({"fields": 1, "metadata": field("a", V.STRING, struct.pack("<QB", 1, 255))}, "can't decode"),
        ({"fields": 1, "metadata": array(V.UINT8, 1 << 62)}, "4611686018427387904 bytes are"),
        ({"fields": 1, "metadata": array(V.STRING, 1 << 62)}, "bytes are wanted"),
        ({"fields": 1, "metadata": array(V.ARRAY, 1)}, "array of ARRAY, which is not supported"),
        ({"dims": (1 << 62, 4)}, "tensor x ends at byte"),
        ({"dims": (0, 1 << 62)}, r"tensor x has dims \[0, 4611686018427387904\]; expected"),
        ({"dims": (33,), "kind": 8}, "expected up to 4, rows of whole Q8_0 blocks"),
        ({"dims": (1,) * 5}, "expected up to 4"),
        ({"kind": 99}, "99 is not a valid GGMLQuantizationType"),
        ({"offset": (1 << 64) - 32}, "tensor x ends at byte"),
    ],
)
def test_gguf_headers(tmp_path, damage, message):
    file = tmp_path / "model.gguf"
    write_tensor(file, fields=1, metadata=ALIGNED)
    metadata, tensors = read_gguf(file)
    assert metadata == {"general.alignment": 32} and tensors["x"].rows.view(np.float32).tolist() == [2]
    write_tensor(file, **damage)
    refused(file, message)


def test_orbax_folders(goldens, tmp_path):
    folder = tmp_path / "saved"
    orbax.save(folder, load(str(goldens / "qwen3"), "float32"))
    largest = max((folder / "params").rglob("*"), key=lambda file: file.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(folder, f"{largest.name} is damaged; expected the file whose sha256 was noted at saving")
    largest.unlink()
    refused(folder, f"{largest.name} is missing")
    largest.write_bytes(whole)
    (folder / "params" / "more").touch()
    refused(folder, "more is new")
    (folder / "params" / "more").unlink()
    load(str(folder))
    metadata = json.loads((folder / orbax.METADATA).read_text())
    for key, value in (("params", None), ("config", None), ("config", {**metadata["config"], "window": 1.5})):
        (folder / orbax.METADATA).write_text(json.dumps(metadata | {key: value}))
        refused(folder, "expected|missing|is not one that kvjax wrote")


@pytest.mark.parametrize(
    "text",
    [
        "l0: &l0 {x: 1}\n" + "".join(f"l{i + 1}: &l{i + 1} {{<<: [*l{i}, *l{i}]}}\n" for i in range(40)),
        "[" * 50000,
        "!!timestamp x",
        "2001-99-99",
        f"0x{'f' * 5000}: {{nbits_key: 4, nbits_value: 4}}",
        f"0: {{nbits_key: 0x{'f' * 5000}, nbits_value: 4}}",
        f"plan: k{'9' * 5000}v4",
        "plan: k7v4",
    ],
)
def test_plan_files(tmp_path, text):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    assert attempt(lambda: CachePlan.parse(str(file), zoo.RANDOM["random:llama-2-7b"])) == "refused"


@pytest.mark.parametrize("text", ["k{}v4", "{}:k4v4", "0-{}:k4v4", "k4v4(sink={})", "a\x00{}.yaml"])
def test_plans_with_long_numbers(text):
    with pytest.raises(KvjaxError):
        CachePlan.parse(text.format("9" * 5000), zoo.RANDOM["random:llama-2-7b"])
