"""Compiled programs are kept for the next start, and compiling is said while it lasts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kvjax.experiments import compilation

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def settings_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    before = {name: jax.config.values[name] for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_program_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "LEAST_SECONDS", 0.0)
    compilation.keep_programs()
    compilation_cache.reset_cache()
    jax.jit(lambda x: jnp.sin(x) * 7 + x)(1.5).block_until_ready()
    assert list((tmp_path / "cache" / "compiled").glob("*-cache"))


@pytest.mark.filterwarnings("default")
def test_a_torn_program_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """As a full disk leaves it: it is compiled and kept again, without a word."""
    monkeypatch.setattr(compilation, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    compilation.keep_programs()
    compilation_cache.reset_cache()
    compile_it = lambda: jax.jit(lambda x: jnp.cos(x) * 3 + x)(1.5).block_until_ready()  # noqa: E731
    compile_it()
    (kept,) = (tmp_path / "cache" / "compiled").glob("jit__lambda-*-cache")
    whole = kept.stat().st_size
    kept.write_bytes(kept.read_bytes()[:50])
    compile_it()
    assert kept.stat().st_size == pytest.approx(whole, rel=0.2)
    assert "persistent" not in capfd.readouterr().err


def test_another_folder_of_the_user_stays(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    compilation.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    compilation.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_lines_say_that_it_compiles(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(compilation, "EVERY", 0.05)
    with compilation.shown():
        time.sleep(0.2)
        assert "compiling" not in capfd.readouterr().err
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.1)
        time.sleep(1.5)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.5)
        assert "compiling, 1 s\n" in capfd.readouterr().err
        time.sleep(0.2)
        assert "compiling" not in capfd.readouterr().err
