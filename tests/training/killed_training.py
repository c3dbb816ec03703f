"""Trains by the main program in children that are ended at random moments.

Run as a program by `test_kills.py`. This process imports everything and starts
nothing, so that each child, a fork of it, begins with the work at once; what
they compile is in a cache that the first one fills.

Moments are counted in operations on files, not in seconds: how many there are
does not depend on how busy the machine is, and most are those of checkpoints.

  python -m tests.training.killed_training FOLDER KILLS STOPS SEED

It is also the config file of its children: --config=THIS:FOLDER.
"""

import atexit
import collections
import hashlib
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import sys
import threading
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from retrieval_aug import experiment  # noqa: F401 - what children need
from retrieval_aug.common import distributed, tf
from tests.end_to_end import embeddings

# Checkpoints are due after every second step, and after every third, which is
# looked at.
STEPS = 12
NOT_DUE = 7

SPLITS = {"train": 63, "val": 9, "test": 18}

_TOO_LONG = 300  # seconds, for a child that hangs

# Files with times; `.shards` is what a kill leaves of a finished manifest.
_NOT_COMPARED = re.compile(
  r"checkpoints/|/\.shards/|(manifest|summary|stages)\.json$|speed\.jsonl$|\.lock$"
)

_SAVED = re.compile(
  rf"train mam seed 0: stopped and saved after step (\d+) of {STEPS}; the same "
  "command goes on.\n"
)


class End(NamedTuple):
  """How a child is ended.

  Attributes:
    signal: that it sends to itself; 0 leaves it alone.
    operation: on files of the run, after which it does so.
    delay: seconds after that.
    step: of training, after which it does so, in place of an operation.
  """

  signal: int = 0
  operation: int = 0
  delay: float = 0.0
  step: int = 0


def get_config(folder: str) -> ml_collections.ConfigDict:
  data = pathlib.Path(folder) / "data"
  c = embeddings.config(data, embeddings=str(data / "laion"))
  c.log.tensorboard = False  # of which a file has its time in its name
  c.model.name = "mam"
  c.model.mam.num_layers = 1
  c.model.mam.neighbor_dropout = 0.3
  steps = lambda n: n * c.train.batch_size / SPLITS["train"]
  c.model.mam.train = {
    "epochs": steps(STEPS),
    "warmup_epochs": steps(2),
    "checkpoint_epochs": steps(2),
    "eval_epochs": steps(3),
    "keep": "best",
    "ema": 0.5,
    "accumulate": 2,
    "mixup": 0.2,
  }
  return c


def write_data(folder: pathlib.Path) -> None:
  """As `embeddings.write`, with labels on val that have nothing to learn.

  Two of the four looks are equal and the best, and not the last.
  """
  folder.mkdir()
  embeddings.write(folder)
  labels = np.arange(90) % embeddings.CLASSES
  splits = np.repeat(list(SPLITS), list(SPLITS.values()))
  labels[splits == "val"] = np.random.default_rng(4).integers(0, 3, 9)
  rows = [f"class {label},{split}" for label, split in zip(labels, splits)]
  (folder / "labels.csv").write_text("\n".join(["label,split", *rows]))


def digests(workdir: pathlib.Path) -> dict[str, str]:
  """Of all files that a result is in."""
  out = {}
  for path in sorted(workdir.rglob("*")):
    name = str(path.relative_to(workdir))
    if path.is_file() and not _NOT_COMPARED.search(name):
      out[name] = hashlib.sha256(path.read_bytes()).hexdigest()
  return out


def saved(workdir: pathlib.Path) -> set[int]:
  """Steps of all checkpoints."""
  folder = workdir / "runs" / "mam" / "seed_0" / "checkpoints"
  return {int(p.name) for p in folder.iterdir()}


