"""The working set: the memory rows that any neighbour list names.

It is gathered once into dense arrays, whose rows are what training sees of the
memory: at most one row a neighbour, however large the memory is.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_aug.common import files, manifest
from retrieval_aug.common.errors import UserError
from retrieval_aug.memory import jobs, neighbors
from retrieval_aug.memory import key_transform as transforms
from retrieval_aug.memory.matrices import read_matrix
from retrieval_aug.memory.table import Table

# Rows that a worker gathers at once.
_PART_ROWS = 1 << 18

_ALL = "all"


class WorkingSet(NamedTuple):
  """The distinct memory rows that any neighbour list names.

  Attributes:
    rows: int64 [U], ascending rows of the memory table.
    keys: float16 [U, d], after the key transform; mapped, if it was read.
    values: by encoder name, float16 [U, d_v]; likewise.
    sources: int32 [U], the collection that each comes from, by number.
    labels: int32 [U], the class of each, -1 where it has none.
    source_names: name of each source.
  """

  rows: np.ndarray
  keys: np.ndarray
  values: dict[str, np.ndarray]
  sources: np.ndarray
  labels: np.ndarray
  source_names: list[str]

  def renumber(self, ids: np.ndarray) -> np.ndarray:
    """Table rows [n, k] to working-set rows int32 [n, k]; -1 stays -1."""
    found = np.searchsorted(self.rows, ids)
    found = np.minimum(found, len(self.rows) - 1)
    strange = (ids >= 0) & (self.rows[found] != ids)
    if strange.any():
      raise UserError(
        f"neighbour row {int(ids[strange][0])} is not in the working set: the "
        "two were made apart; delete the working_set folder to have it made "
        "again."
      )
    return np.where(ids < 0, -1, found).astype(np.int32)


def working_set_artifact(
  folder: pathlib.Path,
  neighbors: manifest.Artifact,
  value_names: Sequence[str],
) -> manifest.Artifact:
  """The working set of some neighbour shards, named by its inputs."""
  return manifest.Artifact(
    folder,
    "working set",
    {"neighbors": neighbors.fingerprint, "values": list(value_names)},
  )


@dataclasses.dataclass(eq=False)
class GatherJob:
  """Copies rows of the memory into dense arrays; see `jobs.Job`.

  Attributes:
    artifact: from `working_set_artifact`.
    neighbors: the shards, finished.
    queries: table of the downstream examples.
    memory: table of the memory.
    value_names: encoders whose values are wanted.
  """

  artifact: manifest.Artifact
  neighbors: manifest.Artifact
  queries: Table
  memory: Table
  value_names: Sequence[str]

  what = "gather"
  counted = "row"

  def announce(self) -> None:
    """It takes little beside the search."""

  def phases(self) -> list[str]:
    """Find the distinct rows, and gather them."""
    return ["rows", "gather"]

  def units(self, phase: str) -> list[str]:
    """What is not done yet."""
    if phase == "rows":
      return [] if self.artifact.has("rows") else ["rows"]
    return [n for n in self._parts if not self.artifact.has(n)]

  def size(self, phase: str, unit: str) -> int:
    """Rows of a part."""
    return len(self._parts[unit]) if phase == "gather" else 0

  def do(self, phase: str, unit: str, tick: Callable[[int], None]) -> None:
    """One unit; see `jobs.Job`."""
    if phase == "rows":
      found = np.zeros(0, np.int64)
      for name in self.neighbors.shards():
        if name.startswith("neighbors-"):
          ids = neighbors.read_lists(self.neighbors, name).ids
          found = np.union1d(found, ids)
      self._save("rows.npy", found[found >= 0])
      self.artifact.record("rows", ["rows.npy"])
      return
    rows = self._parts[unit]
    arrays = self._gather(rows)
    for name, array in arrays.items():
      self._save(self._part(unit, name), array)
    self.artifact.record(unit, [self._part(unit, name) for name in arrays])
    tick(len(rows))

  def finish(self) -> None:
    """Puts the parts together, and completes the artifact."""
    artifact = self.artifact
    shapes = {"rows": [len(self._rows)]}
    for name in self._gather(self._rows[:0]):
      shapes[name] = self._join(name)
    artifact.record(_ALL, [f"{n}.npy" for n in shapes], shapes)
    info = {
      "source_names": self._source_names,
      "value_names": list(self.value_names),
    }
    artifact.finish([_ALL], info)

  def close(self) -> None:
    """There is nothing to end."""

  def _gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of some rows of the memory, by name."""
    keys = self._transform(self.memory.key_rows(rows))
    return {
      "keys": keys.astype(np.float16),
      "sources": self._sources(rows),
      "labels": self._labels(rows),
      **{
        f"values_{name}": self.memory.value_rows(name, rows)
        for name in self.value_names
      },
    }

  def _part(self, unit: str, name: str) -> str:
    """Where a part of an array lies, within the folder, until it is whole."""
    return f"{self.artifact.scratch.name}/{unit}_{name}.npy"

  def _join(self, name: str) -> list[int]:
    """Concatenates one array's parts in a file; returns its shape."""
    paths = [self.artifact.folder / self._part(u, name) for u in self._parts]
    mapped = [np.load(p, mmap_mode="r", allow_pickle=False) for p in paths]
    shape = (len(self._rows), *mapped[0].shape[1:])
    with files.atomic_path(self.artifact.folder / f"{name}.npy") as temporary:
      # Part by part, so that the whole is never in memory.
      out = np.lib.format.open_memmap(temporary, "w+", mapped[0].dtype, shape)
      first = 0
      for part in mapped:
        out[first : first + len(part)] = part
        first += len(part)
      out.flush()
    return list(shape)

  def _save(self, name: str, array: np.ndarray) -> None:
    with files.atomic_path(self.artifact.folder / name) as path:
      np.save(path, array)

  @functools.cached_property
  def _rows(self) -> np.ndarray:
    self.artifact.recorded("rows")
    return np.load(self.artifact.folder / "rows.npy", allow_pickle=False)

  @property
  def _parts(self) -> dict[str, np.ndarray]:
    """Rows by part; one part at least, so that there are arrays."""
    starts = range(0, max(len(self._rows), 1), _PART_ROWS)
    return {
      f"{i:05d}": self._rows[start : start + _PART_ROWS]
      for i, start in enumerate(starts)
    }

  @functools.cached_property
  def _transform(self) -> transforms.KeyTransform:
    return transforms.load(self.neighbors.folder / neighbors.TRANSFORM)

  @functools.cached_property
  def _source_names(self) -> list[str]:
    """Of the whole memory, so that they are the same whatever is found."""
    if not self.memory.has_column("source"):
      return ["memory"]
    names: set[str] = set()
    for _, block in self.memory.column_blocks("source"):
      names.update(pc.unique(block).to_pylist())
    return sorted(names)

  def _sources(self, rows: np.ndarray) -> np.ndarray:
    if not self.memory.has_column("source"):
      return np.zeros(len(rows), np.int32)
    return _places(self.memory.column_rows("source", rows), self._source_names)

  @functools.cached_property
  def _class_labels(self) -> dict[str, int]:
    names = self.queries.column("class_name")
    return dict(zip(names, self.queries.column("label")))

  def _labels(self, rows: np.ndarray) -> np.ndarray:
    """Class of each row; -1 where the memory does not say."""
    memory, queries = self.memory, self.queries
    if not (memory.has_column("label") and queries.has_column("class_name")):
      return np.full(len(rows), -1, np.int32)
    of = self._class_labels
    found = [of.get(x, -1) for x in memory.column_rows("label", rows)]
    return np.array(found, np.int32)


