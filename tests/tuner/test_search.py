"""`kvjax.tune`: the program's plan in one call, refusals before anything is computed, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

import kvjax
from kvjax.caches import registry
from kvjax.caches.cross_layer import Place
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.configs.tune import get_config
from kvjax.errors import KvjaxError
from kvjax.evaluate.calibrated import calibration
from kvjax.experiments import style
from kvjax.experiments import tune as program
from kvjax.models.model import Model
from kvjax.tuner import search as searches
from kvjax.tuner.layer_errors import LayerErrors
from kvjax.tuner.search import Search
from kvjax.tuner.settings import SearchSettings
from kvjax.tuner.tune import Tuning

Row = dict[str, Any]
pytestmark = pytest.mark.usefixtures("quick_compilation")
PLACE: Row = {"context": 64, "windows": 1}
ASKED: Row = {"budget": 3.5, "candidates": "k4v4,k4v2,k2v2", "points": 3}


@pytest.fixture(scope="module")
def made(model: Model, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the program's search."""
    workdir, config = tmp_path_factory.mktemp("made"), get_config()
    config.update({"model": model.name, "text": text} | PLACE | ASKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "write", lambda *_: None)
        program.main(config, workdir)
    return workdir


def rows_of(workdir: Path) -> list[Row]:
    return [json.loads(line) for line in (workdir / "front.jsonl").read_text().splitlines()]


