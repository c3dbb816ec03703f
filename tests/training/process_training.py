"""Two processes that train together, for test_processes.py: ADDRESS FOLDER.

This process imports everything and starts nothing of JAX; the two are forks of
it, and begin with the work at once. They train in `FOLDER/work`, and leave what
they saw in `FOLDER/process_<n>.npz` and `.json`.
"""

import contextlib
import gc
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from retrieval_aug.common import distributed, stopping, tf
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory.key_transform import KeyTransform
from retrieval_aug.training import input_pipeline, loop, predict, sharding
from retrieval_aug.training.finetune import FineTuning
from retrieval_aug.training.settings import Layout
from tests.training import tiny, tiny_images

# In other layouts: "replicated" fine-tunes, and "host" is trained in
# tests/end_to_end/test_processes.py.
SHARDED = Layout(placement="sharded", sharding="fsdp")
HOST = Layout(model=2, placement="host")
SETTINGS = {"ema": 0.5, "eval_epochs": 1.0}
BATCH = tiny.SETTINGS["batch_size"]
IDS = [f"id/{i}" for i in range(tiny.N)]


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
  """Compiling is most of the work; how fast the result is does not matter."""
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", False)


class Pictures:
  """As `images.Images`, of images that are made when they are asked for."""

  size = tiny_images.SIZE

  def __init__(self):
    self.decoded = []

  def __len__(self) -> int:
    return tiny.N

  def image(self, number: int) -> np.ndarray:
    self.decoded.append(int(number))
    return tiny_images.image(int(number))

  def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (tiny.N, self.size, self.size, 3)
    return rng.integers(0, 256, shape, np.uint8)[numbers]


def finetuning_trainer(pictures: Pictures) -> loop.Trainer:
  """Trains an encoder, too: 5 steps, and looks at val after them."""
  train, val = tiny.examples(), tiny.examples(29, seed=5)
  return loop.Trainer(
    tiny.model(),
    tiny.settings(
      finetune=True,
      augment="inception_crop(0.5), flip",
      epochs=1,
      eval_epochs=1,
    ),
    tiny.memory(),
    train,
    np.bincount(train["label"]),
    FineTuning(
      tiny_images.encoder(),
      KeyTransform(np.zeros(tiny.D, np.float32), None),
      {"train": pictures},
    ),
    val={"rows": val["rows"], "label": val["label"], "images": Pictures()},
    layout=Layout(placement="replicated"),
  )


class Seen:
  """What this process saw: numbers by names with slashes, and facts."""

  def __init__(self):
    self.arrays, self.facts = {}, {}
    self._fed, self._predicted, self._writes = [], None, set()

  def watch(self, replace: Callable[[Any, str, Any], None]) -> None:
    """Looks on from now on.

    Args:
      replace: as `setattr`.
    """
    put, call = sharding.put_batch, predict.Predictor.__call__

    def seen_put(batch, *where, **how):
      if "label" in batch:
        self._fed.append(dict(batch))
      return put(batch, *where, **how)

    def seen_call(*arguments):
      self._predicted = call(*arguments)
      return self._predicted

    replace(sharding, "put_batch", seen_put)
    replace(predict.Predictor, "__call__", seen_call)

  def watch_writes(self, work: pathlib.Path) -> None:
    """Remembers from now on which files in a folder Python writes."""

    def hook(event, arguments):
      if event == "open":
        if not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
          return
      elif event not in ("os.mkdir", "os.rename", "os.remove", "os.truncate"):
        return
      if isinstance(arguments[0], (str, os.PathLike)):
        path = pathlib.Path(arguments[0])
        if path.is_relative_to(work):
          self._writes.add(path.relative_to(work).as_posix())

    sys.addaudithook(hook)

  def run(self, name: str, trainer: loop.Trainer, folder: pathlib.Path) -> None:
    """Trains, and remembers what was returned, predicted last, and fed."""
    self._fed, self._predicted = [], None
    params = trainer.run(0, folder)
    for path, x in jax.tree.leaves_with_path(params):
      path = jax.tree_util.keystr(path, simple=True, separator="/")
      self.arrays[f"{name}/params/{path}"] = x
    logits, weights = self._predicted
    self.arrays |= {f"{name}/logits": logits, f"{name}/weights": weights}
    self._keep_fed(name, trainer.total_steps)

  def feed(self, name: str, trainer: loop.Trainer, steps: int) -> None:
    """Remembers what some steps are fed with, and trains nothing."""
    self._fed = []
    for _ in trainer._feed.ahead([0], 0, steps):
      pass
    self._keep_fed(name, steps)

  def _keep_fed(self, name: str, steps: int) -> None:
    for batch in self._fed:
      if "neighbors" in batch:
        found = batch.pop("neighbors")
        batch |= {"keys": found.keys, "values": found.values}
    for key in self._fed[0]:
      fed = np.concatenate([batch[key] for batch in self._fed])
      self.arrays[f"{name}/fed/{key}"] = fed[:steps]

  def write(self, path: pathlib.Path) -> None:
    self.facts["writes"] = sorted(self._writes)
    np.savez(path.with_suffix(".npz"), **self.arrays)
    path.with_suffix(".json").write_text(json.dumps(self.facts))


