"""Damaged files and odd things that people type: a result or one clear line, in bounded time and memory.

    python -m tests.robustness.fuzz --config=tests/robustness/fuzz_config.py --workdir=DIR

Small files of every kind are made, and one of them is damaged at a time; then every public entry is asked for what
people type (`typed`), and every program given it (`programs`). Prints what ends otherwise, with the seed that repeats
it, and appends one row per kind to DIR/fuzz.jsonl; kinds that are there are not tried again.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from ml_collections import config_dict
from rich.console import Console
from rich.progress import track
from tests.robustness import programs, typed
from tests.robustness.attempts import Kind, attempt
from tokenizers.pre_tokenizers import ByteLevel

from kvjax import records
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints import orbax
from kvjax.checkpoints.gguf import NAMES, ROPE_FACTORS
from kvjax.checkpoints.load import load
from kvjax.errors import KvjaxError
from kvjax.evaluate.text import load_text
from kvjax.experiments import program
from kvjax.models import zoo
from kvjax.models.model import Model
from kvjax.models.params import param_shapes
from kvjax.models.rope import make_rope

OUTCOMES = ("loaded", "refused", "other")
MODEL = dataclasses.replace(zoo.RANDOM["random:llama-2-7b"], layers=30)  # that plans are for
PLAN = "0:k8v8;1-2+29:k4v4@kivi(group=64,residual=128,sink=4);3-28:k4v2@kivi"


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    others, provenance = 0, records.provenance()
    results = workdir / "fuzz.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        for kind in make_kinds(Path(folder), Path(config.models)):
            point = {"experiment": "fuzz", "kind": kind.name, "tried": config.tries}
            row = records.find_row(results, point)
            if row is None:
                row = point | _try(kind, config.tries, config.seconds) | provenance
                records.append_row(results, row)
            print(f"{kind.name:28s}" + "".join(f"{row[outcome]:6d} {outcome}" for outcome in OUTCOMES))
            others += row["other"]
    if others:
        raise KvjaxError(f"{others} inputs were neither taken nor refused with one clear line")


def _try(kind: Kind, tries: int, seconds: float) -> dict[str, Any]:
    """How many of so many damaged inputs ended how, and the longest time that one took."""
    counts = dict.fromkeys(OUTCOMES, 0)
    longest = 0.0
    for seed in track(range(tries), kind.name, console=Console(stderr=True)):
        start = time.perf_counter()
        try:
            outcome = kind.attempt(seed, seconds)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            outcome = "other"
            said = f"{error.__notes__[-1]}: {type(error).__name__}: {error}"
            print(said.encode("ascii", "backslashreplace").decode(), flush=True)
        counts[outcome] += 1
        longest = max(longest, time.perf_counter() - start)
    return counts | {"seconds_max": longest}


# ---- damage


def damage(data: bytes, rng: random.Random, head: int) -> bytes:
    """One to three random changes. head: bytes at the front, sizes and names mostly, that are hit more often."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(CHANGES)(data, rng, head)
    return data


def _place(data: bytes, rng: random.Random, head: int) -> int:
    return rng.randrange(max(1, min(head, len(data)) if rng.random() < 0.8 else len(data)))


def _truncate(data: bytes, rng: random.Random, head: int) -> bytes:
    return data[: _place(data, rng, head)]