def timeless(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def timeless_card(card: Row) -> Row:
    asked = card["search"]
    assert asked["seconds"] > 0
    return card | {"search": {key: value for key, value in asked.items() if key != "seconds"}}


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a simulator was made")

    monkeypatch.setattr(searches, "Simulator", refuse)


# ---- the same as the program


@pytest.fixture(scope="module")
def tuned(model: Model, text: str) -> tuple[Tuning, list[tuple[str, int, int]], list[Path]]:
    """A call that keeps nothing, what its progress heard, and what it left among temporary files."""
    heard: list[tuple[str, int, int]] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        tuning = kvjax.tune(model, text, **ASKED, **PLACE, progress=lambda *call: heard.append(call))
        left = list(Path(folder).iterdir())
    return tuning, heard, left


def test_the_programs_plan_rows_and_card(tuned: tuple[Tuning, list, list], made: Path, model: Model) -> None:
    tuning, data = tuned[0], yaml.safe_load((made / "plan.yaml").read_text())
    assert tuning.plan == CachePlan.parse(data["plan"], model.config)
    assert timeless(tuning.rows) == timeless(rows_of(made)) and len(tuning.rows) > 4
    assert timeless_card(tuning.card) == timeless_card(data["card"])


def test_nothing_is_left_behind(tuned: tuple[Tuning, list, list[Path]]) -> None:
    assert tuned[2] == []


def test_progress_hears_every_stage_to_its_end(tuned: tuple[Tuning, list[tuple[str, int, int]], list]) -> None:
    tuning, heard, _ = tuned
    layers = len(tuning.plan.specs)
    assert heard[: layers + 1] == [("sensitivity", i, layers) for i in range(layers + 1)]
    rest = [call for call in heard[layers + 1 :] if call[0] != "validating"]
    assert rest == [("evaluating", i, len(rest) - 1) for i in range(len(rest))] and len(rest) > 3
    last = heard[layers + 1 + len(rest) :]
    assert last == [("validating", i, len(last)) for i in range(1, len(last) + 1)] and len(last) > 1


def test_saved_plans_are_plans(tuned: tuple[Tuning, list, list], model: Model, tmp_path: Path) -> None:
    tuning = tuned[0]
    tuning.save(tmp_path / "new/plan.yaml")
    assert CachePlan.parse(str(tmp_path / "new/plan.yaml"), model.config) == tuning.plan
    assert yaml.safe_load((tmp_path / "new/plan.yaml").read_text()) == {"plan": str(tuning.plan), "card": tuning.card}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["plan.yaml"]
    with pytest.raises(KvjaxError, match=r"plan\.json is no name of a plan file; expected one that ends in \.yaml"):
        tuning.save(tmp_path / "plan.json")
    assert str(tuning.plan) in repr(tuning) and len(repr(tuning)) < 200


@pytest.mark.usefixtures("nothing_is_computed")
def test_goes_on_in_the_programs_folder(made: Path, model: Model, text: str) -> None:
    """All that it needs is measured, under the same identity: figures are equal to the last digit, seconds too."""
    before = {file: file.read_bytes() for file in made.rglob("*") if file.is_file()}
    tuning = kvjax.tune(model, text, **ASKED, **PLACE, folder=str(made))
    assert tuning.rows == rows_of(made)
    assert {file: file.read_bytes() for file in made.rglob("*") if file.is_file()} == before


def test_a_lost_evaluation_is_made_again(made: Path, model: Model, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    (folder / "evaluations").mkdir(parents=True)
    (folder / "sensitivity.jsonl").write_bytes((made / "sensitivity.jsonl").read_bytes())
    lost, *kept = sorted((made / "evaluations").iterdir())
    for file in kept:
        (folder / "evaluations" / file.name).write_bytes(file.read_bytes())
    tuning = kvjax.tune(model, text, **ASKED, **PLACE, folder=folder)
    assert timeless(tuning.rows) == timeless(rows_of(made))
    assert (folder / "evaluations" / lost.name).exists()
    assert (folder / "sensitivity.jsonl").read_bytes() == (made / "sensitivity.jsonl").read_bytes()


# ---- judged on a text that it never saw


def test_the_card_says_how_good_the_plan_is_elsewhere(
    made: Path, model: Model, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The figures of packed caches on the judged text."""
    other = tmp_path / "other.txt"
    other.write_text("Pack my box with five dozen liquor jugs! " * 20)
    folder = tmp_path / "folder"
    shutil.copytree(made, folder)
    tuning = kvjax.tune(model, text, **ASKED, **PLACE, judged_on=other, folder=folder)
    judged, scored = tuning.card["judged"], kvjax.score(model, other, tuning.plan, **PLACE)
    assert judged["text"] == "other.txt" and judged["tokens_sha256"] != tuning.card["calibration"]["tokens_sha256"]
    for name in ("kld", "nll", "top1"):
        assert judged[name] == pytest.approx(getattr(scored, name), rel=1e-3)
    assert judged["kld"] != tuning.card["expected"]["kld"]
    card = yaml.safe_load((made / "plan.yaml").read_text())["card"]
    assert "judged" not in card and tuning.card["expected"] == card["expected"]
    config = get_config()
    config.update({"model": model.name, "text": text, "judged_on": str(other)} | PLACE | ASKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "draw", lambda *_: None)
        program.main(config, folder)
    assert yaml.safe_load((folder / "plan.yaml").read_text())["card"]["judged"] == judged
    assert f"judged on other.txt: KL {judged['kld']:.5f}" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_is_computed")
def test_refuses_to_judge_on_what_it_calibrated_on(model: Model, text: str, tmp_path: Path) -> None:
    again = tmp_path / "another-name.txt"
    again.write_text(Path(text).read_text())
    with pytest.raises(KvjaxError, match=r"judged windows share .* tokens with those that plans are calibrated on"):
        kvjax.tune(model, text, **ASKED, **PLACE, judged_on=again, folder=tmp_path / "out")
    with pytest.raises(KvjaxError, match="is both calibrated on and judged on; expected another text"):
        kvjax.tune(model, text, **ASKED, **PLACE, judged_on=Path(text), folder=tmp_path / "out")


# ---- what is refused, before anything is computed


@dataclasses.dataclass(frozen=True)
class Other(KV):
    """KV under a name of its own, as a plugin's."""

    form: ClassVar[str] = "other{key_bits}v{value_bits}"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    examples: ClassVar[tuple[str, ...]] = ("other4v4@kivi",)


@dataclasses.dataclass(frozen=True)
class Unsure(Other):
    """What it reads may depend on how its tokens are fed."""

    form: ClassVar[str] = "unsure{key_bits}v{value_bits}"
    examples: ClassVar[tuple[str, ...]] = ("unsure4v4@kivi",)

    @property
    def whole_windows(self) -> bool:
        return False


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    registry.register(Other)
    registry.register(Unsure)


@pytest.mark.usefixtures("plugins", "nothing_is_computed")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"candidates": "k4v4,unsure2v2"}, "layer 0 is unsure2v2@kivi, whose reads depend on how tokens are fed"),
        ({"candidates": "k4v4,zip"}, "cache 'zip' is not known"),
        ({"candidates": "k4v4,xcl3(base=4)"}, "has no base layer 4"),
        ({"budget": 1}, "budget=1.0 nominal bits; expected at least 2, the least of the candidates"),
        ({"budget": "much"}, "budget='much'; expected float"),
        ({"trials": 2.5}, "trials=2.5; expected int"),
        ({"rounds": 0}, "rounds=0; expected at least 1"),
        ({"method": "random"}, "method='random'; expected one of knapsack, nsga2, refine"),
        ({"objective": "gsm8k"}, "needs problems; expected GSM8K's jsonl file"),
        ({"metod": "refine"}, "unknown setting 'metod'; expected mode, candidates, budget, budget_of, "),
        ({"progress": 3}, "progress is of type int; expected what can be called"),
        ({"windows": 100}, "expected at least 6400"),
    ],
)
def test_refusals(settings: Row, said: str, model: Model, text: str, tmp_path: Path) -> None:
    with pytest.raises(KvjaxError, match=re.escape(said)) as error:
        kvjax.tune(model, text, **ASKED | PLACE | settings, folder=tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(model: Model, text: str) -> None:
    with pytest.raises(KvjaxError, match=r"text\.txt cannot be a folder for results: File exists"):
        kvjax.tune(model, text, **ASKED, **PLACE, folder=text)


def test_settings_are_the_programs() -> None:
    config = get_config()
    assert program.settings_of(config) == SearchSettings()


# ---- pruning


def errors_of(layer: int, spec: KV) -> Row:
    """Local errors that prefer bits of V, and KL that prefers bits of K: what models are measured to have."""
    scale = 1 + layer
    costs = {"e_o": (1, 3), "predicted": (3, 1), "joint": (3, 1), "kld": (4, 1)}
    return {name: scale * (k * 4.0**-spec.key_bits + v * 4.0**-spec.value_bits) for name, (k, v) in costs.items()}


def nothing_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run that errors are measured around: they are invented."""
    monkeypatch.setattr(LayerErrors, "_gradients", lambda self: [0])
    monkeypatch.setattr(LayerErrors, "_carries", lambda self, plan, places: [{}] * len(places))


@pytest.fixture
def searching(model: Model, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Search]:
    """Searches over KVTuner's nine pairs whose layers have `errors_of`."""

    def measure(self: LayerErrors, layer: int, places: list[Place], *_: Any) -> list[Row]:
        specs = [place.spec for place in places]
        bits = [{"bits_nominal": spec.bits_nominal, "bits_asymptotic": spec.bits_nominal} for spec in specs]
        named = [{"layer": layer, "cache": str(spec)} | errors_of(layer, spec) for spec in specs]
        return [one | two for one, two in zip(bits, named, strict=True)]

    nothing_around(monkeypatch)
    monkeypatch.setattr(LayerErrors, "_measure", measure)
    windows = calibration(model, text, offset=0, **PLACE)
    return lambda **settings: Search(SearchSettings.of(settings), model, windows, {}, tmp_path)


def names(specs: Iterable[Any]) -> set[str]:
    return {str(spec).removesuffix("@kivi") for spec in specs}


@pytest.mark.parametrize(
    ("settings", "error", "kept"),
    [
        ({}, "predicted", {"k8v8", "k8v4", "k4v4", "k4v2", "k2v2"}),
        ({"error": "kld"}, "kld", {"k8v8", "k8v4", "k4v4", "k4v2", "k2v2"}),
        ({"error": "e_o"}, "predicted", {"k8v8", "k8v4", "k4v4", "k4v2", "k2v2"}),
        ({"prune": "paper"}, "e_o", {"k8v8", "k4v8", "k4v4", "k2v4", "k2v2"}),
    ],
)
def test_pruning_keeps_the_best_pair_of_every_budget(
    settings: Row, error: str, kept: set[str], searching: Callable[..., Search]
) -> None:
    search = searching(cluster="none", **settings)
    groups, choices = search.groups()
    for (layer,), choice in zip(groups, choices, strict=True):
        for most in (2, 3, 4, 5, 6, 8):
            within = [spec for spec in search.candidates if spec.bits_nominal <= most]
            assert min(within, key=lambda spec: errors_of(layer, spec)[error]) in choice
        assert names(choice) == kept
    assert names(searching(prune="none", cluster="none").groups()[1][0]) == names(search.candidates)


# ---- plugins


@pytest.mark.usefixtures("plugins")
def test_the_card_names_the_plugins_of_its_plan(
    model: Model, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Figures are invented: fewer bits are worse."""

    def measure(self: LayerErrors, layer: int, places: list[Place], *_: Any) -> list[Row]:
        specs = [place.spec for place in places]
        errors = [{"e_o": 4.0**-spec.bits_nominal, "bits_asymptotic": spec.bits_nominal} for spec in specs]
        return [
            {"layer": layer, "cache": str(spec), "predicted": error["e_o"], "joint": error["e_o"], **error}
            for spec, error in zip(specs, errors, strict=True)
        ]

    def evaluate(self: Search, plan: CachePlan) -> Row:
        return {"kld": 4.0**-plan.bits_nominal, "nll": 1.0, "top1": 0.5, "seconds": 0.1}

    nothing_around(monkeypatch)
    monkeypatch.setattr(LayerErrors, "_measure", measure)
    monkeypatch.setattr(Search, "_evaluate", evaluate)
    found = {}
    for budget in (4, 8):
        tuning = kvjax.tune(model, text, budget, **PLACE, candidates="k8v8,other4v4", folder=tmp_path, validation=0)
        found[str(tuning.plan)] = tuning.card.get("plugins")
    assert found == {"other4v4@kivi": [__name__], "k8v8@kivi": None}