def start(workdir: pathlib.Path, end: End) -> int:
  """A child that gives the command; its number."""
  pid = os.fork()
  if pid:
    return pid
  signal.alarm(_TOO_LONG)
  said = os.open(f"{workdir}.err", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
  os.dup2(said, 2)
  done = _end_after_operation(workdir, end)
  told = pathlib.Path(f"{workdir}.operations")
  atexit.register(lambda: told.write_text(str(len(done))))
  if end.step:
    _end_after_step(end)
  sys.argv = [
    "main",
    f"--config={__file__}:{workdir.parent}",
    f"--workdir={workdir}",
    "--stages=embed,search,train,evaluate",
  ]
  runpy.run_module("retrieval_aug.main", run_name="__main__")
  raise AssertionError("the main program exits")


def _end_after_operation(workdir: pathlib.Path, end: End) -> list[str]:
  """Returns a list that grows with each operation on files of a run."""
  inside, done = os.fspath(workdir / "runs"), []
  send = lambda: os.kill(os.getpid(), end.signal)

  def hook(event, arguments):
    if not event.startswith(("os.", "open", "shutil.")) or not arguments:
      return
    path = arguments[0]
    if isinstance(path, os.PathLike):
      path = os.fspath(path)
    if isinstance(path, str) and path.startswith(inside):
      done.append(event)
      if len(done) == end.operation:
        threading.Timer(end.delay, send).start() if end.delay else send()

  sys.addaudithook(hook)
  return done


def _end_after_step(end: End) -> None:
  """Sends the signal just before training looks whether it came."""
  reached = distributed.Preemption.reached

  def reached_at(self, step):
    if step == end.step:
      signal.raise_signal(end.signal)
    return reached(self, step)

  distributed.Preemption.reached = reached_at


def run(workdir: pathlib.Path, end: End) -> tuple[int, str]:
  """Gives the command in a child: its exit code, and what it said."""
  _, status = os.waitpid(start(workdir, end), 0)
  said = pathlib.Path(f"{workdir}.err").read_text()
  return os.waitstatus_to_exitcode(status), said


def check_stopped(workdir: pathlib.Path, said: str) -> int:
  """That the step which a stopped child names is the one that is saved."""
  step = int(_SAVED.search(said)[1])
  assert max(saved(workdir)) == step, (step, saved(workdir))
  return step


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  kills, stops, seed = map(int, sys.argv[2:])
  tf.import_tensorflow()
  jax.config.update("jax_compilation_cache_dir", os.fspath(folder / "cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  write_data(folder / "data")

  whole = folder / "whole"
  code, said = run(whole, End())
  assert code == 0, said
  ignored = shutil.ignore_patterns("runs")
  prepare = lambda name: shutil.copytree(whole, folder / name, ignore=ignored)
  expected = digests(whole)
  kept = saved(whole)
  assert len(kept) == 2 and max(kept) == STEPS, kept
  operations = int(pathlib.Path(f"{whole}.operations").read_text())

  place = prepare("place_0")
  code, said = run(place, End(signal.SIGTERM, step=NOT_DUE))
  assert code == distributed.EXIT_PREEMPTED, (code, said)
  assert check_stopped(place, said) == NOT_DUE

  rng = np.random.default_rng(seed)
  signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
  signals = rng.permutation(signals).tolist()
  number, told = 0, collections.Counter()
  while signals or told["finished"] < number + 1:
    # A child goes on with what the one before left; one that is left alone in
    # the end, or that was quicker than its signal, finishes a folder.
    end = End()
    if signals:
      # Each does at most half of the work.
      at, delay = rng.integers(1, operations // 2), rng.uniform(0, 0.05)
      end = End(signals[-1], int(at), delay * rng.integers(2))
    code, said = run(place, end)
    print(place.name, end, code, flush=True)
    if code == distributed.EXIT_PREEMPTED:
      check_stopped(place, said)
    if code != 0:
      # SIGTERM before the first step or after the last ends it at once.
      assert code in (-end.signal, distributed.EXIT_PREEMPTED), (code, said)
      told[code] += 1
      signals.pop()
      continue
    told["finished"] += 1
    found = digests(place)
    assert found == expected, sorted(set(found.items()) ^ set(expected.items()))
    # A kill before the last but one is deleted leaves it there.
    assert kept <= saved(place) and len(saved(place) - kept) <= 1
    if signals:
      number += 1
      place = prepare(f"place_{number}")
  print(json.dumps(told))


if __name__ == "__main__":
  main()
