"""Pieces that the fusions share: masks, masked softmax, weighted values."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

# The values of one encoder, or of several side by side.
Values = Array | Sequence[Array]


def as_tuple(values: Values) -> tuple[Array, ...]:
  """One array or several, as a tuple of several."""
  return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def neighbor_mask(
  module: nn.Module,
  mask: Array | None,
  shape: tuple[int, int],
  rate: float,
  train: bool,
) -> Array:
  """The neighbors to use in this call, as bool `[B, k]`.

  In training each neighbor is hidden with probability `rate`, the same ones
  for all layers. The weights of the others sum to one again, so nothing needs
  rescaling; an example may lose all its neighbors, and is then its query.

  Args:
    module: the module whose "dropout" random stream is drawn from.
    mask: `[B, k]` of bool, or None for all.
    shape: `(B, k)`.
    rate: `neighbor_dropout`.
    train: whether this is training.

  Returns:
    Bool `[B, k]`.
  """
  used = jnp.ones(shape, bool) if mask is None else mask
  if train and rate > 0.0:
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, shape)
    used = used & keep
  return used


def masked_softmax(logits: Array, mask: Array) -> Array:
  """Softmax over the last axis; hidden entries, and empty rows, weigh zero.

  Args:
    logits: `[..., k]`, float32 or wider, finite where shown.
    mask: bool, of the same shape.

  Returns:
    Weights `[..., k]`. Finite, as is their gradient, whatever the mask.
  """
  # Not -inf: in a row without neighbors -inf minus -inf would be NaN.
  lowest = jnp.finfo(logits.dtype).min
  shown = jnp.where(mask, logits, lowest)
  top = jnp.max(shown, axis=-1, keepdims=True, initial=lowest)
  shifted = jnp.where(mask, shown - jax.lax.stop_gradient(top), 0.0)
  raised = jnp.where(mask, jnp.exp(shifted), 0.0)
  total = jnp.sum(raised, axis=-1, keepdims=True)
  return raised / jnp.where(total > 0.0, total, jnp.ones_like(total))


def weighted_sum(weights: Array, values: Array, dtype: DTypeLike) -> Array:
  """`sum_j weights_j values_j` for each example and head.

  Args:
    weights: `[B, H, k]`.
    values: `[B, k, d_v]`.
    dtype: the type to multiply in; sums are kept in float32 or wider.

  Returns:
    `[B, H, d_v]` of the type of `weights`.
  """
  return jnp.einsum(
    "bhk,bkv->bhv",
    weights.astype(dtype),
    jnp.asarray(values, dtype),
    preferred_element_type=weights.dtype,
  )


def add_where_any(residual: Array, delta: Array, mask: Array) -> Array:
  """`residual + delta`, and exactly `residual` where no neighbor is used.

  Without this the bias of chi would be added to queries that found nothing.

  Args:
    residual: `[B, d]`.
    delta: `[B, d]`.
    mask: bool `[B, k]`.

  Returns:
    `[B, d]` of the type of `residual`.
  """
  found = jnp.any(mask, axis=-1, keepdims=True)
  delta = delta.astype(residual.dtype)
  return residual + jnp.where(found, delta, jnp.zeros_like(delta))


def drop_residual(
  module: nn.Module, refined: Array, z: Array, rate: float, train: bool
) -> Array:
  """Drops entries of the query where it is the residual, and only there.

  What a fusion has attended with is untouched; the head must lean on what the
  neighbors add, in training, as far as `rate` goes.

  Args:
    module: the module whose "dropout" random stream is drawn from.
    refined: `z + delta`, `[B, d]`.
    z: the query, `[B, d]`.
    rate: `query_dropout`.
    train: nothing is dropped unless it is True.

  Returns:
    `dropout(z) + delta`, `[B, d]`.
  """
  if not train or rate == 0.0:
    return refined
  keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, z.shape)
  dropped = jnp.where(keep, z / (1.0 - rate), jnp.zeros_like(z))
  return refined - z + dropped
