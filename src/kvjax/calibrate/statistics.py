"""Statistics of a model's activations and gradients on a calibration text, gathered once and kept on disk.

The windows go up through the model layer by layer, then their gradients come down. Between two layers only what one
hands to the next is in memory. Layer inputs wait on disk for the way down, all of them at once: as many bytes as
windows, tokens, layers and model_dim have, removed at the end. A run that was cut off goes on at its last layer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax import hosts
from kvjax.caches.base import Chunk
from kvjax.caches.statistics import PREDICTED_BITS, Statistics
from kvjax.calibrate import predictors
from kvjax.calibrate.fisher import pull_head
from kvjax.calibrate.ranges import ranges_of
from kvjax.downloads import cache_folder
from kvjax.errors import KvjaxError
from kvjax.files import check_digests, digests, locked, read_json, write_json
from kvjax.mesh import fetch
from kvjax.models.calibration import Calibration
from kvjax.models.decoder import embed, first_alike, kv_weights, project_kv, run_layer
from kvjax.models.model import Model
from kvjax.ops import attention
from kvjax.ops.rotate import rotate_heads
from kvjax.quant.codebook import BINS
from kvjax.records import load_arrays, save_arrays

SAMPLES = 2  # draws of every token's prediction
SKIPPED = 4  # tokens of each window that do not count: the first are unlike all others, and sinks keep them exact
BASE = 2  # up to this layer, as in XQuant-CL by default, what is recalled starts anew
METADATA = "statistics.json"
Sums = dict[str, Any]


def calibrated(model: Model, text: str, windows: Int[np.ndarray, "w n"]) -> Model:
    """The model with what its methods may learn from a text, gathered where it is not on disk yet.

    Args:
      model: the model. Statistics belong to its weights: one that is trained further is calibrated again.
      text: the name of the text.
      windows: its token ids.

    Raises:
      KvjaxError: the model has learned sinks, the windows are too short or too long, or the files are damaged or
        cannot be written.
    """
    _check(model, windows)
    digest = _digest(model, windows)
    found = Calibration(text, windows, digest)
    folder = folder_of(digest)
    hosts.on_first(lambda: _make(folder))
    with locked(folder / "lock"):
        if not hosts.on_first(lambda: _found(folder, digest)):
            print(f"kvjax: statistics of {windows.size} tokens of {text}, once, for {folder}", file=sys.stderr)
            with model.layout.entered():
                _gather(model, windows, _Folder(folder))
            what = {"digest": digest, **found.identity}
            hosts.on_first(lambda: write_json(folder / METADATA, what | {"arrays": digests(folder / "arrays")}))
            hosts.on_first(lambda: shutil.rmtree(folder / "waiting", ignore_errors=True))
    return dataclasses.replace(model, calibration=found)


def load_statistics(digest: str, layer: int) -> Statistics:
    """The statistics of one layer of a calibrated model."""
    folder = folder_of(digest) / "arrays"
    arrays = load_arrays(folder / f"{layer}-up.npz") | load_arrays(folder / f"{layer}-down.npz")
    return Statistics(**arrays)


def folder_of(digest: str) -> Path:
    """Where the statistics of a `Calibration` are kept."""
    return cache_folder() / "calibration" / digest[:16]


def _check(model: Model, windows: Int[np.ndarray, "w n"]) -> None:
    most = model.config.max_positions
    if not 2 * SKIPPED <= windows.shape[1] <= most:
        raise KvjaxError(
            f"calibration windows of {windows.shape[1]} tokens; expected {2 * SKIPPED} to {most}, the model's most"
        )
    if model.config.learned_sinks:
        raise KvjaxError(f"{model.name} has learned sinks; expected a model without them to calibrate")


def _digest(model: Model, windows: Int[np.ndarray, "w n"]) -> str:
    digest = hashlib.sha256(f"{windows.shape} {SAMPLES} {SKIPPED} {BASE} {BINS} {PREDICTED_BITS}".encode())
    for leaf in jax.tree.leaves(model.params):
        digest.update(fetch(leaf).tobytes())
    digest.update(windows.astype(np.int32).tobytes())
    return digest.hexdigest()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvjaxError(f"{folder} cannot be written: {error.strerror}") from None


def _found(folder: Path, digest: str) -> bool:
    if not (folder / METADATA).exists():
        return False
    metadata = read_json(folder / METADATA)
    if metadata.get("digest") != digest:
        raise KvjaxError(f"{folder} holds statistics of other weights or tokens; expected {digest}: remove it")
    check_digests(folder / "arrays", metadata.get("arrays"))
    return True


# ---- all layers


@dataclasses.dataclass(frozen=True)
class _Folder:
    """What is gathered: arrays/LAYER-up.npz and LAYER-down.npz; waiting/ holds what one layer hands to the next."""

    path: Path

    def keep(self, layer: int, way: str, sums: Sums) -> None:
        hosts.on_first(lambda: save_arrays(self.path / "arrays" / f"{layer}-{way}.npz", sums))

    def hand_on(self, what: str, layer: int, rows: list[np.ndarray]) -> None:
        """To `layer`; an array a window."""
        wide = {str(w): each.astype(np.promote_types(each.dtype, np.float32)) for w, each in enumerate(rows)}
        hosts.on_first(lambda: save_arrays(self._file(what, layer), wide))  # numpy's files know no bfloat16

    def take(self, what: str, layer: int) -> list[np.ndarray]:
        arrays = hosts.on_first(lambda: load_arrays(self._file(what, layer)))
        return [arrays[str(w)] for w in range(len(arrays))]

    def drop(self, what: str, layer: int) -> None:
        hosts.on_first(lambda: self._file(what, layer).unlink(missing_ok=True))

    def waiting(self, what: str, layers: int) -> list[int]:
        """The layers that something waits for."""
        return hosts.on_first(lambda: [i for i in range(layers + 1) if self._file(what, i).exists()])

    def _file(self, what: str, layer: int) -> Path:
        return self.path / "waiting" / f"{what}-{layer}.npz"


def _gather(model: Model, windows: Int[np.ndarray, "w n"], folder: _Folder) -> None:
    layers = model.config.layers
    if not folder.waiting("gradient", layers):
        _go_up(model, windows, folder)
        folder.hand_on("gradient", layers, _heads(model, folder.take("input", layers)))
    start = min(folder.waiting("gradient", layers))
    g = folder.take("gradient", start)
    for i in reversed(range(start)):
        sums, g = _down(model, i, folder.take("input", i), g)
        folder.keep(i, "down", sums)
        folder.hand_on("gradient", i, g)
        folder.drop("gradient", i + 1)
        folder.drop("input", i + 1)


def _go_up(model: Model, windows: Int[np.ndarray, "w n"], folder: _Folder) -> None:
    layers = model.config.layers
    if started := folder.waiting("recalled", layers):
        h, recalled, read = (folder.take(what, started[-1]) for what in ("input", "recalled", "read"))
    else:
        h, read = _embedded(model, windows), []
        recalled = [np.zeros((2, *rows.shape[1:]), rows.dtype) for rows in h]
        folder.hand_on("input", 0, h)
    for i in range(started[-1] if started else 0, layers):
        sums, h, recalled, read = _up(model, i, h, recalled, read)
        folder.keep(i, "up", sums)
        for what, rows in (("input", h), ("read", read), ("recalled", recalled)):  # the last says that all are there
            folder.hand_on(what, i + 1, rows)
        for what in ("recalled", "read"):
            folder.drop(what, i)


# ---- one layer


def _embedded(model: Model, windows: Int[np.ndarray, "w n"]) -> list[np.ndarray]:
    table = model.params["embed"]
    return [fetch(embed(model.config, table, jnp.asarray(window[None], jnp.int32))) for window in windows]


def _up(
    model: Model, layer: int, h: list[np.ndarray], recalled: list[np.ndarray], read: list[np.ndarray]
) -> tuple[Sums, list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The statistics of a layer's activations, its outputs, what its latents recall of its input, what is read."""
    config, params = model.config, model.params[f"layer_{layer}"]
    units = [fetch(_unit(config, params, _cast(model, rows)))[0] for rows in h]
    gains = np.stack([np.ones(config.model_dim), _gain(units, recalled)])
    seen = _seen(params, model.config.model_dim)
    learned = gains.astype(np.float32), seen, layer > BASE
    found = [_recall(*pair, *learned) for pair in zip(units, recalled, strict=True)]
    outputs = [_observe(config, first_alike(model.config, layer), params, _cast(model, rows)) for rows in h]
    delta, gained = _mean([moments for _, moments in found])
    fitted, read = _predictors([fetch(rows) for *_, rows in outputs], read)
    fitted |= {"gain": gains[1], "delta": delta, "gained_delta": gained}
    sums = _mean([own for _, own, _ in outputs]) | fitted
    return sums, [fetch(out) for out, *_ in outputs], [fetch(each) for each, _ in found], read


