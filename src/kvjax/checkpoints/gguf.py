"""Reading of GGUF files: llama (and mistral, which GGUF calls llama), qwen2, qwen3 and gemma3, with tokenizers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize
from jax.typing import DTypeLike

from kvjax.checkpoints.gguf_reader import read_gguf
from kvjax.checkpoints.gguf_tokenizer import read_tokenizer
from kvjax.errors import KvjaxError
from kvjax.files import brief
from kvjax.mesh import ONE_DEVICE, Index, Layout
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.keys import STEMS, KeyList
from kvjax.models.params import Names, ParamPath, Params, build_params
from kvjax.models.rope import make_rope
from kvjax.models.tokenizer import Tokenizer

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}  # by architecture
ROPE_FACTORS = "rope_freqs.weight"
NAMES = Names(
    top={"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"},
    prefix="blk.{i}.",
    layer={
        "attention_norm": "attn_norm.weight",
        "q": "attn_q.weight",
        "k": "attn_k.weight",
        "v": "attn_v.weight",
        "o": "attn_output.weight",
        "q_bias": "attn_q.bias",
        "k_bias": "attn_k.bias",
        "v_bias": "attn_v.bias",
        "o_bias": "attn_output.bias",
        "q_norm": "attn_q_norm.weight",
        "k_norm": "attn_k_norm.weight",
        "attention_post_norm": "post_attention_norm.weight",
        "mlp_norm": "ffn_norm.weight",
        "mlp_post_norm": "post_ffw_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
        "gate_bias": "ffn_gate.bias",
        "up_bias": "ffn_up.bias",
        "down_bias": "ffn_down.bias",
    },
)
# Of the keys that begin with the architecture. Scaling of rope has its own list below.
_KEYS = KeyList(
    used=(
        *("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count"),
        *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
        *("rope.scaling.type", "rope.scaling.factor"),
    ),
    harmless=(
        *("vocab_size", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier"),
    ),
    neutral={
        **dict.fromkeys(("attention.sliding_window", "attention.sliding_window_pattern"), (0, False)),
        **dict.fromkeys(("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias"), (0,)),
        **dict.fromkeys(("attention.output_scale", "embedding_scale", "residual_scale", "logit_scale"), (1, 0)),
        **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "attention.temperature_scale"), (0,)),
        **dict.fromkeys(("expert_count", "expert_used_count", "nextn_predict_layers"), (0,)),
        **dict.fromkeys(("attention.shared_kv_layers", "leading_dense_block_count"), (0,)),
        **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (1,)),
        **{"rope.scaling.yarn_ext_factor": (0, -1), "rope.scaling.alpha": (0,), "rope.dimension_sections": (0,)},
        **{"attention.causal": (True,), "use_parallel_residual": (False,)},
    },
    stems=(*STEMS, "attention", "altup", "softmax"),
)
_WINDOW = ("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa")
KEYS = dict.fromkeys(FAMILIES, _KEYS) | {"gemma3": dataclasses.replace(_KEYS, used=(*_KEYS.used, *_WINDOW))}
GEMMA3_27B = 62  # layers


class GGUFFile:
    """An open GGUF file: metadata, tensors, tokenizer.

    Args:
      path: the file.

    Raises:
      KvjaxError: the file is not a whole GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._metadata, self._tensors = read_gguf(path)
        except (OSError, ValueError) as error:
            raise KvjaxError(f"{path} is not a whole GGUF file: {brief(error)}") from None
        self._arch = self.get("general.architecture", str, "none")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Returns one metadata value.

        Args:
          key: name of the value.
          kind: the type that it must have.
          default: returned where the file has no such value.

        Raises:
          KvjaxError: the value is of another type.
        """
        value = self._metadata.get(key, default)
        if value is not default and type(value) is not kind:
            raise KvjaxError(
                f"metadata {key} of {self.path} is of type {type(value).__name__}; expected {kind.__name__}"
            )
        return value

    def _need(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise KvjaxError(f"{self.path} has no metadata {key}")
        return value

    def _size(self, key: str, default: int | None = None) -> int:
        """Returns a positive whole number from the metadata of the architecture."""
        key = f"{self._arch}.{key}"
        value = self._need(key, int) if default is None else self.get(key, int, default)
        if value < 1:
            raise KvjaxError(f"metadata {key} of {self.path} is {value}; expected a positive whole number")
        return value

    def _has(self, name: str) -> bool:
        """Whether the first layer has this parameter."""
        return NAMES.of(("layer_0", name)) in self._tensors

    def _check_keys(self) -> None:
        """Raises KvjaxError for parts of models, and for metadata that changes the decoder and is not read."""
        parts = self.get("split.count", int, 1)
        if parts > 1:
            part = self.get("split.no", int, 0) + 1
            merge = "merge them with `llama-gguf-split --merge`"
            raise KvjaxError(f"{self.path} is part {part} of {parts} of a split GGUF; expected one file: {merge}")
        if (kind := self.get("general.type", str, "model")) != "model":
            raise KvjaxError(f"{self.path} holds a GGUF of type {kind!r}; expected a model")
        prefix = f"{self._arch}."
        own = {key.removeprefix(prefix): value for key, value in self._metadata.items() if key.startswith(prefix)}
        KEYS[self._arch].check(own, str(self.path), f"metadata {prefix}")

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise KvjaxError(f"tensor {name} is missing in {self.path}")
        return self._tensors[name].shape

    def _read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._tensors[name]
        rows, within = tensor.part(index)
        try:
            with np.errstate(all="ignore"):  # damaged scales may be infinite or NaN
                return dequantize(rows, tensor.kind)[..., within]
        except NotImplementedError:
            raise KvjaxError(f"tensor {name} of {self.path} is {tensor.kind.name}, which is not supported") from None

    def config(self) -> ModelConfig:
        """Reads the decoder's config from the metadata.

        Returns:
          The config.

        Raises:
          KvjaxError: another architecture, a missing field, or a rope that `Decoder` does not have.
        """
        if self._arch not in FAMILIES:
            raise KvjaxError(f"GGUF architecture {self._arch!r} is not supported; expected {', '.join(FAMILIES)}")
        self._check_keys()
        heads, model_dim = self._size("attention.head_count"), self._size("embedding_length")
        kv_heads, layers = self._size("attention.head_count_kv", heads), self._size("block_count")
        head_dim = self._size("attention.key_length", model_dim // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (channels := self._size(key, head_dim)) != head_dim:
                raise KvjaxError(f"metadata {self._arch}.{key} of {self.path} is {channels}; expected {head_dim}")
        if heads % kv_heads:
            raise KvjaxError(
                f"{self.path} has {heads} attention heads; expected a multiple of its {kv_heads} kv heads"
            )
        return ModelConfig(
            family=FAMILIES[self._arch],
            vocab_size=self._shape(NAMES.top["embed"])[0],
            model_dim=model_dim,
            mlp_dim=self._size("feed_forward_length"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=self._size("context_length"),
            norm_eps=self._need(f"{self._arch}.attention.layer_norm_rms_epsilon", float),
            rope=self._rope(head_dim),
            qkv_bias=self._arch == "qwen2" or self._has("q_bias"),
            o_bias=self._has("o_bias"),
            mlp_bias=self._has("down_bias"),
            qk_norm=self._arch in ("qwen3", "gemma3"),
            tied=NAMES.top["head"] not in self._tensors,
            **(self._gemma3(layers, model_dim, model_dim / heads / head_dim) if self._arch == "gemma3" else {}),
        )

    def _gemma3(self, layers: int, model_dim: int, per_head: float) -> dict[str, Any]:
        """What every Gemma 3 has and its files do not say, as llama.cpp: all but every sixth layer have the window.

        Args:
          layers: the model's.
          model_dim: the model's.
          per_head: model_dim of each head, over head_dim; by its root the 27B model divides queries.
        """
        windowed = self.get("gemma3.attention.sliding_window", int, 0) != 0
        every = self._size("attention.sliding_window_pattern", 6)
        return {
            "post_norm": True,
            "activation": "gelu_tanh",
            "embedding_scale": math.sqrt(model_dim),
            "query_scale": per_head**-0.5 if layers == GEMMA3_27B else 1.0,
            "window": self._size("attention.sliding_window") if windowed else None,
            "full_layers": tuple(range(every - 1, layers, every)) if windowed else (),
            "window_rope": RopeConfig(self.get("gemma3.rope.freq_base_swa", float, 10000.0)),
        }

    def _rope(self, head_dim: int) -> RopeConfig:
        plain = RopeConfig(self.get(f"{self._arch}.rope.freq_base", float, 10000.0))
        # As in llama.cpp: linear where no type is named, the newer key before the older, 0 for no scaling.
        kind = self.get(f"{self._arch}.rope.scaling.type", str, "linear")
        keys = [f"{self._arch}.rope.{key}" for key in ("scaling.factor", "scale_linear")]
        factor = next((self.get(key, float) for key in keys if key in self._metadata), 0.0)
        if kind not in ("none", "linear"):
            raise KvjaxError(f"rope scaling {kind!r} of {self.path} is not supported; expected none or linear")
        scaled = kind == "linear" and factor not in (0, 1)
        if ROPE_FACTORS in self._tensors:
            if scaled:
                raise KvjaxError(f"{self.path} has both tensor {ROPE_FACTORS} and linear rope scaling; expected one")
            return self._llama3(plain, head_dim)
        return dataclasses.replace(plain, scaling="linear", factor=factor) if scaled else plain

    def _llama3(self, plain: RopeConfig, head_dim: int) -> RopeConfig:
        """Llama 3's published scaling, checked against the frequency divisors: GGUF stores no more."""
        divisors = self._read(ROPE_FACTORS, (slice(None),))
        rope = dataclasses.replace(plain, scaling="llama3", factor=float(divisors.max()))
        fits = divisors.shape == (head_dim // 2,)  # checked before anything of the file's length is allocated
        if fits:
            expected = make_rope(plain, head_dim).inv_freq / make_rope(rope, head_dim).inv_freq
            fits = np.allclose(divisors, expected, rtol=1e-4)
        if not fits:
            raise KvjaxError(f"tensor {ROPE_FACTORS} of {self.path} is not the rope scaling of Llama 3.1 to 3.3")
        return rope

    def load(
        self,
        dtype: DTypeLike,
        layers: int | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[ModelConfig, Params]:
        """Reads the config and the dequantised parameters.

        Args:
          dtype: dtype of the parameters.
          layers: how many layers to keep, from the first; all where None.
          layout: where the parameters live. Each device's part is dequantised alone.

        Returns:
          The config and the parameters.

        Raises:
          KvjaxError: one line on what is missing, of another shape or not supported.
        """
        config = self.config()
        paired = ("q", "k", "q_bias", "k_bias") if config.family == "llama" else ()

        def read(path: ParamPath, name: str, index: Index) -> np.ndarray:
            values = self._read(name, index)
            return _split_halves(values, config.head_dim) if path[-1] in paired else values

        present = {name: self._shape(name) for name in self._tensors if name != ROPE_FACTORS}
        return build_params(config, NAMES, present, read, dtype, layers, layout)

    def tokenizer(self) -> Tokenizer:
        """Reads the tokenizer in the file; where its kind is not supported, a tokenizer.json beside the file.

        Returns:
          The tokenizer.

        Raises:
          KvjaxError: as `gguf_tokenizer.read_tokenizer`.
        """
        return read_tokenizer(self.get, self._metadata, self.path)


def _split_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of whole heads, or a bias, from GGUF llama's order (adjacent pairs) to half-split order."""
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
