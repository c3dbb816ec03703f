"""What `benchmarks.train` compares: this library's training and the usual."""

import collections
import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import copied_neighbors, train_data
from retrieval_aug import models
from retrieval_aug.common import manifest
from retrieval_aug.memory.working_set import load_working_set
from retrieval_aug.training import data as training_data
from retrieval_aug.training import (
  feed,
  input_pipeline,
  loop,
  optimizer,
  placement,
  speed,
)
from retrieval_aug.training import step as steps
from retrieval_aug.training.settings import Layout, TrainSettings

COPIED = 4096  # records of the usual way
_UNDER_WAY = 2  # steps that nobody has waited for
_ENDLESS = 10**6  # steps


class Set(NamedTuple):
  """A generated set, read by the library.

  Attributes:
    sizes: of it.
    artifacts: on disk.
    data: what runs share.
    seconds: that reading took.
  """

  sizes: train_data.Sizes
  artifacts: train_data.Artifacts
  data: training_data.Data
  seconds: float

  @property
  def train(self) -> dict[str, np.ndarray]:
    return self.data.arrays("train", self.sizes.neighbors)


def read(folder: pathlib.Path, sizes: train_data.Sizes) -> Set:
  """Reads a set, which is generated first if it is not there."""
  made = train_data.make(folder / f"memory_{sizes.memory}", sizes)
  begin = time.perf_counter()
  data = training_data.load_data(
    training_data.read_examples(made.neighbors, made.queries),
    load_working_set(made.working_set),
    made.working_set.fingerprint,
  )
  return Set(sizes, made, data, time.perf_counter() - begin)


def settings(batch_size: int) -> TrainSettings:
  """As of MAM on ImageNet-LT."""
  return TrainSettings(
    epochs=1.0,
    batch_size=batch_size,
    learning_rate=1e-3,
    weight_decay=0.2,
    warmup_epochs=0.1,
    label_smoothing=0.1,
    tau=1.0,
    gradient_clip=1.0,
    checkpoint_epochs=1.0,
  )


def trainer(
  of: Set, batch_size: int, placed: str = "auto", every: int = 1, **options: Any
) -> loop.Trainer:
  """This library's, on every so-manieth example.

  Args:
    of: the set.
    batch_size: B.
    placed: where the working set is.
    every: 2 trains on half of the examples.
    **options: of MAM.
  """
  train = {name: x[::every] for name, x in of.train.items()}
  return loop.Trainer(
    models.build("mam_paper", of.sizes.classes, **options),
    settings(batch_size),
    of.data.memory,
    train,
    of.data.class_counts,
    layout=Layout(placement=placed),
  )


class Rate(NamedTuple):
  """Examples a second, and a second of one core.

  The latter counts what this process computed, and tells more than the clock
  where other processes want the same cores.
  """

  wall: float
  core: float


class Contender:
  """Trains a few steps when asked to, and goes on there the next time."""

  def __init__(
    self,
    traced: jax.stages.Traced,
    state: steps.State,
    memory: placement.Memory,
    batches: Callable[[int], Iterator[Any]],
    batch_size: int,
  ):
    """Takes what is needed to train.

    Args:
      traced: the step.
      state: where it begins.
      memory: what the step takes.
      batches: those from a step on, on the device, each as the arguments of
        the step between the memory and its number.
      batch_size: B.
    """
    self._compiled = traced.lower().compile()
    self._state, self._memory, self._batches = state, memory, batches
    self._batch_size, self._done = batch_size, 0
    self.costs = speed.costs(
      self._compiled, batch_size, jax.device_count(), traced
    )
    with contextlib.closing(batches(0)) as some:
      self.fixed = next(some)

  def step(self, batch: tuple[Any, ...]) -> steps.Metrics:
    """Starts a step."""
    self._state, told = self._compiled(
      self._state, self._memory, *batch, np.int32(self._done)
    )
    self._done += 1
    return told

  def train(self, count: int) -> Rate:
    """The rate of some steps and their input."""
    with contextlib.closing(self._batches(self._done)) as batches:
      return self._rate(batches, count)

  def step_alone(self, count: int) -> Rate:
    """The rate of some steps on one batch."""
    return self._rate(iter(lambda: self.fixed, None), count)

  def input_alone(self, count: int) -> Rate:
    """The rate of some batches that nobody trains on."""
    with contextlib.closing(self._batches(self._done)) as batches:
      jax.block_until_ready(next(batches))
      begin = _clocks()
      for _ in range(count):
        jax.block_until_ready(next(batches))
      return self._since(begin, count)

  def _rate(self, batches: Iterator[Any], count: int) -> Rate:
    told = collections.deque()
    jax.block_until_ready(self.step(next(batches)))
    begin = _clocks()
    for _ in range(count):
      told.append(self.step(next(batches)))
      if len(told) > _UNDER_WAY:
        jax.block_until_ready(told.popleft())
    jax.block_until_ready(list(told))
    return self._since(begin, count)

  def _since(self, begin: tuple[float, float], count: int) -> Rate:
    examples = count * self._batch_size
    return Rate(*(examples / (b - a) for a, b in zip(begin, _clocks())))


