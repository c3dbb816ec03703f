"""Several processes that train together: start, wait, agree, stop.

With one process nothing here does anything, and JAX is not started. With
several, a process that fails ends the others too, each with one line that
names it: at once, or `HEARTBEAT` seconds later if it was killed. (If process 0
is killed, they end at once in JAX's own words: "the leader task was preempted
or died".)
"""

import atexit
import collections
import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from retrieval_aug.common import rendezvous
from retrieval_aug.common.errors import UserError
from retrieval_aug.common.group import (
  GRACE,
  POLL,
  Group,
  by_environment,
)
from retrieval_aug.common.rendezvous import names
from retrieval_aug.common.stopping import StopTogether

# Exit code of a run that SIGTERM stopped after all was saved: EX_TEMPFAIL, "try
# again". The same command goes on.
EXIT_PREEMPTED = 75

# Seconds without a sign of life after which a process is dead, as JAX has it.
HEARTBEAT = 100

# What a computation says that cannot reach another process.
_NETWORK = re.compile(
  "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|heartbeat"
)

_group: Group | None = None


class Preempted(Exception):
  """SIGTERM ended the run early and all was saved: see `EXIT_PREEMPTED`."""


def start(
  coordinator: str = "",
  num_processes: int = 0,
  process_id: int = -1,
  *,
  auto: bool = False,
  timeout: float = 300,
  barrier_timeout: float = 600,
  heartbeat: float = HEARTBEAT,
) -> None:
  """Joins the other processes, before anything of JAX is used.

  Nothing given: this process is alone, and nothing happens. So it is where
  there is but one process.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which of them this is, from 0.
    auto: the environment says all that: a TPU pod, Slurm, Kubernetes, Open MPI.
    timeout: seconds to wait until all processes are there.
    barrier_timeout: seconds to wait at a `barrier`.
    heartbeat: seconds without a sign of life after which a process is dead.

  Raises:
    UserError: flags that are missing or contradict each other, an environment
      that says nothing, or processes that do not come.
  """
  global _group
  if _group is not None:
    raise RuntimeError("distributed.start was called before")
  given, local_devices = _given(coordinator, num_processes, process_id), None
  if auto:
    if given is not None:
      raise UserError(
        "--distributed finds out the processes by itself; leave out "
        "--coordinator, --num_processes and --process_id, or --distributed."
      )
    *given, local_devices = by_environment(timeout)
  if given is None or given[1] == 1:
    return
  address, count, index = given
  rendezvous.meet(address, count, index, timeout)
  group = Group(index, count, barrier_timeout, heartbeat)
  group.connect(address, local_devices)
  atexit.register(group.fail)
  _group = group


def _given(
  coordinator: str, num_processes: int, process_id: int
) -> tuple[str, int, int] | None:
  """The three flags, if they are given."""
  missing = {
    "--coordinator=HOST:PORT": not coordinator,
    "--num_processes=N": num_processes == 0,
    "--process_id=I": process_id == -1,
  }
  if all(missing.values()):
    return None
  if any(missing.values()):
    left_out = " and ".join(flag for flag in missing if missing[flag])
    raise UserError(
      f"{left_out} missing: several processes need all of --coordinator, "
      "--num_processes and --process_id, or --distributed alone."
    )
  rendezvous.parse(coordinator)
  if not 0 <= process_id < num_processes:
    raise UserError(
      f"--num_processes={num_processes} --process_id={process_id}: expected "
      "ids from 0 to the number of processes less one."
    )
  return coordinator, num_processes, process_id


def process() -> int:
  """Which of the processes this is; 0 if there is but one."""
  return 0 if _group is None else _group.index


def processes() -> int:
  """How many processes there are."""
  return 1 if _group is None else _group.count


def is_first() -> bool:
  """Whether this process is the one that writes."""
  return process() == 0


def barrier(name: str, timeout: float | None = None) -> None:
  """Waits until all processes are here.

  Args:
    name: of the place, for messages; it may be used again.
    timeout: seconds; by default the `barrier_timeout` of `start`.

  Raises:
    UserError: a process did not come in time or has ended, or they came to
      different places.
  """
  if _group is not None:
    _group.exchange(name, timeout=timeout)


def agree(value: int | str | dict[str, Any], what: str) -> None:
  """Raises a `UserError` in all processes unless `value` is the same in all.

  Args:
    value: for example a fingerprint; of a dict, the first entry that differs is
      named.
    what: its name, for messages.
  """
  if _group is None:
    return
  told = _group.exchange(what, json.dumps(value, default=str))
  told = [json.loads(x) for x in told]
  if not isinstance(value, dict):
    _compare([str(x) for x in told], what)
    return
  for name in sorted(set().union(*told)):
    _compare([str(x.get(name, "not set")) for x in told], name)


def _compare(values: list[str], what: str) -> None:
  """Raises a `UserError` that names the processes whose value is odd."""
  usual = collections.Counter(values).most_common(1)[0][0]
  odd = [i for i, x in enumerate(values) if x != usual]
  if odd:
    others = set(range(len(values))) - set(odd)
    raise UserError(
      f"{what}: {values[odd[0]]} in {names(odd)}, but {usual} in "
      f"{names(others)}; start all with the same command and files."
    )


@contextlib.contextmanager
def collectives() -> Iterator[None]:
  """Turns what a computation says when another process dies into a `UserError`.

  It says so at once, but who died is known after the heartbeat at the latest.
  """
  try:
    yield
  except (RuntimeError, ValueError) as error:
    if _group is None or not _NETWORK.search(str(error)):
      raise
    deadline = time.monotonic() + _group.heartbeat + GRACE
    while not _group.gone and time.monotonic() < deadline:
      time.sleep(POLL)
    if not _group.gone:
      raise
    raise UserError(_group.ended()) from error


def shutdown() -> None:
  """Leaves the others at the end of the work, when all have come to it.

  A process that ends without it has failed, in the eyes of the others. What
  `process` and `processes` say stays.
  """
  if _group is not None:
    _group.finish()


class Preemption:
  """While entered, SIGTERM asks for a stop instead of ending the process.

  A second SIGTERM ends it as usual, and so does one that came too late to stop
  at a step, when this is left. Signals belong to the main thread; in another
  one nothing happens.
  """

  _entered = 0  # how often in this process

  def __init__(self):
    self._asked = self._answered = False
    self._together: StopTogether | None = None

  def __enter__(self) -> "Preemption":
    self._main = threading.current_thread() is threading.main_thread()
    if self._main:
      Preemption._entered += 1
      if _group is not None:
        self._together = StopTogether(_group, str(Preemption._entered))
      self._former = signal.signal(signal.SIGTERM, self._ask)
    return self

  def _ask(self, *_) -> None:
    self._asked = True
    if self._together is not None:
      self._together.ask()
    self._restore()

  def _restore(self) -> None:
    # None: a handler that is not of Python, which cannot be put back.
    signal.signal(signal.SIGTERM, self._former or signal.SIG_DFL)

  def reached(self, step: int) -> bool:
    """Whether to stop now, after the step of this number.

    Of several processes all are told so at the same step, whichever of them
    got the signal; each must ask after every step.
    """
    if self._together is not None:
      self._answered = self._together.reached(step)
    else:
      self._answered = self._asked
    return self._answered

  def __exit__(self, kind, *_) -> None:
    if self._main:
      self._restore()
      if self._together is not None:
        self._together.end()
      if self._asked and not self._answered and kind is None:
        signal.raise_signal(signal.SIGTERM)
