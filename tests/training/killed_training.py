"""Trains and evaluates in children that are killed at random moments.

Run as a program by `test_kills.py`. This process imports everything and starts
nothing, so that each child, a fork of it, begins with the work at once; what
they compile is in a cache that the first one fills.

Moments are counted in operations on files, not in seconds: how many there are
does not depend on how busy the machine is, and most are those of checkpoints.

  python -m tests.training.killed_training FOLDER KILLS STOPS SEED
"""

import collections
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
import threading

import jax
import numpy as np

from retrieval_aug.common import distributed, tf
from retrieval_aug.training import evaluations, input_pipeline, runs
from retrieval_aug.training.data import Data
from tests.training import tiny

# 18 steps with a checkpoint after every second, and after every third, which is
# looked at.
TRAIN = tiny.SETTINGS | {
  "epochs": 4.0,
  "learning_rate": 0.02,
  "warmup_epochs": 0.5,
  "checkpoint_epochs": 0.43,
  "eval_epochs": 0.65,
  "keep": "best",
  "ema": 0.5,
  "accumulate": 2,
  "mixup": 0.2,
  "k": 5,
  "seeds": 1,
  "post_hoc_tau": 0.0,
}
OPTIONS = {"num_layers": 1, "neighbor_dropout": 0.3}
SPLITS = {"train": tiny.N, "val": 11, "test": 13}

_TOO_LONG = 300  # seconds, for a child that hangs

# Files with times, and those whose bytes Orbax chooses.
_NOT_COMPARED = ("manifest.json", "summary.json", "speed.jsonl", ".lock")


def _data() -> Data:
  arrays = {s: tiny.examples(n, i) for i, (s, n) in enumerate(SPLITS.items())}
  # No class that can be learned: of the six looks, the first two are the best,
  # and equal.
  labels = np.random.default_rng(2).integers(0, tiny.CLASSES, SPLITS["val"])
  arrays["val"]["label"] = labels.astype(np.int32)
  return Data(
    examples={
      s: input_pipeline.Examples(
        [f"{s}/{i}" for i in range(len(x["label"]))],
        x["label"],
        x["query"],
        x["rows"],
        np.zeros(x["rows"].shape, np.float32),
      )
      for s, x in arrays.items()
    },
    memory=tiny.memory(),
    rows={s: x["rows"] for s, x in arrays.items()},
    class_counts=np.bincount(arrays["train"]["label"]),
    source_names=["a"],
    fingerprint="data-1",
  )


def work(folder: pathlib.Path) -> None:
  """All that is missing in a folder."""
  run = runs.Run("mam", OPTIONS, TRAIN, 0, folder, "data-1")
  data = _data()
  runs.train([run], data)
  evaluations.evaluate([run], data, batch_size=8, shot_groups="paper")


def digests(folder: pathlib.Path) -> dict[str, str]:
  """Of all files that a result is in."""
  out = {}
  for path in sorted(folder.rglob("*")):
    name = str(path.relative_to(folder))
    if name.startswith("checkpoints/") or path.name in _NOT_COMPARED:
      continue
    if path.is_file():
      out[name] = hashlib.sha256(path.read_bytes()).hexdigest()
  return out


def saved(folder: pathlib.Path) -> set[int]:
  """Steps of all checkpoints."""
  return {int(p.name) for p in (folder / "checkpoints").iterdir()}


def _end_at(
  folder: pathlib.Path, number: int = 0, delay: float = 0.0, sign: int = 0
) -> list[str]:
  """Sends a signal some seconds after the `number`-th operation on files.

  Returns:
    A list that grows with each operation.
  """
  inside, done = os.fspath(folder) + os.sep, []

  def send():
    os.kill(os.getpid(), sign)

  def hook(event, arguments):
    if not event.startswith(("os.", "open", "shutil.")) or not arguments:
      return
    path = arguments[0]
    if isinstance(path, os.PathLike):
      path = os.fspath(path)
    if isinstance(path, str) and path.startswith(inside):
      done.append(event)
      if len(done) == number:
        threading.Timer(delay, send).start() if delay else send()

  sys.addaudithook(hook)
  return done


def start(folder: pathlib.Path, *end) -> tuple[int, int]:
  """A child at work: its number, and a pipe with what it says in the end.

  Args:
    folder: that it works in.
    *end: how it is ended; see `_end_at`.
  """
  reading, writing = os.pipe()
  pid = os.fork()
  if pid:
    os.close(writing)
    return pid, reading
  code = 1
  try:
    signal.alarm(_TOO_LONG)
    done = _end_at(folder, *end)
    work(folder)
    os.write(writing, str(len(done)).encode())
    code = 0
  except distributed.Preempted as stopped:
    os.write(writing, str(stopped).encode())
    code = distributed.EXIT_PREEMPTED
  finally:
    sys.stderr.flush()
    os._exit(code)


def wait(child: tuple[int, int]) -> tuple[int, str]:
  """How a child ended, as `subprocess` has it, and what it said."""
  pid, reading = child
  with open(reading) as pipe:
    said = pipe.read()
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def check_stopped(folder: pathlib.Path, said: str) -> None:
  """That the step which a stopped child names is the one that is saved."""
  step = re.fullmatch(
    r"train mam seed 0: stopped and saved after step (\d+) of 18", said
  )
  assert step, said
  assert max(saved(folder)) == int(step[1]), (said, saved(folder))


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  kills, stops, seed = map(int, sys.argv[2:])
  tf.import_tensorflow()
  jax.config.update("jax_compilation_cache_dir", os.fspath(folder / "cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  code, said = wait(start(folder / "whole"))
  assert code == 0
  expected, operations = digests(folder / "whole"), int(said)
  assert saved(folder / "whole") == {6, 18}, saved(folder / "whole")

  rng = np.random.default_rng(seed)
  signals = rng.permutation([signal.SIGKILL] * kills + [signal.SIGTERM] * stops)
  signals, number, told = list(signals), 0, collections.Counter()
  while signals or told["finished"] < number + 1:
    # A child goes on with what the one before left; one that is left alone in
    # the end, or that was quicker than its signal, finishes a folder.
    place, end = folder / f"place_{number}", ()
    if signals:
      # Each does at most half of the work.
      at, delay = rng.integers(1, operations // 2), rng.uniform(0, 0.05)
      end = int(at), delay * rng.integers(2), int(signals[-1])
    code, said = wait(start(place, *end))
    print(place.name, *end, code, said, flush=True)
    if code == distributed.EXIT_PREEMPTED:
      check_stopped(place, said)
    if code != 0:
      # SIGTERM before the first step or after the last ends it at once.
      assert -code == end[2] or code == distributed.EXIT_PREEMPTED
      told[code] += 1
      signals.pop()
      continue
    told["finished"] += 1
    assert digests(place) == expected, (digests(place), expected)
    # A kill just before the last but one is deleted leaves it there.
    assert {6, 18} <= saved(place) <= {6, 16, 18}, saved(place)
    number += bool(signals)
  print(json.dumps(told))


if __name__ == "__main__":
  main()
