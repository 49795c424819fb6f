"""Answers and figures of three tasks against lm-evaluation-harness's own HF backend (make_harness_goldens.py)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvjax
from kvjax.models.model import Model

harness: Any = pytest.importorskip("lm_eval")

from kvjax.evaluate import lm_eval, suite  # noqa: E402
from kvjax.evaluate.answers import Writing  # noqa: E402
from kvjax.evaluate.lm_eval import KvjaxLM, writing_of  # noqa: E402
from kvjax.evaluate.task import Figure  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[2]
TASKS = ("choice", "rolling", "writing")


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "harness.json").read_text())


@pytest.fixture(scope="module")
def model(goldens: Path, golden: dict[str, Any]) -> Model:
    made = kvjax.load(str(goldens / "llama-linear"), "float32")
    return dataclasses.replace(made, tokenizer=dataclasses.replace(made.tokenizer, chat_template=golden["template"]))


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tasks name their data from the root of the repository."""
    import datasets

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def found(quick_compilation: None, model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness makes of our answers with a dense cache."""
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.chdir(ROOT)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        names = [f"tests/evaluate/harness/{name}.yaml" for name in TASKS]
        lm = KvjaxLM(model, "dense", batch=4)
        return harness.simple_evaluate(lm, tasks=names, bootstrap_iters=0)


@pytest.mark.parametrize("task", TASKS)
def test_figures_are_the_hf_backends(task: str, found: dict[str, Any], golden: dict[str, Any]) -> None:
    expected = golden["results"][task]
    own = {key: found["results"][task][key] for key in expected}
    assert own == pytest.approx(expected, rel=1e-3) and len(own) >= 2


def _flat(value: Any) -> list[Any]:
    return [each for part in value for each in _flat(part)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_the_hf_backends(task: str, found: dict[str, Any], golden: dict[str, Any]) -> None:
    own = [sample["resps"] for sample in found["samples"][task]]
    expected = golden["answers"][task]
    if task == "writing":
        assert own == expected
        return
    assert _flat(own) == pytest.approx(_flat(expected), rel=1e-5)  # log-likelihoods, and whether they are greedy


def test_chats_are_the_hf_backends(model: Model, golden: dict[str, Any]) -> None:
    lm = KvjaxLM(model)
    chat = golden["chat"]
    own = [lm.apply_chat_template(chat[:1]), lm.apply_chat_template(chat, add_generation_prompt=False)]
    assert own == golden["chats"]
    assert lm.chat_template(True) == golden["template"] and lm.chat_template(False) is None
    assert model.checksum[:16] in lm.tokenizer_name


def test_an_empty_context_is_bos(model: Model) -> None:
    lm = KvjaxLM(model, batch=1)
    ids = model.tokenizer.encode("pear").tolist()
    expected = lm.answers.loglikelihoods([([model.tokenizer.bos_id], ids)])
    assert lm.loglikelihood(requests(("", "pear")), disable_tqdm=True) == expected
    assert (lm.eot_token_id, lm.prefix_token_id, lm.max_length) == (2, 1, 256)


def test_a_small_cache_reads_what_decoding_reads(model: Model) -> None:
    """Its log-likelihoods are those of `kvjax.score`, by the protocol `streaming`."""
    text = "the quick brown fox jumps over the lazy dog. " * 3
    ids = model.tokenizer.encode(text).tolist()
    plan = "k2v2@kivi(group=8,residual=16)"
    scored = kvjax.score(model, ids, plan, context=len(ids), windows=1).per_token.nll[0]
    value, _ = KvjaxLM(model, plan, batch=2).answers.loglikelihoods([(ids[:100], ids[100:])])[0]
    assert value == pytest.approx(-scored[99:].sum(), rel=1e-5)
    exact, _ = KvjaxLM(model, batch=2).answers.loglikelihoods([(ids[:100], ids[100:])])[0]
    assert abs(exact - value) > 0.1


def test_the_harnesses_own_cache_of_answers_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(kvjax.KvjaxError, match="use_cache would mix the answers of all plans"):
        harness.simple_evaluate(
            KvjaxLM(model), tasks=["tests/evaluate/harness/choice.yaml"], use_cache=str(tmp_path / "kept")
        )


@pytest.mark.parametrize(
    "arguments,expected",
    [
        ({"until": "a"}, Writing(256, ("a",))),
        ({"until": ["a", ""], "max_new_tokens": 9, "do_sample": False, "temperature": 0.0}, Writing(9, ("a",))),
        ({"max_gen_toks": 5, "do_sample": True, "temperature": 0.5, "top_p": 0.9}, Writing(5, (), 0.5, top_p=0.9)),
    ],
)
def test_generation_arguments(arguments: dict[str, Any], expected: Writing) -> None:
    assert writing_of(arguments) == expected


def test_unknown_generation_arguments_are_named() -> None:
    with pytest.raises(kvjax.KvjaxError, match=r"generation_kwargs num_beams; expected until, max_gen_toks"):
        writing_of({"num_beams": 4})


def test_figures_of_tasks_and_groups() -> None:
    results = {
        "results": {
            "part": {"alias": "part", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1},
            "whole": {"alias": "whole", "acc,none": 0.25, "acc_stderr,none": "N/A"},
        },
        "n-samples": {"part": {"original": 9, "effective": 7}},
    }
    acc, f1, whole = lm_eval.figures_of(results)
    assert acc == Figure("part", "acc", 0.5, 0.1, 7)
    assert (f1.metric, f1.value, f1.samples) == ("f1,strict", 1.0, 7) and math.isnan(f1.stderr)
    assert (whole.task, whole.value, whole.samples) == ("whole", 0.25, 0) and math.isnan(whole.stderr)


def test_tasks_of_the_harness_are_tasks_of_ours(model: Model, tmp_path: Path, golden: dict[str, Any]) -> None:
    name = "tests/evaluate/harness/choice.yaml(samples=4,shots=0)"
    rows = suite.evaluate(model, name, "dense,k2v2@kivi(group=8)", folder=tmp_path, batch=4)
    assert {(row["task"], row["part"], row["metric"]) for row in rows} == {
        ("choice.yaml(samples=4,shots=0)", "choice", metric) for metric in ("acc", "acc_norm")
    }
    assert all(row["samples"] == 4 and 0 <= row["value"] <= 1 and row["stderr"] > 0 for row in rows)
    assert all(row["lm_eval"] == harness.__version__ and row["data_sha256"] for row in rows)
    again = suite.evaluate(model, name, "dense", folder=tmp_path, batch=4)
    assert again == rows[:2]
    with pytest.raises(kvjax.KvjaxError, match="no task 'no_such_task'"):
        suite.parse_tasks("no_such_task")
    assert isinstance(suite.parse_task("lm_eval:gsm8k"), lm_eval.Harness)
