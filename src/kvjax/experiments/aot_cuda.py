"""Compiles the GPU kernels for devices that are not there: what is legal, what fits registers, what spills, how many
blocks a multiprocessor holds, and what the main loop loads how far ahead.

    kvjax aot_cuda --workdir=DIR

Needs jax[cuda13] and nvdisasm, but neither GPU nor driver. Appends a row per op, setting and target to
DIR/aot-cuda.jsonl and prints a table. What is there already is not compiled again. Some refusals of the compiler end
its process: it runs in one of its own, which is then started anew.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.errors import KvjaxError
from kvjax.experiments import bars, program, sass
from kvjax.experiments.aot_cases import SHAPE, Case, Kernels, cases
from kvjax.files import brief
from kvjax.ops import attention, dispatch
from pallas_kernels import gpu_layout
from pallas_kernels.packed_attention import jax_triton
from pallas_kernels.packed_attention import triton as packed_attention
from pallas_kernels.quantize_pack import triton as quantize_pack
from pallas_kernels.remat_attention import triton as remat_attention


@dataclasses.dataclass(frozen=True)
class Device:
    """Facts of a GPU, as its vendor's data sheets have them."""

    name: str
    capability: tuple[int, int]
    accelerated: bool  # has features of this capability alone
    cores: int
    lanes: int  # of a core, float32
    memory: int  # bytes
    bandwidth: int  # bytes a second
    l2: int
    clock: float  # GHz
    shared: int  # bytes a block may have
    shared_core: int  # bytes of a core

    @property
    def architecture(self) -> str:
        return "sm_{}{}".format(*self.capability) + ("a" if self.accelerated else "")

    def config(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        feature = "feature_extension: ACCELERATED_FEATURES" if self.accelerated else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared}
              shared_memory_per_core: {self.shared_core}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} device_memory_size: {self.memory}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_address_bits: 64
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} {feature} }}
              driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


TARGETS = {
    "a100": Device("A100", (8, 0), False, 108, 64, 40 << 30, 1_555 * 10**9, 40 << 20, 1.41, 166_912, 167_936),
    "h100": Device("H100", (9, 0), True, 132, 128, 80 << 30, 3_350 * 10**9, 50 << 20, 1.98, 232_448, 233_472),
    "b200": Device("B200", (10, 0), True, 148, 128, 180 << 30, 8_000 * 10**9, 126 << 20, 1.965, 232_448, 233_472),
}


def kernels_of(target: str) -> Kernels:
    """jax-triton asks a device what it can do, unless it is told."""
    major, minor = _device(target).capability
    of_packed: dict[str, Callable] = {
        "packed_attention": packed_attention.packed_attention,
        "packed_attention_jax_triton": functools.partial(
            jax_triton.packed_attention, compute_capability=10 * major + minor
        ),
    }
    others = quantize_pack.quantize_pack, remat_attention.remat_attention, remat_attention.reconstruct
    return Kernels("triton", of_packed, *others, {}, _own_tokens)


def _own_tokens(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None) -> attention.Partial:
    """Causal attention, which is XLA's on GPUs."""
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    with dispatch.using(causal_attention="xla"):
        return attention.attend_exact(q, positions, k, v, positions, window)


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    targets = split_list(config.targets)
    for target in targets:
        _device(target)
    results = workdir / "aot-cuda.jsonl"
    shape = {name: config[name] for name in SHAPE}
    todo = [
        (target, case, {"experiment": "aot_cuda", "target": target, **shape, **case.point})
        for target in targets
        for case in cases(config, kernels_of(target))
    ]
    missing = [entry for entry in todo if records.find_row(results, entry[2]) is None]
    with Compiler() as compiler:
        for target, case, point in bars.track(missing, "compile"):
            figures = compiler.compile_for(target, case)
            records.append_row(results, point | figures | records.provenance())
    Console(width=140).print(_table([row for entry in todo if (row := records.find_row(results, entry[2]))]))


