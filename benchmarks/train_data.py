"""A generated set of the size of ImageNet-LT, as the stages would leave it.

The artifacts are real and are read as any others: a table of examples, their
neighbour shards, and the working set. No search was done: the memory is a ring
of positions in which each class has a part, an example has a place in the part
of its class, and its neighbours are near that place, so that lists share rows.
A seeded permutation says which row of the memory a position is: rows that are
found together do not lie together.
"""

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from retrieval_aug.common import files, manifest, progress
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import neighbors, table, working_set
from retrieval_aug.memory.search import SearchResult

VALUES = "text"  # name of the value encoder
SPLITS = neighbors.SPLITS
SHARD_ROWS = 16384

# Of ImageNet-LT: examples, classes, and those of its largest and smallest.
EXAMPLES, CLASSES, MOST, LEAST = 115_846, 1000, 1280, 5

# A list takes one of so many positions near its place.
_SPARSE = 3
# Rows that are generated at once.
_PART_ROWS = 1 << 15


class Sizes(NamedTuple):
  """Of a generated set.

  Attributes:
    examples: N, to train on.
    classes: C; as many examples each are to validate and to test on.
    memory: M, rows of the memory.
    neighbors: k.
    dim: d.
    value_dim: d_v.
  """

  examples: int = EXAMPLES
  classes: int = CLASSES
  memory: int = 1_000_000
  neighbors: int = 100
  dim: int = 768
  value_dim: int = 768


class Artifacts(NamedTuple):
  """What `make` wrote."""

  queries: table.Table
  neighbors: manifest.Artifact
  working_set: manifest.Artifact


def class_counts(examples: int, classes: int) -> np.ndarray:
  """Examples of each class, the largest first: a bounded Pareto tail.

  Args:
    examples: their exact sum. Where it is not ImageNet-LT's, the largest and
      smallest class are so much smaller or larger.
    classes: C.

  Returns:
    Int64 [C]: of ImageNet-LT's size 1,280 to 5.
  """
  part = examples / classes / (EXAMPLES / CLASSES)
  most, least = MOST * part, max(1.0, LEAST * part)
  place = np.linspace(0.0, 1.0, classes)

  def counts(alpha: float) -> np.ndarray:
    """The quantiles of a Pareto distribution between its bounds."""
    high, low = most**-alpha, least**-alpha
    return (high + (low - high) * place) ** (-1 / alpha)

  low, high = 1e-3, 20.0  # a larger alpha has a heavier tail
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (
      (middle, high) if counts(middle).sum() > examples else (low, middle)
    )
  exact = counts(high)
  found = np.maximum(1, np.floor(exact)).astype(np.int64)
  found[[0, -1]] = round(most), round(least)
  # Those that lost most to rounding get what is missing.
  missing = examples - int(found.sum())
  inner = 1 + np.argsort(found[1:-1] - exact[1:-1], kind="stable")
  if not 0 <= missing <= len(inner):
    raise UserError(
      f"{examples} examples are too few for {classes} classes with a long tail."
    )
  found[inner[:missing]] += 1
  return found


def make(folder: pathlib.Path, sizes: Sizes) -> Artifacts:
  """Generates the set in a folder, unless it is there."""
  if sizes.memory < _SPARSE * sizes.neighbors:
    raise UserError(
      f"a memory of {sizes.memory} rows: make it {_SPARSE * sizes.neighbors} "
      "or more."
    )
  generated = {"generated": sizes._asdict()}
  queries = manifest.Artifact(folder / "queries", table.KIND, generated)
  found = manifest.Artifact(folder / "neighbors", neighbors.KIND, generated)
  rows = working_set.working_set_artifact(
    folder / "working_set", found, [VALUES]
  )
  with files.lock(folder):
    if not queries.is_complete():
      _make_queries(queries, sizes)
    if not found.is_complete():
      _make_neighbors(found, table.Table(queries.folder), sizes)
    if not rows.is_complete():
      _make_working_set(rows, found, sizes)
  return Artifacts(table.Table(queries.folder), found, rows)


def _bar(items: Sequence[Any], what: str, unit: str) -> Iterable[Any]:
  return progress.bar(
    items, total=len(items), what=f"generate {what}", unit=unit
  )


def _labels(sizes: Sizes) -> dict[str, np.ndarray]:
  """Class of each example by split, shuffled."""
  classes = np.arange(sizes.classes)
  train = np.repeat(classes, class_counts(sizes.examples, sizes.classes))
  parts = dict(zip(SPLITS, (train, classes, classes)))
  rng = np.random.default_rng(0)
  return {split: rng.permutation(labels) for split, labels in parts.items()}


def _centers(dim: int, sizes: Sizes, seed: int) -> np.ndarray:
  """A direction for each class, float32 [C, dim]."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((sizes.classes, dim), np.float32)


def _around(centers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Unit vectors near some centers, float16 of their shape."""
  out = rng.standard_normal(centers.shape, np.float32)
  out += centers
  out /= np.sqrt(np.einsum("nd,nd->n", out, out))[:, None]
  return out.astype(np.float16)


