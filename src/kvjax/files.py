"""Small helpers for files: JSON, atomic writes and checksums."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from kvjax import hosts
from kvjax.errors import KvjaxError


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Args:
      file: the file.

    Returns:
      The object.

    Raises:
      KvjaxError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise KvjaxError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise KvjaxError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise KvjaxError(f"{file} holds a {type(value).__name__}; expected a JSON object")
    return value


def write_atomically(file: Path, data: bytes) -> None:
    """Writes a file so that a kill leaves either the old one or the new one.

    A local file is written to a temporary one first. A remote store shows an object when it is whole.

    Args:
      file: the file, local or remote; its folder is created where needed.
      data: the content.

    Raises:
      KvjaxError: it cannot be written; the old file is unchanged.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if is_local(file):
            _replace(file, data)
        else:
            file.write_bytes(data)
    except OSError as error:
        raise KvjaxError(f"{file} cannot be written: {error.strerror or error}") from None


def is_local(file: Path) -> bool:
    """Whether a path is of this machine's file system, and not the URL of a remote one."""
    return isinstance(file, Path)


def _replace(file: Path, data: bytes) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(file)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes an object to a JSON file, atomically.

    Args:
      file: the file.
      value: the object.

    Raises:
      KvjaxError: it cannot be written.
    """
    write_atomically(file, (json.dumps(value, indent=2) + "\n").encode())


def digests(folder: Path) -> dict[str, str]:
    """Computes the checksum of every file under a folder.

    Args:
      folder: the folder.

    Returns:
      The sha256 in hex, by the file's path relative to the folder.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256([file]) for file in files}


def check_digests(folder: Path, expected: Any) -> None:
    """Checks the files under a folder against checksums.

    Args:
      folder: the folder.
      expected: what `digests` returned when the files were saved.

    Raises:
      KvjaxError: a file is missing, new or damaged, or the checksums are not a dict.
    """
    if not isinstance(expected, dict):
        raise KvjaxError(f"the checksums of {folder} are missing")
    found = digests(folder)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            state = "damaged" if name in found and name in expected else "new" if name in found else "missing"
            raise KvjaxError(f"{folder / name} is {state}; expected the file whose sha256 was noted at saving")


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds the lock of a file inside a `with` block, then removes the file.

    The system releases the lock when the process ends, even if it is killed. Of several processes that work together
    the first holds it for all. Remote files have no locks: no two runs may share a remote folder.

    Args:
      file: the lock file, created where needed.
    """
    if hosts.index() or not is_local(file):
        yield
        return
    while True:
        with file.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_at(stream, file):
                continue  # the process that held the lock removed the file
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def _is_at(stream: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hashing(files: Iterable[Path]) -> Iterator[Callable[[], str]]:
    """Computes `sha256(files)` in a thread while the `with` block reads the same files.

    So what one has read the other finds in memory.

    Args:
      files: the files, in order.

    Yields:
      A function that waits for the sha256 and returns it. It raises OSError where a file cannot be read.
    """
    left = threading.Event()

    def blocks() -> Iterator[bytes]:
        return itertools.takewhile(lambda _: not left.is_set(), _blocks(files))

    pool = ThreadPoolExecutor(1)
    try:
        yield pool.submit(lambda: _digest(blocks())).result
    finally:
        left.set()
        pool.shutdown()


def sha256(files: Iterable[Path]) -> str:
    """Computes one checksum of several files.

    Args:
      files: the files, in order.

    Returns:
      The sha256, in hex, of their bytes one after the other.
    """
    return _digest(_blocks(files))


def _blocks(files: Iterable[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                yield block


def _digest(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def brief(error: BaseException) -> str:
    """Shortens a library's error to fit into a one-line message.

    Args:
      error: the error.

    Returns:
      The first line of its text, at most 200 characters; the name of its type where it has no text.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
