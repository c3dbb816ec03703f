"""Images that are trained on: decoded once into a cache, read in batches.

A cache holds the images of one split in one of two forms. "prepared" is the
square that the encoder sees, made by the encoder's own `prepare`: for
evaluation, and for training without a crop. "whole" is the whole image, for
crops: its shorter side is 8/7 of the encoder's (256 for 224), or its own where
that is smaller. Per shard: `pixels_00000.bin`, the uint8 values of one image
after the other, and `shapes_00000.npy`, int32 [rows, 2], heights and widths.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from retrieval_aug.common import files, manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.common.tf import import_tensorflow
from retrieval_aug.datasets.types import Downstream
from retrieval_aug.encoders import Encoder, prefetch
from retrieval_aug.memory.table import Table
from retrieval_aug.training import input_pipeline
from retrieval_aug.training.augment import Augment

FORMS = ("prepared", "whole")

_BATCH = 16  # that a worker loads at a time
_SAMPLE = 8  # that tell how large the others are


def cache_artifact(
  folder: pathlib.Path, queries: Table, split: str, form: str, shard_rows: int
) -> manifest.Artifact:
  """The cache of one split in one form, named by its inputs.

  Args:
    folder: of all caches of an experiment.
    queries: table of the same images, which names them and their encoder.
    split: "train", "val" or "test".
    form: one of `FORMS`.
    shard_rows: images a shard.
  """
  return manifest.Artifact(
    folder / f"{split}_{form}",
    "image cache",
    {
      "items": queries.inputs["items"],
      "encoder": queries.inputs["encoder"],
      "split": split,
      "form": form,
      "shard_rows": shard_rows,
    },
  )


def changes(cache: manifest.Artifact, name: str, now: dict) -> list[str]:
  """What has changed of an input of a cache, a line each."""
  # Through JSON, as the manifest went: there are no tuples there.
  return manifest.differences(cache.inputs[name], json.loads(json.dumps(now)))


def make(
  artifact: manifest.Artifact,
  items: Downstream,
  encoder: Encoder,
  *,
  threads: int,
  processes: int = 0,
) -> None:
  """Writes a cache; finished shards of a killed run are kept.

  Args:
    artifact: from `cache_artifact`.
    items: what was embedded, in the order of the table.
    encoder: that embedded it.
    threads: that load images.
    processes: that do so instead of threads.

  Raises:
    UserError: `items` are not what was embedded; an image cannot be read.
  """
  differing = changes(artifact, "items", items.fingerprint)
  if differing:
    raise UserError(
      f"config.dataset: these are not the images that were embedded "
      f"({'; '.join(differing[:3])}); put the settings back, or choose another "
      "--workdir."
    )
  split, form, step = (
    artifact.inputs[name] for name in ("split", "form", "shard_rows")
  )
  rows = [i for i, s in enumerate(items.splits) if s == split]
  loader = prefetch.Loader(
    items.name, items.ids, items.image, (encoder.prepare,)
  )
  # What the encoder makes of an image is the one thing that says its side.
  size = loader(rows[:1])[0].shape[1]
  if form == "whole":
    prepare = functools.partial(_shrunk, side=round(size * 8 / 7))
    loader = dataclasses.replace(loader, prepares=(prepare,))
  names = [f"{i:05d}" for i in range(-(-len(rows) // step))]
  sample = loader(rows[:: -(-len(rows) // _SAMPLE)])[0]
  per_image = sum(x.nbytes for x in sample) / len(sample)
  progress.note(
    f"images {split}: {len(rows):,} {form}, about "
    f"{len(rows) * per_image / 1e6:,.0f} MB on disk"
  )
  with (
    files.lock(artifact.folder),
    progress.bar(total=len(rows), what=f"images {split}", unit="image") as bar,
    prefetch.pool(loader, threads=threads, processes=processes) as pool,
  ):
    artifact.start()
    for number, name in enumerate(names):
      chosen = rows[number * step : (number + 1) * step]
      if artifact.recorded(name):
        bar.update(len(chosen))
        continue
      batches = [chosen[i : i + _BATCH] for i in range(0, len(chosen), _BATCH)]
      _write_shard(artifact, name, _counted(pool.ahead(batches), bar))
    artifact.finish(names, {"rows": len(rows), "size": size})


def _counted(loaded: Iterable[Any], bar: Any) -> Iterator[np.ndarray]:
  for _, (images,) in loaded:
    yield from images
    bar.update(len(images))


def _write_shard(
  artifact: manifest.Artifact, name: str, images: Iterator[np.ndarray]
) -> None:
  pixels, shapes = f"pixels_{name}.bin", f"shapes_{name}.npy"
  sides = []
  with (
    files.atomic_path(artifact.folder / pixels) as temporary,
    open(temporary, "wb") as f,
  ):
    for image in images:
      sides.append(image.shape[:2])
      f.write(np.ascontiguousarray(image))
  with files.atomic_path(artifact.folder / shapes) as temporary:
    np.save(temporary, np.array(sides, np.int32))
  artifact.record(name, [pixels, shapes])


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
  """Makes the shorter side of uint8 [H, W, 3] `side` pixels, if it is longer.

  The ratio of the sides stays, but for rounding.
  """
  height, width, _ = image.shape
  shorter = min(height, width)
  if shorter <= side:
    return image
  sides = round(width * side / shorter), round(height * side / shorter)
  resized = Image.fromarray(image).resize(sides, Image.Resampling.BICUBIC)
  return np.asarray(resized)


def _shrunk(images: list[np.ndarray], side: int) -> list[np.ndarray]:
  return [shrunk(image, side) for image in images]


class Images:
  """A finished cache, opened for reading.

  Attributes:
    size: side of the encoder's input in pixels.
  """

  def __init__(self, artifact: manifest.Artifact, *, check: bool = True):
    """Opens it.

    Args:
      artifact: the cache.
      check: whether to verify it, which reads all; one of several processes is
        enough.

    Raises:
      UserError: it is not finished, or a file of it is damaged.
    """
    if not artifact.is_complete():
      raise UserError(f"{artifact.folder}: not finished; {artifact.remedy}.")
    if check:
      artifact.verify()
    self.size = artifact.info()["size"]
    self._rows = artifact.info()["rows"]
    self._shard_rows = artifact.inputs["shard_rows"]
    self._shards = []
    for name in artifact.shards():
      shapes = np.load(
        artifact.folder / f"shapes_{name}.npy", allow_pickle=False
      )
      ends = np.cumsum(3 * shapes.astype(np.int64).prod(axis=1))
      # Pages that are read come and go with the memory that there is.
      pixels = np.memmap(
        artifact.folder / f"pixels_{name}.bin", np.uint8, mode="r"
      )
      self._shards.append((pixels, shapes, ends))

  def __len__(self) -> int:
    return self._rows

  def image(self, number: int) -> np.ndarray:
    """One image, uint8 [H, W, 3]; safe to call from threads."""
    shard, row = divmod(int(number), self._shard_rows)
    pixels, shapes, ends = self._shards[shard]
    height, width = shapes[row]
    start = ends[row] - 3 * int(height) * int(width)
    return np.array(pixels[start : ends[row]]).reshape(height, width, 3)

  def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
    """Prepared images, uint8 [B, size, size, 3], by numbers [B]."""
    return np.stack([self.image(number) for number in numbers])


def train_batches(
  arrays: dict[str, np.ndarray],
  images: Images,
  augment: Augment,
  *,
  batch_size: int,
  seed: int,
  first_step: int,
  last_step: int,
  local: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """As `input_pipeline.train_batches`, in its order, with images.

  An image is augmented by a function of (seed, position), its position among
  all that are ever seen: step * batch_size + its place in the batch.

  Args:
    arrays: equally long arrays, [N, ...].
    images: N of them, in the form that `augment` takes.
    augment: from `augment.make`.
    batch_size: examples a batch.
    seed: of the order and of the augmentation.
    first_step: where to begin.
    last_step: where to stop.
    local: see `input_pipeline.train_batches`: [b].

  Yields:
    The arrays' rows, and `images`: uint8 [b, size, size, 3].
  """
  tf = import_tensorflow()
  # Labels and rows: no array in half precision, of which TensorFlow warns.
  tensors = {name: tf.constant(x) for name, x in arrays.items()}

  def example(position: Any) -> dict[str, Any]:
    number = input_pipeline.shuffled(position, len(images), seed)
    image = tf.numpy_function(images.image, [number], tf.uint8)
    image.set_shape([None, None, 3])
    image = augment(image, tf.stack([seed, position]), images.size)
    found = {name: tf.gather(x, number) for name, x in tensors.items()}
    return found | {"images": image}

  local = np.arange(batch_size) if local is None else local
  data = tf.data.Dataset.range(first_step, last_step).flat_map(
    lambda step: tf.data.Dataset.from_tensor_slices(
      input_pipeline.positions_of(step, batch_size, local)
    )
  )
  data = data.map(
    tf.autograph.experimental.do_not_convert(example),
    num_parallel_calls=tf.data.AUTOTUNE,
    deterministic=True,
  )
  data = data.batch(len(local), drop_remainder=True)
  # Two batches: they are large, and the step is slow beside their making.
  return data.prefetch(2).as_numpy_iterator()
