"""Reading of Hugging Face's `config.json`, by a complete list of its keys."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from kvjax.errors import KvjaxError
from kvjax.models.config import FAMILIES, MOST_LAYERS, ModelConfig, RopeConfig
from kvjax.models.keys import Fields, KeyList

USED = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings"),
    *("layer_types", "use_sliding_window", "sliding_window"),
)
TRAINING = (
    *("attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "gradient_checkpointing"),
    *("hidden_dropout", "hidden_dropout_prob", "initializer_factor", "initializer_range", "output_router_logits"),
    *("pretraining_tp", "resid_pdrop", "residual_dropout", "router_aux_loss_coef", "router_jitter_noise"),
)
GENERATION = (
    *("bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation", "decoder_start_token_id"),
    *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty"),
    *("max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_scores", "pad_token_id", "prefix", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature"),
    *("tokenizer_class", "top_k", "top_p", "typical_p", "unk_token_id", "use_cache"),
)
RECORDS = (  # what tools write for themselves; auto_map names code, which is never run
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures"),
    *("attn_implementation", "auto_map", "chunk_size_feed_forward", "cross_attention_hidden_size", "dtype"),
    *("finetuning_task", "id2label", "is_decoder", "label2id", "layer_norm_eps", "layer_norm_epsilon"),
    *("model_max_length", "num_labels", "output_attentions", "output_hidden_states", "problem_type"),
    *("quantization", "return_dict", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder"),
    *("torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # rope
    **dict.fromkeys(("rope_interleave", "rope_interleaved", "use_mrope", "alibi", "use_alibi"), (False,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_ratio"), (1,)),
    **dict.fromkeys(("rope_local_base_freq", "swa_rope_theta", "no_rope_layer_interval", "mrope_section"), ()),
    **{"no_rope_layers": (1,), "position_embedding_type": ("rope",), "rotary_dim": (), "rotary_emb_base": ()},
    # which tokens a layer sees
    **dict.fromkeys(("attention_chunk_size", "attention_window_size", "window_size", "sliding_window_pattern"), ()),
    **{"is_causal": (True,), "causal": (True,), "use_bidirectional_attention": (False,), "attention_sink": (False,)},
    **{"interleaved_sliding_window": (), "global_attn_every_n_layers": (1,), "num_kv_shared_layers": (0,)},
    # scales
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1,)),
    **dict.fromkeys(("lm_head_multiplier", "scale_emb", "embedding_scale", "residual_scale"), (1,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "dim_model_base"), ()),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "clip_qkv", "clamp_kqv"), ()),
    **{"attn_temperature_tuning": (False, 0), "scale_attn_weights": (True,)},
    # layers of another build
    **dict.fromkeys(("use_bias", "bias", "qkv_bias", "lm_head_bias", "attention_out_bias"), (False,)),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"), (0,)),
    **dict.fromkeys(("n_shared_experts", "moe_intermediate_size", "num_nextn_predict_layers"), (0,)),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "use_parallel_residual", "parallel_attn"), (False,)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "use_post_norm"), (False,)),
    **{"mlp_layer_types": ("dense",), "hidden_activation": ("silu", "swish"), "pruned_heads": ()},
    **{"activation": ("silu", "swish", "swiglu")},
    **{"norm_type": ("rmsnorm", "rms_norm"), "per_layer_config": ()},
    # weights in another form
    **dict.fromkeys(("quantization_config", "compression_config"), ()),
}
HARMLESS = (*TRAINING, *GENERATION, *RECORDS)
_NO_BIAS: dict[str, tuple[Any, ...]] = dict.fromkeys(("attention_bias", "mlp_bias"), (False,))
_NORMS: dict[str, tuple[Any, ...]] = dict.fromkeys(("qk_norm", "use_qk_norm"), (True,))


def _keys(*used: str, harmless: tuple[str, ...] = (), neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL) -> KeyList:
    others = {key: values for key, values in neutral.items() if key not in (*used, *harmless)}
    return KeyList((*(key for key in USED if key not in (*others, *harmless)), *used), (*HARMLESS, *harmless), others)


KEYS = {
    "llama": _keys("attention_bias", "mlp_bias", harmless=("max_window_layers",)),
    "mistral": _keys(neutral=NEUTRAL | _NO_BIAS | {"max_window_layers": (0,)}),
    # Qwen2 always has the biases that attention_bias speaks of, Qwen3 always these norms.
    "qwen2": _keys(
        *("max_window_layers",),
        harmless=("attention_bias",),
        neutral=NEUTRAL | {"mlp_bias": (False,), "qkv_bias": (True,)},
    ),
    "qwen3": _keys("max_window_layers", "attention_bias", neutral=NEUTRAL | _NORMS | {"mlp_bias": (False,)}),
    "smollm3": _keys(
        *("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"), harmless=("max_window_layers",)
    ),
    "granite": _keys(
        *("attention_bias", "mlp_bias"),
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    ),
    "gemma3_text": _keys(
        *("attention_bias", "hidden_activation", "query_pre_attn_scalar"),
        *("rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"),
        neutral=NEUTRAL | _NO_BIAS | {"hidden_act": ("gelu_pytorch_tanh",)},
    ),
    **dict.fromkeys(("olmo2", "olmo3"), _keys("attention_bias", neutral=NEUTRAL | _NORMS | {"mlp_bias": (False,)})),
    "phi3": _keys("partial_rotary_factor", neutral=NEUTRAL | _NO_BIAS),
    "qwen3_moe": _keys(
        *("attention_bias", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("norm_topk_prob",),
        harmless=("intermediate_size", "max_window_layers"),
        neutral=NEUTRAL | _NORMS | {"mlp_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ()},
    ),
    "gpt_oss": _keys(
        *("attention_bias", "num_experts", "num_local_experts", "num_experts_per_tok", "quantization_config"),
        harmless=("experts_per_token",),
        neutral=NEUTRAL | {"mlp_bias": (True,), "swiglu_limit": (7,), "swiglu_alpha": (1.702,)},
    ),
}
# Of rope_scaling and rope_parameters, by type of scaling: every key that is not listed is refused.
_ROPE = ("type", "rope_type", "rope_theta")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SCALED = ("original_max_position_embeddings", "finetuned")
_ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1,), "attention_factor": (1,)}
_YARN = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate")
_LONGROPE = ("original_max_position_embeddings", "attention_factor", "short_factor", "long_factor", "factor")
ROPE_KEYS = {
    "default": KeyList(_ROPE, _SCALED, _ROPE_NEUTRAL | {"factor": (1,)}, ("",)),
    "linear": KeyList((*_ROPE, "factor"), _SCALED, _ROPE_NEUTRAL, ("",)),
    "dynamic": KeyList((*_ROPE, "factor"), _SCALED, _ROPE_NEUTRAL, ("",)),
    "llama3": KeyList((*_ROPE, *_LLAMA3), ("finetuned",), _ROPE_NEUTRAL, ("",)),
    "yarn": KeyList((*_ROPE, "factor", *_YARN, "mscale", "mscale_all_dim"), ("finetuned",), _ROPE_NEUTRAL, ("",)),
    "longrope": KeyList((*_ROPE, *_LONGROPE), ("finetuned",), _ROPE_NEUTRAL, ("",)),
}
_LAYER_TYPE_ROPES = KeyList(("full_attention", "sliding_attention"), stems=("",))
# transformers' own values for keys that a config leaves out; "null" there means what it does here.
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "smollm3": {
        **{"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6},
        **{"tie_word_embeddings": True, "no_rope_layer_interval": 4},
    },
    "granite": {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
    "gemma3_text": {
        **{"max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
        **{"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096},
        **{"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    },
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    "olmo3": {
        **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
        **{"sliding_window_pattern": 4},
    },
    "phi3": {
        **{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        **{"partial_rotary_factor": 1.0},
    },
    "qwen3_moe": {
        **{"max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
    },
    "gpt_oss": {
        **{"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5},
        **{"num_experts": 128, "num_experts_per_tok": 4, "norm_topk_prob": True, "attention_bias": True},
        **{"sliding_window": 128, "sliding_window_pattern": 2, "rope_theta": 150000.0},
        "rope_parameters": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
    },
}
# What every model of a family has.
_NORMS_AFTER = {"pre_norm": False, "post_norm": True, "qk_norm": True, "whole_qk_norm": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma3_text": {"qk_norm": True, "post_norm": True},
    **dict.fromkeys(("olmo2", "olmo3"), _NORMS_AFTER),
    "qwen3_moe": {"qk_norm": True},
    "gpt_oss": {"learned_sinks": True, "mlp_bias": True, "activation": "clamped_silu"},
}
SWITCHED = ("qwen2", "qwen3", "smollm3", "qwen3_moe")  # use_sliding_window decides
ALWAYS = ("mistral", "gemma3_text", "olmo3", "phi3", "gpt_oss")  # where there is a window it is on; else never
TYPED = ("qwen2", "qwen3", "smollm3", "gemma3_text", "olmo3", "gpt_oss")  # each layer has a window or not
TWO_ROPES = ("gemma3_text", "olmo3")  # one of layers with a window, one of the others
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}  # whether there is a window


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads the config of a HF `config.json`.

    Args:
      hf: the object in the file.

    Returns:
      The config of the decoder.

    Raises:
      KvjaxError: an unknown model family, a missing key, a value of the wrong kind, or a key that changes what a
        decoder computes and that `Decoder` does not have.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise KvjaxError(f"model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}")
    KEYS[family].check(hf, f"a {family} config.json")
    used = {key: value for key, value in hf.items() if key in KEYS[family].used}
    fields = Fields(DEFAULTS[family] | used)
    if (form := fields.part("quantization_config").text("quant_method", "mxfp4")) != "mxfp4":
        raise KvjaxError(f"quant_method of quantization_config is {form!r}; expected mxfp4 or float weights")
    layers = fields.whole("num_hidden_layers", most=MOST_LAYERS)
    heads = _heads(fields)
    return ModelConfig(
        family=family,
        vocab_size=fields.whole("vocab_size"),
        layers=layers,
        norm_eps=fields.real("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings"),
        **heads,
        **_mlp(fields),
        **_scales(fields, family, heads),
        **_positions(fields, family, heads["head_dim"]),
        **_layer_kinds(fields, family, layers),
        **{"activation": _activation(fields)} | _biases(fields) | OPTIONS.get(family, {}),
    )


def _activation(fields: Fields) -> str:
    key = "hidden_activation" if "hidden_activation" in fields.values else "hidden_act"
    if (name := fields.text(key, fields.text("hidden_act", "silu"))) not in ACTIVATIONS:
        raise KvjaxError(f"{key} {name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _mlp(fields: Fields) -> dict[str, Any]:
    """The MLP's width; where the family has experts, theirs."""
    if "num_experts" not in fields.values:
        return {"mlp_dim": fields.whole("intermediate_size")}
    experts = fields.whole("num_local_experts", fields.whole("num_experts"))  # one key by two names
    return {
        "mlp_dim": fields.whole("moe_intermediate_size", fields.whole("intermediate_size", 1)),
        "experts": experts,
        "experts_per_token": fields.whole("num_experts_per_tok", most=experts),
        "normalized_experts": fields.flag("norm_topk_prob"),
    }


