"""The search end to end, on a tiny model of four layers: what it leaves, that it chose well, and that kills do not
matter."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

from kvjax.caches.cross_layer import Place
from kvjax.caches.plan import CachePlan
from kvjax.checkpoints.load import load
from kvjax.configs.tune import get_config
from kvjax.errors import KvjaxError
from kvjax.evaluate.tasks import Accuracy
from kvjax.experiments import program, style, tune
from kvjax.models.model import Model
from kvjax.tuner import objective as objectives
from kvjax.tuner.layer_errors import LayerErrors
from kvjax.tuner.search import Search

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPAWN = multiprocessing.get_context("forkserver")  # forks before JAX has threads
SPAWN.set_forkserver_preload(["kvjax.experiments.tune", "sklearn.cluster"])  # one list for all tests
CONTEXT, LAYERS, PAIRS = 96, 4, 9
METHODS = ("knapsack", "refine", "nsga2")
COMPILATION = (
    "jax_disable_most_optimizations",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)
WRITE = style.write
Row = dict[str, Any]


def compile_quickly(compiled: Path) -> None:
    """Without most optimizations, keeping programs in a folder: tests and the programs they start share them."""
    set_compilation(True, str(compiled), 0.0)


def set_compilation(*values: Any) -> None:
    for name, value in zip(COMPILATION, values, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def quick(home: Path) -> Iterator[None]:
    """Programs that compile quickly, and no pictures but of `three`."""
    before = [jax.config.values[name] for name in COMPILATION]
    compile_quickly(home / "compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "write", lambda *_: None)
        yield
    set_compilation(*before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, goldens: Path) -> Path:
    """A folder with `tiny`, a golden model with its two layers twice, much the same; and texts."""
    folder = tmp_path_factory.mktemp("home")
    source, target = goldens / "llama-llama3", folder / "tiny"
    target.mkdir()
    shutil.copy(source / "tokenizer.json", target)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (target / "config.json").write_text(json.dumps(config))
    tensors, rng = load_file(source / "model.safetensors"), np.random.default_rng(0)
    for name, tensor in list(tensors.items()):
        if match := re.search(r"layers\.(\d)", name):
            again = tensor * (1 + 0.1 * rng.standard_normal(tensor.shape).astype(np.float32))
            tensors[name.replace(match[0], f"layers.{int(match[1]) + 2}")] = again
    save_file(tensors, target / "model.safetensors")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (folder / "other.txt").write_text("Pack my box with five dozen liquor jugs! " * 20)
    return folder


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return load(str(home / "tiny"), "float32")


@pytest.fixture(scope="module")
def common(home: Path) -> Row:
    """Settings of all searches."""
    return {
        "model": str(home / "tiny"),
        "text": str(home / "text.txt"),
        "context": CONTEXT,
        "windows": 1,
        "validation": 0,
        "budget": 4.0,
        "points": 4,
        "trials": 12,
    }


def search(workdir: Path, common: Row, **settings: Any) -> None:
    config = get_config()
    config.update(common | settings)
    workdir.mkdir(exist_ok=True)
    tune.main(config, workdir)


def rows_of(file: Path) -> list[Row]:
    """Every line must be whole."""
    text = file.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def evaluations(workdir: Path) -> dict[str, Row]:
    """What was evaluated, by plan. A kill may leave the hidden beginning of a file."""
    rows = [json.loads(file.read_text()) for file in sorted((workdir / "evaluations").glob("*.json"))]
    assert len({row["cache"] for row in rows}) == len(rows)
    return {row["cache"]: row["figures"] for row in rows}


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- what is left


@pytest.fixture(scope="module")
def three(common: Row, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Path, bytes]]:
    """What was in one folder after each method, one after the other."""
    workdir, after = tmp_path_factory.mktemp("three"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "write", WRITE)
        for method in METHODS:
            search(workdir, common, method=method)
            after[method] = contents(workdir)
    return after


@pytest.fixture
def left(request: pytest.FixtureRequest, three: dict[str, dict[Path, bytes]], tmp_path: Path) -> tuple[str, Path]:
    """A method and a folder as it was after it."""
    for file, data in three[request.param].items():
        target = tmp_path / re.sub(r".*/three\d+/", "", str(file))
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
    return request.param, tmp_path


each_method = pytest.mark.parametrize("left", METHODS, indirect=True)


@each_method
def test_the_plan_and_its_card(left: tuple[str, Path], model: Model) -> None:
    method, workdir = left
    plan = CachePlan.parse(str(workdir / "plan.yaml"), model.config)
    data = yaml.safe_load((workdir / "plan.yaml").read_text())
    card = data["card"]
    assert data["plan"] == str(plan) and data.keys() == {"plan", "card"}
    tokens = model.tokenizer.encode("the quick brown fox jumps over the lazy dog. " * 3)[:CONTEXT]
    assert card["model"] == "tiny" and card["model_sha256"] == model.checksum
    assert card["calibration"] == {
        "text": "text.txt",
        "tokens_sha256": hashlib.sha256(np.int32(tokens).tobytes()).hexdigest(),
        "context": CONTEXT,
        "windows": 1,
        "offset": 0,
        "dtype": "float32",
    }
    asked = {"method": method, "objective": "kld", "error": "predicted", "seed": 0}
    asked |= {"budget": 4.0, "budget_of": "nominal bits"}
    assert asked.items() <= card["search"].items() and len(card["search"]["candidates"]) == PAIRS
    figures = evaluations(workdir)[str(plan)]
    expected = {"bits_nominal": plan.bits_nominal, "kld": figures["kld"], "nll": figures["nll"]}
    assert expected.items() <= card["expected"].items() and plan.bits_nominal <= 4
    assert card["expected"]["bits_real"] > card["expected"]["bits_asymptotic"] > plan.bits_nominal
    assert card["front"] == sorted(card["front"], reverse=True)
    assert [kld for _, kld in card["front"]] == sorted(kld for _, kld in card["front"])
    assert {"device", "versions", "git"} == card["made_with"].keys()


@each_method
def test_kvtuners_form_gives_the_same_plan_back(left: tuple[str, Path], model: Model) -> None:
    _, workdir = left
    plan = CachePlan.parse(str(workdir / "plan.yaml"), model.config)
    assert [file.name for file in workdir.glob("kvtuner*")] == ["kvtuner_kivi.yaml"]
    assert CachePlan.parse(str(workdir / "kvtuner_kivi.yaml"), model.config) == plan
    rows = yaml.safe_load((workdir / "kvtuner_kivi.yaml").read_text())
    assert rows == {
        i: {"nbits_key": spec.key_bits, "nbits_value": spec.value_bits} for i, spec in enumerate(plan.specs)
    }


@each_method
def test_rows_and_the_choice(left: tuple[str, Path], model: Model) -> None:
    method, workdir = left
    rows, known = rows_of(workdir / "front.jsonl"), evaluations(workdir)
    *others, chosen = rows
    assert [row["kind"] for row in rows].count("chosen") == 1 and chosen["kind"] == "chosen"
    assert len({row["cache"] for row in others}) == len(others)
    assert [row["kind"] for row in others].count("uniform") == PAIRS
    measured = [row for row in rows_of(workdir / "sensitivity.jsonl") if row["around"] == "dense"]
    errors = {(row["layer"], row["cache"]): row["predicted"] for row in measured}
    joint = np.mean([row["joint"] / row["predicted"] for row in measured])  # of the one form that there is
    for row in rows:
        plan = CachePlan.parse(row["cache"], model.config)
        assert row["method"] == method and known[row["cache"]].items() <= row.items()
        assert row["bits_nominal"] == plan.bits_nominal
        summed = sum(errors[i, str(spec)] for i, spec in enumerate(plan.specs))
        assert row["predicted"] == pytest.approx(joint * summed)
        assert {"device", "versions", "git", "tokens_sha256", "seconds", "top1"} <= row.keys()
    fitting = [row for row in others if row["bits_nominal"] <= 4]
    best = min(fitting, key=lambda row: row["kld"])
    assert chosen == best | {"kind": "chosen", "was": best["kind"]}
    assert chosen["cache"] == str(CachePlan.parse(str(workdir / "plan.yaml"), model.config))
    if method == "refine":  # nothing that it measured beside its plans is better
        within = [cache for cache in known if CachePlan.parse(cache, model.config).bits_nominal <= 4]
        assert min(known[cache]["kld"] for cache in within) == chosen["kld"] and len(within) > len(fitting)


def test_methods_share_what_was_measured(three: dict[str, dict[Path, bytes]]) -> None:
    grown = []
    for before, after in itertools.pairwise(METHODS):
        kept = [file for file in three[before] if file.parent.name == "evaluations" or file.suffix == ".jsonl"]
        kept = [file for file in kept if file.name != "front.jsonl"]
        assert all(three[after][file].startswith(three[before][file]) for file in kept)  # rows are added
        grown.append(len(three[after]) - len(three[before]))
    assert min(grown) >= 0 and grown[-1] > 0
    left = {file.name for file in three["nsga2"] if file.parent.name != "evaluations"}
    assert {"front.png", "sensitivity.png", "clusters.png", "journal.log"} < left
    assert not any("lock" in name for name in left)


def test_again_is_the_same(common: Row, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    search(tmp_path, common)
    before = contents(tmp_path)
    assert f"plan: {tmp_path}/plan.yaml" in capsys.readouterr().out
    search(tmp_path, common)
    after = contents(tmp_path)
    plan = tmp_path / "plan.yaml"
    assert timeless(plan) == re.sub(r"seconds: .*", "", before.pop(plan).decode()) and after.pop(plan)
    assert after == before


def timeless(plan: Path) -> str:
    return re.sub(r"seconds: .*", "", plan.read_text())


# ---- other settings


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that cost nothing: of a search's bookkeeping, not of the model."""

    def evaluate(self: Search, plan: CachePlan) -> Row:
        kld = sum(4.0**-spec.bits_nominal / (i + 1) for i, spec in enumerate(plan.specs))
        return {"kld": kld, "nll": 1 + kld, "top1": 1 / (1 + kld), "seconds": 0.1} | self.objective.measure(plan)

    def measure(self: LayerErrors, layer: int, places: list[Place], *_: Any) -> list[Row]:
        specs = [place.spec for place in places]
        bits = [{"bits_nominal": spec.bits_nominal, "bits_asymptotic": spec.bits_nominal} for spec in specs]
        errors = [4.0**-spec.bits_nominal / (layer + 1) for spec in specs]
        names = ("e_k", "e_v", "e_a", "e_o", "predicted", "joint")
        return [
            {"layer": layer, "cache": place.label, **of, **dict.fromkeys(names, error)}
            for place, of, error in zip(places, bits, errors, strict=True)
        ]

    monkeypatch.setattr(Search, "_evaluate", evaluate)
    monkeypatch.setattr(LayerErrors, "_measure", measure)
    monkeypatch.setattr(LayerErrors, "_gradients", lambda self: [0])
    monkeypatch.setattr(LayerErrors, "_carries", lambda self, plan, places: [{}] * len(places))


