"""Losses against their formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.training import loss

B, C = 5, 7
LABELS = np.array([0, 3, 6, 3, 1])


def make_logits(seed=0):
  return np.random.default_rng(seed).normal(size=(B, C)).astype(np.float32)


def log_softmax(logits):
  logits = logits.astype(np.float64)
  return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_cross_entropy_of_equal_logits_is_log_of_the_class_count():
  got = loss.cross_entropy(jnp.zeros((B, C)), jnp.asarray(LABELS))
  np.testing.assert_allclose(got, np.full(B, np.log(C)), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_its_formula(smoothing):
  logits = make_logits()
  got = loss.cross_entropy(
    jnp.asarray(logits), jnp.asarray(LABELS), label_smoothing=smoothing
  )
  log_p = log_softmax(logits)
  hard = -log_p[np.arange(B), LABELS]
  expected = (1 - smoothing) * hard - smoothing * log_p.mean(axis=-1)
  assert got.shape == (B,)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_label_smoothing_is_that_of_optax():
  smooth = optax.smooth_labels(jax.nn.one_hot(LABELS, C), 0.1)
  logits = jnp.asarray(make_logits())
  np.testing.assert_allclose(
    loss.cross_entropy(logits, jnp.asarray(LABELS), label_smoothing=0.1),
    optax.softmax_cross_entropy(logits, smooth),
    rtol=1e-5,
  )


def test_distributions_as_labels_equal_their_mixture():
  logits = jnp.asarray(make_logits())
  first, second = jnp.asarray(LABELS), jnp.asarray(LABELS[::-1].copy())
  mixed = 0.3 * jax.nn.one_hot(first, C) + 0.7 * jax.nn.one_hot(second, C)
  np.testing.assert_allclose(
    loss.cross_entropy(logits, mixed, label_smoothing=0.1),
    0.3 * loss.cross_entropy(logits, first, label_smoothing=0.1)
    + 0.7 * loss.cross_entropy(logits, second, label_smoothing=0.1),
    rtol=1e-5,
  )


def test_losses_are_computed_in_float32_for_half_precision_logits():
  logits = jnp.asarray(make_logits(), jnp.bfloat16)
  got = loss.cross_entropy(logits, jnp.asarray(LABELS))
  assert got.dtype == jnp.float32
  exact = -log_softmax(np.asarray(logits, np.float64))[np.arange(B), LABELS]
  np.testing.assert_allclose(got, exact, rtol=1e-5)


def test_finite_at_extreme_logits():
  logits = jnp.array([[1e30, -1e30, 0.0]])
  value, gradient = jax.value_and_grad(
    lambda x: loss.cross_entropy(x, jnp.array([1]), label_smoothing=0.1).sum()
  )(logits)
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_lace_equals_its_formula(tau):
  # Menon et al., eq. 10: log(1 + sum_{y' != y} (pi_y' / pi_y)^tau
  # exp(f_y' - f_y)).
  counts = np.array([50, 20, 10, 8, 5, 3, 2])
  prior = counts / counts.sum()
  logits = make_logits(1)
  got = loss.lace(
    jnp.asarray(logits), jnp.asarray(LABELS), loss.log_prior(counts), tau=tau
  )
  expected = []
  for f, y in zip(logits.astype(np.float64), LABELS, strict=True):
    others = [c for c in range(C) if c != y]
    expected.append(
      np.log1p(
        sum((prior[c] / prior[y]) ** tau * np.exp(f[c] - f[y]) for c in others)
      )
    )
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_lace_of_equal_classes_is_cross_entropy():
  logits, labels = jnp.asarray(make_logits()), jnp.asarray(LABELS)
  prior = loss.log_prior(np.full(C, 4))
  np.testing.assert_allclose(
    loss.lace(logits, labels, prior, label_smoothing=0.1),
    loss.cross_entropy(logits, labels, label_smoothing=0.1),
    rtol=1e-5,
  )


def test_class_counts_counts():
  np.testing.assert_array_equal(
    loss.class_counts(LABELS, C), [1, 1, 0, 2, 0, 0, 1]
  )


@pytest.mark.parametrize("wrong", [-1, C])
def test_class_counts_refuses_a_label_outside(wrong):
  with pytest.raises(UserError, match=f"label {wrong} is outside the 7"):
    loss.class_counts(np.array([0, wrong]), C)


def test_log_prior_sums_to_one():
  prior = loss.log_prior(np.array([3, 1]))
  np.testing.assert_allclose(np.exp(prior), [0.75, 0.25], rtol=1e-6)
  assert prior.dtype == np.float32


def test_log_prior_names_classes_without_examples():
  with pytest.raises(UserError, match="no training example of cat, emu:"):
    loss.log_prior(np.array([0, 2, 0]), names=["cat", "dog", "emu"])
  with pytest.raises(UserError, match="class 0, class 1, class 2 and 2 more"):
    loss.log_prior(np.array([0, 0, 0, 0, 0, 1]))
