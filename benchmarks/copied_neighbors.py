"""The usual way to train with neighbours: copies in every record, projected.

Each example's record holds the keys and values of its k neighbours. They are
read, decoded, shuffled and batched by tf.data, and go to the device with every
batch. The model is `build("mam_paper")` as one would first write it: a Dense
layer projects all k keys. Loss, optimizer and step are those of this library.
"""

import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from retrieval_aug import models
from retrieval_aug.common import files, manifest, progress
from retrieval_aug.common.tf import import_tensorflow
from retrieval_aug.models import scaling

SHARDS = 4
# Records to draw from, and batches that are ready.
_SHUFFLED, _AHEAD = 1024, 2


class ProjectedLayer(nn.Module):
  """Eq. 5 with a psi_K on all k keys."""

  dim: int

  def setup(self):
    lecun = nn.initializers.lecun_normal()
    self.query = nn.Dense(self.dim, kernel_init=lecun)
    self.key = nn.Dense(self.dim, use_bias=False, kernel_init=lecun)
    self.output = nn.Dense(self.dim)

  def project(self, keys: Array) -> Array:
    """psi_K of keys [B, k, d]."""
    return self.key(keys)

  def __call__(self, f: Array, psi_k: Array, values: Array) -> Array:
    """What is added to the query, [B, d].

    Args:
      f: [B, d].
      psi_k: [B, k, d].
      values: [B, k, d_v].
    """
    psi_q = self.query(f)
    logits = jnp.einsum("bd,bkd->bk", psi_q, psi_k) / math.sqrt(self.dim)
    attended = jnp.einsum("bk,bkv->bv", nn.softmax(logits), values)
    return self.output(attended)


class ProjectedMAM(nn.Module):
  """Eq. 6; all neighbours count. Parameters are named as those of `MAM`.

  Attributes:
    num_layers: L.
    share_layers: one set of weights for all layers.
    project_once: of shared layers, whether the projected keys are kept.
  """

  num_layers: int = 8
  share_layers: bool = True
  project_once: bool = False

  @nn.compact
  def __call__(
    self,
    query: Array,
    keys: Array,
    values: Array,
    mask: Array | None = None,
    *,
    train: bool = False,
    return_attention: bool = False,
  ) -> tuple[Array, None]:
    """The refined query [B, d]; called as `Classifier` calls a fusion."""
    del mask, train, return_attention
    scaled = lambda x: scaling.scaled(x, "sqrt_d", jnp.float32)
    keys, values = scaled(keys), scaled(values)
    count = 1 if self.share_layers else self.num_layers
    layers = [
      ProjectedLayer(query.shape[-1], name=f"layer_{i}") for i in range(count)
    ]
    kept = layers[0].project(keys) if self.project_once else None
    f = query
    for index in range(self.num_layers):
      layer = layers[index % count]
      psi_k = layer.project(keys) if kept is None else kept
      f = query + layer(scaled(f), psi_k, values)
    return f, None


def model(num_classes: int, **options: Any) -> models.Classifier:
  """`build("mam_paper")` with projected keys: same parameters, same logits."""
  return models.Classifier(
    head=models.Linear(num_classes), fusion=ProjectedMAM(**options)
  )


def artifact(
  folder: pathlib.Path, neighbors: manifest.Artifact, count: int
) -> manifest.Artifact:
  """The records of the first `count` examples, named by their inputs."""
  return manifest.Artifact(
    folder,
    "records with copied neighbors",
    {"neighbors": neighbors.fingerprint, "count": count},
  )


def write(
  to: manifest.Artifact,
  query: np.ndarray,
  label: np.ndarray,
  rows: np.ndarray,
  keys: np.ndarray,
  values: np.ndarray,
) -> None:
  """Writes a record for each example, unless they are there.

  Args:
    to: from `artifact`.
    query: [n, d].
    label: [n].
    rows: [n, k], of keys and values; none is a pad.
    keys: [U, d], may be mapped from a file.
    values: [U, d_v], likewise.
  """
  if to.is_complete():
    return
  tf = import_tensorflow()

  def feature(array: np.ndarray):
    data = array.astype("<f2", copy=False).tobytes()
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))

  def record(i: int) -> bytes:
    number = tf.train.Int64List(value=[int(label[i])])
    features = {
      "label": tf.train.Feature(int64_list=number),
      "query": feature(query[i]),
      "keys": feature(keys[rows[i]]),
      "values": feature(values[rows[i]]),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString()

  with files.lock(to.folder):
    to.start()
    names = [f"{i:05d}" for i in range(SHARDS)]
    parts = np.array_split(np.arange(len(label)), SHARDS)
    bar = progress.bar(total=len(label), what="copy neighbors", unit="example")
    with bar:
      for name, part in zip(names, parts):
        path = to.folder / f"{name}.tfrecord"
        with files.atomic_path(path) as temporary:
          with tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
            for i in part.tolist():
              writer.write(record(i))
              bar.update()
        to.record(name, [path.name])
    to.finish(names)


def paths(of: manifest.Artifact) -> list[pathlib.Path]:
  """The files of finished records."""
  return [of.folder / f"{name}.tfrecord" for name in of.shards()]


def batches(
  paths: Sequence[pathlib.Path], k: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Endless, shuffled batches.

  Args:
    paths: of the records.
    k: neighbours in each.
    batch_size: B.

  Yields:
    query [B, d], keys [B, k, d] and values [B, k, d_v] in float16, label int32
    [B]. They are decoded in whole batches, which costs less than one by one.
  """
  tf = import_tensorflow()
  spec = {"label": tf.io.FixedLenFeature([], tf.int64)}
  for name in ("query", "keys", "values"):
    spec[name] = tf.io.FixedLenFeature([], tf.string)

  def parse(records):
    x = tf.io.parse_example(records, spec)
    # As integers of the same width: TensorFlow warns of float16 on most CPUs.
    raw = lambda name: tf.io.decode_raw(x[name], tf.uint16)
    neighbors = {
      n: tf.reshape(raw(n), [batch_size, k, -1]) for n in ("keys", "values")
    }
    label = tf.cast(x["label"], tf.int32)
    return {"query": raw("query"), "label": label, **neighbors}

  data = tf.data.TFRecordDataset(
    [os.fspath(p) for p in paths], num_parallel_reads=len(paths)
  )
  data = data.repeat().shuffle(_SHUFFLED).batch(batch_size, drop_remainder=True)
  data = data.map(parse, num_parallel_calls=tf.data.AUTOTUNE).prefetch(_AHEAD)
  for batch in data.as_numpy_iterator():
    label = batch.pop("label")
    yield {n: x.view("<f2") for n, x in batch.items()} | {"label": label}