class Compiler:
    """A process that compiles, one thing after another, and is replaced where that ends it."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def compile_for(self, target: str, case: Case) -> dict[str, Any]:
        """What a case, whose function can be pickled, compiles to for a target.

        Returns:
          compiled; if it is, kernels (each with name, registers, spill_stores, spill_loads and shared_memory; ours
          also with threads, resident and what `sass.figures` gives), seconds and argument, output, alias and temp
          bytes; otherwise error.
        """
        _device(target)
        if self._process is None:
            self._begin()
        try:
            self._connection.send((target, case))
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self._end()
            return {"compiled": False, "error": f"the compiler ended its process with {code}"}

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        dump = tempfile.TemporaryDirectory(prefix="aot-cuda-")
        # They are read once, at the latest when jax starts; without the first, the plugin looks for a driver.
        settings = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_dump_to={dump.name} --xla_dump_hlo_as_text",
            "JAX_TRITON_DUMP_DIR": f"{dump.name}/jax_triton",
        }
        with mock.patch.dict(os.environ, settings):
            self._process = context.Process(target=_serve, args=(theirs, Path(dump.name)), daemon=True)
            self._process.start()
        self._dump = dump
        theirs.close()

    def _end(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.join()
            self._dump.cleanup()
            self._process = None


def _serve(connection: Connection, dump: Path) -> None:
    while True:
        try:
            target, case = connection.recv()
        except EOFError:
            return
        try:
            figures = _compile(target, case, dump)
        except Exception as error:  # the compiler raises many kinds
            figures = {"compiled": False, "error": brief(error)}
        connection.send(figures)


def _compile(target: str, case: Case, dump: Path) -> dict[str, Any]:
    for entry in dump.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    device = TARGETS[target]
    topology = topologies.get_topology_desc(target, "cuda", target_config=device.config(), topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])
    shaped = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), case.arguments)
    began = time.perf_counter()
    here = mock.patch.object(gpu_layout, "device", lambda: topology.devices[0])
    with here, mock.patch.object(jax, "default_backend", lambda: "gpu"):
        compiled = jax.jit(case.function, donate_argnums=case.donated).lower(*shaped).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    shared = dict(re.findall(r"(\S+) grid: .*shared_memory: (\d+)", _read(dump.glob("*thunk_sequence.txt"))))
    shared |= dict(re.findall(r"(\S+): shared_mem_bytes: (\d+)", _read(dump.rglob("*.compile_info"))))
    kernels = [
        _with_loop(kernel | {"shared_memory": int(shared.get(kernel["name"], 0))}, ptx, device, _elements(case))
        for ptx in sorted(dump.rglob("*.ptx"))
        for kernel in _resources(ptx, device.architecture)
    ]
    return {
        "compiled": True,
        "kernels": kernels,
        "seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def _read(files: Iterator[Path]) -> str:
    return "".join(file.read_text() for file in files)


def _resources(ptx: Path, architecture: str) -> list[dict[str, Any]]:
    """Registers and spilled bytes of each kernel of a file, by the assembler's word."""
    if not ptx.stat().st_size:
        return []
    command: list[Any] = [_tool("ptxas"), "-v", "-arch", architecture, ptx, "-o", ptx.with_suffix(".cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = re.findall(r"Compiling entry function '(\w+)'", text)
    registers = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    return [
        {"name": name, "registers": int(used), "spill_stores": int(stores), "spill_loads": int(loads)}
        for name, used, (stores, loads) in zip(names, registers, spills, strict=True)
    ]


def _ours(kernel: dict[str, Any]) -> bool:
    """Whether a kernel is not XLA's own."""
    return kernel["name"].endswith("_kernel")


def _with_loop(kernel: dict[str, Any], ptx: Path, device: Device, elements: int | None) -> dict[str, Any]:
    """Adds to a kernel of ours its threads, how many blocks a multiprocessor holds, and figures of its main loop."""
    if not _ours(kernel):
        return kernel
    name = kernel["name"]
    threads = int(re.search(rf"\.entry {name}\(.*?\.reqntid (\d+)", ptx.read_text(), re.DOTALL)[1])  # type: ignore[index]
    command: list[Any] = [_tool("nvdisasm"), "-c", ptx.with_suffix(".cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)  # what precedes, then names and codes by turns
    own = code[code.index(name) + 1]
    blocks = sass.resident(kernel["registers"], kernel["shared_memory"], threads, device.shared_core)
    return kernel | {"threads": threads, "resident": blocks} | sass.figures(own, threads, elements)


def _elements(case: Case) -> int | None:
    """Elements of keys and values that a program of packed attention handles in a turn of its loop."""
    defaults = {"packed_attention": packed_attention.defaults, "packed_attention_jax_triton": jax_triton.defaults}
    if case.point["op"] not in defaults:
        return None
    q, keys, values = case.arguments[:3]
    return defaults[case.point["op"]](q, keys, values)["block"] * (keys.shape[3] + values.shape[3])


@functools.cache
def _tool(name: str) -> Path:
    import nvidia  # of the wheels that come with jax[cuda13]

    return next(file for folder in nvidia.__path__ for file in Path(folder).glob(f"cu*/bin/{name}"))


def _device(target: str) -> Device:
    if target not in TARGETS:
        raise KvjaxError(f"target {target!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[target]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="compiled ahead of time, no device", title_justify="left")
    for name in ("target", "op", "bits", "mode", "kernel"):
        table.add_column(name)
    for name in ("registers", "spilled bytes", "shared KB", "blocks", "waits", "MB", "temporary", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        names = [row[name] for name in ("target", "op", "bits", "mode")]
        if not row["compiled"]:
            table.add_row(*names, row["error"][:60])
            continue
        memory = f"{row['argument_bytes'] / 1e6:.1f}", f"{row['temp_bytes'] / 1e6:.2f}", f"{row['seconds']:.1f}"
        for kernel in row["kernels"]:
            if not _ours(kernel):
                continue
            spilled = str(kernel["spill_stores"] + kernel["spill_loads"])
            counts = (str(kernel.get(name, "")) for name in ("resident", "waits"))
            figures = str(kernel["registers"]), spilled, f"{kernel['shared_memory'] / 1e3:.1f}", *counts
            table.add_row(*names, kernel["name"], *figures, *memory)
    return table


if __name__ == "__main__":
    program.run(main, "configs/aot_cuda.py")
