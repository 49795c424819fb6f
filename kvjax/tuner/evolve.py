"""KVTuner's own search: NSGA-II over groups of layers, bits against loss (section 5.3), in Optuna.

Trials live in a journal file that any number of processes share; one that is killed loses only the trial it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from kvjax.caches.base import CacheSpec, ModelShapes
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.tuner.space import Bits

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
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))

    def plan_of(params: dict[str, int]) -> CachePlan:
        specs: dict[int, CacheSpec] = {}
        for i, group in enumerate(groups):
            specs |= dict.fromkeys(group, candidates[group[0]][params[f"group_{i}"]])
        return CachePlan.of([specs[i] for i in range(model.layers)], model)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        params = {
            f"group_{i}": trial.suggest_int(f"group_{i}", 0, len(candidates[g[0]]) - 1) for i, g in enumerate(groups)
        }
        try:
            plan = plan_of(params)
        except KvjaxError:  # layers that do not go together
            raise optuna.TrialPruned from None
        trial.set_user_attr("over", bits.of_plan(plan) - bits.budget)
        return bits.of_plan(plan), loss(plan)

    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
    )
    ended = lambda: study.get_trials(deepcopy=False, states=ENDED)  # noqa: E731
    # A process that goes on draws other numbers than before, and than the others.
    drawn = np.random.SeedSequence([*seed, len(ended())]).generate_state(1)[0]
    study.sampler = optuna.samplers.NSGAIISampler(
        seed=int(drawn), constraints_func=lambda trial: [trial.user_attrs.get("over", np.inf)]
    )

    def heard(study: optuna.Study, _: optuna.trial.FrozenTrial) -> None:
        advance(len(ended()))
        if len(ended()) >= trials:
            study.stop()

    advance(len(ended()))
    if len(ended()) < trials:
        study.optimize(objective, callbacks=[heard])
    return [plan_of(trial.params) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
