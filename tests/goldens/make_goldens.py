"""Makes the committed goldens: tiny random models of every family and what HF transformers computes for them.

Needs torch, transformers, accelerate and gguf (not installed with kvjax). From the root of the repository:

    python -m tests.goldens.make_goldens
    python -m tests.goldens.make_goldens --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text demo.txt
    python -m tests.goldens.make_goldens --gguf SmolLM2-135M-Instruct.Q4_1.gguf --generate

The first writes one HF folder per tiny model (config.json, safetensors, a tokenizer.json of single
characters) with logits.npz: tokens [1, T] and the float32 eager logits [1, T, V]. The second writes
smollm2-135m.npz, for the GGUF of the zoo's smollm2-135m and the demo text: the text's first 256 tokens,
logits at 16 positions on 512 fixed vocabulary columns, the largest |logit| at these positions, the argmax at
all 256, and the ids of a tricky text. The third writes smollm2-135m-generation.json: what HF's greedy
generation makes of twenty prompts, half of them in the model's chat template.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvjax.configs.agreement import CHATS, TEXTS

HERE = Path(__file__).parent
TOKENS = 48
COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama-linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "head_dim": 24},
    ),
    "llama-llama3": (
        transformers.LlamaConfig,
        {"rope_parameters": LLAMA3, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 12, "num_hidden_layers": 3}),
    "qwen2-tied": (
        transformers.Qwen2Config,
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 1}),
}
# Digits, scripts, joined emoji, odd spaces, code, special tokens: where tokenizers go wrong.
TRICKY = (
    "In 1984, 3.14159e-10 * 0x1F == 12345; naïve café, ½ ２３ ١٢٣ 你好，世界 "
    "🙂👩\u200d👩\u200d👧 x²+y³ e\u0301 \u00a0\t\r\n\n   \n"
    "def f(x_1: int = 42) -> str:\n    return f'{x_1:08b}'  # don't I'LL\n"
    "<|im_start|>user\nhi<|im_end|> <reponame>"
)
NEW_TOKENS = 64
SHARDED = "qwen3"
STORED = {"llama-linear": torch.float16, "mistral-window": torch.bfloat16}  # the others in float32


def tiny_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """A random model in which every parameter matters: biases and norm weights are not left at 0 and 1."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


def tiny_tokenizer() -> Tokenizer:
    """Single characters: three special tokens, then newline, tab and printable ASCII, 100 ids in all."""
    symbols = ["<unk>", "<s>", "</s>", "\n", "\t", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def load_hf(folder: Path, **options: str) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )


def make_tiny(name: str) -> None:
    config_class, options = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    model = tiny_model(config_class(**COMMON | options)).to(STORED.get(name, torch.float32))
    folder = HERE / name
    model.save_pretrained(folder, max_shard_size="100KB" if name == SHARDED else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tokens = torch.randint(3, COMMON["vocab_size"], (1, TOKENS))
    model = load_hf(folder)  # from what was stored: `.to(dtype)` also rounds the rope's frequencies
    with torch.no_grad():
        logits = model(tokens).logits
    np.savez_compressed(folder / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


def load_tokenizer(gguf: Path) -> transformers.PreTrainedTokenizerFast:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers' GGUF conversion forgets that this model splits digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def make_generation(gguf: Path) -> None:
    tokenizer = load_tokenizer(gguf)
    model = load_hf(gguf.parent, gguf_file=gguf.name)
    stop = tokenizer.eos_token_id
    prompts = [(text, [{"role": "user", "content": text}]) for text in CHATS] + [(text, None) for text in TEXTS]
    rows = []
    for text, messages in prompts:
        whole = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) if messages else text
        )
        ids = tokenizer.backend_tokenizer.encode(whole, add_special_tokens=False).ids
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop,
            )
        rows.append({"prompt": text, "chat": messages is not None, "ids": ids, "new": out[0, len(ids) :].tolist()})
    lines = ",\n".join(map(json.dumps, rows))
    (HERE / "smollm2-135m-generation.json").write_text(f"[\n{lines}\n]\n")


def make_smollm2(gguf: Path, text: Path) -> None:
    tokenizer = load_tokenizer(gguf).backend_tokenizer

    def encode(words: str) -> list[int]:
        return tokenizer.encode(words, add_special_tokens=False).ids

    ids = encode(text.read_bytes().decode())[:256]
    model = load_hf(gguf.parent, gguf_file=gguf.name)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    positions = np.arange(15, 256, 16, dtype=np.int32)
    columns = np.sort(np.random.default_rng(0).choice(logits.shape[1], 512, replace=False)).astype(np.int32)
    np.savez_compressed(
        HERE / "smollm2-135m.npz",
        tokens=np.array([ids], np.int32),
        positions=positions,
        columns=columns,
        logits=logits[positions][:, columns],
        max_abs=np.abs(logits[positions]).max(),
        argmax=logits.argmax(-1).astype(np.int32),
        tricky=TRICKY,
        tricky_ids=np.array(encode(TRICKY), np.int32),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path, help="the demo text as one file")
    parser.add_argument("--generate", action="store_true", help="the golden of generation, with --gguf")
    args = parser.parse_args()
    if args.generate:
        make_generation(args.gguf)
    elif args.gguf:
        make_smollm2(args.gguf, args.text)
    else:
        for name in MODELS:
            make_tiny(name)


if __name__ == "__main__":
    main()
