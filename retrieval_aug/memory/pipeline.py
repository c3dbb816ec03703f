"""All of a job through Apache Beam, on many workers that see one folder.

Units find their input and leave their output in files, so what goes through
the pipeline are names of units and counts of failures. Of each phase:

  wait    all units of the phase before have ended
  deal    one worker lists the units that are not done yet
  spread  the runner hands each to a worker
  do      the worker makes the job, once a process, and does the unit

Runners differ in what else they carry out: Dask's has no tagged outputs, no
metrics, and its Reshuffle moves nothing. Hence plain GroupByKeys, and a ledger
of files for what the driver has to know.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from retrieval_aug.common import files, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import beam_runners, jobs
from retrieval_aug.memory.ledger import Ledger, Reader, Ticks, remove

# What runners say when a worker is gone.
_DIED = re.compile(
  "Channel closed prematurely|KilledWorker|exited with return code|"
  "lost contact with the service|SDK harness .*disconnected"
)
# A runner keeps of a worker's OSError its text, not its number.
_FULL = re.compile(
  r"\[Errno \d+\] (No space left on device|Disk quota exceeded|File too large)"
)


@dataclasses.dataclass(frozen=True)
class _Run:
  """What workers are sent: nothing of the job's data.

  Attributes:
    recipe: makes the job.
    ledger: where to tell what was done; its folder's name is the run's.
    keep: whether a process keeps its job till `_close_all`; otherwise the last
      user of the job closes it.
  """

  recipe: Callable[[], jobs.Job]
  ledger: Ledger
  keep: bool


def run(
  recipe: Callable[[], jobs.Job],
  options: Sequence[str],
  job: jobs.Job | None = None,
) -> None:
  """Does all of a job on the workers of a Beam runner.

  A unit that raises a `UserError` is dead: the other units of its phase are
  done, no later phase begins, and `dead_units.jsonl` in the artifact's folder
  has a line with phase, unit and reason for each. Running again does what is
  missing.

  Args:
    recipe: makes the job, and an equal one in any process that sees the same
      folders. It is pickled: a function of an importable module, or a
      `functools.partial` of one.
    options: of Beam, for example ["--runner=FnApiRunner",
      "--direct_running_mode=multi_processing", "--direct_num_workers=2"]; see
      `beam_runners`.
    job: what the recipe makes, if this process has it already.

  Raises:
    UserError: Beam is not installed, an option is wrong, units are dead, or a
      worker died.
  """
  runner = beam_runners.parse(options)
  job = job or recipe()
  folder = job.artifact.folder
  with files.lock(folder), contextlib.closing(job):
    job.artifact.start()
    started = itertools.dropwhile(lambda p: not job.units(p), job.phases())
    phases = list(started)
    if phases:
      run = _Run(recipe, Ledger.new(folder), keep=runner.is_dask)
      try:
        with _own(run, job), _progress(run.ledger, job):
          _execute(runner, run, phases, folder)
      finally:
        dead = _write_dead(folder, run.ledger)
        remove(folder)
      if dead:
        raise UserError(_tell(dead, folder))
    job.finish()
    (folder / jobs.DEAD).unlink(missing_ok=True)


def _execute(
  runner: beam_runners.Runner,
  run: _Run,
  phases: list[str],
  folder: pathlib.Path,
) -> None:
  """Builds the pipeline and waits for its end."""
  try:
    with runner.started() as pipeline:
      _build(pipeline, run, phases, runner.slots)
      runner.execute(pipeline, _close_all)
  except UserError:
    raise
  except Exception as error:
    text = f"{type(error).__name__}: {error}"
    known = re.search(r"UserError: (.*?)( \[while running.*)?$", text, re.M)
    if known:  # a worker's, wrapped by the runner
      raise UserError(known[1]) from error
    full = _FULL.search(text)
    if full:
      raise UserError(
        f"{folder}: a worker has no space left ({full[1]}); nothing that was "
        "finished is lost: free some, and give the same command again."
      ) from error
    if _DIED.search(text):
      raise UserError(
        f"{folder}: a Beam worker died in the middle of a unit (killed, or "
        "out of memory); the same command goes on and redoes no finished "
        "unit. If it dies again, use fewer workers or smaller shards."
      ) from error
    raise


def _build(pipeline: Any, run: _Run, phases: list[str], slots: int) -> None:
  """Adds the steps of some phases; their elements are (key, anything)."""
  import apache_beam as beam

  # Inside a function, as Beam is: so they are pickled whole, and must leave
  # what they share in a process to functions of this module.
  class Step(beam.DoFn):
    def __init__(self, phase):
      self.phase = phase

    def setup(self):
      self.share = _Share(run)

    def teardown(self):
      self.share.close()

  class Deal(Step):
    def process(self, element):
      yield from _deal(self.share, run.ledger, self.phase, sum(element[1]))

  class Do(Step):
    def start_bundle(self):
      self.ended = run.ledger.ended()

    def process(self, element):
      for unit, failures in element[1]:
        name = self.phase, unit
        if unit is None:
          yield 0, failures
        elif name in self.ended and self.ended[name] is None:
          yield 0, 0  # done, in a bundle that failed later
        else:
          yield 0, _do(self.share, run.ledger, *name)

  pair = tuple[int, Any]
  # As many elements as partitions: Dask never makes more of them.
  steps = pipeline | beam.Create([(0, 0)] * slots)
  for phase in phases:
    steps = (
      steps
      | f"{phase}: wait" >> beam.GroupByKey()
      | f"{phase}: deal" >> beam.ParDo(Deal(phase)).with_output_types(pair)
      | f"{phase}: spread" >> beam.GroupByKey()
      | f"{phase}: do" >> beam.ParDo(Do(phase)).with_output_types(pair)
    )


# In each process, by the name of a run: its job, how many shares are out, and
# whether the process is the driver.
_JOBS: dict[str, list] = {}
# One unit at a time in a process, however many threads a runner has: a job
# need not be safe to share between threads.
_BUSY = threading.RLock()


class _Share:
  """A share in the one job that a process makes for a run."""

  def __init__(self, run: _Run):
    self._run = run
    self._taken = False

  @contextlib.contextmanager
  def job(self) -> Iterator[jobs.Job]:
    """The job, for one unit; what a worker prints is the driver's to say."""
    name = self._run.ledger.folder.name
    with _BUSY:
      driver = name in _JOBS and _JOBS[name][2]
      with (
        contextlib.nullcontext()
        if driver
        else contextlib.redirect_stderr(io.StringIO())
      ):
        if name not in _JOBS:
          _JOBS[name] = [self._run.recipe(), 0, False]
        if not self._taken:
          _JOBS[name][1] += 1
          self._taken = True
        yield _JOBS[name][0]

  def close(self) -> None:
    """Gives the share back; the last one closes the job."""
    name = self._run.ledger.folder.name
    with _BUSY:
      if not self._taken or self._run.keep or name not in _JOBS:
        return
      self._taken = False
      _JOBS[name][1] -= 1
      if not _JOBS[name][1]:
        _JOBS.pop(name)[0].close()


