"""Reading of GGUF files: llama (and mistral, which GGUF calls llama), qwen2 and qwen3, with tokenizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from gguf.quants import dequantize
from jax.typing import DTypeLike
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kvjax.checkpoints.gguf_reader import read_gguf
from kvjax.errors import KvjaxError
from kvjax.files import brief
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.params import Names, ParamPath, Params, build_params
from kvjax.models.rope import make_rope
from kvjax.models.tokenizer import Tokenizer, read_backend

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

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise KvjaxError(f"tensor {name} is missing in {self.path}")
        return self._tensors[name].shape

    def _read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            with np.errstate(all="ignore"):  # damaged scales may be infinite or NaN
                return dequantize(tensor.rows, tensor.kind)
        except NotImplementedError:
            raise KvjaxError(f"tensor {name} of {self.path} is {tensor.kind.name}, which is not supported") from None

    def config(self) -> ModelConfig:
        """Reads the decoder's config from the metadata.

        Returns:
          The config.

        Raises:
          KvjaxError: another architecture, a missing field, or a rope that `Decoder` does not have.
        """
        if self._arch not in ARCHITECTURES:
            raise KvjaxError(
                f"GGUF architecture {self._arch!r} is not supported; expected {', '.join(ARCHITECTURES)}"
            )
        heads, model_dim = self._size("attention.head_count"), self._size("embedding_length")
        head_dim = self._size("attention.key_length", model_dim // heads)
        rotated = self._size("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise KvjaxError(f"{self.path} rotates {rotated} of {head_dim} channels; expected all of them")
        return ModelConfig(
            family=self._arch,
            vocab_size=self._shape(NAMES.top["embed"])[0],
            model_dim=model_dim,
            mlp_dim=self._size("feed_forward_length"),
            layers=self._size("block_count"),
            heads=heads,
            kv_heads=self._size("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_positions=self._size("context_length"),
            norm_eps=self._need(f"{self._arch}.attention.layer_norm_rms_epsilon", float),
            rope=self._rope(head_dim),
            qkv_bias=self._arch == "qwen2",
            qk_norm=self._arch == "qwen3",
            tied=NAMES.top["head"] not in self._tensors,
        )

    def _rope(self, head_dim: int) -> RopeConfig:
        plain = RopeConfig(self.get(f"{self._arch}.rope.freq_base", float, 10000.0))
        kind = self.get(f"{self._arch}.rope.scaling.type", str, "none")
        if ROPE_FACTORS in self._tensors:
            return self._llama3(plain, head_dim)
        if kind == "linear":
            factor = self._need(f"{self._arch}.rope.scaling.factor", float)
            return dataclasses.replace(plain, scaling="linear", factor=factor)
        if kind != "none":
            raise KvjaxError(f"rope scaling {kind!r} is not supported; expected none, linear or llama3")
        return plain

    def _llama3(self, plain: RopeConfig, head_dim: int) -> RopeConfig:
        """Llama 3's published scaling, checked against the frequency divisors: GGUF stores no more."""
        divisors = self._read(ROPE_FACTORS)
        rope = dataclasses.replace(plain, scaling="llama3", factor=float(divisors.max()))
        fits = divisors.shape == (head_dim // 2,)  # checked before anything of the file's length is allocated
        if fits:
            expected = make_rope(plain, head_dim).inv_freq / make_rope(rope, head_dim).inv_freq
            fits = np.allclose(divisors, expected, rtol=1e-4)
        if not fits:
            raise KvjaxError(f"tensor {ROPE_FACTORS} of {self.path} is not the rope scaling of Llama 3.1 to 3.3")
        return rope

    def load(self, dtype: DTypeLike, layers: int | None = None) -> tuple[ModelConfig, Params]:
        """Reads the config and the dequantised parameters.

        Args:
          dtype: dtype of the parameters.
          layers: how many layers to keep, from the first; all where None.

        Returns:
          The config and the parameters.

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
        """Reads the tokenizer in the file; where its kind is not supported, a tokenizer.json beside the file.

        Returns:
          The tokenizer.

        Raises:
          KvjaxError: the kind is not known and there is no tokenizer.json.
        """
        kind, pre = self.get("tokenizer.ggml.model", str), self.get("tokenizer.ggml.pre", str, "default")
        beside = self.path.parent / "tokenizer.json"
        if kind == "gpt2" and pre in PRE_TOKENIZERS:
            try:
                backend = self._byte_level_bpe(pre)
            except KvjaxError:
                raise
            except Exception as error:  # the library raises nothing narrower
                raise KvjaxError(f"the tokenizer of {self.path} is damaged: {brief(error)}") from None
        elif beside.is_file():
            backend = read_backend(beside)
        else:
            raise KvjaxError(
                f"the tokenizer of {self.path} ({kind}, {pre}) is not supported; put its HF form at {beside}"
            )
        ends = (self.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot"))
        return Tokenizer(
            backend,
            bos_id=self.get("tokenizer.ggml.bos_token_id", int),
            eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
            chat_template=self.get("tokenizer.chat_template", str),
        )

    def _byte_level_bpe(self, pre: str) -> Backend:
        tokens = self._need("tokenizer.ggml.tokens", list)
        merges = [tuple(merge.split(" ")) for merge in self._need("tokenizer.ggml.merges", list)]
        vocab = {token: i for i, token in enumerate(tokens)}
        # Llama 3's vocabulary has whole words that no merges lead to.
        backend = Backend(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
        backend.pre_tokenizer = PRE_TOKENIZERS[pre]
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.ByteLevel()
        special = (TokenType.CONTROL, TokenType.USER_DEFINED)
        kinds = zip(tokens, self._need("tokenizer.ggml.token_type", np.ndarray).tolist(), strict=True)
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k in special])
        return backend


def _split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows of q or k [heads * d, in] from GGUF llama's order (adjacent pairs) to half-split order."""
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