def _predictors(rows: list[np.ndarray], below: list[np.ndarray]) -> tuple[Sums, list[np.ndarray]]:
    """What predicts a layer's keys and values, and what is read of them, of each window; nothing below the first."""
    k, v = np.split(np.concatenate(rows), 2, 1)
    if below:
        of_keys, of_values, read = predictors.fit(k, v, np.concatenate(below, 1))
    else:
        kinds, width = len(PREDICTED_BITS), k.shape[1]
        of_keys, of_values = (np.zeros((kinds, count * width + 1, width)) for count in (1, 2))
        read = predictors.first_read(jnp.asarray(k), jnp.asarray(v))
    learned = {"key_predictor": fetch(of_keys), "value_predictor": fetch(of_values)}
    return learned, np.split(fetch(read), len(rows), 1)


def _gain(units: list[np.ndarray], recalled: list[np.ndarray]) -> Float[np.ndarray, "D"]:
    """What times the recalled input of the layer below comes nearest to the layer's own, by least squares."""
    rows = [(_counted(u), _counted(below[1])) for u, below in zip(units, recalled, strict=True)]
    products, squares = (np.sum([(a * b).sum(0) for a, b in each], 0) for each in (rows, [(b, b) for _, b in rows]))
    return products / np.maximum(squares, np.finfo(np.float64).tiny)