def test_a_budget_with_scales(common: Row, model: Model, tmp_path: Path) -> None:
    search(tmp_path, common, budget=4.75, budget_of="asymptotic", method="refine")
    card = yaml.safe_load((tmp_path / "plan.yaml").read_text())["card"]
    assert card["search"]["budget"] == 4.75 and card["search"]["budget_of"] == "asymptotic bits"
    assert 4.25 <= card["expected"]["bits_asymptotic"] <= 4.75
    *rows, chosen = rows_of(tmp_path / "front.jsonl")
    assert chosen["kld"] == min(row["kld"] for row in rows if row["bits_asymptotic"] <= 4.75)


def test_measured_errors_after_predicted_ones(common: Row, tmp_path: Path) -> None:
    file, settings = tmp_path / "sensitivity.jsonl", common | {"candidates": "k8v4,k4v4,k2v2"}
    search(tmp_path, settings)
    predicted = rows_of(file)
    assert len(predicted) == LAYERS * 3 and not any("kld" in row for row in predicted)
    search(tmp_path, settings, error="kld")
    measured = rows_of(file)[len(predicted) :]
    assert rows_of(file)[: len(predicted)] == predicted and len(measured) == len(predicted)
    for old, new in zip(predicted, measured, strict=True):
        assert old.items() <= (new | {"git": old["git"]}).items() and new["kld"] > 0
    whole = file.read_bytes()
    for error in ("predicted", "e_o", "kld"):
        search(tmp_path, settings, error=error)
        assert file.read_bytes() == whole
    # More candidates: only those are measured.
    search(tmp_path, settings, candidates="k4v4,k3v3,k2v2", error="kld")
    more = rows_of(file)[len(predicted) + len(measured) :]
    assert [(row["layer"], row["cache"]) for row in more] == [(layer, "k3v3@kivi") for layer in range(LAYERS)]


