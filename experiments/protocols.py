"""How far `streaming` is from token-by-token `decode`, per token, on a ragged batch of a real model.

    python -m experiments.protocols --config=configs/protocols.py --workdir=DIR

In float64 the two are the same computation; in float32 rounding flips cascade. Appends rows to DIR/protocols.jsonl.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from experiments import program
from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan, split_list
from kvjax.errors import KvjaxError
from kvjax.evaluate.perplexity import cut_windows, hidden_states
from kvjax.evaluate.text import load_text
from kvjax.load import load
from kvjax.models.decoder import Decoder


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    jax.config.update("jax_enable_x64", True)
    lengths = np.asarray([int(part) for part in config.lengths.split(",")])
    if lengths.min() < 2:
        raise KvjaxError(f"lengths={config.lengths}: expected at least 2 tokens a sequence")
    for dtype in ("float64", "float32"):
        model = load(config.model, dtype)
        ids = model.tokenizer.encode(load_text(config.text))
        tokens = jnp.asarray(cut_windows(ids, int(lengths.max()), len(lengths)), jnp.int32)
        decoder, shape = (
            Decoder(model.config),
            CacheShape.of(model.config, len(lengths), int(lengths.max()), jnp.dtype(dtype)),
        )
        for name in split_list(config.caches):
            plan = CachePlan.parse(name, model.config.layers)

            def nll(params, chunk, plan=plan, tokens=tokens, decoder=decoder, shape=shape):
                cache = plan.init(shape)
                hidden = hidden_states(decoder, params, tokens, cache, chunk, "exact", jnp.asarray(lengths))
                logits = jnp.asarray(decoder.apply({"params": params}, hidden[:, :-1], method="logits"))
                picked = jnp.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0]
                return jax.nn.logsumexp(logits, -1) - picked

            run = jax.jit(nll, static_argnums=1)
            real = np.arange(1, lengths.max()) < lengths[:, None]
            streaming, decode = (np.asarray(run(model.params, c))[real] for c in (plan.stream_chunk, 1))
            row = {
                "experiment": "protocols",
                "model": config.model,
                "dtype": dtype,
                "lengths": lengths.tolist(),
                "cache": str(plan),
                "max_difference": float(np.abs(streaming - decode).max()),
                "mean_nll_difference": float(streaming.mean() - decode.mean()),
            } | program.provenance()
            program.append_row(workdir / "protocols.jsonl", row)
            print(
                f"{dtype} {row['cache']:60s} max {row['max_difference']:.1e} mean {row['mean_nll_difference']:+.1e}"
            )


if __name__ == "__main__":
    program.run(main, "configs/protocols.py")
