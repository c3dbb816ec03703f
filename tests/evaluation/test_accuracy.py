"""Accuracy by shot group, against values worked out by hand."""

import numpy as np
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.evaluation import accuracy

# Classes 0..3 with 150, 60, 5 and 3 training images.
COUNTS = np.array([150, 60, 5, 3])
GROUPS = accuracy.shot_groups(COUNTS, "paper")
LABELS = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
CORRECT = np.array([1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0], bool)


def test_top_k_counts_labels_among_the_k_largest():
  logits = np.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
  labels = np.array([0, 1, 2])
  for k, expected in ((1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1])):
    found = accuracy.top_k_correct(logits, labels, k)
    assert found.tolist() == [bool(x) for x in expected]


def test_more_guesses_than_classes_are_all_right():
  assert accuracy.top_k_correct(np.eye(3), np.array([0, 1, 2]), 5).all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_constant_logits_are_not_rewarded(k):
  """argmax would give them class 0, top-k classes 0..k-1."""
  logits = np.zeros((4, 4), np.float32)
  assert not accuracy.top_k_correct(logits, np.arange(4), k).any()


def test_a_tie_with_the_kth_counts_against_the_model():
  logits = np.array([[2.0, 2.0, 1.0]])
  assert not accuracy.top_k_correct(logits, np.array([0]), 1).any()
  assert accuracy.top_k_correct(logits, np.array([0]), 2).all()


def test_nan_logits_are_not_counted_as_right():
  logits = np.full((2, 3), np.nan)
  logits[1, :2] = 0.0
  assert not accuracy.top_k_correct(logits, np.array([0, 2]), 1).any()


@pytest.mark.parametrize(
  ("bounds", "expected"),
  [
    # Classes with 19, 20, 21, 99, 100 and 101 training images.
    ("paper", {"few": [19], "mid": [20, 21, 99, 100], "many": [101]}),
    ("oltr_code", {"few": [19, 20], "mid": [21, 99], "many": [100, 101]}),
  ],
)
def test_boundary_classes_fall_as_the_protocol_says(bounds, expected):
  counts = np.array([19, 20, 21, 99, 100, 101])
  groups = accuracy.shot_groups(counts, bounds)
  assert {n: counts[m].tolist() for n, m in groups.items()} == expected


@pytest.mark.parametrize("bounds", ["paper", "oltr_code"])
def test_every_class_is_in_one_group(bounds):
  groups = accuracy.shot_groups(np.arange(300), bounds)
  np.testing.assert_array_equal(sum(m.astype(int) for m in groups.values()), 1)


def test_other_bounds_are_refused_with_the_known_ones():
  with pytest.raises(UserError) as caught:
    accuracy.shot_groups(COUNTS, "oltr")
  assert str(caught.value) == (
    "config.evaluate.shot_groups='oltr': not one of paper, oltr_code."
  )


def test_groups_pool_images_and_class_mean_pools_classes():
  found = accuracy.by_group(CORRECT, LABELS, GROUPS)
  assert found == pytest.approx(
    {
      "all": 100 * 6 / 11,
      "many": 100 * 4 / 5,
      "mid": 100 * 1 / 3,
      "few": 100 * 1 / 3,  # two classes, three images
      "class_mean": 100 * (4 / 5 + 1 / 3 + 1 / 2 + 0) / 4,
    }
  )


def test_groups_weighted_by_their_images_average_back_to_all():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 997)
  correct = rng.random(997) < 0.3
  found = accuracy.by_group(correct, labels, GROUPS)
  weights = {n: m[labels].mean() for n, m in GROUPS.items()}
  assert sum(weights[n] * found[n] for n in weights) == pytest.approx(
    found["all"]
  )


def test_all_and_class_mean_agree_on_a_balanced_test_set():
  labels = np.repeat(np.arange(4), 7)
  correct = np.random.default_rng(1).random(28) < 0.5
  found = accuracy.by_group(correct, labels, GROUPS)
  assert found["all"] == pytest.approx(found["class_mean"])


def test_a_group_without_classes_or_without_images_is_none():
  no_many = accuracy.shot_groups(np.array([60, 60, 5, 3]), "paper")
  assert accuracy.by_group(CORRECT, LABELS, no_many)["many"] is None
  few = LABELS >= 2
  found = accuracy.by_group(CORRECT[~few], LABELS[~few], GROUPS)
  assert found["few"] is None and found["many"] == pytest.approx(80)


def test_a_class_without_test_images_has_no_vote():
  chosen = LABELS != 3
  found = accuracy.by_group(CORRECT[chosen], LABELS[chosen], GROUPS)
  expected = 100 * (4 / 5 + 1 / 3 + 1 / 2) / 3
  assert found["class_mean"] == pytest.approx(expected)