@pytest.mark.usefixtures("invented")
@pytest.mark.parametrize("key", ["layer", "cache", "e_o", "predicted", "tokens_sha256"])
def test_rows_that_lack_something_are_measured_again(key: str, common: Row, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.jsonl"
    search(tmp_path, common, candidates="k4v4,k2v2")
    plan, rows = timeless(tmp_path / "plan.yaml"), rows_of(file)
    for row in rows[2:]:
        row.pop(key)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    search(tmp_path, common, candidates="k4v4,k2v2")
    assert len(rows_of(file)) == 2 * LAYERS + len(rows[2:]) and timeless(tmp_path / "plan.yaml") == plan


def test_bfloat16(common: Row, tmp_path: Path) -> None:
    search(tmp_path, common, candidates="k4v4,k2v2", dtype="bfloat16")
    assert all(0 < row["predicted"] < 10 for row in rows_of(tmp_path / "sensitivity.jsonl"))
    assert rows_of(tmp_path / "front.jsonl")[-1]["cache"] == "k4v4@kivi"


@pytest.mark.parametrize("objective", ["nll", "top1"])
def test_other_objectives(objective: str, common: Row, tmp_path: Path) -> None:
    search(tmp_path, common)
    known = contents(tmp_path / "evaluations")
    search(tmp_path, common, objective=objective)
    assert known.items() <= contents(tmp_path / "evaluations").items()
    *rows, chosen = rows_of(tmp_path / "front.jsonl")
    fitting = [row[objective] for row in rows if row["bits_nominal"] <= 4]
    assert chosen[objective] == (min(fitting) if objective == "nll" else max(fitting))
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text())["card"]["search"]["objective"] == objective


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    file = tmp_path / "problems.jsonl"
    rows = [{"question": f"How many of {i} are left?", "answer": f"All.\n#### {i}"} for i in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_agreement_of_greedy_answers(
    common: Row, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(objectives.NEW_TOKENS, "agreement", 6)
    settings = {"model": f"{common['model']}(layers=1)", "candidates": "k8v8@token,k1v1@token", "points": 1}
    settings |= {"objective": "agreement", "problems": str(problems), "count": 4, "shots": 0, "budget": 8.0}
    search(tmp_path / "out", common, **settings)
    *rows, chosen = rows_of(tmp_path / "out/front.jsonl")
    assert chosen["agreement"] == max(row["agreement"] for row in rows) > min(row["agreement"] for row in rows)
    assert chosen["cache"] == "k8v8@token"
    search(tmp_path / "out", common, **settings | {"objective": "kld"})
    assert len(list((tmp_path / "out/evaluations").iterdir())) == 2 * len(rows)  # of another kind


@pytest.mark.usefixtures("invented")
def test_answers_to_problems(common: Row, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def accuracy(model: Model, plan: CachePlan, some: list, shots: list, max_new_tokens: int) -> Accuracy:
        asked.append(([p.gold for p in some], [p.gold for p in shots], max_new_tokens))
        return Accuracy(3 if str(plan) == "k4v2@kivi" else 1, 4)  # not what KL says

    monkeypatch.setattr(objectives, "accuracy", accuracy)
    settings = {"objective": "gsm8k", "problems": str(problems), "count": 3}
    search(tmp_path / "out", common, **settings, shots=2)
    assert set(map(str, asked)) == {str((["0", "1", "2"], ["3", "4"], 256))}
    chosen = rows_of(tmp_path / "out/front.jsonl")[-1]
    assert chosen["cache"] == "k4v2@kivi" and chosen["gsm8k"] == 0.75
    before = len(asked)
    search(tmp_path / "out", common, **settings, shots=2)
    assert len(asked) == before
    search(tmp_path / "out", common, **settings, shots=1)
    assert len(asked) == 2 * before


@pytest.mark.usefixtures("invented")
def test_several_texts(common: Row, home: Path, tmp_path: Path, model: Model) -> None:
    search(tmp_path, common, text=f"{home / 'text.txt'},{home / 'other.txt'}", candidates="k4v4,k2v2")
    card = yaml.safe_load((tmp_path / "plan.yaml").read_text())["card"]
    ids = [model.tokenizer.encode((home / name).read_text())[:CONTEXT] for name in ("text.txt", "other.txt")]
    both = hashlib.sha256(np.concatenate(ids).astype(np.int32).tobytes()).hexdigest()
    assert card["calibration"]["text"] == "text.txt,other.txt" and card["calibration"]["tokens_sha256"] == both


@pytest.mark.usefixtures("invented")
def test_others_forms_are_there_where_they_say_all(common: Row, model: Model, tmp_path: Path) -> None:
    for candidates, names in {
        "k4v4,k2v2": ["kvtuner_kivi.yaml"],
        "k4v4@token,k2v2@token": ["kvtuner_pertoken.yaml"],
        "k4v4@token(sink=4),k2v2@token(sink=4)": [],  # which it has no word for
        "dense,k2v2": [],
        "fp8,nvfp4": ["hf_quant_config.json"],
    }.items():
        search(tmp_path, common, candidates=candidates, points=1, budget=9.0)
        assert [file.name for kind in ("kvtuner*", "hf_*") for file in tmp_path.glob(kind)] == names
        plan = CachePlan.parse(str(tmp_path / "plan.yaml"), model.config)
        assert all(CachePlan.parse(str(tmp_path / name), model.config) == plan for name in names)


@pytest.mark.usefixtures("invented")
def test_dense_layers_and_one_candidate(common: Row, tmp_path: Path) -> None:
    search(tmp_path, common, candidates="dense,k2v2", budget=9.0)
    chosen = rows_of(tmp_path / "front.jsonl")[-1]
    assert chosen["bits_nominal"] == 9 and "dense" in chosen["cache"]
    for method in METHODS:
        search(tmp_path, common, candidates="k4v4", method=method)
        chosen = rows_of(tmp_path / "front.jsonl")[-1]
        card = yaml.safe_load((tmp_path / "plan.yaml").read_text())["card"]
        assert chosen["cache"] == "k4v4@kivi" and card["front"] == [[chosen["bits_asymptotic"], chosen["kld"]]]


@pytest.mark.usefixtures("invented")
def test_another_seed_is_another_search(common: Row, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1, 0):
        search(tmp_path, common, method="nsga2", seed=seed, prune="none", cluster="none", trials=6)
        found.append([row["cache"] for row in rows_of(tmp_path / "front.jsonl") if row["kind"] == "search"])
    assert found[0] == found[2] != found[1]


@pytest.mark.usefixtures("invented")
def test_deltas_are_pruned_by_their_own_bits(common: Row, home: Path, tmp_path: Path, monkeypatch) -> None:
    """Not by those of the layers up to the base of their run."""
    config = get_config()
    config.update(common | {"candidates": "k4v4,k3v3,xcl2(base=0),xcl3(base=0)"})
    model = load(config.model, config.dtype)
    made = tune.make_search(config, model, tune.calibration(config, model), tmp_path)
    groups, choices = made.groups()
    assert sorted(layer for group in groups for layer in group) == list(range(LAYERS))
    assert all("xcl2@input(base=0)" in map(str, choice) for choice in choices)  # nothing has less
    drawn = []
    monkeypatch.setattr(tune.tune_pictures, "clusters", lambda *args: drawn.append(args))
    monkeypatch.setattr(style, "write", lambda file, draw, *args: None if args else draw())  # clusters alone has none
    tune.draw(made, made.front([]), tmp_path)
    ((rows, named),) = drawn
    caches = {row["cache"] for row in rows}
    assert len(rows) == LAYERS * len(caches) and all(set(group["candidates"]) <= caches for group in named)
    assert [len(group["candidates"]) for group in named] == [len(choices[group["layers"][0]]) for group in named]
    config.update(candidates="k4v4,k2v2")
    fewer = tune.make_search(config, model, tune.calibration(config, model), tmp_path)
    fewer.errors()
    tune.draw(fewer, fewer.front([]), tmp_path)
    assert {row["cache"] for row in drawn[1][0]} == {"k4v4@kivi", "k2v2@kivi"}  # not all that the folder has


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"budget": 1.0}, "budget=1.0 nominal bits; expected at least 2, the least of the candidates"),
        ({"budget": 3.0, "budget_of": "asymptotic"}, "budget=3.0 asymptotic bits; expected at least 3.5"),
        ({"candidates": "k4v4,xcl3(base=4)"}, "has no base layer 4"),
        ({"context": 257}, "expected at most the model's 256"),
        ({"text": "text.txt,"}, "expected names separated by single commas"),
        ({"objective": "agreement"}, "expected GSM8K's jsonl file"),
    ],
)
def test_refusals(settings: Row, said: str, common: Row, tmp_path: Path) -> None:
    with pytest.raises(KvjaxError, match=re.escape(said)):
        search(tmp_path, common, **settings)
    assert not (tmp_path / "plan.yaml").exists()


