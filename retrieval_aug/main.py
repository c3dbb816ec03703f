"""The main job: runs the missing stages of an experiment, in order.

python -m retrieval_aug.main --config=configs/emoji.py --workdir=DIR

Stages: embed, search, train, evaluate, report. What is finished is not done
again; what was made from other settings is refused, never reused. Any setting
can be given on the command line: --config.model.name=mam. Of lists, such as
--config.sweep.train.learning_rate=1e-3,3e-4, every combination is trained and
evaluated, in `sweep/` of the folder.

With --beam the stages embed and search run on Apache Beam; with --estimate
nothing runs, and what they would need is printed. Several processes train
together with --distributed, or --coordinator, --num_processes and --process_id;
see docs/training.md.

Exit codes: 0 done; 1 an error, in one line; 75 stopped by SIGTERM with all
saved: the same command goes on.
"""

import contextlib
import errno
import pathlib
import re
import runpy
import shlex
import sys
import time
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from retrieval_aug.common import distributed, files, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.experiment import Experiment
from retrieval_aug.memory import pipeline
from retrieval_aug.retrieval.stages import Runner, run_here
from retrieval_aug.settings import changed, check_overrides

STAGES = ("embed", "search", "train", "evaluate", "report")

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: a file of configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for everything that the experiment writes."
)
_STAGES = flags.DEFINE_list(
  "stages", list(STAGES), f"Which stages to run, of {','.join(STAGES)}."
)
_BEAM = flags.DEFINE_string(
  "beam",
  None,
  "Pipeline options of Apache Beam, which then runs embed and search; for "
  "example '--direct_running_mode=multi_processing --direct_num_workers=4'. "
  "See docs/beam.md.",
)

_ESTIMATE = flags.DEFINE_bool(
  "estimate",
  False,
  "Prints what embed and search would need, and runs nothing; see "
  "docs/scale.md.",
)

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "This is one of several processes, as their environment says: a TPU pod, "
  "Slurm, GKE, Open MPI. They train and evaluate together.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  "",
  "HOST:PORT of process 0, where the environment does not say; with "
  "--num_processes and --process_id.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", 0, "How many processes there are."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", -1, "Which of them this is, from 0."
)
_START_TIMEOUT = flags.DEFINE_float(
  "start_timeout", 300.0, "Seconds to wait until all processes have started."
)
_BARRIER_TIMEOUT = flags.DEFINE_float(
  "barrier_timeout",
  600.0,
  "Seconds after which a process that others wait for is missing.",
)

# What several processes do together.
_SHARED_STAGES = ("train", "evaluate")

# A disk, or what a user may have of it, is full.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(
  config: Any,
  workdir: pathlib.Path,
  stages: list[str],
  runner: Runner = run_here,
) -> str:
  """Runs the missing ones of `stages`.

  Args:
    config: from a file of `configs/`.
    workdir: made if it does not exist.
    stages: some of `STAGES`.
    runner: does the jobs of embed and search.

  Returns:
    The final table, with the class counts of the groups, the measured recall
    and the seconds that each stage took; empty without the evaluate stage.

  Raises:
    UserError: anything that the user can mend.
  """
  for stage in stages:
    if stage not in STAGES:
      raise UserError(f"--stages={stage}: not one of {', '.join(STAGES)}.")
  try:
    return _run(config, workdir, stages, runner)
  except OSError as error:
    if error.errno not in _FULL:
      raise
    raise UserError(
      f"{error.filename or workdir}: no space left ({error.strerror}); nothing "
      "that was finished is lost: free some, and give the same command again."
    ) from error


def _run(
  config: Any, workdir: pathlib.Path, stages: list[str], runner: Runner
) -> str:
  given = {f"--config.{name}": value for name, value in changed(config).items()}
  given["--stages"] = ",".join(stages)
  distributed.agree(given, "the settings")
  experiment = Experiment(config, workdir, runner)
  first = distributed.is_first()
  with files.lock(workdir) if first else contextlib.nullcontext():
    for stage in STAGES:
      if stage in stages and _is_here(stage):
        _run_stage(experiment, stage)
    text = ""
    if "evaluate" in stages and first:
      text = f"{experiment.text()}\n{_seconds(workdir)}"
  if set(stages) == set(STAGES) and distributed.processes() == 1:
    unread = set(experiment.settings.unread()) & set(changed(config))
    if unread:
      names = ", ".join(f"config.{name}" for name in sorted(unread))
      progress.note(f"note: set, but read by nothing: {names}")
  return text


