"""How to train, where arrays lie, and what is told of it."""

import dataclasses
from typing import Any

import numpy as np

from retrieval_aug.common.errors import UserError
from retrieval_aug.training import loss as losses

KEEP = ("last", "best")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """How to train; see `config.py` for what each means."""

  epochs: float
  batch_size: int
  learning_rate: float
  weight_decay: float
  warmup_epochs: float
  label_smoothing: float
  tau: float
  gradient_clip: float
  checkpoint_epochs: float
  lr_factors: tuple[tuple[str, float], ...] = ()
  loss: str = "lace"
  post_hoc_tau: float = 0.0
  ldam_margin: float = 0.5
  ldam_scale: float = 30.0
  focal_gamma: float = 2.0
  reweighting: str = "none"
  reweight_beta: float = 0.9999
  reweight_epoch: float = 0.0
  mixup: float = 0.0
  finetune: bool = False
  augment: str = "none"
  encoder_batch: int = 0
  keep_start: float = 0.0
  accumulate: int = 1
  ema: float = 0.0
  remat: bool = False
  eval_epochs: float = 0.0
  keep: str = "last"

  def __post_init__(self):
    if not 0 <= self.ema < 1:
      raise UserError(f"config.train.ema={self.ema}: not from 0 to below 1.")
    if self.accumulate < 1 or self.batch_size % self.accumulate:
      raise UserError(
        f"config.train.accumulate={self.accumulate}: must be a whole part of "
        f"train.batch_size={self.batch_size}."
      )
    if self.keep not in KEEP:
      raise UserError(f"config.train.keep={self.keep}: not one of {KEEP}.")
    if self.keep == "best" and not self.eval_epochs > 0:
      raise UserError(
        "config.train.keep=best: nothing says which is best; set "
        "train.eval_epochs to how often to look, such as 1."
      )

  def steps(self, epochs: float, examples: int) -> int:
    """Steps in a number of epochs, rounded, at least 1."""
    return max(1, round(epochs * examples / self.batch_size))

  def make_loss(self, class_counts: np.ndarray) -> losses.Loss:
    """The loss for a training split with [C] examples a class."""
    per_epoch = class_counts.sum() / self.batch_size
    return losses.make_loss(
      self.loss,
      class_counts,
      label_smoothing=self.label_smoothing,
      tau=self.tau,
      post_hoc_tau=self.post_hoc_tau,
      max_margin=self.ldam_margin,
      scale=self.ldam_scale,
      gamma=self.focal_gamma,
      reweighting=self.reweighting,
      beta=self.reweight_beta,
      reweight_from=round(self.reweight_epoch * per_epoch),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where arrays lie.

  Attributes:
    model: devices along the mesh's axis "model"; the others are along "data".
    sharding: of parameters and optimizer state; see `sharding.parse_rules`.
    placement: of the working set; see `placement.place`.
    dtype: of the working set.
  """

  model: int = 1
  sharding: Any = "replicate"
  placement: str = "auto"
  dtype: str = "float16"


@dataclasses.dataclass(frozen=True)
class Telling:
  """What is told of a run beside `metrics.jsonl` and `metrics.csv`.

  Attributes:
    tensorboard: whether event files are written.
    wandb: project of Weights & Biases; empty for none.
    profile: steps "FIRST:LAST" that are traced; empty for none.
  """

  tensorboard: bool = False
  wandb: str = ""
  profile: str = ""
