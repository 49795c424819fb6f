"""Makes the goldens of the zoo's gemma3-270m: what HF transformers and SentencePiece make of its GGUF file.

Needs torch, transformers, accelerate, gguf, sentencepiece and protobuf (not installed with kvjax). From the root
of the repository:

    python -m tests.goldens.make_gemma_goldens --gguf gemma-3-270m-q4_k_m.gguf --text demo.txt

writes gemma3-270m.npz: bos and the demo text, 640 tokens, which is more than a window, with float32 eager logits
at 20 positions on 512 fixed vocabulary columns, the largest |logit| at these positions and the argmax at all; and
SentencePiece's ids of tricky texts. gemma3-270m-generation.json holds what HF's greedy generation makes of ten
prompts, and by how much the best logit led at least.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from gguf import GGUFReader, TokenType
from sentencepiece import sentencepiece_model_pb2 as proto
from tests.goldens.make_goldens import HERE, TRICKY, load_hf

from kvjax.configs.agreement import TEXTS

TOKENS = 640
NEW_TOKENS = 48
# Runs of blanks, tabs and line ends, and tags, are tokens of their own.
SPACED = (
    "a  b   c" + 40 * " " + "d\t\t\te\n\n\n\nf \n g<b>bold</b><table> < b > <start_of_turn>user\nhi<end_of_turn>\n"
)
RARE = "".join(
    map(chr, (*range(0x2B0, 0x300, 7), *range(0x10900, 0x10A00, 31), *range(0x1F900, 0x1FA00, 17), 1, 127))
)


def read_tokenizer(gguf: Path) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own model of the file's vocabulary."""
    fields = GGUFReader(gguf).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    bos, unknown = (fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "unknown"))
    model.trainer_spec.bos_id, model.trainer_spec.bos_piece = bos, tokens[bos]
    model.trainer_spec.unk_id, model.trainer_spec.unk_piece = unknown, tokens[unknown]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    for i, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        # Control tokens are matched in texts here as in kvjax.
        whole = kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and i != bos
        kind = TokenType.UNKNOWN if i == unknown else TokenType.USER_DEFINED if whole else kind
        model.pieces.add(piece=token.replace(" ", "▁"), score=score, type=int(kind))
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def make_logits(model: torch.nn.Module, ids: list[int]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    positions = np.arange(31, TOKENS, 32, dtype=np.int32)
    columns = np.sort(np.random.default_rng(0).choice(logits.shape[1], 512, replace=False)).astype(np.int32)
    return {
        "tokens": np.array([ids], np.int32),
        "positions": positions,
        "columns": columns,
        "logits": logits[positions][:, columns],
        "max_abs": np.abs(logits[positions]).max(),
        "argmax": logits.argmax(-1).astype(np.int32),
    }


def generate(model: torch.nn.Module, text: str, ids: list[int]) -> dict[str, object]:
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits).topk(2).values
    lead = round(float((best[..., 0] - best[..., 1]).min()), 5)
    return {"prompt": text, "ids": ids, "new": out.sequences[0, len(ids) :].tolist(), "lead": lead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="gemma-3-270m-q4_k_m.gguf")
    parser.add_argument("--text", type=Path, required=True, help="the demo text as one file")
    args = parser.parse_args()
    tokenizer = read_tokenizer(args.gguf)
    bos = tokenizer.bos_id()
    model = load_hf(args.gguf.parent, gguf_file=args.gguf.name)
    demo = tokenizer.encode(args.text.read_text(encoding="utf-8")[:8000])
    tricky = [TRICKY, SPACED, RARE]
    np.savez_compressed(
        HERE / "gemma3-270m.npz",
        **make_logits(model, [bos, *demo][:TOKENS]),
        tricky=json.dumps(tricky),
        tricky_ids=json.dumps([tokenizer.encode(text) for text in tricky]),
    )
    rows = [generate(model, text, [bos, *tokenizer.encode(text)]) for text in TEXTS]
    lines = ",\n".join(map(json.dumps, rows))
    (HERE / "gemma3-270m-generation.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
