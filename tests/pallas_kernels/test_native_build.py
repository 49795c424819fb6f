"""Building, keeping and loading C++ kernels: whatever fails, the caller learns why, and the log says so once."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kvjax.ops import attention, dispatch, store
from pallas_kernels import native
from pallas_kernels.packed_attention.native import SOURCE

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="another device's")


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A small source file, and an empty cache folder for its library."""
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "small.cc"
    file.write_text('extern "C" int answer() { return 42; }\n')
    return file


def compiler(folder: Path, script: str) -> str:
    """A compiler that runs a script."""
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def reason(source: Path) -> str:
    with pytest.raises(NotImplementedError) as error:
        native._load(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "pallas_kernels").glob("*.so"))


def test_a_library_is_built_once_and_kept_where_the_cache_is(source: Path, tmp_path, monkeypatch) -> None:
    assert native._load(source).answer() == 42
    [library] = kept(tmp_path)
    before = library.stat().st_mtime_ns
    monkeypatch.setattr(native, "_build", None)
    assert native._load(source).answer() == 42 and library.stat().st_mtime_ns == before


@pytest.mark.parametrize("harm", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[::-1]])
def test_a_damaged_library_is_built_anew(source: Path, tmp_path, harm) -> None:
    native._load(source)
    [library] = kept(tmp_path)
    data = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes(harm(data))
    assert native._load(source).answer() == 42 and len(library.read_bytes()) == len(data)


def test_a_library_belongs_to_its_compiler_c_library_and_headers(source: Path, monkeypatch) -> None:
    def key(command=("g++",), version="12") -> str:
        return native._key(source, list(command), version)

    keys = {key(), key(version="11"), key(command=("g++", "-O2"))}
    monkeypatch.setattr(native.platform, "libc_ver", lambda: ("glibc", "2.0"))
    keys.add(key())
    (source.parent / "more.h").write_text("// a header\n")
    keys.add(key())
    assert len(keys) == 5


FAILING = {
    r"no C\+\+ compiler": lambda folder: {"PATH": str(folder)},
    r"nowhere-g\+\+ does not run": lambda folder: {"CXX": "nowhere-g++"},
    "cannot build small.cc: small.cc:1: error: no such thing": lambda folder: {
        "CXX": compiler(folder, 'test "$1" = --version || { echo "small.cc:1: error: no such thing" >&2; exit 1; }')
    },
    "cannot build small.cc: .* returned non-zero exit status 1": lambda folder: {
        "CXX": compiler(folder, 'test "$1" = --version')
    },
    "cannot keep a library: .*; set KVJAX_CACHE": lambda folder: {"KVJAX_CACHE": str(folder / "small.cc")},
}


@pytest.mark.parametrize("message", FAILING)
def test_what_fails_is_one_line(source: Path, tmp_path, monkeypatch, message: str) -> None:
    for name, value in FAILING[message](tmp_path).items():
        monkeypatch.setenv(name, value)
    if "no C" in message:
        monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NotImplementedError, match=message):
        native._load(source)
    assert reason(source)


def test_a_compiler_that_makes_no_library(source: Path, tmp_path, monkeypatch) -> None:
    """It says that all is well and writes something else, or nothing."""
    script = 'test "$1" = --version && exit; for last; do :; done; echo garbage > "$last"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    assert "cannot keep a library" in reason(source)
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 0"))
    assert "cannot keep a library" in reason(source)


def test_a_compiler_that_never_ends(source: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(native, "SECONDS", 0.3)
    monkeypatch.setenv("CXX", compiler(tmp_path, 'test "$1" = --version || exec sleep 60'))
    assert "timed out" in reason(source)


def test_attention_falls_back_and_says_so_once(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 1"))
    native._failure.cache_clear()
    keys = store.exact(jnp.ones((1, 1, 8, 8)))
    span = attention.Span(jnp.full((1, 1), 7), 0, jnp.full(1, 8), None)
    try:
        with dispatch.fresh_reasons(), caplog.at_level(logging.WARNING):
            for _ in range(2):
                output, _ = attention.attend_packed(jnp.ones((1, 1, 1, 8)), span, keys, keys)
            [noted] = dispatch.reasons()
    finally:
        native._failure.cache_clear()
    assert float(jnp.abs(output - 1).max()) < 1e-6
    assert noted.implementation == "native" and "does not run" in noted.text
    [line] = caplog.messages
    assert line == f"no native kernels: {noted.text}"


@pytest.mark.skipif(native.platform.machine() != "x86_64", reason="flags of x86-64")
def test_a_cpu_without_avx2_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx2"))
    assert "expected a CPU with AVX2" in reason(SOURCE)


@pytest.mark.skipif(native.platform.machine() != "x86_64", reason="flags of x86-64")
def test_kernels_keep_to_the_instructions_that_xla_is_held_to(source: Path, monkeypatch) -> None:
    """The CPU does not matter: a library is built, not run."""
    command = []
    monkeypatch.setattr(native, "_build", lambda source, built, library: command.extend(built))
    for flags, march in [
        ("--xla_cpu_max_isa=AVX2", "x86-64-v3"),
        ("--xla_cpu_max_isa=SSE4_2 --xla_cpu_max_isa=avx512", "x86-64-v4"),
        ("--xla_cpu_max_isa=AMX", "native"),
        ("--xla_dump_to=x", "native"),
    ]:
        command.clear()
        monkeypatch.setenv("XLA_FLAGS", flags)
        with pytest.raises(NotImplementedError):  # nothing was built that could be loaded
            native._load(source)
        assert [each for each in command if each.startswith("-march")] == [f"-march={march}"]
