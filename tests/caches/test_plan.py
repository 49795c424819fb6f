"""The plan grammar, KVTuner's preset files, and the figures of bits and bytes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracle import model

from kvjax.caches.base import CacheShape, ModelSizes
from kvjax.caches.dense import Dense
from kvjax.caches.grammar import split_list
from kvjax.caches.kv import KV
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import parse_spec
from kvjax.errors import KvjaxError

SHAPE = CacheShape(batch=2, max_len=256, heads=4, kv_heads=2, head_dim=128, model_dim=512)


def parse(text, layers=30):
    return CachePlan.parse(text, model(layers))


def plan_of(specs):
    return CachePlan(specs, ModelSizes.of(model(len(specs))))


# ---- grammar


@pytest.mark.parametrize(
    ("text", "specs", "canonical"),
    [
        ("dense", {(0, 29): Dense()}, "dense"),
        ("k8v4", {(0, 29): KV(8, 4)}, "k8v4@kivi"),
        ("k4v2@kivi", {(0, 29): KV(4, 2, "kivi")}, "k4v2@kivi"),
        (" k4v2@token ", {(0, 29): KV(4, 2, "token")}, "k4v2@token"),
        ("k16v2", {(0, 29): KV(16, 2)}, "k16v2@kivi"),
        (
            "0:k8v8;1-2+29:k4v4;3-28:k4v2@kivi",
            {(0, 0): KV(8, 8), (1, 2): KV(4, 4), (29, 29): KV(4, 4), (3, 28): KV(4, 2)},
            "0:k8v8@kivi;1-2+29:k4v4@kivi;3-28:k4v2@kivi",
        ),
        (
            "k4v4@kivi(group=64,residual=128,sink=4)",
            {(0, 29): KV(4, 4, "kivi", group=64, residual=128, sink=4)},
            "k4v4@kivi(group=64,residual=128,sink=4)",
        ),
        ("k4v4( sink = 4 , rope = pre )", {(0, 29): KV(4, 4, sink=4, rope="pre")}, "k4v4@kivi(sink=4,rope=pre)"),
        (
            "3-29 : dense ; 0 + 1-2 : k4v2@token(residual=8)",
            {(3, 29): Dense(), (0, 2): KV(4, 2, "token", residual=8)},
            "0-2:k4v2@token(residual=8);3-29:dense",
        ),
    ],
)
def test_grammar(text, specs, canonical):
    expected = {layer: spec for (a, b), spec in specs.items() for layer in range(a, b + 1)}
    plan = parse(text)
    assert plan.specs == tuple(expected[i] for i in range(30))
    assert str(plan) == canonical
    assert parse(canonical) == plan
    hash(plan)


specs = st.one_of(
    st.just(Dense()),
    st.builds(
        KV,
        st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]),
        st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]),
        st.just("token"),
        group=st.sampled_from([None, 8, 64]),
        residual=st.sampled_from([None, 0, 8, 32]),
        sink=st.integers(0, 4),
        rope=st.sampled_from(["pre", "post"]),
        fit=st.sampled_from(["minmax", "mse", "keys"]),
    ),
    st.builds(
        KV,
        st.sampled_from([2, 4, 16]),
        st.sampled_from([2, 3]),
        st.just("kivi"),
        group=st.sampled_from([None, 32]),
        residual=st.sampled_from([None, 32, 64]),
        sink=st.integers(0, 4),
        rope=st.sampled_from(["pre", "post"]),
        fit=st.sampled_from(["minmax", "mse", "keys"]),
        rotate=st.sampled_from(["none", "hadamard", "values"]),
        scale=st.sampled_from([8, 16]),
        center=st.sampled_from(["none", "bias"]),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(specs, st.integers(1, 3)), min_size=1, max_size=6))
def test_canonical_form_parses_back(runs):
    plan = plan_of(tuple(spec for spec, count in runs for _ in range(count)))
    text, layers = str(plan), len(plan.specs)
    again = parse(text, layers)
    assert again == plan and str(again) == text
    for part in re.split(r";|^", text):
        assert "dense" in part or "@" in part or not part
    assert split_list(f"{text},dense,{text}") == [text, "dense", text]


ERRORS = [
    ("", "not known"),
    ("k4", "not known"),
    ("y4", "not known"),
    ("x7", "bits=7; expected 1, 2"),
    ("x4@kivi", "expected input, latent or head"),
    ("x4@input(outlier=1)", "for latents only"),
    ("x4@input(fit=keys)", "fit=keys; expected mse"),
    ("k4v4(fit=values)", "fit=values; expected minmax, mse, unbiased or keys"),
    ("k4v4(rotate=1)", "rotate=1; expected none, hadamard or values"),
    ("k4v4(center=mean)", "center=mean; expected none or bias"),
    ("xcl3(fit=keys)", "fit=keys; expected minmax or mse"),
    ("x4@latent(group=24)", "group 24 does not divide"),
    ("x4@latent(residual=0)", "residual 0"),
    ("x4@latent(residual=72)", "residual 72"),
    ("x4@latent(group=8,residual=20)", "residual 20"),
    ("xcl3@head", "expected input or latent"),
    ("xcl3(base_bits=7)", "base_bits=7; expected 1, 2"),
    ("xcl3(per=head)", "per=head; expected token or channel"),
    ("xcl3@latent(norm=pre)", "expected @input"),
    ("xcl3(group=7)", "expected at least 8"),
    ("xcl3@input(group=24)", "group 24 does not divide"),
    ("xcl3(per=channel,residual=8)", "residual 8"),
    ("0-1:xcl3;2-29:k4v4", "a run of 2 layers has no base layer 2"),
    ("0:xcl3(base=4);1-29:xcl3(base=3)", "a run of 1 layers has no base layer 4"),
    ("0-27:k4v4;28-29:xcl3", "a run of 2 layers"),
    ("K4V4", "not known"),
    ("k4v4@", "not known"),
    ("k4v4@kivi(", "not known"),
    ("k4v4@kivi(sink=4))", "not known"),
    ("k4v4@kivi@token", "not known"),
    ("k4v4@kivi(sink=(4))", "not known"),
    ("k7v4", "key_bits=7; expected 1, 2"),
    ("k4v0", "value_bits=0; expected 1, 2"),
    ("k4v32@token", "value_bits=32; expected 1, 2"),
    ("k4v4@head", "mode"),
    ("k4v4(colour=3)", "no field 'colour'"),
    ("k4v4(sink)", "field=value"),
    ("k4v4(sink=)", "field=value"),
    ("k4v4(=4)", "field=value"),
    ("k4v4(sink=4,sink=4)", "each field once"),
    ("k4v4(sink=4,)", "field=value"),
    ("k4v4(sink=four)", "expected a whole number"),
    ("k4v4(sink=4.5)", "expected a whole number"),
    ("k4v4(rope=3)", "expected pre or post"),
    ("k4v4(rope=before)", "pre or post"),
    ("k4v4(sink=-1)", "sink=-1; expected at least 0"),
    ("k4v4(group=0)", "group=0; expected at least 1"),
    ("k4v4@kivi(group=7)", "group=7; expected a multiple of 8"),
    ("k4v4@token(residual=-8)", "residual=-8; expected at least 0"),
    ("k4v4@kivi(residual=0)", "residual 0"),
    ("k4v4@kivi(residual=48)", "residual 48"),
    ("k4v4@kivi(group=64,residual=32)", "residual 32"),
    ("dense(sink=4)", "sink"),
    ("dense@kivi", "dense"),
    ("0:k8v8", "no cache for layer 1"),
    ("0-28:k8v8", "no cache for layer 29"),
    ("1-29:k8v8", "no cache for layer 0"),
    ("0-30:k8v8", "names layer 30"),
    ("0-29:k8v8;29:k4v4", "names layer 29 twice"),
    ("0-29+3:k8v8", "names layer 3 twice"),
    ("0-29:k8v8;", "expected layers:method"),
    ("0-29:k8v8;k4v4", "expected layers:method"),
    ("29-0:k8v8", "numbers and ranges"),
    ("0--29:k8v8", "numbers and ranges"),
    ("-1-29:k8v8", "numbers and ranges"),
    ("0,1-29:k8v8", "numbers and ranges"),
    ("a:k8v8", "numbers and ranges"),
    (":k8v8", "numbers and ranges"),
    ("0-29:", "not known"),
    ("no/such/file.yaml", "No such file"),
]


@pytest.mark.parametrize(("text", "says"), ERRORS)
def test_errors_are_one_clear_line(text, says):
    with pytest.raises(KvjaxError) as error:
        parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@example("0-3:k4v4(sink=٣)")
@given(st.text("k4v2@()=,;:-+0.x dense token\n", max_size=20))
def test_any_text_parses_or_says_why(text):
    assume("yaml" not in text)
    try:
        plan = parse(text, 4)
    except KvjaxError:
        return
    assert parse(str(plan), 4) == plan


@pytest.mark.parametrize(
    ("text", "head_dim", "channels"),
    [
        ("k4v4@kivi", 128, 32),
        ("k4v4@kivi", 80, 16),
        ("k4v4@kivi", 96, 32),
        ("k4v4@kivi", 40, 8),
        ("k4v4@token", 80, 80),
        ("k4v4@token", 96, 96),
        ("k4v4@token(group=16)", 80, 16),
        ("k4v4@kivi(group=16)", 80, 16),
    ],
)
def test_default_groups_shrink(text, head_dim, channels):
    shape = dataclasses.replace(SHAPE, head_dim=head_dim)
    spec = parse_spec(text)
    keys = 4 + 32 / (spec.token_group if spec.mode == "kivi" else channels)
    assert spec.bits_asymptotic(shape) == pytest.approx((keys + 4 + 32 / channels) / 2)
    cache = spec.init(shape)
    assert sum(a.size for a in (cache.store.packed[1].scale, cache.store.packed[1].zero)) == (
        2 * shape.batch * shape.kv_heads * 256 * head_dim // channels
    )


@pytest.mark.parametrize("text", ["k4v4@kivi(group=32)", "k4v4@token(group=32)", "k4v4@token(group=64)"])
def test_stated_groups_that_do_not_divide(text):
    with pytest.raises(KvjaxError, match="does not divide the head_dim of 80"):
        parse_spec(text).init(dataclasses.replace(SHAPE, head_dim=80))


@pytest.mark.parametrize(
    ("text", "head_dim"),
    [("k4v4@token(residual=12)", 128), ("k4v4@kivi(group=12)", 96), ("k4v4@token", 20), ("k16v4@kivi", 36)],
)
def test_settings_that_cannot_be_stored(text, head_dim):
    with pytest.raises(KvjaxError):
        parse_spec(text).init(dataclasses.replace(SHAPE, head_dim=head_dim))


def test_split_list():
    assert split_list("dense, k4v4@kivi(group=64,sink=4),0:k8v8;1:k4v4(rope=pre,sink=1) ,a.yaml@token") == [
        "dense",
        "k4v4@kivi(group=64,sink=4)",
        "0:k8v8;1:k4v4(rope=pre,sink=1)",
        "a.yaml@token",
    ]
    for bad in ("", ",", "dense,,k4v4", "dense,"):
        with pytest.raises(KvjaxError, match="single commas"):
            split_list(bad)


def test_what_is_no_model_is_refused():
    for text in ("dense", "0:k4v4;1:dense", "sliding:dense;full:k4v2", "kvtuner:llama-3.1-8b-instruct-3.25"):
        with pytest.raises(KvjaxError, match="of type NoneType; expected a model's config"):
            CachePlan.parse(text, None)


def test_stream_chunk():
    assert parse("dense").stream_chunk == 32
    assert parse("0-9:k4v4@kivi(residual=128);10-28:k4v4@kivi(residual=96);29:k8v8@token").stream_chunk == 32
    assert parse("0-28:k4v4@kivi(residual=64);29:k4v4@token(residual=40)").stream_chunk == 8


# ---- files


def test_presets_round_trip(tmp_path):
    plan = parse("0:k8v8@token;1-2+29:k4v4@token;3-28:k4v2@token")
    (tmp_path / "some.yaml").write_text(plan.preset())
    (tmp_path / "kvtuner_pertoken_4_0.yaml").write_text(plan.preset())
    assert parse(f"{tmp_path}/some.yaml@token") == plan
    assert parse(f"{tmp_path}/kvtuner_pertoken_4_0.yaml") == plan
    kivi = parse(f"{tmp_path}/some.yaml")
    assert kivi == parse("0:k8v8@kivi;1-2+29:k4v4@kivi;3-28:k4v2@kivi")
    assert parse(f"{tmp_path}/kvtuner_pertoken_4_0.yaml@kivi") == kivi  # what is said wins
    assert kivi.preset() == plan.preset()
    sunk = parse(f"{tmp_path}/some.yaml@kivi(sink=4,residual=64)")
    assert sunk == plan_of(tuple(dataclasses.replace(s, sink=4, residual=64) for s in kivi.specs))


def test_presets_are_kvtuners_format():
    rows = yaml.safe_load(parse("0:k8v8;1-29:k4v2").preset())
    assert rows == {i: {"nbits_key": 8 if i == 0 else 4, "nbits_value": 8 if i == 0 else 2} for i in range(30)}


def test_presets_hold_quantised_layers_only():
    with pytest.raises(KvjaxError, match="layer 29"):
        parse("0-28:k4v4;29:dense").preset()


def test_our_files(tmp_path):
    path = tmp_path / "plan.yml"
    path.write_text("plan: 0:k8v8@token;1-29:k4v4(sink=4)\n")
    assert parse(str(path)) == parse("0:k8v8@token;1-29:k4v4@kivi(sink=4)")
    with pytest.raises(KvjaxError, match="names its modes itself"):
        parse(f"{path}@token")


MALFORMED = [
    "",
    "3",
    "[1, 2]",
    "{0: 4}",
    "{0: {nbits_key: 4}}",
    "{0: {nbits_key: 4, nbits_value: }}",
    "{0: {nbits_key: four, nbits_value: 4}}",
    "{0: {nbits_key: -4, nbits_value: 4}}",
    "{0: {nbits_key: 4.5, nbits_value: 4}}",
    "{0: {nbits_key: 7, nbits_value: 4}}",
    "{first: {nbits_key: 4, nbits_value: 4}}",
    "{1: {nbits_key: 4, nbits_value: 4}}",
    "{0: {nbits_key: 4, nbits_value: 4}, 1: {nbits_key: 4, nbits_value: 4}}",
    "{0: {nbits_key: 4, nbits_value: 4}, '0': {nbits_key: 8, nbits_value: 8}}",
    "{plan: 4}",
    "{plan: y4}",
    "{plan: bad.yaml}",
    "a: b: c",
    "\x00",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_files(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(KvjaxError) as error:
        parse("bad.yaml", 1)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("binary", "folder", "absent"):
        with pytest.raises(KvjaxError, match=name):
            parse(f"{tmp_path}/{name}.yaml", 1)
    (tmp_path / "good.yaml").write_text(parse("k4v4", 1).preset())
    for suffix in ("@head", "@token(sink=x)", "@token(residual=-1)", "@"):
        with pytest.raises(KvjaxError):
            parse(f"{tmp_path}/good.yaml{suffix}", 1)


PUBLISHED = [  # reference/kvtuner.md, "Shipped presets": layers, average bits, groups
    (32, 3.0625, "K8V8{0} K4V4{1,2,3,7,29,31} K2V2{4,5,13,17,21,23,24,25,27} K4V2{6,8-12,14-16,18-20,22,26,28,30}"),
    (32, 3.25, "K2V2{0,4,25,27} K4V4{1,2,3,7,29,31} K8V4{13,17} K4V2{5,6,8-12,14-16,18-24,26,28,30}"),
    (32, 4.90625, "K2V4{0} K4V4{1,2,3,7,29,31} K8V4{4,6,8-12,14-16,18-20,22,25-28,30} K4V2{5,21,23,24} K2V2{13,17}"),
    (32, 3.59375, "K4V8{0} K4V2{1-4,7,13,18,19,22-25,27,29,31} K4V4{5,6,8-12,14-17,20,21,26,28,30}"),
    (32, 5.4375, "K4V4{0,5,6,12,19,21,22,26,28} K8V4{rest}"),
    (32, 3.1875, "K4V8{0,1,31} K4V4{2-4,7-10,14,18} K2V2{5,6,21-30} K4V2{11-13,15-17,19,20}"),
    (32, 5.375, "K4V8{0} K4V2{1,2,5,6} K4V4{3,4,23,31} K8V4{7-22,24-30}"),
    (36, 114 / 36, "K4V8{0,1} K2V4{2,4} K2V2{12,28} K4V4{34,35} K4V2{rest}"),
    (36, 4.0, "K8V2{0} K8V4{17,18,27,29-31,34} K4V4{7,10,11,16,19,21,22,24-26,28,32,33} K4V2{rest}"),
    (36, 182 / 36, "K8V8{0} K4V2{2,7,11,14,16,21-23,25,28,32,35} K8V4{rest}"),
    (28, 167 / 28, "K8V8{0,2,7,9,10,13,14,16,18-21,27} K2V4{1,3} K8V4{4,5,12,22-25} K2V2{6,8,26} K4V2{11,15,17}"),
    (28, 4.0, "K8V8{0} K8V2{3,13,27} K4V2{1,2,4,5,8,24,25} K4V4{6,7,9-12,14-23,26}"),
]


@pytest.mark.parametrize(("layers", "bits", "groups"), PUBLISHED)
def test_published_presets(tmp_path, layers, bits, groups):
    rows, rest = {}, None
    for key, value, where in re.findall(r"K(\d)V(\d)\{(.*?)\}", groups):
        row = {"nbits_key": int(key), "nbits_value": int(value)}
        if where == "rest":
            rest = row
            continue
        for part in where.split(","):
            first, _, last = part.partition("-")
            for layer in range(int(first), int(last or first) + 1):
                assert layer not in rows
                rows[layer] = row
    rows = {i: rows.get(i, rest) for i in range(layers)}
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(rows))
    plan = parse(f"{tmp_path}/preset.yaml", layers)
    assert plan.bits_nominal == pytest.approx(bits, abs=1e-9)
    assert yaml.safe_load(plan.preset()) == rows


# ---- figures


@pytest.mark.parametrize(
    ("text", "nominal", "asymptotic"),
    [
        ("dense", 16, 16),
        ("k4v4@kivi", 4, 5),
        ("k2v2@kivi", 2, 3),
        ("k4v4@kivi(group=64)", 4, 4.5),
        ("k4v4@kivi(residual=128,sink=64)", 4, 5),
        ("k4v4@token", 4, 4.25),
        ("k8v4@token", 6, 6.25),
        ("k3v1@token(group=32)", 2, 3),
        ("k16v2@kivi", 9, 9.5),
        ("k4v16@token", 10, 10.125),
        ("0:dense;1-3:k4v4@token", 7, (16 + 3 * 4.25) / 4),
    ],
)
def test_bits(text, nominal, asymptotic):
    plan = parse(text, 4)
    assert plan.bits_nominal == nominal
    assert plan.bits_asymptotic == asymptotic
    assert plan.bits_real(2**20) == pytest.approx(asymptotic, rel=1e-3)
    assert plan.bits_real(256) >= asymptotic
    assert plan.compression(256) == 16 / plan.bits_real(256)


def test_bits_real_counts_everything():
    """Residual, sinks and rounding up to whole blocks, at 16 bits what is not quantised."""
    one_head = ModelSizes(layers=3, heads=1, kv_heads=1, head_dim=32, model_dim=32)
    codes_and_scales = 64 * 5  # 40 tokens are two blocks of 32
    exact = (32 + 4) * 16
    assert CachePlan.parse("k4v4@kivi(sink=4)", one_head).bits_real(40) == (codes_and_scales + exact) / 40
    assert CachePlan.parse("dense", one_head).bits_real(40) == 16


BYTES = [
    ("dense", 128, jnp.float32, 2 * 256 * 128 * 4),
    ("dense", 128, jnp.bfloat16, 2 * 256 * 128 * 2),
    ("k4v4@token", 128, jnp.float32, 256 * 128 + 2 * 256 * 4),
    ("k3v5@token", 80, jnp.float32, 256 * 80 + 2 * 256 * 4),
    ("k4v2@kivi", 80, jnp.bfloat16, 256 * 80 * 6 // 8 + 256 // 32 * 80 * 4 + 256 * 5 * 4 + 2 * 32 * 80 * 2),
    ("k2v2@kivi(sink=4)", 128, jnp.float32, 256 * 64 + 8 * 128 * 4 + 256 * 4 * 4 + 2 * 36 * 128 * 4),
    ("k16v2@kivi", 96, jnp.float32, 256 * 96 * 4 + 256 * 24 + 256 * 3 * 4 + 2 * 32 * 96 * 4),
    ("k1v6@token(group=8,residual=8)", 96, jnp.float32, 256 * 84 + 2 * 256 * 12 * 4 + 2 * 8 * 96 * 4),
]


@pytest.mark.parametrize(("text", "head_dim", "dtype", "per_head"), BYTES)
def test_nbytes(text, head_dim, dtype, per_head):
    """The formula's bytes, the leaves' bytes and the bytes of a compiled program's argument."""
    shape = dataclasses.replace(SHAPE, head_dim=head_dim, dtype=dtype)
    plan = CachePlan.parse(text, dataclasses.replace(model(2), head_dim=head_dim))
    bytes_of_a_layer = per_head * shape.batch * shape.kv_heads
    assert plan.specs[0].nbytes(shape) == bytes_of_a_layer
    assert plan.nbytes(256, 2, dtype) == 2 * bytes_of_a_layer
    cache = plan.init(shape)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)) == 2 * bytes_of_a_layer
    compiled = jax.jit(lambda cache: jax.tree.map(lambda a: a + 1, cache)).lower(cache).compile()
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert arguments == plan.nbytes(256, 2, dtype) + cache.length.nbytes
