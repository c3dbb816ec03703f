"""A process of test_processes.py, of two: ADDRESS PROCESS FOLDER.

Trains in `FOLDER/work`, which is shared, and leaves what it saw in
`FOLDER/process_<n>.npz` and `.json`.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import time

import jax
import numpy as np

from retrieval_aug.common import distributed, stopping
from retrieval_aug.common.errors import UserError
from retrieval_aug.training import feed, predict, sharding
from retrieval_aug.training.placement import Placed
from retrieval_aug.training.settings import Layout
from tests.training import test_finetune, tiny

# Each value of each setting comes once: they do not know of each other.
LAYOUTS = {
  "replicated": Layout(placement="replicated", sharding="replicate"),
  "sharded": Layout(placement="sharded", sharding="fsdp"),
  "host": Layout(model=2, placement="host", sharding="tensor"),
}
SETTINGS = {"ema": 0.5, "eval_epochs": 1.0}
IDS = [f"id/{i}" for i in range(tiny.N)]


class Seen:
  """What this process saw, by names with slashes."""

  def __init__(self):
    self.batches, self.neighbors, self.images = [], [], []
    self.writes: set[str] = set()
    self.predicted = None
    self.facts, self.arrays = {}, {}

  def watch(self, work: pathlib.Path) -> None:
    """Looks on from now on; `work` is where files count."""
    put, call = sharding.put_batch, predict.Predictor.__call__

    def seen_put(batch, *where, **how):
      if "label" in batch:  # training; one batch, or several at once
        one = batch["label"].ndim == 1
        self.batches.append({n: x[None] if one else x for n, x in batch.items() if n != "neighbors"})
      return put(batch, *where, **how)

    def seen_call(*arguments):
      self.predicted = call(*arguments)
      return self.predicted

    sharding.put_batch = seen_put
    predict.Predictor.__call__ = seen_call

    def hook(event, arguments):
      if event == "open":
        if not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
          return
      elif event not in ("os.mkdir", "os.rename", "os.remove", "os.truncate"):
        return
      if isinstance(arguments[0], (str, os.PathLike)):
        path = pathlib.Path(arguments[0])
        if path.is_relative_to(work):
          self.writes.add(path.relative_to(work).as_posix())

    sys.addaudithook(hook)

  def add_run(self, name: str, steps: int, params) -> None:
    """What a run of so many steps returned, and what it was fed with."""
    for path, x in jax.tree.leaves_with_path(params):
      path = jax.tree_util.keystr(path, simple=True, separator="/")
      self.arrays[f"{name}/params/{path}"] = x
    for key in self.batches[0]:
      fed = np.concatenate([b[key] for b in self.batches])
      self.arrays[f"{name}/batches/{key}"] = fed[:steps]
    if self.predicted is not None:
      self.arrays[f"{name}/logits"], self.arrays[f"{name}/weights"] = (
        self.predicted
      )
    self.batches, self.predicted = [], None

  def write(self, path: pathlib.Path) -> None:
    np.savez(path.with_suffix(".npz"), **self.arrays)
    path.with_suffix(".json").write_text(json.dumps(self.facts))


def layouts(work: pathlib.Path, seen: Seen) -> dict:
  """Trains once in each layout; the trainers, and their examples."""
  found = {}
  for name, layout in LAYOUTS.items():
    train = tiny.examples()
    trainer = tiny.trainer(train=train, ids=IDS, layout=layout, **SETTINGS)
    seen.neighbors = []
    params = trainer.run(0, work / name)
    seen.add_run(name, trainer.total_steps, params)
    kernel = trainer.compiled.init(0).params["head"]["kernel"]
    seen.facts[f"{name}/head"] = kernel.addressable_shards[0].data.shape
    keys = trainer.placed.memory.keys
    for shard in [] if keys is None else keys.addressable_shards:
      seen.arrays[f"{name}/keys/{shard.device.id}"] = np.asarray(shard.data)
    seen.facts[f"{name}/neighbors"] = [
      x and x.keys.shape for x in seen.neighbors
    ]
    found[name] = trainer, train
  return found


def stop_and_go_on(trainer, work: pathlib.Path, seen: Seen) -> None:
  """Only process 1 is told to stop; then the same again."""
  step = trainer.compiled.step

  def slow(*arguments):
    if distributed.process() == 1 and arguments[-1] == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)  # so that there are steps left to stop at
    return step(*arguments)

  trainer.compiled.step = slow
  try:
    trainer.run(0, work / "stopped")
  except distributed.Preempted as stopped:
    seen.facts["stopped"] = str(stopped)
  trainer.compiled.step = step
  distributed.barrier("stopped")
  if distributed.is_first():
    shutil.copytree(work / "stopped", work / "stopped_copy")
  distributed.barrier("copied")
  seen.batches = []
  params = trainer.run(0, work / "stopped")
  seen.add_run("stopped", trainer.total_steps, params)


def go_on_from_one(trainer, work: pathlib.Path, seen: Seen) -> None:
  """With what one process began on one device."""
  params = trainer.run(0, work / "from_one")
  seen.add_run("from_one", trainer.total_steps, params)


def fail(trainer, train, work: pathlib.Path, seen: Seen) -> None:
  """An example of process 1, in the last place of the first batch."""
  (batch,) = feed.Feed.batches(trainer._feed, 0, 0, 1)
  whole = sharding.put_batch(batch["query"], trainer.mesh, 8)
  last = sharding.fetch(whole)[-1]
  (bad,) = np.flatnonzero((train["query"] == last).all(axis=1))
  train["query"][bad, 3] = np.nan
  seen.facts["nan_id"] = IDS[bad]
  try:
    trainer.run(0, work / "nan", "train mam seed 0")
  except UserError as error:
    seen.facts["nan"] = str(error)


def finetune(work: pathlib.Path, tuned: pathlib.Path, seen: Seen) -> None:
  """Trains an encoder on the images that a test has embedded."""
  tuning = test_finetune._load(tuned, ["train"])
  images, image = tuning.images["train"], tuning.images["train"].image
  decoded = []

  def counted(number):
    decoded.append(int(number))
    return image(number)

  images.image = counted
  trainer = test_finetune._trainer(test_finetune._data(tuned), tuning)
  params = trainer.run(0, work / "finetuned")
  seen.add_run("finetuned", trainer.total_steps, params)
  seen.facts["decoded"] = len(decoded)


def main(address: str, index: int, folder: pathlib.Path) -> None:
  stopping.LOOK = 0.02  # seconds until the others know
  distributed.start(address, 2, index, timeout=300, barrier_timeout=300)
  work, seen = folder / "work", Seen()
  seen.watch(work)
  trainers = layouts(work, seen)
  trainer, train = trainers["sharded"]
  stop_and_go_on(trainer, work, seen)
  go_on_from_one(trainer, work, seen)
  fail(trainer, train, work, seen)
  if (folder / "tuned").exists():
    finetune(work, folder / "tuned", seen)
  # Along "model" over both processes, they have the same examples.
  over_both = sharding.mesh(4)
  seen.facts["same"] = sharding.local_positions(over_both, 8).tolist()
  seen.facts["writes"] = sorted(seen.writes)
  seen.write(folder / f"process_{index}")
  distributed.shutdown()


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
