"""MAM as one would first write it in Flax: every key is projected.

The oracle for the reassociated projection, and the baseline of
`benchmarks/models.py`. Parameters as those of `MAM`, without masks.
"""

import jax.numpy as jnp
from flax import linen as nn


class PlainMAM(nn.Module):
  """Eq. 6 with a psi_K on all k keys. Inputs are scaled by the caller."""

  num_layers: int = 8

  @nn.compact
  def __call__(self, query, keys, values):
    dim = query.shape[-1]
    f = query
    for index in range(self.num_layers):
      f = query + PlainLayer(dim, name=f"layer_{index}")(f, keys, values)
    return f


class PlainLayer(nn.Module):
  """What eq. 5 adds to the query."""

  dim: int

  @nn.compact
  def __call__(self, f, keys, values):
    psi_q = nn.Dense(self.dim, name="query")(f)  # [B, d]
    psi_k = nn.Dense(self.dim, use_bias=False, name="key")(keys)  # [B, k, d]
    logits = jnp.einsum("bd,bkd->bk", psi_q, psi_k) / self.dim**0.5
    attended = jnp.einsum("bk,bkv->bv", nn.softmax(logits), values)
    return nn.Dense(self.dim, name="output")(attended)


class PlainClassifier(nn.Module):
  """The above and a linear head."""

  num_classes: int
  num_layers: int = 8

  @nn.compact
  def __call__(self, query, keys, values):
    refined = PlainMAM(self.num_layers, name="fusion")(query, keys, values)
    return nn.Dense(self.num_classes, name="head")(refined)