# ---- as a program: against packed caches, shared, killed, interrupted


def run(name: str, fields: Row, workdir: Path, home: Path, output: Path) -> None:
    """A program with its flags, in a process that has imported it already; it draws nothing."""
    with output.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    os.environ["KVJAX_CACHE"] = str(home / "bases")
    compile_quickly(home / "compiled")
    style.write = lambda *_: None
    sys.argv = [name, *(f"--config.{key}={value}" for key, value in fields.items()), f"--workdir={workdir}"]
    program.run(importlib.import_module(f"kvjax.experiments.{name}").main, f"configs/{name}.py")


Started = Callable[..., BaseProcess]


@pytest.fixture
def started(home: Path, common: Row, tmp_path: Path) -> Iterator[Started]:
    """Starts programs; none outlives the test."""
    processes: list[BaseProcess] = []

    def start(workdir: Path, settings: Row, name: str = "tune") -> BaseProcess:
        fields = (common if name == "tune" else {}) | settings
        output = tmp_path / f"output{len(processes)}.txt"
        process = SPAWN.Process(target=run, args=(name, fields, workdir, home, output), name=str(output), daemon=True)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def said(process: BaseProcess) -> str:
    return Path(process.name).read_text()


def finish(process: BaseProcess) -> None:
    process.join()
    assert process.exitcode == 0, said(process)


