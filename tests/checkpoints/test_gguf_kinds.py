"""Every quantised kind of tensor that is read equals its published format (ggml's), one value at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from tests.checkpoints.test_gguf import write_gguf

from kvjax.checkpoints.gguf import GGUFFile
from kvjax.models.config import ModelConfig
from kvjax.models.zoo import random_params

CONFIG = ModelConfig("llama", 8, 256, 512, 1, 2, 1, 128, 64, tied=True)


def f16(block, at):
    return float(block[at : at + 2].view(np.float16)[0])


def nibble(block, at, i):
    """Value i of packed halves: 16 bytes hold 32 values, first all low halves."""
    return int(block[at + i % 16]) >> (4 * (i // 16)) & 15


def fifth(block, at, i):
    return int.from_bytes(block[at : at + 4].tobytes(), "little") >> i & 1


def scale_and_min(block, at, j):
    """The 6-bit scale and minimum of part j of 8, in 12 bytes."""
    q = [int(byte) for byte in block[at : at + 12]]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4


def q2_k(block, i):
    scale = int(block[i // 16])
    code = int(block[16 + i // 128 * 32 + i % 32]) >> (2 * (i % 128 // 32)) & 3
    return f16(block, 80) * (scale & 15) * code - f16(block, 82) * (scale >> 4)


def q3_k(block, i):
    part = i // 16
    scales = [int(byte) for byte in block[96:108]]
    scale = (scales[part % 8] >> (4 * (part // 8)) & 15) | (scales[8 + part % 4] >> (2 * (part // 4)) & 3) << 4
    code = int(block[32 + i // 128 * 32 + i % 32]) >> (2 * (i % 128 // 32)) & 3
    high = int(block[i % 32]) >> (i // 32) & 1
    return f16(block, 108) * (scale - 32) * (code - 4 * (1 - high))


def q4_k(block, i):
    scale, low = scale_and_min(block, 4, i // 32)
    code = int(block[16 + i // 64 * 32 + i % 32]) >> (4 * (i % 64 // 32)) & 15
    return f16(block, 0) * scale * code - f16(block, 2) * low


def q5_k(block, i):
    scale, low = scale_and_min(block, 4, i // 32)
    code = int(block[48 + i // 64 * 32 + i % 32]) >> (4 * (i % 64 // 32)) & 15
    high = int(block[16 + i % 32]) >> (i // 32) & 1
    return f16(block, 0) * scale * (code + 16 * high) - f16(block, 2) * low


def q6_k(block, i):
    half, part, l = i // 128, i % 128 // 32, i % 32
    low = int(block[64 * half + 32 * (part % 2) + l]) >> (4 * (part // 2)) & 15
    high = int(block[128 + 32 * half + l]) >> (2 * part) & 3
    scale = int(block[192 + i // 16 : 193 + i // 16].view(np.int8)[0])
    return f16(block, 208) * scale * ((low | high << 4) - 32)


FORMATS = {  # kind: value i of a block, and where the block has numbers in float16
    Kind.Q4_0: (lambda b, i: f16(b, 0) * (nibble(b, 2, i) - 8), (0,)),
    Kind.Q4_1: (lambda b, i: f16(b, 0) * nibble(b, 4, i) + f16(b, 2), (0, 2)),
    Kind.Q5_0: (lambda b, i: f16(b, 0) * (nibble(b, 6, i) + 16 * fifth(b, 2, i) - 16), (0,)),
    Kind.Q5_1: (lambda b, i: f16(b, 0) * (nibble(b, 8, i) + 16 * fifth(b, 4, i)) + f16(b, 2), (0, 2)),
    Kind.Q8_0: (lambda b, i: f16(b, 0) * int(b[2 + i : 3 + i].view(np.int8)[0]), (0,)),
    Kind.Q2_K: (q2_k, (80, 82)),
    Kind.Q3_K: (q3_k, (108,)),
    Kind.Q4_K: (q4_k, (0, 2)),
    Kind.Q5_K: (q5_k, (0, 2)),
    Kind.Q6_K: (q6_k, (208,)),
}


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_kind(kind, tmp_path):
    value, numbers = FORMATS[kind]
    size, width = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind)
    packed = {}

    def pack(weight, kind):
        """Random codes in place of a weight, with scales that are numbers."""
        blocks = rng.integers(0, 256, (weight.shape[0], weight.shape[1] // size, width), np.uint8)
        for at in numbers:
            scales = rng.normal(size=blocks.shape[:2]).astype(np.float16)
            blocks[:, :, at : at + 2] = scales[..., None].view(np.uint8)
        packed[weight.shape] = blocks
        return blocks.reshape(len(blocks), -1)

    file = write_gguf(tmp_path / "model.gguf", CONFIG, random_params(CONFIG, jnp.float32), kind, pack=pack)
    down = np.asarray(GGUFFile(file).load(jnp.float32)[1]["layer_0"]["down"])
    for row in (0, 1, 255):
        expected = [value(packed[256, 512][row, i // size], i % size) for i in range(512)]
        np.testing.assert_allclose(down[row], expected, rtol=1e-6, atol=1e-6)
    part = np.asarray(GGUFFile(file)._read("blk.0.ffn_down.weight", (slice(1, 3), slice(32, 288))))
    np.testing.assert_array_equal(part, down[1:3, 32:288])  # a device's part, within blocks
