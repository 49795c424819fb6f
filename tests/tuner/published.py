"""What KVTuner published of four models: their presets, the groups of their layers, and the layers' candidate pairs.

From arXiv 2502.04420v5 and its code; the presets themselves are kvjax's own `kvtuner:` plans. In the tables a line
names an entry and the next lists what its layers have, as in `KV8,K4V8{0,8-12} KV4{rest}`; `rest` is the layers in no
other braces.
"""

from __future__ import annotations

import dataclasses
import re

from kvjax.caches.presets import shipped
from kvjax.models.config import ModelConfig

Pair = tuple[int, int]  # bits of keys, bits of values

MODELS = {
    "Llama-3.1-8B-Instruct": ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "Mistral-7B-Instruct-v0.3": ModelConfig("mistral", 32768, 4096, 14336, 32, 32, 8, 128, 32768),
    "Qwen2.5-3B-Instruct": ModelConfig("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, 32768),
    "Qwen2.5-7B-Instruct": ModelConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 32768),
}

# The shipped files: name without .yaml, average bits to four digits, the bits that the paper calls it by (C3.25).
_PRESETS = """
Llama-3.1-8B-Instruct_kivi_KVTuner4_0 3.0625
Llama-3.1-8B-Instruct_kivi_KVTuner4_1 3.25 3.25
Llama-3.1-8B-Instruct_kivi_KVTuner6_0 5.0625
Llama-3.1-8B-Instruct_kivi_KVTuner6_1 4.9062 4.91
Llama-3.1-8B-Instruct_pertoken_KVTuner4_0 3.5938 3.59
Llama-3.1-8B-Instruct_pertoken_KVTuner4_1 3.9688
Llama-3.1-8B-Instruct_pertoken_KVTuner6_0 5.8438
Llama-3.1-8B-Instruct_pertoken_KVTuner6_1 5.4375 5.44 5.43
Mistral-7B-Instruct-v0.3_kivi_KVTuner4_0 3.3125
Mistral-7B-Instruct-v0.3_kivi_KVTuner4_1 3.1875
Mistral-7B-Instruct-v0.3_kivi_KVTuner6_0 5.625
Mistral-7B-Instruct-v0.3_kivi_KVTuner6_1 4.1562
Mistral-7B-Instruct-v0.3_pertoken_KVTuner4_0 3.6562
Mistral-7B-Instruct-v0.3_pertoken_KVTuner4_1 3.7812 3.78
Mistral-7B-Instruct-v0.3_pertoken_KVTuner6_0 5.5312
Mistral-7B-Instruct-v0.3_pertoken_KVTuner6_1 5.375 5.38
Qwen2.5-3B-Instruct_kivi_KVTuner4_0 3.1667 3.17
Qwen2.5-3B-Instruct_kivi_KVTuner4_1 3.4444 3.44
Qwen2.5-3B-Instruct_kivi_KVTuner6_0 3.1667 3.17
Qwen2.5-3B-Instruct_kivi_KVTuner6_1 4.1111
Qwen2.5-3B-Instruct_pertoken_KVTuner4_0 3.6389 3.64
Qwen2.5-3B-Instruct_pertoken_KVTuner4_1 4.0 4.0
Qwen2.5-3B-Instruct_pertoken_KVTuner6_0 5.0556 5.06
Qwen2.5-3B-Instruct_pertoken_KVTuner6_1 5.1389
Qwen2.5-7B-Instruct_kivi_KVTuner4_0 3.9286 3.92
Qwen2.5-7B-Instruct_kivi_KVTuner4_1 3.1786
Qwen2.5-7B-Instruct_kivi_KVTuner6_0 5.9643 5.96
Qwen2.5-7B-Instruct_kivi_KVTuner6_1 5.1786
Qwen2.5-7B-Instruct_pertoken_KVTuner4_0 4.0 4.0
Qwen2.5-7B-Instruct_pertoken_KVTuner4_1 3.9286 3.92
Qwen2.5-7B-Instruct_pertoken_KVTuner6_0 5.7857
Qwen2.5-7B-Instruct_pertoken_KVTuner6_1 5.0 5.0
"""

# Table 10.
_GROUPS = """
Llama-3.1-8B-Instruct token
    {0} {1-4,7,13,18,25,27,31} {5,6,12,21,26,28} {8-11,14-17,20,30} {19,22} {23,24,29}
Llama-3.1-8B-Instruct kivi
    {0} {1-3,7,29,31} {4,25,27} {5,21,23,24} {6,8-12,14-16,18-20,22,26,28,30} {13,17}
Mistral-7B-Instruct-v0.3 token
    {0} {1,2} {3,4,23,31} {5,6} {7-22,24-30}
Mistral-7B-Instruct-v0.3 kivi
    {0,1,31} {2-4} {6,27,29} {7,8,10,18} {9,14} {5,21-26,28,30} {11-13,15,17,19,20} {16}
Qwen2.5-3B-Instruct token
    {0} {1,3-6,8,9,12,13,15,20} {2,14,23,35} {7,11,16,25,28,32} {10,19,24,26,33} {17,30,31,34} {21,22} {18,27,29}
Qwen2.5-3B-Instruct kivi
    {0,1} {2,4} {34,35} {3,6,11,13,23} {5,7,25,32,33} {8,16,18,21,22,24,26,27,30} {9,10,14,15,17,19,20,29,31} {12,28}
Qwen2.5-7B-Instruct token
    {0} {1,2,4,5,25} {6,19} {7,10,11,15,23} {8,24} {9,12,16-18,21,22,26} {14,20} {3,13,27}
Qwen2.5-7B-Instruct kivi
    {0,2} {1,3} {4,5,12,22-25} {7,9,10,13,14,16,18-21,27} {8,26} {11,15,17} {6}
"""

