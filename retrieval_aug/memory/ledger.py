"""What the workers of a pipeline did, told through files in one folder.

Runners differ in what they hand back: metrics at the end, or none at all. All
workers see the artifact's folder, so each appends lines to a file of its own
there. The driver reads them for its progress bar and to list the units that
failed; a worker reads them so that a bundle which its runner tries again does
no finished unit twice.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator

from retrieval_aug.common import files
from retrieval_aug.common.errors import UserError

_FOLDER = ".beam"  # in the folder of the artifact, while a pipeline runs
_SECONDS = 1.0  # between two lines about one unit


@dataclasses.dataclass(frozen=True)
class Ledger:
  """The lines of one run of a pipeline.

  Attributes:
    folder: one file of JSON lines a worker process.
  """

  folder: pathlib.Path

  @classmethod
  def new(cls, artifact: pathlib.Path) -> "Ledger":
    """An empty ledger in an artifact's folder; a killed run's goes away.

    Its name is new each time: a worker that has outlived its driver cannot
    write in it.
    """
    remove(artifact)
    folder = artifact / _FOLDER / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return cls(folder)

  def deal(self, phase: str, units: list[str], size: int) -> None:
    """Notes the units of a phase that are to be done, and how much they are."""
    self._check()
    files.write_json(self.folder / f"{phase}.json", units)
    self._append({"phase": phase, "size": size})

  def dealt(self, phase: str) -> list[str] | None:
    """What `deal` noted, if it did.

    Dask may deal a phase again, when it has lost a worker: had its list grown
    shorter since, units would fall between the old list and the new.
    """
    path = self.folder / f"{phase}.json"
    return files.read_json(path) if path.exists() else None

  def did(self, phase: str, amount: int) -> None:
    """Notes that some of a unit is done."""
    self._append({"phase": phase, "did": amount})

  def end(self, phase: str, unit: str, dead: str | None, rest: int) -> None:
    """Notes that a unit ended.

    Args:
      phase: where it is; with unit "" it is the list of its units that failed.
      unit: the unit.
      dead: the reason why it cannot be done; None if it is.
      rest: how much of it has not been told by `did`.
    """
    line = {"phase": phase, "unit": unit, "dead": dead, "did": rest}
    self._append(line)

  def _append(self, line: dict) -> None:
    self._check()
    path = self.folder / f"{_process(os.getpid())}.jsonl"
    with open(path, "ab") as f:
      f.write(json.dumps(line).encode() + b"\n")

  def _check(self) -> None:
    if not self.folder.exists():
      raise UserError(
        f"{self.folder}: not there for a worker; all workers need --workdir at "
        "the same path as the driver."
      )

  def ended(self) -> dict[tuple[str, str], str | None]:
    """(phase, unit) of each unit that ended: None, or why it is dead.

    A unit that was done in any attempt is done.
    """
    found: dict[tuple[str, str], str | None] = {}
    for line in Reader(self).new():
      if "unit" in line:
        name = line["phase"], line["unit"]
        if name not in found or found[name] is not None:
          found[name] = line["dead"]
    return found


class Ticks:
  """Is told how much of a unit was done; writes a line a second at the most.

  Attributes:
    told: how much the ledger knows.
  """

  def __init__(self, ledger: Ledger, phase: str):
    self._ledger, self._phase = ledger, phase
    self._waiting, self._last = 0, time.monotonic()
    self.told = 0

  def __call__(self, amount: int) -> None:
    self._waiting += amount
    if time.monotonic() - self._last < _SECONDS:
      return
    self._ledger.did(self._phase, self._waiting)
    self.told += self._waiting
    self._waiting, self._last = 0, time.monotonic()


@functools.cache
def _process(pid: int) -> str:
  """A name no other process has; pids repeat in containers."""
  return f"{pid}-{uuid.uuid4().hex}"


class Reader:
  """Reads a ledger that is being written."""

  def __init__(self, ledger: Ledger):
    self._folder = ledger.folder
    self._offsets: dict[str, int] = {}

  def new(self) -> Iterator[dict]:
    """Lines that were not there at the last call; half a line waits."""
    for path in sorted(self._folder.glob("*.jsonl")):
      with open(path, "rb") as f:
        f.seek(self._offsets.get(path.name, 0))
        text = f.read()
      whole = text.rfind(b"\n") + 1
      self._offsets[path.name] = self._offsets.get(path.name, 0) + whole
      for line in text[:whole].splitlines():
        yield json.loads(line)


def remove(artifact: pathlib.Path) -> None:
  """Removes the ledgers in an artifact's folder."""
  shutil.rmtree(artifact / _FOLDER, ignore_errors=True)
