"""One layer of RetFormer: streams that attend to each other, eq. 4 and 5.

Only the class tokens of the last layer are ever read, so only they are
computed. And with one query row neither keys nor values need projecting:

  q . (W_K e_j) = (W_K^T q) . e_j,   sum_j w_j W_V e_j = W_V sum_j w_j e_j.

Letters beside those of `shapes`: P tokens a stream, R rows that are computed
(P, or 1 in the last layer), H heads, w = d / H.
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from retrieval_aug.models.neighbors import masked_softmax
from retrieval_aug.models.scaling import accumulator

BLOCKS = ("literal", "vanilla")
TEXT_STREAMS = ("cross", "self")


def layer_norm(
  dtype: DTypeLike, param_dtype: DTypeLike, name: str
) -> nn.LayerNorm:
  """A LayerNorm whose statistics are exact, in the type of its input."""
  return nn.LayerNorm(
    dtype=dtype,
    param_dtype=param_dtype,
    # The fast variance, E x^2 - (E x)^2, cancels where tokens have an offset.
    use_fast_variance=False,
    # Inputs are float32 already; this would mix float32 into float64.
    force_float32_reductions=False,
    name=name,
  )


class Kernel(nn.Module):
  """A square matrix without a bias, as in eq. 4: `kernel [d, d]`."""

  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, dim: int) -> Array:
    """The matrix itself."""
    init = nn.initializers.lecun_normal()
    return self.param("kernel", init, (dim, dim), self.param_dtype)


class CrossFusionLayer(nn.Module):
  """Eq. 5 once, for all tokens or for the class tokens alone.

  Attributes:
    read_out: whether to compute the class tokens only.
    train: whether dropout is on.
    block, text_stream, num_heads, feedforward_dim, dropout, dtype,
      param_dtype: as in `RetFormer`.
  """

  block: str
  text_stream: str
  read_out: bool
  num_heads: int
  feedforward_dim: int | None
  dropout: float
  train: bool
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(
    self, tokens: dict[str, Array], mask: Array
  ) -> tuple[dict[str, Array], Array]:
    """Fuses.

    Args:
      tokens: stream name to `[B, P, d]`.
      mask: bool `[B, P]`, the tokens that may be attended to.

    Returns:
      The streams, `[B, R, d]`, and the weights that their class tokens give,
      the mean of the heads, `[B, streams, P]`.
    """
    # Whose queries a stream is asked with.
    asked_by = {stream: stream for stream in tokens}
    if len(tokens) == 2:
      asked_by["image"] = "text"
      asked_by["text"] = "text" if self.text_stream == "self" else "image"
    normed = {s: self._norm(x, f"{s}_norm") for s, x in tokens.items()}
    queries = {
      s: self._project(self._rows(normed[s]), self._kernel(f"{s}_query", x))
      for s, x in tokens.items()
      if s in asked_by.values()
    }
    fused, weights = {}, []
    for stream, x in tokens.items():
      attend = self._attend_once if self.read_out else self._attend
      found, given = attend(
        queries[asked_by[stream]],
        normed[stream],
        mask,
        self._kernel(f"{stream}_key", x),
        self._kernel(f"{stream}_value", x),
      )
      fused[stream] = self._finish(stream, self._rows(x), found)
      weights.append(jnp.mean(given[:, :, 0], axis=1))
    return fused, jnp.stack(weights, axis=1)

  def _finish(self, stream: str, x: Array, found: Array) -> Array:
    """The residuals of a layer. All `[B, R, d]`."""
    add = lambda x, y: (
      x
      + nn.Dropout(self.dropout)(
        y.astype(x.dtype), deterministic=not self.train
      )
    )
    if self.block == "literal":
      return add(x, found)
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dim = x.shape[-1]
    x = add(x, nn.Dense(dim, name=f"{stream}_output", **types)(found))
    name = f"{stream}_feedforward"
    width = self.feedforward_dim or 4 * dim
    y = self._norm(x, f"{name}_norm")
    y = nn.gelu(nn.Dense(width, name=f"{name}_hidden", **types)(y))
    return add(x, nn.Dense(dim, name=f"{name}_output", **types)(y))

  def _rows(self, x: Array) -> Array:
    """The rows that are computed, of `[B, P, ...]`."""
    return x[:, :1] if self.read_out else x

  def _norm(self, x: Array, name: str) -> Array:
    """Layer-normalised tokens, in the compute type."""
    norm = layer_norm(accumulator(self.dtype), self.param_dtype, name)
    return norm(x).astype(self.dtype)

  def _kernel(self, name: str, x: Array) -> Array:
    """A kernel `[d, d]` in the compute type, by heads: `[d, H, w]`."""
    dim = x.shape[-1]
    kernel = Kernel(self.param_dtype, name=name)(dim).astype(self.dtype)
    return kernel.reshape(dim, self.num_heads, dim // self.num_heads)

  def _project(self, rows: Array, kernel: Array) -> Array:
    """`rows W`: `[B, R, d]` to `[B, R, H, w]`."""
    return jnp.einsum("brd,dhw->brhw", rows, kernel)

  def _weights(self, logits: Array, width: int, mask: Array) -> Array:
    """The softmax of eq. 5, `[B, H, R, P]`."""
    shown = jnp.broadcast_to(mask[:, None, None, :], logits.shape)
    return masked_softmax(logits / math.sqrt(width), shown)

  def _attend(
    self, queries: Array, normed: Array, mask: Array, key: Array, value: Array
  ) -> tuple[Array, Array]:
    """Att of eq. 5.

    Args:
      queries: `[B, R, H, w]`.
      normed: the stream attended to, `[B, P, d]`.
      mask: bool `[B, P]`.
      key: W_K, `[d, H, w]`.
      value: W_V, `[d, H, w]`.

    Returns:
      What was found, `[B, R, d]`, and the weights, `[B, H, R, P]`.
    """
    batch, rows, _, width = queries.shape
    logits = jnp.einsum(
      "brhw,bphw->bhrp",
      queries,
      self._project(normed, key),
      preferred_element_type=accumulator(self.dtype),
    )
    weights = self._weights(logits, width, mask)
    found = jnp.einsum(
      "bhrp,bphw->brhw",
      weights.astype(self.dtype),
      self._project(normed, value),
    )
    return found.reshape(batch, rows, -1), weights

  def _attend_once(
    self, queries: Array, normed: Array, mask: Array, key: Array, value: Array
  ) -> tuple[Array, Array]:
    """`_attend` for few rows: no token is projected."""
    batch, rows, _, width = queries.shape
    logits = jnp.einsum(
      "brhd,bpd->bhrp",
      jnp.einsum("brhw,dhw->brhd", queries, key),
      normed,
      preferred_element_type=accumulator(self.dtype),
    )
    weights = self._weights(logits, width, mask)
    found = jnp.einsum("bhrp,bpd->brhd", weights.astype(self.dtype), normed)
    found = jnp.einsum("brhd,dhw->brhw", found, value)
    return found.reshape(batch, rows, -1), weights
