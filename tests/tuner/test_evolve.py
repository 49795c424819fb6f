"""NSGA-II in a journal: trials are counted over runs and processes, and neither kills nor torn lines change them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from kvjax.caches.base import CacheShape, CacheSpec
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.models.config import ModelConfig
from kvjax.tuner.evaluations import Evaluations
from kvjax.tuner.evolve import evolve
from kvjax.tuner.space import Bits, resolved

SPAWN = multiprocessing.get_context("forkserver")  # forks before JAX has threads
SPAWN.set_forkserver_preload(["kvjax.experiments.tune", "sklearn.cluster"])  # one list for all tests
MODEL = ModelConfig("llama", 128, 64, 64, 6, 4, 2, 16, 256, 1e-5)
GROUPS = [[0, 3], [1], [2, 4, 5]]
PAIRS = tuple(f"k{k}v{v}" for k in (8, 4, 2) for v in (8, 4, 2))
BITS = Bits("nominal", 4.0, CacheShape.of(MODEL, 1, 64, jnp.bfloat16))


def loss(plan: CachePlan) -> float:
    """Keys count twice, and the first layers most."""
    return sum((2 * 4.0**-s.key_bits + 4.0**-s.value_bits) / (i + 1) for i, s in enumerate(plan.specs))  # type: ignore[attr-defined]


def search(
    folder: Path,
    trials: int,
    *,
    score: Callable[[CachePlan], float] = loss,
    groups: Sequence[Sequence[int]] = GROUPS,
    names: Sequence[str] = PAIRS,
    seed: tuple[int, int] = (0, 0),
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The plans of a search in a folder."""
    choices: list[tuple[CacheSpec, ...]] = [resolved(names, MODEL)] * MODEL.layers
    journal = folder / "journal.log"
    found = evolve(journal, "study", groups, choices, BITS, score, trials, seed, MODEL, advance)
    return list(map(str, found))


def study(folder: Path) -> optuna.Study:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return optuna.load_study(study_name="study", storage=storage)


