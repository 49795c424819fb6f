"""Makes harness.json: what lm-evaluation-harness says of a tiny model through its own HF backend, in float32.

Needs torch, transformers, accelerate, peft and lm-eval. From the root of the repository:

    python -m tests.goldens.make_harness_goldens

The tasks are those of tests/evaluate/harness. Half of the answers that the task `writing` expects are what the model
writes, so that its figures are neither 0 nor 1; this writes them too.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TASKS = HERE.parent / "evaluate/harness"
MODEL = "llama-linear"
QUESTIONS = ("Write a line.", "Count to three:", "Who is there?", "x = 1; y =", "Once upon", "The end of the road")
STOPS = {"until": ["e", "##"], "max_gen_toks": 24, "do_sample": False}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "user", "content": "Name a fruit. "}, {"role": "assistant", "content": " A pear is "}]


def backend() -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(HERE / MODEL, dtype=torch.float32, attn_implementation="eager")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(HERE / MODEL / "tokenizer.json"), **special)
    tokenizer.chat_template = TEMPLATE
    return HFLM(model, tokenizer=tokenizer, batch_size=1, device="cpu")


def write_answers(lm: HFLM) -> None:
    asked = [SimpleNamespace(args=(question, STOPS)) for question in QUESTIONS]
    texts = lm.generate_until(asked, disable_tqdm=True)
    rows = [
        {"question": question, "answer": text if i % 2 else "a pear"}
        for i, (question, text) in enumerate(zip(QUESTIONS, texts, strict=True))
    ]
    (TASKS / "writing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    lm = backend()
    write_answers(lm)
    names = [file.stem for file in sorted(TASKS.glob("*.yaml"))]
    found: Any = simple_evaluate(lm, tasks=[str(TASKS / f"{name}.yaml") for name in names], bootstrap_iters=0)
    results = {
        name: {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
        for name, values in found["results"].items()
    }
    answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    chats = [lm.apply_chat_template(CHAT[:1]), lm.apply_chat_template(CHAT, add_generation_prompt=False)]
    (HERE / "harness.json").write_text(
        json.dumps({"template": TEMPLATE, "chat": CHAT, "chats": chats, "results": results, "answers": answers})
    )


if __name__ == "__main__":
    main()