def _close_all() -> None:
  """Closes the jobs that a process has kept; runs in workers of Dask."""
  with _BUSY:
    while _JOBS:
      _JOBS.popitem()[1][0].close()


@contextlib.contextmanager
def _own(run: _Run, job: jobs.Job) -> Iterator[None]:
  """Lets workers that are threads of this process use the driver's job."""
  name = run.ledger.folder.name
  _JOBS[name] = [job, 1, True]
  try:
    yield
  finally:
    _JOBS.pop(name)


def _deal(
  share: _Share, ledger: Ledger, phase: str, failures: int
) -> Iterator[tuple[int, tuple[str | None, int]]]:
  """The units of a phase, each under a key of its own; none after failures.

  The first element is no unit: it brings the failures to the next phase, which
  would not begin at all without an element.
  """
  units = [] if failures else ledger.dealt(phase)
  if units is None:
    units = []
    try:
      with share.job() as job:
        names = job.units(phase)
        size = sum(job.size(phase, unit) for unit in names)
      ledger.deal(phase, names, size)
      units = names
    except UserError as error:
      ledger.end(phase, "", str(error), 0)
      failures += 1
  yield 0, (None, failures)
  for i, unit in enumerate(units):
    yield i, (unit, 0)


def _do(share: _Share, ledger: Ledger, phase: str, unit: str) -> int:
  """Does a unit; returns how many failed."""
  ticks, size, dead = Ticks(ledger, phase), 0, None
  try:
    with share.job() as job:
      size = job.size(phase, unit)
      job.do(phase, unit, ticks)
  except UserError as error:
    dead = str(error)
  ledger.end(phase, unit, dead, size - ticks.told)
  return int(dead is not None)


def _write_dead(folder: pathlib.Path, ledger: Ledger) -> list[dict]:
  """Writes the dead units of a run, if any; returns them in order."""
  dead = [
    {"phase": phase, "unit": unit, "reason": reason}
    for (phase, unit), reason in sorted(ledger.ended().items())
    if reason is not None
  ]
  if dead:
    text = "".join(json.dumps(line) + "\n" for line in dead)
    files.write_bytes(folder / jobs.DEAD, text.encode())
  return dead


def _tell(dead: list[dict], folder: pathlib.Path) -> str:
  named = [
    f"{line['unit'] or line['phase']}: {line['reason'].rstrip('.')}"
    for line in dead
  ]
  more = f"; and {len(dead) - 3} more" if len(dead) > 3 else ""
  units = "1 unit" if len(dead) == 1 else f"{len(dead)} units"
  return (
    f"{folder / jobs.DEAD}: {units} failed ({'; '.join(named[:3])}{more}); "
    "what else could be done is done. Mend what the file names and run the "
    "same command again."
  )


@contextlib.contextmanager
def _progress(ledger: Ledger, job: jobs.Job) -> Iterator[None]:
  """Shows a progress bar for each phase, from what workers write."""
  reader, over = Reader(ledger), threading.Event()
  sizes: dict[str, int] = {}
  did: collections.Counter[str] = collections.Counter()
  bars: dict[str, Any] = {}

  def show() -> None:
    for line in reader.new():  # files of several processes, in no order
      sizes[line["phase"]] = line.get("size") or sizes.get(line["phase"], 0)
      did[line["phase"]] += line.get("did", 0)
    for phase in job.phases():
      if not sizes.get(phase):
        continue
      if phase not in bars:
        for former in bars.values():
          former.close()
        bars[phase] = progress.bar(
          total=sizes[phase], what=job.what, unit=job.counted
        )
      # What was done twice counts once.
      bars[phase].update(min(did[phase], sizes[phase]) - bars[phase].n)

  def watch() -> None:
    while not over.wait(1.0):
      show()

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
    show()
    for bar in bars.values():
      bar.close()
