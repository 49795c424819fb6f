"""Tensors seen as the decoder has them, whole and in parts, and refused where they do not fit together."""

import dataclasses

import numpy as np
import pytest

from kvjax.checkpoints.views import EveryOther, Mxfp4, Stacked, Transposed, join_experts
from kvjax.errors import KvjaxError


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """A tensor in memory."""

    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    def read(self, index):
        return self.array[index]


RNG = np.random.default_rng(0)
TENSOR = RNG.standard_normal((3, 8, 64))
BLOCKS = RNG.integers(0, 256, (3, 8, 2, 16), dtype=np.uint8)
SCALES = RNG.integers(120, 130, (3, 8, 2), dtype=np.uint8)
WIDE, PART = (slice(None),) * 3, (slice(1, 3), slice(1, 4), slice(3, 50))


def mxfp4(blocks, scales):
    """One value at a time, from the format's definition: sign, two bits of exponent, one of mantissa."""
    values = np.zeros((*scales.shape, 32))
    for at in np.ndindex(values.shape):
        code = int(blocks[at[:3]][at[3] // 2]) >> 4 * (at[3] % 2) & 15
        exponent, mantissa = code >> 1 & 3, code & 1
        size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        values[at] = (-size if code & 8 else size) * 2.0 ** (int(scales[at[:3]]) - 127)
    return values.reshape(3, 8, 64)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (Stacked(tuple(map(Whole, TENSOR))), TENSOR),
        (Transposed(Whole(TENSOR)), TENSOR.swapaxes(1, 2)),
        (EveryOther(Whole(TENSOR), 1), TENSOR[:, 1::2]),
        (EveryOther(Transposed(Whole(TENSOR)), 0), TENSOR.swapaxes(1, 2)[:, ::2]),
        (Mxfp4(Whole(BLOCKS), Whole(SCALES)), mxfp4(BLOCKS, SCALES)),
        (EveryOther(Mxfp4(Whole(BLOCKS), Whole(SCALES)), 1), mxfp4(BLOCKS, SCALES)[:, 1::2]),
    ],
)
def test_parts_are_parts_of_the_whole(view, expected):
    assert view.shape == expected.shape
    for index in (WIDE, PART):
        np.testing.assert_array_equal(view.read(index), expected[index])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.mlp.experts.0.up": TENSOR}, "x.mlp.experts.up is there for 1 experts, up to number 0; expected 2"),
        (
            {f"x.mlp.experts.{i}.up": TENSOR for i in (0, 2)},
            "for 2 experts, up to number 2; expected 2, numbered from 0",
        ),
        (
            {"x.mlp.experts.0.up": TENSOR, "x.mlp.experts.1.up": TENSOR[1:]},
            r"up has shapes \[\(2, 8, 64\), \(3, 8, 64\)\]",
        ),
        ({"x.mlp.experts.down_proj_blocks": BLOCKS}, "down_proj has blocks and scales of shapes .* None"),
        ({"x_blocks": BLOCKS, "x_scales": SCALES[1:]}, "x has blocks and scales of shapes"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, message):
    with pytest.raises(KvjaxError, match=message):
        join_experts({name: Whole(array) for name, array in tensors.items()}, 2)
