"""Offline work in units that depend on nothing but files.

The embed, search and gather stages are jobs: what a unit does is one function
of its name, whoever calls it. `run` calls them in a plain loop; `pipeline.py`
has Apache Beam call them on many workers, which see the same folders. A unit
leaves its result in a file and a record of it, so that a killed job redoes no
finished unit, and doing one twice changes no byte.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol

from retrieval_aug.common import files, manifest, progress

# In an artifact's folder: units that failed on a cluster, and why.
DEAD = "dead_units.jsonl"


class Job(Protocol):
  """Work that fills the folder of one artifact.

  Attributes:
    artifact: what is made.
    what: a label for messages, for example "embed memory".
    counted: what the size of a unit counts, for example "image".
  """

  artifact: manifest.Artifact
  what: str
  counted: str

  def announce(self) -> None:
    """Says what there is to do, and what it will take."""

  def phases(self) -> list[str]:
    """Names of the phases; one begins when all before it are done."""

  def units(self, phase: str) -> list[str]:
    """The units of a phase that are not done yet; all phases before it are."""

  def size(self, phase: str, unit: str) -> int:
    """How much there is in a unit, for a progress bar."""

  def do(self, phase: str, unit: str, tick: Callable[[int], None]) -> None:
    """Does one unit, and records it.

    Args:
      phase: one of `phases`.
      unit: one of its `units`.
      tick: is told how much was done since it was last called.

    Raises:
      UserError: the unit cannot be done.
    """

  def finish(self) -> None:
    """Marks the artifact complete; all units are done."""

  def close(self) -> None:
    """Ends threads and processes that units were done with, if any."""


def run(job: Job) -> None:
  """Does all of a job in this process, in order.

  Raises:
    UserError: what a unit raises; those before it stay done.
  """
  with files.lock(job.artifact.folder), contextlib.closing(job):
    job.artifact.start()
    for phase in job.phases():
      units = job.units(phase)
      total = sum(job.size(phase, unit) for unit in units)
      if not total:
        what = contextlib.nullcontext()
      else:
        what = progress.bar(total=total, what=job.what, unit=job.counted)
      with what as bar:
        for unit in units:
          job.do(phase, unit, bar.update if total else lambda _: None)
    job.finish()
    (job.artifact.folder / DEAD).unlink(missing_ok=True)