def _make_queries(artifact: manifest.Artifact, sizes: Sizes) -> None:
  labels = _labels(sizes)
  split = np.repeat(SPLITS, [len(labels[s]) for s in SPLITS])
  label = np.concatenate([labels[s] for s in SPLITS])
  centers = _centers(sizes.dim, sizes, seed=1)
  rng = np.random.default_rng(2)
  artifact.start()
  shards = range(math.ceil(len(label) / SHARD_ROWS))
  for shard in _bar(shards, "queries", "shard"):
    part = slice(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
    table.write_shard(
      artifact,
      shard,
      keys=_around(centers[label[part]], rng),
      values={},
      metadata={
        "id": [f"{i:06d}" for i in range(len(label))[part]],
        "label": label[part],
        "split": split[part],
      },
    )
  artifact.finish(
    [table.shard_name(i) for i in shards],
    {"key_dims": sizes.dim, "value_dims": {}},
  )


def _make_neighbors(
  artifact: manifest.Artifact, queries: table.Table, sizes: Sizes
) -> None:
  row_at = _row_at(sizes)
  labels = np.asarray(queries.column("label"))
  ids = np.asarray(queries.column("id"))
  rng = np.random.default_rng(3)
  artifact.start()
  shards = neighbors.layout(queries.column("split"), SHARD_ROWS)
  for shard in _bar(shards, "neighbors", "shard"):
    label = labels[shard.rows]
    path = artifact.folder / f"{shard.name}.tfrecord"
    neighbors.write_shard(
      path,
      ids[shard.rows].tolist(),
      label.tolist(),
      queries.key_rows(shard.rows),
      _lists(label, row_at, sizes, rng),
    )
    artifact.record(shard.name, [path.name])
  artifact.finish(
    [shard.name for shard in shards], {"k": sizes.neighbors, "dims": sizes.dim}
  )


def _row_at(sizes: Sizes) -> np.ndarray:
  """Row of the memory at each position of the ring, int64 [M]."""
  return np.random.default_rng(4).permutation(sizes.memory)


def _lists(
  label: np.ndarray,
  row_at: np.ndarray,
  sizes: Sizes,
  rng: np.random.Generator,
) -> SearchResult:
  """Neighbours of some examples: rows [n, k], best first, none twice."""
  shape = (len(label), sizes.neighbors)
  part = sizes.memory / sizes.classes
  place = ((label + rng.random(len(label))) * part).astype(np.int64)
  # 0, 1, 2, 3, 4, ... becomes 0, -1, 1, -2, 2, ...
  away = _SPARSE * np.arange(sizes.neighbors) + rng.integers(0, _SPARSE, shape)
  away = np.where(away % 2, -(away + 1) // 2, away // 2)
  scores = -np.sort(-rng.uniform(0.3, 0.9, shape), axis=1)
  return SearchResult(
    row_at[(place[:, None] + away) % sizes.memory], scores.astype(np.float32)
  )


def _make_working_set(
  artifact: manifest.Artifact, found: manifest.Artifact, sizes: Sizes
) -> None:
  named = np.zeros(sizes.memory, bool)
  for shard in found.shards():
    named[neighbors.read_lists(found, shard).ids] = True
  rows = np.flatnonzero(named)
  position = np.empty(sizes.memory, np.int64)
  position[_row_at(sizes)] = np.arange(sizes.memory)
  labels = (position[rows] * sizes.classes // sizes.memory).astype(np.int32)
  whole = {
    "rows": rows,
    "sources": np.zeros(len(rows), np.int32),
    "labels": labels,
  }
  artifact.start()
  for name, array in whole.items():
    with files.atomic_path(artifact.folder / f"{name}.npy") as path:
      np.save(path, array)
  # The keys of a class are near its queries.
  matrices = {"keys": (sizes.dim, 1), f"values_{VALUES}": (sizes.value_dim, 5)}
  for name, (dim, seed) in matrices.items():
    centers = _centers(dim, sizes, seed)
    _generate(
      artifact.folder / f"{name}.npy",
      (len(rows), dim),
      lambda part, rng, centers=centers: _around(centers[labels[part]], rng),
    )
  shapes = {name: list(array.shape) for name, array in whole.items()}
  shapes |= {name: [len(rows), dim] for name, (dim, _) in matrices.items()}
  artifact.record("all", [f"{n}.npy" for n in shapes], shapes)
  artifact.finish(
    ["all"], {"source_names": ["memory"], "value_names": [VALUES]}
  )


def _generate(
  path: pathlib.Path,
  shape: tuple[int, int],
  rows: Callable[[slice, np.random.Generator], np.ndarray],
) -> None:
  """Writes a float16 matrix, a part at a time."""
  rng = np.random.default_rng(6)
  starts = range(0, shape[0], _PART_ROWS)
  with files.atomic_path(path) as temporary:
    out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
    for start in _bar(starts, path.stem, "part"):
      part = slice(start, min(start + _PART_ROWS, shape[0]))
      out[part] = rows(part, rng)
    out.flush()