def _flip(data: bytes, rng: random.Random, head: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        out[_place(data, rng, head)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _overwrite(data: bytes, rng: random.Random, head: int) -> bytes:
    """A run of equal bytes, or a number that is extreme in its width."""
    at, width = _place(data, rng, head), rng.choice((1, 2, 4, 8))
    number = rng.choice((0, 1, 255, (1 << 8 * width) - 1, 1 << 8 * width - 1, 1 << 8 * width - 2))
    extreme = number.to_bytes(width, "little")
    run = rng.choice((b"\x00" * rng.randint(1, 64), b"\xff" * rng.randint(1, 64), extreme, extreme))
    return data[:at] + run[: len(data) - at] + data[at + len(run) :]


def _remove(data: bytes, rng: random.Random, head: int) -> bytes:
    at = _place(data, rng, head)
    return data[:at] + data[at + rng.randint(1, 64) :]


def _repeat(data: bytes, rng: random.Random, head: int) -> bytes:
    at = _place(data, rng, head)
    end = at + rng.randint(1, 64)
    return data[:end] + data[at:end] * rng.choice((1, 1, 100)) + data[end:]


_LITERAL = re.compile(rb'"[^"\x00-\x1f]*"|-?\d+(?:\.\d+)?(?:e-?\d+)?|true|false|null|\[[^][]*\]')
_PAIR = re.compile(rb'"[^"\x00-\x1f]*":\s*(?:"[^"]*"|[^][{}",]+),')
_LITERALS = (
    *(b"0", b"-1", b"1", b"2", b"3.5", b"65536", b"2147483648", b"18446744073709551616", b"-0.0", b"1e999", b"NaN"),
    *(b"-Infinity", b"9" * 5000, b"0x" + b"f" * 5000, b"true", b"null", b'""', b'"\\ud800"', b'"a\\nb\\u001b"'),
    *(b'"../x"', b'"\\u0000"', b"[]", b"[1]", b'["a", 1]', b"[null]", b"[[]]", b"{}", b'{"a": 1}', b"[" * 50000),
    *(b"2001-99-99", b"!!timestamp x", b"&a [*a]", "\u0663".encode(), b"12:30"),
)


def _literal(data: bytes, rng: random.Random, head: int) -> bytes:
    """Another value, or another of the file's own, for one in a text; in a binary file of the same length."""
    found = list(_LITERAL.finditer(data, 0, min(len(data), 1 << 16)))
    if not found:
        return data
    old, other = rng.choice(found), rng.choice(found)
    new = rng.choice((*_LITERALS, other[0], other[0]))
    if b"\x00" in data:
        new = new[: len(old[0])].ljust(len(old[0]))
    return data[: old.start()] + new + data[old.end() :]


def _unset(data: bytes, rng: random.Random, head: int) -> bytes:
    """One pair of an object less."""
    found = list(_PAIR.finditer(data, 0, min(len(data), 1 << 16)))
    if not found:
        return data
    pair = rng.choice(found)
    return data[: pair.start()] + b" " * len(pair[0]) + data[pair.end() :]


CHANGES = (_truncate, _flip, _flip, _overwrite, _overwrite, _remove, _repeat, _literal, _literal, _literal, _unset)


# ---- attempts


@dataclasses.dataclass(frozen=True)
class Files:
    """A kind of files, of which one is damaged at a time."""

    name: str
    path: Path  # what the loader is given
    loader: Callable[[Path], Any]
    files: tuple[Path, ...]  # that are damaged
    head: int

    def attempt(self, seed: int, seconds: float = 30.0) -> str:
        """`attempt` after the damage of a seed, which is undone; what it raises has a note of the seed."""
        rng = random.Random(f"{self.name} {seed}")
        file = rng.choice(self.files)
        whole = file.read_bytes()
        _replace(file, damage(whole, rng, self.head))
        try:
            return attempt(lambda: self.loader(self.path), seconds, naming=self.path.name)
        except BaseException as error:
            error.add_note(f"{self.name}, seed {seed}: damage to {file.name}")
            raise
        finally:
            _replace(file, whole)


def _replace(file: Path, data: bytes) -> None:
    file.unlink()  # what has mapped the old file keeps it
    file.write_bytes(data)


# ---- inputs


def make_kinds(folder: Path, models: Path) -> list[Kind]:
    """All kinds; what they need is made in an empty folder from HF folders (llama-llama3, qwen3, llama-linear)."""
    return [*make_files(folder, models), *typed.make_kinds(folder, models), *programs.make_kinds(folder, models)]


def make_files(folder: Path, models: Path) -> list[Files]:
    """Small inputs of every kind in an empty folder, from HF folders: llama-llama3 (one file) and qwen3 (shards)."""
    names = (
        "one-file",
        "shards",
        "orbax",
        "model.gguf",
        "preset.yaml",
        "plan.yaml",
        "plan",
        "rows.jsonl",
        "text.txt",
    )
    one, shards, saved, gguf_file, preset, plan_file, plan, rows, text = (folder / name for name in names)
    shutil.copytree(models / "llama-llama3", one)
    shutil.copytree(models / "qwen3", shards)
    words = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": "x"}],
    }
    (shards / "tokenizer_config.json").write_text(json.dumps(words, indent=1))
    (shards / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5]}, indent=1))
    (shards / "chat_template.jinja").write_text("{{ messages }}")
    model = load(str(one), "float32")
    orbax.save(saved, load(str(shards), "float32"))
    write_gguf(gguf_file, model)
    preset.write_text(CachePlan.parse(PLAN, MODEL).preset())
    plan_file.write_text(f"plan: {PLAN}\n")
    plan.write_text(PLAN)
    for number in range(3):
        records.append_row(rows, {"experiment": "fuzz", "number": number, "plan": PLAN, "versions": {"jax": "1.0"}})
    text.write_text("Ein Text, drei Zeilen: ä, ö, ü.\n" * 3, encoding="utf-8")

    def model_kind(path: Path, pattern: str, head: int = 1 << 10) -> Files:
        files = tuple(sorted(file for file in path.rglob(pattern) if file.is_file()))
        return Files(f"{path.name}/{pattern}", path, _load, files, head)

    return [
        model_kind(one, "config.json"),
        model_kind(shards, "config.json"),
        model_kind(one, "tokenizer.json", 1 << 12),
        model_kind(shards, "*_config.json"),
        model_kind(shards, "*.jinja"),
        model_kind(shards, "*.index.json", 1 << 11),
        model_kind(one, "*.safetensors", 1 << 11),
        model_kind(shards, "*.safetensors", 1 << 11),
        model_kind(saved, orbax.METADATA),
        dataclasses.replace(model_kind(saved / "params", "*"), name="orbax/params", path=saved),
        Files("gguf", gguf_file, _load, (gguf_file,), 1 << 12),
        *(
            Files(file.name, file, lambda file: CachePlan.parse(str(file), MODEL), (file,), 1 << 10)
            for file in (preset, plan_file)
        ),
        Files("plan", plan, _parse, (plan,), 1 << 10),
        Files("results", rows, records.read_rows, (rows,), 1 << 10),
        Files("text", text, lambda file: load_text(str(file)), (text,), 1 << 10),
    ]