def test_expected_figures_are_those_of_packed_caches(common: Row, started: Started, tmp_path: Path) -> None:
    """One search over K and V pairs, latents of X and deltas, in float64."""
    settings = {"candidates": "k4v4,k3v3,x3,xcl2(base=0)", "budget": 2.5, "budget_of": "asymptotic", "points": 1}
    finish(started(tmp_path / "tune", settings | {"dtype": "float64"}))
    data = yaml.safe_load((tmp_path / "tune/plan.yaml").read_text())
    assert data["plan"] == "0:k3v3@kivi;1-2:xcl2@input(base=0);3:x3@input"  # layer 2 stores a delta
    assert not list((tmp_path / "tune").glob("kvtuner*"))
    fields = {key: common[key] for key in ("model", "text", "context", "windows")}
    fields |= {"caches": tmp_path / "tune/plan.yaml", "dtype": "float64", "protocol": "streaming"}
    finish(started(tmp_path / "sweep", fields, "perplexity"))
    (packed,) = rows_of(tmp_path / "sweep/results.jsonl")
    card = data["card"]
    assert packed["cache"] == data["plan"] and packed["kld"] > 0.1
    for key in ("kld", "nll"):
        assert card["expected"][key] == pytest.approx(packed[key], abs=1e-9)
    for key in ("top1", "bits_nominal", "bits_asymptotic", "bits_real"):
        assert card["expected"][key] == pytest.approx(packed[key])
    assert card["model_sha256"] == packed["model_sha256"]
    assert card["calibration"]["tokens_sha256"] == packed["tokens_sha256"]


