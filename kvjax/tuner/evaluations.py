"""What was evaluated, on disk: every plan once, by whichever of the processes that share a folder comes first."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvjax.caches.plan import CachePlan
from kvjax.errors import KvjaxError
from kvjax.files import read_json, write_json

Figures = dict[str, float]


class Evaluations:
    """Figures of plans under one evaluation.

    Attributes:
      made: how many this process computed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], evaluate: Callable[[CachePlan], Figures]):
        """identity: what two runs must share for their figures to be the same."""
        self.folder, self.identity, self.evaluate = folder, identity, evaluate
        self.made = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, plan: CachePlan) -> Figures:
        """The plan's figures. While another process evaluates the same plan, this one waits for it.

        Raises:
          KvjaxError: what is on disk is damaged or cannot be written.
        """
        file = self._file(plan)
        if not file.exists():
            with _locked(file.with_suffix(".lock")):
                if not file.exists():
                    figures = self.evaluate(plan)
                    write_json(file, {"identity": self.identity, "cache": str(plan), "figures": figures})
                    self.made += 1
        row = read_json(file)
        if row.get("cache") != str(plan) or not isinstance(row.get("figures"), dict):
            raise KvjaxError(f"{file} is no evaluation of {plan}; remove it to compute it again")
        return row["figures"]

    def known(self, plan: CachePlan) -> bool:
        """Whether the plan was evaluated."""
        return self._file(plan).exists()

    def _file(self, plan: CachePlan) -> Path:
        key = json.dumps([self.identity, str(plan)], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds the file's lock, which ends with the process however it ends."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
        file.unlink(missing_ok=True)
