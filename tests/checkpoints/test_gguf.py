"""GGUF files written from the goldens load to the same parameters; tokenizers split as their kind says."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel

from kvjax.checkpoints.gguf import NAMES, GGUFFile
from kvjax.checkpoints.safetensors import load_hf
from kvjax.errors import KvjaxError
from kvjax.models.params import param_shapes
from kvjax.models.rope import make_rope
from kvjax.models.zoo import random_params

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def interleave(weight, heads):
    """What conversion to GGUF does to the q and k rows of llama models."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, config, params, kind=F32, freqs=None, more=None, pack=quantize):
    """A GGUF file with the metadata and tensors of a model, and more metadata."""
    writer = gguf.GGUFWriter(file, config.family.removesuffix("_text"))
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    adders = {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}
    for key, value in (more or {}).items():
        adders.get(type(value), writer.add_array)(key, value)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs.astype(np.float32))
    heads = {"q": config.heads, "k": config.kv_heads, "q_bias": config.heads, "k_bias": config.kv_heads}
    for path in param_shapes(config):
        weight = np.asarray(params[path[0]] if len(path) == 1 else params[path[0]][path[1]])
        if config.family == "llama" and path[-1] in heads:
            weight = interleave(weight, heads[path[-1]])
        if weight.ndim == 2:
            writer.add_tensor(NAMES.of(path), pack(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(NAMES.of(path), weight)
    finish(writer)
    return file


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama-linear", "qwen2-tied", "qwen3"])
def test_same_as_hf(name, goldens, tmp_path):
    config, params = load_hf(goldens / name, jnp.float32)
    file = write_gguf(tmp_path / "model.gguf", config, params)
    loaded_config, loaded = GGUFFile(file).load(jnp.float32)
    # GGUF does not say which layers have Qwen's optional window.
    assert loaded_config == dataclasses.replace(config, window=None, full_layers=())
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.fixture(scope="module")
def gemma(goldens):
    """A Gemma 3 with what GGUF can say of one: config and parameters."""
    config, params = load_hf(goldens / "gemma3", jnp.float32)
    return dataclasses.replace(config, query_scale=1.0), params


def test_gemma3_same_as_hf(gemma, tmp_path):
    config, params = gemma
    more = {"attention.sliding_window": 12, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 100.0}
    more = {f"gemma3.{key}": value for key, value in more.items()}
    loaded_config, loaded = GGUFFile(write_gguf(tmp_path / "model.gguf", config, params, more=more)).load(jnp.float32)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("layers", "window", "full", "query_scale"),
    [(18, 512, (5, 11, 17), 1.0), (3, 0, (), 1.0), (62, 1024, tuple(range(5, 62, 6)), (64 / 2 / 24) ** -0.5)],
)
def test_what_gemma3_files_do_not_say(gemma, layers, window, full, query_scale, tmp_path):
    """As llama.cpp: every sixth layer is full, the others have a rope of base 10000; the 27B scales queries."""
    config = dataclasses.replace(gemma[0], layers=layers)
    more = {"gemma3.attention.sliding_window": window}
    read = GGUFFile(
        write_gguf(tmp_path / "model.gguf", config, random_params(config, jnp.float32), more=more)
    ).config()
    assert (read.window, read.full_layers) == (window or None, full)
    assert read.window_rope.theta == 10000.0 and read.window_rope.scaling == "none" and read.rope == config.rope
    np.testing.assert_allclose(read.query_scale, query_scale)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("final_logit_softcapping", 30.0, "is 30.0"),
        ("attention.key_length_swa", 8, "is 8"),
        ("attention.sliding_window_pattern", [True, False], "is of type ndarray"),
        ("attention.sliding_window_pattern", 0, "is 0"),
    ],
)
def test_gemma3_is_refused(gemma, key, value, said, tmp_path):
    more = {"gemma3.attention.sliding_window": 12, f"gemma3.{key}": value}
    with pytest.raises(KvjaxError, match=f"metadata gemma3.{key} of .*model.gguf {said}"):
        GGUFFile(write_gguf(tmp_path / "model.gguf", *gemma, more=more)).config()


def test_q8_0_and_llama3_rope(goldens, tmp_path):
    config, params = load_hf(goldens / "llama-llama3", jnp.float32)
    rope = dataclasses.replace(config.rope, original_max_positions=8192, factor=32.0)
    freqs = make_rope(dataclasses.replace(rope, scaling="none"), 16).inv_freq / make_rope(rope, 16).inv_freq
    loaded_config, loaded = GGUFFile(write_gguf(tmp_path / "a.gguf", config, params, Q8_0, freqs)).load(jnp.float32)
    assert loaded_config == dataclasses.replace(config, rope=rope)
    for name in ("q", "k", "down"):
        expected = dequantize(quantize(np.asarray(params["layer_1"][name]), Q8_0), Q8_0)
        np.testing.assert_array_equal(loaded["layer_1"][name], expected)
    other = GGUFFile(write_gguf(tmp_path / "b.gguf", config, params, freqs=freqs**2))
    with pytest.raises(KvjaxError, match=r"rope_freqs\.weight .* is not the rope scaling of Llama 3"):
        other.config()


