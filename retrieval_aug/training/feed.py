"""What a step is fed with: batches on the devices, ahead of their step."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from retrieval_aug.training import augment, images, input_pipeline, sharding
from retrieval_aug.training.finetune import FineTuning
from retrieval_aug.training.placement import Memory, Placed


class Feed:
  """Batches of a training split, each a function of (seed, step)."""

  def __init__(
    self,
    train: dict[str, np.ndarray],
    ids: Sequence[str],
    placed: Placed,
    mesh: Mesh,
    batch_size: int,
    augmented: str = "none",
    finetuning: FineTuning | None = None,
  ):
    """Nothing is read yet.

    Args:
      train: query [N, d], rows int32 [N, k], label int32 [N].
      ids: [N] names of the examples.
      placed: the working set.
      mesh: of all devices.
      batch_size: examples a batch, of all processes.
      augmented: how images are, if they are fed in place of queries.
      finetuning: has these images.
    """
    self._train, self._placed, self._mesh = train, placed, mesh
    self._ids = np.asarray(ids)
    self._batch_size = batch_size
    self._local = sharding.local_positions(mesh, batch_size)
    self._images = None
    if finetuning is not None:
      self._images = finetuning.images["train"]
      self._augment = augment.make(augmented)
      self._train = {n: x for n, x in train.items() if n != "query"}

  def ahead(self, seeds: Sequence[int], first: int, last: int) -> Iterator[Any]:
    """Batches on the devices, of the steps first..last-1.

    Those of several seeds are stacked, [S, B, ...].
    """
    if len(seeds) == 1:
      each = self.batches(seeds[0], first, last)
      return input_pipeline.ahead(each, self._put)
    each = zip(*(self.batches(seed, first, last) for seed in seeds))
    stacked = (
      {name: np.stack([b[name] for b in batch]) for name in batch[0]}
      for batch in each
    )
    return input_pipeline.ahead(stacked, jax.device_put)

  def example(self) -> dict[str, Any]:
    """The first batch of seed 0, on the devices."""
    return self._put(next(self.batches(0, 0, 1)))

  def batches(
    self, seed: int, first: int, last: int
  ) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the batches of the steps first..last-1."""
    which = {
      "batch_size": self._batch_size,
      "seed": seed,
      "first_step": first,
      "last_step": last,
      "local": self._local,
    }
    if self._images is None:
      return input_pipeline.train_batches(self._train, **which)
    return images.train_batches(
      self._train, self._images, self._augment, **which
    )

  def looked_up(
    self, seed: int, step: int
  ) -> tuple[dict[str, Any], np.ndarray]:
    """This process's part of a batch with its neighbours, on the host.

    All processes must call it.

    Args:
      seed: of the run.
      step: from 0.

    Returns:
      The batch with `neighbors`, and the ids of its examples.
    """
    (batch,) = self.batches(seed, step, step + 1)
    joined = self._placed.join(batch)
    if "neighbors" not in joined:
      rows = sharding.put_batch(batch["rows"], self._mesh, self._batch_size)
      found = jax.jit(self._placed.gather)(self._placed.memory, rows)
      whole = Memory(*sharding.fetch(tuple(found)))
      own = jax.tree.map(lambda x: x[self._local], whole)
      joined = joined | {"neighbors": own}
    position = step * self._batch_size + self._local
    numbers = input_pipeline.numbers(position, len(self._ids), seed)
    return joined, self._ids[numbers]

  def _put(self, batch: dict[str, Any]) -> dict[str, Any]:
    batch = self._placed.join(batch)
    return sharding.put_batch(batch, self._mesh, self._batch_size)