def _scales(fields: Fields, family: str, heads: Mapping[str, int]) -> dict[str, Any]:
    """Granite's multipliers, and Gemma's embedding and queries. Decoders scale scores by 1 / sqrt(head_dim)."""
    root = math.sqrt(heads["head_dim"])
    query = 1.0
    if "attention_multiplier" in fields.values:
        query = fields.real("attention_multiplier") * root
    elif "query_pre_attn_scalar" in fields.values:
        query = root / math.sqrt(fields.real("query_pre_attn_scalar"))
    embedding = math.sqrt(heads["model_dim"]) if family == "gemma3_text" else fields.real("embedding_multiplier", 1.0)
    return {
        "embedding_scale": embedding,
        "residual_scale": fields.real("residual_multiplier", 1.0),
        "query_scale": query,
        "logit_scale": 1 / fields.real("logits_scaling", 1.0),
    }


def _heads(fields: Fields) -> dict[str, Any]:
    heads, model_dim = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    kv_heads, head_dim = fields.whole("num_key_value_heads", heads), fields.whole("head_dim", model_dim // heads)
    if heads % kv_heads:
        raise KvjaxError(f"num_attention_heads is {heads}; expected a multiple of num_key_value_heads, {kv_heads}")
    return {"model_dim": model_dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def _biases(fields: Fields) -> dict[str, Any]:
    attention = fields.flag("attention_bias")
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": fields.flag("mlp_bias")}


def _positions(fields: Fields, family: str, head_dim: int) -> dict[str, Any]:
    """The ropes, and how far they reach: yarn and dynamic count from the length that the model was first made for."""
    most = fields.whole("max_position_embeddings")
    ropes = _rope_by_type(fields, most) if family in TWO_ROPES else {"rope": _rope(fields, most, head_dim)}
    rope = ropes["rope"]
    stretched = rope.scaling in ("yarn", "dynamic")
    return {**ropes, "max_positions": max(most, int(rope.factor * rope.original_max_positions) * stretched)}


def _layer_kinds(fields: Fields, family: str, layers: int) -> dict[str, Any]:
    """The sliding window, and the layers without it or without RoPE, as transformers has them."""
    nope = _nope_layers(fields, layers)
    window = _window(fields, family)
    full = tuple(range(layers)) if window is None else _untyped_full_layers(fields, layers, nope)
    if fields.values.get("layer_types") is not None:
        typed = _full_layers(fields.values["layer_types"], layers)
        if typed != full and (window is None or family not in TYPED):
            sliding = layers - len(typed)
            raise KvjaxError(f"layer_types has {sliding} sliding_attention layers where the window is {window}")
        full = typed
    if len(full) == layers:
        window, full = None, ()
    return {"nope_layers": nope, "window": window, "full_layers": full}


def _nope_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """The layers without RoPE: 0 in `no_rope_layers`, else every so many."""
    if (kinds := fields.values.get("no_rope_layers")) is not None:
        if not isinstance(kinds, list) or len(kinds) < layers or not all(kind in (0, 1) for kind in kinds):
            raise KvjaxError(
                f"no_rope_layers is {reprlib.repr(kinds)}; expected num_hidden_layers = {layers} of 0 or 1"
            )
        return tuple(i for i in range(layers) if not kinds[i])
    if "no_rope_layer_interval" not in fields.values:
        return ()
    every = fields.whole("no_rope_layer_interval")
    return tuple(range(every - 1, layers, every))


def _untyped_full_layers(fields: Fields, layers: int, nope: tuple[int, ...]) -> tuple[int, ...]:
    """The layers without a window where `layer_types` does not say it."""
    if "no_rope_layer_interval" in fields.values:
        return tuple(i for i in range(layers) if i not in nope)
    if "max_window_layers" in fields.values:
        return tuple(range(min(fields.whole("max_window_layers", 28, least=0), layers)))
    written = fields.values.get("_sliding_window_pattern")  # as transformers 5 writes it
    key = "sliding_window_pattern" if written is None else "_sliding_window_pattern"
    if key not in fields.values:
        return ()
    every = fields.whole(key)
    return tuple(range(every - 1, layers, every))


def _window(fields: Fields, family: str) -> int | None:
    window, switch = fields.values.get("sliding_window"), fields.values.get("use_sliding_window")
    if window is None or (family in SWITCHED and not fields.flag("use_sliding_window")):
        return None
    if family not in SWITCHED and (switch is False) == (family in ALWAYS):
        # transformers' llama never has a window, its mistral has one whatever the switch says.
        raise KvjaxError(f"sliding_window is {window!r} and use_sliding_window {switch!r} in a {family} config.json")
    return fields.whole("sliding_window") if family in (*SWITCHED, *ALWAYS) else None


def _full_layers(types: Any, layers: int) -> tuple[int, ...]:
    """The layers without a window by `layer_types`."""
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(kind, str) for kind in types):
        raise KvjaxError(f"layer_types is {reprlib.repr(types)}; expected num_hidden_layers = {layers} names")
    if unknown := [kind for kind in types if kind not in LAYER_TYPES]:
        raise KvjaxError(f"layer_types has {unknown[0]!r}; expected full_attention or sliding_attention")
    return tuple(i for i, kind in enumerate(types) if not LAYER_TYPES[kind])


def _rope(fields: Fields, max_positions: int, head_dim: int) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; earlier files have `rope_theta` and `rope_scaling`.
    scaling = fields.part("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    channels = None
    if "partial_rotary_factor" in fields.values:  # the share of a head that the family lets configs choose
        turned = head_dim * scaling.real("partial_rotary_factor", fields.real("partial_rotary_factor"))
        if turned % 2 or turned > head_dim:
            raise KvjaxError(f"rope turns {turned} of the {head_dim} channels of a head; expected an even number")
        channels = None if turned == head_dim else int(turned)
        scaling = Fields({**scaling.values, "partial_rotary_factor": None}, scaling.where)
    rope = _rope_of(scaling, fields.real("rope_theta", 10000.0), fields, max_positions)
    return dataclasses.replace(rope, channels=channels)


def _rope_by_type(fields: Fields, max_positions: int) -> dict[str, RopeConfig]:
    """Two ropes: `rope_scaling` and `rope_theta` speak of the layers without a window."""
    types = fields.part("rope_parameters")
    _LAYER_TYPE_ROPES.check(types.values, "rope_parameters")
    full, local = types.part("full_attention"), types.part("sliding_attention")
    if fields.values.get("rope_scaling"):
        full = Fields({**full.values, **fields.part("rope_scaling").values}, " of rope_scaling")
    theta = fields.real("rope_theta")
    return {
        "rope": _rope_of(full, theta, fields, max_positions),
        "window_rope": _rope_of(local, fields.real("rope_local_base_freq", theta), fields, max_positions),
    }


def _rope_of(scaling: Fields, theta: float, fields: Fields, max_positions: int) -> RopeConfig:
    """The RoPE of one object, `theta` where it has none."""
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its older name
    if kind not in ROPE_KEYS:
        raise KvjaxError(f"rope scaling {kind!r} is not supported; expected {', '.join(ROPE_KEYS)}")
    ROPE_KEYS[kind].check(scaling.values, f"{kind} rope scaling")
    plain = RopeConfig(scaling.real("rope_theta", theta))
    if kind == "default":
        return plain
    # A value beside the object wins, as in transformers.
    inside = scaling.whole("original_max_position_embeddings", max_positions)
    old = fields.whole("original_max_position_embeddings", inside)
    if kind == "longrope":
        return _longrope(dataclasses.replace(plain, scaling=kind, original_max_positions=old), scaling, max_positions)
    scaled = dataclasses.replace(plain, scaling=kind, factor=scaling.real("factor"))
    if kind == "linear":
        return scaled
    if kind == "dynamic":
        return dataclasses.replace(scaled, original_max_positions=max_positions)
    scaled = dataclasses.replace(scaled, original_max_positions=old)
    if kind == "yarn":
        return _yarn(scaled, scaling)
    return dataclasses.replace(
        scaled,
        low_freq_factor=scaling.real("low_freq_factor"),
        high_freq_factor=scaling.real("high_freq_factor"),
    )


def _yarn(scaled: RopeConfig, scaling: Fields) -> RopeConfig:
    """With the attention factor of arXiv 2309.00071, section 3.4; `mscale` and `mscale_all_dim` are DeepSeek's."""

    def size(mscale: float) -> float:
        return 0.1 * mscale * math.log(max(scaled.factor, 1)) + 1

    factor = size(1)
    if scaling.values.get("mscale") and scaling.values.get("mscale_all_dim"):
        factor = size(scaling.real("mscale")) / size(scaling.real("mscale_all_dim"))
    return dataclasses.replace(
        scaled,
        attention_factor=scaling.real("attention_factor", factor),
        beta_fast=scaling.real("beta_fast", 32.0),
        beta_slow=scaling.real("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )


def _longrope(scaled: RopeConfig, scaling: Fields, max_positions: int) -> RopeConfig:
    """With the attention factor of arXiv 2402.13753, as transformers has it."""
    old = scaled.original_max_positions
    ratio = scaling.real("factor", max_positions / old)
    factor = math.sqrt(1 + math.log(ratio) / math.log(old)) if ratio > 1 and old > 1 else 1.0
    return dataclasses.replace(
        scaled,
        attention_factor=scaling.real("attention_factor", factor),
        short_factors=scaling.reals("short_factor"),
        long_factors=scaling.reals("long_factor"),
    )
