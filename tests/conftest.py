"""What several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.calibrate import bases, statistics
from kvjax.checkpoints.load import load
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.model import Model
from kvjax.models.params import Params


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of tiny HF models, each with HF's own logits: tests/goldens/make_goldens.py."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session", autouse=True)
def own_bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Bases of test models do not go to the user's cache folder."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        for module in (bases, statistics):
            patch.setattr(module, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file() -> Iterator[None]:
    """Frees what a file compiled: each program takes memory maps, and Linux allows a process 65,530 of them.

    Beyond that the compiler crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def shared_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one file has compiled the next one loads, in other workers too: a file frees its programs when it ends."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    jax.config.update("jax_compilation_cache_dir", str(folder / "shared_programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # others are compiled sooner than read


@pytest.fixture(scope="session", autouse=True)
def own_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs that tests start compile does not go to the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("own_programs")))
        yield


@pytest.fixture(scope="session")
def keeping_programs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of processes that tests start again and again: what one has compiled the next one loads."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Programs that are slower and compile sooner, for modules whose assertions do not hang on the last digit."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_float64(quick_compilation: None) -> Iterator[None]:
    """Float64, and programs that compile sooner."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The real model, in float32."""
    return load("smollm2-135m", "float32")


@pytest.fixture(scope="session")
def dense_logits() -> Callable[[ModelConfig, Params, np.ndarray], np.ndarray]:
    """Logits [B, T, V] of tokens [B, T] with a dense cache, in one prefill."""

    def logits(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
        decoder = Decoder(config)
        shape = CacheShape.of(config, batch=tokens.shape[0], max_len=tokens.shape[1], dtype=jnp.float32)
        cache = CachePlan.parse("dense", config).init(shape)

        @jax.jit
        def run(params: Params, cache):
            hidden, _ = decoder.apply({"params": params}, jnp.asarray(tokens), cache)
            return decoder.apply({"params": params}, hidden, method="logits")

        return np.asarray(run(params, cache))

    return logits