def _places(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
  """Place of each name among the known ones, int32."""
  found = pc.index_in(
    pa.array(names, pa.string()), value_set=pa.array(known, pa.string())
  )
  return found.to_numpy(False).astype(np.int32)


def gather(
  artifact: manifest.Artifact,
  neighbors: manifest.Artifact,
  queries: Table,
  memory: Table,
  value_names: Sequence[str],
) -> None:
  """Gathers the working set in this process; see `GatherJob`."""
  jobs.run(GatherJob(artifact, neighbors, queries, memory, value_names))


def load_working_set(
  artifact: manifest.Artifact, *, check: bool = True
) -> WorkingSet:
  """Opens a finished working set; its matrices stay on disk.

  Args:
    artifact: from `working_set_artifact`.
    check: whether to verify it, which reads all; one of several processes is
      enough.

  Raises:
    UserError: a file is damaged, of another shape, or not finite.
  """
  shapes, info = artifact.shards()[_ALL]["info"], artifact.info()
  matrix: Callable[[str], Any] = lambda name: read_matrix(
    artifact.folder / f"{name}.npy",
    *shapes[name],
    artifact.remedy,
    mapped=True,
    check=check,
  )
  keys = matrix("keys")
  values = {name: matrix(f"values_{name}") for name in info["value_names"]}
  if check:
    artifact.verify()
  rows, sources, labels = (
    np.load(artifact.folder / f"{n}.npy", allow_pickle=False)
    for n in ("rows", "sources", "labels")
  )
  return WorkingSet(rows, keys, values, sources, labels, info["source_names"])
