"""Several processes of one run, on one host or on many: how they join, agree and end.

All processes run the same program on the same input, and all must make the same exchanges in the same order. What
must happen once (files, above all) happens in process 0, and the others hear what came of it: `on_first`. Where there
is one process, nothing here exchanges anything.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kvjax.errors import KvjaxError

HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process is taken for lost and the others end
GRACE_SECONDS = 0.3  # from SIGTERM to the end, for removing temporary files
TERMINATED = 128 + signal.SIGTERM
ASIDE = "array aside"  # stands in JSON for an array beside it
T = TypeVar("T")
_alone = contextvars.ContextVar("_alone", default=False)


class Terminated(BaseException):
    """SIGTERM came."""


def init_distributed(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process with the others of its run, before jax computes anything.

    Args:
      coordinator: host:port of process 0. On TPU, Slurm and Open MPI jax finds out itself what is None.
      processes: how many there are.
      process_id: the number of this one, from 0.

    Raises:
      KvjaxError: something is missing or does not fit, or the others do not come.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM
    try:
        jax.distributed.initialize(coordinator, processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise KvjaxError(f"the processes cannot be joined: {reason}") from None


@contextlib.contextmanager
def joined(*address: Any) -> Iterator[None]:
    """A program's run as one of several processes; `address` as for `init_distributed`.

    One that fails ends at once: the others may be waiting for it, and notice that it is gone.
    """
    init_distributed(*address)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
    jax.distributed.shutdown()


def tells_of_loss(error: Exception) -> bool:
    """Whether an error says that another process of the run is gone."""
    return several() and re.search("gloo|nccl|peer|heartbeat|coordination service", str(error), re.I) is not None


# ---- who does what


def several() -> bool:
    """Whether there are other processes, and this one does not work `alone`."""
    return jax.distributed.is_initialized() and not _alone.get()


def count() -> int:
    """How many processes work together."""
    return jax.process_count() if several() else 1


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if several() else 0


def devices() -> list[jax.Device]:
    """The devices of all processes that work together."""
    return jax.local_devices() if _alone.get() else jax.devices()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the `with` block this process works by itself, on its own devices, as if there were no others."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the `with` block only process 0 prints."""
    with contextlib.ExitStack() as stack:
        if index():
            nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def on_first(call: Callable[[], T]) -> T:
    """Calls in process 0 alone.

    Args:
      call: works `alone`; returns numbers, texts, None and numpy arrays, or lists and dicts of them.

    Returns:
      What the call returned, in every process.

    Raises:
      KvjaxError: what the call raised, in every process; of an OSError, its text.
    """
    if not several():
        return call()
    return _opened(_broadcast(_closed(call) if index() == 0 else b""))


def on_each(call: Callable[[], T]) -> list[T]:
    """Calls in every process.

    Args:
      call: as for `on_first`.

    Returns:
      What each call returned, in order of processes, in every process.

    Raises:
      KvjaxError: what a call raised, in every process.
    """
    return [_opened(message) for message in _gather(_closed(call))] if several() else [call()]


def _closed(call: Callable[[], Any]) -> bytes:
    """What a call returns or raises, as bytes that hold no code."""
    try:
        with alone():
            answer = {"value": call()}
    except (KvjaxError, OSError) as error:
        answer = {"error": str(error)}
    arrays: list[np.ndarray] = []

    def aside(array: Any) -> dict[str, int]:
        arrays.append(np.asarray(array))
        return {ASIDE: len(arrays) - 1}

    text, stream = json.dumps(answer, default=aside), io.BytesIO()
    np.savez(stream, np.array(text), *arrays, allow_pickle=False)
    return stream.getvalue()


def _opened(message: bytes) -> Any:
    with np.load(io.BytesIO(message), allow_pickle=False) as file:
        text, *arrays = (file[name] for name in file.files)
    answer = json.loads(str(text), object_hook=lambda value: arrays[value[ASIDE]] if ASIDE in value else value)
    if "error" in answer:
        raise KvjaxError(answer["error"])
    return answer["value"]


def _broadcast(message: bytes) -> bytes:
    """The message of process 0."""
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(message))))
    return multihost_utils.broadcast_one_to_all(_padded(message, size))[:size].tobytes()


def _gather(message: bytes) -> list[bytes]:
    """The messages of all processes."""
    sizes = multihost_utils.process_allgather(np.uint32(len(message)))
    rows = multihost_utils.process_allgather(_padded(message, int(sizes.max())))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _padded(message: bytes, size: int) -> np.ndarray:
    """The bytes and zeros up to a power of two, at least `size`: every size is a program of its own."""
    buffer = np.zeros(1 << max(size - 1, 63).bit_length(), np.uint8)
    buffer[: len(message)] = np.frombuffer(message, np.uint8)
    return buffer


# ---- how it ends


def end_on_sigterm() -> None:
    """Makes SIGTERM raise `Terminated`, and end the process a moment later, wherever it is by then.

    Python handles a signal only between two of its own instructions, and a program on a device may take minutes. So a
    thread hears of it, too. What is on disk is whole at any time.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _raise_terminated)

    def listen() -> None:
        while signal.SIGTERM not in heard.recv(64):
            pass
        os.write(2, b"terminated; started again, the run goes on where it was\n")  # one piece among other threads'
        time.sleep(GRACE_SECONDS)
        os._exit(TERMINATED)

    told.detach()  # stays open as long as the process
    threading.Thread(target=listen, daemon=True).start()


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated
