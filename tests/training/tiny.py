"""A problem small enough to train on in a test: four classes of directions."""

import numpy as np

from retrieval_aug import models
from retrieval_aug.training import loop, step
from retrieval_aug.training.settings import Layout, Telling, TrainSettings

N, U, K, D, DV, CLASSES = 37, 23, 5, 11, 7, 4

SETTINGS = {
  "epochs": 3.0,
  "batch_size": 8,
  "learning_rate": 0.01,
  "weight_decay": 0.1,
  "warmup_epochs": 1.0,
  "label_smoothing": 0.1,
  "tau": 1.0,
  "gradient_clip": 1.0,
  "checkpoint_epochs": 1.0,
}


def settings(**changes) -> TrainSettings:
  """Settings of a run of 14 steps with a checkpoint every 5."""
  return TrainSettings(**SETTINGS | changes)


def memory() -> step.Memory:
  """Keys [U, D] and values [U, DV]."""
  rng = np.random.default_rng(0)
  return step.Memory(
    rng.normal(size=(U, D)).astype(np.float32),
    rng.normal(size=(U, DV)).astype(np.float32),
  )


def examples(n: int = N, seed: int = 1) -> dict[str, np.ndarray]:
  """query [n, D], rows [n, K] with pads, and label [n]."""
  rng = np.random.default_rng(seed)
  label = np.arange(n) % CLASSES
  centers = 3 * np.random.default_rng(2).normal(size=(CLASSES, D))
  rows = rng.integers(0, U, (n, K))
  rows[::3, -2:] = -1
  return {
    "query": (centers[label] + rng.normal(size=(n, D))).astype(np.float32),
    "rows": rows.astype(np.int32),
    "label": label.astype(np.int32),
  }


def model(**options):
  """A MAM of one layer with everything random that there is in training."""
  return models.build(
    "mam", CLASSES, **{"num_layers": 1, "neighbor_dropout": 0.3} | options
  )


def trainer(
  module=None,
  train=None,
  *,
  ids=None,
  layout=Layout(),
  telling=Telling(),
  **changes,
) -> loop.Trainer:
  """A trainer on the problem."""
  train = examples() if train is None else train
  counts = np.bincount(train["label"], minlength=CLASSES)
  return loop.Trainer(
    module or model(),
    settings(**changes),
    memory(),
    train,
    counts,
    val=examples(29, seed=5),
    ids=ids,
    layout=layout,
    telling=telling,
  )