# Table 4, KV4 for K4V4. Of Mistral's {0,1,31} the paper names 0 only; the code has all three. They are one group of
# Table 10, and two presets give them K4V8, which the default set lacks.
_CANDIDATES = """
Llama-3.1-8B-Instruct token
    KV8,K4V8,KV4,K4V2,KV2{0} KV8,K8V4,KV4,K4V2,KV2{rest}
Llama-3.1-8B-Instruct kivi
    KV8,K4V8,KV4,K2V4,KV2{0} KV8,K4V8,KV4,K4V2,KV2{1,2,3,7,29,31} KV8,K8V4,KV4,K4V2,KV2{rest}
Mistral-7B-Instruct-v0.3 token
    KV8,K4V8,KV4,K2V4,KV2{0} KV8,K8V4,KV4,K4V2,KV2{rest}
Mistral-7B-Instruct-v0.3 kivi
    KV8,K4V8,KV4,K2V4,KV2{0,1,31} KV8,K4V8,KV4,K4V2,KV2{2-4,6-10,14,18,27,29} KV8,K8V4,KV4,K4V2,KV2{rest}
Qwen2.5-3B-Instruct token
    KV8,K8V4,K8V2,K4V2,KV2{0} KV8,K8V4,K8V2,KV4,K4V2,KV2{18,27,29} KV8,K8V4,KV4,K4V2,KV2{rest}
Qwen2.5-3B-Instruct kivi
    KV8,K4V8,KV4,K2V4,KV2{0,1,2,4,34,35} KV8,K4V8,KV4,K4V2,KV2{3,6,11,13,23} KV8,K8V4,KV4,K4V2,KV2{rest}
Qwen2.5-7B-Instruct token
    KV8,K8V4,K8V2,K4V2,KV2{0} KV8,K8V4,K8V2,KV4,K4V2,KV2{3,13,27} KV8,K8V4,KV4,K4V2,KV2{rest}
Qwen2.5-7B-Instruct kivi
    KV8,K4V8,KV4,K2V4,KV2{0-3} KV8,K4V8,KV4,K4V2,KV2{6} KV8,K8V4,KV4,K4V2,KV2{rest}
"""


@dataclasses.dataclass(frozen=True)
class Preset:
    name: str
    bits: float
    called: tuple[float, ...]
    pairs: list[tuple[Pair, list[int]]]

    @property
    def model(self) -> str:
        return self.name.split("_")[0]

    @property
    def mode(self) -> str:
        return {"kivi": "kivi", "pertoken": "token"}[self.name.split("_")[1]]

    @property
    def most(self) -> int:
        """The average bits that its search allowed."""
        return int(self.name.split("_")[2].removeprefix("KVTuner"))

    @property
    def by_layer(self) -> dict[int, Pair]:
        return {layer: pair for pair, layers in self.pairs for layer in layers}


def _entries(text: str) -> list[tuple[list[str], str]]:
    lines = text.strip().splitlines()
    return [(head.split(), body) for head, body in zip(lines[::2], lines[1::2], strict=True)]


def _layers(text: str) -> list[int]:
    ranges = [part.partition("-") for part in text.split(",")]
    return [layer for first, _, last in ranges for layer in range(int(first), int(last or first) + 1)]


def _listed(body: str, model: str) -> list[tuple[str, list[int]]]:
    """What stands before the braces, and the layers in them, for all of an entry."""
    parts = re.findall(r"(\S*)\{(\S+)\}", body)
    named = {layer for _, where in parts if where != "rest" for layer in _layers(where)}
    rest = [layer for layer in range(MODELS[model].layers) if layer not in named]
    return [(what, rest if where == "rest" else _layers(where)) for what, where in parts]


def _pair(text: str) -> Pair:
    key, value = re.fullmatch(r"K(\d?)V(\d)", text).groups()
    return int(key or value), int(value)


def _preset(name: str, bits: str, *called: str) -> Preset:
    layers = {layer: _pair(pair.upper()) for layer, pair in _FILES[name].items()}
    pairs = [(pair, [layer for layer in layers if layers[layer] == pair]) for pair in dict.fromkeys(layers.values())]
    return Preset(name, float(bits), tuple(map(float, called)), pairs)


_FILES = {f"{plan.model}_{plan.file}": plan.bits for plan in shipped()}
PRESETS = [_preset(*line.split()) for line in _PRESETS.strip().splitlines()]
GROUPS = {(model, mode): [layers for _, layers in _listed(body, model)] for (model, mode), body in _entries(_GROUPS)}
CANDIDATES = {
    (model, mode): [({_pair(pair) for pair in what.split(",")}, layers) for what, layers in _listed(body, model)]
    for (model, mode), body in _entries(_CANDIDATES)
}
