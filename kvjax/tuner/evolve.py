"""KVTuner's own search: NSGA-II over groups of layers, bits against loss (section 5.3), in Optuna.

Trials live in a journal file that any number of processes share. One that is killed loses only the trial it was in,
and a process that goes on alone comes to the plans that it would have come to.
"""

from __future__ import annotations

import contextlib
import fcntl
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

from kvjax.caches.base import CacheSpec, ModelShapes
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.files import brief
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
    """The plans of all ended trials, of every process that took part, in order.

    Args:
      journal, name: the file and the study in it, which goes on until it has `trials` trials.
      candidates: of every layer; those of a group's first layer are the group's.
      seed: the search's, and this process's number.
      advance: hears how many trials have ended.

    Raises:
      KvjaxError: the journal is damaged or cannot be written; whatever `loss` raises.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    choices: dict[str, BaseDistribution] = {
        f"group_{i}": IntDistribution(0, len(candidates[group[0]]) - 1) for i, group in enumerate(groups)
    }

    def plan_of(params: dict[str, int]) -> CachePlan | None:
        specs: dict[int, CacheSpec] = {}
        for i, group in enumerate(groups):
            specs |= dict.fromkeys(group, candidates[group[0]][params[f"group_{i}"]])
        return try_plan([specs[i] for i in range(model.layers)], model)

    with _named(journal):
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal), _Lock(str(journal))))
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )
    while True:
        with _named(journal):
            ended = study.get_trials(deepcopy=False, states=ENDED)
            advance(len(ended))
            if len(ended) >= trials:
                return [plan for trial in ended if (plan := plan_of(trial.params))]
            study.sampler = _Sampler(*seed, len(ended))
            trial = study.ask(choices)
        plan = plan_of(trial.params)
        figures = (bits.of_plan(plan), loss(plan)) if plan else None
        with _named(journal):
            if plan and figures:
                trial.set_constraint("bits", 0.0 if bits.fits(plan) else figures[0] - bits.budget)
            study.tell(trial, figures, TrialState.COMPLETE if figures else TrialState.PRUNED)


class _Sampler(NSGAIISampler):
    """Draws that follow from the search's seed, the process's number and that of the trial: kills change none."""

    def __init__(self, *numbers: int):
        own, other = np.random.SeedSequence(numbers).generate_state(2)
        super().__init__(seed=int(own))
        self._new = RandomSampler(seed=int(other))  # the parent's would draw what decides on crossover

    def sample_independent(self, *args: Any) -> Any:
        return self._new.sample_independent(*args)


class _Lock(JournalFileOpenLock):
    """The journal's lock, which ends with its process however that ends. A torn line is cut off."""

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
    """Says of which file the library speaks."""
    try:
        yield
    except OSError as error:
        raise KvjaxError(f"{journal} cannot be read or written: {error.strerror}") from None
    except Exception as error:  # the library raises many kinds
        raise KvjaxError(f"{journal} is damaged ({brief(error)}); remove it, evaluated plans are kept") from None
