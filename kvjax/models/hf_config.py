"""Reading of Hugging Face's `config.json`, by a complete list of its keys."""

from __future__ import annotations

import dataclasses
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
# Qwen2 always has the biases that these keys speak of, Qwen3 always these norms.
HARMLESS = (*TRAINING, *GENERATION, *RECORDS)
KEYS = {
    "llama": KeyList((*USED, "attention_bias", "mlp_bias"), (*HARMLESS, "max_window_layers"), NEUTRAL),
    "mistral": KeyList(
        *(USED, HARMLESS),
        NEUTRAL | {"attention_bias": (False,), "mlp_bias": (False,), "max_window_layers": (0,)},
    ),
    "qwen2": KeyList(
        (*USED, "max_window_layers"),
        (*HARMLESS, "attention_bias"),
        NEUTRAL | {"mlp_bias": (False,), "qkv_bias": (True,)},
    ),
    "qwen3": KeyList(
        (*USED, "max_window_layers", "attention_bias"),
        HARMLESS,
        NEUTRAL | {"mlp_bias": (False,), "qk_norm": (True,), "use_qk_norm": (True,)},
    ),
}
# Of rope_scaling and rope_parameters, by type of scaling: every key that is not listed is refused.
_ROPE = ("type", "rope_type", "rope_theta")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SCALED = ("original_max_position_embeddings", "finetuned")
_ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1,), "attention_factor": (1,)}
ROPE_KEYS = {
    "default": KeyList(_ROPE, _SCALED, _ROPE_NEUTRAL | {"factor": (1,)}, ("",)),
    "linear": KeyList((*_ROPE, "factor"), _SCALED, _ROPE_NEUTRAL, ("",)),
    "llama3": KeyList((*_ROPE, *_LLAMA3), ("finetuned",), _ROPE_NEUTRAL, ("",)),
}
# transformers' own values for keys that a config leaves out; "null" there means what it does here.
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
CHOOSING = ("qwen2", "qwen3")  # each layer has a window or not
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
    fields = Fields(DEFAULTS[family] | dict(hf))
    if (act := fields.text("hidden_act", "silu")) not in ("silu", "swish"):
        raise KvjaxError(f"hidden_act {act!r} is not supported; expected silu")
    heads, model_dim = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    kv_heads, head_dim = fields.whole("num_key_value_heads", heads), fields.whole("head_dim", model_dim // heads)
    if heads % kv_heads:
        raise KvjaxError(f"num_attention_heads is {heads}; expected a multiple of num_key_value_heads, {kv_heads}")
    layers = fields.whole("num_hidden_layers", most=MOST_LAYERS)
    window, full_layers = _windows(fields, family, layers)
    attention_bias = family in ("llama", "qwen3") and fields.flag("attention_bias")
    return ModelConfig(
        family=family,
        vocab_size=fields.whole("vocab_size"),
        model_dim=model_dim,
        mlp_dim=fields.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=fields.whole("max_position_embeddings"),
        norm_eps=fields.real("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        tied=fields.flag("tie_word_embeddings"),
        window=window,
        full_layers=full_layers,
    )


def _windows(fields: Fields, family: str, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the layers without one, as transformers' config of the family has them."""
    window = _window(fields, family)
    first = fields.whole("max_window_layers", 28, least=0) if family in CHOOSING else 0
    full = tuple(range(layers if window is None else min(first, layers)))
    if fields.values.get("layer_types") is not None:
        typed = _full_layers(fields.values["layer_types"], layers)
        if typed != full and (window is None or family not in CHOOSING):
            sliding = layers - len(typed)
            raise KvjaxError(f"layer_types has {sliding} sliding_attention layers where the window is {window}")
        full = typed
    return (None, ()) if len(full) == layers else (window, full)


def _window(fields: Fields, family: str) -> int | None:
    switch = fields.values.get("use_sliding_window")
    if fields.values.get("sliding_window", None if family == "llama" else 4096) is None:
        return None
    if family not in CHOOSING and (switch is False) == (family == "mistral"):
        # transformers' llama never has a window, its mistral has one whatever the switch says.
        window = fields.values.get("sliding_window", 4096)
        raise KvjaxError(f"sliding_window is {window!r} and use_sliding_window {switch!r} in a {family} config.json")
    on = family == "mistral" or fields.flag("use_sliding_window")
    return fields.whole("sliding_window", 4096) if on else None


def _full_layers(types: Any, layers: int) -> tuple[int, ...]:
    """The layers without a window by `layer_types`."""
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(kind, str) for kind in types):
        raise KvjaxError(f"layer_types is {reprlib.repr(types)}; expected num_hidden_layers = {layers} names")
    if unknown := [kind for kind in types if kind not in LAYER_TYPES]:
        raise KvjaxError(f"layer_types has {unknown[0]!r}; expected full_attention or sliding_attention")
    return tuple(i for i, kind in enumerate(types) if not LAYER_TYPES[kind])


def _rope(fields: Fields) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; earlier files have `rope_theta` and `rope_scaling`.
    scaling = fields.part("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in ROPE_KEYS:
        raise KvjaxError(f"rope scaling {kind!r} is not supported; expected {', '.join(ROPE_KEYS)}")
    ROPE_KEYS[kind].check(scaling.values, f"{kind} rope scaling")
    plain = RopeConfig(scaling.real("rope_theta", fields.real("rope_theta", 10000.0)))
    if kind == "default":
        return plain
    factor = scaling.real("factor")
    if kind == "linear":
        return dataclasses.replace(plain, scaling="linear", factor=factor)
    # A value beside the object wins, as in transformers.
    inside = scaling.whole("original_max_position_embeddings", fields.whole("max_position_embeddings"))
    return dataclasses.replace(
        plain,
        scaling="llama3",
        factor=factor,
        low_freq_factor=scaling.real("low_freq_factor"),
        high_freq_factor=scaling.real("high_freq_factor"),
        original_max_positions=fields.whole("original_max_position_embeddings", inside),
    )