@functools.partial(jax.jit, static_argnames="config")
def _unit(config, params, h):
    unit = kv_weights(config, params).normalize(h)
    return unit.astype(jnp.promote_types(h.dtype, jnp.float32))


def _seen(params: Any, dim: int) -> Float[np.ndarray, "D r"]:
    """An orthonormal basis of all that the layer's keys and values see of u."""
    norm = fetch(params["attention_norm"]).astype(np.float64) if "attention_norm" in params else np.ones(dim)
    weights = [norm[:, None] * fetch(params[name]).T.astype(np.float64) for name in "kv"]
    return np.linalg.qr(np.concatenate(weights, 1))[0].astype(np.float32)


@jax.jit
@jax.default_matmul_precision("highest")
def _recall(unit, below, gains, seen, closed):
    """What latents give back of a layer's input, [2, N, D], and the second moments of its deltas.

    What the layers below recall counts towards it where `closed`.
    """
    predicted = gains[:, None] * below
    known = jnp.where(closed, predicted, 0)
    recalled = known + ((unit - known) @ seen) @ seen.T
    return recalled, jax.vmap(lambda rows: moments(_counted(rows)))(unit - predicted)


def _heads(model: Model, h: list[np.ndarray]) -> list[np.ndarray]:
    """The gradients [S, 1, N, D] of every window with respect to the last layer's output."""
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), w), SAMPLES) for w in range(len(h))]
    args = model.config, model.head, model.params["norm"]
    return [fetch(pull_head(*args, _cast(model, rows), key)) for rows, key in zip(h, keys, strict=True)]


def _down(model: Model, layer: int, h: list[np.ndarray], g: list[np.ndarray]) -> tuple[Sums, list[np.ndarray]]:
    """The statistics of a layer's gradients, and those with respect to its input."""
    args = model.config, first_alike(model.config, layer), model.params[f"layer_{layer}"]
    pulled = [_pull(*args, _cast(model, rows), _cast(model, own)) for rows, own in zip(h, g, strict=True)]
    rows = (
        np.concatenate([fetch(each) for each in parts]) for parts in zip(*(rows for *_, rows in pulled), strict=True)
    )
    sums = _mean([sums for _, sums, _ in pulled]) | ranges_of(*rows)
    return sums, [fetch(below) for below, *_ in pulled]


def _cast(model: Model, a: np.ndarray) -> Array:
    return jnp.asarray(a, model.dtype)


def _mean(sums: list[Sums]) -> Sums:
    """The mean over windows, which have equally many tokens, in float64."""
    return jax.tree.map(lambda *a: np.mean([fetch(each).astype(np.float64) for each in a], 0), *sums)


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _observe(config, layer, params, h):
    out, _, found = run_layer(config, layer, params, h, (), _Seen(), ())
    return out, *found


