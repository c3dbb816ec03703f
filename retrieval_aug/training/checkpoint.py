"""Orbax checkpoints of a training run, and the final parameters as one file."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy

from retrieval_aug.common import files
from retrieval_aug.common.errors import UserError

_METRIC = "metric"

# How TensorStore tells what the operating system told it.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


class Checkpoints:
  """Saves a state now and then; keeps the latest one, and the best.

  Saving is asynchronous. A context manager: leaving it waits for the last save
  to be on disk. Several processes make one each, and call everything alike.
  """

  def __init__(self, folder: pathlib.Path, *, best: bool = False):
    """Makes the folder.

    Args:
      folder: of all checkpoints of a run.
      best: whether some are saved with a metric, and the best is kept.
    """
    self._folder = folder.absolute()
    metric = lambda metrics: metrics[_METRIC]
    policies = [preservation_policy.LatestN(1)]
    if best:
      policies.append(
        preservation_policy.BestN(
          get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False
        )
      )
    keep = preservation_policy.AnyPreservationPolicy(policies)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=metric if best else None,
        cleanup_tmp_directories=True,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_):
    with self._saving():
      self._manager.wait_until_finished()
      self._manager.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    """Turns a failed write of now or before into an `OSError`."""
    try:
      yield
    except Exception as error:
      found = _OS_ERROR.search(str(error))
      if found is None:
        raise
      code = int(found[1])
      raise OSError(code, os.strerror(code), str(self._folder)) from error

  def save(self, step: int, state: Any, metric: float | None = None) -> None:
    """Starts writing `state`; training goes on meanwhile.

    Args:
      step: steps done.
      state: of arrays, on any devices of any processes.
      metric: of which the best state has the largest; None is not compared.

    Raises:
      OSError: this state or the one before cannot be written: `ENOSPC` where
        the disk is full. Older ones stay.
    """
    metrics = None if metric is None else {_METRIC: metric}
    args = ocp.args.StandardSave(state)
    with self._saving():
      self._manager.save(step, args=args, metrics=metrics)

  def wait(self) -> None:
    """Until the last save is on disk; raises as `save` does."""
    with self._saving():
      self._manager.wait_until_finished()

  def restore(self, like: Any, *, best: bool = False) -> tuple[int, Any]:
    """The latest (step, state), or (0, like) where there is none.

    Args:
      like: a state with the shapes, types and shardings that are wanted; those
        that it was saved with do not matter.
      best: the one with the largest metric instead.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    manager = self._manager
    step = manager.best_step() if best else manager.latest_step()
    if step is None:
      return 0, like
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      state = manager.restore(step, args=ocp.args.StandardRestore(target))
    except Exception as error:
      reason = re.sub(r"\s+", " ", str(error))[:160]
      raise UserError(
        f"{self._folder / str(step)}: this checkpoint cannot be restored "
        f"({type(error).__name__}: {reason}); delete {self._folder.parent} to "
        "train this run again."
      ) from error
    return step, state


def save_params(path: pathlib.Path, params: Any) -> None:
  """Writes parameters to an `.npz` with names like `fusion/layer_0/...`."""
  flat = traverse_util.flatten_dict(params, sep="/")
  with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
    np.savez(f, **{n: np.asarray(x) for n, x in flat.items()})


def load_params(path: pathlib.Path) -> Any:
  """Reads what `save_params` wrote."""
  with np.load(path, allow_pickle=False) as data:
    return traverse_util.unflatten_dict(dict(data), sep="/")