def count(folder: Path) -> dict[str, int]:
    """How many trials there are of each state."""
    states = [trial.state.name for trial in study(folder).trials]
    return {state: states.count(state) for state in dict.fromkeys(states)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The plans of a search that nothing stops: 70 trials, of which 50 are the first generation."""
    folder = tmp_path_factory.mktemp("whole")
    plans = search(folder, 70)
    assert len(plans) == 70 and count(folder) == {"COMPLETE": 70}
    return plans


# ---- one process


def test_goes_on_until_it_has_so_many_trials(whole: list[str], tmp_path: Path) -> None:
    heard: list[int] = []
    for trials in (3, 7, 7, 5, 52):
        before = len(heard)
        assert search(tmp_path, trials, advance=heard.append) == whole[: max(trials, 7 if before else 0)]
    assert heard == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 7, *range(7, 53)]
    assert count(tmp_path) == {"COMPLETE": 52}


def test_seeds_and_workers_draw_their_own(whole: list[str], tmp_path: Path) -> None:
    draws = [whole[:8]]
    for seed in ((1, 0), (0, 1), (7, 3)):
        folder = tmp_path / "-".join(map(str, seed))
        folder.mkdir()
        draws.append(search(folder, 8, seed=seed))
    assert len({tuple(draw) for draw in draws}) == 4
    assert all(len(set(draw)) > 4 for draw in draws)


def test_groups_share_a_choice(whole: list[str]) -> None:
    for text in whole:
        specs = CachePlan.parse(text, MODEL).specs
        assert all(len({specs[layer] for layer in group}) == 1 for group in GROUPS)
    first = {str(CachePlan.parse(text, MODEL).specs[0]) for text in whole[:50]}
    assert len(first) == 9  # every candidate is tried


def test_the_front_keeps_to_the_budget(tmp_path: Path) -> None:
    plans = [CachePlan.parse(text, MODEL) for text in search(tmp_path, 150)]
    best = study(tmp_path).best_trials
    assert best and all(trial.values[0] <= BITS.budget for trial in best)
    assert min(trial.values[1] for trial in best) == min(loss(plan) for plan in plans if BITS.fits(plan))
    fitting = [sum(BITS.fits(plan) for plan in plans[i : i + 50]) for i in (0, 100)]
    assert 0 < fitting[0] < 30 and fitting[1] > fitting[0] + 10, fitting  # later generations learn it


def test_plans_whose_layers_do_not_go_together_are_pruned(tmp_path: Path) -> None:
    """A run of XQuant-CL needs its base."""
    alone = [[layer] for layer in range(MODEL.layers)]
    asked: list[CachePlan] = []

    def score(plan: CachePlan) -> float:
        asked.append(plan)
        return float(len(asked))

    found = search(tmp_path, 40, score=score, groups=alone, names=("xcl3(base=1)", "k4v4"))
    ended = count(tmp_path)
    assert sum(ended.values()) == 40 and ended["PRUNED"] > 5 and ended["COMPLETE"] == len(found) == len(asked)
    assert found == list(map(str, asked)) and any("xcl3" in plan and "k4v4" in plan for plan in found)
    assert search(tmp_path, 40, score=score, groups=alone, names=("xcl3(base=1)", "k4v4")) == found


def test_no_plan_at_all(tmp_path: Path) -> None:
    """Layer 0 can only begin a run that layer 1 can only break off."""
    lone, pair = resolved(("xcl3(base=1)", "k4v4"), MODEL)
    choices = [[lone], *[[pair]] * 5]
    found = evolve(
        *(tmp_path / "journal.log", "study", [[i] for i in range(6)], choices, BITS, loss),
        *(12, (0, 0), MODEL, lambda _: None),
    )
    assert found == [] and count(tmp_path) == {"PRUNED": 12}


def test_a_single_choice(tmp_path: Path) -> None:
    assert search(tmp_path, 5, groups=[list(range(6))], names=("k4v4",)) == ["k4v4@kivi"] * 5


def test_what_the_loss_raises_comes_through(tmp_path: Path, whole: list[str], capfd: pytest.CaptureFixture) -> None:
    def fail(plan: CachePlan) -> float:
        if str(plan) == whole[4]:
            raise error
        return loss(plan)

    for error in (KvjaxError("not finite"), KeyboardInterrupt(), ValueError("a bug")):
        with pytest.raises(type(error)) as raised:
            search(tmp_path, 70, score=fail)
        assert raised.value is error
    assert capfd.readouterr() == ("", "")
    assert search(tmp_path, 70) == whole


# ---- several processes, and kills


FEW: dict[str, Any] = {"groups": [[0, 1, 2], [3, 4, 5]], "names": ("k8v8", "k4v4", "k4v2", "k2v2")}


def work(folder: Path, trials: int, worker: int, together: Any, answers: Any) -> None:
    """A process of a search for one of 16 plans, which tells on each evaluation."""

    def evaluate(plan: CachePlan) -> dict[str, float]:
        answers.put((os.getpid(), str(plan)))
        time.sleep(0.05)
        return {"kld": loss(plan)}

    evaluations = Evaluations(folder / "evaluations", {}, evaluate)
    score = lambda plan: evaluations(plan)["kld"]  # noqa: E731
    together.wait(60)
    search(folder, trials, score=score, seed=(0, worker), **FEW)
    answers.put((os.getpid(), None))


def block(folder: Path, plan: str, reached: Any, never: Any) -> None:
    """A process that does not end the evaluation of a plan."""

    def score(asked: CachePlan) -> float:
        if str(asked) == plan:
            reached.set()
            never.wait()
        return loss(asked)

    search(folder, 70, score=score)


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Starts processes; none outlives the test."""
    processes: list[BaseProcess] = []

    def begin(target: Callable[..., None], *arguments: Any) -> BaseProcess:
        processes.append(SPAWN.Process(target=target, args=arguments, daemon=True))
        processes[-1].start()
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.join()


def test_processes_share_trials_and_evaluations(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    together, answers = SPAWN.Barrier(2), SPAWN.Queue()
    processes = [start(work, tmp_path, 40, worker, together, answers) for worker in range(2)]
    heard, ended = [], 0
    while ended < 2:
        pid, plan = answers.get(timeout=60)
        ended += plan is None
        heard += [(pid, plan)] if plan else []
    plans = [plan for _, plan in heard]
    assert len(set(plans)) == len(plans)  # none twice
    trials = study(tmp_path).trials
    assert {trial.state.name for trial in trials} == {"COMPLETE"} and 40 <= len(trials) <= 41
    shares = [sum(pid == process.pid for pid, _ in heard) for process in processes]
    assert min(shares) >= 1, shares
    found = search(tmp_path, 40, **FEW)  # asks for nothing more
    assert set(found) == set(plans) and len(found) == len(trials)


def test_killed_in_a_trial(tmp_path: Path, whole: list[str], start: Callable[..., BaseProcess]) -> None:
    for reached in (3, 30, 55):  # the last in the second generation
        begun, never = SPAWN.Event(), SPAWN.Event()
        process = start(block, tmp_path, whole[reached], begun, never)
        assert begun.wait(60) and process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert search(tmp_path, 70) == whole
    assert count(tmp_path) == {"COMPLETE": 70, "RUNNING": 3}


def hold(folder: Path, locked: Any, never: Any) -> None:
    """A process that is in the middle of a line."""

    class Slow(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            self._lock.acquire()
            with (folder / "journal.log").open("ab") as stream:
                stream.write(json.dumps(logs[0]).encode()[:20])
            locked.set()
            never.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvjax.tuner.evolve.JournalFileBackend", Slow)
        search(folder, 70)


def test_killed_while_it_writes(tmp_path: Path, whole: list[str], start: Callable[..., BaseProcess]) -> None:
    """Others wait for the line, and not much longer than it takes to kill its writer."""
    search(tmp_path, 10)
    locked, never = SPAWN.Event(), SPAWN.Event()
    process = start(hold, tmp_path, locked, never)
    assert locked.wait(60) and process.pid
    assert not (tmp_path / "journal.log").read_bytes().endswith(b"\n")
    os.kill(process.pid, signal.SIGKILL)
    begun = time.perf_counter()
    assert search(tmp_path, 20) == whole[:20]
    assert time.perf_counter() - begun < 15


# ---- journals


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of 8 trials."""
    folder = tmp_path_factory.mktemp("journal")
    search(folder, 8)
    return (folder / "journal.log").read_bytes()


@pytest.mark.parametrize("cut", [1, 2, 30, 400])
def test_a_torn_last_line(cut: int, journal: bytes, whole: list[str], tmp_path: Path) -> None:
    file = tmp_path / "journal.log"
    file.write_bytes(journal[:-cut])
    assert search(tmp_path, 10) == whole[:10]
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert len(rows) > journal.count(b"\n")


@pytest.mark.parametrize(
    "line", ["garbage", "\0\0\0", "\xff", "[1]", "5", "{}", '{"op_code": 99}', '{"op_code": 4}', ""]
)
def test_a_damaged_journal(line: str, journal: bytes, tmp_path: Path) -> None:
    file, lines = tmp_path / "journal.log", journal.splitlines(keepends=True)
    for place in (0, 20, len(lines) - 1, len(lines)):
        file.write_bytes(b"".join([*lines[:place], line.encode("latin-1"), b"\n", *lines[place:]]))
        with pytest.raises(KvjaxError) as error:
            search(tmp_path, 10)
        message = str(error.value)
        assert message.startswith(f"{file} is damaged (") and "remove it" in message and "\n" not in message


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "journal.log").mkdir()
    with pytest.raises(KvjaxError, match=r"journal\.log cannot be read or written: Is a directory"):
        search(tmp_path, 5)
    with pytest.raises(KvjaxError, match=r"journal\.log cannot be read or written: No such file"):
        search(tmp_path / "none", 5)
