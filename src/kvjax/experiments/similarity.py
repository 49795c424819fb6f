"""What XQuant rests on, on a real model: X changes little from layer to layer, and latents of keys have one outlier.

    kvjax similarity --workdir=DIR

Of each layer against the one below, as means over tokens: the cosine, and the norm of the difference over the norm
(XQuant, figure 3). Of each layer's channels: the largest mean magnitude over the median one, and which channel has it
(figures B.2 and B.3). Writes a row per layer to DIR/similarity.jsonl and draws DIR/similarity.png.

X is the layer input after the norm, X/w without the norm's weight; K and V are its projections, all heads together,
before RoPE. U_k and U_v are the bases of `x@latent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import config_dict

from kvjax import records
from kvjax.checkpoints.load import load
from kvjax.evaluate.text import read_windows
from kvjax.experiments import program, style
from kvjax.models.decoder import Weights, normed, project
from kvjax.quant.basis import svd_basis
from kvjax.tuner.simulate import Simulator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIMILAR = ("X", "X/w", "K", "V")
OUTLYING = ("X", "XU_k", "XU_v")
Row = dict[str, Any]


def main(config: config_dict.ConfigDict, workdir: Path) -> None:
    model = load(config.model, "float32")
    ids = read_windows(config.text, model, config.tokens, 1, 0)
    simulator = Simulator(model, ids)
    dense = simulator.keep(simulator.dense_plan)[0]
    rows: list[Row] = []
    below: dict[str, Array] = {}
    for i in range(model.config.layers):
        weights = model.params[f"layer_{i}"]
        here = tensors(weights, normed(weights, "attention_norm", dense.h[i][0], model.config.norm_eps))
        row = {"experiment": "similarity", **config.to_dict(), "layer": i}
        for name in SIMILAR if i else ():
            row |= {f"cosine {name}": cosine(here[name], below[name]), f"step {name}": step(here[name], below[name])}
        for name in OUTLYING:
            row[f"channel {name}"], row[f"outlier {name}"] = outlier(here[name])
        rows.append(row | records.provenance())
        below = here
    records.write_rows(workdir / "similarity.jsonl", rows)
    print(f"rows: {workdir / 'similarity.jsonl'}")
    style.write(workdir / "similarity.png", draw, rows)


def tensors(weights: Weights, x: Float[Array, "T D"]) -> dict[str, Float[Array, "T _"]]:
    """What is compared of a layer, by name."""
    latents = {f"XU_{name}": x @ jnp.asarray(svd_basis(np.asarray(weights[name]).T)[0], x.dtype) for name in "kv"}
    plain = x / weights["attention_norm"] if "attention_norm" in weights else x
    return {"X": x, "X/w": plain, "K": project(weights, "k", x), "V": project(weights, "v", x), **latents}


def cosine(here: Float[Array, "T n"], below: Float[Array, "T n"]) -> float:
    """The cosine of the angle between two layers' vectors of a token, averaged over tokens."""
    sizes = jnp.linalg.norm(here, axis=-1) * jnp.linalg.norm(below, axis=-1)
    return float(jnp.mean(jnp.sum(here * below, -1) / sizes))


def step(here: Float[Array, "T n"], below: Float[Array, "T n"]) -> float:
    """The norm of a token's difference from the layer below over that of the token, averaged over tokens."""
    return float(jnp.mean(jnp.linalg.norm(here - below, axis=-1) / jnp.linalg.norm(here, axis=-1)))


def outlier(x: Float[Array, "T n"]) -> tuple[int, float]:
    """The channel of the largest mean magnitude, and that over the median channel's."""
    sizes = np.asarray(jnp.mean(jnp.abs(x), 0))
    return int(sizes.argmax()), float(sizes.max() / np.median(sizes))


def draw(rows: Sequence[Row]) -> Figure:
    """Three panels over the layers: cosine, relative step, outliers."""
    figure, (axes,) = style.subplots(1, 3, (14, 5))
    titles = (
        "cosine with the layer below",
        "norm of the difference from the layer below,\nover the norm",
        "largest mean magnitude of a channel,\nover the median channel's",
    )
    for axis, kind, said in zip(axes, ("cosine", "step", "outlier"), titles, strict=True):
        for name, mark in zip(OUTLYING if kind == "outlier" else SIMILAR, style.MARKS, strict=False):
            found = [(row["layer"], row[f"{kind} {name}"]) for row in rows if f"{kind} {name}" in row]
            axis.plot(*zip(*found, strict=True), f"{mark}-", ms=3.5, lw=1.2, label=_label(rows, kind, name))
        axis.set(xlabel="layer")
        axis.set_title(said, fontsize=style.TITLE)
        axis.legend(fontsize=style.SMALL, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    axes[2].set_yscale("log")
    style.title(figure, "{model}, {tokens} tokens of {text}; means over tokens".format(**rows[0]))
    return figure


def _label(rows: Sequence[Row], kind: str, name: str) -> str:
    """A line's name; of outliers, also how often channel 0 has it."""
    if kind == "outlier":
        return f"{name}: channel 0 in {sum(row[f'channel {name}'] == 0 for row in rows)} of {len(rows)} layers"
    return "X, the norm's weight left out" if name == "X/w" else name


if __name__ == "__main__":
    program.run(main, "configs/similarity.py")
