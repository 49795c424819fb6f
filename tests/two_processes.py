"""A tiny model shared by two processes: run twice by test_hosts.py.

    python -m tests.two_processes HOST:PORT ID FOLDER

prints `equal` or what differs, a tab and the name of the check, for each.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from tests.test_hosts import CONTEXT, GOLDEN, PLANS, TEXT, WINDOWS, figures

import kvjax
from kvjax import hosts
from kvjax.calibrate import bases
from kvjax.checkpoints.orbax import save
from kvjax.errors import KvjaxError
from kvjax.generation.states import restore_state, save_state
from kvjax.mesh import fetch, init_distributed

LATENT = "x4@latent(group=8)"
SIZES = {"context": CONTEXT, "windows": WINDOWS}


def model(name: str | Path = GOLDEN, mesh: str = "data=2") -> kvjax.Model:
    return kvjax.load(name, "float32", mesh=mesh)


def one_device() -> kvjax.Model:
    with hosts.alone():
        return kvjax.load(GOLDEN, "float32")


def same_everywhere(value: object) -> None:
    """What all processes must have alike."""
    first, second = hosts.on_each(lambda: value)
    assert first == second


def exchanges(folder: Path) -> None:
    own = {"number": hosts.index(), "array": np.full(3, hosts.index()), "nothing": [None, float("inf"), "ü"]}
    both = hosts.on_each(lambda: own)
    assert [each["number"] for each in both] == [0, 1] and [each["array"].tolist() for each in both] == [
        [0] * 3,
        [1] * 3,
    ]
    assert both[1]["nothing"] == own["nothing"]
    assert hosts.on_first(lambda: (hosts.count(), own["number"])) == [1, 0]  # the call works alone

    def fail() -> None:
        raise KvjaxError(f"found by {jax.process_index()}; expected nothing")

    for exchange in (hosts.on_first, hosts.on_each):
        try:
            exchange(fail)
        except KvjaxError as error:
            assert str(error) == "found by 0; expected nothing"
        else:
            raise AssertionError("nothing was raised")


def sweep(folder: Path) -> None:
    rows = kvjax.sweep(model(), TEXT, PLANS, **SIZES, protocol="parallel", folder=folder / "whole")
    same_everywhere(rows)
    expected = hosts.on_first(lambda: kvjax.sweep(one_device(), TEXT, PLANS, **SIZES, protocol="parallel"))
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose([row["nll"], row["kld"]], [other["nll"], other["kld"]], rtol=2e-4, atol=1e-6)


def over_plans(folder: Path) -> None:
    """Three plans: in the second round process 1 has nothing to do."""
    local, where = one_device(), folder / f"apart-{hosts.index()}"  # no common file system
    rows = kvjax.sweep(local, TEXT, [*PLANS, LATENT], **SIZES, folder=where, over="plans")
    same_everywhere(rows)
    expected = hosts.on_first(lambda: kvjax.sweep(local, TEXT, [*PLANS, LATENT], **SIZES))
    assert figures(rows) == figures(expected)
    assert len(list((folder / "apart-1").rglob("*.npz"))) > 0 and not (folder / "apart-1" / "results.jsonl").exists()
    again = kvjax.sweep(local, TEXT, [*PLANS, LATENT], **SIZES, folder=where, over="plans")
    assert again == rows and len((folder / "apart-0" / "results.jsonl").read_text().splitlines()) == 3


def saved_and_restored(folder: Path) -> None:
    divided = model(mesh="tensor=2")
    save(folder / "model", divided)
    back = model(folder / "model", "data=2")
    for before, after in zip(jax.tree.leaves(divided.params), jax.tree.leaves(back.params), strict=True):
        np.testing.assert_array_equal(fetch(before), fetch(after))
    same_everywhere(sorted(str(file) for file in folder.iterdir()))


def states(folder: Path) -> None:
    here, prompts, plan = model(), [[1, 2, 3, 4], [5, 6, 7]], f"0:k4v4@token;1:{LATENT}"
    state = kvjax.prefill(here, prompts, plan, max_len=32)
    save_state(folder / "state", here, state)
    made = kvjax.generate(here, [[8], [9]], restore_state(folder / "state", here), max_new_tokens=4)
    same_everywhere(made.tokens)
    whole = [[1, 2, 3, 4, 8], [5, 6, 7, 9]]
    expected = hosts.on_first(lambda: kvjax.generate(one_device(), whole, plan, max_new_tokens=4).tokens)
    assert made.tokens == expected


def tuned(folder: Path) -> None:
    settings = {"candidates": "k8v8@token,k2v2@token", "method": "nsga2", "trials": 3, "cluster": "none"}
    tuning = kvjax.tune(
        model(mesh="tensor=2"), TEXT, 5.0, context=CONTEXT, windows=1, folder=folder / "tune", **settings
    )
    same_everywhere(tuning.rows)
    hosts.on_first(lambda: tuning.save(folder / "plan.yaml"))
    rows = (folder / "tune" / "sensitivity.jsonl").read_text().splitlines()
    assert len(rows) == 2 * 2  # layers, candidates
    plans = {row["cache"] for row in tuning.rows}
    assert len(list((folder / "tune" / "evaluations").glob("*.json"))) == len(plans)


def refused(folder: Path) -> None:
    for mesh, message in {
        "": "2 processes and no mesh",
        "data=1": "1 devices; expected all 2 of 2 processes",
    }.items():
        try:
            model(mesh=mesh)
        except KvjaxError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"mesh {mesh!r} was taken")
    try:
        kvjax.sweep(model(), TEXT, PLANS, **SIZES, over="plans")
    except KvjaxError as error:
        assert "expected one loaded in kvjax.hosts.alone()" in str(error)
    else:
        raise AssertionError("a shared model was taken")


CHECKS: dict[str, Callable[[Path], None]] = {
    "exchanges": exchanges,
    "refused": refused,
    "sweep": sweep,
    "saved and restored": saved_and_restored,
    "states": states,
    "over plans": over_plans,
    "tuned": tuned,
}


def main(address: str, process: str, folder: Path) -> None:
    """Runs the checks."""
    init_distributed(address, 2, int(process))
    with mock.patch.object(bases, "cache_folder", lambda: folder / f"cache-{process}"):
        for name, check in CHECKS.items():
            try:
                check(folder)
            except Exception as error:
                traceback.print_exc()
                print(" ".join(f"{type(error).__name__}: {error}".split())[:500], name, sep="\t", flush=True)
            else:
                print("equal", name, sep="\t", flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
