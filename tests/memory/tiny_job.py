"""A job of two phases whose units write squares, then their sums.

Workers import it; so it stands in a file of its own. What a unit is to suffer
is the content of a file of its name in the folder of faults.
"""

import collections
import errno
import functools
import os
import pathlib
import shutil
import signal
import sys

from retrieval_aug.common import files, manifest
from retrieval_aug.common.errors import UserError

ROWS = 10  # of each unit
COUNTS = {"square": 6, "sum": 2}


class TinyJob:
  what = "tiny"
  counted = "row"

  def __init__(self, folder, faults):
    self.artifact = manifest.Artifact(folder, "tiny", {"counts": COUNTS})
    self.faults = faults

  def phases(self):
    return list(COUNTS)

  def units(self, phase):
    self._suffer(phase)
    names = unit_names(phase)
    return [u for u in names if self.artifact.recorded(u) is None]

  def size(self, phase, unit):
    return ROWS

  def do(self, phase, unit, tick):
    with open(self.faults / "log", "a") as f:
      f.write(f"{unit} {os.getpid()}\n")
    self._suffer(unit)
    tick(ROWS // 2)
    i = int(unit[-1])
    if phase == "square":
      value = i * i
    else:
      squares = unit_names("square")[i::2]
      value = sum(int((self.artifact.folder / u).read_text()) for u in squares)
    files.write_bytes(self.artifact.folder / unit, str(value).encode())
    self.artifact.record(unit, [unit])

  def finish(self):
    self.artifact.finish([u for p in COUNTS for u in unit_names(p)])

  def close(self):
    with open(self.faults / "closed", "a") as f:
      f.write(f"{os.getpid()}\n")

  def _suffer(self, name):
    fault = self.faults / name
    kind = fault.read_text() if fault.exists() else ""
    if kind == "user":
      raise UserError(f"{name}.txt: bad; mend it.")
    if kind == "bug":
      raise ZeroDivisionError("a bug")
    if kind == "full":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
    if kind == "blind":  # what another machine with other folders would see
      shutil.rmtree(self.artifact.folder / ".beam")
    if kind == "kill":
      fault.unlink()
      os.kill(os.getpid(), signal.SIGKILL)
    if kind == "lock":
      try:
        with files.lock(self.artifact.folder):
          raise AssertionError("nobody holds the folder")
      except UserError:
        fault.unlink()


def unit_names(phase):
  return [f"{phase}-{i}" for i in range(COUNTS[phase])]


def make(folder, faults):
  return TinyJob(pathlib.Path(folder), pathlib.Path(faults))


def began(faults):
  """How often each unit began, in the order of their first times."""
  lines = (pathlib.Path(faults) / "log").read_text().splitlines()
  return collections.Counter(line.split()[0] for line in lines)


def main(folder, faults, *options):
  import tiny_job  # not __main__, which workers do not have

  from retrieval_aug.memory import pipeline

  try:
    pipeline.run(functools.partial(tiny_job.make, folder, faults), options)
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(*sys.argv[1:])
