"""Mean k-NN fusion, eq. 4 of Iscen et al., CVPR 2023.

r(z, V) = z + chi(1/k sum_j v_j)                                       (4)
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from retrieval_aug.models.neighbors import (
  Values,
  add_where_any,
  as_tuple,
  drop_residual,
  masked_softmax,
  neighbor_mask,
  weighted_sum,
)
from retrieval_aug.models.scaling import SCALES, accumulator, scale_factors
from retrieval_aug.models.shapes import check_choice, check_inputs, check_rate


class MeanKNN(nn.Module):
  """Adds a dense layer of the mean value of the neighbors to the query.

  Parameters: `output/{kernel [d_v, d], bias [d]}`, chi of eq. 4.

  Attributes:
    value_scale: "sqrt_d" or "none", as in `MAM`.
    neighbor_dropout: probability of hiding a neighbor in training.
    dropout: rate on the mean value, before chi.
    query_dropout: rate on the residual z.
    dtype: type of the matrix products.
    param_dtype: type of the parameters.
  """

  value_scale: str = "none"
  neighbor_dropout: float = 0.0
  dropout: float = 0.0
  query_dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    check_choice("value_scale", self.value_scale, SCALES)
    check_rate("neighbor_dropout", self.neighbor_dropout)
    check_rate("dropout", self.dropout)
    check_rate("query_dropout", self.query_dropout)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    query: Array,
    keys: Array | None,
    values: Values,
    mask: Array | None = None,
    *,
    train: bool = False,
    return_attention: bool = False,
  ) -> Array | tuple[Array, Array]:
    """Refines the query.

    Args:
      query: z, `[B, d]`.
      keys: `[B, k, d]`; not used, and may be None.
      values: V_NN, `[B, k, d_v]`, or a tuple of such, whose means are
        concatenated.
      mask: bool `[B, k]`, True where a neighbor counts; None for all. The
        mean is over those.
      train: turns dropout on; needs `rngs={"dropout": ...}` if a rate is set.
      return_attention: also return the weights.

    Returns:
      The refined embedding `[B, d]` in float32: the query itself where all
      neighbors are masked. With `return_attention` also the (equal) weights,
      float32 `[B, 1, k]`.
    """
    check_inputs(query, keys, values, mask)
    acc = accumulator(self.dtype)
    values = as_tuple(values)
    shape = values[0].shape[:2]
    mask = neighbor_mask(self, mask, shape, self.neighbor_dropout, train)
    weights = masked_softmax(jnp.zeros(shape, acc), mask)
    means = []
    for part in values:
      factors = scale_factors(part, self.value_scale, acc)
      means.append(
        weighted_sum((weights * factors)[:, None, :], part, self.dtype)[:, 0]
      )
    mean = jnp.concatenate(means, axis=-1)
    mean = nn.Dropout(self.dropout)(mean, deterministic=not train)
    delta = nn.Dense(
      query.shape[-1],
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="output",
    )(mean)
    z = jnp.asarray(query, acc)
    refined = add_where_any(z, delta, mask)
    refined = drop_residual(self, refined, z, self.query_dropout, train)
    if return_attention:
      return refined, weights[:, None, :]
    return refined
