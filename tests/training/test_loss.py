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


COUNTS = np.array([50, 20, 10, 8, 5, 3, 2])


def test_post_hoc_undoes_what_lace_adds():
  logits = jnp.asarray(make_logits())
  prior = loss.log_prior(COUNTS)
  np.testing.assert_allclose(
    loss.post_hoc(logits, prior, 0.7),
    np.asarray(logits) - 0.7 * np.log(COUNTS / COUNTS.sum())[None],
    rtol=1e-5,
  )
  np.testing.assert_array_equal(loss.post_hoc(logits, prior, 0.0), logits)


def test_balanced_softmax_equals_its_formula():
  # Ren et al., eq. 3: n_y e^f_y / sum_c n_c e^f_c.
  logits = make_logits()
  got = loss.make_loss("balanced_softmax", COUNTS)(
    jnp.asarray(logits), jnp.asarray(LABELS)
  )
  weighed = COUNTS * np.exp(logits.astype(np.float64))
  expected = -np.log(weighed[np.arange(B), LABELS] / weighed.sum(axis=-1))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_ldam_equals_its_formula():
  logits = make_logits()
  got = loss.ldam(jnp.asarray(logits), jnp.asarray(LABELS), COUNTS)
  margins = COUNTS**-0.25
  margins *= 0.5 / margins.max()
  assert np.isclose(margins[-1], 0.5)  # the rarest class
  adjusted = logits.astype(np.float64)
  adjusted[np.arange(B), LABELS] -= margins[LABELS]
  expected = -log_softmax(30 * adjusted)[np.arange(B), LABELS]
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_its_formula(gamma):
  logits = make_logits()
  got = loss.focal(jnp.asarray(logits), jnp.asarray(LABELS), gamma=gamma)
  log_p = log_softmax(logits)[np.arange(B), LABELS]
  expected = -((1 - np.exp(log_p)) ** gamma) * log_p
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradient_is_finite_for_a_certain_prediction(gamma):
  logits = jnp.array([[200.0, -200.0, 0.0]])
  gradient = jax.grad(
    lambda x: loss.focal(x, jnp.array([0]), gamma=gamma).sum()
  )(logits)
  assert np.all(np.isfinite(gradient))


def test_class_weights_equal_their_formula():
  # The effective number by its definition, 1 + beta + ... + beta^(n-1).
  effective = np.array([sum(0.9**i for i in range(n)) for n in COUNTS])
  expected = 1 / effective
  np.testing.assert_allclose(
    loss.class_weights(COUNTS, 0.9), expected / expected.mean(), rtol=1e-6
  )
  np.testing.assert_allclose(loss.class_weights(COUNTS, 0.0), np.ones(C))


@pytest.mark.parametrize("name", loss.LOSSES)
def test_every_loss_of_a_batch(name):
  logits, labels = jnp.asarray(make_logits()), jnp.asarray(LABELS)
  function = loss.make_loss(name, COUNTS, label_smoothing=0.1)
  got = function(logits, labels)
  assert got.shape == (B,)
  assert got.dtype == jnp.float32
  assert np.all(np.asarray(got) > 0)
  np.testing.assert_allclose(jax.jit(function)(logits, labels), got, rtol=1e-5)
  one_hot = jax.nn.one_hot(labels, C)
  np.testing.assert_allclose(function(logits, one_hot), got, rtol=1e-5)
  half = function(logits.astype(jnp.bfloat16), labels)
  assert half.dtype == jnp.float32


@pytest.mark.parametrize("name", loss.LOSSES)
def test_reweighting_multiplies_by_the_weight_of_the_class(name):
  logits, labels = jnp.asarray(make_logits()), jnp.asarray(LABELS)
  plain = loss.make_loss(name, COUNTS)(logits, labels)
  weighted = loss.make_loss(
    name, COUNTS, reweighting="class_balanced", beta=0.9
  )(logits, labels)
  weights = loss.class_weights(COUNTS, 0.9)[LABELS]
  np.testing.assert_allclose(weighted, plain * weights, rtol=1e-5)


def test_deferred_reweighting_starts_at_its_step():
  logits, labels = jnp.asarray(make_logits()), jnp.asarray(LABELS)
  make = lambda **options: loss.make_loss("ldam", COUNTS, **options)
  deferred = make(reweighting="deferred", reweight_from=10)
  np.testing.assert_array_equal(
    deferred(logits, labels, jnp.array(9)), make()(logits, labels)
  )
  np.testing.assert_array_equal(
    deferred(logits, labels, jnp.array(10)),
    make(reweighting="class_balanced")(logits, labels),
  )


@pytest.mark.parametrize("name", loss.PRIOR_LOSSES)
def test_prior_in_loss_and_predictions_is_refused(name):
  with pytest.raises(UserError, match=f"loss '{name}' adjusts .* already"):
    loss.make_loss(name, COUNTS, post_hoc_tau=1.0)
  loss.make_loss("cross_entropy", COUNTS, post_hoc_tau=1.0)


@pytest.mark.parametrize("name", ["lace", "balanced_softmax", "ldam"])
def test_class_without_examples_is_named(name):
  with pytest.raises(UserError, match="no training example of dog"):
    loss.make_loss(name, np.array([2, 0]), class_names=["cat", "dog"])


def test_unknown_loss_names_the_nearest():
  with pytest.raises(UserError, match="unknown loss 'lase'; did you mean 'lac"):
    loss.make_loss("lase", COUNTS)
  with pytest.raises(UserError, match="unknown reweighting 'balanced'; did"):
    loss.make_loss("ldam", COUNTS, reweighting="balanced")


def test_mix_is_a_permutation_and_one_share():
  partner, share = loss.sample_mix(jax.random.key(0), 11, 0.4)
  assert sorted(np.asarray(partner)) == list(range(11))
  assert share.shape == (11,)
  assert len(np.unique(share)) == 1
  assert 0 <= share[0] <= 1


def test_mixed_labels_share_as_the_examples_do():
  mix = (jnp.array([1, 0, 2, 4, 3]), jnp.full((B,), 0.3))
  mixed = loss.mix_labels(jnp.asarray(LABELS), mix, C)
  expected = np.zeros((B, C))
  for i, partner in enumerate([1, 0, 2, 4, 3]):
    expected[i, LABELS[i]] += 0.3
    expected[i, LABELS[partner]] += 0.7
  np.testing.assert_allclose(mixed, expected, rtol=1e-6)
