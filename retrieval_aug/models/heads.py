"""Classifiers h of an embedding: eq. 1 of Iscen et al., CVPR 2023."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from retrieval_aug.models.scaling import accumulator, scaled
from retrieval_aug.models.shapes import bind, check_choice, check_rate

ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu}


class Linear(nn.Module):
  """`x W + b`: one dense layer. Parameters `kernel [d, C]`, `bias [C]`.

  Attributes:
    num_classes: C.
    cosine: the logits are the cosines of the embedding and the columns of the
      kernel, without bias, as LDAM wants them.
    dtype: type of the factors of the product; the sums, the bias and the
      logits are float32 (or wider) whatever it is.
    param_dtype: type of the parameters.
  """

  num_classes: int
  cosine: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    """Maps embeddings `[B, d]` to logits `[B, C]`."""
    del train
    bind("x", x, "B d", {})
    acc = accumulator(self.dtype)
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (x.shape[-1], self.num_classes),
      self.param_dtype,
    )
    if self.cosine:
      dim = x.shape[-1]
      x = scaled(x, "sqrt_d", acc)
      # Each side has the norm sqrt(d).
      kernel = scaled(kernel.T, "sqrt_d", acc).T / dim
    logits = jnp.einsum(
      "bd,dc->bc",
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      preferred_element_type=acc,
    )
    if self.cosine:
      return logits
    bias = self.param(
      "bias", nn.initializers.zeros, (self.num_classes,), self.param_dtype
    )
    return logits + bias.astype(acc)[None, :]


class MLP(nn.Module):
  """Two dense layers with a nonlinearity in between.

  Parameters: `hidden/{kernel [d, h], bias [h]}`,
  `output/{kernel [h, C], bias [C]}`.

  Attributes:
    num_classes: C.
    hidden_dim: h; None for 4 d, as in a Transformer's feed-forward layer
      (neither paper gives it).
    activation: "relu" (RetFormer, below its eq. 3) or "gelu".
    dropout: rate on the hidden units.
    dtype: type of the matrix products; logits are float32 or wider.
    param_dtype: type of the parameters.
  """

  num_classes: int
  hidden_dim: int | None = None
  activation: str = "relu"
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    check_choice("activation", self.activation, ACTIVATIONS)
    check_rate("dropout", self.dropout)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    """Maps embeddings `[B, d]` to logits `[B, C]`."""
    bind("x", x, "B d", {})
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    width = self.hidden_dim or 4 * x.shape[-1]
    x = nn.Dense(width, name="hidden", **types)(x)
    x = ACTIVATIONS[self.activation](x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    return Linear(self.num_classes, name="output", **types)(x)
