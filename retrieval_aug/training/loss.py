"""Losses of a batch, one float32 number an example.

Every loss maps logits `[B, C]` and labels to `[B]`. Labels are class numbers
`[B]`, or distributions over classes `[B, C]` (as Mixup makes them). `make_loss`
makes one from a configuration.
"""

import difflib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from retrieval_aug.common.errors import UserError

# (logits [B, C], labels, step) -> [B].
Loss = Callable[..., Array]

# What adjusts logits by the class prior while training. Adjusting them again
# when predicting would count the prior twice.
PRIOR_LOSSES = ("lace", "balanced_softmax")
LOSSES = ("cross_entropy", *PRIOR_LOSSES, "ldam", "focal")
REWEIGHTINGS = ("none", "class_balanced", "deferred")


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
  log_prior: ArrayLike,
  *,
  tau: float = 1.0,
  label_smoothing: float = 0.0,
) -> Array:
  """Logit-adjusted cross-entropy (LACE), Menon et al., ICLR 2021, eq. 10.

  The cross-entropy of `logits + tau * log_prior`. Training logits only:
  predictions use the logits as they are, which is what balances the classes.
  With tau = 1 it is the balanced softmax of Ren et al., NeurIPS 2020.

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
  adjusted = post_hoc(logits, log_prior, -tau)
  return cross_entropy(adjusted, labels, label_smoothing=label_smoothing)


def post_hoc(logits: Array, log_prior: ArrayLike, tau: float = 1.0) -> Array:
  """Logits adjusted when predicting, Menon et al., eq. 9.

  For models trained without a prior in their loss; `make_loss` refuses both.

  Args:
    logits: `[B, C]`.
    log_prior: `[C]`, from `log_prior`.
    tau: strength; 0 leaves the logits.

  Returns:
    `logits - tau * log_prior`, float32 `[B, C]`.
  """
  shift = tau * jnp.asarray(log_prior, jnp.float32)
  return logits.astype(jnp.float32) - shift[None, :]


def ldam(
  logits: Array,
  labels: Array,
  counts: ArrayLike,
  *,
  max_margin: float = 0.5,
  scale: float = 30.0,
  label_smoothing: float = 0.0,
) -> Array:
  """Label-distribution-aware margin loss, Cao et al., NeurIPS 2019, eq. 13.

  The cross-entropy of `scale * logits`, after a margin proportional to
  `n_c ** -1/4` is taken off the true class's logit.

  Args:
    logits: `[B, C]`. Margin and scale are meant for cosines, that is, for a
      head with `cosine=True`.
    labels: int `[B]`, or distributions `[B, C]`, which share the margin.
    counts: training examples of each class, `[C]`, all positive.
    max_margin: the margin of the rarest class.
    scale: s, what the logits are multiplied by.
    label_smoothing: see `targets`.

  Returns:
    Float32 `[B]`.
  """
  margins = jnp.asarray(counts, jnp.float32) ** -0.25
  margins = max_margin * margins / jnp.max(margins)
  taken = targets(labels, logits.shape[-1]) * margins[None, :]
  adjusted = scale * (logits.astype(jnp.float32) - taken)
  return cross_entropy(adjusted, labels, label_smoothing=label_smoothing)


def focal(
  logits: Array,
  labels: Array,
  *,
  gamma: float = 2.0,
  label_smoothing: float = 0.0,
) -> Array:
  """Focal loss, Lin et al., ICCV 2017, eq. 4, of a softmax.

  Args:
    logits: `[B, C]`.
    labels: int `[B]`, or distributions `[B, C]`.
    gamma: how much less a class counts that is predicted already; 0 is
      cross-entropy.
    label_smoothing: see `targets`.

  Returns:
    `-sum_c y_c (1 - p_c)^gamma log p_c`, float32 `[B]`.
  """
  wanted = targets(labels, logits.shape[-1], label_smoothing)
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  # Not `1 - p` itself: a power below 1 has no finite gradient at 0.
  missed = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(jnp.float32).tiny)
  return -jnp.sum(wanted * missed**gamma * log_p, axis=-1)


def class_weights(counts: ArrayLike, beta: float = 0.9999) -> np.ndarray:
  """Class-balanced weights, Cui et al., CVPR 2019, eq. 2.

  Args:
    counts: training examples of each class, `[C]`, all positive.
    beta: in [0, 1): 0 weighs all classes alike, near 1 by inverse frequency.

  Returns:
    `(1 - beta) / (1 - beta ** counts)`, scaled so that their mean is 1;
    float32 `[C]`.
  """
  counts = np.asarray(counts, np.float64)
  weights = (1 - beta) / (1 - beta**counts)
  return (weights / weights.mean()).astype(np.float32)


def make_loss(
  name: str,
  counts: np.ndarray,
  *,
  class_names: Sequence[str] | None = None,
  label_smoothing: float = 0.0,
  tau: float = 1.0,
  post_hoc_tau: float = 0.0,
  max_margin: float = 0.5,
  scale: float = 30.0,
  gamma: float = 2.0,
  reweighting: str = "none",
  beta: float = 0.9999,
  reweight_from: int = 0,
) -> Loss:
  """Makes a loss from a configuration.

  Args:
    name: "cross_entropy", "lace", "balanced_softmax" (lace with tau = 1),
      "ldam" or "focal".
    counts: training examples of each class, `[C]`.
    class_names: for messages.
    label_smoothing: see `targets`.
    tau: see `lace`; has no effect on other losses.
    post_hoc_tau: the tau by which predictions will be adjusted (`post_hoc`).
      Given only to be checked.
    max_margin: see `ldam`.
    scale: see `ldam`.
    gamma: see `focal`.
    reweighting: "none"; "class_balanced" multiplies each example's loss by its
      class's weight (`class_weights`); "deferred" does so from a step on
      (LDAM-DRW is `name="ldam"` with this).
    beta: see `class_weights`.
    reweight_from: the step from which "deferred" weighs.

  Returns:
    A function of `(logits, labels, step=0)`, float32 `[B]`.

  Raises:
    UserError: an unknown name, a class without examples, or a prior both in
      the loss and in the predictions.
  """
  _check_known("loss", name, LOSSES)
  _check_known("reweighting", reweighting, REWEIGHTINGS)
  if name in PRIOR_LOSSES and post_hoc_tau:
    raise UserError(
      f"loss {name!r} adjusts the logits by the class prior already; set "
      f"post_hoc_tau to 0 (it is {post_hoc_tau}) or take loss 'cross_entropy'"
    )
  counts = np.asarray(counts)
  needs_counts = name in (*PRIOR_LOSSES, "ldam") or reweighting != "none"
  prior = log_prior(counts, class_names) if needs_counts else None
  smooth = {"label_smoothing": label_smoothing}
  of_batch = {
    "cross_entropy": lambda x, y: cross_entropy(x, y, **smooth),
    "lace": lambda x, y: lace(x, y, prior, tau=tau, **smooth),
    "balanced_softmax": lambda x, y: lace(x, y, prior, tau=1.0, **smooth),
    "ldam": lambda x, y: ldam(
      x, y, counts, max_margin=max_margin, scale=scale, **smooth
    ),
    "focal": lambda x, y: focal(x, y, gamma=gamma, **smooth),
  }[name]
  if reweighting == "none":
    return lambda logits, labels, step=0: of_batch(logits, labels)
  weights = class_weights(counts, beta)
  start = reweight_from if reweighting == "deferred" else 0

  def reweighted(logits: Array, labels: Array, step: ArrayLike = 0) -> Array:
    weight = targets(labels, logits.shape[-1]) @ jnp.asarray(weights)
    weight = jnp.where(jnp.asarray(step) >= start, weight, 1.0)
    return weight * of_batch(logits, labels)

  return reweighted


def sample_mix(key: Array, batch: int, alpha: float) -> tuple[Array, Array]:
  """Draws what Mixup mixes, Zhang et al., ICLR 2018.

  Args:
    key: a random key.
    batch: B.
    alpha: both parameters of the Beta distribution of the share.

  Returns:
    The partner of each example, int `[B]`, and the share it keeps of itself,
    float32 `[B]`, the same for the whole batch as in the paper's code. A
    `models.Classifier` takes both as `mix`.
  """
  partner_key, share_key = jax.random.split(key)
  partner = jax.random.permutation(partner_key, batch)
  share = jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32)
  return partner, jnp.full((batch,), share)


def mix_labels(
  labels: Array, mix: tuple[Array, Array], num_classes: int
) -> Array:
  """Labels mixed as the read-outs were.

  Args:
    labels: int `[B]`, or distributions `[B, C]`.
    mix: from `sample_mix`.
    num_classes: C.

  Returns:
    Distributions, float32 `[B, C]`.
  """
  partner, share = mix
  wanted = targets(labels, num_classes)
  return share[:, None] * wanted + (1.0 - share[:, None]) * wanted[partner]


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


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1)
    raise UserError(
      f"unknown {what} {name!r}; "
      + (f"did you mean {near[0]!r}? " if near else "")
      + f"known: {', '.join(known)}"
    )
