"""Kernels in C++ for the CPU, compiled on first use by the system's compiler and kept in a cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import EXACT, PLANES, Packed

FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wno-psabi",
    "-Wfatal-errors",
)
if platform.machine() == "x86_64":
    FLAGS += ("-mprefer-vector-width=512",)
LEVELS = {  # GCC's and Clang's names for what XLA's limits allow; other limits allow all that the CPU has
    "SSE4_2": "x86-64-v2",
    "AVX": "x86-64-v2",
    "AVX2": "x86-64-v3",
    "AVX512": "x86-64-v4",
    "AVX512_VNNI": "x86-64-v4",
    "AVX512_BF16": "x86-64-v4",
}
SECONDS = 600  # that a compiler may take
HEADERS = Path(__file__).parent  # those that all kernels share


def instruction_limit() -> str | None:
    """The newest vector instructions that XLA may use: "AVX2" with --xla_cpu_max_isa=AVX2 in $XLA_FLAGS.

    Kernels keep to it as well. Returns None where $XLA_FLAGS names no limit.
    """
    named = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    return named[-1].upper() if named else None


@functools.cache
def _failure(source: Path, symbol: str) -> str | None:
    """Builds, loads and registers a function; returns the reason where that fails, and logs it, once."""
    try:
        function = getattr(_load(source), symbol)
        jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(function), platform="cpu")
    except (RuntimeError, AttributeError) as error:  # NotImplementedError is one of the first
        logging.getLogger(__name__).warning("no native kernels: %s", error)
        return str(error)
    return None


def register(source: Path, symbol: str) -> str:
    """Compiles a source file where needed and registers its function with JAX.

    Args:
      source: the C++ file; headers in its folder and in this one belong to it.
      symbol: name of the function.

    Returns:
      The name of the FFI target.

    Raises:
      NotImplementedError: the source cannot be built, kept or loaded here. The first call says so on the log as well.
    """
    reason = _failure(source, symbol)
    if reason is not None:
        raise NotImplementedError(reason)
    return symbol


def check(keys: Packed, values: Packed) -> None:
    """Raises NotImplementedError for tensors that tensor.h does not read side by side."""
    packs = [1 if each.bits == EXACT else each.pack for each in (keys, values)]
    if max(packs) % min(packs):
        raise NotImplementedError(f"packing blocks of {packs[0]} and {packs[1]} tokens; expected multiples")
    if any(each.bits == EXACT and each.planes[0].dtype not in (jnp.float32, jnp.bfloat16) for each in (keys, values)):
        raise NotImplementedError("exact values other than float32 or bfloat16")


def arrays(packed: Packed) -> list[jax.Array]:
    """The arrays of a tensor, in the order in which the C++ reads them."""
    return [a for a in (*packed.planes, packed.scale, packed.zero) if a is not None]


def form(packed: Packed) -> np.ndarray:
    """Describes a tensor for the C++: bits, whether per channel, group, packing block, width of each plane."""
    if packed.bits == EXACT:
        return np.asarray([EXACT, 0, 1, 1, 8], np.int64)
    return np.asarray(
        [packed.bits, packed.per == "channel", packed.group, packed.pack, *PLANES[packed.bits]], np.int64
    )


def _load(source: Path) -> ctypes.CDLL:
    """Loads the library of a source file, from the cache folder or built anew; raises NotImplementedError."""
    compiler = _compiler()
    march = LEVELS.get(instruction_limit() or "", "native")
    command = [*compiler, *FLAGS, f"-march={march}", f"-I{HEADERS}", f"-I{jax.ffi.include_dir()}"]
    library = _folder() / f"{source.stem}-{_key(source, command, _version(compiler))}.so"
    try:
        if not _whole(library):
            _build(source, command, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NotImplementedError(f"{library.parent} cannot keep a library: {error}; set KVJAX_CACHE") from None


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]
    if not named:
        raise NotImplementedError("no C++ compiler: expected g++ or clang++ on the path, or $CXX")
    return named


def _version(compiler: list[str]) -> str:
    return _said([*compiler, "--version"], f"{compiler[0]} does not run")


def _folder() -> Path:
    """Where libraries are kept: in $KVJAX_CACHE where that is set, else in the user's cache folder."""
    own = os.environ.get("KVJAX_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) / "pallas_kernels"


def _key(source: Path, command: list[str], version: str) -> str:
    """A hash of all that the library depends on: sources, command, compiler, C library, headers of JAX, CPU."""
    headers = (file for folder in (HEADERS, source.parent) for file in sorted(folder.glob("*.h")))
    text = b"".join(file.read_bytes() for file in (source, *headers))
    rest = command, version, platform.libc_ver(), jax.__version__, jax.lib.__version__, _cpu()
    return hashlib.sha256(text + repr(rest).encode()).hexdigest()[:16]


def _whole(library: Path) -> bool:
    """Whether a library is there as it was built. A damaged one could end the process when it is loaded."""
    checksum = library.with_suffix(".sha256")
    return library.exists() and checksum.exists() and checksum.read_text() == _checksum(library)


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _build(source: Path, command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        _said([*command, str(source), "-o", str(made)], f"{command[0]} cannot build {source.name}")
        checksum = made.with_suffix(".sha256")
        checksum.write_text(_checksum(made))
        for file in (checksum, made):
            file.replace(library.parent / file.name)


def _said(command: list[str], what: str) -> str:
    """What a command prints; raises NotImplementedError with `what` and its first error where it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (str(getattr(error, "stderr", None) or "") or str(error)).splitlines()
        reason = next((line for line in said if "error" in line), said[0])
        raise NotImplementedError(f"{what}: {reason}") from None


def _cpu() -> str:
    """The features of the CPU, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
