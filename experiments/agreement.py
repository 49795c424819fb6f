"""Greedy generation with small caches against the dense one: how many texts are the same, and for how long.

    python -m experiments.agreement --config=configs/agreement.py --workdir=DIR

Appends a row per plan to DIR/agreement.jsonl.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from ml_collections import config_dict

import kvjax
from experiments import program
from kvjax.caches.plan import CachePlan, split_list


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model = kvjax.load(config.model, config.dtype)
    plans = [kvjax.plan(model, name) for name in split_list(config.caches)]
    dense = _generate(config, model, kvjax.plan(model, "dense"))
    for plan in plans:
        made = _generate(config, model, plan)
        same = [common_prefix(a, b) for a, b in zip(dense, made, strict=True)]
        whole = [n == len(a) for n, a in zip(same, dense, strict=True)]
        row = {
            "experiment": "agreement",
            "model": model.name,
            "dtype": str(model.dtype),
            "cache": str(plan),
            "prompts": len(dense),
            "max_new_tokens": config.max_new_tokens,
            "whole": sum(whole),
            "share": float(np.mean([n / len(a) for n, a in zip(same, dense, strict=True)])),
            **program.provenance(),
        }
        program.append_row(workdir / "agreement.jsonl", row)
        print(
            f"{row['cache']:<24} {row['whole']} of {row['prompts']} whole, {row['share']:.0%} of tokens", flush=True
        )


def common_prefix(a: list[int], b: list[int]) -> int:
    """Tokens until the two differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _generate(config: config_dict.ConfigDict, model: kvjax.Model, plan: CachePlan) -> list[list[int]]:
    batches = ((list(config.chats), True), (list(config.texts), False))
    return [
        tokens
        for prompts, chat in batches
        if prompts
        for tokens in kvjax.generate(model, prompts, plan, max_new_tokens=config.max_new_tokens, chat=chat).tokens
    ]


if __name__ == "__main__":
    program.run(main, "configs/agreement.py")
