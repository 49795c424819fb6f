"""Results in a remote folder: an object store in memory, behind the same URLs and the same library as a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

import kvjax
from kvjax import records
from kvjax.checks import check_path
from kvjax.errors import KvjaxError
from kvjax.files import is_local, read_json, write_json

FOLDER = "s3://bucket/runs/one"


class Store(MemoryFileSystem):
    """One store for this file."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made = Store()
    made.store.clear()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: made)
    yield made


@pytest.fixture
def model(goldens: Path) -> kvjax.Model:
    return kvjax.load(goldens / "llama-linear", "float32")


def test_what_is_written_is_read(store: Store) -> None:
    file = check_path("folder", FOLDER) / "results.jsonl"
    assert not is_local(file) and str(file) == f"{FOLDER}/results.jsonl" and records.read_rows(file) == []
    records.append_row(file, {"a": 1})
    records.append_row(file, {"a": float("inf")})
    assert records.read_rows(file) == [{"a": 1}, {"a": float("inf")}]
    write_json(file.with_name("one.json"), {"b": 2})
    assert read_json(file.with_name("one.json")) == {"b": 2}
    assert len(store.store) == 2  # no temporary objects


def test_a_sweep_goes_on_there(store: Store, model: kvjax.Model) -> None:
    ids = [(7 * i * i + 3 * i) % 128 for i in range(48)]
    sizes: dict[str, Any] = {"context": 24, "windows": 2, "folder": FOLDER}
    first = kvjax.sweep(model, ids, ["dense", "k4v4@token"], **sizes)
    written = {name: file.getvalue() for name, file in store.store.items()}
    assert len([name for name in written if name.endswith(".npz")]) == 3
    assert kvjax.sweep(model, ids, ["dense", "k4v4@token"], **sizes) == first
    assert {name: file.getvalue() for name, file in store.store.items()} == written
    assert kvjax.sweep(model, ids, ["k4v4@token"], context=24, windows=2)[0]["kld"] == first[1]["kld"]


def test_what_cannot_be_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403, no right to write")

    monkeypatch.setattr(Store, "open", refuse)
    with pytest.raises(KvjaxError, match=r"s3://bucket/runs/one/a.json cannot be written: 403, no right to write"):
        write_json(check_path("folder", FOLDER) / "a.json", {})


def test_a_journal_needs_a_local_folder(store: Store, model: kvjax.Model) -> None:
    ids = [(7 * i * i + 3 * i) % 128 for i in range(64)]
    asked: dict[str, Any] = {"context": 32, "windows": 1, "candidates": "k8v8@token,k4v4@token", "folder": FOLDER}
    with pytest.raises(KvjaxError, match="journal needs locks; expected a local folder"):
        kvjax.tune(model, ids, 8.0, **asked, method="nsga2", prune="none", cluster="none")
    assert not Path("s3:").exists()
