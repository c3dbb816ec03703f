"""Batches: downstream examples joined with their neighbours, in a fixed order.

The order is a pure function of (seed, step): position p = step * batch + i
lies in epoch p // N, and its example is a seeded permutation of p % N. There
is no shuffle buffer whose state could be lost, and a run that starts at step
s sees what it would have seen there.
"""

import collections
import concurrent.futures
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from retrieval_aug.common.errors import UserError
from retrieval_aug.common.tf import import_tensorflow
from retrieval_aug.memory import neighbors

_STEPS_AT_ONCE = 32
_EXAMPLES_AT_ONCE = 4096


class Examples(NamedTuple):
  """One split, joined with its neighbours.

  Attributes:
    ids: [N] example ids.
    labels: int32 [N].
    queries: float16 [N, d].
    neighbors: int64 [N, k], rows of the memory table, -1 pads.
    scores: float32 [N, k], cosine, -inf pads.
  """

  ids: list[str]
  labels: np.ndarray
  queries: np.ndarray
  neighbors: np.ndarray
  scores: np.ndarray


def read(
  paths: list[pathlib.Path],
  ids: list[str],
  labels: list[int],
  dims: int,
  k: int,
) -> Examples:
  """Joins downstream examples with neighbour shards by example id.

  Args:
    paths: the split's shards, in order.
    ids: ids of the split's examples, in table order.
    labels: their labels.
    dims: width of a query.
    k: neighbours stored an example.

  Raises:
    UserError: an example is missing, surplus or out of order, a label
      differs, or a record cannot be read; names file and id.
  """
  files = ", ".join(p.name for p in paths)
  remedy = f"delete {paths[0].parent} to have it made again"
  joined = neighbors.read_records(paths, remedy)
  if joined is None:
    raise UserError(
      f"{files}: no examples where there should be {len(ids)}; {remedy}."
    )
  found = [x.decode() for x in joined["example_id"]]
  if found != ids:
    missing = sorted(set(ids) - set(found))
    surplus = sorted(set(found) - set(ids))
    raise UserError(
      f"{files}: its examples are not those of the dataset ({len(missing)} "
      f"missing {missing[:2]}, {len(surplus)} surplus {surplus[:2]}, or in "
      f"another order); {remedy}."
    )
  wrong = np.flatnonzero(joined["label"] != np.asarray(labels))
  if wrong.size:
    raise UserError(
      f"{files}: example {found[wrong[0]]!r} has label "
      f"{joined['label'][wrong[0]]} there and {labels[wrong[0]]} in the "
      f"dataset; {remedy}."
    )
  for name, width in (("query", dims), ("neighbor_ids", k)):
    if joined[name].shape[1] != width:
      raise UserError(
        f"{files}: {name} has {joined[name].shape[1]} numbers, not {width}; "
        f"{remedy}."
      )
  return Examples(
    ids=found,
    labels=joined["label"].astype(np.int32),
    queries=joined["query"],
    neighbors=joined["neighbor_ids"],
    scores=joined["neighbor_scores"],
  )


def shuffled(position: Any, n: int, seed: int) -> Any:
  """Numbers of the examples at some positions of an endless, shuffled stream.

  Args:
    position: int64 tensor of any shape.
    n: examples in all; each epoch of so many positions is a permutation.
    seed: of the order.

  Returns:
    int64, of the shape of `position`.
  """
  tf = import_tensorflow()
  flat = tf.reshape(position, [-1])
  shape = tf.shape(flat)
  # The wrapper of this op in tf.random.experimental takes one seed for all
  # positions; a batch that spans two epochs needs one each.
  seeds = tf.stack(
    [
      tf.fill(shape, tf.constant(seed, tf.int64)),
      flat // n,
      tf.zeros(shape, tf.int64),
    ],
    axis=-1,
  )
  found = tf.raw_ops.RandomIndexShuffle(
    index=flat % n,
    seed=seeds,
    max_index=tf.fill(shape, tf.constant(n - 1, tf.int64)),
    rounds=4,
  )
  return tf.reshape(found, tf.shape(position))


def numbers(position: np.ndarray, n: int, seed: int) -> np.ndarray:
  """As `shuffled`, of arrays."""
  return shuffled(position.astype(np.int64), n, seed).numpy()