def _clocks() -> tuple[float, float]:
  """Seconds of the clock and of this process's cores."""
  return time.perf_counter(), time.process_time()


def ours(of: Set, batch_size: int, **options: Any) -> Contender:
  """This library's step and input."""
  made = trainer(of, batch_size, **options)
  ids = of.data.examples["train"].ids
  source = feed.Feed(of.train, ids, made.placed, made.mesh, batch_size)

  def batches(first: int) -> Iterator[Any]:
    chunks = source.ahead([0], first, first + _ENDLESS)
    with contextlib.closing(chunks):
      for chunk, place in chunks:
        yield chunk, np.int32(place)

  return Contender(
    made.traced(),
    made.compiled.init(0),
    made.placed.memory,
    batches,
    batch_size,
  )


def usual(
  of: Set, copies: manifest.Artifact, batch_size: int, **options: Any
) -> Contender:
  """The usual step and input, with this library's loss and optimizer.

  Args:
    of: the set.
    copies: from `copied_neighbors.artifact`, written.
    batch_size: B.
    **options: of `copied_neighbors.ProjectedMAM`.
  """
  chosen, sizes = settings(batch_size), of.sizes
  total = chosen.steps(chosen.epochs, sizes.examples)
  adam = optimizer.make(
    learning_rate=chosen.learning_rate,
    weight_decay=chosen.weight_decay,
    total_steps=total,
    warmup_steps=chosen.steps(chosen.warmup_epochs, sizes.examples),
    gradient_clip=chosen.gradient_clip,
  )
  model = copied_neighbors.model(sizes.classes, **options)
  fresh = lambda seed: steps.init(
    model, adam, of.data.memory, sizes.dim, sizes.neighbors, seed
  )
  state = jax.jit(fresh)(np.uint32(0))
  every = np.zeros((batch_size, sizes.neighbors), np.int32)  # none is a pad

  def put(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    found = placement.Memory(batch.pop("keys"), batch.pop("values"))
    return jax.device_put(batch | {"rows": every, "neighbors": found})

  def batches(first: int) -> Iterator[Any]:
    del first  # they are drawn anyway
    paths = copied_neighbors.paths(copies)
    found = copied_neighbors.batches(paths, sizes.neighbors, batch_size)
    return input_pipeline.ahead(found, lambda batch: (put(batch),))

  step = steps.make_train_step(
    steps.make_loss(model, chosen.make_loss(of.data.class_counts)), adam
  )
  nothing = placement.Memory(None, None)
  with contextlib.closing(batches(0)) as some:
    example = next(some)
  traced = jax.jit(step, donate_argnums=0).trace(
    state, nothing, *example, np.int32(0)
  )
  return Contender(traced, state, nothing, batches, batch_size)


def copied_examples(of: Set) -> int:
  """How many examples the usual way has records of."""
  return min(COPIED, of.sizes.examples)


def copied(of: Set) -> manifest.Artifact:
  """The usual way's records of the first examples of a set, written."""
  count, neighbors = copied_examples(of), of.artifacts.neighbors
  copies = copied_neighbors.artifact(
    neighbors.folder.parent / "copies", neighbors, count
  )
  part = {name: x[:count] for name, x in of.train.items()}
  memory = of.data.memory
  copied_neighbors.write(copies, **part, keys=memory.keys, values=memory.values)
  return copies


def check_same(of: Set, found: dict[str, Contender]) -> None:
  """Compares the first losses, on one batch: all train the same model."""
  chunk, place = found["ours"].fixed
  batch = {name: x[place] for name, x in chunk.items()}
  rows = np.asarray(batch["rows"])
  keys, values = of.data.memory.keys[rows], of.data.memory.values[rows]
  copies = batch | {"neighbors": placement.Memory(keys, values)}
  losses = {
    name: float(one.step((chunk, place) if name == "ours" else (copies,)).loss)
    for name, one in found.items()
  }
  np.testing.assert_allclose(
    list(losses.values()), losses["ours"], rtol=1e-4, err_msg=str(losses)
  )
