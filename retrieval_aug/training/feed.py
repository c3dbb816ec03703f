"""What a step is fed with: batches on the devices, ahead of their step."""

import contextlib
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
    # Images and gathered neighbours are large.
    large = finetuning is not None or placed.kind == "host"
    self._at_once = 1
    if not large:
      self._at_once = input_pipeline.steps_at_once(len(self._local))
    self._images = None
    if finetuning is not None:
      self._images = finetuning.images["train"]
      self._augment = augment.make(augmented)
      self._train = {n: x for n, x in train.items() if n != "query"}

  def ahead(
    self, seeds: Sequence[int], first: int, last: int
  ) -> Iterator[tuple[dict[str, Any], int]]:
    """The batches of the steps first..last-1, on the devices.

    Small ones are sent some steps at a time: a transfer takes longer to begin
    than to do.

    Yields:
      A chunk [C, B, ...], of several seeds [C, S, B, ...], and the place of the
      step's batch in it.
    """
    each = [self._chunks(seed, first, last) for seed in seeds]
    put = self._put
    if len(seeds) > 1:  # on one device
      put = lambda chunks: sharding.replicate(
        {n: np.stack([c[n] for c in chunks], axis=1) for n in chunks[0]},
        self._mesh,
      )
    chunks = input_pipeline.ahead(
      each[0] if len(seeds) == 1 else zip(*each), put
    )
    with contextlib.closing(chunks):
      for number, chunk in enumerate(chunks):
        begin = first + number * self._at_once
        for place in range(min(self._at_once, last - begin)):
          yield chunk, place

  def example(self) -> dict[str, Any]:
    """The first chunk of seed 0, on the devices."""
    return self._put(next(self._chunks(0, 0, 1)))

  def _chunks(
    self, seed: int, first: int, last: int
  ) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of batches, `_at_once` of them stacked."""
    if self._images is not None:
      for batch in self.batches(seed, first, last):
        yield {name: x[None] for name, x in batch.items()}
      return
    yield from input_pipeline.train_chunks(
      self._train,
      self._batch_size,
      seed,
      first,
      last,
      self._local,
      self._at_once,
    )

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

  def _put(self, chunk: dict[str, Any]) -> dict[str, Any]:
    chunk = self._placed.join(chunk)
    return sharding.put_batch(chunk, self._mesh, self._batch_size, before=1)
