"""What people type on command lines: every program ends with a result, or with one line and exit 2."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from absl import flags
from tests.robustness import odd
from tests.robustness.attempts import OutOfBounds, attempt

from kvjax.errors import KvjaxError
from kvjax.experiments import aot_cuda, program
from kvjax.models.decoder import Decoder
from kvjax.tuner.simulate import Simulator

DEFAULTS = {  # of every program that takes a model of one's own, or none: quick ones
    "perplexity": ("model=tiny", "text=text.txt", "caches=dense,k4v4@token", "context=16", "windows=2"),
    "generate": ("model=tiny", "cache=k4v4@token", "prompt=the quick brown fox", "max_new_tokens=8"),
    "tune": (
        "model=tiny",
        "text=text.txt",
        "candidates=k8v8@token,k4v4@token",
        "budget=6.0",
        "context=64",
        "windows=1",
    ),
    "throughput": ("models=tiny", "caches=dense", "points=1x64", "heads=4/2x32", "pairs=k4v4@token", "ops=1x256"),
    "tune_kernels": ("heads=4/2x32", "pairs=k4v4@token", "points=1x256"),
    "aot": ("ops=packed_attention", "bits=4/4"),
    "aot_cuda": ("ops=packed_attention", "bits=4/4"),
    "agreement": ("model=tiny", "caches=k4v4@token", "max_new_tokens=2"),
    "algebra": ("models=tiny", "text=text.txt", "caches=k4v4@token", "tokens=16", "chunk=8"),
    "closed_loop": ("model=tiny", "text=text.txt", "tokens=16"),
    "evaluate": ("model=tiny", "tasks=gsm8k(data=problems,shots=1,tokens=4)", "caches=k4v4@token"),
    "layers": ("model=tiny", "text=text.txt", "caches=k4v4@token", "context=16"),
    "positions": ("model=tiny", "text=text.txt", "caches=k4v4@token", "context=16", "parts=2"),
    "decode": ("model=tiny", "text=text.txt", "caches=k4v4@token", "depth=16", "max_len=32", "steps=2"),
    "protocols": ("model=tiny", "text=text.txt", "caches=k4v4@token", "lengths=16,9"),
    "plans": ("model=tiny", "text=text.txt", "judged_on=other.txt", "context=16"),
    "searches": ("model=tiny", "text=text.txt", "judged_on=other.txt", "context=16"),
}
WHOLE = ("generate", "perplexity")  # run to their end one time in ten, the others up to where the work begins
NUMBERS = (
    *("0", "1", "1", "2", "2", "3", "7", "16", "-1", "64", "300", "65536", "1000000000", "9" * 30, "9" * 5000, "0.5"),
    *("1.0", "1.5", "-0.0", "1e-320", "1e300", "1e400", "nan", "inf", "-inf", "True", "false"),
)
WORDS = (
    *("dense", "k4v4@token", "0:k4v4;1:k8v8", "xcl3", "plan.yaml", "float64", "bfloat16", "streaming", "parallel"),
    *("nsga2", "kld", "gsm8k", "token", "none", "all", "tiny", "text.txt", "nowhere", "32/8x128", "1x64,8x0", "4/2"),
    *NUMBERS,
    *("0x10", "1_000", "None", "[1, 2]", "('a',)", "{'a': 1}", "''"),
    *(",", "a,,b", "=", "--config.seed=1", "@", ";", "(", "random:tiny", "org/name", "/", ".", "~", "*", "$HOME"),
)
FORMS = ("--config.{}={}", "--config.{}={}", "-config.{}={}", "--config.{}", "--noconfig.{}", "--config.{}[0]={}")
STRAY = (
    "--frob=1",
    "--config=nowhere.py",
    "--config",
    "-",
    "--",
    "---",
    "--config.=1",
    "--config.a.b=1",
    "--flagfile=a",
)


class Started(BaseException):
    """All was checked, and the work began."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One kind of command lines.

    Attributes:
      name: in result rows.
      folder: where programs run; it holds the model `tiny`, `text.txt`, `other.txt` and `problems`.
      draw: draws a program's name and its arguments beside DEFAULTS.
      processes: one line in so many is given to a process of its own, as bytes.
    """

    name: str
    folder: Path
    draw: Callable[[random.Random], tuple[str, list[str]]]
    processes: int | None = None

    def attempt(self, seed: int, seconds: float = 30.0) -> str:
        """`attempts.attempt` at the command line of a seed; what it raises has a note of both."""
        rng = random.Random(f"{self.name} {seed}")
        name, arguments = self.draw(rng)
        whole = name in WHOLE and rng.random() < 0.1
        begins = contextlib.nullcontext if whole else _stopping
        if self.processes and seed % self.processes == 0:
            call, begins = functools.partial(_run_process, name, arguments), contextlib.nullcontext
            seconds *= 4  # it starts Python and compiles
        else:
            call = functools.partial(_run_here, name, arguments)
        try:
            with contextlib.chdir(self.folder), mock.patch.dict(os.environ, _alone(self.folder)), begins():
                return attempt(call, seconds)
        except BaseException as error:
            error.add_note(f"{self.name}, seed {seed}: {name} {arguments}"[:800])
            raise
        finally:
            jax.config.update("jax_enable_x64", False)  # as programs leave it
            for left in set(self.folder.iterdir()) - {
                self.folder / kept for kept in ("tiny", "text.txt", "other.txt", "problems")
            }:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def make_kinds(folder: Path, models: Path) -> list[Program]:
    """The kinds, in a folder deep enough that ../ stays within `folder`; llama-linear is one of the HF folders."""
    inner = folder.joinpath("programs", *"abcdef")
    shutil.copytree(models / "llama-linear", inner / "tiny")
    (inner / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (inner / "other.txt").write_text("pack my box with five dozen liquor jugs, said he; " * 20)
    (inner / "problems").mkdir()
    for name in ("train", "test"):
        (inner / f"problems/{name}.jsonl").write_text('{"question": "2 + 3?", "answer": "#### 5"}\n')
    return [
        Program("config values", inner, _draw_values),
        Program("command lines", inner, _draw_lines, processes=40),
    ]


# ---- command lines


def _draw_values(rng: random.Random) -> tuple[str, list[str]]:
    """One to three fields have odd values."""
    name = rng.choice((*DEFAULTS, *WHOLE, *WHOLE))
    fields = fields_of(name)
    drawn = rng.choices(sorted(fields), k=rng.choice((1, 1, 2, 3)))
    numbers = [field for field in drawn if isinstance(fields[field], int | float) and rng.random() < 0.7]
    return name, [f"--config.{field}={rng.choice(NUMBERS) if field in numbers else _value(rng)}" for field in drawn]


def _draw_lines(rng: random.Random) -> tuple[str, list[str]]:
    """Fields and flags of odd forms with texts that need not be UTF-8."""
    name = rng.choice(("generate", "generate", "perplexity", "tune"))
    arguments = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        field = rng.choice((*sorted(fields_of(name)), "prompt", "text", "cache", _value(rng)))
        form = rng.choice((*FORMS, *STRAY[:1], _value(rng).replace("{", "").replace("}", "")))
        arguments.append(rng.choice((form.format(field, _value(rng)), rng.choice(STRAY))))
    return name, arguments


def _value(rng: random.Random) -> str:
    """A word or a text, as a shell may hand it over: without NUL, its bytes not always UTF-8."""
    drawn = rng.choice((rng.choice(WORDS), rng.choice(WORDS), odd.text(rng)[:5000]))
    some = (
        drawn.encode("utf-8", "surrogatepass")
        if rng.random() < 0.5
        else bytes(rng.randbytes(4)) + drawn[:9].encode(errors="replace")
    )
    return os.fsdecode((some if rng.random() < 0.3 else drawn.encode("utf-8", "replace")).replace(b"\x00", b""))


@functools.cache
def fields_of(name: str) -> dict[str, Any]:
    """The fields of a program's config, with their defaults."""
    return importlib.import_module(f"kvjax.configs.{name}").get_config().to_dict()


