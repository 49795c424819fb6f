"""Results of evaluated plans, kept on disk.

Several processes may share a folder: whichever comes first evaluates a plan, and the others read the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvjax import hosts
from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.files import locked, read_json, write_json

Figures = dict[str, Any]  # numbers by name, or lists and objects of them


class Evaluations:
    """The figures of plans under one evaluation; each plan is evaluated only once.

    Attributes:
      made: how many plans this process evaluated.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        evaluate: Callable[[CachePlan], Figures],
        names: Sequence[str] = (),
    ):
        """Reads and writes nothing yet.

        Args:
          folder: where results are kept, created when there is one.
          identity: everything besides the plan that the figures depend on (model, text and so on).
          evaluate: computes the figures of a plan.
          names: names of figures that must be numbers; results on disk that lack one are refused.
        """
        self.folder, self.identity, self.evaluate, self.names = folder, identity, evaluate, names
        self.made = 0

    def __call__(self, plan: CachePlan) -> Figures:
        """Returns the figures of a plan, from disk where they are known.

        While another process evaluates the same plan, this one waits for it.

        Args:
          plan: the plan.

        Raises:
          KvjaxError: a result on disk is damaged, or cannot be written.
        """
        file = self._file(plan)
        if not hosts.on_first(file.exists):
            hosts.on_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            with locked(file.with_suffix(".lock")):
                if not hosts.on_first(file.exists):
                    row = {"identity": self.identity, "cache": str(plan), "figures": self.evaluate(plan)}
                    hosts.on_first(lambda: write_json(file, row))
                    self.made += 1
        return hosts.on_first(lambda: self._read(file, plan))

    def _read(self, file: Path, plan: CachePlan) -> Figures:
        try:
            row = read_json(file)
        except KvjaxError as error:
            raise KvjaxError(f"{error}; remove it to compute it again") from None
        figures = row.get("figures")
        if self._key(row.get("identity"), row.get("cache")) != self._key(self.identity, str(plan)):
            raise KvjaxError(f"{file} is no evaluation of {plan} here; remove it to compute it again")
        if not isinstance(figures, dict) or not all(isinstance(figures.get(n), float | int) for n in self.names):
            raise KvjaxError(f"{file} lacks figures; expected {', '.join(self.names)}: remove it to compute it again")
        return figures

    def _file(self, plan: CachePlan) -> Path:
        key = self._key(self.identity, str(plan))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    @staticmethod
    def _key(identity: Any, cache: Any) -> str:
        return json.dumps([identity, cache], sort_keys=True)
