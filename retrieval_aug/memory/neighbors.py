"""Neighbour shards: what the search stage writes and training reads.

A neighbour shard is a TFRecord file of `tf.train.Example`, one an example,
every payload a bytes feature of fixed length (float lists cost 14 times as
much to write): `example_id`, `label` (int64), `query` (float16 [d], after the
key transform), `neighbor_ids` (int64 [k], rows of the memory table, -1 pads)
and `neighbor_scores` (float32 [k], cosine, -inf pads).
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from retrieval_aug.common import files, manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.common.tf import import_tensorflow
from retrieval_aug.memory.search import SearchResult
from retrieval_aug.memory.table import Table

SPLITS = ("train", "val", "test")
KIND = "neighbor shards"
TRANSFORM = "key_transform.npz"

# Settings that change how a search is done, and not what it finds.
INDIFFERENT = ("groups", "memory_gb", "on_low_recall")


def neighbors_artifact(
  folder: pathlib.Path,
  queries: Table,
  memory: Table,
  config: Mapping[str, Any],
  *,
  memory_fingerprint: str | None = None,
  without: str | None = None,
) -> manifest.Artifact:
  """The neighbour shards for two tables, named by their inputs.

  Args:
    folder: where they are or will be.
    queries: table of the downstream examples.
    memory: table of the memory.
    config: the search section.
    memory_fingerprint: of an earlier version of the memory.
    without: fingerprint of the leaks that are not to be found.

  Raises:
    UserError: the two tables were made by different encoders.
  """
  differing = manifest.differences(
    memory.inputs["encoder"], queries.inputs["encoder"]
  )
  if differing:
    raise UserError(
      f"{memory.folder} and {queries.folder} were embedded by different "
      f"encoders ({'; '.join(differing[:3])}): their vectors cannot be "
      "compared; delete the wrong one to have it embedded again."
    )
  inputs = {
    "queries": queries.fingerprint,
    "memory": memory_fingerprint or memory.fingerprint,
    "search": {n: v for n, v in config.items() if n not in INDIFFERENT},
  }
  if without is not None:
    inputs["without_leaks"] = without
  return manifest.Artifact(folder, KIND, inputs)


def found_in(folder: pathlib.Path) -> manifest.Artifact | None:
  """The finished neighbour shards of a folder, whatever they were made from."""
  path = folder / manifest.NAME
  if not path.exists():
    return None
  found = files.read_json(path)
  if not (isinstance(found, dict) and found.get("kind") == KIND):
    return None
  artifact = manifest.Artifact(folder, KIND, found["inputs"])
  return artifact if artifact.is_complete() else None


class Shard(NamedTuple):
  """A neighbour shard.

  Attributes:
    name: of its file, without the suffix.
    rows: int64, of the query table.
  """

  name: str
  rows: np.ndarray


def layout(splits: Sequence[str], shard_rows: int) -> list[Shard]:
  """The shards of all splits, each of at most `shard_rows` examples."""
  splits = np.asarray(splits)
  out = []
  for split in SPLITS:
    rows = np.flatnonzero(splits == split)
    count = max(1, -(-len(rows) // shard_rows))
    for i, part in enumerate(np.array_split(rows, count)):
      name = f"neighbors-{split}-{i:05d}-of-{count:05d}"
      out.append(Shard(name, part))
  return out


def write_shard(
  path: pathlib.Path,
  ids: list[str],
  labels: list[int],
  queries: np.ndarray,
  result: SearchResult,
) -> None:
  """Writes one shard atomically; the same arguments give the same bytes.

  Args:
    path: of the file.
    ids: of the examples, [n].
    labels: [n].
    queries: [n, d], after the key transform, of any length.
    result: of [n, k], with rows of the memory table.
  """
  tf = import_tensorflow()

  def feature(data: bytes):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))

  def number(value: int):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

  with files.atomic_path(path) as temporary:
    with tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
      for i, example_id in enumerate(ids):
        features = {
          "example_id": feature(example_id.encode()),
          "label": number(labels[i]),
          "query": feature(queries[i].astype("<f2").tobytes()),
          "neighbor_ids": feature(result.ids[i].astype("<i8").tobytes()),
          "neighbor_scores": feature(result.scores[i].astype("<f4").tobytes()),
        }
        example = tf.train.Example(features=tf.train.Features(feature=features))
        # Else the order of features, and so the digest, is left to chance.
        writer.write(example.SerializeToString(deterministic=True))


def shard_paths(artifact: manifest.Artifact, split: str) -> list[pathlib.Path]:
  """The shards of one split, in order, each verified.

  Raises:
    UserError: a shard is missing, cut short or changed.
  """
  paths = []
  for name, record in artifact.shards().items():
    if name.startswith(f"neighbors-{split}-"):
      path = artifact.folder / f"{name}.tfrecord"
      manifest.check_file(path, record["files"][path.name], artifact.remedy)
      paths.append(path)
  return paths


def read_records(
  paths: Sequence[pathlib.Path], remedy: str
) -> dict[str, np.ndarray] | None:
  """What stands in neighbour shards, in order; None where they are empty.

  Args:
    paths: of the shards.
    remedy: ends a message.

  Returns:
    example_id bytes [N], label int64 [N], query float16 [N, d], neighbor_ids
    int64 [N, k] and neighbor_scores float32 [N, k].

  Raises:
    UserError: a record cannot be read.
  """
  tf = import_tensorflow()
  feature = tf.io.FixedLenFeature
  spec = {
    "example_id": feature([], tf.string),
    "label": feature([], tf.int64),
    "query": feature([], tf.string),
    "neighbor_ids": feature([], tf.string),
    "neighbor_scores": feature([], tf.string),
  }

  def parse(records):
    x = tf.io.parse_example(records, spec)
    # As integers of the same width: TensorFlow warns of float16 on most CPUs.
    x["query"] = tf.io.decode_raw(x["query"], tf.uint16)
    x["neighbor_ids"] = tf.io.decode_raw(x["neighbor_ids"], tf.int64)
    x["neighbor_scores"] = tf.io.decode_raw(x["neighbor_scores"], tf.float32)
    return x

  data = tf.data.TFRecordDataset([str(p) for p in paths])
  data = data.batch(1024).map(parse, num_parallel_calls=2).prefetch(2)
  try:
    parts = list(data.as_numpy_iterator())
  except tf.errors.OpError as error:
    reason = error.message.splitlines()[0][:160]
    names = ", ".join(p.name for p in paths)
    raise UserError(f"{names}: cannot be read ({reason}); {remedy}.") from error
  if not parts:
    return None
  out = {n: np.concatenate([p[n] for p in parts]) for n in spec}
  return out | {"query": out["query"].view("<f2")}


def read_lists(artifact: manifest.Artifact, name: str) -> SearchResult:
  """The neighbours of one finished shard, verified."""
  path = artifact.folder / f"{name}.tfrecord"
  record = artifact.shards()[name]
  manifest.check_file(path, record["files"][path.name], artifact.remedy)
  found = read_records([path], artifact.remedy)
  if found is None:
    k = artifact.info()["k"]
    return SearchResult(np.zeros((0, k), np.int64), np.zeros((0, k), "f4"))
  return SearchResult(found["neighbor_ids"], found["neighbor_scores"])


def read_split(artifact: manifest.Artifact, split: str) -> SearchResult:
  """The neighbours of the examples of one split, in order, verified."""
  names = [n for n in artifact.shards() if n.startswith(f"neighbors-{split}-")]
  parts = [read_lists(artifact, name) for name in names]
  return SearchResult(*(np.concatenate(arrays) for arrays in zip(*parts)))


def describe(artifact: manifest.Artifact) -> str:
  """One line on a finished search, for the user."""
  info = artifact.info()
  return (
    f"{info['searcher']} search, recall@{info['k']} {info['recall']:.4f} "
    f"measured on {info['recall_queries']} queries"
    + (f", {json.dumps(info['parameters'])}" if info["parameters"] else "")
  )