@pytest.fixture(scope="module")
def plain(goldens):
    """A llama without scaling of rope: config and parameters."""
    config, params = load_hf(goldens / "llama-linear", jnp.float32)
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, scaling="none", factor=1.0)), params


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.attn_factor": 1.0, "scaling.original_context_length": 64}, None),
    ],
)
def test_spellings_of_linear_rope(plain, tmp_path, more, factor):
    """As llama.cpp reads them."""
    more = {f"llama.rope.{key}": value for key, value in more.items()}
    rope = GGUFFile(write_gguf(tmp_path / "model.gguf", *plain, more=more)).config().rope
    assert (rope.scaling, rope.factor) == (("linear", factor) if factor else ("none", 1.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.sliding_window", 4096),
        ("llama.attention.scale", 0.5),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attention.causal", False),
        ("llama.attention.value_length", 16),
        ("llama.rope.dimension_count", 12),
        ("llama.rope.dimension_sections", [4, 4, 4, 0]),
        ("llama.rope.scaling.attn_factor", 1.2),
        ("llama.rope.scaling.yarn_ext_factor", 1.0),
        ("llama.rope.freq_base_swa", 10000.0),
        ("llama.expert_count", 8),
        ("llama.embedding_scale", 12.0),
        ("llama.residual_scale", 0.22),
        ("llama.logit_scale", 8.0),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.a_new_scale", 2.0),
        ("llama.use_parallel_residual", True),
    ],
)
def test_metadata_that_would_be_ignored(plain, tmp_path, key, value):
    with pytest.raises(KvjaxError, match=f"metadata {key} of .*model.gguf is .*; expected"):
        GGUFFile(write_gguf(tmp_path / "model.gguf", *plain, more={key: value})).config()


def test_harmless_metadata(plain, tmp_path):
    more = {
        **{"llama.expert_count": 0, "llama.attention.causal": True, "llama.attention.sliding_window": 0},
        **{"llama.residual_scale": 1.0, "llama.vocab_size": 128, "llama.a_note": "text", "llama.pooling_type": 1},
        **{"general.name": "tiny", "general.type": "model", "split.count": 1, "quantize.imatrix.file": "x"},
    }
    assert GGUFFile(write_gguf(tmp_path / "model.gguf", *plain, more=more)).config() == plain[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split.count": 3, "split.no": 0}, "is part 1 of 3 of a split GGUF; expected one file: merge"),
        ({"general.type": "adapter"}, "holds a GGUF of type 'adapter'; expected a model"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' of .* is not supported; expected none or linear"),
    ],
)
def test_parts_and_adapters(plain, tmp_path, more, message):
    with pytest.raises(KvjaxError, match=message):
        GGUFFile(write_gguf(tmp_path / "model.gguf", *plain, more=more)).load(jnp.float32)


@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}])
def test_biases_are_where_their_tensors_are(plain, tmp_path, options):
    config = dataclasses.replace(plain[0], **options)
    params = random_params(config, jnp.float32)
    loaded_config, loaded = GGUFFile(write_gguf(tmp_path / "model.gguf", config, params)).load(jnp.float32)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_refused(goldens, tmp_path):
    config, params = load_hf(goldens / "qwen3", jnp.float32)
    file = write_gguf(tmp_path / "model.gguf", config, params)
    whole = file.read_bytes()
    for size in (0, 3, 200, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:size])
        with pytest.raises(KvjaxError, match="is not a whole GGUF file"):
            GGUFFile(file)
    file.write_bytes(b"FUGG" + whole[4:])
    with pytest.raises(KvjaxError, match="magic"):
        GGUFFile(file)
    params["layer_1"]["q_norm"] = params["norm"]
    with pytest.raises(KvjaxError, match=r"tensor blk\.1\.attn_q_norm\.weight has shape \(64,\); expected \(32,\)"):
        GGUFFile(write_gguf(file, config, params)).load(jnp.float32)
    with pytest.raises(KvjaxError, match="architecture 'gemma' is not supported; expected llama"):
        GGUFFile(write_gguf(file, dataclasses.replace(config, family="gemma"), params)).config()


def write_tokenizer(file, pre, kind="gpt2"):
    """Bytes, two merges (`12` and `Ġa`) and two special tokens."""
    tokens = [*sorted(ByteLevel.alphabet()), "12", "Ġa", "<|end|>", "<|tool|>"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    normal, control, user = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    writer.add_token_types([normal] * (len(tokens) - 2) + [control, user])
    writer.add_token_merges(["1 2", "Ġ a"])
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_chat_template("{{ messages }}")
    finish(writer)
    return file


@pytest.mark.parametrize(
    ("pre", "pieces", "accent"),
    [
        ("smollm", ["1", "2", "1", "2", " a", "<|tool|>"], "e\u0301"),
        ("gpt-2", ["12", "12", " a", "<|tool|>"], "e\u0301"),
        ("llama-bpe", ["12", "1", "2", " a", "<|tool|>"], "e\u0301"),
        ("qwen2", ["1", "2", "1", "2", " a", "<|tool|>"], "é"),
    ],
)
def test_tokenizer_kinds(pre, pieces, accent, tmp_path):
    tokenizer = GGUFFile(write_tokenizer(tmp_path / "model.gguf", pre)).tokenizer()
    ids = tokenizer.encode("1212 a<|tool|>")
    assert ids.dtype == np.int32
    assert [tokenizer.decode([i]) for i in ids] == pieces
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == accent
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (None, (258,), "{{ messages }}")


def test_other_tokenizers_need_a_file(goldens, tmp_path):
    file = write_tokenizer(tmp_path / "model.gguf", "default", kind="llama")
    with pytest.raises(
        KvjaxError, match=r"\(llama, default\) is not supported; put its HF form at .*tokenizer\.json"
    ):
        GGUFFile(file).tokenizer()
    (tmp_path / "tokenizer.json").write_bytes((goldens / "qwen3" / "tokenizer.json").read_bytes())
    assert GGUFFile(file).tokenizer().decode([10, 11]) == "%&"
