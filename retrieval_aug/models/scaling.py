"""How long vectors are when a layer sees them (DESIGN decision 2)."""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from retrieval_aug.models.shapes import check_choice

SCALES = ("sqrt_d", "none")

# Below this squared norm a vector counts as zero: it is left as it is, so that
# neither its scale nor the gradient of its scale can be infinite.
_ZERO = 1e-24


def accumulator(dtype: DTypeLike) -> DTypeLike:
  """The type of residuals, softmax and logits: at least float32."""
  return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def scale_factors(x: Array, scale: str, dtype: DTypeLike) -> Array:
  """What each vector must be multiplied by.

  A `sqrt_d` vector has entries of about unit size, which is what dense layers
  are initialised for; the inner product of two of them over sqrt(d) is
  sqrt(d) times their cosine. With vectors of unit norm the softmax of eq. 5
  would start uniform, and its gradient would vanish.

  Args:
    x: `[..., d]`.
    scale: "sqrt_d" for `sqrt(d) / ||x||`, "none" for 1.
    dtype: the type to compute in, and of the result.

  Returns:
    Factors `[...]`; 1 for a zero vector.
  """
  check_choice("scale", scale, SCALES)
  if scale == "none":
    return jnp.ones(x.shape[:-1], dtype)
  # An einsum, because it never writes the squares of all keys to memory.
  squared = jnp.einsum("...d,...d->...", x, x, preferred_element_type=dtype)
  squared = squared.astype(dtype)
  is_zero = squared <= _ZERO
  # `where` inside as well as outside: the gradient of 1/sqrt at 0 is infinite,
  # and infinity times the zero of the outer `where` would be NaN.
  safe = jnp.where(is_zero, jnp.ones_like(squared), squared)
  factors = math.sqrt(x.shape[-1]) / jnp.sqrt(safe)
  return jnp.where(is_zero, jnp.ones_like(squared), factors)


def scaled(x: Array, scale: str, dtype: DTypeLike) -> Array:
  """`x` in `dtype` times its scale factors. Shape `[..., d]`."""
  x = jnp.asarray(x, dtype)
  if scale == "none":
    return x
  return x * scale_factors(x, scale, dtype)[..., None]
