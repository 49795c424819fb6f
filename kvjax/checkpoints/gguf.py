"""GGUF files: llama (and mistral, which GGUF calls llama), qwen2 and qwen3, with their tokenizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from jax.typing import DTypeLike
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kvjax.checkpoints.tokenizer import Tokenizer, read_backend
from kvjax.errors import KvjaxError
from kvjax.files import brief
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.params import Names, ParamPath, Params, build_params
from kvjax.models.rope import make_rope

ARCHITECTURES = ("llama", "qwen2", "qwen3")
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
        "q_norm": "attn_q_norm.weight",
        "k_norm": "attn_k_norm.weight",
        "mlp_norm": "ffn_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
    },
)


class _Reader(GGUFReader):
    """Slices a plain array, not a np.memmap: three times as fast over the many strings of a tokenizer."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)


class GGUFFile:
    """An open GGUF file: metadata, tensors, tokenizer.

    Raises:
      KvjaxError: the file is not a whole GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _Reader(path)
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise KvjaxError(f"{path} is not a whole GGUF file: {brief(error)}") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._arch = self.get("general.architecture", "none")

    def get(self, key: str, default: Any = None) -> Any:
        """One metadata value; floats as the shortest decimals of the stored float32 (1e-05, not 9.99e-06)."""
        field = self._reader.get_field(key)
        if field is None:
            return default
        value = field.contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _need(self, key: str) -> Any:
        value = self.get(f"{self._arch}.{key}")
        if value is None:
            raise KvjaxError(f"{self.path} has no metadata {self._arch}.{key}")
        return value

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise KvjaxError(f"tensor {name} is missing in {self.path}")
        return tuple(reversed(self._tensors[name].shape.tolist()))

    def _read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise KvjaxError(f"tensor {name} is {tensor.tensor_type.name}, which is not supported") from None

    def config(self) -> ModelConfig:
        """What the metadata says of the decoder.

        Raises:
          KvjaxError: another architecture, a missing field, or a rope that `Decoder` does not have.
        """
        if self._arch not in ARCHITECTURES:
            raise KvjaxError(
                f"GGUF architecture {self._arch!r} is not supported; expected {', '.join(ARCHITECTURES)}"
            )
        heads, model_dim = self._need("attention.head_count"), self._need("embedding_length")
        head_dim = self.get(f"{self._arch}.attention.key_length", model_dim // heads)
        rotated = self.get(f"{self._arch}.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise KvjaxError(f"{self.path} rotates {rotated} of {head_dim} channels; expected all of them")
        return ModelConfig(
            family=self._arch,
            vocab_size=self._shape(NAMES.top["embed"])[0],
            model_dim=model_dim,
            mlp_dim=self._need("feed_forward_length"),
            layers=self._need("block_count"),
            heads=heads,
            kv_heads=self.get(f"{self._arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_positions=self._need("context_length"),
            norm_eps=self._need("attention.layer_norm_rms_epsilon"),
            rope=self._rope(head_dim),
            qkv_bias=self._arch == "qwen2",
            qk_norm=self._arch == "qwen3",
            tied=NAMES.top["head"] not in self._tensors,
        )

    def _rope(self, head_dim: int) -> RopeConfig:
        plain = RopeConfig(self.get(f"{self._arch}.rope.freq_base", 10000.0))
        kind = self.get(f"{self._arch}.rope.scaling.type", "none")
        if ROPE_FACTORS in self._tensors:
            return self._llama3(plain, head_dim)
        if kind == "linear":
            return dataclasses.replace(plain, scaling="linear", factor=self._need("rope.scaling.factor"))
        if kind != "none":
            raise KvjaxError(f"rope scaling {kind!r} is not supported; expected none, linear or llama3")
        return plain

    def _llama3(self, plain: RopeConfig, head_dim: int) -> RopeConfig:
        """Llama 3's published scaling, checked against its frequency divisors, all that GGUF keeps of it."""
        divisors = self._read(ROPE_FACTORS)
        rope = dataclasses.replace(plain, scaling="llama3", factor=float(divisors.max()))
        expected = make_rope(plain, head_dim).inv_freq / make_rope(rope, head_dim).inv_freq
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise KvjaxError(f"tensor {ROPE_FACTORS} of {self.path} is not the rope scaling of Llama 3.1 to 3.3")
        return rope

    def load(self, dtype: DTypeLike, layers: int | None = None) -> tuple[ModelConfig, Params]:
        """The config and dequantised parameters, of the first `layers` layers where given.

        Raises:
          KvjaxError: one line on what is missing, of another shape or not supported.
        """
        config = self.config()
        heads = {"q": config.heads, "k": config.kv_heads}

        def read(path: ParamPath, name: str) -> np.ndarray:
            values = self._read(name)
            if config.family == "llama" and path[-1] in heads:
                return _split_halves(values, heads[path[-1]])
            return values

        present = {name: self._shape(name) for name in self._tensors if name != ROPE_FACTORS}
        return build_params(config, NAMES, present, read, dtype, layers)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file; a tokenizer.json beside the file where its kind is not known here.

        Raises:
          KvjaxError: the kind is not known and there is no tokenizer.json.
        """
        kind, pre = self.get("tokenizer.ggml.model"), self.get("tokenizer.ggml.pre", "default")
        beside = self.path.parent / "tokenizer.json"
        if kind == "gpt2" and pre in PRE_TOKENIZERS:
            backend = self._byte_level_bpe(pre)
        elif beside.is_file():
            backend = read_backend(beside)
        else:
            raise KvjaxError(
                f"the tokenizer of {self.path} ({kind}, {pre}) is not supported; put its HF form at {beside}"
            )
        ends = (self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return Tokenizer(
            backend,
            bos_id=self.get("tokenizer.ggml.bos_token_id"),
            eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
            chat_template=self.get("tokenizer.chat_template"),
        )

    def _byte_level_bpe(self, pre: str) -> Backend:
        tokens = self.get("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self.get("tokenizer.ggml.merges")]
        vocab = {token: i for i, token in enumerate(tokens)}
        # Llama 3 has whole words that no merge makes.
        backend = Backend(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
        backend.pre_tokenizer = PRE_TOKENIZERS[pre]
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.ByteLevel()
        special = (TokenType.CONTROL, TokenType.USER_DEFINED)
        kinds = zip(tokens, self.get("tokenizer.ggml.token_type"), strict=True)
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k in special])
        return backend


def _split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """q or k [heads * d, in]: rows from GGUF llama's order (adjacent pairs) to `rope`'s (half-split)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # by `tokenizer.ggml.pre`
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _split(_WORDS % r"\p{N}{1,3}"),
    "qwen2": _split(_WORDS % r"\p{N}"),
}
