"""What promises more than it keeps fails the contract suite; what promises nothing is fed token by token."""

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from kvjax.caches import registry
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import load_plugins
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import Scorer
from kvjax.testing import contract
from kvjax.tuner.simulate import Simulator

load_plugins(str(Path(__file__).parents[2] / "examples/streaming_llm.py"))
StreamingLLM = next(method for method in registry.methods() if method.__name__ == "StreamingLLM")


@dataclasses.dataclass(frozen=True)
class AnyChunk(StreamingLLM):
    form: ClassVar[str] = "anychunk{length}"
    examples: ClassVar[tuple[str, ...]] = ("anychunk8(sink=2)",)
    largest_chunk: ClassVar[None] = None


@dataclasses.dataclass(frozen=True)
class WholeWindows(StreamingLLM):
    form: ClassVar[str] = "wholewindows{length}"
    examples: ClassVar[tuple[str, ...]] = ("wholewindows8(sink=2)",)
    whole_windows: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("method", "test"),
    [
        (AnyChunk, contract.test_decoding_in_the_largest_chunks),
        (WholeWindows, contract.test_whole_windows_read_what_decoding_reads),
    ],
)
def test_the_suite_finds_out(method, test) -> None:
    registry.register(method)
    try:
        with pytest.raises(AssertionError, match="is not kept"):
            test(method.examples[0])
    finally:
        registry._registered.pop(f"{method.__module__}.{method.__qualname__}")


@functools.cache
def model():
    return contract._tiny(2)


def test_chunks_are_those_that_every_layer_allows() -> None:
    for text, chunk in {
        "window8(sink=2)": 1,
        "0:window8;1:k4v4": 1,
        "0:k4v4;1:k4v4@kivi(residual=96)": 32,
        "0:k4v4@token;1:k4v4@kivi(residual=64)": 64,
        "k4v4@token": 32,
    }.items():
        assert CachePlan.parse(text, model().config).stream_chunk == chunk


def test_streaming_falls_back_to_single_tokens() -> None:
    """The scores of `streaming` are those of `decode`, and those of a window are not the dense ones."""
    ids = np.random.default_rng(0).integers(0, 256, (1, 40))
    plan, dense = (CachePlan.parse(text, model().config) for text in ("0:window8(sink=2);1:k4v4@token", "dense"))
    streaming, decode = (Scorer(model(), 40, 1, protocol) for protocol in ("streaming", "decode"))
    run = streaming.run(dense, ids, None)[1]
    a, b = (scorer.run(plan, ids, run)[0] for scorer in (streaming, decode))
    np.testing.assert_array_equal(a.nll, b.nll)
    assert a.kld.max() > 1e-4


def test_what_reads_whole_windows_refuses() -> None:
    plan, ids = CachePlan.parse("0:k4v4;1:window8", model().config), np.zeros((1, 40), np.int64)
    simulator = Simulator(model(), ids)
    for refused in (lambda: Scorer(model(), 40, 1, "parallel").run(plan, ids, None), lambda: simulator.score(plan)):
        with pytest.raises(
            KvjaxError, match=r"layer 1 is window8\(sink=4\)|layer 1 is window8, .* reads whole windows"
        ):
            refused()
