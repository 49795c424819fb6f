"""The error of XQuant-CL's reconstruction by depth, on the layer inputs of a real model (XQuant, section 3.2).

    kvjax closed_loop --workdir=DIR

Closed: deltas against the reconstruction, as `xcl` stores them. Open: deltas between exact neighbours, as the paper
warns against. Writes one row per layer to DIR/closed_loop.jsonl and draws DIR/closed_loop.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import config_dict

from kvjax import records
from kvjax.caches.base import CacheShape
from kvjax.caches.plan import CachePlan
from kvjax.caches.registry import parse_spec
from kvjax.checkpoints.load import load
from kvjax.evaluate.perplexity import cut_windows
from kvjax.evaluate.text import load_text
from kvjax.experiments import program, style
from kvjax.models.decoder import Decoder, normed
from kvjax.models.model import Model
from kvjax.quant import affine

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    model = load(config.model, "float32")
    ids = cut_windows(model.tokenizer.encode(load_text(config.text)), config.tokens, 1)
    x = layer_inputs(model, jnp.asarray(ids, jnp.int32))
    group = parse_spec("x4@input").resolve(model.config).token_group  # type: ignore[attr-defined]

    def stored(x: Array, bits: int) -> Array:
        return affine.dequantize(affine.quantize(x, bits, -1, group), -1, group, x.dtype)

    rows, closed, opened = [], jnp.zeros_like(x[0]), jnp.zeros_like(x[0])
    for i, here in enumerate(x):
        if i <= config.base:
            closed = opened = stored(here, config.base_bits)
        else:
            closed = closed + stored(here - closed, config.bits)
            opened = opened + stored(here - x[i - 1], config.bits)
        norm = float(jnp.linalg.norm(here))
        errors = {name: float(jnp.linalg.norm(a - here)) / norm for name, a in (("closed", closed), ("open", opened))}
        rows.append({"experiment": "closed_loop", **config.to_dict(), "layer": i, **errors, **records.provenance()})
    (workdir / "closed_loop.jsonl").unlink(missing_ok=True)
    records.append_rows(workdir / "closed_loop.jsonl", rows)
    print(f"rows: {workdir / 'closed_loop.jsonl'}")
    style.write(workdir / "closed_loop.png", draw, rows)


def layer_inputs(model: Model, tokens: Array) -> list[Float[Array, "T D"]]:
    """X of every layer: what its attention norm, where it has one, gives for the tokens [1, T]."""
    config = model.config
    shape = CacheShape.of(config, 1, tokens.shape[1], model.dtype)
    cache = CachePlan.parse("dense", config).init(shape)
    run = jax.jit(lambda params: Decoder(config).apply({"params": params}, tokens, cache, mutable=["hidden"])[1])
    hidden = run(model.params)["hidden"]["h"][:-1]
    layers = [model.params[f"layer_{i}"] for i in range(config.layers)]
    return [normed(w, "attention_norm", h, config.norm_eps)[0] for w, h in zip(layers, hidden, strict=True)]


def draw(rows: list[dict]) -> Figure:
    """Relative error by layer, one line a loop."""
    figure, ((axis,),) = style.subplots()
    for loop, mark in (("closed", "o"), ("open", "s")):
        axis.plot([row["layer"] for row in rows], [row[loop] for row in rows], f"{mark}-", ms=4, label=f"{loop} loop")
    axis.set(xlabel="layer", ylabel="relative error of the reconstructed layer input", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(which="minor", labelsize=style.SMALL)
    said = "{model}, {tokens} tokens of {text}: deltas of {bits} bits above layer {base}, {base_bits} bits up to it"
    style.title(figure, said.format(**rows[0]))
    style.legend(figure, axis)
    return figure


if __name__ == "__main__":
    program.run(main, "configs/closed_loop.py")
