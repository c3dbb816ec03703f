"""Where a training is written down: metrics, speed, checkpoints."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from retrieval_aug.common import distributed
from retrieval_aug.training import metrics, speed
from retrieval_aug.training.checkpoint import Checkpoints
from retrieval_aug.training.step import State


class Books(NamedTuple):
  """Where a training of one or several seeds is written down.

  Attributes:
    seeds: that train.
    names: what each is called in messages.
    folders: of the metrics of each.
    shared: folder of the checkpoints; None if nothing is kept.
    checkpoints: in `shared`.
    logs: one a seed, in the first process.
  """

  seeds: Sequence[int]
  names: Sequence[str]
  folders: Sequence[pathlib.Path | None]
  shared: pathlib.Path | None
  checkpoints: Checkpoints | None
  logs: list[metrics.Log]

  @property
  def what(self) -> str:
    """What they are called together."""
    if len(self.seeds) == 1:
      return self.names[0]
    return f"{self.names[0]} to {self.seeds[-1]}"

  def write(self, rows: list[list[dict]]) -> None:
    """Appends the rows of each seed."""
    for log, own in zip(self.logs, rows):
      log.write(own)

  def save(self, number: int, state: State, top: float | None) -> None:
    """Starts to save a checkpoint, whose rows are on the disk."""
    if self.checkpoints is None:
      return
    for log in self.logs:
      log.sync()
    self.checkpoints.save(number, state, top)

  def preempted(self, number: int, total: int) -> distributed.Preempted:
    """What to raise when all that was saved is on the disk."""
    saved = "stopped"
    if self.checkpoints is not None:
      self.checkpoints.wait()
      saved = "stopped and saved"
    return distributed.Preempted(
      f"{self.what}: {saved} after step {number:,} of {total:,}"
    )

  def show(self, bar: Any, rows: Sequence[dict], rates: speed.Rates) -> None:
    """The last row of the first seed, and how fast it came."""
    bar.set_postfix_str(speed.postfix(rows[-1]["loss"], rates), refresh=False)
    bar.update(len(rows))
    for log in self.logs:
      log.speed({"step": rows[-1]["step"], **rates._asdict()})