def positions_of(steps: Any, batch_size: int, local: np.ndarray) -> Any:
  """Positions in the endless stream that this process has in some steps.

  Args:
    steps: int64 tensor of any shape [...].
    batch_size: examples a batch, of all processes.
    local: int64 [b], places in a batch that are this process's.

  Returns:
    int64 [..., b].
  """
  return steps[..., None] * batch_size + local


def train_batches(
  arrays: dict[str, np.ndarray],
  *,
  batch_size: int,
  seed: int,
  first_step: int,
  last_step: int,
  local: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of steps first_step..last_step-1, each a function of (seed, step).

  Args:
    arrays: equally long arrays, [N, ...].
    batch_size: examples a batch; batches run across the ends of epochs.
    seed: of the order.
    first_step: where to begin.
    last_step: where to stop.
    local: places in a batch that this process prepares, as
      `sharding.local_positions` gives them; None for all.
  """
  local = np.arange(batch_size) if local is None else local
  at_once = steps_at_once(len(local))
  chunks = train_chunks(
    arrays, batch_size, seed, first_step, last_step, local, at_once
  )
  step = first_step
  for chunk in chunks:
    for i in range(min(at_once, last_step - step)):
      yield {name: x[i] for name, x in chunk.items()}
    step += at_once


def steps_at_once(examples: int) -> int:
  """Steps whose batches, of so many examples, are prepared together.

  What an operation costs beside its work is shared by them.
  """
  return max(1, min(_STEPS_AT_ONCE, _EXAMPLES_AT_ONCE // examples))


def train_chunks(
  arrays: dict[str, np.ndarray],
  batch_size: int,
  seed: int,
  first_step: int,
  last_step: int,
  local: np.ndarray,
  at_once: int,
) -> Iterator[dict[str, np.ndarray]]:
  """The batches of `train_batches`, some steps at a time: [at_once, b, ...].

  The last chunk goes on beyond `last_step`, so that all have one shape.
  """
  tf = import_tensorflow()
  n = len(next(iter(arrays.values())))
  tensors = {name: tf.constant(_as_bits(x)) for name, x in arrays.items()}

  def chunk(first):
    step = first + tf.range(at_once, dtype=tf.int64)
    index = shuffled(positions_of(step, batch_size, local), n, seed)
    return {name: tf.gather(x, index) for name, x in tensors.items()}

  data = tf.data.Dataset.range(first_step, last_step, at_once)
  # Order is part of the contract; the one private thread is enough for a
  # gather and leaves the cores to the step.
  options = tf.data.Options()
  options.deterministic = True
  options.threading.private_threadpool_size = 1
  data = data.map(chunk, num_parallel_calls=1).prefetch(2)
  for found in data.with_options(options).as_numpy_iterator():
    yield {name: x.view(arrays[name].dtype) for name, x in found.items()}


def _as_bits(x: np.ndarray) -> np.ndarray:
  """Half precision as integers: TensorFlow warns of it on most CPUs."""
  return x.view(np.uint16) if x.dtype == np.float16 else x


def eval_batches(
  arrays: dict[str, np.ndarray],
  batch_size: int,
  local: np.ndarray | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Batches in order, the last one filled up; yields (examples in it, batch).

  Filling keeps one shape and so one compilation; the caller drops the rest.

  Args:
    arrays: equally long arrays, [N, ...].
    batch_size: examples a batch, of all processes.
    local: see `train_batches`.
  """
  n = len(next(iter(arrays.values())))
  local = np.arange(batch_size) if local is None else local
  for start in range(0, n, batch_size):
    index = np.minimum(start + local, n - 1)
    count = min(batch_size, n - start)
    yield count, {name: x[index] for name, x in arrays.items()}


def ahead(
  items: Iterable[Any], prepare: Callable[[Any], Any], depth: int = 2
) -> Iterator[Any]:
  """Prepares items in a thread, some ahead of the one that is taken.

  With `prepare` putting batches onto the devices, one is on its way there
  while another is computed with.

  Args:
    items: in order.
    prepare: of one of them.
    depth: how many are being prepared, or are ready.
  """
  items = iter(items)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    task = lambda: [prepare(x) for x in itertools.islice(items, 1)]
    waiting = collections.deque(pool.submit(task) for _ in range(depth))
    try:
      while found := waiting.popleft().result():
        waiting.append(pool.submit(task))
        yield found[0]
    finally:
      for future in waiting:
        future.cancel()