def sharded(trainer, work: pathlib.Path, seen: Seen) -> None:
  """Trains; and what of the working set and a parameter is here."""
  seen.run("sharded", trainer, work / "sharded")
  head = trainer.compiled.init(0).params["head"]["kernel"]
  seen.facts["head"] = head.addressable_shards[0].data.shape
  for shard in trainer.placed.memory.keys.addressable_shards:
    seen.arrays[f"keys/{shard.device.id}"] = np.asarray(shard.data)


def stop_and_go_on(trainer, work: pathlib.Path, seen: Seen) -> None:
  """Only process 1 is told to stop; then the same again."""
  step, look = trainer.compiled.step, stopping.LOOK
  stopping.LOOK = 0.05  # seconds until the other knows

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
  trainer.compiled.step, stopping.LOOK = step, look
  distributed.barrier("stopped")
  if distributed.is_first():
    shutil.copytree(work / "stopped", work / "as_stopped")
  distributed.barrier("copied")
  seen.run("stopped", trainer, work / "stopped")


def fail(trainer, train: dict, work: pathlib.Path, seen: Seen) -> None:
  """The last example of each process in the first batch is broken."""
  first = input_pipeline.numbers(np.arange(BATCH), tiny.N, 0)
  bad = first[[BATCH // 2 - 1, BATCH - 1]]
  train["query"][bad, 3] = np.nan
  try:
    trainer.run(0, work / "nan", "train mam seed 0")
  except UserError as error:
    seen.facts["nan"] = str(error)


def process(address: str, index: int, folder: pathlib.Path) -> None:
  """All that one of them does."""
  distributed.start(address, 2, index, timeout=900, barrier_timeout=900)
  work, seen, train = folder / "work", Seen(), tiny.examples()
  seen.watch(setattr)
  seen.watch_writes(work)
  trainer = tiny.trainer(train=train, ids=IDS, layout=SHARDED, **SETTINGS)
  sharded(trainer, work, seen)
  stop_and_go_on(trainer, work, seen)
  # One process has begun it, on one device.
  seen.run("from_one", trainer, work / "from_one")
  fail(trainer, train, work, seen)
  pictures = Pictures()
  seen.run("finetuned", finetuning_trainer(pictures), work / "finetuned")
  seen.facts["decoded"] = sorted(set(pictures.decoded))
  seen.feed("host", tiny.trainer(layout=HOST), 3)
  # Along "model" over both processes, these have the same examples.
  over_both = sharding.local_positions(sharding.mesh(4), BATCH)
  seen.facts["over_both"] = over_both.tolist()
  seen.write(folder / f"process_{index}")
  distributed.shutdown()


def main(address: str, folder: str) -> None:
  tf.import_tensorflow()
  gc.freeze()  # what is imported stays shared, and is not looked through again
  children = []
  for index in range(2):
    children.append(os.fork())
    if not children[-1]:
      signal.alarm(1800)  # one that hangs would outlive the test
      with compiled_quickly():
        process(address, index, pathlib.Path(folder))
      return
  codes = [os.waitpid(child, 0)[1] for child in children]
  sys.exit(f"exit codes {codes}" if any(codes) else 0)


if __name__ == "__main__":
  main(*sys.argv[1:])
