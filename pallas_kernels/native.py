"""Kernels in C++ for the CPU, compiled on first use by the system's compiler and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

FLAGS: tuple[str, ...] = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
if platform.machine() == "x86_64":
    FLAGS += ("-mprefer-vector-width=512",)


@functools.cache
def register(source: Path, symbol: str) -> str:
    """Compiles a source file where needed and registers its function with JAX.

    Args:
      source: the C++ file; headers in the same folder belong to it.
      symbol: name of the function.

    Returns:
      The name of the FFI target.

    Raises:
      NotImplementedError: there is no compiler, or the source does not compile.
    """
    library = ctypes.CDLL(str(_build(source)))
    jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return symbol


def _build(source: Path) -> Path:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        raise NotImplementedError("no C++ compiler: expected g++ or clang++ on the path, or $CXX")
    command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}"]
    # The name is a hash of everything that the library depends on: sources, command, version of JAX, CPU.
    text = b"".join(file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h"))))
    parts = (text, repr(command).encode(), jax.__version__.encode(), _cpu().encode())
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pallas_kernels"
    library = folder / name
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            try:
                subprocess.run([*command, str(source), "-o", str(made)], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = str(getattr(error, "stderr", "") or error).splitlines()
                reason = next((line for line in said if "error" in line), said[0])
                raise NotImplementedError(f"{compiler} cannot build {source.name}: {reason}") from None
            made.replace(library)
    return library


def _cpu() -> str:
    """The features of the CPU, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
