"""A process of test_distributed.py: ADDRESS COUNT PROCESS FILE."""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np

from retrieval_aug.common import distributed, group
from retrieval_aug.common.errors import UserError


def two(address: str, index: int) -> None:
  """Process 0, which has the store of both, ends first."""
  distributed.start(address, 2, index, timeout=60, barrier_timeout=30)
  if index == 0:
    raise UserError("an error of process 0 alone")
  distributed.barrier("never")


def three(address: str, index: int, path: pathlib.Path) -> None:
  """All that processes do together; at the end process 1 fails."""
  found = {}

  def tell(**what) -> None:
    found.update(what)
    path.write_text(json.dumps(found))

  group.GRACE = 1.0
  distributed.start(address, 3, index, timeout=60, barrier_timeout=30)
  first = distributed.is_first()
  tell(role=[distributed.process(), distributed.processes(), first])
  distributed.barrier("again")
  distributed.barrier("again")
  distributed.agree("same", "the seed")
  value = "odd" if index == 1 else "usual"
  tell(agree=error_of(lambda: distributed.agree(value, "the settings")))
  tell(place=error_of(lambda: distributed.barrier(f"at {max(index, 1)}")))
  tell(stopped=steps_until_stopped(index), sigterm=is_sigterm_caught())

  if index == 1:
    time.sleep(1.5)
  start = time.monotonic()
  late = error_of(lambda: distributed.barrier("late", timeout=0.3))
  tell(late=late, waited=time.monotonic() - start)

  devices = jax.make_mesh((3,), ("data",))
  split = jax.sharding.NamedSharding(devices, jax.P("data"))
  ones = jax.make_array_from_process_local_data(split, np.ones(1, np.float32))
  total = jax.jit(lambda x: x.sum())
  tell(total=float(total(ones)))
  if index == 1:
    raise UserError("an error of process 1 alone")
  if index == 2:
    time.sleep(60)  # as a computation would, that waits for process 1
  with distributed.collectives():
    for _ in range(10**9):
      total(ones).block_until_ready()


def error_of(call) -> str | None:
  try:
    call()
  except UserError as error:
    return str(error)
  return None


def steps_until_stopped(index: int) -> int:
  """Steps that end together, as those of a training do."""
  with distributed.Preemption() as preemption:
    for step in range(1, 1000):
      distributed.barrier("step")
      if index == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      if preemption.reached(step):
        return step
      time.sleep(0.01)
  return -1


def is_sigterm_caught() -> bool:
  """Whether any handler, of Python or C++, is in place (Linux)."""
  status = pathlib.Path("/proc/self/status").read_text()
  caught = int(status.split("SigCgt:")[1].split()[0], 16)
  return bool(caught >> (signal.SIGTERM - 1) & 1)


if __name__ == "__main__":
  address, count, index, path = sys.argv[1:]
  try:
    if count == "2":
      two(address, int(index))
    else:
      three(address, int(index), pathlib.Path(path))
  except UserError as error:
    sys.exit(f"error: {error}")
