"""A trace of a few steps, for TensorBoard's profiler or XProf."""

import pathlib
import re
from typing import Any

import jax

from retrieval_aug.common import progress
from retrieval_aug.common.errors import UserError


def parse_window(window: str) -> tuple[int, int] | None:
  """First and last step of a window such as "10:15"; None for "".

  Raises:
    UserError: it is no such window.
  """
  if not window:
    return None
  match = re.fullmatch(r"(\d+):(\d+)", window, re.ASCII)
  if match is not None:
    first, last = map(int, match.groups())
    if 1 <= first <= last:
      return first, last
  raise UserError(
    f"config.log.profile={window}: must be FIRST:LAST, two steps counted from "
    "1, for example 10:15; leave it empty to trace none."
  )


class Profiler:
  """Traces the steps of a window, once."""

  def __init__(self, window: str, folder: pathlib.Path):
    """Nothing is traced yet.

    Args:
      window: "FIRST:LAST", both included; "" for none.
      folder: where the trace goes.

    Raises:
      UserError: the window is malformed.
    """
    self._window = parse_window(window)
    self._folder = folder
    self._tracing = False
    self._done = self._window is None

  def step(self, number: int, wait_for: Any = None) -> None:
    """Starts or ends the trace; called before each step.

    Args:
      number: of the step that begins, from 1.
      wait_for: what the step before gave. Steps run while the host goes on,
        so the trace begins and ends when these arrays are there.
    """
    if self._done:
      return
    first, last = self._window
    if number > last:
      self.close(wait_for)
    elif number >= first and not self._tracing:
      jax.block_until_ready(wait_for)
      jax.profiler.start_trace(self._folder)
      self._tracing = True

  def close(self, wait_for: Any = None) -> None:
    """Ends the trace if the window goes on past the last step.

    Args:
      wait_for: see `step`.
    """
    if self._done:
      return
    self._done = True
    if not self._tracing:
      first, last = self._window
      progress.note(
        f"config.log.profile={first}:{last}: none of these steps was among "
        "those of this process; nothing is traced"
      )
      return
    jax.block_until_ready(wait_for)
    jax.profiler.stop_trace()
    progress.note(
      f"profile: {self._folder}; pip install xprof, then xprof --logdir "
      f"{self._folder}, or tensorboard --logdir {self._folder}"
    )