WIDE = {"prune": "none", "cluster": "none"}  # 9^4 plans


@pytest.fixture(scope="module")
def whole(common: Row, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of searches that nothing stops."""
    folders = {}
    for method in ("refine", "nsga2"):
        folders[method] = tmp_path_factory.mktemp("whole")
        settings = common | {"method": method, "error": "kld"} | WIDE
        arguments = ("tune", settings, folders[method], home, home / f"{method}.txt")
        process = SPAWN.Process(target=run, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0, (home / f"{method}.txt").read_text()
    return folders


def figures(file: Path) -> list[Row]:
    """Rows without what differs from run to run."""
    return [{key: row[key] for key in row if key not in ("seconds", "git")} for row in rows_of(file)]


def wait(process: BaseProcess, enough: Callable[[], bool]) -> None:
    while process.is_alive() and not enough():
        time.sleep(0.001)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def evaluated(workdir: Path) -> int:
    return len(list((workdir / "evaluations").glob("*.json")))


MOMENTS: dict[str, list[tuple[str, Callable[[Path], bool]]]] = {
    "refine": [
        ("sensitivity", lambda workdir: lines(workdir / "sensitivity.jsonl") >= PAIRS),
        ("sensitivity", lambda workdir: lines(workdir / "sensitivity.jsonl") >= 3 * PAIRS),
        ("refining", lambda workdir: evaluated(workdir) >= 1),
        ("refining", lambda workdir: evaluated(workdir) >= 5),
        ("evaluating", lambda workdir: evaluated(workdir) >= 14),
    ],
    "nsga2": [
        ("NSGA-II", lambda workdir: lines(workdir / "journal.log") >= 1),
        ("NSGA-II", lambda workdir: lines(workdir / "journal.log") >= 40),
        ("NSGA-II", lambda workdir: lines(workdir / "journal.log") >= 90),
        ("evaluating", lambda workdir: evaluated(workdir) >= 14),
    ],
}


@pytest.mark.parametrize("method", MOMENTS)
def test_killed_at_random_moments(method: str, whole: dict[str, Path], started: Started, tmp_path: Path) -> None:
    workdir, rng, killed = tmp_path / "out", random.Random(method), []
    settings = {"method": method, "error": "kld"} | WIDE
    expected = figures(whole["refine"] / "sensitivity.jsonl")
    for stage, enough in MOMENTS[method]:
        process = started(workdir, settings)
        wait(process, lambda enough=enough: enough(workdir))  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed.append(stage)
        if (workdir / "sensitivity.jsonl").exists():
            rows = figures(workdir / "sensitivity.jsonl")
            assert rows == expected[: len(rows)]
        assert all(json.loads(file.read_text()) for file in (workdir / "evaluations").glob("*.json"))
    assert len(killed) >= 2, killed
    finish(started(workdir, settings))
    assert timeless(workdir / "plan.yaml") == timeless(whole[method] / "plan.yaml")
    assert figures(workdir / "front.jsonl") == figures(whole[method] / "front.jsonl")
    assert evaluations(workdir).keys() == evaluations(whole[method]).keys()
    if method == "refine":
        assert figures(workdir / "sensitivity.jsonl") == expected


def test_interrupted_by_the_user(whole: dict[str, Path], started: Started, tmp_path: Path) -> None:
    workdir, settings = tmp_path / "out", {"method": "nsga2", "error": "kld"} | WIDE
    for enough in (lambda: evaluated(workdir) >= 1, lambda: lines(workdir / "journal.log") >= 60):
        process = started(workdir, settings)
        wait(process, enough)
        assert process.pid
        os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode == 130, said(process)
        assert said(process).splitlines()[-1] == "interrupted" and "Traceback" not in said(process)
        assert "[W " not in said(process)  # of the library's log
        assert not list(workdir.rglob("*.lock")) and not list(workdir.rglob(".*"))
    finish(started(workdir, settings))
    assert timeless(workdir / "plan.yaml") == timeless(whole["nsga2"] / "plan.yaml")


def test_two_workers_in_a_fresh_folder(started: Started, tmp_path: Path) -> None:
    """They wait for each other's layers and evaluations, and share the trials."""
    workdir = tmp_path / "out"
    workers = [started(workdir, {"method": "nsga2", "worker": worker, "trials": 25}) for worker in range(2)]
    for process in workers:
        finish(process)
    rows = rows_of(workdir / "sensitivity.jsonl")
    assert len({(row["layer"], row["cache"]) for row in rows}) == len(rows) == LAYERS * PAIRS
    ended = [row for row in rows_of(workdir / "journal.log") if "values" in row]
    assert 25 <= len(ended) <= 26
    front = rows_of(workdir / "front.jsonl")
    # The one that writes last may have counted its plans while the other still evaluated its last.
    plans = {row["cache"] for row in front}
    assert plans <= evaluations(workdir).keys() and len(evaluations(workdir)) - len(plans) <= 1
    fitting = [row["kld"] for row in front if row["bits_nominal"] <= 4]
    assert front[-1]["kld"] == min(fitting)
