"""Every plan is evaluated once, whoever asks: by threads, by processes, by processes that are killed."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from kvjax.caches.base import ModelSizes
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.tuner.evaluations import Evaluations

SPAWN = multiprocessing.get_context("forkserver")  # forks before JAX has threads
SPAWN.set_forkserver_preload(["kvjax.experiments.tune", "sklearn.cluster"])  # one list for all tests
IDENTITY = {"model": "m", "context": 64}
MODEL = ModelSizes(2, 4, 2, 16, 64)
PLAN = CachePlan((KV(4, 4), KV(2, 2)), MODEL)
PLANS = [CachePlan((KV(k, v), KV(2, 2)), MODEL) for k in (2, 4, 8) for v in (2, 8)]


def figures(plan: CachePlan) -> dict[str, Any]:
    return {"kld": plan.bits_nominal / 7, "by layer": [0.1, 1e-300]}


def logged(log: Path, plan: CachePlan) -> dict[str, Any]:
    """Says in a file who evaluates what."""
    with log.open("a") as stream:
        stream.write(f"{os.getpid()} {plan}\n")
    time.sleep(0.01)
    return figures(plan)


def held(log: Path, begun: Any, go: Any, plan: CachePlan) -> dict[str, Any]:
    begun.set()
    assert go.wait(60)
    return logged(log, plan)


def ask(folder: Path, evaluate: Callable[[CachePlan], dict[str, Any]], plans: list[CachePlan], answers: Any) -> None:
    """What the processes do."""
    evaluations = Evaluations(folder, IDENTITY, evaluate)
    for plan in plans:
        answers.put((os.getpid(), str(plan), evaluations(plan)))


def known(evaluations: Evaluations) -> bool:
    return evaluations._file(PLAN).exists()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., BaseProcess]]:
    """Starts processes that ask for plans; none outlives the test."""
    processes = []

    def begin(evaluate: Callable[[CachePlan], dict[str, Any]], plans: list[CachePlan], answers: Any) -> BaseProcess:
        processes.append(SPAWN.Process(target=ask, args=(tmp_path / "e", evaluate, plans, answers), daemon=True))
        processes[-1].start()
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.join()


def lines(log: Path) -> list[tuple[int, str]]:
    """Who evaluated what, in order."""
    rows = [line.split(" ", 1) for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(pid), plan) for pid, plan in rows]


def test_once(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "a/b/e"
    first = Evaluations(folder, IDENTITY, functools.partial(logged, log))
    assert not known(first)
    assert first(PLAN) == first(PLAN) == figures(PLAN) and first.made == 1 and known(first)
    second = Evaluations(folder, dict(reversed(IDENTITY.items())), functools.partial(logged, log))
    assert second(PLAN) == figures(PLAN) and second.made == 0  # to the last digit
    assert len(lines(log)) == 1
    assert [file.suffix for file in folder.iterdir()] == [".json"]


def test_identities_do_not_share(tmp_path: Path) -> None:
    log = tmp_path / "log"
    others = [IDENTITY, {"model": "m"}, {**IDENTITY, "context": 65}, {**IDENTITY, "objective": "gsm8k"}]
    for identity in others:
        evaluations = Evaluations(tmp_path, identity, functools.partial(logged, log))
        assert not known(evaluations) and evaluations(PLAN) == figures(PLAN)
    assert len(lines(log)) == len(others)
    for plan in PLANS:
        assert Evaluations(tmp_path, IDENTITY, functools.partial(logged, log))(plan) == figures(plan)
    assert len(lines(log)) == len(others) + len(PLANS)


def test_threads_wait_and_read(tmp_path: Path) -> None:
    log, begun, go = tmp_path / "log", threading.Event(), threading.Event()
    evaluations = Evaluations(tmp_path, IDENTITY, functools.partial(held, log, begun, go))
    found: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: found.append(evaluations(PLAN))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    time.sleep(0.1)
    assert found == []
    go.set()
    for thread in threads:
        thread.join()
    assert found == [figures(PLAN)] * 4 and len(lines(log)) == 1


def test_another_process_waits_and_reads(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    log, begun, go, answers = tmp_path / "log", SPAWN.Event(), SPAWN.Event(), SPAWN.Queue()
    first = start(functools.partial(held, log, begun, go), [PLAN], answers)
    assert begun.wait(60)
    other = PLANS[0]
    second = start(functools.partial(logged, log), [other, PLAN], answers)
    assert answers.get(timeout=60) == (second.pid, str(other), figures(other))  # another plan is free
    time.sleep(0.3)
    assert answers.empty() and second.is_alive() and lines(log) == [(second.pid, str(other))]
    go.set()
    found = [answers.get(timeout=60) for _ in range(2)]
    assert sorted(found) == sorted((process.pid, str(PLAN), figures(PLAN)) for process in (first, second))
    assert lines(log) == [(second.pid, str(other)), (first.pid, str(PLAN))]


def test_many_processes_evaluate_every_plan_once(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    log, answers, rng = tmp_path / "log", SPAWN.Queue(), random.Random(0)
    orders = [rng.sample(PLANS, len(PLANS)) for _ in range(4)]
    processes = [start(functools.partial(logged, log), order, answers) for order in orders]
    found = [answers.get(timeout=60) for _ in range(4 * len(PLANS))]
    expected = [(process.pid, str(plan), figures(plan)) for process in processes for plan in PLANS]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert Counter(plan for _, plan in lines(log)) == Counter(map(str, PLANS))
    assert not list((tmp_path / "e").glob("*.lock"))


def test_a_killed_process_gives_way(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    log, begun, never, answers = tmp_path / "log", SPAWN.Event(), SPAWN.Event(), SPAWN.Queue()
    first = start(functools.partial(held, log, begun, never), [PLAN], answers)
    assert begun.wait(60)
    second = start(functools.partial(logged, log), [PLAN], answers)
    time.sleep(0.3)
    assert lines(log) == [] and second.is_alive()
    assert first.pid
    os.kill(first.pid, signal.SIGKILL)
    assert answers.get(timeout=60) == (second.pid, str(PLAN), figures(PLAN))
    first.join()
    assert first.exitcode == -signal.SIGKILL and lines(log) == [(second.pid, str(PLAN))]


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    def fail(plan: CachePlan) -> dict[str, Any]:
        raise KvjaxError("not finite")

    with pytest.raises(KvjaxError, match="not finite"):
        Evaluations(tmp_path, IDENTITY, fail)(PLAN)
    evaluations = Evaluations(tmp_path, IDENTITY, figures)
    assert not known(evaluations) and evaluations(PLAN) == figures(PLAN)


WHOLE = {"identity": IDENTITY, "cache": str(PLAN), "figures": {"kld": 0.5}}


@pytest.mark.parametrize(
    "data,said",
    [
        (b"", "is not JSON"),
        (b"\x00" * 100, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (json.dumps(WHOLE).encode()[:-9], "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"{}", "is no evaluation of 0:k4v4@kivi;1:k2v2@kivi"),
        (json.dumps({**WHOLE, "cache": str(PLANS[0])}).encode(), "is no evaluation of"),
        (json.dumps({**WHOLE, "identity": {"model": "n", "context": 64}}).encode(), "is no evaluation of"),
        (json.dumps({"cache": str(PLAN), "figures": {"kld": 0.5}}).encode(), "is no evaluation of"),
        (json.dumps({**WHOLE, "figures": [0.5]}).encode(), "lacks figures; expected kld"),
        (json.dumps({**WHOLE, "figures": {"nll": 0.5}}).encode(), "lacks figures; expected kld"),
        (json.dumps({**WHOLE, "figures": {"kld": "much"}}).encode(), "lacks figures; expected kld"),
        (json.dumps({**WHOLE, "figures": {"kld": None}}).encode(), "lacks figures; expected kld"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_and_foreign_files(data: bytes, said: str, tmp_path: Path) -> None:
    evaluations = Evaluations(tmp_path, IDENTITY, figures, ["kld"])
    evaluations(PLAN)
    (file,) = tmp_path.iterdir()
    file.write_bytes(data)
    with pytest.raises(KvjaxError) as error:
        evaluations(PLAN)
    message = str(error.value)
    assert message.startswith(str(file)) and said in message and "remove it" in message and "\n" not in message
    assert file.read_bytes() == data and evaluations.made == 1
    file.unlink()
    assert evaluations(PLAN) == figures(PLAN)


def test_a_file_of_another_plan_is_no_answer(tmp_path: Path) -> None:
    """As where somebody copied files."""
    evaluations = Evaluations(tmp_path, IDENTITY, figures)
    evaluations(PLAN)
    (file,) = tmp_path.iterdir()
    evaluations(PLANS[0])
    (other,) = set(tmp_path.iterdir()) - {file}
    other.write_bytes(file.read_bytes())
    with pytest.raises(KvjaxError, match=f"is no evaluation of {PLANS[0]}"):
        evaluations(PLANS[0])