# ---- running them


def _run_here(name: str, arguments: list[str]) -> None:
    """Parses and runs in this process. Raises KvjaxError where the program ended with one line and exit 2."""
    values, said = flags.FlagValues(), io.StringIO()
    argv = [name, *(f"--config.{field}" for field in DEFAULTS[name]), *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            program.parse(program.PACKAGE / f"configs/{name}.py", argv, values)
            program.answer(importlib.import_module(f"kvjax.experiments.{name}").main, values.config, "out")
    except Started:
        return
    except SystemExit as end:
        judge(end.code, said.getvalue())


def _run_process(name: str, arguments: list[str]) -> None:
    """The same in a process, as a shell would start it."""
    command = [sys.executable, "-m", f"kvjax.experiments.{name}"]
    fields = [f"--config.{field}" for field in DEFAULTS[name]]
    given = [os.fsencode(each) for each in (*command, *fields, "--workdir=out", *arguments)]
    environment = os.environ | {"PYTHONPATH": str(program.PACKAGE.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(given, env=environment, capture_output=True, check=False)
    if done.returncode:
        judge(done.returncode, done.stderr.decode(errors="replace"))


def judge(code: Any, said: str) -> None:
    """Raises KvjaxError of the line that a program ended with, and OutOfBounds for any other end."""
    lines = [line for line in said.splitlines() if line.strip()] or [""]
    errors = [line for line in lines if line.startswith("error: ")]
    if code != 2 or errors != lines[-1:] or any("Traceback" in line for line in lines):
        raise OutOfBounds(f"exit {code}, {len(errors)} error lines; the last line is {lines[-1][:300]!r}")
    raise KvjaxError(lines[-1])


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Programs stop where they would trace a model or compile."""

    def start(*_: Any, **__: Any) -> None:
        raise Started

    compiles = (Decoder, "__call__"), (jax.stages.Lowered, "compile"), (Simulator, "__init__"), (aot_cuda, "Compiler")
    with contextlib.ExitStack() as stack:
        for place in compiles:
            stack.enter_context(mock.patch.object(*place, start))
        yield


def _alone(folder: Path) -> dict[str, str]:
    """An environment without a network and with a cache folder of its own."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    return offline | {"HF_HOME": str(folder / "hub"), "KVJAX_CACHE": str(folder / "fetched")}
