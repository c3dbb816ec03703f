"""Accuracy over all images, by shot group and as a mean over classes."""

import numpy as np

from retrieval_aug.common.errors import UserError

GROUPS = ("many", "mid", "few")

# Bounds of the mid group, both inside it. The papers say more than 100 and
# fewer than 20; the code of OLTR, whose protocol they cite, has >= and <=.
_MID = {"paper": (20, 100), "oltr_code": (21, 99)}


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
  """Whether the label is among the k largest logits: bool [N].

  Ties count against the model: a constant output is right for no class.

  Args:
    logits: [N, C].
    labels: int [N].
    k: how many guesses are allowed.
  """
  own = np.take_along_axis(logits, labels[:, None], axis=1)
  # What is not behind is ahead: NaN, as one or the other, is never right.
  ahead = logits.shape[1] - 1 - (logits < own).sum(axis=1)
  return ahead < k


def shot_groups(train_counts: np.ndarray, bounds: str) -> dict[str, np.ndarray]:
  """Classes by training images: {"many", "mid", "few"} -> bool [C].

  Args:
    train_counts: int [C].
    bounds: "paper" (> 100, 20..100, < 20) or "oltr_code" (>= 100, 21..99,
      <= 20).

  Raises:
    UserError: other bounds.
  """
  if bounds not in _MID:
    raise UserError(
      f"config.evaluate.shot_groups={bounds!r}: not one of {', '.join(_MID)}."
    )
  low, high = _MID[bounds]
  return {
    "many": train_counts > high,
    "mid": (train_counts >= low) & (train_counts <= high),
    "few": train_counts < low,
  }


def by_group(
  correct: np.ndarray,
  labels: np.ndarray,
  groups: dict[str, np.ndarray],
) -> dict[str, float | None]:
  """Accuracy in percent of all images, of each group's, and a class mean.

  "all" and the groups pool images, so the groups weighted by their images
  average to "all"; "class_mean" gives every class that has test images one
  vote. On a balanced test set the two agree.

  Args:
    correct: bool [N].
    labels: int [N].
    groups: from `shot_groups`.

  Returns:
    By "all", "many", "mid", "few" and "class_mean"; None for a group without
    test images.
  """
  out: dict[str, float | None] = {"all": _percent(correct)}
  for name in GROUPS:
    out[name] = _percent(correct[groups[name][labels]])
  classes = len(groups["many"])
  seen = np.bincount(labels, minlength=classes)
  hits = np.bincount(labels, weights=correct, minlength=classes)
  out["class_mean"] = _percent(hits[seen > 0] / seen[seen > 0])
  return out


def _percent(x: np.ndarray) -> float | None:
  return float(100 * np.mean(x)) if len(x) else None