@struct.dataclass
class _Seen:
    """A cache with exact attention. Its carry is the means over a window's tokens, and their keys and values."""

    def attend(self, chunk: Chunk, carry: Any):
        k, v = rotate_heads(chunk.k, chunk.rotation), chunk.v
        output = attention.attend_streamed(chunk.q, (k, v, chunk.positions), (k, v), 0, chunk.window)
        unit = chunk.weights.normalize(chunk.h)
        unit, q, bare, k, v = (_counted(each[0]) for each in (unit, chunk.q, chunk.k, k, v))
        rows = jnp.concatenate([bare, v], 1).reshape(len(v), -1)
        return output, self, (_means(unit, q, bare, k, v), rows)


def _counted(rows: Any) -> Any:
    """The rows [n, ...] of [N, ...] that count, in float32 or wider."""
    return rows[SKIPPED:].astype(np.promote_types(rows.dtype, np.float32))


@jax.default_matmul_precision("highest")
def _means(
    unit: Float[Array, "n D"],
    q: Float[Array, "n H d"],
    k: Float[Array, "n K d"],
    turned: Float[Array, "n K d"],
    v: Float[Array, "n K d"],
) -> Sums:
    """The `Statistics` of activations."""
    queries = moments(q.reshape(len(q), k.shape[1], -1, q.shape[2]).swapaxes(1, 2).reshape(-1, *k.shape[1:]))
    seen = jnp.einsum("nkd,kde,nke->nk", turned, queries, turned)
    return {
        "unit_mean": unit.mean(0),
        "unit": moments(unit),
        "query": queries,
        "key_mean": k.mean(0),
        "key": moments(k),
        "turned_mean": turned.mean(0),
        "turned": moments(turned),
        "value_mean": v.mean(0),
        "value": moments(v),
        "seen_value": moments(v * jnp.sqrt(seen / seen.mean(0))[..., None]),
    }


def moments(rows: Float[Array, "n ... d"]) -> Float[Array, "... d d"]:
    """The mean of x^T x."""
    return jnp.einsum("n...d,n...e->...de", rows, rows) / len(rows)


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _pull(config, layer, params, h, g):
    weights = kv_weights(config, params)
    size, heads = weights.k.shape[0], (config.kv_heads, config.head_dim)
    zeros = [jnp.zeros((*h.shape[:2], *shape), h.dtype) for shape in ((size,), (size,), heads, heads)]

    def forward(h, *by):
        out, _, kv = run_layer(config, layer, params, h, (), _Moved(*by), ())
        return out, kv

    _, pull, kv = jax.vjp(forward, h, *zeros, has_aux=True)
    below, *moved = jax.vmap(pull)(g)
    k, v, bare, turned = (jax.vmap(_counted)(each[:, 0]) for each in moved)
    keys, values = (_counted(each[0]) for each in kv)
    costs = ((each**2).mean(0).reshape(keys.shape) for each in (bare, v))
    k, v, turned = (each.reshape(-1, *each.shape[2:]) for each in (k, v, turned))
    with jax.default_matmul_precision("highest"):
        sums = {"gradient": moments(jnp.concatenate([k, v], 1)), "turned_gradient": moments(turned)}
        return below, sums, (keys, values, *costs)


@struct.dataclass
class _Moved:
    """A cache with exact attention over keys and values that are moved, so that gradients exist.

    Its carry is keys before RoPE and values. It does not use `attend_streamed`, which has no gradient.
    """

    key: Float[Array, "1 N Kd"]  # added to x W_k
    value: Float[Array, "1 N Kd"]  # added to x W_v
    bare: Float[Array, "1 N K d"]  # added to keys before RoPE, after qk-norm
    turned: Float[Array, "1 N K d"]  # added to keys after RoPE

    def attend(self, chunk: Chunk, carry: Any):
        own, window = chunk.weights, chunk.window
        k_bias, v_bias = (0 if bias is None else bias for bias in (own.k_bias, own.v_bias))
        moved = dataclasses.replace(own, k_bias=self.key + k_bias, v_bias=self.value + v_bias)
        k, v = project_kv(chunk.x, moved, chunk.k.shape[2])
        k, kv = rotate_heads(k + self.bare, chunk.rotation) + self.turned, (k, v)
        reach = None if window is None else (window - 1, 0)
        output = jax.nn.dot_product_attention(chunk.q, k, v, is_causal=True, local_window_size=reach)
        return output, self, kv