def _is_here(stage: str) -> bool:
  """Whether this process has a part in a stage."""
  if distributed.processes() == 1 or stage in _SHARED_STAGES:
    return True
  if stage == "report":
    return distributed.is_first()
  progress.note(f"{stage}: left to a run of one process")
  return False


def _run_stage(experiment: Experiment, stage: str) -> None:
  """Runs one stage; adds its time to `stages.json` if it did any work."""
  start = time.monotonic()
  worked = getattr(experiment, stage)()
  if not distributed.is_first():
    return
  if not worked:
    progress.note(f"{stage}: nothing to do")
    return
  spent = time.monotonic() - start
  path = experiment.workdir / "stages.json"
  seconds = files.read_json(path) if path.exists() else {}
  seconds[stage] = round(seconds.get(stage, 0) + spent, 1)
  files.write_json(path, seconds)
  progress.note(f"{stage}: done in {spent:.1f} s")


def _seconds(workdir: pathlib.Path) -> str:
  path = workdir / "stages.json"
  seconds = files.read_json(path) if path.exists() else {}
  parts = [f"{s} {seconds[s]:.1f}" for s in STAGES if s in seconds]
  return f"Seconds a stage took: {', '.join(parts)}."


def _parse(arguments: list[str]) -> list[str]:
  """Parses flags; a wrong one ends the program with one line."""
  try:
    return flags.FLAGS(arguments)
  except Exception as error:
    _fail(_explain(arguments, error))


def _explain(arguments: list[str], error: Exception) -> str:
  """What is wrong with the flags: the nearest name for an unknown setting."""
  message = re.sub(r"\s+", " ", str(error)).strip()
  for argument in arguments:
    match = re.match(r"--?config=([^:]+):?(.*)", argument)
    if match is None:
      continue
    if not pathlib.Path(match[1]).exists():
      return f"--config={match[1]}: no such file; see configs/."
    try:
      # Not the defaults: a dataset's options are known to its file alone.
      get_config = runpy.run_path(match[1])["get_config"]
      config = get_config(match[2]) if match[2] else get_config()
      check_overrides(arguments, config)
    except UserError as unknown:
      return str(unknown)
    except Exception:  # the file itself is wrong, which `message` says
      break
  return f"{message[:300]}; see --help."


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)


def _job(workdir: pathlib.Path, runner: Runner) -> str:
  """What the flags ask for; returns what to print."""
  if _ESTIMATE.value:
    return Experiment(_CONFIG.value, workdir).retrieval.estimate()
  try:
    with distributed.collectives():
      return run(_CONFIG.value, workdir, list(_STAGES.value), runner)
  except distributed.Preempted as stopped:
    print(f"{stopped}; the same command goes on.", file=sys.stderr)
    distributed.shutdown()  # or the first to end were taken for one that failed
    sys.exit(distributed.EXIT_PREEMPTED)


def main(arguments: list[str]) -> None:
  """Runs the job that the flags describe."""
  if len(arguments) > 1:
    _fail(f"unexpected argument {arguments[1]!r}; see --help.")
  if _CONFIG.value is None or _WORKDIR.value is None:
    _fail("--config=FILE and --workdir=DIR are needed; see --help.")
  if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
    # A file that cannot be opened is only told of when its values are used.
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    _fail(f"--config={name}: no such file; see configs/.")
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every step it takes
  runner = run_here
  if _BEAM.value is not None:
    options = shlex.split(_BEAM.value)
    runner = lambda job, recipe: pipeline.run(recipe, options, job)
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    distributed.start(
      _COORDINATOR.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      auto=_DISTRIBUTED.value,
      timeout=_START_TIMEOUT.value,
      barrier_timeout=_BARRIER_TIMEOUT.value,
    )
    text = _job(workdir, runner)
    distributed.shutdown()
  except UserError as error:
    _fail(str(error))
  except KeyboardInterrupt:
    _fail("interrupted; the same command goes on where this one stopped.")
  if text:
    print(text)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
