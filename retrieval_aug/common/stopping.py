"""All processes stop after the same step, though only one was asked to.

JAX has a service for this, but it swallows SIGTERM for good, the second one
too (jax 0.10).
"""

import threading

from retrieval_aug.common.group import LOOK, POLL, Group


class StopTogether:
  """An agreement on the step to stop after, made in the background.

  Each process tells the step that it is at and takes no other until all have
  told; the one after the latest of them is then ahead of all. The threads that
  do this need not wait for the steps of any process, so nothing can lock up.
  """

  def __init__(self, group: Group, name: str):
    """Starts to listen.

    Args:
      group: the processes.
      name: of the agreement, the same in all and used once.
    """
    self._group, self._folder = group, f"retrieval_aug/stop/{name}"
    self._asked = False
    self._step = -1
    self._last: int | None = None
    self._lock = threading.Lock()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._agree, daemon=True)
    self._thread.start()

  def ask(self) -> None:
    """Asks for a stop; takes no lock, so a signal may call it."""
    self._asked = True

  def reached(self, step: int) -> bool:
    """Whether this step, which is done, is the one to stop after."""
    with self._lock:
      self._step = step
      return self._last is not None and step >= self._last

  def _agree(self) -> None:
    while not self._is_asked():
      if self._done.wait(LOOK):
        return
    with self._lock:
      self._tell()
      while len(steps := self._group.entries(f"{self._folder}/step")) < (
        self._group.count
      ):
        if self._done.wait(POLL):
          return
      self._last = 1 + max(int(step) for step in steps.values())

  def _is_asked(self) -> bool:
    if self._asked:
      self._group.put(f"{self._folder}/asked", "")
    return bool(self._group.entries(f"{self._folder}/asked"))

  def _tell(self) -> None:
    self._group.put(f"{self._folder}/step", str(self._step))

  def end(self) -> None:
    """Ends the agreement, whether there is one or not."""
    self._done.set()
    self._thread.join()
    # Others may have begun to agree, and would wait for it. What was told
    # before stays.
    self._tell()
