"""Bases on disk: made once, read back, refused where they are of other weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax.calibrate import bases as module
from kvjax.calibrate.bases import load_bases
from kvjax.models.model import Model


@pytest.fixture
def tiny(goldens: Path) -> Model:
    return kvjax.load(str(goldens / "llama-linear"), "float32")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    return tmp_path / "bases"


def test_made_once_and_read_back(tiny: Model, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = kvjax.plan(tiny, "0:x4@latent(group=8);1:x4@head(group=8)")
    first = load_bases(tiny, plan)
    assert len(list(kept.iterdir())) == 2
    monkeypatch.setattr(module, "_make", None)
    jax.tree.map(np.testing.assert_array_equal, first, load_bases(tiny, plan))
    (down, up), _ = first[0]
    key = np.asarray(tiny.params["layer_0"]["k"]).T
    np.testing.assert_allclose(np.asarray(down[0] @ up[0]), key, atol=1e-5)
    assert load_bases(tiny, kvjax.plan(tiny, "k4v4")) == ((), ())


def test_two_programs_make_them_at_once(tiny: Model, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is later takes what is there."""
    plan = kvjax.plan(tiny, "x4@latent(group=8)")
    write, made = module.write_layer, []

    def overtaken(folder: Path, layer: int, tree: object) -> None:
        monkeypatch.setattr(module, "write_layer", write)
        made.append(load_bases(tiny, plan))
        write(folder, layer, tree)

    monkeypatch.setattr(module, "write_layer", overtaken)
    jax.tree.map(np.testing.assert_array_equal, load_bases(tiny, plan), made[0])
    assert len(list(kept.iterdir())) == 1


def test_other_weights_have_other_bases(tiny: Model, kept: Path) -> None:
    plan = kvjax.plan(tiny, "x4@latent(group=8)")
    load_bases(tiny, plan)
    (mine,) = kept.iterdir()
    params = dict(tiny.params)
    params["layer_1"] = params["layer_1"] | {"k": 2 * params["layer_1"]["k"]}
    other = dataclasses.replace(tiny, params=params)  # a model trained further keeps its name and checksum
    load_bases(other, plan)
    (its,) = set(kept.iterdir()) - {mine}
    shutil.rmtree(its)
    shutil.copytree(mine, its)
    with pytest.raises(kvjax.KvjaxError, match="bases of other weights"):
        load_bases(other, plan)


def test_damage_is_said(tiny: Model, kept: Path) -> None:
    plan = kvjax.plan(tiny, "xcl3@latent(base=0)")
    load_bases(tiny, plan)
    (folder,) = kept.iterdir()
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-5])
    with pytest.raises(kvjax.KvjaxError, match="is damaged"):
        load_bases(tiny, plan)
    (folder / "bases.json").write_text(json.dumps({}))
    with pytest.raises(kvjax.KvjaxError, match="bases of other weights"):
        load_bases(tiny, plan)
