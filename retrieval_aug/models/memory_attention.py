"""One layer of MAM: attention of a query over its neighbors, eq. 5.

The keys are never projected. With psi_Q(f) = W_Q f + b_Q and
psi_K(m) = W_K m + b_K,

  psi_Q(f) . psi_K(m) = (W_K^T psi_Q(f)) . m + psi_Q(f) . b_K,

and the last term is the same for all neighbors, so the softmax does not see
it. One d x d product an example replaces k of them; and b_K, whose gradient is
zero, is no parameter at all.

Letters beside those of `shapes`: H heads, e = d / H their width.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jax import Array
from jax.typing import DTypeLike

from retrieval_aug.models.neighbors import masked_softmax, weighted_sum
from retrieval_aug.models.scaling import scaled


def _identity(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
  del key
  return jnp.eye(*shape, dtype=dtype)


QK_INITS: dict[str, Initializer] = {
  # The attention starts as the softmax of the cosines that found the
  # neighbors, which is decisive where training data is scarce.
  "identity": _identity,
  "lecun_normal": nn.initializers.lecun_normal(),
}


class Neighbors(NamedTuple):
  """What all layers see of the neighbors.

  A factor on a key is a factor on its logit, and one on a value is one on its
  weight: scaled copies of keys and values are never made.

  Attributes:
    keys: `[B, k, d]` in the compute type, not scaled.
    key_factors: `[B, k]`, the scale of each key.
    values: arrays `[B, k, d_v]`, one a value encoder, not scaled.
    value_factors: arrays `[B, k]`, likewise.
    mask: bool `[B, k]`.
    sources: int `[B, k]`, or None.
  """

  keys: Array
  key_factors: Array
  values: tuple[Array, ...]
  value_factors: tuple[Array, ...]
  mask: Array
  sources: Array | None


class KeyProjection(nn.Module):
  """psi_K applied to the other side: `u -> W_K^T u`, without bias.

  Attributes:
    key_dim: width of the keys.
    num_heads: H.
    kernel_init: initialiser of `kernel` `[key_dim, d]`, stored as a Dense
      layer on the keys would store it.
    dtype: type to compute in.
    param_dtype: type of the parameter.
  """

  key_dim: int
  num_heads: int
  kernel_init: Initializer
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, u: Array) -> Array:
    """Maps psi_Q `[B, d]` to key space, head by head: `[B, H, key_dim]`."""
    batch, dim = u.shape
    shape = (self.key_dim, dim)
    kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
    split = (self.num_heads, dim // self.num_heads)
    return jnp.einsum(
      "bhe,mhe->bhm",
      u.reshape(batch, *split),
      kernel.astype(self.dtype).reshape(self.key_dim, *split),
    )


class MemoryAttention(nn.Module):
  """What eq. 5 adds to the residual: chi of the attended values.

  Parameters, with psi_Q, psi_K and chi of eq. 5 and S the widths of all value
  encoders together:
    query/{kernel [d, d], bias [d]}, key/kernel [d, d],
    output/{kernel [H S, d], bias [d]};
    log_temperature [H] if learned, source_gate [source_gate] if not 0;
    folded/{kernel [d, H d], bias [H d]} in place of query and key if folded.

  Attributes: as in `MAM`.
  """

  qk_init: str = "identity"
  num_heads: int = 1
  norm: str | None = None
  attention_temperature: float | str = 1.0
  source_gate: int = 0
  dropout: float = 0.0
  folded: bool = False
  train: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, f: Array, neighbors: Neighbors) -> tuple[Array, Array]:
    """Attends.

    Args:
      f: `[B, d]`, scaled as the attention is to see it.
      neighbors: keys, values and mask.

    Returns:
      chi of the attended values `[B, d]`, and the weights `[B, k]`, their
      mean over heads. The weights of each head are sown as "head_weights".
    """
    logits = self._logits(f, neighbors)  # [B, H, k]
    shown = jnp.broadcast_to(neighbors.mask[:, None, :], logits.shape)
    weights = masked_softmax(logits, shown)
    attended = [
      weighted_sum(weights * factors[:, None, :], values, self.dtype)
      for values, factors in zip(
        neighbors.values, neighbors.value_factors, strict=True
      )
    ]
    attended = jnp.concatenate(attended, axis=-1)  # [B, H, S]
    attended = attended.reshape(f.shape[0], -1)
    attended = nn.Dropout(self.dropout)(attended, deterministic=not self.train)
    chi = nn.Dense(
      f.shape[-1],
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="output",
    )
    if self.num_heads == 1:
      return chi(attended), weights[:, 0]
    self.sow("intermediates", "head_weights", weights)
    return chi(attended), jnp.mean(weights, axis=1)

  def _logits(self, f: Array, neighbors: Neighbors) -> Array:
    """The attention logits `[B, H, k]`, in the type of the key factors."""
    dim = f.shape[-1]
    g = self._key_space_query(f, neighbors.keys.shape[-1])  # [B, H, d]
    kind = neighbors.key_factors.dtype
    if self.norm == "qk":
      g = scaled(g, "sqrt_d", kind).astype(self.dtype)
      divisor = math.sqrt(dim)
    else:
      divisor = math.sqrt(dim // self.num_heads)
    if self.attention_temperature != "learned":
      divisor *= self.attention_temperature
    logits = jnp.einsum(
      "bhd,bkd->bhk", g, neighbors.keys, preferred_element_type=kind
    )
    logits = logits * (neighbors.key_factors / divisor)[:, None, :]
    if self.attention_temperature == "learned":
      log_temperature = self.param(
        "log_temperature",
        nn.initializers.zeros,
        (self.num_heads,),
        self.param_dtype,
      )
      logits = logits * jnp.exp(-log_temperature.astype(kind))[None, :, None]
    if self.source_gate:
      gate = self.param(
        "source_gate",
        nn.initializers.zeros,
        (self.source_gate,),
        self.param_dtype,
      )
      # A source that does not exist gives NaN rather than another's weight.
      bias = jnp.take(gate.astype(kind), neighbors.sources, mode="fill")
      logits = logits + bias[:, None, :]
    return logits

  def _key_space_query(self, f: Array, key_dim: int) -> Array:
    """`W_K^T psi_Q(f)`, head by head: `[B, H, key_dim]`."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    if self.folded:
      g = nn.Dense(self.num_heads * key_dim, name="folded", **types)(f)
      return g.reshape(f.shape[0], self.num_heads, key_dim)
    init = QK_INITS[self.qk_init]
    u = nn.Dense(f.shape[-1], kernel_init=init, name="query", **types)(f)
    return KeyProjection(key_dim, self.num_heads, init, name="key", **types)(u)


class SeparateAttentions(nn.Module):
  """An attention of its own for each value encoder; their outputs are summed.

  Parameters: `value_0/...`, `value_1/...`, each as in `MemoryAttention`.

  Attributes:
    options: the attributes of each attention.
  """

  options: dict

  @nn.compact
  def __call__(self, f: Array, neighbors: Neighbors) -> tuple[Array, Array]:
    """As `MemoryAttention`; the weights are the mean of the attentions'."""
    results = []
    pairs = zip(neighbors.values, neighbors.value_factors, strict=True)
    for index, (values, factors) in enumerate(pairs):
      attention = MemoryAttention(**self.options, name=f"value_{index}")
      own = neighbors._replace(values=(values,), value_factors=(factors,))
      results.append(attention(f, own))
    deltas, weights = zip(*results, strict=True)
    self.sow("intermediates", "value_weights", jnp.stack(weights, axis=1))
    return sum(deltas[1:], deltas[0]), sum(weights[1:], weights[0]) / len(
      weights
    )
