"""Greedy generation with small caches against the dense one: how many texts are the same, and for how long.

    kvjax agreement --workdir=DIR

Appends a row per plan to DIR/agreement.jsonl, what is there already left out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from ml_collections import config_dict

import kvjax
from kvjax import records
from kvjax.caches.grammar import split_list
from kvjax.caches.plan import CachePlan
from kvjax.evaluate.tasks import agreement
from kvjax.experiments import program


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    model = kvjax.load(config.model, config.dtype)
    plans = [kvjax.plan(model, name) for name in split_list(config.caches)]
    results = workdir / "agreement.jsonl"
    dense = None
    for plan in plans:
        point = {
            "experiment": "agreement",
            "model": config.model,
            "dtype": config.dtype,
            "cache": str(plan),
            "prompts": len(config.chats) + len(config.texts),
            "max_new_tokens": config.max_new_tokens,
        }
        row = records.find_row(results, point)
        if row is None:
            dense = dense or _generate(config, model, kvjax.plan(model, "dense"))
            row = point | dataclasses.asdict(agreement(dense, _generate(config, model, plan))) | records.provenance()
            records.append_row(results, row)
        print(
            f"{row['cache']:<24} {row['whole']} of {row['prompts']} whole, {row['share']:.0%} of tokens", flush=True
        )


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
