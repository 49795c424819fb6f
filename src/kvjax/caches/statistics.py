"""What methods learn from: second moments and ranges of a layer's activations and gradients on a text."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

PREDICTED_BITS = (2, 3, 4)  # for each, predictors of their own


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Means over the tokens of a text, of one layer, in float64.

    u is the layer input divided by its root mean square, before the norm's weight; D model_dim, K kv heads, d
    head_dim, C = K d. The second moment of rows x is the mean of x^T x. A gradient is that of Σ_t log p(y_t), with
    all y_t drawn from the model's predictions, so that its second moment is the Fisher information: an error e of one
    token costs ½ e H e^T nats.

    Attributes:
      unit_mean, unit: the mean and the second moment of u.
      gain: of each channel, what times the recalled u of the layer below comes nearest to u. Recalled is what the
        latents of the layers so far give back, unquantised, as in XQuant-CL; of layers 0 to 2, their own latents.
      delta: the second moment of u less the recalled u of the layer below.
      gained_delta: the same less gain times that; recalled likewise.
      query: of queries after RoPE, of all query heads of a kv head.
      key_mean, key: of keys after bias and qk-norm, before RoPE.
      turned_mean, turned: of keys after RoPE.
      value_mean, value: of values.
      seen_value: of values, weighted by what queries make of their keys, k Σ(q^T q) k^T (OSCAR, arXiv 2605.17757, as
        its code has it).
      gradient: of the gradient with respect to [x W_k, x W_v], before biases and qk-norm.
      turned_gradient: of the gradient with respect to keys after RoPE.
      key_ends: the least and the largest number of each channel of keys before RoPE, of all tokens; then the same
        of all but the lowest and the highest 0.5 % (KVQuant, arXiv 2401.18079).
      key_bins: `codebook.histogram` of keys before RoPE that are normalised by these, of either range, a token;
        weighted by the mean square of the gradient with respect to them.
      value_bins: likewise of values, each token by the range of its own values over all heads, of all of them and
        of those that are no outliers (`codebook.inner_range`).
      key_predictor, value_predictor: what predicts keys before RoPE of what is read of those in the layer below, and
        values of what is read of the layer's keys and of values in the layer below; where what is not predicted is
        read from each of `PREDICTED_BITS` (AQUA-KV, arXiv 2501.19392). The last row is added. 0 in the first layer.
    """

    unit_mean: Float[np.ndarray, "D"]
    unit: Float[np.ndarray, "D D"]
    gain: Float[np.ndarray, "D"]
    delta: Float[np.ndarray, "D D"]
    gained_delta: Float[np.ndarray, "D D"]
    query: Float[np.ndarray, "K d d"]
    key_mean: Float[np.ndarray, "K d"]
    key: Float[np.ndarray, "K d d"]
    turned_mean: Float[np.ndarray, "K d"]
    turned: Float[np.ndarray, "K d d"]
    value_mean: Float[np.ndarray, "K d"]
    value: Float[np.ndarray, "K d d"]
    seen_value: Float[np.ndarray, "K d d"]
    gradient: Float[np.ndarray, "2C 2C"]
    turned_gradient: Float[np.ndarray, "K d d"]
    key_ends: Float[np.ndarray, "2 2 K d"]
    key_bins: Float[np.ndarray, "2 2 bins"]
    value_bins: Float[np.ndarray, "2 2 bins"]
    key_predictor: Float[np.ndarray, "p C+1 C"]
    value_predictor: Float[np.ndarray, "p 2C+1 C"]

    def scaled_unit(self, norm: ArrayLike) -> Float[np.ndarray, "D D"]:
        """The second moment of the layer input after a norm of this weight."""
        scale = np.asarray(norm, np.float64)
        return scale[:, None] * self.unit * scale
