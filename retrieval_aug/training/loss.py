"""Losses of a batch, one float32 number an example.

Every loss maps logits `[B, C]` and labels to `[B]`. Labels are class numbers
`[B]`, or distributions over classes `[B, C]` (as Mixup makes them).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from retrieval_aug.common.errors import UserError


def targets(
  labels: Array, num_classes: int, label_smoothing: float = 0.0
) -> Array:
  """Label distributions.

  Args:
    labels: int `[B]`, or distributions `[B, C]`.
    num_classes: C.
    label_smoothing: weight of the uniform distribution; each label keeps
      `1 - label_smoothing + label_smoothing / C` of itself
      (`optax.smooth_labels`).

  Returns:
    Float32 `[B, C]`.
  """
  if jnp.issubdtype(labels.dtype, jnp.integer):
    labels = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  labels = labels.astype(jnp.float32)
  return optax.smooth_labels(labels, label_smoothing)


def cross_entropy(
  logits: Array, labels: Array, *, label_smoothing: float = 0.0
) -> Array:
  """Softmax cross-entropy.

  Args:
    logits: `[B, C]`, of any float type; computed in float32.
    labels: int `[B]`, or distributions `[B, C]`.
    label_smoothing: see `targets`.

  Returns:
    Float32 `[B]`.
  """
  wanted = targets(labels, logits.shape[-1], label_smoothing)
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return -jnp.sum(wanted * log_p, axis=-1)


def lace(
  logits: Array,
  labels: Array,
  log_prior: Array,
  *,
  tau: float = 1.0,
  label_smoothing: float = 0.0,
) -> Array:
  """Logit-adjusted cross-entropy (LACE), Menon et al., ICLR 2021, eq. 10.

  The cross-entropy of `logits + tau * log_prior`. Training logits only:
  predictions use the logits as they are, which is what balances the classes.

  Args:
    logits: `[B, C]`, of any float type; computed in float32.
    labels: int `[B]`, or distributions `[B, C]`.
    log_prior: `[C]`, from `log_prior`.
    tau: strength; 0 is cross-entropy. The papers use 1; smaller is better for
      models that fit their training set closely (DESIGN decision 9).
    label_smoothing: see `targets`.

  Returns:
    Float32 `[B]`.
  """
  shift = tau * jnp.asarray(log_prior, jnp.float32)
  adjusted = logits.astype(jnp.float32) + shift[None, :]
  return cross_entropy(adjusted, labels, label_smoothing=label_smoothing)


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Training examples of each class.

  Args:
    labels: int `[N]`.
    num_classes: C.

  Returns:
    Int64 `[C]`.

  Raises:
    UserError: a label is not in `[0, C)`.
  """
  labels = np.asarray(labels)
  wrong = labels[(labels < 0) | (labels >= num_classes)]
  if wrong.size:
    raise UserError(
      f"label {wrong[0]} is outside the {num_classes} classes 0.."
      f"{num_classes - 1}; check the number of classes of the dataset"
    )
  return np.bincount(labels, minlength=num_classes).astype(np.int64)


def log_prior(
  counts: np.ndarray, names: Sequence[str] | None = None
) -> np.ndarray:
  """Logarithms of the class frequencies of the training split.

  Args:
    counts: training examples of each class, `[C]`.
    names: class names, for the message.

  Returns:
    Float32 `[C]`.

  Raises:
    UserError: a class has no training example, so that it has no prior.
  """
  counts = np.asarray(counts)
  empty = np.flatnonzero(counts <= 0)
  if empty.size:
    which = [str(names[i]) if names else f"class {i}" for i in empty[:3]]
    more = f" and {empty.size - 3} more" if empty.size > 3 else ""
    raise UserError(
      f"no training example of {', '.join(which)}{more}: a class without "
      "examples has no prior; leave it out of the task or add examples"
    )
  return np.log(counts / counts.sum()).astype(np.float32)
