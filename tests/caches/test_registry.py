"""Methods from outside: registration, plugins, entry points, names from fields of every type."""

import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax.caches import registry
from kvjax.caches.base import CacheShape, ModelSizes
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import load_plugins, methods, parse_spec, plugins_of, register
from kvjax.caches.simulated import SimulatedSpec
from kvjax.errors import KvjaxError

MODEL = ModelSizes(2, 4, 2, 16, 64)
PLUGIN = """
import dataclasses
from typing import ClassVar
import kvjax
from kvjax.caches.simulated import SimulatedSpec

@kvjax.register
@dataclasses.dataclass(frozen=True)
class Halves(SimulatedSpec):
    form: ClassVar[str] = "halves"
    examples: ClassVar[tuple[str, ...]] = ("halves",)
    bits_nominal: ClassVar[float] = 16.0

    def bits_asymptotic(self, shape):
        return 16.0

    def simulate(self, k, v, real):
        return k, v
"""


@pytest.fixture(autouse=True)
def clean():
    """Registrations of a test end with it."""
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)
    registry._installed.cache_clear()


@dataclasses.dataclass(frozen=True)
class Noise(SimulatedSpec):
    """Every type of field that a name can hold."""

    ratio: float
    mode: str = "flat"
    steps: int = 3
    signed: bool = False
    per: Literal["token", "head"] = "token"
    scale: float | None = None

    form: ClassVar[str] = "noise{ratio}"
    modes: ClassVar[tuple[str, ...]] = ("flat", "round")
    aliases: ClassVar[dict] = {"quiet{ratio}": {"mode": "round", "signed": True}}
    examples: ClassVar[tuple[str, ...]] = ("noise0.5",)
    bits_nominal: ClassVar[float] = 4.0

    def bits_asymptotic(self, shape) -> float:
        return 4.5

    def simulate(self, k, v, real):
        return k * (1 - self.ratio), v


@settings(max_examples=100, deadline=None)
@given(
    ratio=st.floats(0, 1e6),
    mode=st.sampled_from(Noise.modes),
    steps=st.integers(0, 999),
    signed=st.booleans(),
    per=st.sampled_from(["token", "head"]),
    scale=st.none() | st.floats(1e-30, 1e30),
    sink=st.integers(0, 5),
)
def test_names_of_fields_of_every_type_parse_back(**fields) -> None:
    register(Noise)
    spec = Noise(**fields)
    assert parse_spec(str(spec)) == spec


def test_aliases_set_fields_and_may_be_changed() -> None:
    register(Noise)
    assert parse_spec("quiet0.5") == Noise(0.5, "round", signed=True)
    assert parse_spec("quiet0.5@flat(signed=false)") == Noise(0.5)
    assert str(parse_spec("quiet0.5")) == "noise0.5@round(signed=true)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("noise0.5(steps=1.5)", "steps=1.5; expected a whole number"),
        ("noise0.5(signed=maybe)", "signed=maybe; expected true or false"),
        ("noise0.5(per=layer)", "per=layer; expected token or head"),
        ("noise0.5(scale=big)", "scale=big; expected a number"),
        ("noise0.5(scale=-1)", "scale=-1.0; expected at least 0"),
        ("noise0.5(nothing=1)", "expected one of residual, sink, steps, signed, per, scale"),
        ("noise0.5@loud", "mode 'loud'; expected flat or round"),
        (
            "noisy",
            "expected dense, k{key_bits}v{value_bits}, kr{key_bits}v{value_bits}, omni{key_bits}v{value_bits}, "
            "k{b}v{b}/k{b}v{b}, x{bits}, xcl{bits}, xclr{bits}, kfp{key_bits}vfp{value_bits}, fp8, nvfp4, "
            "tq{key_bits}v{value_bits}, "
            "oscar{bits}, kvarn{key_bits}v{value_bits}, gear{bits}, kvquant{bits}, aqua{bits}, noise{ratio}, "
            "quiet{ratio}",
        ),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    registry._registered.clear()
    register(Noise)
    with pytest.raises(KvjaxError) as error:
        parse_spec(text)
    assert says in str(error.value)


def test_simulated_bits_are_the_claimed_ones() -> None:
    plan = CachePlan.of((Noise(0.5, sink=4),) * 2, MODEL)
    assert plan.simulated and not CachePlan.parse("k4v4", MODEL).simulated
    assert plan.bits_asymptotic == 4.5 and plan.bits_real(1024) == 4.5 + 4 * 16 / 1024
    shape = CacheShape.of(MODEL, 1, 1024, jnp.bfloat16)
    assert plan.specs[0].nbytes(shape) == 2 * 2 * 16 * (1024 + 4) * 2  # kept unquantised
    assert plan.compression(1024) == 16 / plan.bits_real(1024)


