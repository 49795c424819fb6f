"""KVTuner's own search: NSGA-II over groups of layers, bits against loss (section 5.3), in Optuna.

Trials are kept in a journal file that any number of processes share. A killed process loses only its current trial.
A single process that is killed and started again finds the same plans as without the kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import NSGAIISampler, RandomSampler
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from kvjax import hosts
from kvjax.caches.base import CacheSpec, ModelShapes
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.files import brief, is_local
from kvjax.tuner.space import Bits, try_plan

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def evolve(
    journal: Path,
    name: str,
    groups: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[CacheSpec]],
    bits: Bits,
    loss: Callable[[CachePlan], float],
    trials: int,
    seed: tuple[int, int],
    model: ModelShapes,
    advance: Callable[[int], None],
) -> list[CachePlan]:
    """Runs the search until its study has enough trials.

    Args:
      journal: the journal file; an existing study goes on.
      name: name of the study in the journal.
      groups: layers that share one choice, per group.
      candidates: the specs to choose from, per layer; a group takes those of its first layer.
      bits: how bits are counted, and the budget.
      loss: evaluates a plan; smaller is better.
      trials: how many trials the study must have, over all processes.
      seed: the seed of the search and the number of this process.
      model: sizes of the model.
      advance: called with the number of trials that have ended.

    Returns:
      The plans of all ended trials of all processes, in order.

    Raises:
      KvjaxError: the journal is damaged or cannot be written; whatever `loss` raises.
    """
    choices: dict[str, BaseDistribution] = {
        f"group_{i}": IntDistribution(0, len(candidates[group[0]]) - 1) for i, group in enumerate(groups)
    }
    plan_of = functools.partial(_plan_of, groups, candidates, model)
    study = _Study(journal, name, choices, seed)
    hosts.on_first(study.open)
    while True:
        ended = hosts.on_first(study.ended)
        advance(len(ended))
        if len(ended) >= trials:
            return [plan for params in ended if (plan := plan_of(params))]
        plan = plan_of(hosts.on_first(study.ask))
        figures = (bits.of_plan(plan), loss(plan)) if plan else None
        over = 0.0 if not plan or not figures or bits.fits(plan) else figures[0] - bits.budget
        hosts.on_first(functools.partial(study.tell, figures, over))


class _Study:
    """A study in a journal file. Of several processes that work together only the first opens it."""

    def __init__(self, journal: Path, name: str, choices: dict[str, BaseDistribution], seed: tuple[int, int]):
        self._journal, self._name, self._choices, self._seed = journal, name, choices, seed

    def open(self) -> None:
        if not is_local(self._journal):
            raise KvjaxError(f"{self._journal} is remote, and nsga2's journal needs locks; expected a local folder")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = str(self._journal)
        with _named(self._journal):
            storage = optuna.storages.JournalStorage(JournalFileBackend(journal, _Lock(journal)))
            self._study = optuna.create_study(
                storage=storage, study_name=self._name, directions=["minimize", "minimize"], load_if_exists=True
            )

    def ended(self) -> list[dict[str, int]]:
        """The choices of all ended trials of all processes, in order."""
        with _named(self._journal):
            self._trials = self._study.get_trials(deepcopy=False, states=ENDED)
        return [trial.params for trial in self._trials]

    def ask(self) -> dict[str, int]:
        """The choices of a new trial."""
        with _named(self._journal):
            self._study.sampler = _Sampler(*self._seed, len(self._trials))
            self._trial = self._study.ask(self._choices)
        return self._trial.params

    def tell(self, figures: tuple[float, float] | None, over: float) -> None:
        """Ends the trial: bits and loss, none where its layers do not go together; and the bits over the budget."""
        with _named(self._journal):
            if figures:
                self._trial.set_constraint("bits", over)
            self._study.tell(self._trial, figures, TrialState.COMPLETE if figures else TrialState.PRUNED)


def _plan_of(
    groups: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[CacheSpec]],
    model: ModelShapes,
    params: dict[str, int],
) -> CachePlan | None:
    """The plan of a trial's choices, None where the layers do not go together."""
    specs: dict[int, CacheSpec] = {}
    for i, group in enumerate(groups):
        specs |= dict.fromkeys(group, candidates[group[0]][params[f"group_{i}"]])
    return try_plan([specs[i] for i in range(model.layers)], model)


class _Sampler(NSGAIISampler):
    """A sampler whose draws depend only on the seed and the numbers of process and trial.

    So a killed and restarted process makes the same draws.
    """

    def __init__(self, *numbers: int):
        own, other = np.random.SeedSequence(numbers).generate_state(2)
        super().__init__(seed=int(own))
        self._new = RandomSampler(seed=int(other))  # the parent's would repeat the draws of crossover

    def sample_independent(self, *args: Any) -> Any:
        return self._new.sample_independent(*args)


class _Lock(JournalFileOpenLock):
    """The lock of the journal; the system releases it when the process ends, even if it is killed.

    A last line that a killed process left incomplete is cut off.
    """

    def __init__(self, journal: str):
        super().__init__(journal)
        self._journal = Path(journal)

    def acquire(self) -> bool:
        self._stream = self._journal.open("r+b")
        fcntl.flock(self._stream, fcntl.LOCK_EX)
        self._mend()
        return True

    def release(self) -> None:
        self._mend()
        self._stream.close()

    def _mend(self) -> None:
        if self._stream.seek(0, os.SEEK_END) and not self._ends_whole():
            self._stream.seek(0)
            self._stream.truncate(self._stream.read().rfind(b"\n") + 1)

    def _ends_whole(self) -> bool:
        self._stream.seek(-1, os.SEEK_END)
        return self._stream.read() == b"\n"


@contextlib.contextmanager
def _named(journal: Path) -> Iterator[None]:
    """Turns errors of the library into a KvjaxError that names the journal."""
    try:
        yield
    except OSError as error:
        raise KvjaxError(f"{journal} cannot be read or written: {error.strerror}") from None
    except Exception as error:  # the library raises many kinds
        raise KvjaxError(f"{journal} is damaged ({brief(error)}); remove it, evaluated plans are kept") from None
