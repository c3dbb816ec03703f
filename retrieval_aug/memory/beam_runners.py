"""Runners of Apache Beam: options checked, workers of this machine started.

Two runners need nothing but this machine: FnApiRunner, and DaskRunner with a
cluster that is started here. To all others, and to a Dask cluster of the
user's, the options go as they are.
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from retrieval_aug.common.errors import UserError

_LOCAL = ("FnApiRunner", "DaskRunner")
_WORKERS = "--dask_workers"  # ours: how many processes a local cluster has
_PROCESSES = "--direct_running_mode=multi_processing"
# With a handler there, a log before any set-up does not add one that prints.
_PRELOAD = """
import logging
logging.getLogger().addHandler(logging.NullHandler())
"""
_WORKER = f"""
import runpy
{_PRELOAD}
runpy.run_module("apache_beam.runners.worker.sdk_worker_main", None, "__main__")
"""
_BEAM_THREADS = ("beam_control_read", "read_grpc_client_inputs", "run_worker")
# What runners say when there is no cluster, or none that takes work.
_UNREACHABLE = re.compile(
  "Timed out (trying to connect|during handshake)|FutureTimeoutError|"
  "failed to connect to all addresses|Unable to fetch remote job server jar"
)


@dataclasses.dataclass(frozen=True)
class Runner:
  """A runner and its options.

  Attributes:
    name: of the runner, as Beam has it.
    flags: options of Beam, checked as far as its argument parser can.
    workers: processes on this machine; 0 if they are elsewhere.
    slots: into how many partitions Dask deals units; 1 for all others, which
      deal them one by one.
  """

  name: str
  flags: tuple[str, ...]
  workers: int
  slots: int

  @property
  def is_dask(self) -> bool:
    return self.name == "DaskRunner"

  @contextlib.contextmanager
  def started(self) -> Iterator[Any]:
    """Yields an empty pipeline; a cluster of this machine ends with the body.

    Where the workers are here, the logs of Beam and Dask stay quiet: what
    matters is in what they raise.
    """
    with contextlib.ExitStack() as stack:
      if self.workers:
        stack.enter_context(_quiet())
        stack.enter_context(_quiet_threads())
        stack.enter_context(_environment(self.workers))
      flags = list(self.flags)
      if self.is_dask and self.workers:
        cluster = stack.enter_context(_dask_cluster(self.workers))
        flags.append(f"--dask_client_address={cluster.scheduler_address}")
      yield self._pipeline(flags)

  def _pipeline(self, flags: list[str]) -> Any:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms import environments

    runner = None
    if _PROCESSES in flags:
      # Not as Beam starts its workers with this option: they would print all
      # that they log.
      flags.remove(_PROCESSES)
      subprocesses = environments.SubprocessSDKEnvironment
      command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(_WORKER)}"
      runner = FnApiRunner(subprocesses.from_command_string(command))
    try:
      return beam.Pipeline(runner, PipelineOptions(flags))
    except ValueError as error:  # no such runner, or it misses options
      raise UserError(
        f"Beam options {' '.join(flags)}: {_one_line(str(error))}"
      ) from error

  def execute(self, pipeline: Any, close: Callable[[], None]) -> None:
    """Runs a pipeline and waits for its end.

    Args:
      pipeline: with the options that `started` yielded.
      close: to be called in each worker of Dask when all is done.

    Raises:
      UserError: the cluster cannot be reached, or it ended the pipeline.
    """
    try:
      result = pipeline.run()
    except Exception as error:
      text = f"{type(error).__name__}: {error}"
      if _UNREACHABLE.search(text):
        raise UserError(
          f"--runner={self.name}: the cluster cannot be reached "
          f"({_one_line(text)}); is its address right, and does it run?"
        ) from error
      raise
    try:
      state = result.wait_until_finish()
      if self.is_dask:
        result.client.run(close)
    except KeyboardInterrupt:
      result.cancel()  # a cluster would go on without its driver
      raise
    finally:
      if self.is_dask:
        result.client.close()
    if state != "DONE":
      raise UserError(
        f"--runner={self.name}: the pipeline ended as {state}; the same "
        "command goes on and redoes no finished unit."
      )


def parse(options: Sequence[str]) -> Runner:
  """The runner that Beam options ask for; FnApiRunner if they name none.

  Args:
    options: of Beam, each "--name=value" or "--name". One is ours:
      --dask_workers, the number of processes of a local Dask cluster, which is
      started where no --dask_client_address and no --dask_scheduler_file is
      given; as many as there are cores if it is left out.

  Raises:
    UserError: Beam is not installed, or an option is wrong.
  """
  _check_installed("apache_beam")
  for option in options:
    if not option.startswith("--"):
      raise UserError(f"Beam option {option!r}: write it as --name=value.")
  given = dict(option.partition("=")[::2] for option in options)
  name = given.get("--runner", "FnApiRunner").rpartition(".")[2]
  # DirectRunner, which is what Beam takes by default, first tries to download
  # another runner.
  flags = [
    o for o in options if o.partition("=")[0] not in ("--runner", _WORKERS)
  ]
  # Beam knows all its runners by their names alone, but for this one.
  package = "apache_beam.runners.dask.dask_runner."
  asked = given.get("--runner", name)
  flags.append(f"--runner={package + name if name == 'DaskRunner' else asked}")
  known = _parse_arguments(flags, strict=name in _LOCAL)
  if _WORKERS in given and name != "DaskRunner":
    raise UserError(f"Beam option {_WORKERS}: goes with --runner=DaskRunner.")
  if name == "FnApiRunner":
    workers = known.direct_num_workers or cores()
    if workers > 1 and "--direct_running_mode" not in given:
      flags.append(_PROCESSES)
    return Runner(name, tuple(flags), workers, 1)
  if name != "DaskRunner":
    return Runner(name, tuple(flags), 0, 1)
  _check_installed("distributed")
  elsewhere = {"--dask_client_address", "--dask_scheduler_file"} & set(given)
  workers = 0 if elsewhere else _count(given.get(_WORKERS, str(cores())))
  slots = known.npartitions or 4 * (workers or 64)
  if known.npartitions is None:
    flags.append(f"--dask_npartitions={slots}")
  return Runner(name, tuple(flags), workers, slots)


def cores() -> int:
  """The cores that this process may use."""
  return len(os.sched_getaffinity(0))


def _one_line(text: str) -> str:
  return re.sub(r"\s+", " ", text).strip()[:300]


def _check_installed(module: str) -> None:
  import importlib

  try:
    with _quiet():
      importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f"Beam pipelines need a package that cannot be imported ({error}); pip "
      "install 'retrieval_aug[scale]'."
    ) from error


def _count(text: str) -> int:
  if not text.isdecimal() or not int(text):
    raise UserError(f"Beam option {_WORKERS}={text}: not a number from 1 on.")
  return int(text)


def _parse_arguments(flags: list[str], *, strict: bool) -> Any:
  """Beam's own reading of options, which may end the process, in an error.

  Args:
    flags: the options.
    strict: whether an option that Beam does not know is an error; a cluster
      may have some of its own.
  """
  from apache_beam.options import pipeline_options
  from apache_beam.runners.dask import dask_runner  # adds its options

  del dask_runner
  parser = pipeline_options._BeamArgumentParser(allow_abbrev=False)
  for cls in pipeline_options.PipelineOptions.__subclasses__():
    cls._add_argparse_args(parser)
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      known, unknown = parser.parse_known_args(flags)
  except SystemExit:
    reason = said.getvalue().strip().rpartition("error: ")[2]
    raise UserError(f"Beam options: {reason}.") from None
  if strict and unknown:
    name = unknown[0].partition("=")[0]
    names = [n for a in parser._actions for n in a.option_strings]
    near = difflib.get_close_matches(name, [*names, _WORKERS], 1)
    raise UserError(
      f"Beam option {name}: unknown"
      + (f"; did you mean {near[0]}?" if near else ".")
    )
  return known


@contextlib.contextmanager
def _dask_cluster(workers: int) -> Iterator[Any]:
  """Starts worker processes of Dask on this machine."""
  import dask
  from dask import distributed

  # No limit on memory: Dask would kill a worker whose memory-mapped files fill
  # the page cache. What a unit takes, the settings bound.
  with (
    dask.config.set({"logging.distributed": "critical"}),
    distributed.LocalCluster(
      n_workers=workers,
      threads_per_worker=1,
      memory_limit=0,
      dashboard_address=None,
      preload=[_PRELOAD],
      silence_logs=logging.CRITICAL,
    ) as cluster,
  ):
    yield cluster


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
  """Drops what Beam's own threads raise when a worker dies.

  The pipeline raises it too.
  """
  before = threading.excepthook

  def hook(args):
    if args.thread is None or args.thread.name not in _BEAM_THREADS:
      before(args)

  threading.excepthook = hook
  try:
    yield
  finally:
    threading.excepthook = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Lets nothing of what libraries log through."""
  handler = logging.NullHandler()
  logging.getLogger().addHandler(handler)
  before = logging.root.manager.disable
  logging.disable(logging.CRITICAL)
  try:
    yield
  finally:
    logging.disable(before)
    logging.getLogger().removeHandler(handler)


@contextlib.contextmanager
def _environment(workers: int) -> Iterator[None]:
  """What worker processes of this machine inherit.

  They find the modules that this process found. Each gets its part of the
  cores, or as many threads as there are cores would run in every one, and
  takes memory of an accelerator as it needs it, or the first would take all.
  """
  if not workers:
    yield
    return
  threads = str(max(1, cores() // workers))
  wanted = {
    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    "NPROC": threads,  # XLA
    "OMP_NUM_THREADS": threads,
    "OPENBLAS_NUM_THREADS": threads,
    "MKL_NUM_THREADS": threads,
    "TF_NUM_INTRAOP_THREADS": threads,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  before = {name: os.environ.get(name) for name in wanted}
  os.environ.update(
    {n: v for n, v in wanted.items() if n == "PYTHONPATH" or not before[n]}
  )
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        os.environ.pop(name, None)
      else:
        os.environ[name] = value