class NoDataclass(SimulatedSpec):
    form = "no"


@dataclasses.dataclass(frozen=True)
class Abstract(SimulatedSpec):
    form: ClassVar[str] = "abstract"
    examples: ClassVar[tuple[str, ...]] = ("abstract",)


@dataclasses.dataclass(frozen=True)
class Nameless(Noise):
    examples: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class Homeless(Noise):
    form: ClassVar[str] = "homeless"


@dataclasses.dataclass(frozen=True)
class Taken(Noise):
    ratio: float = 0.5
    form: ClassVar[str] = "k{steps}v4"
    examples: ClassVar[tuple[str, ...]] = ("k3v4",)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (3, "expected a frozen dataclass that inherits from CacheSpec"),
        (dict, "expected a frozen dataclass that inherits from CacheSpec"),
        (Abstract, "expected it to define bits_asymptotic, bits_nominal, simulate"),
        (Nameless, "examples for the contract suite"),
        (Homeless, "field ratio has no default"),
        (Taken, "are those of KV already"),
    ],
)
def test_what_cannot_be_registered(method, says: str) -> None:
    with pytest.raises(KvjaxError, match=says):
        kvjax.register(method)
    assert method not in methods()


def test_registering_again_replaces() -> None:
    register(Noise)
    again = dataclasses.dataclass(frozen=True)(
        type("Noise", (Noise,), {"__module__": __name__, "__qualname__": "Noise"})
    )
    register(again)
    assert [method for method in methods() if method.__name__ == "Noise"] == [again]


def test_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kvjax_halves.py").write_text(PLUGIN)
    (tmp_path / "kvjax_nothing.py").write_text("x = 1\n")
    (tmp_path / "kvjax_broken.py").write_text("raise ZeroDivisionError('at once')\n")
    load_plugins("")
    load_plugins("kvjax_halves")
    load_plugins("kvjax_halves")  # a second time changes nothing
    plan = CachePlan.parse("0:halves;1:k4v4", MODEL)
    assert plugins_of(plan.specs) == ["kvjax_halves"] and plugins_of(CachePlan.parse("k4v4", MODEL).specs) == []
    (tmp_path / "kvjax_thirds.py").write_text(PLUGIN.replace("halves", "thirds"))
    load_plugins(str(tmp_path / "kvjax_thirds.py"))
    assert str(parse_spec("thirds(sink=4)")) == "thirds(sink=4)"
    for name, says in {
        "kvjax_nothing": "registers no cache",
        "kvjax_broken": "cannot be imported: at once",
        "no_such_module": "cannot be imported: No module named",
        str(tmp_path / "absent.py"): "cannot be imported",
        "a,,b": "single commas",
    }.items():
        with pytest.raises(KvjaxError, match=says):
            load_plugins(name)


def test_a_plan_file_names_its_plugins_and_imports_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kvjax_other.py").write_text(PLUGIN.replace("halves", "other"))
    (tmp_path / "plan.yaml").write_text("{plan: other, card: {plugins: [kvjax_other]}}")
    with pytest.raises(KvjaxError, match=r"'other' is not known.*its card names plugins=kvjax_other"):
        CachePlan.parse(str(tmp_path / "plan.yaml"), MODEL)
    assert "kvjax_other" not in sys.modules
    load_plugins("kvjax_other")
    assert str(CachePlan.parse(str(tmp_path / "plan.yaml"), MODEL)) == "other"


def test_installed_methods_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(group: str) -> list[importlib.metadata.EntryPoint]:
        return [importlib.metadata.EntryPoint("noise", f"{__name__}:{found}", group) for found in names]

    monkeypatch.setattr(importlib.metadata, "entry_points", entries)
    names = ["Noise"]
    registry._installed.cache_clear()
    assert isinstance(parse_spec("noise0.5"), Noise)
    names = ["NotThere"]
    registry._installed.cache_clear()
    with pytest.raises(KvjaxError, match=r"entry point noise of kvjax\.caches cannot be loaded"):
        parse_spec("noise0.5")


def test_rows_of_a_store_with_a_residual_stay_apart() -> None:
    """Blocks of R tokens of a custom quantiser: what is out of range touches nothing."""
    load_plugins(str(Path(__file__).parents[2] / "examples/int8.py"))
    cache = parse_spec("int8(residual=16)").init(CacheShape(1, 75, 4, 2, 16, 64))
    assert cache.store.tokens == 80
    x = np.ones((1, 75, 2, 16), np.float32)
    block = cache.store.packed[0].write(x, jnp.arange(75)[None] + 80)
    assert not np.asarray(block.kept[0]).any()