def _load(path: Path) -> None:
    load(str(path), "float32")


def _parse(path: Path) -> None:
    try:
        CachePlan.parse(path.read_bytes().decode(errors="surrogateescape"), MODEL)
    except KvjaxError as error:
        raise KvjaxError(f"{path.name}: {error}") from None  # a plan's text is in no file


def write_gguf(file: Path, model: Model) -> None:
    """A GGUF file with the metadata of a model of random weights, its tensors in Q8_0, and a tokenizer of bytes."""
    config = model.config
    writer = gguf.GGUFWriter(file, config.family)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    tokens = [*sorted(ByteLevel.alphabet()), "12", "34", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["1 2", "3 4"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{{ messages }}")
    rope = dataclasses.replace(config.rope, original_max_positions=8192)
    plain = dataclasses.replace(rope, scaling="none")
    divisors = make_rope(plain, config.head_dim).inv_freq / make_rope(rope, config.head_dim).inv_freq
    writer.add_tensor(ROPE_FACTORS, divisors.astype(np.float32))
    for path in param_shapes(config):
        weight = np.asarray(model.params[path[0]] if len(path) == 1 else model.params[path[0]][path[1]])
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(NAMES.of(path), quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    program.run(main, str(Path(__file__).with_name("fuzz_config.py")))
