"""Fine-tuning (+FT): the encoder of the queries is trained with the fusion.

Neighbours, keys and values stay those of the encoder as it was published
(DESIGN decision 11); only z comes from the one that is trained, through the
key transform of the neighbours, which is not trained: z begins where the
stored query was, in the space of the keys.

The trained parameters are the model's own, under their own names, and
`encoder/...`. Every array of the encoder trains. (EfficientNet-Lite has no
statistics that would have to be kept: its BatchNorm is part of the kernels.)
"""

import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from retrieval_aug.common import distributed, manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.datasets.types import Downstream
from retrieval_aug.encoders import Encoder
from retrieval_aug.memory import key_transform
from retrieval_aug.memory.key_transform import KeyTransform
from retrieval_aug.memory.table import Table
from retrieval_aug.training import augment, images, start
from retrieval_aug.training.step import Query

_WAIT = 7 * 86400.0  # seconds


class FineTuning(NamedTuple):
  """What is needed beside what training on stored queries needs.

  Attributes:
    encoder: of queries and keys, as it was when it made them.
    transform: from its embeddings to queries, that of the neighbours.
    images: split -> its images; those to train on in the form that the
      augmentation takes, the others prepared.
  """

  encoder: Encoder
  transform: KeyTransform
  images: dict[str, images.Images]

  def query(self, at_once: int) -> Query:
    """See `query`."""
    return query(self.encoder.apply, self.transform, at_once)


def query(
  apply: Callable[[Any, Array], Array], transform: KeyTransform, at_once: int
) -> Query:
  """The function from images to queries, for `jax.jit` and `jax.grad`.

  Args:
    apply: of the encoder.
    transform: what follows it.
    at_once: images that the encoder sees at once; 0 is all. What it computes
      on the way is then only held for so many: going backward it is computed
      again.
  """

  def call(params: Any, pixels: Array) -> Array:
    x = _in_parts(apply, params, pixels, at_once) - transform.mean[None, :]
    if transform.matrix is None:
      return x
    # As the stored queries, in float32: an accelerator's faster product of
    # fewer bits would lose the small directions that whitening enlarges.
    return jnp.dot(x, transform.matrix, precision=jax.lax.Precision.HIGHEST)

  return call


def _in_parts(apply, params, pixels: Array, at_once: int) -> Array:
  batch = pixels.shape[0]
  if not 0 < at_once < batch:
    return apply(params, pixels)
  parts = -(-batch // at_once)
  padding = ((0, parts * at_once - batch), (0, 0), (0, 0), (0, 0))
  # Every part has images from the whole batch, so that one which is split over
  # devices stays split.
  split = jnp.pad(pixels, padding).reshape(at_once, parts, *pixels.shape[1:])
  one = jax.checkpoint(functools.partial(apply, params))
  found = jax.lax.map(one, split.swapaxes(0, 1))  # [parts, at_once, d]
  return found.swapaxes(0, 1).reshape(parts * at_once, -1)[:batch]


def check(model: str, train: dict[str, Any]) -> None:
  """Refuses to fine-tune where it makes no sense.

  Args:
    model: its name.
    train: its `settings.train_settings`.

  Raises:
    UserError: the model has nothing to train, or one of the settings of
      fine-tuning is wrong.
  """
  if model == "vote":
    raise UserError(
      "config.model.vote.train.finetune=True: a vote trains nothing, and takes "
      "the stored queries; set it to False."
    )
  if train["encoder_batch"] < 0:
    raise UserError(
      f"config.train.encoder_batch={train['encoder_batch']}: must be 0 (all "
      "at once) or a number of images."
    )
  augment.make(train["augment"])


def cache_artifact(
  folder: pathlib.Path,
  queries: Table,
  split: str,
  train: dict[str, Any],
  shard_rows: int,
) -> manifest.Artifact:
  """The images of a split as a model needs them.

  Args:
    folder: of all caches of an experiment.
    queries: table of the same images.
    split: "train" is augmented as `train` says, the others are not.
    train: `settings.train_settings` of the model.
    shard_rows: images a shard.
  """
  whole = split == "train" and augment.make(train["augment"]).crops
  form = "whole" if whole else "prepared"
  return images.cache_artifact(folder, queries, split, form, shard_rows)


def load(
  neighbors: manifest.Artifact,
  caches: Iterable[manifest.Artifact],
  encoder: Encoder,
  items: Callable[[], Downstream],
  *,
  threads: int,
  processes: int = 0,
) -> FineTuning:
  """Brings together what fine-tuning needs; makes the caches that are missing.

  Args:
    neighbors: the finished neighbour shards, whose key transform is taken.
    caches: of images, from `cache_artifact`.
    encoder: of the queries.
    items: gives the images; called only if a cache is missing.
    threads: that load images.
    processes: that do so instead of threads.

  Raises:
    UserError: the encoder or the images are not those of the stored queries,
      or a file is damaged.
  """
  if encoder.modality != "image":
    raise UserError(
      f"config.encoder.name={encoder.name}: an encoder of {encoder.modality}s; "
      "only one of images can be fine-tuned. Choose one, or set "
      "train.finetune=False."
    )
  found = {}
  for cache in caches:
    differing = images.changes(cache, "encoder", encoder.fingerprint)
    if differing:
      raise UserError(
        f"config.encoder: not the one that made the keys "
        f"({'; '.join(differing[:3])}), whose space z must stay in; put the "
        "settings back, or choose another --workdir."
      )
    missing = not cache.is_complete()
    distributed.barrier("which images are there")
    if missing and distributed.is_first():
      images.make(cache, items(), encoder, threads=threads, processes=processes)
    # All wait for the first, however long it takes.
    distributed.barrier("images", timeout=_WAIT)
    found[cache.inputs["split"]] = images.Images(
      cache, check=distributed.is_first()
    )
  record = neighbors.shards()["key_transform"]
  ((name, digest),) = record["files"].items()
  path = neighbors.folder / name
  manifest.check_file(path, digest, neighbors.remedy)
  return FineTuning(encoder, key_transform.load(path), found)


def check_params(params: Any, encoder: Encoder, remedy: str) -> None:
  """Refuses trained parameters of an encoder that is built in another way.

  Settings that do not change what an encoder computes may change its arrays.

  Raises:
    UserError: a name or a shape differs.
  """
  differing = manifest.differences(
    start.shapes(params), start.shapes(encoder.params)
  )
  if differing:
    raise UserError(
      f"config.encoder: its arrays are not those that were fine-tuned "
      f"({'; '.join(differing[:2])}); put its settings back, or {remedy}."
    )
