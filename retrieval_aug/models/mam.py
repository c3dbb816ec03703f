"""Memory attention module (MAM), eq. 5 and 6 of Iscen et al., CVPR 2023.

  f^1 = z + chi(softmax(psi_Q(z) psi_K(M)^T / sqrt(d)) V)                (5)
  f^L = z + chi(softmax(psi_Q(f^{L-1}) psi_K(M)^T / sqrt(d)) V)          (6)

where z is the query, M the keys and V the values of its k neighbors.

The keys are never projected. With psi_Q(f) = W_Q f + b_Q and
psi_K(m) = W_K m + b_K,

  psi_Q(f) . psi_K(m) = (W_K^T psi_Q(f)) . m + psi_Q(f) . b_K,

and the last term is the same for all neighbors, so the softmax does not see
it. One d x d product an example replaces k of them; and b_K, whose gradient is
zero, is no parameter at all.
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jax import Array
from jax.typing import DTypeLike

from retrieval_aug.models.neighbors import (
  add_where_any,
  masked_softmax,
  neighbor_mask,
  weighted_sum,
)
from retrieval_aug.models.scaling import (
  SCALES,
  accumulator,
  scale_factors,
  scaled,
)
from retrieval_aug.models.shapes import (
  check_at_least,
  check_choice,
  check_inputs,
  check_rate,
)

RESIDUALS = ("query", "previous")


def _identity(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
  del key
  return jnp.eye(*shape, dtype=dtype)


QK_INITS: dict[str, Initializer] = {
  # The attention starts as the softmax of the cosines that found the
  # neighbors, which is decisive where training data is scarce.
  "identity": _identity,
  "lecun_normal": nn.initializers.lecun_normal(),
}


class KeyProjection(nn.Module):
  """psi_K applied to the other side: `u -> W_K^T u`, without bias.

  Attributes:
    key_dim: width of the keys.
    kernel_init: initialiser of `kernel` `[key_dim, d]`, stored as a Dense
      layer on the keys would store it.
    dtype: type to compute in.
    param_dtype: type of the parameter.
  """

  key_dim: int
  kernel_init: Initializer
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, u: Array) -> Array:
    """Maps a projected query `[B, d]` to key space `[B, key_dim]`."""
    shape = (self.key_dim, u.shape[-1])
    kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
    return jnp.einsum("bd,kd->bk", u, kernel.astype(self.dtype))


class MAMLayer(nn.Module):
  """One attention over the neighbors: what eq. 5 adds to the residual.

  Parameters, with psi_Q, psi_K and chi of eq. 5:
    query/{kernel [d, d], bias [d]}, key/kernel [d, d],
    output/{kernel [d_v, d], bias [d]}.
  """

  qk_init: str = "identity"
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    f: Array,
    keys: Array,
    values: Array,
    mask: Array,
    key_factors: Array,
    value_factors: Array,
    train: bool,
  ) -> tuple[Array, Array]:
    """Attends.

    Args:
      f: `[B, d]`, scaled as the attention is to see it.
      keys: `[B, k, d]`, not scaled.
      values: `[B, k, d_v]`, not scaled.
      mask: bool `[B, k]`.
      key_factors: `[B, k]`, the scale of each key. A factor on a key is a
        factor on its logit, and one on a value is one on its weight, so
        scaled copies of keys and values are never made.
      value_factors: `[B, k]`, the scale of each value.
      train: whether dropout is on.

    Returns:
      chi of the attended value `[B, d]`, and the weights `[B, k]`.
    """
    dim = f.shape[-1]
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    init = QK_INITS[self.qk_init]
    u = nn.Dense(dim, kernel_init=init, name="query", **types)(f)
    u = KeyProjection(keys.shape[-1], init, name="key", **types)(u)  # [B, d]
    logits = jnp.einsum(
      "bd,bkd->bk",
      u,
      jnp.asarray(keys, self.dtype),
      preferred_element_type=key_factors.dtype,
    )
    logits = logits * key_factors / math.sqrt(dim)
    weights = masked_softmax(logits, mask)
    attended = weighted_sum(weights * value_factors, values, self.dtype)
    attended = nn.Dropout(self.dropout)(attended, deterministic=not train)
    return nn.Dense(dim, name="output", **types)(attended), weights


class MAM(nn.Module):
  """Memory attention module: refines a query by attending to its neighbors.

  Parameters: `layer_0` .. `layer_{L-1}` (only `layer_0` if shared), each with
  `query/{kernel,bias}`, `key/kernel`, `output/{kernel,bias}`: psi_Q, psi_K and
  chi of eq. 5. A layer has `2 d^2 + d + d_v d + d` parameters.

  What is scaled: the attention sees `f / ||f|| * sqrt(d)` and keys scaled
  alike, in every layer; the residual is the query as given. `Classifier`
  scales the query once more for the head, so that there all models see the
  same input.

  Attributes:
    num_layers: L; the paper uses 8.
    residual: what a layer's output is added to: "query" is eq. 6 literally,
      "previous" is the output of the layer before.
    share_layers: one set of weights for all layers, as eq. 6 writes it.
    qk_init: "identity" or "lecun_normal", for psi_Q and psi_K.
    input_scale: "sqrt_d", or "none" for inputs as given.
    value_scale: the same for the values before they are averaged.
    neighbor_dropout: probability of hiding a neighbor in training.
    dropout: rate on the attended value, before chi.
    dtype: type of the matrix products. Softmax and residual are float32 (or
      wider) whatever it is.
    param_dtype: type of the parameters.
  """

  num_layers: int = 8
  residual: str = "query"
  share_layers: bool = False
  qk_init: str = "identity"
  input_scale: str = "sqrt_d"
  value_scale: str = "none"
  neighbor_dropout: float = 0.0
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def _check_options(self) -> None:
    check_at_least("num_layers", self.num_layers, 1)
    check_choice("residual", self.residual, RESIDUALS)
    check_choice("qk_init", self.qk_init, QK_INITS)
    check_choice("input_scale", self.input_scale, SCALES)
    check_choice("value_scale", self.value_scale, SCALES)
    check_rate("neighbor_dropout", self.neighbor_dropout)
    check_rate("dropout", self.dropout)

  @nn.compact
  def __call__(
    self,
    query: Array,
    keys: Array,
    values: Array,
    mask: Array | None = None,
    *,
    train: bool = False,
    return_attention: bool = False,
  ) -> Array | tuple[Array, Array]:
    """Refines the query.

    Args:
      query: z, `[B, d]`.
      keys: M_NN, `[B, k, d]`.
      values: V_NN, `[B, k, d_v]`.
      mask: bool `[B, k]`, True where a neighbor counts; None for all. Masked
        slots must be finite.
      train: turns dropout on; needs `rngs={"dropout": ...}` if a rate is set.
      return_attention: also return the weights.

    Returns:
      f^L, `[B, d]` in float32: the query itself where all neighbors are
      masked. With `return_attention` also the weights, float32 `[B, L, k]`,
      aligned with the neighbors.
    """
    self._check_options()
    check_inputs(query, keys, values, mask)
    acc = accumulator(self.dtype)
    mask = neighbor_mask(
      self, mask, keys.shape[:2], self.neighbor_dropout, train
    )
    # Once for all layers.
    key_factors = scale_factors(keys, self.input_scale, acc)
    value_factors = scale_factors(values, self.value_scale, acc)

    def make_layer(index: int) -> MAMLayer:
      return MAMLayer(
        qk_init=self.qk_init,
        dropout=self.dropout,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=f"layer_{index}",
      )

    z = jnp.asarray(query, acc)
    f = z
    attention = []
    layer = None
    for index in range(self.num_layers):
      if layer is None or not self.share_layers:
        layer = make_layer(index)
      delta, weights = layer(
        scaled(f, self.input_scale, acc),
        keys,
        values,
        mask,
        key_factors,
        value_factors,
        train,
      )
      f = add_where_any(z if self.residual == "query" else f, delta, mask)
      attention.append(weights)
    if return_attention:
      return f, jnp.stack(attention, axis=1)
    return f
