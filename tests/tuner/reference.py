"""A tiny model, and a decoder and a quantiser in plain numpy, float64, to hold the tuner against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.model import Model
from kvjax.models.params import param_shapes
from kvjax.models.tokenizer import ByteTokenizer

CONFIG = ModelConfig(
    *("qwen3", 30, 32, 40, 3, 4, 2, 8, 64),
    rope=RopeConfig(theta=100.0),
    qkv_bias=True,
    qk_norm=True,
    window=18,
    full_layers=(0,),
)


def random_model() -> Model:
    """CONFIG's, with predictions that are neither flat nor certain."""
    rng, flat = np.random.default_rng(0), {}
    for path, shape in param_shapes(CONFIG).items():
        x = rng.standard_normal(shape)
        if path[-1].endswith("norm"):
            x = 1 + 0.2 * x
        elif path[-1] != "embed":
            x *= 0.3 if len(shape) == 1 else shape[1] ** -0.5
        flat[path] = jnp.asarray(x)
    return Model("tiny", CONFIG, unflatten_dict(flat), ByteTokenizer(), jnp.dtype("float64"), "")


# ---- the decoder


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one layer's attention sees: its normalised input [N, D], q [N, H, d], k before RoPE and v [N, K, d]."""

    params: dict[str, np.ndarray]
    x: np.ndarray
    q: np.ndarray  # after RoPE
    raw: np.ndarray
    v: np.ndarray
    window: int

    @property
    def k(self) -> np.ndarray:
        return rotated(self.raw)

    def kv(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys before RoPE and values of normalised inputs."""
        p = self.params
        k, v = (
            (x @ p[name].T + p[f"{name}_bias"]).reshape(len(x), CONFIG.kv_heads, CONFIG.head_dim) for name in "kv"
        )
        return normed(k, p["k_norm"]), v


Hook = Callable[[int, Seen, np.ndarray], np.ndarray]


def forward(model: Model, tokens: np.ndarray, hook: Hook | None = None) -> tuple[list[Seen], np.ndarray]:
    """What every layer sees, and log-probabilities [N, V]; `hook` may change a layer's attention output [N, H, d]."""
    params = {name: np.asarray(a) if name in ("embed", "norm", "head") else a for name, a in model.params.items()}
    h, layers = params["embed"][tokens], []
    for i in range(CONFIG.layers):
        p = {name: np.asarray(a) for name, a in params[f"layer_{i}"].items()}
        x = normed(h, p["attention_norm"])
        q = (x @ p["q"].T + p["q_bias"]).reshape(len(x), CONFIG.heads, CONFIG.head_dim)
        seen = Seen(p, x, rotated(normed(q, p["q_norm"])), *(None,) * 2, CONFIG.layer_window(i) or len(x))
        raw, v = seen.kv(x)
        seen = dataclasses.replace(seen, raw=raw, v=v)
        layers.append(seen)
        _, output = attention(seen, seen.k, v)
        if hook is not None:
            output = hook(i, seen, output)
        h = h + output.reshape(len(x), -1) @ p["o"].T
        x = normed(h, p["mlp_norm"])
        gate = x @ p["gate"].T
        h = h + (gate / (1 + np.exp(-gate)) * (x @ p["up"].T)) @ p["down"].T
    logits = normed(h, params["norm"]) @ params["head"].T
    return layers, logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * weight


def rotated(x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * CONFIG.rope.theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def attention(seen: Seen, k_hat: np.ndarray, v_hat: np.ndarray, block: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [H, N, N] and output [N, H, d]; blocks before the query's own are read as stored, the rest exactly;
    everything as stored where `block` is 0."""
    at, index = np.arange(len(seen.q))[:, None], np.arange(len(seen.q))
    stored = index < (at // block * block if block else at + 1)
    shared = CONFIG.heads // CONFIG.kv_heads
    k, v, k_hat, v_hat = (np.repeat(a, shared, 1) for a in (seen.k, seen.v, k_hat, v_hat))
    scores = np.where(stored, np.einsum("thd,nhd->htn", seen.q, k_hat), np.einsum("thd,nhd->htn", seen.q, k))
    scores = np.where((index <= at) & (index > at - seen.window), scores / np.sqrt(k.shape[-1]), -np.inf)
    a = np.exp(scores - scores.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    early, late = np.where(stored, a, 0), np.where(stored, 0, a)
    return a, np.einsum("htn,nhd->thd", early, v_hat) + np.einsum("htn,nhd->thd", late, v)


# ---- the quantiser


def by_token(x: np.ndarray, bits: int, group: int, sink: int = 0) -> np.ndarray:
    """x [N, K, W] in groups of channels, as it is read back."""
    parts = [round_trip(x[..., i : i + group], bits, -1) for i in range(0, x.shape[-1], group)]
    return np.concatenate([x[:sink], np.concatenate(parts, -1)[sink:]])


def by_channel(x: np.ndarray, bits: int, group: int, sink: int = 0) -> np.ndarray:
    """x [N, K, W] in groups of tokens, the last of those that there are."""
    cuts = range(0, len(x), group)
    parts = [round_trip(x[max(i, sink) : i + group], bits, 0) for i in cuts if i + group > sink]
    return np.concatenate([x[:sink], *parts])


def round_trip(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
    if bits == 16:
        return x
    x, levels = x.astype(np.float32), np.float32(2**bits - 1)
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    s, z = ((high - low) / levels).astype(np.float16), low.astype(np.float16)
    codes = np.clip(np.rint((x - z.astype(np.float32)) / s.astype(np.float32)), 0, levels)
    return codes.astype(float) * s.astype(float) + z.astype(float)
