"""Kernels run where the data is: on a mesh of four devices they give one device's numbers and exchange nothing."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels_on_devices import NAMES

WORKER = Path(__file__).with_name("kernels_on_devices.py")


@functools.cache
def answers() -> dict[str, str]:
    """What the process with four devices says of every case; its errors under ""."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(WORKER)], env=env, capture_output=True, text=True, check=False)
    return {**dict(line.split("\t")[::-1] for line in done.stdout.splitlines()), "": done.stderr[-2000:]}


@pytest.mark.parametrize("case", NAMES)
def test_every_device_runs_the_kernel_on_its_part(case: str) -> None:
    assert answers().get(case) == "equal", answers().get(case, answers()[""])
