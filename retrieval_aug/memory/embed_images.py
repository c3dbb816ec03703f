"""Images to embeddings: each is loaded once for all encoders that look at it.

All devices of this machine share each batch.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from retrieval_aug.common import progress
from retrieval_aug.datasets.types import ImageItems
from retrieval_aug.encoders import Encoder, devices, prefetch


class ImageEncoders:
  """Encoders of images in one process, compiled once.

  Attributes:
    encoders: the encoder of the keys, and those of visual values.
  """

  def __init__(
    self,
    encoders: Sequence[Encoder],
    *,
    batch_size: int,
    most: int,
    memory_gb: float | None,
  ):
    """Nothing is compiled yet.

    Args:
      encoders: at least one.
      batch_size: images an encoder sees at once; 0: the largest power of two
        that fits.
      most: the largest batch that is worth while, for 0.
      memory_gb: of each device, for 0; see `devices.largest_batch`.
    """
    self.encoders = list(encoders)
    self._size = batch_size
    self._most, self._memory_gb = most, memory_gb

  def sifter(self, items: ImageItems, hint: str, skip: bool) -> prefetch.Sifter:
    """What loads images for these encoders.

    Args:
      items: that have them.
      hint: follows the message about one that cannot be read.
      skip: whether such are left out.
    """
    loader = prefetch.Loader(
      items.name,
      items.ids,
      items.image,
      tuple(e.prepare for e in self.encoders),
      hint,
    )
    return prefetch.Sifter(loader, skip)

  def embed(
    self,
    pool: prefetch.Pool,
    sifter: prefetch.Sifter,
    indices: Sequence[int],
    tick: Callable[[int], None],
  ) -> tuple[list[np.ndarray], dict[int, str]]:
    """Embeds images with each encoder.

    Args:
      pool: of workers that run `sifter`.
      sifter: loads images.
      indices: of the images.
      tick: is told how many were done since it was last called.

    Returns:
      Of each encoder float32 `[n, dim]`, in the order of `indices` but for
      images that were left out; and why each of those was, by index.

    Raises:
      UserError: an image cannot be read, and is not to be left out.
    """
    size = self._batch(sifter, indices)
    found: list[list[np.ndarray]] = [
      [np.zeros((0, e.dim), np.float32)] for e in self.encoders
    ]
    faults: dict[int, str] = {}
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    for batch, sifted in pool.ahead(batches):
      for runner, seen, out in zip(self._runners, sifted.prepared, found):
        out.append(runner(seen, size))
      faults |= sifted.faults
      tick(len(batch))
    return [np.concatenate(out) for out in found], faults

  @functools.cached_property
  def _runners(self) -> list[devices.Runner]:
    return [devices.Runner(e) for e in self.encoders]

  def _batch(self, sifter: prefetch.Sifter, indices: Sequence[int]) -> int:
    """Images at once; found with the first image that can be read."""
    for i in indices:
      if self._size:
        break
      example = sifter([i])
      if example.indices:
        self._size = devices.largest_batch(
          self._runners,
          example.prepared,
          most=self._most,
          memory_gb=self._memory_gb,
        )
        progress.note(f"embed {sifter.name}: {self._size} images at once")
    return self._size or 1
